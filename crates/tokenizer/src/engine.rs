//! The fast path, without offsets: text is cut by added tokens and splitting rules, and each distinct piece is encoded
//! once and remembered. Tokenizers whose pipeline is neither byte-level BPE nor Unigram use the `tokenizers` crate.

use std::collections::{HashMap, HashSet};
use std::sync::Mutex;

use serde_json::Value;
use tokenizers::normalizers::NFC;
use tokenizers::{NormalizedString, Normalizer, NormalizerWrapper};

use crate::added::{AddedMatcher, Segment};
use crate::byte_alphabet::BYTE_TO_CHAR;
use crate::cache::PieceCache;
use crate::error::{Error, Result};
use crate::merge::MergeTable;
use crate::spec::Spec;
use crate::split::{Rule, Splitter};
use crate::unigram::{UnigramModel, added_tokens_fit};

/// A byte without a token: some vocabularies lack bytes that their corpus lacked.
const NO_TOKEN: u32 = u32::MAX;

/// A pipeline of our own: added tokens, normalizer, model.
pub(crate) struct Engine {
    model: Model,
    normalizer: Normal,
    raw: AddedMatcher,
    normalized: AddedMatcher,
    /// Warm caches, one taken per running encode; their number never passes the number of threads that encode.
    caches: Mutex<Vec<PieceCache>>,
}

enum Model {
    Bytes(Box<ByteBpe>),
    Unigram(Box<UnigramModel>),
}

enum Normal {
    Nothing,
    Nfc,
    Other(Box<NormalizerWrapper>),
}

struct ByteBpe {
    splitter: Splitter,
    byte_ids: [u32; 256],
    merges: MergeTable,
    /// Whole pieces that skip merging (`ignore_merges`).
    whole: Option<HashMap<Box<[u8]>, u32>>,
}

impl Engine {
    /// The fast path for a tokenizer, or none where its pipeline asks for something else.
    pub(crate) fn from_spec(spec: &Spec) -> Result<Option<Self>> {
        if spec.added.iter().any(|t| t.single_word) {
            return Ok(None);
        }
        let json = &spec.json["normalizer"];
        let (model, normal) = if let Some(bytes) = ByteBpe::from_spec(spec) {
            let Some(nfc) = normalizer(json) else { return Ok(None) };
            (Model::Bytes(Box::new(bytes)), if nfc { Normal::Nfc } else { Normal::Nothing })
        } else if let Some(unigram) = UnigramModel::from_spec(spec).filter(|_| added_tokens_fit(spec)) {
            let normal = match normalizer(json) {
                Some(false) => Normal::Nothing,
                Some(true) => Normal::Nfc,
                None => match serde_json::from_value(json.clone()) {
                    Ok(wrapper) => Normal::Other(Box::new(wrapper)),
                    Err(_) => return Ok(None),
                },
            };
            (Model::Unigram(Box::new(unigram)), normal)
        } else {
            return Ok(None);
        };
        let (normalized, raw): (Vec<_>, Vec<_>) = spec.added.iter().cloned().partition(|t| t.normalized);
        let normalized = normalized.into_iter().map(|mut token| {
            if let Some(content) = normal.apply(&token.content)? {
                token.content = content;
            }
            Ok(token)
        });
        let normalized = AddedMatcher::new(normalized.collect::<Result<Vec<_>>>()?)?;
        Ok(Some(Self { model, normalizer: normal, raw: AddedMatcher::new(raw)?, normalized, caches: Mutex::default() }))
    }

    /// Appends the ids of `text` to `out`.
    pub(crate) fn encode_into(&self, text: &str, parse_special: bool, out: &mut Vec<u32>) -> Result<()> {
        let mut cache = self.take_cache();
        let result = self.encode_with_cache(text, parse_special, &mut cache, out);
        self.give_cache(cache);
        result
    }

    pub(crate) fn take_cache(&self) -> PieceCache {
        let mut caches = self.caches.lock().unwrap_or_else(|e| e.into_inner());
        caches.pop().unwrap_or_default()
    }

    pub(crate) fn give_cache(&self, cache: PieceCache) {
        self.caches.lock().unwrap_or_else(|e| e.into_inner()).push(cache);
    }

    pub(crate) fn encode_with_cache(
        &self,
        text: &str,
        parse_special: bool,
        cache: &mut PieceCache,
        out: &mut Vec<u32>,
    ) -> Result<()> {
        self.raw.segments(text, parse_special, &mut |segment| {
            let part = match segment {
                Segment::Token(id) => {
                    out.push(id);
                    return Ok(());
                }
                Segment::Text(part) => part,
            };
            let normal = self.normalizer.apply(part)?;
            self.normalized.segments(normal.as_deref().unwrap_or(part), parse_special, &mut |inner| {
                match (inner, &self.model) {
                    (Segment::Token(id), _) => out.push(id),
                    (Segment::Text(plain), Model::Bytes(bytes)) => bytes.encode(plain, cache, out)?,
                    (Segment::Text(plain), Model::Unigram(unigram)) => unigram.encode(plain, cache, out),
                }
                Ok(())
            })
        })
    }
}

impl ByteBpe {
    fn from_spec(spec: &Spec) -> Option<Self> {
        let model = spec.model_json();
        let plain = |key: &str| matches!(model.get(key), None | Some(Value::Null)) || model[key] == "";
        let no_dropout = matches!(model.get("dropout"), None | Some(Value::Null)) || model["dropout"] == 0.0;
        let fits =
            spec.model == "BPE" && no_dropout && plain("continuing_subword_prefix") && plain("end_of_word_suffix");
        let patterns = pre_tokenizer(&spec.json["pre_tokenizer"]).filter(|_| fits)?;
        // The `tokenizers` crate drops a byte without a token, unless the vocabulary has an unknown token for it.
        let drops = plain("unk_token") && model["byte_fallback"] != true;
        let mut byte_ids = [NO_TOKEN; 256];
        for (byte, id) in byte_ids.iter_mut().enumerate() {
            match spec.vocab.get(&*BYTE_TO_CHAR[byte].encode_utf8(&mut [0; 4])) {
                Some(&found) => *id = found,
                None if drops || matches!(byte, 0xC0 | 0xC1 | 0xF5..) => {}
                None => return None,
            }
        }
        // A regex this engine cannot compile may still be one the other can.
        let rules = patterns.iter().map(|p| Rule::from_regex(p).ok()).collect::<Option<Vec<_>>>()?;
        let whole = model["ignore_merges"].as_bool().unwrap_or(false).then(|| {
            let bytes = |(token, id): (&String, &u32)| Some((crate::byte_alphabet::decode(token)?.into(), *id));
            let special: HashSet<&str> = spec.added.iter().filter(|t| t.special).map(|t| t.content.as_str()).collect();
            spec.vocab.iter().filter(|(token, _)| !special.contains(token.as_str())).filter_map(bytes).collect()
        });
        Some(Self { splitter: Splitter::new(rules), byte_ids, merges: MergeTable::new(&spec.merges), whole })
    }

    fn encode(&self, text: &str, cache: &mut PieceCache, out: &mut Vec<u32>) -> Result<()> {
        let split = self.splitter.split(text, &mut |piece| {
            self.encode_piece(piece.as_bytes(), cache, out);
            Ok(())
        });
        split.map_err(Error::Encode)
    }

    #[inline]
    fn encode_piece(&self, piece: &[u8], cache: &mut PieceCache, out: &mut Vec<u32>) {
        if !cache.lookup(piece, out) {
            let start = out.len();
            self.merge_piece(piece, cache, out);
            cache.insert(piece, &out[start..]);
        }
    }

    fn merge_piece(&self, piece: &[u8], cache: &mut PieceCache, out: &mut Vec<u32>) {
        if let Some(&id) = self.whole.as_ref().and_then(|whole| whole.get(piece)) {
            return out.push(id);
        }
        let (symbols, ranks) = cache.scratch();
        symbols.clear();
        symbols.extend(piece.iter().map(|&b| self.byte_ids[b as usize]).filter(|&id| id != NO_TOKEN));
        self.merges.merge(symbols, ranks);
        out.extend_from_slice(symbols);
    }
}

/// `Some(nfc)` for no normalizer or NFC, none for any other.
fn normalizer(json: &Value) -> Option<bool> {
    match json["type"].as_str() {
        None if json.is_null() => Some(false),
        Some("NFC") => Some(true),
        Some("Sequence") => match json["normalizers"].as_array()?.as_slice() {
            [] => Some(false),
            [only] => normalizer(only),
            _ => None,
        },
        _ => None,
    }
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// The splitting regexes of a pre-tokenizer that ends in the byte alphabet, none for any other.
pub(crate) fn pre_tokenizer(json: &Value) -> Option<Vec<String>> {
    let steps = match json["type"].as_str()? {
        "Sequence" => json["pretokenizers"].as_array()?.as_slice(),
        "ByteLevel" => std::slice::from_ref(json),
        _ => return None,
    };
    let (last, splits) = steps.split_last()?;
    let mut patterns: Vec<String> = splits.iter().map(split_pattern).collect::<Option<_>>()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    if last["use_regex"].as_bool().unwrap_or(true) {
        patterns.push(GPT2.to_string());
    }
    Some(patterns)
}

fn split_pattern(step: &Value) -> Option<String> {
    match step["type"].as_str()? {
        "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
            step["pattern"]["Regex"].as_str().map(str::to_string)
        }
        "Digits" if step["individual_digits"] == true => Some(r"\p{N}".to_string()),
        _ => None,
    }
}

impl Normal {
    /// The normalized text, or none when it is the text itself.
    fn apply(&self, text: &str) -> Result<Option<String>> {
        match self {
            Self::Nothing => Ok(None),
            Self::Nfc => compose(text),
            Self::Other(normalizer) => {
                let mut normal = NormalizedString::from(text);
                normalizer.normalize(&mut normal)?;
                Ok(Some(normal.get().to_string()))
            }
        }
    }
}

/// NFC, or none when the text is plainly composed already: no character below U+0300 ever changes or combines.
fn compose(text: &str) -> Result<Option<String>> {
    if text.chars().all(|c| c < '\u{300}') {
        return Ok(None);
    }
    let mut normal = NormalizedString::from(text);
    NFC.normalize(&mut normal)?;
    Ok(Some(normal.get().to_string()))
}
