//! From a run file to a trainer: finds the tokenizer, the data and the model, and resolves the rest.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tallow_data::{CacheOptions, Loader, LoaderOptions, PrepareOptions, TokenDataset, cached_prepare};
use tallow_models::{Checkpoint, ModelConfig, Preset, parse_config_strict};
use tallow_nn::{Fill, ParamSpec, RandomInit, plan_params};
use tallow_tokenizer::Tokenizer;

use crate::checkpoint::Checkpoints;
use crate::config::RunConfig;
use crate::evaluate::Validation;
use crate::resolve::{Facts, Resolved};
use crate::trainer::Trainer;
use crate::{Error, Result, memory};

/// An existing model that `model.from` names, opened by the caller.
pub struct From {
    /// Its configuration and tensors.
    pub checkpoint: Checkpoint,
    /// Its tokenizer, or why it has none.
    pub tokenizer: std::result::Result<Tokenizer, String>,
}

/// A run that has been found possible, and nothing allocated yet.
pub struct Run {
    /// The run file with nothing left to decide.
    pub resolved: Resolved,
    output: PathBuf,
    config: Box<dyn ModelConfig>,
    config_value: Value,
    specs: Vec<ParamSpec>,
    from: Option<Checkpoint>,
    tokenizer: Option<Tokenizer>,
    loader: Loader,
    validation: Option<TokenDataset>,
}

impl Run {
    /// Finds everything that `config` names (paths relative to `base`) and checks that it fits together.
    ///
    /// Raw text in `data` is prepared here on first use; `progress` gets a line about it now and then.
    ///
    /// # Errors
    /// For anything missing, malformed or contradictory.
    pub fn prepare(
        config: RunConfig,
        base: &Path,
        from: Option<From>,
        peak_flops: Option<f64>,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Self> {
        let output = config.output.as_ref().ok_or_else(|| {
            Error::config("output", "(missing)", "the run needs a directory, e.g. output = \"runs/first\"")
        })?;
        let output = RunConfig::at(base, output);
        if config.data.train.is_empty() {
            let reason = "at least one folder of shards or text file is needed, e.g. [\"data/train\"]";
            return Err(Error::config("data.train", "[]", reason));
        }
        let tokenizer = tokenizer(&config, base, from.as_ref())?;
        let train = open_data(&config, &config.data.train, base, tokenizer.as_ref(), progress)?;
        let validation = match config.data.valid.is_empty() {
            true => None,
            false => Some(open_data(&config, &config.data.valid, base, tokenizer.as_ref(), progress)?),
        };
        let vocab = Vocabulary::of(&train, tokenizer.as_ref())?;
        if let Some(valid) = &validation {
            vocab.check(valid, "data.valid")?;
        }
        let config_value = model_value(&config, base, from.as_ref(), &vocab)?;
        let parsed = parse_config_strict(&config_value)?;
        let model = parsed.config;
        let rows = model.shape().vocab_size;
        if rows < vocab.size {
            let reason = format!("the tokenizer has {} tokens; the model needs at least as many rows", vocab.size);
            return Err(Error::config("model.vocab_size", rows, reason));
        }
        let (_, specs) = plan_params(|b| model.build(b))?;
        if let Some(from) = &from {
            from.checkpoint.check(&specs)?;
        }
        let options = LoaderOptions {
            context_length: config.data.context_length,
            packing: config.data.packing,
            seed: config.seed,
            ..LoaderOptions::default()
        };
        let loader = Loader::new(train, options)?;
        let facts = Facts { rows_per_epoch: loader.rows_per_epoch(), memory: memory::available(), peak_flops };
        let resolved = Resolved::new(config, model.as_ref(), &specs, facts)?;
        let from = from.map(|from| from.checkpoint);
        Ok(Self { resolved, output, config: model, config_value, specs, from, tokenizer, loader, validation })
    }

    /// The run directory.
    pub fn output(&self) -> &Path {
        &self.output
    }

    /// The model's configuration.
    pub fn config(&self) -> &dyn ModelConfig {
        self.config.as_ref()
    }

    /// The model's parameters.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The training data in the order of the run.
    pub fn loader(&self) -> &Loader {
        &self.loader
    }

    /// The held-out data.
    pub fn validation(&self) -> Option<&TokenDataset> {
        self.validation.as_ref()
    }

    /// Tokens of the training data.
    pub fn train_tokens(&self) -> u64 {
        self.loader.dataset().num_tokens()
    }

    /// Refuses a directory that holds another run, unless this one continues it; creates it otherwise, and writes
    /// `resolved.toml`.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn claim_output(&self, resume: bool) -> Result<()> {
        let path = self.output.join("resolved.toml");
        if path.exists() && !resume {
            let reason = "holds another run; continue it with --resume, or choose another `output`";
            return Err(Error::Output { path: self.output.clone(), reason: reason.into() });
        }
        std::fs::create_dir_all(&self.output).map_err(|e| Error::io(&self.output, e))?;
        let text = toml::to_string(&self.resolved)
            .map_err(|e| Error::Output { path: path.clone(), reason: format!("cannot be written as TOML: {e}") })?;
        tallow_formats::atomic_write(&path, text.as_bytes())?;
        Ok(())
    }

    /// Builds the model and everything around it.
    ///
    /// # Errors
    /// If the weights cannot be read, or memory cannot be allocated.
    pub fn into_trainer(self) -> Result<Trainer> {
        let random = RandomInit { seed: self.resolved.run.seed };
        let fill: &dyn Fill = match &self.from {
            Some(checkpoint) => checkpoint,
            None => &random,
        };
        let keep = self.resolved.run.checkpoint.keep;
        let again = parse_config_strict(&self.config_value)?.config;
        let checkpoints = Checkpoints::new(self.output.join("checkpoints"), keep, again, self.tokenizer);
        let (context, max_tokens) = (self.resolved.run.data.context_length, self.resolved.run.eval.max_tokens);
        let validation = self.validation.map(|dataset| Validation::new(dataset, context, max_tokens));
        Trainer::new(self.resolved, self.config.as_ref(), fill, self.loader, validation, checkpoints)
    }
}

fn tokenizer(config: &RunConfig, base: &Path, from: Option<&From>) -> Result<Option<Tokenizer>> {
    if let Some(path) = &config.tokenizer.path {
        return Ok(Some(Tokenizer::from_path(RunConfig::at(base, path))?));
    }
    match from.map(|from| &from.tokenizer) {
        Some(Ok(tokenizer)) => Ok(Some(tokenizer.clone())),
        Some(Err(reason)) => Err(Error::config("tokenizer.path", "(missing)", format!("and model.from: {reason}"))),
        None => Ok(None),
    }
}

/// Opens folders of shards; prepares raw text first.
fn open_data(
    config: &RunConfig,
    paths: &[PathBuf],
    base: &Path,
    tokenizer: Option<&Tokenizer>,
    progress: &mut dyn FnMut(&str),
) -> Result<TokenDataset> {
    let mut dirs = vec![];
    let mut raw = vec![];
    for path in paths {
        let path = RunConfig::at(base, path);
        if path.join("index.json").is_file() { dirs.push(path) } else { raw.push(path) }
    }
    if !raw.is_empty() {
        let Some(tokenizer) = tokenizer else {
            let reason = format!("is needed to read the text of {}", raw[0].display());
            return Err(Error::config("tokenizer.path", "(missing)", reason));
        };
        let options = PrepareOptions { field: config.data.text_field.clone(), ..PrepareOptions::default() };
        let cache = CacheOptions { root: base.join(".tallow-cache"), prepare: options };
        let prepared = cached_prepare(&raw, tokenizer, &cache, &mut |p| {
            progress(&format!("preparing text: {} documents, {} MB", p.documents, p.bytes / 1_000_000));
        })?;
        dirs.push(prepared);
    }
    Ok(TokenDataset::open(&dirs)?)
}

/// What the data's and the tokenizer's vocabulary is, once they agree.
struct Vocabulary {
    size: usize,
    fingerprint: String,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Vocabulary {
    fn of(train: &TokenDataset, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let vocab = Self {
            size: train.vocab_size(),
            fingerprint: train.tokenizer_fingerprint().to_owned(),
            bos: tokenizer.and_then(Tokenizer::bos_id),
            eos: tokenizer.and_then(Tokenizer::eos_id).or(train.eos_id()),
        };
        if let Some(tokenizer) = tokenizer
            && tokenizer.fingerprint() != vocab.fingerprint
        {
            let reason = "data.train was prepared with another tokenizer; prepare it again with this one";
            return Err(Error::config("tokenizer.path", "", reason));
        }
        Ok(vocab)
    }

    fn check(&self, dataset: &TokenDataset, key: &str) -> Result<()> {
        if dataset.tokenizer_fingerprint() != self.fingerprint {
            let reason = "was prepared with another tokenizer than data.train; prepare it again with the same";
            return Err(Error::config(key, "", reason));
        }
        Ok(())
    }
}

/// The model's `config.json`: preset or existing model, then the run file's own keys, then what the vocabulary decides.
fn model_value(config: &RunConfig, base: &Path, from: Option<&From>, vocab: &Vocabulary) -> Result<Value> {
    let section = &config.model;
    let mut keys = match (&section.preset, from) {
        (Some(preset), None) => Preset::find(preset, base)?.keys,
        (None, Some(from)) => from.checkpoint.config().to_hf().as_object().cloned().unwrap_or_default(),
        (Some(preset), Some(_)) => {
            return Err(Error::config("model.preset", preset, "and model.from exclude each other; remove one"));
        }
        (None, None) if section.overrides.contains_key("architectures") => serde_json::Map::new(),
        (None, None) => {
            let known = tallow_models::preset_names().collect::<Vec<_>>().join(", ");
            let reason = format!("a preset ({known}), model.from or architectures is needed");
            return Err(Error::config("model.preset", "(missing)", reason));
        }
    };
    keys.extend(section.overrides.clone());
    if from.is_none() {
        keys.entry("vocab_size").or_insert(Value::from(vocab.size));
        for (key, id) in [("bos_token_id", vocab.bos), ("eos_token_id", vocab.eos)] {
            if let Some(id) = id {
                keys.entry(key).or_insert(Value::from(id));
            }
        }
        let positions = match keys.get("architectures").and_then(|a| a.get(0)).and_then(Value::as_str) {
            Some("GPT2LMHeadModel") => "n_positions",
            _ => "max_position_embeddings",
        };
        keys.entry(positions).or_insert(Value::from(config.data.context_length));
    }
    Ok(Value::Object(keys))
}
