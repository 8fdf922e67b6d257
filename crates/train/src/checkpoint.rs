//! Checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! `checkpoints/step-N/` is a Hugging Face directory (so that every command runs it) plus `optimizer.safetensors` and
//! `state.json`, with `manifest.json` (sha256 of every other file). The directory is written under another name and
//! renamed when all of it is on the disk, so a kill at any instant leaves the earlier checkpoints as they were.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tallow_adapters::{AdapterPlan, PeftAdapter, SavedAdapter, write_peft};
use tallow_data::{Loader, LoaderState};
use tallow_formats::TensorSource;
use tallow_formats::hf::{AtomicDir, sha256_file};
use tallow_formats::safetensors::{SafetensorsFile, TensorData, write_safetensors};
use tallow_models::{ModelConfig, QuantizeConfig, save_model};
use tallow_nn::{Fill, Param, ParamSpec, ParamStore};
use tallow_tokenizer::Tokenizer;

use crate::anomaly::AnomalyDetector;
use crate::optimizer::AdamW;
use crate::{Error, Result};

/// Where a run stands, between two steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Steps in which the weights changed (skipped ones do not count): AdamW's bias correction.
    pub updates: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Global index of the next sample of the training data.
    pub next_sample: u64,
    /// What the loader must be for `next_sample` to mean the same.
    pub loader: LoaderState,
    /// Lowest validation loss so far; its step is `best_step`.
    #[serde(with = "as_bits")]
    pub best_loss: Option<f64>,
    /// See `best_loss`.
    pub best_step: Option<u64>,
    /// Validations since the best one.
    #[serde(default)]
    pub worse_in_a_row: u64,
    /// What `best_loss` is the loss of: a loss of other text is not to be compared with it.
    #[serde(default)]
    pub scored_on: Option<String>,
    /// What the anomaly detector has seen.
    pub anomaly: Option<AnomalyDetector>,
    /// Seconds of training before this process.
    pub elapsed_before: f64,
}

impl TrainState {
    pub(crate) fn new(loader: &Loader) -> Self {
        Self {
            step: 0,
            updates: 0,
            tokens: 0,
            next_sample: 0,
            loader: loader.state(0),
            best_loss: None,
            best_step: None,
            worse_in_a_row: 0,
            scored_on: None,
            anomaly: None,
            elapsed_before: 0.0,
        }
    }
}

/// What a run saves of its model.
pub enum Artifact {
    /// All of it, as a Hugging Face directory.
    Model(Box<dyn ModelConfig>),
    /// What was trained beside a model that stays as it was, as a PEFT directory.
    Adapter {
        /// The adapter.
        plan: Box<AdapterPlan>,
        /// Parameters of the base.
        base: Vec<ParamSpec>,
        /// What the base is called.
        base_model: String,
        /// What else is to be found again: hashes of what the adapter was trained with.
        notes: Value,
    },
}

/// The checkpoints of one run.
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
    artifact: Artifact,
    tokenizer: Option<Tokenizer>,
}

const STATE: &str = "state.json";
const OPTIMIZER: &str = "optimizer.safetensors";
const MANIFEST: &str = "manifest.json";

impl Checkpoints {
    /// In `dir`, keeping the newest `keep` besides the last and the best.
    pub fn new(dir: PathBuf, keep: usize, artifact: Artifact, tokenizer: Option<Tokenizer>) -> Self {
        Self { dir, keep, artifact, tokenizer }
    }

    /// Steps that there are checkpoints of, ascending. Only whole directories have such a name.
    fn steps(&self) -> Result<Vec<u64>> {
        let entries = match std::fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
            Err(e) => return Err(Error::io(&self.dir, e)),
        };
        let mut steps = vec![];
        for entry in entries {
            let name = entry.map_err(|e| Error::io(&self.dir, e))?.file_name();
            steps.extend(name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// The folder of the checkpoint of `step`.
    pub fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("step-{step}"))
    }

    /// The newest checkpoint whose files have the hashes of its manifest, and what to tell about newer, damaged ones.
    ///
    /// # Errors
    /// If there are checkpoints and every one is damaged.
    pub fn newest(&self) -> Result<Option<(PathBuf, Vec<String>)>> {
        let mut notices = vec![];
        for step in self.steps()?.into_iter().rev() {
            let path = self.path(step);
            match verify(&path) {
                Ok(()) => return Ok(Some((path, notices))),
                Err(error) => notices.push(format!("{error}; an earlier checkpoint is used")),
            }
        }
        match notices.into_iter().next() {
            Some(first) => Err(Error::Checkpoint { path: self.dir.clone(), reason: format!("none is whole: {first}") }),
            None => Ok(None),
        }
    }

    /// Writes the checkpoint of `state.step`, then removes what is no longer to be kept.
    ///
    /// # Errors
    /// If it cannot be written; nothing earlier is touched then.
    pub fn save(&self, state: &TrainState, store: &ParamStore, optimizer: &AdamW) -> Result<PathBuf> {
        let path = self.path(state.step);
        // The same state is not written twice; after a rollback the same step may be another state.
        let elapsed = state.elapsed_before;
        let same = |saved: TrainState| TrainState { elapsed_before: elapsed, ..saved } == *state;
        if path.exists() && verify(&path).is_ok() && read_state(&path).is_ok_and(same) {
            return Ok(path);
        }
        let dir = AtomicDir::create(&path)?;
        self.write_model(dir.path(), store)?;
        write_safetensors(&dir.path().join(OPTIMIZER), moment_tensors(store, optimizer), &[])?;
        tallow_formats::write_json(&dir.path().join(STATE), state)?;
        write_manifest(dir.path())?;
        dir.commit_replacing()?;
        self.prune(state)?;
        Ok(path)
    }

    /// Writes the model and its tokenizer as a Hugging Face directory at `path`, whole or not at all.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save_final(&self, path: &Path, store: &ParamStore) -> Result<()> {
        let dir = AtomicDir::create(path)?;
        self.write_model(dir.path(), store)?;
        dir.commit_replacing()?;
        Ok(())
    }

    /// Whether the model in `dir` is that of the checkpoint of `step`, whatever else is there.
    ///
    /// # Errors
    /// If a file of weights is there and cannot be read.
    pub fn is_final_of(&self, step: u64, dir: &Path) -> Result<bool> {
        let Ok(hashes) = read_manifest(&self.path(step)) else { return Ok(false) };
        for (name, hash) in hashes.iter().filter(|(name, _)| ![STATE, OPTIMIZER].contains(&name.as_str())) {
            let file = dir.join(name);
            // The other files may have been edited, as a model card or a template is.
            if !file.is_file() || (name.ends_with(".safetensors") && sha256_file(&file)? != *hash) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write_model(&self, dir: &Path, store: &ParamStore) -> Result<()> {
        match &self.artifact {
            Artifact::Model(config) => save_model(dir, config.as_ref(), store)?,
            Artifact::Adapter { plan, base_model, notes, .. } => {
                write_peft(dir, plan, store, base_model, Some(notes.clone()))?;
            }
        }
        if let Some(tokenizer) = &self.tokenizer {
            tokenizer.save(dir)?;
        }
        Ok(())
    }

    fn prune(&self, state: &TrainState) -> Result<()> {
        // Newer ones are damaged or void (the run went back behind them): no reason to remove this one for them.
        let steps: Vec<u64> = self.steps()?.into_iter().filter(|&step| step <= state.step).collect();
        let surplus = steps.len().saturating_sub(self.keep.max(1));
        for &step in steps[..surplus].iter().filter(|&&step| Some(step) != state.best_step) {
            let path = self.path(step);
            // A half-removed checkpoint must not look like one.
            let doomed = self.dir.join(format!("removing-{step}"));
            std::fs::rename(&path, &doomed).map_err(|e| Error::io(&path, e))?;
            std::fs::remove_dir_all(&doomed).map_err(|e| Error::io(&doomed, e))?;
        }
        Ok(())
    }

    /// Puts a checkpoint's weights, moments and position back.
    ///
    /// # Errors
    /// If a file does not hold what this run needs, or was made from other data or of another model.
    pub fn restore(&self, path: &Path, store: &ParamStore, optimizer: &AdamW, loader: &Loader) -> Result<TrainState> {
        let state = read_state(path)?;
        loader.check_state(&state.loader)?;
        let weights = self.open_weights(path)?;
        let moments = SafetensorsFile::open(&path.join(OPTIMIZER))?;
        for (index, bucket) in store.buckets().iter().enumerate() {
            let Some(master) = &bucket.master else { continue };
            let members: Vec<&Param> = store.params().iter().filter(|p| p.bucket == index).collect();
            fill_bucket(master, &members, &mut |param, out| Ok(weights.fill(&param.spec, out)?))?;
            if bucket.compute.dtype() != master.dtype() {
                tallow_ops::cast_to_bf16(master, &bucket.compute)?;
            }
            let Some((m, v)) = optimizer.moments(index) else { continue };
            for (kind, flat) in [("m", m), ("v", v)] {
                fill_bucket(flat, &members, &mut |param, out| {
                    Ok(moments.read_f32(&format!("{kind}.{}", param.spec.name), out)?)
                })?;
            }
        }
        if let Artifact::Adapter { plan, .. } = &self.artifact {
            // Where an adapter started is frozen: what was saved of it counts, not what this machine makes of the base.
            for param in store.params().iter().filter(|param| plan.is_start(&param.spec)) {
                let compute = &store.buckets()[param.bucket].compute;
                let mut values = vec![0f32; param.spec.num_elements()];
                weights.fill(&param.spec, &mut values)?;
                let values = Tensor::from_vec(values, param.spec.num_elements(), &Device::Cpu)?;
                compute.slice_set(&values.to_dtype(compute.dtype())?.to_device(compute.device())?, 0, param.offset)?;
            }
        }
        Ok(state)
    }
}

impl Checkpoints {
    /// The values of a checkpoint, once it is found to be of the model or adapter that this run trains.
    fn open_weights(&self, path: &Path) -> Result<Box<dyn Fill>> {
        match &self.artifact {
            Artifact::Model(config) => {
                let dir = tallow_formats::hf::ModelDir::open(path)?;
                let weights = tallow_models::Checkpoint::open_dir(&dir)?;
                check_config(&weights.config().to_hf(), &config.to_hf())?;
                Ok(Box::new(weights))
            }
            Artifact::Adapter { plan, base, base_model, notes } => {
                let files = PeftAdapter::open(path)?;
                let saved = files.plan(base)?;
                if !plan.in_files().is_same(&saved) {
                    let reason = "the run was started with other modules, ranks or alphas; set [adapter] back, or choose \
                                  another `output`";
                    return Err(Error::config("adapter", "(a section)", reason));
                }
                if let Some(was) = files.notes() {
                    check_notes(was, notes, base_model)?;
                }
                Ok(Box::new(SavedAdapter::new(files, plan.as_ref().clone())))
            }
        }
    }
}

/// An adapter goes on beside what it was begun beside; each note comes from one key of the run file.
fn check_notes(was: &Value, is: &Value, base_model: &str) -> Result<()> {
    let keys = [
        ("base_quantization", "adapter.quantize"),
        ("prefix_lm", "objective.kind"),
        ("adapter_init", "adapter.init"),
        ("base_config_sha256", "model.from"),
        ("base_weights_sha256", "model.from"),
        ("encoder_fingerprint", "tokenizer.chat_template"),
    ];
    let null = Value::Null;
    let note = |notes: &Value, key: &str| notes.get(key).cloned().unwrap_or(Value::Null);
    let Some((name, key)) = keys.into_iter().find(|(name, _)| note(was, name) != note(is, name)) else { return Ok(()) };
    let (value, started) = match name {
        "base_quantization" => {
            (QuantizeConfig::note_in_words(is.get(name)), QuantizeConfig::note_in_words(was.get(name)))
        }
        "prefix_lm" | "adapter_init" => {
            (is.get(name).unwrap_or(&null).to_string(), was.get(name).unwrap_or(&null).to_string())
        }
        "encoder_fingerprint" => ("(changed)".to_owned(), "another tokenizer or chat template".to_owned()),
        _ => (base_model.to_owned(), "a model of the same shapes with other weights or settings".to_owned()),
    };
    let reason = format!("the run was started with {started}; set it back, or choose another `output`");
    Err(Error::config(key, value, reason))
}

/// Equal shapes do not make it the same model: a preset's file or the model that the run started from may have changed.
fn check_config(saved: &Value, now: &Value) -> Result<()> {
    for (key, was) in saved.as_object().into_iter().flatten() {
        let is = now.get(key).unwrap_or(&Value::Null);
        if !same(was, is) {
            let reason = format!("the run was started with {was}; set it back, or choose another `output`");
            return Err(Error::config(&format!("model.{key}"), is, reason));
        }
    }
    Ok(())
}

/// Numbers but for the last digit, which JSON readers need not keep.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => match (x.as_f64(), y.as_f64()) {
            (Some(x), Some(y)) => (x - y).abs() <= 1e-9 * x.abs().max(y.abs()),
            _ => x == y,
        },
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| same(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(key, x)| y.get(key).is_some_and(|y| same(x, y)))
        }
        _ => a == b,
    }
}

fn read_state(path: &Path) -> Result<TrainState> {
    let text = std::fs::read_to_string(path.join(STATE)).map_err(|e| Error::io(path.join(STATE), e))?;
    let wrong = |e| Error::Checkpoint { path: path.to_path_buf(), reason: format!("{STATE}: {e}") };
    serde_json::from_str(&text).map_err(wrong)
}

/// Writes each member's slice of a flat f32 tensor, in place: layers and optimizer hold views of it.
fn fill_bucket(
    flat: &Tensor,
    members: &[&Param],
    read: &mut dyn FnMut(&Param, &mut [f32]) -> Result<()>,
) -> Result<()> {
    for param in members {
        let mut values = vec![0f32; param.spec.num_elements()];
        read(param, &mut values)?;
        let values = Tensor::from_vec(values, param.spec.num_elements(), &Device::Cpu)?.to_device(flat.device())?;
        flat.slice_set(&values, 0, param.offset)?;
    }
    Ok(())
}

fn moment_tensors<'a>(store: &'a ParamStore, optimizer: &'a AdamW) -> Vec<TensorData<'a>> {
    let mut tensors = vec![];
    for param in store.params() {
        let Some((m, v)) = optimizer.moments(param.bucket) else { continue };
        for (kind, flat) in [("m", m), ("v", v)] {
            let (name, len) = (format!("{kind}.{}", param.spec.name), param.spec.num_elements());
            tensors.push(TensorData::from_fn(name, param.spec.shape.clone(), move || {
                flat.narrow(0, param.offset, len)?.to_vec1::<f32>()
            }));
        }
    }
    tensors
}

fn files_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        files.push(entry.map_err(|e| Error::io(dir, e))?.path());
    }
    files.sort();
    Ok(files)
}

fn write_manifest(dir: &Path) -> Result<()> {
    let mut hashes = BTreeMap::new();
    for file in files_of(dir)? {
        if let Some(name) = file.file_name().and_then(|n| n.to_str()) {
            hashes.insert(name.to_owned(), sha256_file(&file)?);
        }
    }
    tallow_formats::write_json(&dir.join(MANIFEST), &hashes)?;
    Ok(())
}

/// The sha256 of every file of a checkpoint.
fn read_manifest(dir: &Path) -> Result<BTreeMap<String, String>> {
    let manifest = dir.join(MANIFEST);
    let text = std::fs::read_to_string(&manifest).map_err(|e| Error::io(&manifest, e))?;
    let wrong = |reason: String| Error::Checkpoint { path: dir.to_path_buf(), reason };
    serde_json::from_str(&text).map_err(|e| wrong(format!("{MANIFEST}: {e}")))
}

fn verify(dir: &Path) -> Result<()> {
    let wrong = |reason: String| Error::Checkpoint { path: dir.to_path_buf(), reason };
    let hashes = read_manifest(dir)?;
    for required in [STATE, OPTIMIZER] {
        if !hashes.contains_key(required) {
            return Err(wrong(format!("{MANIFEST} does not list {required}")));
        }
    }
    for (name, expected) in hashes {
        if sha256_file(&dir.join(&name))? != expected {
            return Err(wrong(format!("{name} is damaged: its hash is not the one in {MANIFEST}")));
        }
    }
    Ok(())
}

/// A number as the integer of its bits: JSON readers need not round-trip every decimal, and a resumed run compares it.
mod as_bits {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::ref_option, reason = "the signature is serde's")]
    pub(super) fn serialize<S: Serializer>(value: &Option<f64>, to: S) -> Result<S::Ok, S::Error> {
        value.map(f64::to_bits).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<u64>::deserialize(from)?.map(f64::from_bits))
    }
}
