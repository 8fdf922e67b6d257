//! WordPiece as BERT uses it: pairs are merged like BPE's, tokens inside a word carry `##`, and encoding takes the
//! longest token that fits.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use super::count::Pieces;
use super::pairs::PairTrainer;
use super::{TrainEvent, TrainOptions, special_json, template_json};
use crate::error::Result;

pub(crate) fn train(
    pieces: &Pieces,
    options: &TrainOptions,
    specials: &[String],
    progress: &mut dyn FnMut(TrainEvent),
) -> Result<Value> {
    let mut tokens: Vec<String> = specials.to_vec();
    let alphabet = alphabet(pieces, options, specials.len());
    tokens.extend(alphabet.into_iter().filter(|t| !specials.contains(t)));
    let ids: HashMap<String, u32> = (0u32..).zip(&tokens).map(|(id, t)| (t.clone(), id)).collect();
    let (mut split, mut counts) = (Vec::new(), Vec::new());
    for (piece, count) in pieces {
        let symbols = units(piece).map(|unit| ids.get(&unit).copied()).collect::<Option<Vec<_>>>();
        // A word with a character outside the alphabet encodes as unknown, so it teaches nothing.
        if let Some(symbols) = symbols {
            split.push(symbols);
            counts.push(*count);
        }
    }
    let mut trainer = PairTrainer { pieces: split, counts, tokens, continuing_prefix: "##" };
    trainer.run(options, progress);
    let vocab: Map<String, Value> = trainer.tokens.iter().enumerate().map(|(i, t)| (t.clone(), json!(i))).collect();
    let place = |name: &'static str| specials.iter().position(|s| s == name).map(|id| (name, id));
    let (cls, sep) = (place("[CLS]"), place("[SEP]"));
    let post = match (cls, sep) {
        (None, None) => Value::Null,
        _ => template_json(cls.as_slice(), sep.as_slice()),
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_json(specials),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
            "lowercase": true,
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": post,
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocab,
        },
    }))
}

/// A word's characters, all but the first with `##`.
fn units(word: &str) -> impl Iterator<Item = String> {
    word.chars().enumerate().map(|(at, c)| if at == 0 { c.to_string() } else { format!("##{c}") })
}

/// The single characters to keep: the commonest, in byte order, at most half of what room there is.
fn alphabet(pieces: &Pieces, options: &TrainOptions, specials: usize) -> Vec<String> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for (piece, count) in pieces {
        units(piece).for_each(|unit| *counts.entry(unit).or_default() += count);
    }
    let room = options.vocab_size - specials;
    let most = options.limit_alphabet.unwrap_or(room).min(room);
    let mut ranked: Vec<(String, u64)> = counts.into_iter().collect();
    ranked.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    ranked.truncate(most);
    let mut kept: Vec<String> = ranked.into_iter().map(|(unit, _)| unit).collect();
    kept.sort_unstable();
    kept
}
