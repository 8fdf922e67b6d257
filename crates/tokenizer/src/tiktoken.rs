//! tiktoken rank files: a line `base64 rank` a token, the encoding's regex and special tokens by name.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::byte_alphabet;
use crate::error::{Error, Result};
use crate::hf::read;
use crate::pre::split_json;
use crate::spec::{MAX_VOCAB, Spec};
use crate::special::Roles;
use crate::tokenizer::Tokenizer;

/// A token longer than this is no token: cutting it everywhere would cost its square.
const MAX_TOKEN: usize = 1 << 10;

const R50K: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const CL100K: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

struct Encoding {
    name: &'static str,
    pattern: &'static str,
    special: &'static [(&'static str, u32)],
}

const END: &str = "<|endoftext|>";

static ENCODINGS: &[Encoding] = &[
    Encoding { name: "r50k_base", pattern: R50K, special: &[(END, 50256)] },
    Encoding { name: "p50k_base", pattern: R50K, special: &[(END, 50256)] },
    Encoding {
        name: "p50k_edit",
        pattern: R50K,
        special: &[(END, 50256), ("<|fim_prefix|>", 50281), ("<|fim_middle|>", 50282), ("<|fim_suffix|>", 50283)],
    },
    Encoding {
        name: "cl100k_base",
        pattern: CL100K,
        special: &[
            (END, 100_257),
            ("<|fim_prefix|>", 100_258),
            ("<|fim_middle|>", 100_259),
            ("<|fim_suffix|>", 100_260),
            ("<|endofprompt|>", 100_276),
        ],
    },
    Encoding { name: "o200k_base", pattern: O200K, special: &[(END, 199_999), ("<|endofprompt|>", 200_018)] },
];

fn encoding(name: &str) -> Result<&'static Encoding> {
    ENCODINGS.iter().find(|e| e.name == name).ok_or_else(|| Error::UnknownEncoding {
        name: name.to_string(),
        known: ENCODINGS.iter().map(|e| e.name).collect::<Vec<_>>().join(", "),
    })
}

impl Tokenizer {
    /// Reads a tiktoken rank file as the encoding of that name: `r50k_base`, `p50k_base`, `p50k_edit`, `cl100k_base`
    /// or `o200k_base`. [`from_path`](Self::from_path) takes the name from the file's.
    pub fn from_tiktoken(path: impl AsRef<Path>, encoding_name: &str) -> Result<Self> {
        let path = path.as_ref();
        let encoding = encoding(encoding_name)?;
        let ranks = read_ranks(&read(path)?, path)?;
        let spec = Spec::new(to_json(&ranks, encoding), path)?;
        let end = spec.added.iter().find(|t| t.content == END).map(|t| t.id);
        Self::build(spec, Roles { bos: end, eos: end, stated: true, ..Roles::default() }, None)
    }
}

fn read_ranks(bytes: &[u8], path: &Path) -> Result<Vec<(Vec<u8>, u32)>> {
    let fail = |line: usize, reason: &str| Error::malformed(path, format!("line {}: {reason}", line + 1));
    let text = std::str::from_utf8(bytes).map_err(|_| Error::malformed(path, "not text: not a tiktoken rank file"))?;
    let mut ranks = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty()) {
        let (token, rank) = line.split_once(' ').ok_or_else(|| fail(number, "is not `base64 rank`"))?;
        let token = crate::base64::decode(token).ok_or_else(|| fail(number, "the token is not base64"))?;
        let rank: u32 = rank.parse().map_err(|_| fail(number, "the rank is not a whole number"))?;
        if token.is_empty() || token.len() > MAX_TOKEN || rank as usize >= MAX_VOCAB {
            return Err(fail(number, "an empty or overlong token, or a rank past every vocabulary"));
        }
        ranks.push((token, rank));
    }
    if ranks.is_empty() {
        return Err(Error::malformed(path, "holds no ranks"));
    }
    ranks.sort_by_key(|(_, rank)| *rank);
    Ok(ranks)
}

fn to_json(ranks: &[(Vec<u8>, u32)], encoding: &Encoding) -> Value {
    let by_bytes: HashMap<&[u8], u32> = ranks.iter().map(|(token, rank)| (token.as_slice(), *rank)).collect();
    let mut merges = Vec::new();
    for (token, _) in ranks {
        // Every way to join two tokens into this one merges at this one's rank.
        let mut ways: Vec<(u32, u32, usize)> = (1..token.len())
            .filter_map(|at| Some((*by_bytes.get(&token[..at])?, *by_bytes.get(&token[at..])?, at)))
            .collect();
        ways.sort_unstable();
        let halves = |at: usize| json!([byte_alphabet::encode(&token[..at]), byte_alphabet::encode(&token[at..])]);
        merges.extend(ways.into_iter().map(|(_, _, at)| halves(at)));
    }
    let vocab: Map<String, Value> = ranks.iter().map(|(t, rank)| (byte_alphabet::encode(t), json!(rank))).collect();
    let added: Vec<Value> = encoding
        .special
        .iter()
        .map(|(content, id)| {
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            split_json(encoding.pattern),
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        ] },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": merges,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_rank_files_name_the_line() {
        for (text, needle) in [
            ("", "no ranks"),
            ("YQ==", "line 1"),
            ("YQ== 0\n!!!! 1", "line 2"),
            ("YQ== x", "whole number"),
            ("YQ== 4294967295", "past every"),
            (" 0", "empty"),
        ] {
            let error = read_ranks(text.as_bytes(), Path::new("x.tiktoken")).unwrap_err().to_string();
            assert!(error.contains(needle) && error.contains("x.tiktoken"), "{text:?}: {error}");
        }
        assert!(read_ranks(&[0xFF, 0xFE], Path::new("x")).is_err());
    }
}
