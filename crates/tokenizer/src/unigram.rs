//! The fast path for Unigram: the most probable cut of each word, remembered. Unlike the `tokenizers` crate, a token
//! that stands for something else (`</s>`, `<0x41>`) is never read out of plain text.

use std::collections::HashSet;

use serde_json::Value;

use crate::cache::PieceCache;
use crate::decode::byte_token;
use crate::merge::MixMap;
use crate::spec::Spec;

/// What an unknown character costs, below the least score of the vocabulary (SentencePiece's constant).
const UNKNOWN_PENALTY: f64 = 10.0;
const MARK: &str = "▁";

/// A Unigram model over words that begin with `▁`.
pub(crate) struct UnigramModel {
    pieces: MixMap<Box<[u8]>, (u32, f64)>,
    longest: usize,
    unknown: Option<u32>,
    unknown_score: f64,
    /// The byte tokens, if unknown characters fall back to them.
    bytes: Option<[u32; 256]>,
    add_prefix: bool,
}

impl UnigramModel {
    /// The model of a tokenizer, or none where its pipeline asks for something else.
    pub(crate) fn from_spec(spec: &Spec) -> Option<Self> {
        let pre = &spec.json["pre_tokenizer"];
        let split = pre.get("split").is_none_or(|s| s == true);
        if spec.model != "Unigram" || pre["type"] != "Metaspace" || pre["replacement"] != MARK || !split {
            return None;
        }
        let add_prefix = match pre["prepend_scheme"].as_str() {
            Some("always") => true,
            Some("never") => false,
            _ => return None,
        };
        let model = spec.model_json();
        let unknown = model["unk_id"].as_u64().map(|id| id as u32);
        let special: HashSet<&str> = spec.added.iter().filter(|t| t.special).map(|t| t.content.as_str()).collect();
        let byte_fallback = model["byte_fallback"] == true;
        let (mut pieces, mut longest, mut least) = (MixMap::default(), 0, f64::INFINITY);
        for entry in model["vocab"].as_array()? {
            let (piece, score) = (entry[0].as_str()?, entry[1].as_f64()?);
            let id = *spec.vocab.get(piece)?;
            let stands_for_other = special.contains(piece) || (byte_fallback && byte_token(piece).is_some());
            if piece.is_empty() || stands_for_other || Some(id) == unknown {
                continue;
            }
            least = least.min(score);
            longest = longest.max(piece.len());
            pieces.insert(piece.as_bytes().into(), (id, score));
        }
        Some(Self {
            pieces,
            longest,
            unknown,
            unknown_score: if least.is_finite() { least } else { 0.0 } - UNKNOWN_PENALTY,
            bytes: if byte_fallback { byte_ids(spec) } else { None },
            add_prefix,
        })
    }

    /// Appends the ids of normalized text.
    pub(crate) fn encode(&self, text: &str, cache: &mut PieceCache, out: &mut Vec<u32>) {
        let mut marked = text.replace(' ', MARK);
        if self.add_prefix && !marked.is_empty() && !marked.starts_with(MARK) {
            marked.insert_str(0, MARK);
        }
        let mut start = 0;
        let cuts = marked.match_indices(MARK).map(|(at, _)| at).filter(|&at| at > 0);
        for end in cuts.chain([marked.len()]) {
            let word = &marked[start..end];
            start = end;
            if !word.is_empty() && !cache.lookup(word.as_bytes(), out) {
                let before = out.len();
                self.best_cut(word, out);
                cache.insert(word.as_bytes(), &out[before..]);
            }
        }
    }

    /// Viterbi over the word: `best[i]` is the best score of the first `i` bytes and where its last piece begins.
    fn best_cut(&self, word: &str, out: &mut Vec<u32>) {
        let bytes = word.as_bytes();
        let mut best: Vec<(f64, usize, Option<u32>)> = vec![(f64::NEG_INFINITY, 0, None); bytes.len() + 1];
        best[0].0 = 0.0;
        for (start, c) in word.char_indices() {
            let so_far = best[start].0;
            let mut alone = false;
            for length in c.len_utf8()..=self.longest.min(bytes.len() - start) {
                let end = start + length;
                if !word.is_char_boundary(end) {
                    continue;
                }
                if let Some(&(id, score)) = self.pieces.get(&bytes[start..end]) {
                    if so_far + score > best[end].0 {
                        best[end] = (so_far + score, start, Some(id));
                    }
                    alone |= length == c.len_utf8();
                }
            }
            let end = start + c.len_utf8();
            if !alone && so_far + self.unknown_score > best[end].0 {
                best[end] = (so_far + self.unknown_score, start, None);
            }
        }
        let mut cut = Vec::new();
        let mut end = bytes.len();
        while end > 0 {
            let (_, start, id) = best[end];
            cut.push((start, end, id));
            end = start;
        }
        self.write(bytes, cut.into_iter().rev(), out);
    }

    /// Neighbouring unknown characters become one unknown token, or their bytes.
    fn write(&self, bytes: &[u8], cut: impl Iterator<Item = (usize, usize, Option<u32>)>, out: &mut Vec<u32>) {
        let mut after_unknown = false;
        for (start, end, id) in cut {
            match (id, &self.bytes) {
                (Some(id), _) => out.push(id),
                (None, Some(table)) => out.extend(bytes[start..end].iter().map(|&b| table[b as usize])),
                (None, None) if after_unknown => {}
                (None, None) => out.extend(self.unknown),
            }
            after_unknown = id.is_none();
        }
    }
}

fn byte_ids(spec: &Spec) -> Option<[u32; 256]> {
    let mut table = [0; 256];
    for (byte, id) in table.iter_mut().enumerate() {
        *id = *spec.vocab.get(&format!("<0x{byte:02X}>"))?;
    }
    Some(table)
}

/// Whether the normalizer and added tokens of `spec` leave this path sound: tokens must be found in the raw text.
pub(crate) fn added_tokens_fit(spec: &Spec) -> bool {
    spec.json["normalizer"] == Value::Null || spec.added.iter().all(|t| !t.normalized)
}
