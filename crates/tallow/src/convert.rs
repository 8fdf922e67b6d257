//! Converting an adapter, and measuring what that changes.

use std::path::Path;

use tallow_nn::plan_params;

use crate::gguf_adapter::{open_adapter, write_adapter};
use crate::merge::{Difference, compare, compared_ids, logits};
use crate::open::{Dtype, Result, open_adapted};

/// Writes the adapter at `adapter` of `model` as a GGUF file at `out`, reads it back, and compares the two beside their
/// model over `text`.
///
/// # Errors
/// If the model or the adapter cannot be read, do not belong together, or llama.cpp has no such adapters.
pub fn adapter_to_gguf(model: &str, adapter: &Path, out: &Path, text: &str) -> Result<Difference> {
    let (ids, before) = {
        let adapted = open_adapted(model, Some(adapter), Dtype::F32)?;
        let config = adapted.checkpoint().config();
        let (_, base) = plan_params(|b| config.build(b))?;
        let files = open_adapter(adapter, config, &base)?;
        let plan = files.plan(&base)?;
        write_adapter(out, adapted.checkpoint(), config, &base, &plan, &files)?;
        let ids = compared_ids(&adapted, adapter, text)?;
        let before = logits(adapted.decoder(), adapted.device(), &ids)?;
        (ids, before)
    };
    let converted = open_adapted(model, Some(out), Dtype::F32)?;
    Ok(compare(&before, &logits(converted.decoder(), converted.device(), &ids)?))
}
