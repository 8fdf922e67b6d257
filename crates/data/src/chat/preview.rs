//! A look at what is learnt.

use crate::{Result, TokenDataset};

/// Document `index` of `dataset` as runs of ids that count the same: (ids, weight), 0 for what is not learnt. All runs
/// together are the document; neighbours differ in weight. For a caller that decodes and colours them.
///
/// # Errors
/// If there is no such document, or its shard holds a token outside the vocabulary.
///
/// ```
/// use tallow_data::{ChatOptions, TokenDataset, Utf8Chat, prepare_chat, preview};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let file = dir.path().join("chats.jsonl");
/// std::fs::write(&file, r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}"#)?;
/// let out = dir.path().join("tokens");
/// prepare_chat(&[file], &Utf8Chat, &out, &ChatOptions::default(), &mut |_| {})?;
///
/// let runs = preview(&TokenDataset::open(&[out.join("train")])?, 0)?;
/// let weights: Vec<f32> = runs.iter().map(|(_, weight)| *weight).collect();
/// assert_eq!(weights, [0.0, 1.0]);
/// assert_eq!(runs[1].0, [u32::from(b'H'), u32::from(b'o'), Utf8Chat::END]);
/// # Ok(())
/// # }
/// ```
pub fn preview(dataset: &TokenDataset, index: u64) -> Result<Vec<(Vec<u32>, f32)>> {
    let (tokens, spans) = (dataset.document(index)?, dataset.spans(index)?);
    let mut runs: Vec<(Vec<u32>, f32)> = vec![];
    let mut spans = spans.iter().peekable();
    for (i, id) in tokens.iter().enumerate() {
        while spans.next_if(|s| s.tokens.end as usize <= i).is_some() {}
        let weight = spans.peek().filter(|s| s.tokens.start as usize <= i).map_or(0.0, |s| s.weight);
        match runs.last_mut() {
            Some((run, w)) if *w == weight => run.push(id),
            _ => runs.push((vec![id], weight)),
        }
    }
    Ok(runs)
}
