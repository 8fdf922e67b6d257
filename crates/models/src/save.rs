//! Writing a model as a Hugging Face directory.

use std::path::Path;

use serde_json::Value;
use tallow_formats::safetensors::{TensorData, write_sharded};
use tallow_nn::{Param, ParamStore};

use crate::checkpoint::transpose;
use crate::{ModelConfig, Result};

/// Writes `config.json`, `generation_config.json` and the weights (f32, Hugging Face's names and shapes) into `dir`,
/// which exists and is empty: the caller makes it appear at once, complete, or not at all.
///
/// # Errors
/// If a file cannot be written.
pub fn save_model(dir: &Path, config: &dyn ModelConfig, store: &ParamStore) -> Result<()> {
    let hf = config.to_hf();
    tallow_formats::write_json(&dir.join("config.json"), &hf)?;
    tallow_formats::write_json(&dir.join("generation_config.json"), &generation_config(&hf))?;
    let tensors = store.params().iter().map(|param| {
        TensorData::from_fn(param.spec.name.clone(), param.spec.stored_shape(), move || stored(store, param))
    });
    write_sharded(dir, tensors.collect(), &[("format", "pt")])?;
    Ok(())
}

/// The values of a parameter as a checkpoint stores them.
fn stored(store: &ParamStore, param: &Param) -> Result<Vec<f32>> {
    let value = store.value(param)?.to_dtype(candle_core::DType::F32)?;
    let flat = value.flatten_all()?.to_vec1::<f32>()?;
    if !param.spec.stored_transposed {
        return Ok(flat);
    }
    let mut transposed = vec![0f32; flat.len()];
    transpose(&flat, param.spec.shape[0], param.spec.shape[1], &mut transposed);
    Ok(transposed)
}

fn generation_config(hf: &Value) -> Value {
    let mut value = serde_json::json!({ "_from_model_config": true });
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = hf.get(key).filter(|id| !id.is_null()) {
            value[key] = id.clone();
        }
    }
    value
}
