//! Byte-level BPE: the alphabet is the 256 bytes.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::count::Pieces;
use super::pairs::PairTrainer;
use super::{TrainEvent, TrainOptions, special_json, template_json};
use crate::byte_alphabet::BYTE_TO_CHAR;
use crate::error::Result;

pub(crate) fn train(
    pieces: &Pieces,
    options: &TrainOptions,
    specials: &[String],
    progress: &mut dyn FnMut(TrainEvent),
) -> Result<Value> {
    let mut tokens: Vec<String> = specials.to_vec();
    // The order of the alphabet's characters, as the `tokenizers` crate numbers it.
    let alphabet: BTreeMap<char, usize> = BYTE_TO_CHAR.iter().enumerate().map(|(b, &c)| (c, b)).collect();
    let mut byte_ids = [0u32; 256];
    for (c, &byte) in &alphabet {
        // A one-character special token shares its id with the byte it looks like.
        let found = specials.iter().position(|s| s.chars().eq([*c]));
        byte_ids[byte] = found.unwrap_or(tokens.len()) as u32;
        if found.is_none() {
            tokens.push(c.to_string());
        }
    }
    let mut trainer = PairTrainer {
        pieces: pieces.iter().map(|(p, _)| p.bytes().map(|b| byte_ids[b as usize]).collect()).collect(),
        counts: pieces.iter().map(|(_, count)| *count).collect(),
        tokens,
        continuing_prefix: "",
    };
    let merges = trainer.run(options, progress);
    let tokens = &trainer.tokens;
    let vocab: Map<String, Value> = tokens.iter().enumerate().map(|(id, t)| (t.clone(), json!(id))).collect();
    let merges: Vec<Value> = merges.iter().map(|&(l, r)| json!([tokens[l as usize], tokens[r as usize]])).collect();
    let bos = specials.iter().position(|s| matches!(s.as_str(), "<s>" | "<|begin_of_text|>" | "<|endoftext|>"));
    let post = match bos.filter(|_| options.pre.add_bos()) {
        Some(id) => template_json(&[(&specials[id], id)], &[]),
        None => json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true }),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_json(specials),
        "normalizer": null,
        "pre_tokenizer": options.pre.to_json(),
        "post_processor": post,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": options.pre.ignore_merges(), "vocab": vocab, "merges": merges,
        },
    }))
}
