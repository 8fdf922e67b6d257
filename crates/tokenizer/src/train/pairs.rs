//! The merge loop that BPE and WordPiece share: join the commonest adjacent pair, again and again.
//!
//! Ties go to the pair of smaller ids, so the result is a function of the counts alone. Only the pieces that hold the
//! merged pair are touched, and stale queue entries are recognised when they come up.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::{TrainEvent, TrainOptions};
use crate::merge::MixMap;

/// Pieces as symbols, with their counts, and the vocabulary as it grows.
pub(crate) struct PairTrainer {
    /// Each piece's symbols.
    pub pieces: Vec<Vec<u32>>,
    /// How often each piece occurs.
    pub counts: Vec<u64>,
    /// The written form of each token, by id.
    pub tokens: Vec<String>,
    /// What the right half's written form loses when joined (`##`, or nothing).
    pub continuing_prefix: &'static str,
}

type Pair = (u32, u32);

/// Counts of every adjacent pair, and the pieces that may hold it.
#[derive(Default)]
struct PairIndex {
    counts: MixMap<u64, i64>,
    places: MixMap<u64, Vec<u32>>,
}

fn key((left, right): Pair) -> u64 {
    u64::from(left) << 32 | u64::from(right)
}

impl PairIndex {
    fn add(&mut self, pair: Pair, count: i64, piece: u32) {
        *self.counts.entry(key(pair)).or_default() += count;
        if count > 0 {
            let places = self.places.entry(key(pair)).or_default();
            if places.last() != Some(&piece) {
                places.push(piece);
            }
        }
    }

    fn count(&self, pair: Pair) -> u64 {
        self.counts.get(&key(pair)).map_or(0, |&count| count.max(0) as u64)
    }
}

impl PairTrainer {
    /// Merges until the vocabulary is full or no pair is common enough. Returns the merges in rank order.
    pub(crate) fn run(&mut self, options: &TrainOptions, progress: &mut dyn FnMut(TrainEvent)) -> Vec<Pair> {
        let mut ids: HashMap<String, u32> = (0u32..).zip(&self.tokens).map(|(id, t)| (t.clone(), id)).collect();
        let mut index = PairIndex::default();
        for (piece, symbols) in self.pieces.iter().enumerate() {
            for pair in symbols.windows(2) {
                index.add((pair[0], pair[1]), self.counts[piece] as i64, piece as u32);
            }
        }
        let entry = |(&pair, &count): (&u64, &i64)| (count.max(0) as u64, Reverse(((pair >> 32) as u32, pair as u32)));
        let mut queue: BinaryHeap<(u64, Reverse<Pair>)> = index.counts.iter().map(entry).collect();
        let least = options.min_frequency.max(1);
        let mut merges = Vec::new();
        while self.tokens.len() < options.vocab_size {
            let Some((count, Reverse(pair))) = queue.pop() else { break };
            let now = index.count(pair);
            if now != count {
                // Counts only fall between a push and its pop; requeue at the true place.
                if now > 0 {
                    queue.push((now, Reverse(pair)));
                }
                continue;
            }
            if count < least {
                break;
            }
            let joined = self.joined(pair);
            if options.max_token_length.is_some_and(|most| self.written_length(&joined) > most) {
                continue;
            }
            let merged = *ids.entry(joined.clone()).or_insert(self.tokens.len() as u32);
            if merged as usize == self.tokens.len() {
                self.tokens.push(joined);
                if self.tokens.len().is_multiple_of(256) {
                    progress(TrainEvent::Merging { done: self.tokens.len(), total: options.vocab_size });
                }
            }
            merges.push(pair);
            self.apply(pair, merged, &mut index, &mut queue);
        }
        progress(TrainEvent::Merging { done: self.tokens.len(), total: options.vocab_size });
        merges
    }

    fn joined(&self, (left, right): Pair) -> String {
        let right = &self.tokens[right as usize];
        format!("{}{}", self.tokens[left as usize], right.strip_prefix(self.continuing_prefix).unwrap_or(right))
    }

    /// The bytes of text a written token stands for: one a character in the byte alphabet.
    fn written_length(&self, written: &str) -> usize {
        if self.continuing_prefix.is_empty() {
            written.chars().count()
        } else {
            written.strip_prefix(self.continuing_prefix).unwrap_or(written).len()
        }
    }

    fn apply(&mut self, pair: Pair, merged: u32, index: &mut PairIndex, queue: &mut BinaryHeap<(u64, Reverse<Pair>)>) {
        let mut fresh: Vec<Pair> = Vec::new();
        let mut places = index.places.remove(&key(pair)).unwrap_or_default();
        places.sort_unstable();
        places.dedup();
        for piece in places {
            let count = self.counts[piece as usize] as i64;
            let symbols = &mut self.pieces[piece as usize];
            let mut at = 0;
            while at + 1 < symbols.len() {
                if (symbols[at], symbols[at + 1]) != pair {
                    at += 1;
                    continue;
                }
                if at > 0 {
                    index.add((symbols[at - 1], pair.0), -count, piece);
                    index.add((symbols[at - 1], merged), count, piece);
                    fresh.push((symbols[at - 1], merged));
                }
                if let Some(&after) = symbols.get(at + 2) {
                    index.add((pair.1, after), -count, piece);
                    index.add((merged, after), count, piece);
                    fresh.push((merged, after));
                }
                symbols[at] = merged;
                symbols.remove(at + 1);
                at += 1;
            }
        }
        index.counts.remove(&key(pair));
        fresh.sort_unstable();
        fresh.dedup();
        for pair in fresh {
            let count = index.count(pair);
            if count > 0 {
                queue.push((count, Reverse(pair)));
            }
        }
    }
}
