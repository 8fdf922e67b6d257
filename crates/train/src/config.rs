//! The run file: TOML, strict, every key typed and defaulted.

mod adapter;
mod read;

use std::path::{Path, PathBuf};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tallow_data::{NothingLearnt, OnMalformed, Shape};

use crate::anomaly::AnomalyConfig;
use crate::backward::ActivationCheckpointing;
use crate::optimizer::OptimizerConfig;
use crate::reference::documented;
use crate::schedule::ScheduleConfig;
use crate::{Error, Result};

pub(crate) use adapter::adapter_error;
pub use adapter::{AdapterKind, AdapterSection, InitSetting, TargetsSetting};
pub use read::Source;

documented! {
    /// A run file, as `tallow pretrain RUN.toml` and `tallow finetune RUN.toml` read it.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct RunConfig {
        /// Run directory. Refused if it holds another run, unless `--resume` continues it. Required.
        pub output: Option<PathBuf>,
        /// One seed for everything: initial weights, data order, dropout.
        pub seed: u64,
        /// `auto` (the best that this build and machine have) or `cpu`.
        pub device: DeviceConfig,
        /// The architecture: a preset or an existing model, and Hugging Face's keys to change it.
        pub model: ModelSection,
        /// Where the vocabulary comes from.
        pub tokenizer: TokenizerSection,
        /// What to train and validate on.
        pub data: DataSection,
        /// What is learned.
        pub objective: ObjectiveSection,
        /// Train a few small matrices beside `model.from` instead of all of it (`tallow finetune` only); without this section
        /// all of it is trained.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub adapter: Option<AdapterSection>,
        /// How long and in which steps.
        pub train: TrainSection,
        /// How gradients become steps.
        pub optimizer: OptimizerConfig,
        /// The learning rate over time.
        pub schedule: ScheduleConfig,
        /// When the validation data is scored.
        pub eval: EvalSection,
        /// What is kept of a run while it goes on. The last and the best (lowest validation loss) are always kept.
        pub checkpoint: CheckpointSection,
        /// What to do when the loss or the gradient is not finite, or the loss jumps.
        pub anomaly: AnomalyConfig,
        /// Mesh axes over which a run is spread; their product is the number of processes. This build runs one process:
        /// every axis must be 1.
        pub parallel: ParallelSection,
    }
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

documented! {
    /// `[model]`: a preset or an existing model, and overrides by Hugging Face's keys.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(default)]
    pub struct ModelSection {
        /// A preset of `models/` by name or path. One of `preset`, `from` and `architectures` is needed.
        pub preset: Option<String>,
        /// An existing model to start from (a Hugging Face directory, a `.gguf` file, a name in the local store): its
        /// weights, and its tokenizer unless another is given.
        pub from: Option<String>,
        /// A key of Hugging Face's `config.json`, which overrides the preset, e.g. `hidden_size = 384`.
        #[serde(flatten)]
        pub overrides: serde_json::Map<String, Value>,
    }
}

documented! {
    /// `[tokenizer]`.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct TokenizerSection {
        /// A `tokenizer.json`, a directory with one, a SentencePiece or tiktoken file; what `model.from` brings unless
        /// given.
        pub path: Option<PathBuf>,
        /// Tokens that are added behind the vocabulary and found in text as they are written, e.g. `["<think>", "</think>"]`. Of an existing model the embedding (and
        /// head) grows where it has no row to spare; beside an adapter the new rows are trained.
        pub add_tokens: Vec<String>,
        /// The same, for tokens of a chat template: written in the contents of messages they stay text.
        pub add_special_tokens: Vec<String>,
        /// How conversations are written: a file with a Jinja template, or `chatml`, `llama3`, `alpaca`...; the tokenizer's own
        /// unless given.
        pub chat_template: Option<String>,
    }
}

documented! {
    /// `[data]`.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct DataSection {
        /// Folders of prepared shards (`tallow data prepare`), or raw files and folders of text, jsonl and parquet, which
        /// are prepared on first use and kept in `.tallow-cache` beside the run file. With `objective.kind = "sft"` jsonl or
        /// parquet of conversations. Required.
        pub train: Vec<PathBuf>,
        /// The same for validation; none for no validation.
        pub valid: Vec<PathBuf>,
        /// Part of the examples of `train` that is held out as `valid` (with `objective.kind = "sft"`), by a hash of each.
        pub valid_fraction: f64,
        /// What happens to an example of more than `context_length` tokens (with `objective.kind = "sft"`): `drop`, `error`, or
        /// `truncate_end`. What was dropped or cut is counted and told.
        pub too_long: TooLongSetting,
        /// What happens to a record that is malformed or that the chat template refuses (with `objective.kind = "sft"`): `error`,
        /// `report` (left out and counted, but too many are an error), or `skip` (left out and counted).
        pub on_malformed: OnMalformed,
        /// What happens to an example of which nothing would be learnt (with `objective.kind = "sft"`): `error` or `skip`.
        pub nothing_learnt: NothingLearnt,
        /// Which fields hold an example (with `objective.kind = "sft"`), where records have those of several: `messages`,
        /// `conversations`, `completion`, `alpaca` or `text`; recognised unless given.
        pub shape: Option<Shape>,
        /// Roles of `messages` (with `objective.kind = "sft"`) beside `system`, `user`, `assistant`, `tool`, `developer`,
        /// `function` and those that the chat template names. Any other role is malformed, as it may be misspelt.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        pub roles: Vec<String>,
        /// Tokens a row; at most the model's positions.
        pub context_length: usize,
        /// Documents packed into rows with a mask (`true`) or one document a row, padded.
        pub packing: bool,
        /// Key of the text in jsonl and column in parquet.
        pub text_field: String,
    }
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: vec![],
            valid: vec![],
            valid_fraction: 0.0,
            too_long: TooLongSetting::Drop,
            on_malformed: OnMalformed::Error,
            nothing_learnt: NothingLearnt::Error,
            shape: None,
            roles: vec![],
            context_length: 256,
            packing: true,
            text_field: "text".into(),
        }
    }
}

documented! {
    /// `[objective]`.
    #[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct ObjectiveSection {
        /// `causal`: predict the next token of text. `sft`: predict what the assistant says in conversations (or the completions
        /// of prompts); what `tallow finetune` takes unless told. `prefix`: the same for the last answer only (`train_on = "last"`),
        /// where the tokens in front of it see each other both ways (a prefix LM, Raffel et al. 2020). The model says so in
        /// `prefix_lm` of its `config.json` (an adapter in its `adapter_config.json`), and `tallow generate` and `chat` read
        /// prompts the same way; other programs would read them causally.
        pub kind: ObjectiveKind,
        /// Of a conversation (`sft`): `assistant` for all its turns, `last` for the last of them, `all` for every token. A
        /// message's own `weight` counts besides.
        pub train_on: TrainOnSetting,
        /// Weight of the squared log-normaliser in the loss; 0 for none, 1e-4 keeps logits small in long runs (PaLM).
        pub z_loss: f64,
        /// The part of each target that is spread evenly over the vocabulary; 0 for none.
        pub label_smoothing: f64,
        /// Noise on the embeddings while training (NEFTune, Jain et al. 2023), 5 as a rule; 0 for none.
        pub neftune_alpha: f64,
    }
}

/// What is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectiveKind {
    /// Predict the next token.
    #[default]
    Causal,
    /// Predict what is to be said.
    Sft,
    /// The same, seeing what it answers both ways.
    Prefix,
}

impl ObjectiveSection {
    /// Whether what is learned is a prefix LM.
    pub fn is_prefix(&self) -> bool {
        self.kind == ObjectiveKind::Prefix
    }
}

/// What of a conversation is learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOnSetting {
    /// Every turn of the assistant.
    #[default]
    Assistant,
    /// The last turn of the assistant.
    Last,
    /// Every token.
    All,
}

/// What happens to examples that are too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TooLongSetting {
    /// They are left out, counted and told.
    #[default]
    Drop,
    /// The run does not start.
    Error,
    /// Their ends are cut, counted and told.
    TruncateEnd,
}

documented! {
    /// `[train]`: exactly one of `steps`, `tokens` and `epochs`.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct TrainSection {
        /// Optimizer steps.
        pub steps: Option<u64>,
        /// Tokens to train on, rounded up to a whole step.
        pub tokens: Option<u64>,
        /// Passes over the training data, rounded up to a whole step. Exactly one of `steps`, `tokens`, `epochs` is needed.
        pub epochs: Option<f64>,
        /// Rows an optimizer step, over all ranks and accumulation.
        pub batch_size: usize,
        /// Rows at once, a divisor of `batch_size`; the largest that `tallow plan` says fits in memory unless given.
        pub micro_batch_size: Option<usize>,
        /// `f32`, or `bf16`: bf16 compute with f32 master weights, norms, softmax, loss and optimizer.
        pub dtype: TrainDtype,
        /// `none`, or `blocks`: keep only the inputs of blocks and run each again in the backward.
        pub activation_checkpointing: ActivationCheckpointing,
    }
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

documented! {
    /// `[eval]`.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct EvalSection {
        /// Steps between validations; 0 for none but the last.
        pub every: u64,
        /// The most tokens of the validation data to use; 0 for all.
        pub max_tokens: u64,
        /// Ends the run after so many validations in a row without a lower loss; 0 for never.
        pub patience: u64,
    }
}

impl Default for EvalSection {
    fn default() -> Self {
        Self { every: 100, max_tokens: 0, patience: 0 }
    }
}

documented! {
    /// `[checkpoint]`. The last and the best are always kept.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct CheckpointSection {
        /// Steps between checkpoints; 0 for the last and the best only.
        pub every: u64,
        /// How many of the newest to keep, at least 1; the best is kept besides.
        pub keep: usize,
    }
}

impl Default for CheckpointSection {
    fn default() -> Self {
        Self { every: 500, keep: 2 }
    }
}

documented! {
    /// `[parallel]`: mesh axes. Known so that a run file for many processes is refused rather than run on one.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct ParallelSection {
        /// Data parallel.
        pub dp: usize,
        /// Fully sharded data parallel.
        pub fsdp: usize,
        /// Tensor parallel.
        pub tp: usize,
        /// Pipeline stages.
        pub pp: usize,
        /// Context parallel.
        pub cp: usize,
        /// Expert parallel.
        pub ep: usize,
    }
}

impl Default for ParallelSection {
    fn default() -> Self {
        Self { dp: 1, fsdp: 1, tp: 1, pp: 1, cp: 1, ep: 1 }
    }
}

impl RunConfig {
    /// Reads a run file and applies `--set key=value` on top.
    ///
    /// # Errors
    /// For a file that cannot be read, is not TOML, or has an unknown or mistyped key: file, line, key, nearest key.
    pub fn load(path: &Path, set: &[String]) -> Result<Self> {
        Source::read(path, set)?.config()
    }

    /// Reads the text of a run file; `path` is for messages.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn parse(text: &str, path: &Path, set: &[String]) -> Result<Self> {
        Source::new(text, path, set).config()
    }

    /// Checks all that can be checked without looking at data, model or machine.
    ///
    /// # Errors
    /// For a value or combination that cannot work: key, value, reason and a working value.
    pub fn validate(&self) -> Result<()> {
        if self.output.as_ref().is_none_or(|output| output.as_os_str().is_empty()) {
            let shown = if self.output.is_none() { "(missing)" } else { "\"\"" };
            let reason = "the run needs a directory, e.g. output = \"runs/first\"";
            return Err(Error::config("output", shown, reason));
        }
        self.check_model()?;
        if self.data.train.is_empty() {
            let reason = "at least one folder of shards or text file is needed, e.g. [\"data/train\"]";
            return Err(Error::config("data.train", "[]", reason));
        }
        if self.data.text_field.is_empty() {
            return Err(Error::config("data.text_field", "\"\"", "must name the key of the text, e.g. \"text\""));
        }
        self.check_sizes()?;
        self.check_length()?;
        self.optimizer.validate()?;
        self.anomaly.validate().map_err(|e| Error::config(&format!("anomaly.{}", e.key), e.value, e.reason))?;
        let z_loss = self.objective.z_loss;
        if !(z_loss.is_finite() && z_loss >= 0.0) {
            return Err(Error::config("objective.z_loss", z_loss, "must be 0 or positive, e.g. 1e-4"));
        }
        self.check_finetuning()?;
        let axes = &self.parallel;
        let axes = [axes.dp, axes.fsdp, axes.tp, axes.pp, axes.cp, axes.ep];
        for (axis, size) in ["dp", "fsdp", "tp", "pp", "cp", "ep"].into_iter().zip(axes) {
            if size != 1 {
                let reason = "parallel training is not available yet in this build; set it to 1, or leave it out";
                return Err(Error::config(&format!("parallel.{axis}"), size, reason));
            }
        }
        Ok(())
    }

    fn check_finetuning(&self) -> Result<()> {
        let ObjectiveSection { label_smoothing, neftune_alpha, .. } = self.objective;
        if !(0.0..1.0).contains(&label_smoothing) {
            let reason = "must be at least 0 and below 1, e.g. 0.1";
            return Err(Error::config("objective.label_smoothing", label_smoothing, reason));
        }
        if !(neftune_alpha.is_finite() && neftune_alpha >= 0.0) {
            return Err(Error::config("objective.neftune_alpha", neftune_alpha, "must be 0 or positive, e.g. 5"));
        }
        let fraction = self.data.valid_fraction;
        if !(0.0..=0.5).contains(&fraction) {
            return Err(Error::config("data.valid_fraction", fraction, "must be from 0 to 0.5, e.g. 0.05"));
        }
        if fraction > 0.0 && !self.data.valid.is_empty() {
            let reason = "and data.valid exclude each other; remove one";
            return Err(Error::config("data.valid_fraction", fraction, reason));
        }
        let sft = self.objective.kind != ObjectiveKind::Causal;
        let defaults = (DataSection::default(), ObjectiveSection::default());
        let only_sft = [
            ("data.valid_fraction", fraction > 0.0, "divide text with `tallow data prepare --valid-fraction`"),
            ("data.too_long", self.data.too_long != defaults.0.too_long, "remove it"),
            ("data.on_malformed", self.data.on_malformed != defaults.0.on_malformed, "remove it"),
            ("data.nothing_learnt", self.data.nothing_learnt != defaults.0.nothing_learnt, "remove it"),
            ("data.shape", self.data.shape.is_some(), "remove it"),
            ("data.roles", !self.data.roles.is_empty(), "remove it"),
            ("objective.train_on", self.objective.train_on != defaults.1.train_on, "remove it"),
            ("tokenizer.chat_template", self.tokenizer.chat_template.is_some(), "remove it"),
        ];
        if let Some((key, _, way_out)) = only_sft.iter().find(|(_, set, _)| *set && !sft) {
            let reason = format!("has a meaning only with objective.kind = \"sft\" or \"prefix\"; {way_out}");
            return Err(Error::config(key, "(set)", reason));
        }
        if self.objective.is_prefix() && self.objective.train_on != TrainOnSetting::Last {
            let value = format!("{:?}", self.objective.train_on).to_lowercase();
            let reason = "with objective.kind = \"prefix\" all in front of the answer is given, so that only the last one can be \
                          learned; set objective.train_on = \"last\"";
            return Err(Error::config("objective.train_on", format!("\"{value}\""), reason));
        }
        if let Some(adapter) = &self.adapter {
            if self.model.from.is_none() {
                let reason = "an adapter stands beside an existing model, e.g. from = \"SmolLM2-135M-Instruct\"";
                return Err(Error::config("model.from", "(missing)", reason));
            }
            adapter.lora()?;
        }
        Ok(())
    }

    fn check_model(&self) -> Result<()> {
        let section = &self.model;
        match (&section.preset, &section.from) {
            (Some(preset), Some(_)) => {
                Err(Error::config("model.preset", preset, "and model.from exclude each other; remove one"))
            }
            (None, None) if !section.overrides.contains_key("architectures") => {
                let known = tallow_models::preset_names().collect::<Vec<_>>().join(", ");
                let reason = format!("a preset ({known}), model.from or architectures is needed");
                Err(Error::config("model.preset", "(missing)", reason))
            }
            _ => Ok(()),
        }
    }

    fn check_sizes(&self) -> Result<()> {
        let (batch, context) = (self.train.batch_size, self.data.context_length);
        if context == 0 {
            return Err(Error::config("data.context_length", 0, "must be at least 1, e.g. 256"));
        }
        if batch == 0 {
            return Err(Error::config("train.batch_size", 0, "must be at least 1, e.g. 8"));
        }
        if batch.checked_mul(context).is_none_or(|tokens| tokens > MAX_STEP_TOKENS) {
            let reason = format!("with data.context_length = {context} a step has more than {MAX_STEP_TOKENS} tokens");
            return Err(Error::config("train.batch_size", batch, reason));
        }
        match self.train.micro_batch_size {
            Some(0) => Err(Error::config("train.micro_batch_size", 0, "must be at least 1")),
            Some(rows) if !batch.is_multiple_of(rows) => {
                let near = (1..=rows.min(batch)).rev().find(|d| batch.is_multiple_of(*d)).unwrap_or(1);
                let reason = format!("does not divide train.batch_size = {batch}; e.g. {near}");
                Err(Error::config("train.micro_batch_size", rows, reason))
            }
            _ => Ok(()),
        }
    }

    fn check_length(&self) -> Result<()> {
        let train = &self.train;
        let given = [
            ("train.steps", train.steps.is_some()),
            ("train.tokens", train.tokens.is_some()),
            ("train.epochs", train.epochs.is_some()),
        ];
        let given: Vec<&str> = given.iter().filter(|(_, is)| *is).map(|(key, _)| *key).collect();
        match given.as_slice() {
            [_] => {}
            [] => {
                let reason = "exactly one of train.steps, train.tokens and train.epochs must be set, e.g. steps = 1000";
                return Err(Error::config("train.steps", "(missing)", reason));
            }
            [first, rest @ ..] => {
                let value = format!("set together with {}", rest.join(" and "));
                let reason = "exactly one of train.steps, train.tokens and train.epochs must be set; remove the others";
                return Err(Error::config(first, value, reason));
            }
        }
        for (key, value) in [("train.steps", train.steps), ("train.tokens", train.tokens)] {
            if value == Some(0) {
                return Err(Error::config(key, 0, "must be at least 1, e.g. 1000"));
            }
        }
        match train.epochs {
            Some(epochs) if !(epochs.is_finite() && epochs > 0.0) => {
                Err(Error::config("train.epochs", epochs, "must be a positive number, e.g. 1"))
            }
            _ => Ok(()),
        }
    }

    /// A path of the run file, relative to the directory `base` of that file.
    pub(crate) fn at(base: &Path, path: &Path) -> PathBuf {
        // Without the `.` of an output that is the run file's own folder.
        base.join(path).components().collect()
    }
}

/// The most tokens of a step: more is a slip of the keyboard, and would be allocated before it is noticed.
const MAX_STEP_TOKENS: usize = 1 << 31;
