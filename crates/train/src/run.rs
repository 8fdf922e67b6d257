//! From a run file to a trainer: finds the tokenizer, the data and the model, and resolves the rest.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sha2::Digest;
use tallow_adapters::{AdapterPlan, LoraConfig};
use tallow_data::{CacheOptions, EncodeChat, Loader, LoaderOptions, PrepareOptions, TokenDataset, cached_prepare};
use tallow_models::{Checkpoint, ModelConfig, Preset, QuantizedBase, parse_config_strict};
use tallow_nn::{Fill, Pack, ParamSpec, RandomInit, plan_params};
use tallow_tokenizer::Tokenizer;

use crate::added;
use crate::checkpoint::{Artifact, Checkpoints};
use crate::config::{
    AdapterKind, AdapterSection, InitSetting, ObjectiveKind, RunConfig, TokenizerSection, adapter_error,
};
use crate::conversations::{self, Conversations};
use crate::evaluate::Validation;
use crate::fit::{Fit, Largest};
use crate::output::{self, OutputClaim};
use crate::plan::StepShape;
use crate::progress::{format_bytes, format_count, grouped, several};
use crate::resolve::{Facts, Resolved};
use crate::trainer::{ModelParts, Trainer};
use crate::{Error, Result, memory};

/// An existing model that `model.from` names, opened by the caller.
pub struct From {
    /// Its configuration and tensors.
    pub checkpoint: Checkpoint,
    /// Its tokenizer, or why it has none.
    pub tokenizer: std::result::Result<Tokenizer, String>,
}

/// How a run is prepared.
#[derive(Default)]
pub struct PrepareRun<'a> {
    /// The existing model that `model.from` names.
    pub from: Option<From>,
    /// Peak FLOPs a second in the run's dtype, for the utilisation in the metrics.
    pub peak_flops: Option<f64>,
    /// Whether the run in the output directory, if there is one, is to be continued.
    pub resume: bool,
    /// Memory that rows at once are chosen for; what is available, if not given.
    pub memory: Option<u64>,
    /// Gets a line about long work now and then.
    pub progress: Option<&'a mut dyn FnMut(&str)>,
}

/// A run that has been found possible, and nothing allocated yet.
pub struct Run {
    /// The run file with nothing left to decide.
    pub resolved: Resolved,
    output: PathBuf,
    resume: bool,
    config: Box<dyn ModelConfig>,
    config_value: Value,
    /// Of the model without an adapter.
    base_specs: Vec<ParamSpec>,
    /// Of what is trained and what it stands beside.
    specs: Vec<ParamSpec>,
    adapter: Option<AdapterPlan>,
    from: Option<Checkpoint>,
    tokenizer: Option<Tokenizer>,
    loader: Loader,
    validation: Option<TokenDataset>,
    conversations: Option<Conversations>,
    notices: Vec<String>,
}

impl Run {
    /// Finds everything that `config` names (paths relative to `base`) and checks that it fits together.
    ///
    /// Raw text in `data` is prepared here on first use. Nothing is written to the output directory yet.
    ///
    /// # Errors
    /// For anything missing, malformed or contradictory.
    pub fn prepare(config: RunConfig, base: &Path, how: PrepareRun) -> Result<Self> {
        let PrepareRun { mut from, peak_flops, resume, memory, progress } = how;
        config.validate()?;
        let output = RunConfig::at(base, config.output.as_deref().unwrap_or(Path::new("")));
        if !resume {
            output::check_new(&output)?;
        }
        let silent: &mut dyn FnMut(&str) = &mut |_| ();
        let progress = progress.unwrap_or(silent);
        let tokenizer = tokenizer(&config, base, from.as_ref())?;
        let mut notices = vec![];
        let tokenizer = add_tokens(&config, tokenizer, from.as_mut(), &mut notices)?;
        let conversations = match config.objective.kind {
            ObjectiveKind::Causal => None,
            ObjectiveKind::Sft | ObjectiveKind::Prefix => Some(Conversations::new(&config, base, tokenizer.as_ref())?),
        };
        let template = conversations.as_ref().and_then(Conversations::template).unwrap_or_default();
        if let Some(token) = config.tokenizer.add_tokens.iter().find(|token| template.contains(token.as_str())) {
            let reason = "is written by the chat template, so a message that holds it could forge a turn; name it in \
                          tokenizer.add_special_tokens";
            return Err(Error::config("tokenizer.add_tokens", format!("{token:?}"), reason));
        }
        let (train, validation) = match &conversations {
            Some(conversations) => conversations.open(&config, base, progress)?,
            None => {
                let mut open = |key: &str, paths: &[PathBuf]| {
                    open_data(key, paths, &config, base, tokenizer.as_ref(), &mut *progress)
                };
                let valid = &config.data.valid;
                let train = open("data.train", &config.data.train)?;
                (train, (!valid.is_empty()).then(|| open("data.valid", valid)).transpose()?)
            }
        };
        if conversations.is_some() {
            // What is held out is of the same files, whose account is one.
            let (own, held_out) = match config.data.valid.is_empty() {
                true => (None, validation.as_ref()),
                false => (validation.as_ref(), None),
            };
            notices.extend(conversations::notes("data.train", &train));
            notices.extend(own.iter().flat_map(|valid| conversations::notes("data.valid", valid)));
            if config.objective.is_prefix() {
                let of_train: Vec<_> = [Some(&train), held_out].into_iter().flatten().collect();
                notices.extend(conversations::texts_of_prefix("data.train", &of_train)?);
                notices
                    .extend(own.map(|own| conversations::texts_of_prefix("data.valid", &[own])).transpose()?.flatten());
            }
        }
        let vocab = Vocabulary::of(&train, &config, tokenizer.as_ref())?;
        notices.extend(added::counted(&config.tokenizer, tokenizer.as_ref(), &train)?);
        if let Some(valid) = &validation {
            vocab.check(valid, "data.valid", &config.data.valid)?;
            // Data with nothing to predict is found now, not at the first validation.
            valid.sequential(config.data.context_length, 1)?;
        }
        if from.as_ref().is_some_and(|from| from.checkpoint.config().shape().prefix_lm) && !config.objective.is_prefix()
        {
            let way_out = "objective.kind = \"prefix\" would keep it one";
            notices.push(format!("note: model.from sees its prompts both ways; it becomes a causal model, {way_out}"));
        }
        let config_value = model_value(&config, base, from.as_ref(), &vocab)?;
        let parsed = parse_config_strict(&config_value)?;
        let model = parsed.config;
        let rows = model.shape().vocab_size;
        if rows < vocab.size {
            let reason = format!("the tokenizer has {} tokens; the model needs at least as many rows", vocab.size);
            return Err(Error::config("model.vocab_size", rows, reason));
        }
        let (_, base_specs) = plan_params(|b| model.build(b))?;
        if let Some(from) = &from {
            from.checkpoint.check(&base_specs)?;
        }
        let adapter = match &config.adapter {
            Some(section) => {
                let tokens = token_ids(&config, section, tokenizer.as_ref())?;
                let lora = LoraConfig { tokens, ..section.lora()? };
                let plan = AdapterPlan::new(&lora, &base_specs).map_err(|error| match error {
                    tallow_adapters::Error::Config { key: "tokens", reason, .. } => {
                        let key = match section.train_tokens.as_slice() {
                            [] => "tokenizer.add_tokens",
                            _ => "adapter.train_tokens",
                        };
                        Error::config(key, "(set)", reason)
                    }
                    other => adapter_error(other),
                });
                Some(plan?)
            }
            None => None,
        };
        let specs = match &adapter {
            Some(plan) => plan_params(|b| plan.build(b, |b| model.build(b)))?.1,
            None => base_specs.clone(),
        };
        let options = LoaderOptions {
            context_length: config.data.context_length,
            packing: config.data.packing,
            seed: config.seed,
            ..LoaderOptions::default()
        };
        let loader = Loader::new(train, options)?;
        let facts = Facts {
            rows_per_epoch: loader.rows_per_epoch(),
            memory: memory.or_else(memory::available),
            peak_flops,
            earlier_micro_batch: if resume { output::earlier_micro_batch(&output) } else { None },
        };
        let pack = match &from {
            Some(from) => quantized(&config, &from.checkpoint, &base_specs)?,
            None => None,
        };
        if let Some(pack) = &pack {
            notices.push(pack.in_words(&base_specs)?);
        }
        let pack = pack.as_ref().map(|pack| pack as &dyn Pack);
        let resolved = Resolved::new(config, model.as_ref(), &specs, adapter.as_ref(), pack, facts)?;
        Ok(Self {
            resolved,
            output,
            resume,
            config: model,
            config_value,
            base_specs,
            specs,
            adapter,
            from: from.map(|from| from.checkpoint),
            tokenizer,
            loader,
            validation,
            conversations,
            notices,
        })
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

    /// The adapter that is trained, if it is not the model itself.
    pub fn adapter(&self) -> Option<&AdapterPlan> {
        self.adapter.as_ref()
    }

    /// The training data in the order of the run.
    pub fn loader(&self) -> &Loader {
        &self.loader
    }

    /// The tokenizer, if there is one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The held-out data.
    pub fn validation(&self) -> Option<&TokenDataset> {
        self.validation.as_ref()
    }

    /// Tokens of the training data.
    pub fn train_tokens(&self) -> u64 {
        self.loader.dataset().num_tokens()
    }

    /// The largest batch, context and rank that `memory` bytes hold, by the plan.
    ///
    /// # Errors
    /// If the base cannot be packed as asked.
    pub fn largest(&self, memory: u64) -> Result<Largest> {
        let pack = match &self.from {
            Some(checkpoint) => quantized(&self.resolved.run, checkpoint, &self.base_specs)?,
            None => None,
        };
        let run = &self.resolved.run;
        let step = StepShape {
            micro_batch_size: self.resolved.micro_batch_size,
            context_length: run.data.context_length,
            dtype: run.train.dtype,
            checkpointing: run.train.activation_checkpointing,
        };
        let (config, base) = (self.config.as_ref(), self.base_specs.as_slice());
        let pack = pack.as_ref().map(|pack| pack as &dyn Pack);
        Ok(Fit { config, base, adapter: self.adapter.as_ref(), pack, step }.largest(memory))
    }

    /// Optimizer steps in which every row of the training data is seen once.
    pub fn steps_per_epoch(&self) -> f64 {
        self.loader.rows_per_epoch() as f64 / self.resolved.run.train.batch_size as f64
    }

    /// How often the run sees every example.
    pub fn passes(&self) -> f64 {
        self.resolved.steps as f64 / self.steps_per_epoch()
    }

    /// What is trained, in words: all, or an adapter.
    pub fn kind_in_words(&self) -> String {
        let Resolved { params, trained, .. } = self.resolved;
        let Some(plan) = &self.adapter else {
            let what = if self.from.is_some() { " of model.from (no [adapter])" } else { "" };
            return format!("trains all {} parameters{what}", grouped(params));
        };
        let config = plan.config();
        let kind = match self.resolved.run.adapter.as_ref().map(|section| (section.kind, section.init)) {
            Some((AdapterKind::Dora, _)) => "DoRA",
            Some((_, InitSetting::Olora)) => "OLoRA",
            _ => "LoRA",
        };
        let whole = match plan.saved().count() {
            0 => String::new(),
            n => format!(", {} whole", several(n as u64, "parameter")),
        };
        let rows = match plan.tokens().next() {
            None => String::new(),
            Some((_, tokens)) => format!(", the rows of {}", several(tokens.len() as u64, "token")),
        };
        format!(
            "trains {} of {} parameters ({:.2}%), {kind} rank {} on {}{whole}{rows}",
            grouped(trained),
            grouped(params),
            100.0 * trained as f64 / params.max(1) as f64,
            config.rank,
            several(plan.modules().count() as u64, "module")
        )
    }

    /// The data of the run in words: examples, rows, steps an epoch, and what is held out.
    pub fn data_in_words(&self) -> String {
        let dataset = self.loader.dataset();
        let what = if dataset.examples().is_some() { "example" } else { "document" };
        let rows = if self.resolved.run.data.packing { "packed row" } else { "row" };
        let steps = self.steps_per_epoch();
        let steps = if steps.fract() == 0.0 { several(steps as u64, "step") } else { format!("{steps:.2} steps") };
        let held_out = match &self.validation {
            Some(valid) => format!("{} to validate on", several(valid.num_documents(), what)),
            None => "nothing to validate on".to_owned(),
        };
        format!(
            "{}, {} of {} tokens, {steps} an epoch; {held_out}",
            several(dataset.num_documents(), what),
            several(self.loader.rows_per_epoch(), rows),
            self.resolved.run.data.context_length
        )
    }

    /// Notes about the run that the user should read before it starts.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = self.notices.clone();
        if self.steps_per_epoch() < 1.0 {
            let (rows, batch) = (several(self.loader.rows_per_epoch(), "row"), self.resolved.run.train.batch_size);
            let passes = 1.0 / self.steps_per_epoch();
            notices.push(format!(
                "note: data.train makes {rows}, fewer than train.batch_size = {batch}: a single step sees every example \
                 {passes:.1} times; lower train.batch_size for more and smaller steps"
            ));
        }
        if self.tokenizer.is_none() {
            let way_out = "generating from text will need one; set tokenizer.path";
            notices.push(format!("note: without a tokenizer the model is saved without one, and {way_out}"));
        }
        notices
    }

    /// Takes the output directory for this process: refuses it if it holds another run (unless this one continues it),
    /// if another process writes to it, or if what is to be continued is another model.
    ///
    /// # Errors
    /// If the directory cannot be used.
    pub fn claim(&self) -> Result<OutputClaim> {
        OutputClaim::new(&self.output, self.resume, &self.resolved)
    }

    /// Refuses what this machine has no memory for whatever the batch: weights, gradients and optimizer.
    fn check_memory(&self) -> Result<()> {
        let plan = &self.resolved.memory;
        let (needed, available) = (plan.weights + plan.gradients + plan.optimizer, memory::available());
        match available {
            Some(available) if needed > available => {
                let value = format!("{} parameters", format_count(self.resolved.params));
                let (needed, available) = (format_bytes(needed), format_bytes(available));
                let reason = format!("weights, gradients and optimizer need {needed} of memory; {available} are free");
                Err(Error::config("model", value, reason))
            }
            _ => Ok(()),
        }
    }

    /// Builds the model and everything around it.
    ///
    /// # Errors
    /// If the weights cannot be read, or memory cannot be allocated.
    pub fn into_trainer(self) -> Result<Trainer> {
        self.check_memory()?;
        let random = RandomInit { seed: self.resolved.run.seed };
        let fill: &dyn Fill = match &self.from {
            Some(checkpoint) => checkpoint,
            None => &random,
        };
        let pack = match &self.from {
            Some(checkpoint) => quantized(&self.resolved.run, checkpoint, &self.base_specs)?,
            None => None,
        };
        let pack = pack.as_ref().map(|pack| pack as &dyn Pack);
        let keep = self.resolved.run.checkpoint.keep;
        let artifact = match &self.adapter {
            None => Artifact::Model(parse_config_strict(&self.config_value)?.config),
            Some(plan) => Artifact::Adapter {
                plan: Box::new(plan.clone()),
                base: self.base_specs,
                base_model: self.resolved.run.model.from.clone().unwrap_or_default(),
                notes: notes(self.config.as_ref(), &self.resolved.run, self.conversations.as_ref(), self.from.as_ref()),
            },
        };
        // What the model was taught with is how it is to be asked.
        let tokenizer = match (self.tokenizer, &self.conversations) {
            (Some(tokenizer), Some(conversations)) => Some(conversations.with_template(tokenizer)),
            (tokenizer, _) => tokenizer,
        };
        let checkpoints = Checkpoints::new(self.output.join("checkpoints"), keep, artifact, tokenizer);
        let (context, max_tokens) = (self.resolved.run.data.context_length, self.resolved.run.eval.max_tokens);
        let validation = self.validation.map(|dataset| Validation::new(dataset, context, max_tokens));
        let parts = ModelParts { config: self.config.as_ref(), fill, adapter: self.adapter.as_ref(), pack };
        Trainer::new(self.resolved, parts, self.loader, validation, checkpoints)
    }
}

/// How the frozen part of `checkpoint` is packed, if it is.
fn quantized<'a>(
    config: &RunConfig,
    checkpoint: &'a Checkpoint,
    specs: &[ParamSpec],
) -> Result<Option<QuantizedBase<'a>>> {
    let Some(quantization) = config.adapter.as_ref().and_then(AdapterSection::quantization) else { return Ok(None) };
    let named = config.adapter.as_ref().is_some_and(|adapter| adapter.quantize_embeddings.is_some());
    let base = QuantizedBase::new(quantization, checkpoint, specs).and_then(|base| {
        if named {
            base.check_stored_embeddings(specs)?;
        }
        Ok(base)
    });
    let base = base.map_err(|error| match error {
        tallow_models::Error::Config { key, reason, .. } => {
            let value = match key.as_str() {
                "quantize" => quantization.projections.to_string(),
                "quantize_embeddings" => quantization.embeddings.to_string(),
                _ => quantization.block.to_string(),
            };
            let reason = match key.as_str() {
                "quantize_embeddings" if !named => format!("the default, since the key is not set: {reason}"),
                _ => reason,
            };
            Error::config(&format!("adapter.{key}"), value, reason)
        }
        other => other.into(),
    })?;
    Ok(Some(base))
}

/// What an adapter's files say of what it was made with: it is good for nothing else.
fn notes(
    config: &dyn ModelConfig,
    run: &RunConfig,
    conversations: Option<&Conversations>,
    from: Option<&Checkpoint>,
) -> Value {
    let base: String =
        sha2::Sha256::digest(config.to_hf().to_string()).iter().map(|byte| format!("{byte:02x}")).collect();
    let mut notes = json!({ "base_config_sha256": base });
    if let Some(from) = from {
        notes["base_weights_sha256"] = json!(from.weights_fingerprint());
    }
    if let Some(quantization) = run.adapter.as_ref().and_then(AdapterSection::quantization) {
        notes["base_quantization"] = json!(quantization);
    }
    if let Some(AdapterSection { init: InitSetting::Olora, .. }) = run.adapter {
        notes["adapter_init"] = json!(InitSetting::Olora);
    }
    if let Some(conversations) = conversations {
        notes["encoder_fingerprint"] = json!(conversations.fingerprint());
    }
    let prefix_lm = config.shape().prefix_lm;
    if prefix_lm || from.is_some_and(|from| from.config().shape().prefix_lm) {
        notes["prefix_lm"] = json!(prefix_lm);
    }
    notes
}

fn tokenizer(config: &RunConfig, base: &Path, from: Option<&From>) -> Result<Option<Tokenizer>> {
    if let Some(path) = &config.tokenizer.path {
        let found = RunConfig::at(base, path);
        if !found.exists() {
            let reason = format!("{}: there is no such file; train one with `tallow tokenizer train`", found.display());
            return Err(Error::config("tokenizer.path", path.display(), reason));
        }
        return Ok(Some(Tokenizer::from_path(found)?));
    }
    match from.map(|from| &from.tokenizer) {
        Some(Ok(tokenizer)) => Ok(Some(tokenizer.clone())),
        Some(Err(reason)) => Err(Error::config("tokenizer.path", "(missing)", format!("and model.from: {reason}"))),
        None => Ok(None),
    }
}

/// The tokenizer with `tokenizer.add_tokens`, for which the existing model gets rows where it has none to spare.
fn add_tokens(
    config: &RunConfig,
    tokenizer: Option<Tokenizer>,
    from: Option<&mut From>,
    notices: &mut Vec<String>,
) -> Result<Option<Tokenizer>> {
    let (plain, special) = (&config.tokenizer.add_tokens, &config.tokenizer.add_special_tokens);
    let added: Vec<&String> = special.iter().chain(plain).collect();
    let Some(first) = added.first() else { return Ok(tokenizer) };
    let key = if special.is_empty() { "tokenizer.add_tokens" } else { "tokenizer.add_special_tokens" };
    let shown = format!("{first:?}");
    let Some(tokenizer) = tokenizer else {
        return Err(Error::config(key, shown, "needs a tokenizer to add them to: set tokenizer.path"));
    };
    let before = tokenizer.vocab_size();
    let with = tokenizer.with_added_tokens(special, true).and_then(|t| t.with_added_tokens(plain, false));
    let with = with.map_err(|error| match error {
        tallow_tokenizer::Error::AddedToken { token, reason } => {
            let way_out = match config.adapter {
                Some(_) => "; rows of tokens that there are can be trained: adapter.train_tokens",
                None => "",
            };
            let key = if special.contains(&token) { "tokenizer.add_special_tokens" } else { "tokenizer.add_tokens" };
            Error::config(key, format!("{token:?}"), reason + way_out)
        }
        other => other.into(),
    })?;
    let ids = format!("{} tokens are added, ids {before} to {}", added.len(), with.vocab_size() - 1);
    match from.map(|from| (from.checkpoint.config().shape().vocab_size, from)) {
        Some((rows, from)) if with.vocab_size() > rows => {
            from.checkpoint.resize_vocabulary(with.vocab_size())?;
            notices
                .push(format!("note: {ids}; the model's vocabulary grows from {rows} rows to {}", with.vocab_size()));
        }
        Some((rows, _)) => notices
            .push(format!("note: {ids}, which are rows that the model has to spare ({rows}) and start as these are")),
        None => {}
    }
    Ok(Some(with))
}

/// The ids of the tokens whose rows are trained beside an adapter.
fn token_ids(config: &RunConfig, section: &AdapterSection, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = vec![];
    let special = config.tokenizer.add_special_tokens.iter().map(|token| ("tokenizer.add_special_tokens", token));
    let added = special.chain(config.tokenizer.add_tokens.iter().map(|token| ("tokenizer.add_tokens", token)));
    for (key, token) in added.chain(section.train_tokens.iter().map(|token| ("adapter.train_tokens", token))) {
        match tokenizer.and_then(|tokenizer| tokenizer.token_to_id(token)) {
            Some(id) if !ids.contains(&id) => ids.push(id),
            Some(_) => return Err(Error::config(key, format!("{token:?}"), "is there twice")),
            None => {
                let reason = "is no token of the tokenizer; tokenizer.add_tokens adds one";
                return Err(Error::config(key, format!("{token:?}"), reason));
            }
        }
    }
    Ok(ids)
}

/// Opens folders of shards; prepares raw text first.
fn open_data(
    key: &str,
    paths: &[PathBuf],
    config: &RunConfig,
    base: &Path,
    tokenizer: Option<&Tokenizer>,
    progress: &mut dyn FnMut(&str),
) -> Result<TokenDataset> {
    use tallow_data::Error as E;
    let mut dirs = vec![];
    let mut raw = vec![];
    for path in paths {
        let path = RunConfig::at(base, path);
        if path.join("index.json").is_file() {
            dirs.push(path);
        } else if path.join("train/index.json").is_file() {
            let reason = format!("{0} holds splits: name {0}/train or {0}/valid", path.display());
            return Err(Error::config(key, shown(paths), reason));
        } else if path.exists() {
            raw.push(path);
        } else {
            let reason = format!("{}: there is no such file or folder", path.display());
            return Err(Error::config(key, shown(paths), reason));
        }
    }
    if !raw.is_empty() {
        let Some(tokenizer) = tokenizer else {
            let reason = format!("is needed to read the text of {}", raw[0].display());
            return Err(Error::config("tokenizer.path", "(missing)", reason));
        };
        if tokenizer.eos_id().is_none() {
            let reason = "the tokenizer has no end-of-text token to put behind each document; use one that has, or \
                          prepare the text with `tallow data prepare --no-eos`";
            return Err(Error::config(key, shown(paths), reason));
        }
        let options = PrepareOptions { field: config.data.text_field.clone(), ..PrepareOptions::default() };
        let cache = CacheOptions { root: base.join(".tallow-cache"), prepare: options };
        let mut last: Option<Instant> = None;
        let prepared = cached_prepare(&raw, tokenizer, &cache, &mut |p| {
            if last.is_none_or(|last| last.elapsed() >= PROGRESS_EVERY) {
                last = Some(Instant::now());
                progress(&format!("preparing {key}: {} documents, {}", p.documents, format_bytes(p.bytes)));
            }
        })
        .map_err(|error| match error {
            E::UnknownExtension { .. } | E::NothingReadable { .. } | E::NoDocuments { .. } => {
                Error::config(key, shown(paths), error.to_string())
            }
            error => error.into(),
        })?;
        dirs.push(prepared);
    }
    Ok(TokenDataset::open(&dirs)?)
}

/// Paths as the run file writes them.
fn shown(paths: &[PathBuf]) -> String {
    format!("{paths:?}")
}

/// Lines about the preparation of text come at most this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What the data's and the tokenizer's vocabulary is, once they agree.
struct Vocabulary {
    size: usize,
    fingerprint: String,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Vocabulary {
    fn of(train: &TokenDataset, config: &RunConfig, tokenizer: Option<&Tokenizer>) -> Result<Self> {
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
            let TokenizerSection { add_tokens, add_special_tokens, .. } = &config.tokenizer;
            if let Some(token) = add_special_tokens.iter().chain(add_tokens).next() {
                let reason =
                    "data.train was prepared before it was added; name the text files themselves in data.train";
                return Err(Error::config("tokenizer.add_tokens", format!("{token:?}"), reason));
            }
            let (key, value) = match (&config.tokenizer.path, &config.model.from) {
                (Some(path), _) => ("tokenizer.path", path.display().to_string()),
                (None, from) => ("model.from", from.clone().unwrap_or_default()),
            };
            return Err(Error::config(key, value, reason));
        }
        Ok(vocab)
    }

    fn check(&self, dataset: &TokenDataset, key: &str, paths: &[PathBuf]) -> Result<()> {
        if dataset.tokenizer_fingerprint() != self.fingerprint {
            let reason = "was prepared with another tokenizer than data.train; prepare it again with the same";
            return Err(Error::config(key, shown(paths), reason));
        }
        Ok(())
    }
}

/// The model's `config.json`: preset or existing model, then the run file's own keys, then what the vocabulary decides.
fn model_value(config: &RunConfig, base: &Path, from: Option<&From>, vocab: &Vocabulary) -> Result<Value> {
    let section = &config.model;
    let mut keys = match (&section.preset, from) {
        (_, Some(from)) => from.checkpoint.config().to_hf().as_object().cloned().unwrap_or_default(),
        (Some(preset), None) => Preset::find(preset, base)?.keys,
        (None, None) => serde_json::Map::new(),
    };
    if let Some(given) = section.overrides.get("prefix_lm") {
        let reason = "is decided by the objective; remove it, and set objective.kind = \"prefix\" for it";
        return Err(Error::config("model.prefix_lm", given, reason));
    }
    keys.extend(section.overrides.clone());
    keys.remove("prefix_lm");
    if config.objective.is_prefix() {
        keys.insert("prefix_lm".into(), Value::Bool(true));
    }
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
