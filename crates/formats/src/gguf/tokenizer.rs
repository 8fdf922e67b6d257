//! `tokenizer.ggml.*`.

use super::{GgufFile, GgufValue};
use crate::{Error, Result};

/// What a GGUF file says of its tokenizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerFields {
    /// `gpt2` (byte-level BPE), `llama` (SentencePiece), `bert` (WordPiece), `t5` (Unigram)...
    pub model: String,
    /// Name of the pre-tokenizer.
    pub pre: Option<String>,
    /// Tokens by id.
    pub tokens: Vec<String>,
    /// Scores by id.
    pub scores: Option<Vec<f32>>,
    /// Types by id: 1 normal, 2 unknown, 3 control, 4 user, 5 unused, 6 byte.
    pub token_types: Option<Vec<u32>>,
    /// Merges, best first.
    pub merges: Option<Vec<String>>,
    /// Beginning of sequence.
    pub bos: Option<u32>,
    /// End of sequence.
    pub eos: Option<u32>,
    /// Unknown.
    pub unk: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// Whether `bos` is put in front.
    pub add_bos: Option<bool>,
    /// Whether `eos` is put behind.
    pub add_eos: Option<bool>,
    /// Whether a space is put in front.
    pub add_space_prefix: Option<bool>,
    /// Whether runs of spaces become one (`t5`).
    pub remove_extra_whitespaces: Option<bool>,
    /// SentencePiece's compiled normalisation (`t5`).
    pub precompiled_charsmap: Option<Vec<u8>>,
    /// Jinja.
    pub chat_template: Option<String>,
}

pub(super) fn read(file: &GgufFile) -> Result<TokenizerFields> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let wrong = |name: &str, reason: String| Error::key(file.path(), &key(name), reason);
    let list = |name: &str| file.opt_array(&key(name));
    let text = |name: &str, values: &[GgufValue]| -> Result<Vec<String>> {
        let each = values.iter().map(|v| v.as_str().map(ToOwned::to_owned));
        each.collect::<Option<_>>().ok_or_else(|| wrong(name, "holds something that is no string".into()))
    };
    let tokens = text("tokens", file.get_array(&key("tokens"))?)?;
    let of_all = |name: &str, len: usize| match len == tokens.len() {
        true => Ok(()),
        false => Err(wrong(name, format!("has {len} entries for {} tokens", tokens.len()))),
    };
    let scores = match list("scores")? {
        None => None,
        Some(values) => {
            of_all("scores", values.len())?;
            let scores = values.iter().map(GgufValue::as_f32).collect::<Option<Vec<_>>>();
            Some(scores.ok_or_else(|| wrong("scores", "holds something that is no float".into()))?)
        }
    };
    let token_types = match list("token_type")? {
        None => None,
        Some(values) => {
            of_all("token_type", values.len())?;
            let types = values.iter().map(|v| v.as_u64().and_then(|t| u32::try_from(t).ok())).collect::<Option<_>>();
            Some(types.ok_or_else(|| wrong("token_type", "holds something that is no type".into()))?)
        }
    };
    let id = |name: &str| -> Result<Option<u32>> {
        let name = format!("{name}_token_id");
        let Some(value) = file.get(&key(&name)) else { return Ok(None) };
        match value.as_u64() {
            Some(id) if (id as usize) < tokens.len() => Ok(Some(id as u32)),
            _ => Err(wrong(&name, format!("is no id of the {} tokens", tokens.len()))),
        }
    };
    let charsmap = match list("precompiled_charsmap")? {
        None => None,
        Some(values) => {
            let bytes = values.iter().map(|v| v.as_u64().and_then(|b| u8::try_from(b).ok())).collect::<Option<_>>();
            Some(bytes.ok_or_else(|| wrong("precompiled_charsmap", "holds something that is no byte".into()))?)
        }
    };
    let flag = |name: &str| file.opt_bool(&key(name));
    Ok(TokenizerFields {
        model: file.get_str(&key("model"))?.to_owned(),
        pre: file.opt_str(&key("pre"))?.map(ToOwned::to_owned),
        merges: list("merges")?.map(|values| text("merges", values)).transpose()?,
        bos: id("bos")?,
        eos: id("eos")?,
        unk: id("unknown")?,
        pad: id("padding")?,
        add_bos: flag("add_bos_token")?,
        add_eos: flag("add_eos_token")?,
        add_space_prefix: flag("add_space_prefix")?,
        remove_extra_whitespaces: flag("remove_extra_whitespaces")?,
        precompiled_charsmap: charsmap,
        chat_template: file.opt_str("tokenizer.chat_template")?.map(ToOwned::to_owned),
        tokens,
        scores,
        token_types,
    })
}
