//! SentencePiece vocabularies, from a `.model` or a GGUF, as a `tokenizer.json`.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Map, Value, json};

use crate::charsmap;

/// The type of a piece: SentencePiece and GGUF number them alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl PieceType {
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte]
            .get(number.checked_sub(1)? as usize)
            .copied()
    }
}

/// How text becomes pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceModel {
    Bpe,
    Unigram,
}

/// A SentencePiece vocabulary.
#[derive(Debug, Clone)]
pub(crate) struct PieceVocab {
    pub model: PieceModel,
    /// Text, score and type, by id.
    pub pieces: Vec<(String, f32, PieceType)>,
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_whitespaces: bool,
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
}

/// Keeps pieces that text must never become out of every best path (Unigram).
const NEVER: f64 = -1.0e6;

impl PieceVocab {
    /// The `tokenizer.json` of this vocabulary; the error is a reason.
    pub(crate) fn to_json(&self) -> Result<Value, String> {
        let byte_fallback = self.pieces.iter().any(|(_, _, kind)| *kind == PieceType::Byte);
        let unknown = self.pieces.iter().position(|(_, _, kind)| *kind == PieceType::Unknown);
        let model = match self.model {
            PieceModel::Bpe => self.bpe(byte_fallback, unknown),
            PieceModel::Unigram => self.unigram(byte_fallback, unknown),
        };
        let (normalizer, pre_tokenizer) = self.normalizer()?;
        let mut decoders = vec![json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " })];
        if byte_fallback {
            decoders.push(json!({ "type": "ByteFallback" }));
        }
        decoders.push(json!({ "type": "Fuse" }));
        if self.add_dummy_prefix {
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null,
            "added_tokens": self.added(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.template()?,
            "decoder": { "type": "Sequence", "decoders": decoders },
            "model": model,
        }))
    }

    fn added(&self) -> Vec<Value> {
        let entry = |(id, (content, _, kind)): (usize, &(String, f32, PieceType))| {
            let special = matches!(kind, PieceType::Control | PieceType::Unknown);
            (special || *kind == PieceType::UserDefined).then(|| {
                json!({
                    "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": special,
                })
            })
        };
        self.pieces.iter().enumerate().filter_map(entry).collect()
    }

    fn normalizer(&self) -> Result<(Value, Value), String> {
        let mut steps = Vec::new();
        if !self.charsmap.is_empty() {
            charsmap::check(&self.charsmap)?;
            let table = crate::base64::encode(&self.charsmap);
            steps.push(json!({ "type": "Precompiled", "precompiled_charsmap": table }));
        }
        if self.remove_extra_whitespaces {
            steps.push(json!({ "type": "Replace", "pattern": { "Regex": "^ +| +$" }, "content": "" }));
            steps.push(json!({ "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " }));
        }
        let mut pre_tokenizer = Value::Null;
        match self.model {
            PieceModel::Bpe => {
                if self.add_dummy_prefix {
                    steps.push(json!({ "type": "Prepend", "prepend": "▁" }));
                }
                steps.push(json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" }));
            }
            PieceModel::Unigram => {
                let scheme = if self.add_dummy_prefix { "always" } else { "never" };
                pre_tokenizer =
                    json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true });
            }
        }
        let normalizer =
            if steps.is_empty() { Value::Null } else { json!({ "type": "Sequence", "normalizers": steps }) };
        Ok((normalizer, pre_tokenizer))
    }

    fn bpe(&self, byte_fallback: bool, unknown: Option<usize>) -> Value {
        let vocab: Map<String, Value> =
            self.pieces.iter().enumerate().map(|(id, (piece, ..))| (piece.clone(), json!(id))).collect();
        json!({
            "type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &self.pieces[id].0),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": byte_fallback, "ignore_merges": false, "vocab": vocab, "merges": self.merges(),
        })
    }

    /// SentencePiece keeps no merges: any two pieces whose join is a piece merge, the best score first.
    fn merges(&self) -> Vec<Value> {
        let joinable = |kind: PieceType| matches!(kind, PieceType::Normal | PieceType::UserDefined | PieceType::Unused);
        let known: HashMap<&str, u32> = (0u32..)
            .zip(&self.pieces)
            .filter(|(_, (_, _, kind))| joinable(*kind))
            .map(|(id, (piece, ..))| (piece.as_str(), id))
            .collect();
        let mut merges: Vec<(f32, u32, u32, u32)> = Vec::new();
        for (id, (piece, score, kind)) in (0u32..).zip(&self.pieces) {
            if !joinable(*kind) {
                continue;
            }
            for (at, _) in piece.char_indices().skip(1) {
                if let (Some(&left), Some(&right)) = (known.get(&piece[..at]), known.get(&piece[at..])) {
                    merges.push((*score, id, left, right));
                }
            }
        }
        merges.sort_by(|a, b| {
            b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then_with(|| (a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)))
        });
        let text = |id: u32| self.pieces[id as usize].0.as_str();
        merges.into_iter().map(|(_, _, left, right)| json!([text(left), text(right)])).collect()
    }

    fn unigram(&self, byte_fallback: bool, unknown: Option<usize>) -> Value {
        let score = |score: f32, kind: PieceType| match kind {
            PieceType::Normal | PieceType::UserDefined => f64::from(score),
            // The unknown's own score counts for nothing but must not lower the least.
            PieceType::Unknown => 0.0,
            _ => NEVER,
        };
        let vocab: Vec<Value> = self.pieces.iter().map(|(piece, s, kind)| json!([piece, score(*s, *kind)])).collect();
        json!({ "type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": byte_fallback })
    }

    fn template(&self) -> Result<Value, String> {
        template(&self.prefix, &self.suffix, |id| self.pieces.get(id as usize).map(|(piece, ..)| piece.as_str()))
    }
}

/// A post-processor that puts tokens, by id, before and after the text; null for none.
pub(crate) fn template<'t>(
    prefix: &[u32],
    suffix: &[u32],
    token: impl Fn(u32) -> Option<&'t str>,
) -> Result<Value, String> {
    if prefix.is_empty() && suffix.is_empty() {
        return Ok(Value::Null);
    }
    let named = |ids: &[u32]| -> Result<Vec<(&'t str, usize)>, String> {
        ids.iter()
            .map(|&id| Ok((token(id).ok_or(format!("special token id {id} is no token"))?, id as usize)))
            .collect()
    };
    Ok(crate::train::template_json(&named(prefix)?, &named(suffix)?))
}
