//! SentencePiece `.model` files: a small reader of the protobuf that holds them.

use std::path::Path;

use crate::error::{Error, Result};
use crate::hf::read;
use crate::pieces::{PieceModel, PieceType, PieceVocab};
use crate::spec::{MAX_VOCAB, Spec};
use crate::special::Roles;
use crate::tokenizer::Tokenizer;

/// A field of a protobuf message.
enum Field<'b> {
    Number(u64),
    Bits32(u32),
    Bytes(&'b [u8]),
}

/// Walks the fields of one message.
struct Fields<'b>(&'b [u8]);

impl<'b> Fields<'b> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'b [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    /// The next field: `Ok(None)` at the end, `Err` when the bytes are no protobuf.
    fn next(&mut self) -> std::result::Result<Option<(u64, Field<'b>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let mut read = || {
            let key = self.varint()?;
            let field = match key & 7 {
                0 => Field::Number(self.varint()?),
                1 => Field::Bytes(self.take(8)?),
                2 => {
                    let length = usize::try_from(self.varint()?).ok()?;
                    Field::Bytes(self.take(length)?)
                }
                5 => Field::Bits32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
                _ => return None,
            };
            Some((key >> 3, field))
        };
        read().map(Some).ok_or_else(|| "truncated, or not a SentencePiece model".to_string())
    }
}

/// What a model file says.
struct Model {
    vocab: PieceVocab,
    roles: [Option<u32>; 4],
}

impl Tokenizer {
    /// Reads a SentencePiece `.model` (BPE or Unigram).
    ///
    /// The file does not say whether a model wants BOS or EOS around its text, so `encode(text, true)` adds neither;
    /// `encode_with` adds what is asked for.
    pub fn from_sentencepiece(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let model = read_model(&read(path)?).map_err(|reason| Error::malformed(path, reason))?;
        let json = model.vocab.to_json().map_err(|reason| Error::malformed(path, reason))?;
        let [unk, bos, eos, pad] = model.roles;
        let roles = Roles { bos, eos, unk, pad, stated: true };
        Self::build(Spec::new(json, path)?, roles, None)
    }
}

fn read_model(bytes: &[u8]) -> std::result::Result<Model, String> {
    let mut vocab = PieceVocab {
        model: PieceModel::Unigram,
        pieces: Vec::new(),
        charsmap: Vec::new(),
        add_dummy_prefix: true,
        remove_extra_whitespaces: true,
        prefix: Vec::new(),
        suffix: Vec::new(),
    };
    // unk, bos, eos, pad, with SentencePiece's defaults.
    let mut roles: [i64; 4] = [0, 1, 2, -1];
    let mut fields = Fields(bytes);
    while let Some(field) = fields.next()? {
        match field {
            (1, Field::Bytes(piece)) => {
                if vocab.pieces.len() >= MAX_VOCAB {
                    return Err(format!("more than {MAX_VOCAB} pieces"));
                }
                let piece = read_piece(piece).map_err(|e| format!("piece {}: {e}", vocab.pieces.len()))?;
                vocab.pieces.push(piece);
            }
            (2, Field::Bytes(trainer)) => vocab.model = read_trainer(trainer, &mut roles)?,
            (3, Field::Bytes(normalizer)) => read_normalizer(normalizer, &mut vocab)?,
            _ => {}
        }
    }
    if vocab.pieces.is_empty() {
        return Err("holds no pieces: not a SentencePiece model".to_string());
    }
    let mut seen = std::collections::HashSet::new();
    if let Some((piece, ..)) = vocab.pieces.iter().find(|(piece, ..)| !seen.insert(piece.as_str())) {
        return Err(format!("holds piece {piece:?} twice"));
    }
    let count = vocab.pieces.len() as i64;
    Ok(Model { roles: roles.map(|id| (0..count).contains(&id).then_some(id as u32)), vocab })
}

fn read_piece(bytes: &[u8]) -> std::result::Result<(String, f32, PieceType), String> {
    let (mut text, mut score, mut kind) = (String::new(), 0.0, PieceType::Normal);
    let mut fields = Fields(bytes);
    while let Some(field) = fields.next()? {
        match field {
            (1, Field::Bytes(piece)) => text = String::from_utf8(piece.to_vec()).map_err(|_| "not UTF-8")?,
            (2, Field::Bits32(bits)) => score = f32::from_bits(bits),
            (3, Field::Number(number)) => {
                kind = PieceType::from_number(number).ok_or_else(|| format!("type {number} is not known"))?;
            }
            _ => {}
        }
    }
    if text.is_empty() || !score.is_finite() {
        return Err("empty, or its score is not a number".to_string());
    }
    Ok((text, score, kind))
}

fn read_trainer(bytes: &[u8], roles: &mut [i64; 4]) -> std::result::Result<PieceModel, String> {
    let mut model = PieceModel::Unigram;
    let mut fields = Fields(bytes);
    while let Some(field) = fields.next()? {
        match field {
            (3, Field::Number(1)) => model = PieceModel::Unigram,
            (3, Field::Number(2)) => model = PieceModel::Bpe,
            (3, Field::Number(other)) => {
                return Err(format!("model type {other} (word or char) is not supported; use unigram or bpe"));
            }
            (24, Field::Number(1)) => return Err("treat_whitespace_as_suffix is not supported".to_string()),
            // Negative ids are written as 64-bit two's complement.
            (place @ 40..=43, Field::Number(id)) => roles[place as usize - 40] = id as i64,
            _ => {}
        }
    }
    Ok(model)
}

fn read_normalizer(bytes: &[u8], vocab: &mut PieceVocab) -> std::result::Result<(), String> {
    let mut fields = Fields(bytes);
    while let Some(field) = fields.next()? {
        match field {
            (2, Field::Bytes(charsmap)) => vocab.charsmap = charsmap.to_vec(),
            (3, Field::Number(flag)) => vocab.add_dummy_prefix = flag != 0,
            (4, Field::Number(flag)) => vocab.remove_extra_whitespaces = flag != 0,
            (5, Field::Number(0)) => return Err("escape_whitespaces = false is not supported".to_string()),
            _ => {}
        }
    }
    Ok(())
}
