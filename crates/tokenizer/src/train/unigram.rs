//! Unigram: the `tokenizers` crate's expectation maximisation, made independent of hashing and threads.

use serde_json::{Value, json};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};

use super::count::Pieces;
use super::{TrainEvent, TrainOptions, special_json, template_json};
use crate::error::{Error, Result};

/// Longer pieces are left out of training (not of encoding): their likelihood underflows.
const MAX_PIECE_CHARS: usize = 256;
/// The score of tokens that plain text must never become: special tokens and byte tokens. Every printable ASCII
/// character is in the vocabulary, so there is always a better way to write the text `</s>` or `<0x41>`.
const NEVER: f64 = -1.0e6;
/// The step between the scores that the trainer gives to characters without one of their own.
const PENALTY_STEP: f64 = 0.0001;

pub(crate) fn train(
    pieces: &Pieces,
    options: &TrainOptions,
    specials: &[String],
    progress: &mut dyn FnMut(TrainEvent),
) -> Result<Value> {
    let room = options.vocab_size - specials.len() - 256;
    let learnt = learn(pieces, options, room)?;
    if learnt.len() > room {
        return Err(Error::BadOption {
            option: "vocab_size",
            value: options.vocab_size.to_string(),
            reason: format!(
                "the corpus alone has {} characters; give at least {} or a smaller limit_alphabet",
                learnt.len(),
                learnt.len() + specials.len() + 256
            ),
        });
    }
    let mut vocab: Vec<Value> = specials.iter().map(|s| json!([s, NEVER])).collect();
    vocab.extend((0..=255u8).map(|byte| json!([format!("<0x{byte:02X}>"), NEVER])));
    vocab.extend(learnt.iter().filter(|(p, _)| !specials.contains(p)).map(|(piece, score)| json!([piece, score])));
    progress(TrainEvent::Merging { done: vocab.len(), total: options.vocab_size });
    let place = |name: &'static str| specials.iter().position(|s| s == name).map(|id| (name, id));
    let post = match place("</s>") {
        Some(eos) => template_json(&[], &[eos]),
        None => Value::Null,
    };
    let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": special_json(specials),
        "normalizer": null,
        "pre_tokenizer": metaspace,
        "post_processor": post,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
            { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
        ] },
        "model": {
            "type": "Unigram", "unk_id": specials.iter().position(|s| s == "<unk>"), "vocab": vocab,
            "byte_fallback": true,
        },
    }))
}

/// The learnt pieces with their scores (natural logarithms of probability), best first.
fn learn(pieces: &Pieces, options: &TrainOptions, room: usize) -> Result<Vec<(String, f64)>> {
    let fail = |e: String| Error::Encode(format!("unigram training: {e}"));
    let kept = kept_characters(pieces, options);
    let total: u64 = pieces.iter().map(|(_, count)| *count).sum();
    // The trainer counts in 32 bits.
    let scale = total / (1 << 30) + 1;
    let sentences: Vec<(String, u32)> = pieces
        .iter()
        .filter(|(p, _)| p.chars().count() <= MAX_PIECE_CHARS)
        .flat_map(|(p, count)| {
            let count = (count / scale).max(1) as u32;
            p.split(|c| !kept.contains(&c)).map(move |part| (part.to_string(), count))
        })
        .filter(|(part, _)| !part.is_empty())
        .collect();
    if sentences.is_empty() {
        return Err(Error::EmptyCorpus);
    }
    let trainer = UnigramTrainer::builder()
        .vocab_size(room as u32)
        .show_progress(false)
        .initial_alphabet((' '..='~').filter(|c| *c != ' ').chain(['▁']).collect())
        .max_piece_length(options.max_token_length.unwrap_or(16))
        .special_tokens(Vec::new())
        .build()
        .map_err(|e| fail(e.to_string()))?;
    // One thread: sums of floats must not depend on how the work was cut.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().map_err(|e| fail(e.to_string()))?;
    let mut model = Unigram::default();
    pool.install(|| trainer.do_train(sentences, &mut model)).map_err(|e| fail(e.to_string()))?;
    Ok(in_fixed_order(model.iter().cloned().collect()))
}

/// The characters to learn: printable ASCII and the commonest others, by count then code point.
fn kept_characters(pieces: &Pieces, options: &TrainOptions) -> std::collections::HashSet<char> {
    let mut counts: std::collections::BTreeMap<char, u64> = std::collections::BTreeMap::new();
    for (piece, count) in pieces {
        piece.chars().filter(|c| *c != '\0').for_each(|c| *counts.entry(c).or_default() += count);
    }
    let mut ranked: Vec<(char, u64)> = counts.into_iter().collect();
    ranked.sort_by_key(|&(c, count)| (std::cmp::Reverse(count), c));
    ranked.truncate(options.limit_alphabet.unwrap_or(usize::MAX));
    ranked.into_iter().map(|(c, _)| c).chain(' '..='~').chain(['▁']).collect()
}

/// Undoes the one place where the trainer's hashing shows: characters without a score of their own get the lowest
/// score and small steps above it, in hash order. They are dealt out again in code point order.
fn in_fixed_order(mut pieces: Vec<(String, f64)>) -> Vec<(String, f64)> {
    let lowest = pieces.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    let stepped = |score: f64| {
        let steps = (score - lowest) / PENALTY_STEP;
        (steps - steps.round()).abs() < 1e-6 && steps < pieces.len() as f64
    };
    let mut at: Vec<usize> =
        (0..pieces.len()).filter(|&i| pieces[i].0.chars().count() == 1 && stepped(pieces[i].1)).collect();
    at.sort_by(|&a, &b| pieces[a].0.cmp(&pieces[b].0));
    let mut scores: Vec<f64> = at.iter().map(|&i| pieces[i].1).collect();
    scores.sort_by(f64::total_cmp);
    for (index, score) in at.into_iter().zip(scores) {
        pieces[index].1 = score;
    }
    pieces.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    pieces
}
