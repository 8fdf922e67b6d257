//! Models and adapters in other files than they came in, and how far what was written is from what was read.

use std::path::Path;

use tallow_adapters::NamedAdapter;
use tallow_models::{QuantizeConfig, save_model};
use tallow_nn::plan_params;

use crate::gguf_adapter::{Parts, open_adapter, write_adapter};
use crate::merge::{Difference, compare, compared_ids, logits};
use crate::open::{Base, Dtype, Error, OpenOptions, Result, open, open_with};

/// What was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Of what was written from what was read.
    pub difference: Difference,
    /// What the new form does not say.
    pub notes: Vec<String>,
}

/// The most that logits may differ by for what was written to count as the same: f32 sums in the same order but for a factor
/// that moved from alpha into a matrix.
const SAME: f64 = 1e-3;

/// Writes the adapter at `adapter` of `model` as a GGUF file at `out`, reads it back, and compares the two beside the model's own
/// weights over `text`.
///
/// # Errors
/// If the model or the adapter cannot be read, do not belong together, llama.cpp has no such adapters, or what was written gives
/// other logits; there is no file at `out` then.
pub fn adapter_to_gguf(model: &str, adapter: &Path, out: &Path, text: &str) -> Result<Converted> {
    let wrong = |reason: String| Error::Convert { path: out.to_path_buf(), reason };
    if out.exists() {
        return Err(wrong("exists already; choose another name".into()));
    }
    let Some(name) = out.file_name() else { return Err(wrong("is no name for a file".into())) };
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(|e| wrong(format!("its folder cannot be made: {e}")))?;
    }
    let partial = out.with_file_name(format!(".partial-{}", name.to_string_lossy()));
    let converted = write_and_compare(model, adapter, &partial, text).and_then(|converted| {
        std::fs::rename(&partial, out).map_err(|e| wrong(e.to_string()))?;
        Ok(converted)
    });
    if converted.is_err() {
        // The error to report is that of the conversion.
        let _ = std::fs::remove_file(&partial);
    }
    converted
}

fn write_and_compare(model: &str, adapter: &Path, out: &Path, text: &str) -> Result<Converted> {
    let beside = |adapter: &Path| {
        let adapters = [NamedAdapter::new(adapter)];
        open_with(model, OpenOptions { adapters: &adapters, base: Base::Original, dtype: Dtype::F32 })
    };
    let mut notes = vec![];
    let (ids, before) = {
        let adapted = beside(adapter)?;
        let config = adapted.checkpoint().config();
        let (_, base) = plan_params(|b| config.build(b))?;
        let files = open_adapter(adapter, config, &base)?;
        let said = |key: &str| files.notes().and_then(|notes| notes.get(key));
        if said("prefix_lm").is_some() {
            let reason = "sees prompts another way than its model (prefix_lm), which a GGUF adapter cannot say; use `tallow \
                          merge`";
            return Err(Error::Convert { path: adapter.to_path_buf(), reason: reason.into() });
        }
        if let Some(trained) = said("base_quantization") {
            let trained = QuantizeConfig::note_in_words(Some(trained));
            notes.push(format!(
                "note: the adapter was trained beside {trained}; as a GGUF file it is put beside the model's own weights"
            ));
        }
        if adapter.join("tokenizer.json").is_file() {
            notes.push(
                "note: the adapter's tokenizer and chat template are not in the file: the model's are used".into(),
            );
        }
        // That it was trained beside other weights, say.
        notes.extend(adapted.notices().iter().cloned());
        let plan = files.plan(&base)?;
        let ids = compared_ids(&adapted, adapter, text)?;
        let before = logits(adapted.decoder(), adapted.device(), &ids)?;
        let parts = Parts { model: adapted.checkpoint(), config, base: &base, plan: &plan, files: &files };
        write_adapter(out, parts)?;
        (ids, before)
    };
    let written = beside(out)?;
    let difference = compare(&before, &logits(written.decoder(), written.device(), &ids)?);
    if difference.max_logit_difference.is_nan() || difference.max_logit_difference > SAME {
        let reason = format!("read back it gives other logits, by {}", difference.max_logit_difference);
        return Err(Error::Convert { path: adapter.to_path_buf(), reason });
    }
    Ok(Converted { difference, notes })
}

/// Writes `model` and its tokenizer as a Hugging Face directory at `out`, whole or not at all: weights in f32, those of a
/// quantized file dequantized. What was written is read again and compared with the model over `text`.
///
/// # Errors
/// If the model cannot be read, `out` is there or cannot be written, or what was written gives other logits.
pub fn to_safetensors(model: &str, out: &Path, text: &str) -> Result<Converted> {
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
    let mut notes = vec![];
    match model.tokenizer() {
        Ok(tokenizer) => tokenizer.save(dir.path())?,
        Err(reason) => notes.push(format!("note: there is no tokenizer in it: {reason}")),
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
    Ok(Converted { difference, notes })
}
