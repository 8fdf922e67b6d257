//! Writing an adapter as the `peft` package reads it, and reading it again to go on.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};
use tallow_formats::safetensors::{TensorData, write_safetensors};
use tallow_nn::{Fill, Param, ParamSpec, ParamStore, Role};

use crate::peft::transpose;
use crate::{ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterPlan, Error, PEFT_PREFIX, PeftAdapter, Result};

/// Writes the adapter of `store` into `dir`, which exists, as `peft` reads it. `base_model` is the model that it belongs to,
/// `notes` what this program wants to find again.
///
/// # Errors
/// If a file cannot be written or a value read.
pub fn write_peft(
    dir: &Path,
    plan: &AdapterPlan,
    store: &ParamStore,
    base_model: &str,
    notes: Option<Value>,
) -> Result<()> {
    let mut config = config_of(&plan.in_files(), base_model);
    let mut specs = store.params().iter().map(|p| &p.spec).chain(store.packed().iter().map(|p| &p.spec));
    let tied = specs.all(|spec| spec.role != Role::Head);
    let whole = store.trained().any(|p| p.spec.role == Role::Embed && plan.saved.contains(&p.spec.name));
    // The head was trained with it, which PEFT does if told.
    config["ensure_weight_tying"] = json!(tied && whole);
    if let (Some(notes), Some(map)) = (notes, config.as_object_mut()) {
        map.insert("tallow".into(), notes);
    }
    tallow_formats::write_json(&dir.join(ADAPTER_CONFIG), &config)?;
    let trained = store.params().iter().filter(|param| plan.is_trained(&param.spec));
    let tensors = trained.map(|param| {
        let name = format!("{PEFT_PREFIX}{}", param.spec.name);
        match plan.start_of(&param.spec) {
            None => Ok(TensorData::from_fn(name, param.spec.stored_shape(), move || stored(store, param))),
            Some(start) => {
                let Some(start) = store.params().iter().find(|param| param.spec.name == start) else {
                    return Err(Error::files(dir, format!("`{start}` is not in the store")));
                };
                let halves = Halves::new(&param.spec);
                let both = move || Ok::<_, Error>(halves.join(&stored(store, param)?, &stored(store, start)?));
                Ok(TensorData::from_fn(name, halves.shape(), both))
            }
        }
    });
    write_safetensors(&dir.join(ADAPTER_WEIGHTS), tensors.collect::<Result<_>>()?, &[("format", "pt")])?;
    Ok(())
}

/// How a matrix and its start lie in one: `A` above `A0`, `B` beside `-B0`.
#[derive(Clone, Copy)]
struct Halves {
    rows: usize,
    columns: usize,
    beside: bool,
}

impl Halves {
    fn new(spec: &ParamSpec) -> Self {
        let beside = spec.name.ends_with("_B.weight");
        Self { rows: spec.shape[0], columns: spec.shape[1], beside }
    }

    fn shape(self) -> Vec<usize> {
        if self.beside { vec![self.rows, 2 * self.columns] } else { vec![2 * self.rows, self.columns] }
    }

    fn join(self, matrix: &[f32], start: &[f32]) -> Vec<f32> {
        if !self.beside {
            return [matrix, start].concat();
        }
        let rows = matrix.chunks_exact(self.columns).zip(start.chunks_exact(self.columns));
        rows.flat_map(|(row, start)| row.iter().copied().chain(start.iter().map(|x| -x))).collect()
    }

    /// The half of `both` that is the start, or the other.
    fn half(self, both: &[f32], start: bool, out: &mut [f32]) {
        if !self.beside {
            let first = if start { out.len() } else { 0 };
            out.copy_from_slice(&both[first..first + out.len()]);
            return;
        }
        let (first, sign) = if start { (self.columns, -1.0) } else { (0, 1.0) };
        for (out, both) in out.chunks_exact_mut(self.columns).zip(both.chunks_exact(2 * self.columns)) {
            out.iter_mut().zip(&both[first..]).for_each(|(out, x)| *out = sign * x);
        }
    }
}

/// The values of an adapter that goes on being trained, from what [`write_peft`] wrote of it: as `plan` has it, starts apart.
pub struct SavedAdapter {
    files: PeftAdapter,
    plan: AdapterPlan,
}

impl SavedAdapter {
    /// Of `files`, whose own plan is [`AdapterPlan::in_files`] of `plan`.
    pub fn new(files: PeftAdapter, plan: AdapterPlan) -> Self {
        Self { files, plan }
    }
}

impl Fill for SavedAdapter {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow_nn::Result<()> {
        let start = self.plan.is_start(spec);
        if !start && self.plan.start_of(spec).is_none() {
            return self.files.fill(spec, out);
        }
        let halves = Halves::new(spec);
        let name = spec.name.replace(".lora_start_", ".lora_");
        let both = ParamSpec { name, shape: halves.shape(), ..spec.clone() };
        let mut values = vec![0f32; both.num_elements()];
        self.files.fill(&both, &mut values)?;
        halves.half(&values, start, out);
        Ok(())
    }
}

fn stored(store: &ParamStore, param: &Param) -> Result<Vec<f32>> {
    let value = store.value(param)?.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    if !param.spec.stored_transposed {
        return Ok(value);
    }
    let mut transposed = vec![0f32; value.len()];
    transpose(&value, param.spec.shape[0], &mut transposed);
    Ok(transposed)
}

fn config_of(plan: &AdapterPlan, base_model: &str) -> Value {
    let config = &plan.config;
    let mut ranks = Map::new();
    let mut alphas = Map::new();
    for (module, adapted) in &plan.modules {
        if adapted.rank != config.rank {
            ranks.insert(module.clone(), json!(adapted.rank));
        }
        if adapted.alpha != config.alpha {
            alphas.insert(module.clone(), whole(adapted.alpha));
        }
    }
    let saved: BTreeSet<&str> = plan.saved.iter().filter_map(|name| name.rsplit_once('.').map(|(m, _)| m)).collect();
    let targets: Vec<&str> = match plan.compact.is_empty() {
        true => plan.modules.keys().map(String::as_str).collect(),
        false => plan.compact.iter().map(String::as_str).collect(),
    };
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "modules_to_save": if saved.is_empty() { Value::Null } else { json!(saved) },
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "trainable_token_indices": token_indices(plan),
        "use_rslora": config.rslora,
        "use_dora": plan.modules.values().any(|m| m.dora),
        "fan_in_fan_out": plan.modules.values().any(|m| m.stored_transposed && !m.embedding),
        "bias": "none",
        "init_lora_weights": true,
        "inference_mode": true,
    })
}

/// A list means the embedding; heads of their own are named.
fn token_indices(plan: &AdapterPlan) -> Value {
    let end = |module: &str| module.rsplit_once('.').map_or(module, |(_, end)| end).to_owned();
    let mut tables: Vec<(String, &[u32])> = plan.tokens().map(|(module, tokens)| (end(module), tokens)).collect();
    match tables.as_slice() {
        [] => Value::Null,
        [(name, tokens)] if name != "lm_head" => json!(tokens),
        _ => Value::Object(tables.drain(..).map(|(name, tokens)| (name, json!(tokens))).collect()),
    }
}

/// A whole number as one: PEFT declares `lora_alpha` an integer.
fn whole(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}
