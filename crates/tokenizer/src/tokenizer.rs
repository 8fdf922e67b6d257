//! The one type everyone uses.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use rayon::prelude::*;
use serde_json::Value;

use crate::chat::NamedTemplates;
use crate::decode::{DecodeRule, DecodeStream, decode_all};
use crate::engine::{Engine, pre_tokenizer};
use crate::error::{Error, Result};
use crate::pre::PreTokenizer;
use crate::spec::{AddedToken, Spec};
use crate::special::{Roles, Template};
use crate::{hf, save};

/// What [`Tokenizer::encode_with`] adds and recognises. The default adds nothing and reads all text as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// Put in front what the tokenizer's template puts there (`[CLS]`, `<s>`), or its BOS token when it has none.
    pub add_bos: bool,
    /// Put behind what the tokenizer's template puts there, or its EOS token when it has none.
    pub add_eos: bool,
    /// Read special tokens written in the text as those tokens. Leave it off for text from outside: otherwise a
    /// document can end itself or forge a chat turn.
    pub parse_special: bool,
}

/// A token as its vocabulary writes it.
#[derive(Debug, Clone)]
pub(crate) struct TokenEntry {
    pub written: Box<str>,
    pub special: bool,
}

/// A tokenizer: text to ids and back. Cheap to clone and safe to share between threads.
///
/// Whatever it was read from, it holds the same thing: a checked `tokenizer.json`, which [`save`](Self::save) writes.
/// Truncation and padding settings of a file are ignored: ids are never dropped or invented here.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    chat_templates: Arc<NamedTemplates>,
}

struct Inner {
    json: Vec<u8>,
    model: String,
    tokens: Vec<Option<TokenEntry>>,
    ids: std::collections::HashMap<Box<str>, u32>,
    roles: Roles,
    template: Template,
    rule: DecodeRule,
    pre: Option<PreTokenizer>,
    fast: Option<Engine>,
    /// The `tokenizers` crate's pipeline that reads special tokens as text, and the one that recognises them.
    slow: OnceLock<Arc<tokenizers::Tokenizer>>,
    slow_special: OnceLock<Arc<tokenizers::Tokenizer>>,
    fingerprint: OnceLock<String>,
}

impl Tokenizer {
    /// Reads a tokenizer, telling the kind by the path and its content: a `tokenizer.json`, a folder holding one (with
    /// `tokenizer_config.json` and `special_tokens_map.json` beside it if they exist), a SentencePiece `.model`, or a
    /// `.tiktoken` rank file whose name is that of its encoding (`cl100k_base.tiktoken`).
    ///
    /// Every malformed file is an error that names the file and the key; nothing in it is trusted.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        hf::from_path(path.as_ref())
    }

    /// Reads the bytes of a `tokenizer.json`. The roles of special tokens are guessed from their usual names.
    pub fn from_json(bytes: &[u8]) -> Result<Self> {
        Self::build(Spec::from_bytes(bytes, Path::new("tokenizer.json"))?, Roles::default(), None)
    }

    pub(crate) fn build(spec: Spec, roles: Roles, chat_templates: impl Into<NamedTemplates>) -> Result<Self> {
        Self::build_with_pre(spec, roles, chat_templates.into(), None)
    }

    /// `stated_pre` is llama.cpp's name where the source gave one; otherwise it is recognised by its regexes.
    pub(crate) fn build_with_pre(
        spec: Spec,
        roles: Roles,
        chat_templates: NamedTemplates,
        stated_pre: Option<PreTokenizer>,
    ) -> Result<Self> {
        let json = serde_json::to_vec(&spec.json).map_err(|e| Error::Encode(e.to_string()))?;
        let mut tokens: Vec<Option<TokenEntry>> = vec![None; spec.vocab_size];
        let mut ids = std::collections::HashMap::with_capacity(spec.vocab.len() + spec.added.len());
        let model = spec.vocab.iter().map(|(token, &id)| (token.as_str(), id, false));
        let added = spec.added.iter().map(|t| (t.content.as_str(), t.id, t.special));
        for (token, id, special) in model.chain(added) {
            tokens[id as usize] = Some(TokenEntry { written: token.into(), special });
            ids.insert(token.into(), id);
        }
        let fast = Engine::from_spec(&spec)?;
        let ignore_merges = spec.model_json()["ignore_merges"].as_bool().unwrap_or(false);
        let patterns = if spec.model == "BPE" { pre_tokenizer(&spec.json["pre_tokenizer"]) } else { None };
        let pre = stated_pre.or(patterns.and_then(|p| PreTokenizer::recognise(&p, ignore_merges)));
        let template = Template::from_json(spec.json.get("post_processor"), &ids)
            .map_err(|reason| Error::malformed("tokenizer.json", reason))?;
        let tokenizer = Self {
            inner: Arc::new(Inner {
                json,
                roles: roles.or_guess(&spec, &ids),
                template,
                rule: DecodeRule::from_json(spec.json.get("decoder")),
                model: spec.model,
                tokens,
                ids,
                pre,
                fast,
                slow: OnceLock::new(),
                slow_special: OnceLock::new(),
                fingerprint: OnceLock::new(),
            }),
            chat_templates: Arc::new(chat_templates),
        };
        if tokenizer.inner.fast.is_none() || tokenizer.inner.rule == DecodeRule::Whole {
            tokenizer.check_slow(&spec.added)?;
        }
        Ok(tokenizer)
    }

    /// The other pipeline numbers added tokens itself: a file whose numbers it would change is refused.
    fn check_slow(&self, added: &[crate::spec::AddedToken]) -> Result<()> {
        let slow = self.slow(false)?;
        for token in added.iter().filter(|t| !t.content.is_empty()) {
            if slow.token_to_id(&token.content) != Some(token.id) {
                let reason = format!(
                    "added token {:?} has id {}, but ids of added tokens must follow the vocabulary without gaps",
                    token.content, token.id
                );
                return Err(Error::malformed("tokenizer.json", reason));
            }
        }
        Ok(())
    }

    fn slow(&self, parse_special: bool) -> Result<Arc<tokenizers::Tokenizer>> {
        let cell = if parse_special { &self.inner.slow_special } else { &self.inner.slow };
        if let Some(ready) = cell.get() {
            return Ok(ready.clone());
        }
        let mut slow = guarded(|| tokenizers::Tokenizer::from_bytes(&self.inner.json))
            .map_err(|reason| Error::malformed("tokenizer.json", reason))?;
        slow.with_padding(None);
        slow.with_truncation(None)?;
        slow.set_encode_special_tokens(!parse_special);
        Ok(cell.get_or_init(|| Arc::new(slow)).clone())
    }

    /// Text to ids. `add_special` adds what the tokenizer's template adds around a text (often nothing, for a
    /// byte-level BPE); special tokens written in the text stay text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if add_special {
            ids.extend_from_slice(&self.inner.template.prefix);
        }
        self.encode_into(text, false, &mut ids)?;
        if add_special {
            ids.extend_from_slice(&self.inner.template.suffix);
        }
        Ok(ids)
    }

    /// Text to ids, with everything chosen. Fails if BOS or EOS is asked for and the tokenizer has none.
    pub fn encode_with(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_bos {
            match (self.inner.template.prefix.as_slice(), self.bos_id()) {
                ([], None) => return Err(Error::NoSpecialToken { role: "bos" }),
                ([], Some(bos)) => ids.push(bos),
                (prefix, _) => ids.extend_from_slice(prefix),
            }
        }
        self.encode_into(text, options.parse_special, &mut ids)?;
        if options.add_eos {
            match (self.inner.template.suffix.as_slice(), self.eos_id()) {
                ([], None) => return Err(Error::NoSpecialToken { role: "eos" }),
                ([], Some(eos)) => ids.push(eos),
                (suffix, _) => ids.extend_from_slice(suffix),
            }
        }
        Ok(ids)
    }

    pub(crate) fn encode_into(&self, text: &str, parse_special: bool, out: &mut Vec<u32>) -> Result<()> {
        if let Some(fast) = &self.inner.fast {
            return fast.encode_into(text, parse_special, out);
        }
        let slow = self.slow(parse_special)?;
        let encoding = guarded(|| slow.encode_fast(text, false)).map_err(Error::Encode)?;
        out.extend_from_slice(encoding.get_ids());
        Ok(())
    }

    /// [`encode`](Self::encode) of many texts on all threads of the current rayon pool, in order.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], add_special: bool) -> Result<Vec<Vec<u32>>> {
        texts.par_iter().map(|text| self.encode(text.as_ref(), add_special)).collect()
    }

    /// The path for data preparation: many documents to plain ids, nothing added, threaded, in order. The same ids as
    /// `encode(document, false)`.
    pub fn encode_documents<S: AsRef<str> + Sync>(&self, documents: &[S]) -> Result<Vec<Vec<u32>>> {
        let Some(fast) = &self.inner.fast else { return self.encode_batch(documents, false) };
        let encode = |cache: &mut CacheLease<'_>, document: &S| {
            let text = document.as_ref();
            let mut ids = Vec::with_capacity(text.len() / 3 + 2);
            fast.encode_with_cache(text, false, &mut cache.1, &mut ids)?;
            Ok(ids)
        };
        documents.par_iter().map_init(|| CacheLease(fast, fast.take_cache()), encode).collect()
    }

    /// Ids to text. `skip_special` leaves special tokens out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// Fails on an id outside the vocabulary.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        decode_all(self, ids, skip_special)
    }

    /// Incremental decoding of one text.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream {
        DecodeStream::new(self.clone(), skip_special)
    }

    pub(crate) fn decode_whole(&self, ids: &[u32]) -> Result<String> {
        let slow = self.slow(false)?;
        guarded(|| slow.decode(ids, false)).map_err(Error::Decode)
    }

    pub(crate) fn decode_rule(&self) -> &DecodeRule {
        &self.inner.rule
    }

    pub(crate) fn token(&self, id: u32) -> Result<&TokenEntry> {
        let entry = self.inner.tokens.get(id as usize).and_then(Option::as_ref);
        entry.ok_or(Error::UnknownId { id, vocab_size: self.vocab_size() })
    }

    /// The bytes a token stands for inside a text (not at its start): raw bytes, so half a character is possible.
    pub fn token_bytes(&self, id: u32) -> Option<Vec<u8>> {
        self.token(id).ok().map(|token| self.inner.rule.bytes(&token.written, false))
    }

    /// The id of a token in its written form (`Ġthe`, `▁the`, `##ing`, `<|endoftext|>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.ids.get(token).copied()
    }

    /// The written form of a token.
    pub fn id_to_token(&self, id: u32) -> Option<&str> {
        self.token(id).ok().map(|token| &*token.written)
    }

    /// Whether this id is a special token: left out by `decode(.., true)`, not produced from plain text.
    pub fn is_special(&self, id: u32) -> bool {
        self.token(id).is_ok_and(|token| token.special)
    }

    /// One past the largest id: the number of embedding rows a model needs.
    pub fn vocab_size(&self) -> usize {
        self.inner.tokens.len()
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.inner.roles.bos
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.inner.roles.eos
    }

    /// The token for text that the vocabulary cannot write.
    pub fn unk_id(&self) -> Option<u32> {
        self.inner.roles.unk
    }

    /// The token that fills up a batch.
    pub fn pad_id(&self) -> Option<u32> {
        self.inner.roles.pad
    }

    /// Whether `encode(text, true)` begins with something (what GGUF calls `add_bos_token`).
    pub fn adds_bos(&self) -> bool {
        !self.inner.template.prefix.is_empty()
    }

    /// Whether `encode(text, true)` ends with something (what GGUF calls `add_eos_token`).
    pub fn adds_eos(&self) -> bool {
        !self.inner.template.suffix.is_empty()
    }

    /// The Jinja chat template, if the source had one: where it had several, that named `default`, else the first.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_templates.main()
    }

    /// All chat templates by name.
    pub(crate) fn chat_templates(&self) -> &NamedTemplates {
        &self.chat_templates
    }

    /// The same tokenizer with this Jinja text as its chat template, in place of all that it had:
    /// [`save`](Self::save) writes it. [`chat_encoder`](Self::chat_encoder) says whether it compiles.
    #[must_use]
    pub fn with_chat_template(&self, template: impl Into<String>) -> Self {
        Self { inner: self.inner.clone(), chat_templates: Arc::new(Some(template.into()).into()) }
    }

    /// The same tokenizer with these tokens behind its vocabulary, found in text as they are written; `special` ones, of a chat
    /// template, only where special tokens are asked for. Their ids follow the largest there is.
    ///
    /// # Errors
    /// If one is empty, is a token already, or is there twice.
    pub fn with_added_tokens<S: AsRef<str>>(&self, tokens: &[S], special: bool) -> Result<Self> {
        let mut json = self.to_json()?;
        let list = &mut json["added_tokens"];
        if list.is_null() {
            *list = Value::Array(vec![]);
        }
        for (id, token) in (self.vocab_size()..).zip(tokens) {
            let token = token.as_ref();
            if token.is_empty() || self.token_to_id(token).is_some() {
                let reason = if token.is_empty() { "is empty" } else { "is a token of this tokenizer already" };
                return Err(Error::AddedToken { token: token.to_owned(), reason: reason.into() });
            }
            if tokens[..id - self.vocab_size()].iter().any(|other| other.as_ref() == token) {
                return Err(Error::AddedToken { token: token.to_owned(), reason: "is to be added twice".into() });
            }
            if let Some(list) = list.as_array_mut() {
                list.push(serde_json::json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                }));
            }
        }
        let spec = Spec::new(json, Path::new("tokenizer.json"))?;
        let roles = Roles { stated: true, ..*self.roles() };
        Self::build_with_pre(spec, roles, self.chat_templates().clone(), self.pre_tokenizer())
    }

    /// The tokens that are found in text before the model sees it.
    pub(crate) fn added_tokens(&self) -> Result<Vec<AddedToken>> {
        crate::spec::added_tokens(&self.inner.json)
    }

    /// Whether text between special tokens becomes the same ids wherever it stands: no space is put before it.
    pub(crate) fn is_context_free(&self) -> bool {
        self.inner.fast.is_some() && self.inner.rule == DecodeRule::ByteLevel
    }

    /// The model of the tokenizer: `BPE`, `WordPiece`, `Unigram` or `WordLevel`.
    pub fn model(&self) -> &str {
        &self.inner.model
    }

    /// llama.cpp's name for the pre-tokenizer of a byte-level BPE, where one is known: what a GGUF export writes.
    pub fn pre_tokenizer(&self) -> Option<PreTokenizer> {
        self.inner.pre
    }

    /// The checked `tokenizer.json`.
    pub fn to_json(&self) -> Result<Value> {
        serde_json::from_slice(&self.inner.json).map_err(|e| Error::Encode(e.to_string()))
    }

    pub(crate) fn json_bytes(&self) -> &[u8] {
        &self.inner.json
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`, which unmodified
    /// `transformers.AutoTokenizer` loads with the same ids. `path` is a folder (made if absent), or a file name ending
    /// in `.json` for the first, the other two going beside it. Each file is replaced as a whole or not at all.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save::save(self, path.as_ref())
    }

    /// SHA-256 (hex) over everything that changes ids: the key for caches of encoded data.
    pub fn fingerprint(&self) -> String {
        self.inner.fingerprint.get_or_init(|| save::fingerprint(self)).clone()
    }

    pub(crate) fn roles(&self) -> &Roles {
        &self.inner.roles
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokenizer({}, {} tokens)", self.inner.model, self.vocab_size())
    }
}

/// Runs a step of the other pipeline. It trusts its input, and what the checks of `Spec` miss may still panic there: a
/// panic is then a reason like any other.
fn guarded<T>(step: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(step)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(_) => Err("its pipeline cannot handle this; the file is malformed".to_string()),
    }
}

/// Gives its cache back when a worker is done with it.
struct CacheLease<'e>(&'e Engine, crate::cache::PieceCache);

impl Drop for CacheLease<'_> {
    fn drop(&mut self) {
        self.0.give_cache(std::mem::take(&mut self.1));
    }
}
