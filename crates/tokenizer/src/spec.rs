//! The common form of every tokenizer here: the JSON of a `tokenizer.json`, checked before anything is built from it.
//!
//! SentencePiece, tiktoken and GGUF vocabularies are translated to this form, so there is one way to encode, decode
//! and save. The checks are what make a hostile file an error: the pipeline underneath trusts its input.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Ids must stay below this (2^24): real vocabularies end near 2^18, and tables are sized by the largest id.
pub(crate) const MAX_VOCAB: usize = 1 << 24;
/// The longest token, in bytes of its written form.
const MAX_TOKEN_BYTES: usize = 1 << 16;

/// A token that is found in text before the model sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddedToken {
    pub id: u32,
    pub content: String,
    pub single_word: bool,
    pub lstrip: bool,
    pub rstrip: bool,
    pub normalized: bool,
    pub special: bool,
}

/// A checked `tokenizer.json`.
#[derive(Debug)]
pub(crate) struct Spec {
    pub json: Value,
    /// `BPE`, `WordPiece`, `Unigram` or `WordLevel`.
    pub model: String,
    /// The model's own vocabulary, in the file's written form.
    pub vocab: HashMap<String, u32>,
    /// Byte-pair merges in rank order, as ids `(left, right, merged)`.
    pub merges: Vec<(u32, u32, u32)>,
    pub added: Vec<AddedToken>,
    /// One past the largest id.
    pub vocab_size: usize,
}

/// Builds errors that name the file.
struct Checker<'p>(&'p Path);

impl Checker<'_> {
    fn fail(&self, reason: impl Into<String>) -> Error {
        Error::malformed(self.0, reason)
    }

    fn id(&self, value: &Value, token: &str) -> Result<u32> {
        match value.as_u64() {
            Some(id) if (id as usize) < MAX_VOCAB => Ok(id as u32),
            Some(id) => Err(self.fail(format!("token {token:?} has id {id}; ids must be below {MAX_VOCAB}"))),
            None => Err(self.fail(format!("token {token:?}: id {value} is not a whole number"))),
        }
    }
}

impl Spec {
    /// Checks the JSON of a `tokenizer.json`; `path` only names it in errors.
    pub(crate) fn new(json: Value, path: &Path) -> Result<Self> {
        let check = Checker(path);
        let model = json.get("model").filter(|m| m.is_object());
        let model = model.ok_or_else(|| check.fail("has no \"model\" object: not a Hugging Face tokenizer.json"))?;
        let kind = match model.get("type").and_then(Value::as_str) {
            Some(kind @ ("BPE" | "WordPiece" | "Unigram" | "WordLevel")) => kind.to_string(),
            Some(other) => {
                let known = "BPE, WordPiece, Unigram, WordLevel";
                return Err(check.fail(format!("model.type {other:?} is not one of {known}")));
            }
            // Old files leave the type out; merges mean BPE.
            None if model.get("merges").is_some() => "BPE".to_string(),
            None => return Err(check.fail("model.type is missing")),
        };
        let vocab = read_vocab(&check, model, &kind)?;
        let merges = if kind == "BPE" { read_merges(&check, model, &vocab)? } else { Vec::new() };
        let added = read_added(&check, &json)?;
        crate::charsmap::check_json(&json["normalizer"]).map_err(|reason| check.fail(reason))?;
        let vocab_size = check_ids(&check, &vocab, &added)?;
        Ok(Self { model: kind, vocab, merges, added, vocab_size, json })
    }

    pub(crate) fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self> {
        let json = serde_json::from_slice(bytes).map_err(|e| Error::malformed(path, format!("not valid JSON: {e}")))?;
        Self::new(json, path)
    }

    pub(crate) fn model_json(&self) -> &Value {
        &self.json["model"]
    }
}

fn read_vocab(check: &Checker<'_>, model: &Value, kind: &str) -> Result<HashMap<String, u32>> {
    let vocab = match (kind, model.get("vocab")) {
        ("Unigram", Some(Value::Array(entries))) => {
            let mut vocab = HashMap::with_capacity(entries.len());
            for (id, entry) in entries.iter().enumerate() {
                let token = entry.get(0).and_then(Value::as_str);
                let score = entry.get(1).and_then(Value::as_f64);
                let (Some(token), Some(_)) = (token, score) else {
                    return Err(check.fail(format!("model.vocab[{id}] is not [token, score]")));
                };
                if vocab.insert(token.to_string(), id as u32).is_some() {
                    return Err(check.fail(format!("model.vocab holds token {token:?} twice")));
                }
            }
            vocab
        }
        ("BPE" | "WordPiece" | "WordLevel", Some(Value::Object(entries))) => entries
            .iter()
            .map(|(token, id)| Ok((token.clone(), check.id(id, token)?)))
            .collect::<Result<HashMap<_, _>>>()?,
        (_, Some(_)) => return Err(check.fail(format!("model.vocab has the wrong form for a {kind} model"))),
        (_, None) => return Err(check.fail("model.vocab is missing")),
    };
    if vocab.is_empty() {
        return Err(check.fail("model.vocab is empty"));
    }
    if vocab.len() > MAX_VOCAB {
        return Err(check.fail(format!("model.vocab holds {} tokens; at most {MAX_VOCAB}", vocab.len())));
    }
    if let Some(token) = vocab.keys().find(|t| t.len() > MAX_TOKEN_BYTES) {
        return Err(check.fail(format!("a token of {} bytes; at most {MAX_TOKEN_BYTES}", token.len())));
    }
    if kind == "Unigram" {
        match model.get("unk_id") {
            None | Some(Value::Null) => {}
            Some(id) if id.as_u64().is_some_and(|id| (id as usize) < vocab.len()) => {}
            Some(id) => return Err(check.fail(format!("model.unk_id {id} is outside the vocabulary"))),
        }
    }
    if let Some(unk) = model.get("unk_token").and_then(Value::as_str)
        && kind == "WordPiece"
        && !vocab.contains_key(unk)
    {
        return Err(check.fail(format!("model.unk_token {unk:?} is not in the vocabulary")));
    }
    Ok(vocab)
}

fn read_merges(check: &Checker<'_>, model: &Value, vocab: &HashMap<String, u32>) -> Result<Vec<(u32, u32, u32)>> {
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or("");
    let Some(merges) = model.get("merges").and_then(Value::as_array) else {
        return Err(check.fail("model.merges is missing or not a list"));
    };
    let mut out = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        let parts = match merge {
            Value::String(pair) => pair.split_once(' ').filter(|(_, right)| !right.contains(' ')),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        // Empty halves would merge for ever; every other merge makes its token longer, so cycles cannot arise.
        let Some((left, right)) = parts.filter(|(l, r)| !l.is_empty() && !r.is_empty()) else {
            return Err(check.fail(format!("model.merges[{rank}] is not a pair of tokens")));
        };
        let tail = right.strip_prefix(prefix).ok_or_else(|| {
            check.fail(format!("model.merges[{rank}]: {right:?} lacks the continuing prefix {prefix:?}"))
        })?;
        let find = |token: &str| {
            vocab.get(token).copied().ok_or_else(|| {
                check.fail(format!("model.merges[{rank}] needs token {token:?}, which is not in the vocabulary"))
            })
        };
        out.push((find(left)?, find(right)?, find(&format!("{left}{tail}"))?));
    }
    Ok(out)
}

/// The added tokens of a `tokenizer.json` that has been checked before.
pub(crate) fn added_tokens(json: &[u8]) -> Result<Vec<AddedToken>> {
    #[derive(serde::Deserialize)]
    struct Added {
        added_tokens: Option<Value>,
    }
    let path = Path::new("tokenizer.json");
    let added: Added =
        serde_json::from_slice(json).map_err(|e| Error::malformed(path, format!("not valid JSON: {e}")))?;
    read_added(&Checker(path), &serde_json::json!({ "added_tokens": added.added_tokens }))
}

fn read_added(check: &Checker<'_>, json: &Value) -> Result<Vec<AddedToken>> {
    let entries = match json.get("added_tokens") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(entries)) => entries,
        Some(_) => return Err(check.fail("added_tokens is not a list")),
    };
    let mut out = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let Some(content) = entry.get("content").and_then(Value::as_str) else {
            return Err(check.fail(format!("added_tokens[{index}].content is missing")));
        };
        let flag = |key: &str, default: bool| match entry.get(key) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(check.fail(format!("added_tokens[{index}].{key} is {other}, not true or false"))),
        };
        let special = flag("special", false)?;
        out.push(AddedToken {
            id: check.id(entry.get("id").unwrap_or(&Value::Null), content)?,
            content: content.to_string(),
            single_word: flag("single_word", false)?,
            lstrip: flag("lstrip", false)?,
            rstrip: flag("rstrip", false)?,
            normalized: flag("normalized", !special)?,
            special,
        });
    }
    Ok(out)
}

/// Every id belongs to one token and every token has one id; returns one past the largest id.
fn check_ids(check: &Checker<'_>, vocab: &HashMap<String, u32>, added: &[AddedToken]) -> Result<usize> {
    let mut owner: HashMap<u32, &str> = HashMap::with_capacity(vocab.len() + added.len());
    let model = vocab.iter().map(|(token, id)| (token.as_str(), *id));
    let extra = added.iter().map(|token| (token.content.as_str(), token.id));
    let mut largest = 0;
    for (token, id) in model.chain(extra) {
        largest = largest.max(id);
        if let Some(other) = owner.insert(id, token)
            && other != token
        {
            let (first, second) = if other < token { (other, token) } else { (token, other) };
            return Err(check.fail(format!("id {id} is given to both {first:?} and {second:?}")));
        }
    }
    let mut seen = HashMap::new();
    for token in added {
        let before = vocab.get(&token.content).copied().or_else(|| seen.get(token.content.as_str()).copied());
        if let Some(id) = before.filter(|&id| id != token.id) {
            return Err(check.fail(format!("token {:?} has two ids, {id} and {}", token.content, token.id)));
        }
        seen.insert(token.content.as_str(), token.id);
    }
    Ok(largest as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error_of(json: Value) -> String {
        Spec::new(json, Path::new("t.json")).unwrap_err().to_string()
    }

    fn bpe(vocab: Value, merges: Value) -> Value {
        json!({ "model": { "type": "BPE", "vocab": vocab, "merges": merges } })
    }

    #[test]
    fn hostile_specs_are_refused_by_name() {
        for (json, needle) in [
            (json!([]), "no \"model\""),
            (json!({ "model": 3 }), "no \"model\""),
            (json!({ "model": { "type": "Oracle" } }), "Oracle"),
            (json!({ "model": { "type": "BPE", "merges": [] } }), "vocab is missing"),
            (bpe(json!([]), json!([])), "wrong form"),
            (bpe(json!({}), json!([])), "empty"),
            (bpe(json!({ "a": -1 }), json!([])), "not a whole number"),
            (bpe(json!({ "a": 4_294_967_295u32 }), json!([])), "must be below"),
            (bpe(json!({ "a": 0, "b": 0 }), json!([])), "both \"a\" and \"b\""),
            (bpe(json!({ "a": 0 }), json!(["a"])), "not a pair"),
            (bpe(json!({ "a": 0, "": 1 }), json!([["a", ""]])), "not a pair"),
            (bpe(json!({ "a": 0, "b": 1 }), json!([["a", "b"]])), "\"ab\""),
            (bpe(json!({ "a": 0 }), json!([["a", "c"]])), "\"c\""),
            (bpe(json!({ "a": 0 }), json!("a b")), "merges"),
            (json!({ "model": { "type": "Unigram", "vocab": [["a"]] } }), "[token, score]"),
            (json!({ "model": { "type": "Unigram", "vocab": [["a", 0], ["a", 1]] } }), "twice"),
            (json!({ "model": { "type": "Unigram", "unk_id": 9, "vocab": [["a", 0]] } }), "unk_id"),
        ] {
            let message = error_of(json.clone());
            assert!(message.contains(needle) && message.contains("t.json"), "{json} gave {message}");
        }
        let mut with_added = bpe(json!({ "a": 0 }), json!([]));
        with_added["added_tokens"] = json!([{ "id": 0, "content": "x" }]);
        assert!(error_of(with_added.clone()).contains("both"));
        with_added["added_tokens"] = json!([{ "id": 7, "content": "a" }]);
        assert!(error_of(with_added).contains("two ids"));
    }
}
