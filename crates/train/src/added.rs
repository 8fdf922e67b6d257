//! How often the training data holds the tokens that a run adds.

use std::collections::HashMap;

use tallow_data::TokenDataset;
use tallow_tokenizer::Tokenizer;

use crate::Result;
use crate::config::TokenizerSection;

/// The most tokens that one line names.
const NAMED: usize = 20;

/// A line with the count of each added token, and a warning of those that `train` does not hold at all: most often they are not
/// written in the data as they are in the run file.
pub(crate) fn counted(
    section: &TokenizerSection,
    tokenizer: Option<&Tokenizer>,
    train: &TokenDataset,
) -> Result<Vec<String>> {
    let names = section.add_special_tokens.iter().chain(&section.add_tokens);
    let ids: Vec<(u32, &str)> = names.filter_map(|name| Some((tokenizer?.token_to_id(name)?, name.as_str()))).collect();
    if ids.is_empty() {
        return Ok(vec![]);
    }
    let mut counts: HashMap<u32, u64> = ids.iter().map(|(id, _)| (*id, 0)).collect();
    for document in 0..train.num_documents() {
        for id in train.document(document)?.iter() {
            if let Some(count) = counts.get_mut(&id) {
                *count += 1;
            }
        }
    }
    let count = |id: &u32| counts.get(id).copied().unwrap_or(0);
    let list = |tokens: Vec<String>| match tokens.len() {
        n if n > NAMED => format!("{} and {} more", tokens[..NAMED].join(", "), n - NAMED),
        _ => tokens.join(", "),
    };
    let held = |(id, name): &(u32, &str)| Some(count(id)).filter(|&n| n > 0).map(|n| format!("{name} {n} times"));
    let held: Vec<String> = ids.iter().filter_map(held).map(|text| text.replace(" 1 times", " once")).collect();
    let none: Vec<String> = ids.iter().filter(|(id, _)| count(id) == 0).map(|(_, name)| (*name).to_owned()).collect();
    let mut lines = vec![];
    if !held.is_empty() {
        lines.push(format!("note: added tokens in data.train: {}", list(held)));
    }
    if !none.is_empty() {
        let of = |tokens: &[String]| tokens.iter().any(|token| none.contains(token));
        let keys = [
            ("tokenizer.add_tokens", of(&section.add_tokens)),
            ("tokenizer.add_special_tokens", of(&section.add_special_tokens)),
        ];
        let keys: Vec<&str> = keys.into_iter().filter_map(|(key, named)| named.then_some(key)).collect();
        let way_out =
            format!("nothing teaches the model to use them; are they written there as in {}?", keys.join(" and "));
        lines.push(format!("warning: data.train holds none of the added tokens {}: {way_out}", list(none)));
    }
    Ok(lines)
}
