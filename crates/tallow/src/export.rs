//! Writing a model in other files than it came in.

use std::path::Path;

use candle_core::{DType, Tensor};
use tallow_models::save_model;
use tallow_nn::{Error as LayerError, ForwardContext};
use tallow_ops::no_grad;

use crate::merge::{COMPARED, Difference, compare};
use crate::open::{Dtype, Error, OpenModel, Result, open};

/// Writes `model` and its tokenizer as a Hugging Face directory at `out`, whole or not at all: weights in f32, those of a
/// quantized file dequantized. What was written is read again and compared with the model over `text`.
///
/// # Errors
/// If the model cannot be read, or `out` not written; what was there is as it was then.
pub fn to_safetensors(model: &str, out: &Path, text: &str) -> Result<Difference> {
    let model = open(model, Dtype::F32)?;
    let mut ids = match model.tokenizer() {
        Ok(tokenizer) => tokenizer.encode(text, true)?,
        // Any ids show whether the weights are the same.
        Err(_) => (0..model.checkpoint().config().shape().vocab_size as u32).take(64).collect(),
    };
    ids.truncate(model.checkpoint().config().shape().max_positions.min(COMPARED));
    let dir = tallow_formats::AtomicDir::create(out)?;
    save_model(dir.path(), model.checkpoint().config(), model.store())?;
    if let Ok(tokenizer) = model.tokenizer() {
        tokenizer.save(dir.path())?;
    }
    let written = open(&dir.path().to_string_lossy(), Dtype::F32)?;
    let difference = compare(&logits(&model, &ids)?, &logits(&written, &ids)?);
    drop(written);
    dir.commit_replacing()?;
    Ok(difference)
}

fn logits(model: &OpenModel, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let tensor = |e: candle_core::Error| Error::from(LayerError::from(e));
    let x = Tensor::from_slice(ids, (1, ids.len()), model.device()).map_err(tensor)?;
    let mut cx = ForwardContext::causal(1, ids.len())?;
    let logits = no_grad(|| model.decoder().logits(&x, &mut cx))?;
    logits.squeeze(0).and_then(|x| x.to_dtype(DType::F32)).and_then(|x| x.to_vec2()).map_err(tensor)
}
