//! The run file: TOML, strict, every key typed and defaulted.

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::anomaly::AnomalyConfig;
use crate::backward::ActivationCheckpointing;
use crate::optimizer::OptimizerConfig;
use crate::schedule::ScheduleConfig;
use crate::{Error, Result};

/// A run file, as `tallow pretrain RUN.toml` reads it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Run directory, relative to the run file. Refused if it holds another run, unless resumed.
    pub output: Option<PathBuf>,
    /// One seed for everything: initial weights, data order, dropout.
    pub seed: u64,
    /// `auto` or `cpu`.
    pub device: DeviceConfig,
    /// The architecture.
    pub model: ModelSection,
    /// The tokenizer.
    pub tokenizer: TokenizerSection,
    /// What to train and validate on.
    pub data: DataSection,
    /// What is learned.
    pub objective: ObjectiveSection,
    /// How long and in which steps.
    pub train: TrainSection,
    /// The optimizer.
    pub optimizer: OptimizerConfig,
    /// The learning rate over time.
    pub schedule: ScheduleConfig,
    /// Validation.
    pub eval: EvalSection,
    /// Checkpoints.
    pub checkpoint: CheckpointSection,
    /// What to do when the loss is not finite or jumps.
    pub anomaly: AnomalyConfig,
}

/// Where to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceConfig {
    /// The best device that this build and machine have.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
}

/// `[model]`: a preset or an existing model, and overrides by Hugging Face's keys.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelSection {
    /// A preset by name or path.
    pub preset: Option<String>,
    /// An existing model to start from: its weights, and its tokenizer unless another is given.
    pub from: Option<String>,
    /// Any other key is a Hugging Face configuration key, e.g. `hidden_size = 384`.
    #[serde(flatten)]
    pub overrides: serde_json::Map<String, Value>,
}

/// `[tokenizer]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TokenizerSection {
    /// A `tokenizer.json`, a directory with one, a SentencePiece or tiktoken file.
    pub path: Option<PathBuf>,
}

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Folders of prepared shards, or raw files and folders (prepared on first use and cached).
    pub train: Vec<PathBuf>,
    /// The same for validation; may be empty.
    pub valid: Vec<PathBuf>,
    /// Tokens a row.
    pub context_length: usize,
    /// Documents packed into rows with a mask (`true`) or one document a row, padded.
    pub packing: bool,
    /// Key of the text in jsonl and column in parquet.
    pub text_field: String,
}

impl Default for DataSection {
    fn default() -> Self {
        Self { train: vec![], valid: vec![], context_length: 256, packing: true, text_field: "text".into() }
    }
}

/// `[objective]`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ObjectiveSection {
    /// `causal`: predict the next token.
    pub kind: ObjectiveKind,
    /// Weight of the squared log-normaliser in the loss (0 for none; PaLM used 1e-4).
    pub z_loss: f64,
}

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// Predict the next token.
    #[default]
    Causal,
}

/// `[train]`: exactly one of `steps`, `tokens` and `epochs`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSection {
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Tokens to train on, rounded up to a whole step.
    pub tokens: Option<u64>,
    /// Passes over the training data, rounded up to a whole step.
    pub epochs: Option<f64>,
    /// Rows an optimizer step, over all ranks and accumulation.
    pub batch_size: usize,
    /// Rows at once; the largest that fits in memory unless given.
    pub micro_batch_size: Option<usize>,
    /// `f32`, or `bf16`: bf16 compute with f32 master weights, norms, softmax, loss and optimizer.
    pub dtype: TrainDtype,
    /// `none`, or `blocks`: keep only the inputs of blocks and run each again in the backward.
    pub activation_checkpointing: ActivationCheckpointing,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: None,
            tokens: None,
            epochs: None,
            batch_size: 8,
            micro_batch_size: None,
            dtype: TrainDtype::F32,
            activation_checkpointing: ActivationCheckpointing::None,
        }
    }
}

/// Dtype of compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainDtype {
    /// 32 bits throughout.
    #[default]
    F32,
    /// Mixed: activations and the weights that ops read in bf16, the rest in f32.
    Bf16,
}

impl From<TrainDtype> for DType {
    fn from(dtype: TrainDtype) -> Self {
        match dtype {
            TrainDtype::F32 => DType::F32,
            TrainDtype::Bf16 => DType::BF16,
        }
    }
}

/// `[eval]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvalSection {
    /// Steps between validations; 0 for none but the last.
    pub every: u64,
    /// The most tokens of the validation data to use; 0 for all.
    pub max_tokens: u64,
}

impl Default for EvalSection {
    fn default() -> Self {
        Self { every: 100, max_tokens: 0 }
    }
}

/// `[checkpoint]`. The last and the best are always kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CheckpointSection {
    /// Steps between checkpoints; 0 for the last only.
    pub every: u64,
    /// How many of the newest to keep.
    pub keep: usize,
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every: 500, keep: 2 }
    }
}

impl RunConfig {
    /// Reads a run file and applies `--set key=value` on top.
    ///
    /// # Errors
    /// For a file that cannot be read, is not TOML, or has an unknown or mistyped key: file, line, key, nearest key.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        Self::parse(&text, path, set)
    }

    /// Reads the text of a run file; `path` is for messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, path: &Path, set: &[String]) -> Result<Self> {
        let config: Self = toml::from_str(text).map_err(|error| parse_error(path, text, &error))?;
        if set.is_empty() {
            return Ok(config);
        }
        let mut table: toml::Table = toml::from_str(text).map_err(|error| parse_error(path, text, &error))?;
        for assignment in set {
            apply(&mut table, assignment)?;
        }
        serde_path_to_error::deserialize(table).map_err(|error| {
            let key = error.path().to_string();
            let given = set.iter().find(|s| s.starts_with(&key)).or(set.first());
            let value = given.and_then(|s| s.split_once('=')).map_or("", |(_, v)| v).trim();
            let key = if key == "." { "--set".into() } else { key };
            let message = with_nearest(error.inner().message());
            Error::Config { at: "--set ".into(), key, value: value.into(), reason: message }
        })
    }

    /// A path of the run file, relative to the directory `base` of that file.
    pub(crate) fn at(base: &Path, path: &Path) -> PathBuf {
        base.join(path)
    }
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = text.as_bytes()[..start].iter().filter(|&&b| b == b'\n').count() + 1;
    let shown = text.lines().nth(line - 1).map(str::trim).filter(|l| !l.is_empty());
    let message = with_nearest(error.message());
    let message = shown.map_or(message.clone(), |shown| format!("{message} (in `{shown}`)"));
    Error::Parse { path: path.into(), line, message }
}

/// Adds the nearest of the keys that serde says it expected.
fn with_nearest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let (true, Some(unknown)) = (message.starts_with("unknown"), quoted.next()) else {
        return message.to_owned();
    };
    match quoted.max_by(|a, b| strsim::jaro(a, unknown).total_cmp(&strsim::jaro(b, unknown))) {
        Some(nearest) => format!("{message}; the nearest is `{nearest}`"),
        None => message.to_owned(),
    }
}

/// Sets `a.b=value` in a table; the value is TOML, or a string where it is not.
fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let wrong = |reason: &str| Error::config("--set", assignment, reason);
    let Some((key, value)) = assignment.split_once('=') else {
        return Err(wrong("must be key=value, e.g. train.steps=100"));
    };
    let value = value.trim();
    let value = match toml::from_str::<toml::Table>(&format!("v = {value}")) {
        Ok(mut parsed) => parsed.remove("v").ok_or_else(|| wrong("has no value"))?,
        Err(_) => toml::Value::String(value.to_owned()),
    };
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let leaf = parts.pop().filter(|leaf| !leaf.is_empty()).ok_or_else(|| wrong("has no key"))?;
    let mut at = table;
    for part in parts {
        let entry = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().ok_or_else(|| wrong("goes through a key that is not a table"))?;
    }
    at.insert(leaf.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, set: &[&str]) -> String {
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        RunConfig::parse(text, Path::new("run.toml"), &set).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_typo_names_file_line_and_nearest_key() {
        let message = error("seed = 1\n[train]\nstep = 5\n", &[]);
        assert!(message.starts_with("run.toml:3:") && message.contains("nearest is `steps`"), "{message}");
    }

    #[test]
    fn a_wrong_type_names_the_line() {
        let message = error("[train]\n\nbatch_size = \"many\"\n", &[]);
        assert!(message.starts_with("run.toml:3:"), "{message}");
    }

    #[test]
    fn set_wins_over_the_file_and_is_as_strict() -> Result<()> {
        let set = ["train.steps=7".to_owned(), "model.hidden_size=12".into(), "output=some/where".into()];
        let config = RunConfig::parse("[train]\nsteps = 5\n", Path::new("run.toml"), &set)?;
        assert_eq!(config.train.steps, Some(7));
        assert_eq!(config.model.overrides["hidden_size"], serde_json::json!(12));
        assert_eq!(config.output.as_deref(), Some(Path::new("some/where")));
        let message = error("", &["train.stepz=1"]);
        assert!(message.contains("stepz") && message.contains("nearest is `steps`"), "{message}");
        assert!(error("", &["train.steps"]).contains("key=value"));
        Ok(())
    }

    #[test]
    fn every_value_survives_being_written_and_read() -> Result<()> {
        let config = RunConfig { seed: 3, ..RunConfig::default() };
        let text = toml::to_string(&config).expect("serialises");
        assert_eq!(RunConfig::parse(&text, Path::new("resolved.toml"), &[])?, config);
        Ok(())
    }
}
