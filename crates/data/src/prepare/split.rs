//! Which documents are held out.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::hash::content_hash;
use crate::prepare::{ChatOptions, PrepareOptions};
use crate::read::{self, Item, OnMalformed};
use crate::{Error, Result};

/// How documents are divided, decided before anything is encoded.
#[derive(Debug, PartialEq)]
pub(super) enum SplitPlan {
    /// Nothing is held out.
    None,
    /// Documents whose hash is below this.
    Below(u64),
    /// Documents of these hashes: few documents, of which chance would have taken too much or nothing.
    Chosen(HashSet<u64>),
    /// The document of this hash ends, for training, near the byte `keep`; the rest is held out.
    Tail { hash: u64, keep: usize },
}

/// A document, as far as the choice goes.
#[derive(Clone, Copy)]
struct Seen {
    hash: u64,
    bytes: u64,
}

impl SplitPlan {
    /// Reads up to some thousand documents to see whether chance alone would do.
    pub(super) fn choose(inputs: &[PathBuf], options: &PrepareOptions) -> Result<Self> {
        let fraction = options.valid_fraction;
        if fraction == 0.0 {
            return Ok(Self::None);
        }
        let enough = enough(fraction);
        // Whatever is malformed is reported by the reading proper.
        let lenient = read::ReadOptions { on_malformed: OnMalformed::Skip, ..options.read_options() };
        let (mut seen, mut total) = (vec![], 0);
        for document in read::documents(inputs, lenient)? {
            let text = document?.text;
            total += text.len();
            seen.push(Seen { hash: content_hash(&text), bytes: text.len() as u64 });
            if seen.len() >= enough {
                return Ok(Self::Below(threshold(fraction)));
            }
        }
        match Self::of_few(seen, fraction) {
            // Without any document at all the reading proper has more to say.
            Self::None if total > 0 => {
                let reason = format!("{total} bytes of text are too few to hold any out; add text, or set it to 0");
                Err(Error::option("valid_fraction", fraction, reason))
            }
            plan => Ok(plan),
        }
    }

    /// The same for examples, which are never cut.
    pub(super) fn choose_examples(inputs: &[PathBuf], options: &ChatOptions) -> Result<Self> {
        let fraction = options.valid_fraction;
        if fraction == 0.0 {
            return Ok(Self::None);
        }
        let enough = enough(fraction);
        let lenient = read::ExampleOptions { on_malformed: OnMalformed::Skip, ..options.example_options() };
        let mut seen = vec![];
        for example in read::examples(inputs, lenient)? {
            let content = example?.content;
            seen.push(Seen { hash: content.hash(), bytes: content.text_bytes().max(1) as u64 });
            if seen.len() >= enough {
                return Ok(Self::Below(threshold(fraction)));
            }
        }
        match Self::of_few(seen.clone(), fraction) {
            Self::None | Self::Tail { .. } => Self::one_of(&seen, fraction),
            plan => Ok(plan),
        }
    }

    /// The smallest of a few examples, all of them larger than what was to be held out.
    fn one_of(seen: &[Seen], fraction: f64) -> Result<Self> {
        let smallest = seen.iter().min_by_key(|s| (s.bytes, s.hash));
        match smallest {
            Some(s) if seen.iter().any(|other| other.hash != s.hash) => Ok(Self::Chosen(HashSet::from([s.hash]))),
            // Without any example at all the reading proper has more to say.
            None => Ok(Self::None),
            Some(_) => {
                let reason = "one example cannot be divided; add examples, or set it to 0";
                Err(Error::option("valid_fraction", fraction, reason))
            }
        }
    }

    /// Whether an example of this hash is held out.
    pub(super) fn holds_out(&self, hash: u64) -> bool {
        match self {
            Self::None | Self::Tail { .. } => false,
            Self::Below(limit) => hash < *limit,
            Self::Chosen(hashes) => hashes.contains(&hash),
        }
    }

    fn of_few(mut seen: Vec<Seen>, fraction: f64) -> Self {
        // In the order of their hashes, so that the order of files does not matter.
        seen.sort_by_key(|s| (s.hash, s.bytes));
        let total: u64 = seen.iter().map(|s| s.bytes).sum();
        let wanted = total as f64 * fraction;
        let below = threshold(fraction);
        let by_chance: u64 = seen.iter().take_while(|s| s.hash < below).map(|s| s.bytes).sum();
        if (wanted * 0.5..=wanted * 2.0).contains(&(by_chance as f64)) && by_chance < total {
            return Self::Below(below);
        }
        let mut chosen = HashSet::new();
        let mut bytes = 0;
        for same in seen.chunk_by(|a, b| a.hash == b.hash) {
            let more: u64 = same.iter().map(|s| s.bytes).sum();
            if ((bytes + more) as f64) < wanted * 1.5 {
                chosen.insert(same[0].hash);
                bytes += more;
            }
        }
        if bytes as f64 >= wanted * 0.5 {
            return Self::Chosen(chosen);
        }
        match seen.iter().max_by_key(|s| (s.bytes, s.hash)) {
            Some(largest) if largest.bytes > 1 => {
                let tail = (wanted as u64).clamp(1, largest.bytes / 2);
                Self::Tail { hash: largest.hash, keep: (largest.bytes - tail) as usize }
            }
            _ => Self::None,
        }
    }

    /// The parts of a document and whether each is held out.
    pub(super) fn divide(&self, text: String) -> [Option<(String, bool)>; 2] {
        match self {
            Self::None => [Some((text, false)), None],
            Self::Below(_) | Self::Chosen(_) => {
                let valid = self.holds_out(content_hash(&text));
                [Some((text, valid)), None]
            }
            Self::Tail { hash, keep } if content_hash(&text) == *hash => {
                let mut head = text;
                let tail = head.split_off(cut_near(&head, *keep));
                [Some((head, false)), Some((tail, true)).filter(|(t, _)| !t.is_empty())]
            }
            Self::Tail { .. } => [Some((text, false)), None],
        }
    }

    /// The rule in words.
    pub(super) fn describe(&self, fraction: f64) -> String {
        match self {
            Self::None => "nothing is held out".to_owned(),
            Self::Below(_) => format!("whole documents by a hash of their text, {fraction} of them held out"),
            Self::Chosen(hashes) => format!(
                "{} whole documents held out, chosen in the order of their hashes to make up {fraction} of the text \
                 (there are too few documents to leave it to the hash alone)",
                hashes.len()
            ),
            Self::Tail { .. } => format!(
                "the tail of the largest document held out, {fraction} of the text, cut at a line end \
                 (there are too few documents to hold out whole ones)"
            ),
        }
    }
}

/// With this many documents chance holds out 64 of them or more on average: never none, never far too many.
fn enough(fraction: f64) -> usize {
    ((64.0 / fraction) as usize).clamp(4096, 1 << 20)
}

fn threshold(fraction: f64) -> u64 {
    (fraction * 2f64.powi(64)) as u64
}

/// A place near byte `keep` to cut: behind a line end, else behind a space, else between characters.
fn cut_near(text: &str, keep: usize) -> usize {
    let mut keep = keep.min(text.len());
    while !text.is_char_boundary(keep) {
        keep -= 1;
    }
    let at = |found: Option<usize>| found.map(|i| i + 1).filter(|&i| i < text.len());
    let line = at(text[..keep].rfind('\n')).filter(|&i| i >= keep / 2);
    let later = at(text[keep..].find('\n').map(|i| keep + i));
    let space = at(text[..keep].rfind(' ')).filter(|&i| i >= keep / 2);
    line.or(later).or(space).unwrap_or(keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sizes: &[u64]) -> Vec<Seen> {
        let hash = |i: usize| crate::permutation::mix(i as u64);
        sizes.iter().enumerate().map(|(i, &bytes)| Seen { hash: hash(i), bytes }).collect()
    }

    #[test]
    fn one_document_gives_its_tail() {
        let SplitPlan::Tail { keep, .. } = SplitPlan::of_few(seen(&[1000]), 0.1) else { panic!("not its tail") };
        assert_eq!(keep, 900);
    }

    #[test]
    fn the_share_is_near_whatever_the_sizes() {
        for sizes in [vec![100; 50], (1..200).collect(), vec![10_000, 1, 1, 1, 1], vec![5; 3000], vec![3; 2]] {
            let total: u64 = sizes.iter().sum();
            let all = seen(&sizes);
            let held: u64 = match SplitPlan::of_few(all.clone(), 0.05) {
                SplitPlan::None => 0,
                SplitPlan::Below(limit) => all.iter().filter(|s| s.hash < limit).map(|s| s.bytes).sum(),
                SplitPlan::Chosen(set) => all.iter().filter(|s| set.contains(&s.hash)).map(|s| s.bytes).sum(),
                SplitPlan::Tail { keep, .. } => sizes.iter().max().map_or(0, |m| m - keep as u64),
            };
            let share = held as f64 / total as f64;
            assert!(share > 0.02 && share < 0.2, "{share} of {} documents", sizes.len());
        }
    }

    #[test]
    fn order_does_not_matter() {
        let sizes: Vec<u64> = (1..40).map(|i| i * i % 77 + 1).collect();
        let mut reversed = seen(&sizes);
        reversed.reverse();
        assert_eq!(SplitPlan::of_few(seen(&sizes), 0.1), SplitPlan::of_few(reversed, 0.1));
    }

    #[test]
    fn cuts_at_a_line_end_or_a_space_or_a_character() {
        assert_eq!(cut_near("aaaa\nbbbb\ncccc", 12), 10);
        assert_eq!(cut_near("aaaaaaaaaaaa\nb", 6), 13);
        assert_eq!(cut_near("aaaa bbbb", 7), 5);
        assert_eq!(cut_near("ééé", 3), 2);
    }
}
