//! The vocabulary inside a GGUF, as its metadata gives it.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::pieces::{PieceModel, PieceType, PieceVocab, template};
use crate::pre::PreTokenizer;
use crate::spec::{MAX_VOCAB, Spec};
use crate::special::Roles;
use crate::tokenizer::Tokenizer;

/// The `tokenizer.ggml.*` metadata of a GGUF; whoever reads the file fills it in.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`: `gpt2`, `llama`, `bert`, `t5` or `gemma4`.
    pub model: String,
    /// `tokenizer.ggml.pre`: llama.cpp's name of the pre-tokenizer (`gpt2` only).
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.scores`, by id (`llama`, `t5`).
    pub scores: Option<Vec<f32>>,
    /// `tokenizer.ggml.token_type`, by id: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    pub token_types: Option<Vec<u32>>,
    /// `tokenizer.ggml.merges`: pairs separated by a space, in rank order (`gpt2`, `gemma4`).
    pub merges: Option<Vec<String>>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; what llama.cpp assumes for the model where it is absent.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; likewise.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`; likewise.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.ggml.remove_extra_whitespaces` (`t5`).
    pub remove_extra_whitespaces: Option<bool>,
    /// `tokenizer.ggml.precompiled_charsmap` (`t5`).
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

const NAME: &str = "the GGUF's tokenizer";

fn fail(reason: impl Into<String>) -> Error {
    Error::malformed(NAME, reason)
}

impl Tokenizer {
    /// The tokenizer of a GGUF.
    ///
    /// Fails on a model or pre-tokenizer that is not known, on lists of unequal length, and on ids outside the
    /// vocabulary, naming the metadata key.
    pub fn from_gguf(mut vocab: GgufVocab) -> Result<Self> {
        vocab.check()?;
        vocab.assume_ids()?;
        let json = match vocab.model.as_str() {
            "gpt2" => vocab.byte_level()?,
            "llama" => vocab.pieces(PieceModel::Bpe)?,
            "t5" => vocab.pieces(PieceModel::Unigram)?,
            "bert" => vocab.wordpiece()?,
            "gemma4" => vocab.gemma()?,
            other => {
                let known = "gpt2, llama, bert, t5, gemma4";
                return Err(fail(format!("tokenizer.ggml.model {other:?} is not supported; supported: {known}")));
            }
        };
        let roles = Roles { bos: vocab.bos, eos: vocab.eos, unk: vocab.unk, pad: vocab.pad, stated: true };
        let pre = match vocab.model.as_str() {
            "gpt2" => Some(PreTokenizer::from_name(vocab.pre.as_deref().unwrap_or("default"))?),
            _ => None,
        };
        Self::build_with_pre(Spec::new(json, Path::new(NAME))?, roles, vocab.chat_template.into(), pre)
    }
}

impl GgufVocab {
    fn check(&self) -> Result<()> {
        let count = self.tokens.len();
        if count == 0 || count > MAX_VOCAB {
            return Err(fail(format!("tokenizer.ggml.tokens has {count} entries; 1 to {MAX_VOCAB} are possible")));
        }
        let lengths =
            [("scores", self.scores.as_ref().map(Vec::len)), ("token_type", self.token_types.as_ref().map(Vec::len))];
        for (key, length) in lengths {
            if let Some(length) = length.filter(|&l| l != count) {
                return Err(fail(format!("tokenizer.ggml.{key} has {length} entries for {count} tokens")));
            }
        }
        let ids = [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk), ("padding", self.pad)];
        for (key, id) in ids {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                return Err(fail(format!("tokenizer.ggml.{key}_token_id is {id}, but there are {count} tokens")));
            }
        }
        if self.scores.iter().flatten().any(|score| !score.is_finite()) {
            return Err(fail("tokenizer.ggml.scores holds a score that is not a number"));
        }
        let mut seen = std::collections::HashSet::with_capacity(count);
        match self.tokens.iter().find(|token| !seen.insert(token.as_str())) {
            Some(token) => Err(fail(format!("tokenizer.ggml.tokens holds {token:?} twice"))),
            None => Ok(()),
        }
    }

    /// llama.cpp's assumptions for ids that a file leaves out, where the token there is fit for the role.
    fn assume_ids(&mut self) -> Result<()> {
        let (bos, eos, unk) = match self.model.as_str() {
            "llama" => (Some(1), Some(2), Some(0)),
            "t5" => (None, Some(1), Some(2)),
            "bert" => {
                let place = |name: &str| self.tokens.iter().position(|t| t == name).map(|id| id as u32);
                (place("[CLS]"), place("[SEP]"), place("[UNK]"))
            }
            _ => return Ok(()),
        };
        let fit = |id: Option<u32>, kinds: &[PieceType]| -> Result<Option<u32>> {
            let Some(id) = id.filter(|&id| (id as usize) < self.tokens.len()) else { return Ok(None) };
            Ok(kinds.contains(&self.kind(id as usize)?).then_some(id))
        };
        let bos = fit(bos, &[PieceType::Control])?;
        let eos = fit(eos, &[PieceType::Control])?;
        let unk = fit(unk, &[PieceType::Unknown, PieceType::Control])?;
        self.bos = self.bos.or(bos);
        self.eos = self.eos.or(eos);
        self.unk = self.unk.or(unk);
        Ok(())
    }

    fn kind(&self, id: usize) -> Result<PieceType> {
        let Some(types) = &self.token_types else { return Ok(PieceType::Normal) };
        PieceType::from_number(u64::from(types[id]))
            .ok_or_else(|| fail(format!("tokenizer.ggml.token_type of token {id} is {}, which is no type", types[id])))
    }

    /// The ids before and after a text, given llama.cpp's habit for the model.
    fn around(&self, add_bos: bool, add_eos: bool) -> (Vec<u32>, Vec<u32>) {
        let one = |wanted: bool, id: Option<u32>| if wanted { id.into_iter().collect() } else { Vec::new() };
        (one(self.add_bos.unwrap_or(add_bos), self.bos), one(self.add_eos.unwrap_or(add_eos), self.eos))
    }

    /// Control and user-defined tokens are found in text before merging.
    fn added(&self) -> Result<Vec<Value>> {
        let mut added = Vec::new();
        for (id, content) in self.tokens.iter().enumerate() {
            let special = match self.kind(id)? {
                PieceType::Control | PieceType::Unknown => true,
                PieceType::UserDefined => false,
                _ => continue,
            };
            added.push(json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": special,
            }));
        }
        Ok(added)
    }

    fn bpe_model(&self, byte_fallback: bool, ignore_merges: bool) -> Result<Value> {
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let merges = self.merges.as_ref().ok_or_else(|| fail("tokenizer.ggml.merges is missing"))?;
        let mut pairs = Vec::with_capacity(merges.len());
        for (rank, merge) in merges.iter().enumerate() {
            // The first character may itself be a space.
            let start = merge.chars().next().map_or(0, char::len_utf8);
            let space = merge[start..].find(' ').map(|at| at + start);
            let at = space.ok_or_else(|| fail(format!("tokenizer.ggml.merges[{rank}] is not a pair")))?;
            pairs.push(json!([merge[..at], merge[at + 1..]]));
        }
        let unk = self.unk.filter(|_| byte_fallback).map(|id| &self.tokens[id as usize]);
        Ok(json!({
            "type": "BPE", "dropout": null, "unk_token": unk, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": byte_fallback, "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges, "vocab": vocab, "merges": pairs,
        }))
    }

    fn template(&self, (prefix, suffix): (Vec<u32>, Vec<u32>)) -> Result<Value> {
        template(&prefix, &suffix, |id| self.tokens.get(id as usize).map(String::as_str)).map_err(fail)
    }

    fn byte_level(&self) -> Result<Value> {
        let pre = PreTokenizer::from_name(self.pre.as_deref().unwrap_or("default"))?;
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added()?, "normalizer": null,
            "pre_tokenizer": pre.to_json(),
            "post_processor": self.template(self.around(pre.add_bos(), false))?,
            "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
            "model": self.bpe_model(false, pre.ignore_merges())?,
        }))
    }

    fn gemma(&self) -> Result<Value> {
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added()?,
            "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            "pre_tokenizer": null,
            "post_processor": self.template(self.around(true, false))?,
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
            ] },
            "model": self.bpe_model(true, false)?,
        }))
    }

    fn pieces(&self, model: PieceModel) -> Result<Value> {
        let scores = self.scores.as_ref().ok_or_else(|| fail("tokenizer.ggml.scores is missing"))?;
        let mut pieces = Vec::with_capacity(self.tokens.len());
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = if Some(id as u32) == self.unk { PieceType::Unknown } else { self.kind(id)? };
            pieces.push((token.clone(), scores[id], kind));
        }
        let unigram = model == PieceModel::Unigram;
        let (prefix, suffix) = self.around(!unigram, unigram);
        let vocab = PieceVocab {
            model,
            pieces,
            charsmap: self.precompiled_charsmap.clone().unwrap_or_default(),
            add_dummy_prefix: self.add_space_prefix.unwrap_or(true),
            remove_extra_whitespaces: self.remove_extra_whitespaces.unwrap_or(false),
            prefix,
            suffix,
        };
        vocab.to_json().map_err(fail)
    }

    /// GGUF writes `▁` before whole words and nothing before continuations; a `tokenizer.json` the reverse.
    fn wordpiece(&self) -> Result<Value> {
        let mut vocab = Map::new();
        let mut unk = None;
        for (id, token) in self.tokens.iter().enumerate() {
            let kind = self.kind(id)?;
            let written = match token.strip_prefix('▁') {
                _ if kind != PieceType::Normal => token.clone(),
                Some(word) => word.to_string(),
                None => format!("##{token}"),
            };
            if Some(id as u32) == self.unk {
                unk = Some(written.clone());
            }
            if vocab.insert(written.clone(), json!(id)).is_some() {
                return Err(fail(format!("tokenizer.ggml.tokens: {written:?} arises twice")));
            }
        }
        let unk = unk.ok_or_else(|| fail("tokenizer.ggml.unknown_token_id is missing and there is no [UNK]"))?;
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added()?,
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": true,
            },
            "pre_tokenizer": { "type": "BertPreTokenizer" },
            "post_processor": self.template(self.around(true, true))?,
            "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
            "model": {
                "type": "WordPiece", "unk_token": unk, "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab,
            },
        }))
    }
}
