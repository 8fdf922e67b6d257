//! Models and adapters in other files than they came in, and how far what was written is from what was read.

use std::path::Path;

use tallow_adapters::NamedAdapter;
use tallow_models::save_model;
use tallow_nn::plan_params;

use crate::gguf_adapter::{open_adapter, write_adapter};
use crate::merge::{Difference, compare, compared_ids, logits};
use crate::open::{Dtype, Error, Result, open, open_adapted};

/// Writes the adapter at `adapter` of `model` as a GGUF file at `out`, reads it back, and compares the two beside their
/// model over `text`.
///
/// # Errors
/// If the model or the adapter cannot be read, do not belong together, or llama.cpp has no such adapters.
pub fn adapter_to_gguf(model: &str, adapter: &Path, out: &Path, text: &str) -> Result<Difference> {
    let (ids, before) = {
        let adapted = open_adapted(model, &[NamedAdapter::new(adapter)], Dtype::F32)?;
        let config = adapted.checkpoint().config();
        let (_, base) = plan_params(|b| config.build(b))?;
        let files = open_adapter(adapter, config, &base)?;
        let plan = files.plan(&base)?;
        let ids = compared_ids(&adapted, adapter, text)?;
        let before = logits(adapted.decoder(), adapted.device(), &ids)?;
        write_adapter(out, adapted.checkpoint(), config, &base, &plan, &files)?;
        (ids, before)
    };
    let converted = open_adapted(model, &[NamedAdapter::new(out)], Dtype::F32)?;
    Ok(compare(&before, &logits(converted.decoder(), converted.device(), &ids)?))
}

/// Writes `model` and its tokenizer as a Hugging Face directory at `out`, whole or not at all: weights in f32, those of a
/// quantized file dequantized. What was written is read again and compared with the model over `text`.
///
/// # Errors
/// If the model cannot be read, `out` is there or cannot be written, or what was written gives other logits.
pub fn to_safetensors(model: &str, out: &Path, text: &str) -> Result<Difference> {
    if out.exists() {
        return Err(Error::Convert { path: out.to_path_buf(), reason: "exists already; choose another name".into() });
    }
    let model = open(model, Dtype::F32)?;
    // Without a tokenizer any ids show whether the weights are the same.
    let shape = model.checkpoint().config().shape();
    let some = || (0..shape.vocab_size.min(shape.max_positions).min(64) as u32).collect();
    let ids = if model.tokenizer().is_ok() { compared_ids(&model, model.checkpoint().path(), text)? } else { some() };
    let dir = tallow_formats::AtomicDir::create(out)?;
    save_model(dir.path(), model.checkpoint().config(), model.store())?;
    if let Ok(tokenizer) = model.tokenizer() {
        tokenizer.save(dir.path())?;
    }
    let before = logits(model.decoder(), model.device(), &ids)?;
    let written = open(&dir.path().to_string_lossy(), Dtype::F32)?;
    let difference = compare(&before, &logits(written.decoder(), written.device(), &ids)?);
    drop(written);
    if difference.max_logit_difference != 0.0 {
        let reason =
            format!("what was written is not the model: its logits differ by {}", difference.max_logit_difference);
        return Err(Error::Convert { path: out.to_path_buf(), reason });
    }
    dir.commit_replacing()?;
    Ok(difference)
}
