//! The examples of a fine-tuning run: found, rendered by the model's own template, masked, prepared once and kept.

mod words;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tallow_data::{
    ChatCacheOptions, ChatOptions, EncodeChat, KnownWords, TokenDataset, TooLong, TrainOn, cached_prepare_chat,
};
use tallow_tokenizer::{
    ChatEncoder, ChatOptions as RenderOptions, EncodeOptions, EncodedChat, Message, SpecialInContent, Tokenizer,
};

use crate::config::{RunConfig, TooLongSetting, TrainOnSetting};
use crate::progress::{format_bytes, several};
use crate::{Error, Result};

/// Lines about the preparation come at most this often.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What turns the examples of a run into ids.
pub(crate) struct Conversations {
    tokenizer: Tokenizer,
    /// Or why there is none: prompts with completions need no template.
    chat: std::result::Result<ChatEncoder, String>,
}

impl Conversations {
    /// For the tokenizer and the template of a run.
    pub(crate) fn new(config: &RunConfig, base: &Path, tokenizer: Option<&Tokenizer>) -> Result<Self> {
        let Some(tokenizer) = tokenizer.cloned() else {
            let reason = "a tokenizer is needed to write conversations as ids; give one, or a model.from that has one";
            return Err(Error::config("tokenizer.path", "(missing)", reason));
        };
        let chat = match &config.tokenizer.chat_template {
            None => tokenizer.chat_encoder().map_err(|error| format!("{error}; or set tokenizer.chat_template")),
            Some(given) => {
                let template = template_text(given, base)?;
                let encoder = tokenizer.chat_encoder_with(&template);
                Ok(encoder.map_err(|e| Error::config("tokenizer.chat_template", given, e.to_string()))?)
            }
        };
        Ok(Self { tokenizer, chat })
    }

    /// How conversations are written, if they can be.
    pub(crate) fn template(&self) -> Option<&str> {
        self.chat.as_ref().ok().map(|chat| chat.template())
    }

    /// The tokenizer with the template that the run renders by.
    pub(crate) fn with_template(&self, tokenizer: Tokenizer) -> Tokenizer {
        match &self.chat {
            Ok(chat) if tokenizer.chat_template() != Some(chat.template()) => {
                tokenizer.with_chat_template(chat.template())
            }
            _ => tokenizer,
        }
    }

    /// Opens, or prepares first, the examples of a run: to train on and to validate.
    pub(crate) fn open(
        &self,
        config: &RunConfig,
        base: &Path,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(TokenDataset, Option<TokenDataset>)> {
        let data = &config.data;
        let fraction = data.valid_fraction;
        let (train, held_out) = self.prepare("data.train", &data.train, config, base, fraction, progress)?;
        if let Some(held_out) = &held_out {
            check_division(&train, held_out, fraction)?;
        }
        let valid = match data.valid.as_slice() {
            [] => held_out,
            paths => Some(self.prepare("data.valid", paths, config, base, 0.0, progress)?.0),
        };
        Ok((train, valid))
    }

    /// What may stand in conversations beside the usual.
    fn known(&self, config: &RunConfig) -> KnownWords {
        let named = self.chat.as_ref().map(|chat| words::named_in(chat.template())).unwrap_or_default();
        KnownWords { roles: [named.roles, config.data.roles.clone()].concat(), ..named }
    }

    fn prepare(
        &self,
        key: &str,
        paths: &[PathBuf],
        config: &RunConfig,
        base: &Path,
        valid_fraction: f64,
        progress: &mut dyn FnMut(&str),
    ) -> Result<(TokenDataset, Option<TokenDataset>)> {
        let shown = format!("{paths:?}");
        let found: Vec<PathBuf> = paths.iter().map(|path| RunConfig::at(base, path)).collect();
        if let Some(missing) = found.iter().find(|path| !path.exists()) {
            let reason = format!("{}: there is no such file or folder", missing.display());
            return Err(Error::config(key, shown, reason));
        }
        let prepared = found.iter().filter(|path| path.join("index.json").is_file()).count();
        if prepared == found.len() && valid_fraction == 0.0 {
            let dataset = TokenDataset::open(&found)?;
            let Some(index) = dataset.examples() else {
                let reason = "was prepared as text, not as examples; name the jsonl or parquet files themselves";
                return Err(Error::config(key, shown, reason));
            };
            // What the folders were made with decides; a run that says otherwise would be ignored.
            if index.train_on != train_on(config) {
                let reason =
                    format!("was prepared with train_on = {:?}; set that, or prepare it again", index.train_on);
                let reason = reason.to_lowercase();
                return Err(Error::config("objective.train_on", format!("{:?}", config.objective.train_on), reason));
            }
            if index.encoder_fingerprint != self.fingerprint() {
                let reason = "was prepared with another tokenizer or chat template; set that, or prepare it again";
                return Err(Error::config(key, shown, reason));
            }
            return Ok((dataset, None));
        }
        if prepared > 0 {
            let reason = "mixes prepared folders with files, or has its examples divided already; name the files alone";
            return Err(Error::config(key, shown, reason));
        }
        let options = ChatOptions {
            train_on: train_on(config),
            max_tokens: Some(config.data.context_length + 1),
            too_long: match config.data.too_long {
                TooLongSetting::Drop => TooLong::Drop,
                TooLongSetting::Error => TooLong::Error,
                TooLongSetting::TruncateEnd => TooLong::TruncateEnd,
            },
            on_malformed: config.data.on_malformed,
            nothing_learnt: config.data.nothing_learnt,
            shape: config.data.shape,
            known: self.known(config),
            valid_fraction,
            ..ChatOptions::default()
        };
        let cache = ChatCacheOptions { root: base.join(".tallow-cache"), prepare: options };
        let mut last: Option<Instant> = None;
        let cached = cached_prepare_chat(&found, self, &cache, &mut |p| {
            if last.is_none_or(|last| last.elapsed() >= PROGRESS_EVERY) {
                last = Some(Instant::now());
                progress(&format!("preparing {key}: {}, {}", several(p.documents, "example"), format_bytes(p.bytes)));
            }
        })
        .map_err(|error| Error::config(key, shown, in_run_file_keys(&error, config)))?;
        let valid = cached.valid.map(|path| TokenDataset::open(&[path])).transpose()?;
        Ok((TokenDataset::open(&[cached.train])?, valid))
    }
}

/// What the preparation says, with the keys of the run file in the place of its options.
fn in_run_file_keys(error: &tallow_data::Error, config: &RunConfig) -> String {
    let context = config.data.context_length;
    let limit = format!("data.context_length = {context}");
    let mut text = error.to_string();
    for (option, key) in [
        (format!("max_tokens = {}", context + 1), limit.as_str()),
        ("longer than max_tokens".into(), &format!("longer than {limit}")),
        ("on_malformed = ".into(), "data.on_malformed = "),
        ("nothing_learnt = ".into(), "data.nothing_learnt = "),
        ("too_long = ".into(), "data.too_long = "),
        ("train_on = ".into(), "objective.train_on = "),
        ("valid_fraction = ".into(), "data.valid_fraction = "),
        ("`field` or `shape` option".into(), "key data.shape"),
        ("to read with shape".into(), "to read with data.shape"),
    ] {
        text = text.replace(&option, key);
    }
    match error {
        tallow_data::Error::NoExamples { .. } if text.contains(&limit) => match config.data.too_long {
            TooLongSetting::Drop => {
                format!("{text}\nraise data.context_length, or set data.too_long = \"truncate_end\"")
            }
            _ => format!("{text}\nraise data.context_length"),
        },
        _ => text,
    }
}

/// What of a conversation is learnt.
fn train_on(config: &RunConfig) -> TrainOn {
    match config.objective.train_on {
        TrainOnSetting::Assistant => TrainOn::Assistant,
        TrainOnSetting::Last => TrainOn::Last,
        TrainOnSetting::All => TrainOn::All,
    }
}

/// The text of a template file, or the name of a built-in template.
fn template_text(given: &str, base: &Path) -> Result<String> {
    let path = RunConfig::at(base, Path::new(given));
    if path.is_file() {
        return std::fs::read_to_string(&path).map_err(|e| Error::io(path, e));
    }
    if given.contains(['/', '.']) && !given.contains("{{") && !given.contains("{%") {
        let reason = format!("{}: there is no such file", path.display());
        return Err(Error::config("tokenizer.chat_template", given, reason));
    }
    Ok(given.to_owned())
}

/// Refuses a division of which one part is empty: examples are divided before those that are too long are left out.
fn check_division(train: &TokenDataset, held_out: &TokenDataset, fraction: f64) -> Result<()> {
    let empty = match (train.num_documents(), held_out.num_documents()) {
        (_, 0) => "holds out no example",
        (0, _) => "holds out every example",
        _ => return Ok(()),
    };
    let left = several(train.num_documents() + held_out.num_documents(), "example");
    let why = left_out(train).first().map(|what| format!(" ({what})")).unwrap_or_default();
    let way_out = "add examples, raise data.context_length, name other files in data.valid, or set it to 0";
    Err(Error::config("data.valid_fraction", fraction, format!("{empty}: {left} can be used{why}; {way_out}")))
}

/// What was left out of the files of a dataset.
fn left_out(dataset: &TokenDataset) -> Vec<String> {
    let Some(index) = dataset.examples() else { return vec![] };
    let counts = [
        (index.dropped, "longer than data.context_length and left out (data.too_long)"),
        (index.truncated, "longer than data.context_length and cut short (data.too_long)"),
        (index.nothing_learnt, "without anything to learn and left out (data.nothing_learnt)"),
        (index.refused, "refused by the chat template and left out (data.on_malformed)"),
    ];
    let told = |(count, what): &(u64, &str)| {
        format!("{} {} {what}", several(*count, "example"), if *count == 1 { "is" } else { "are" })
    };
    counts.iter().filter(|(count, _)| *count > 0).map(told).collect()
}

/// What there is to say of the files of `key`: what was left out of them, and what nobody reads.
pub(crate) fn notes(key: &str, dataset: &TokenDataset) -> Vec<String> {
    let unread = dataset.examples().map(|index| index.unread_fields.as_slice()).unwrap_or_default();
    let unread = unread.iter().map(|field| format!("warning: {key}: {field}"));
    left_out(dataset).iter().map(|what| format!("note: {key}: {what}")).chain(unread).collect()
}

/// Refuses texts alone where prompts are to be seen both ways, and says where there are some.
pub(crate) fn texts_of_prefix(key: &str, datasets: &[&TokenDataset]) -> Result<Option<String>> {
    let texts = datasets.iter().find_map(|d| Some(d.examples()?.texts)).unwrap_or(0);
    let all: u64 = datasets.iter().map(|d| d.num_documents()).sum();
    if texts > 0 && texts >= all {
        let reason = format!(
            "{key} holds nothing but text (`text`), which has no prompt to see both ways; give conversations or prompts \
             with completions, or set objective.kind = \"sft\" and remove objective.train_on"
        );
        return Err(Error::config("objective.kind", "\"prefix\"", reason));
    }
    let what =
        "without a prompt: nothing of it is seen both ways (objective.kind = \"prefix\"), all of it is learnt causally";
    Ok((texts > 0).then(|| format!("note: {key}: {} of text {what}", several(texts, "example"))))
}

impl EncodeChat for Conversations {
    fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> tallow_data::Result<EncodedChat> {
        let encode = |error: Box<dyn std::error::Error + Send + Sync>| tallow_data::Error::Encode { source: error };
        let chat = self.chat.as_ref().map_err(|reason| encode(reason.clone().into()))?;
        let tools = match tools {
            None => None,
            Some(Value::Array(tools)) => Some(tools.clone()),
            Some(_) => return Err(encode("`tools` is not a list".into())),
        };
        // As `tallow chat` renders: what somebody wrote in a message is text, whatever it looks like.
        let options = RenderOptions { tools, special_in_content: SpecialInContent::Text, ..RenderOptions::default() };
        chat.encode_spans(messages, &options, wanted).map_err(|e| encode(Box::new(e)))
    }

    fn encode_completion(&self, prompt: &str, completion: &str) -> tallow_data::Result<EncodedChat> {
        let encode = |error: Box<dyn std::error::Error + Send + Sync>| tallow_data::Error::Encode { source: error };
        let Some(eos) = self.tokenizer.eos_id() else {
            return Err(encode("the tokenizer has no end-of-text token to put behind a completion".into()));
        };
        let front = EncodeOptions { add_bos: self.tokenizer.adds_bos(), ..EncodeOptions::default() };
        let mut ids = self.tokenizer.encode_with(prompt, front).map_err(|e| encode(Box::new(e)))?;
        let begin = ids.len();
        ids.extend(self.tokenizer.encode(completion, false).map_err(|e| encode(Box::new(e)))?);
        ids.push(eos);
        let end = ids.len();
        Ok(EncodedChat { ids, spans: vec![(1, begin..end)] })
    }

    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    fn fingerprint(&self) -> String {
        match &self.chat {
            Ok(chat) => chat.fingerprint(),
            Err(_) => self.tokenizer.fingerprint(),
        }
    }

    fn tokenizer_fingerprint(&self) -> String {
        self.tokenizer.fingerprint()
    }
}
