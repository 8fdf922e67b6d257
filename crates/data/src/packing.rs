//! Which examples share a row.

use std::collections::BTreeMap;

use crate::loader::key;
use crate::permutation::Permutation;
use crate::{Error, Result, TokenDataset};

/// Purpose of the permutations of examples of one length.
const EXAMPLES: u64 = 3;

/// Rows of whole examples. An example of `n` tokens takes `n - 1` places: its last token is only a target.
///
/// What is fixed for all epochs is how lengths are put together: that takes one pass over the lengths and makes every epoch
/// of the same number of rows. Which examples of a length go where is a permutation, anew for each epoch: so a row needs
/// nothing but its number, and nothing is kept for an epoch.
#[derive(Debug)]
pub(crate) struct ExampleRows {
    /// Examples, in classes of equal length if they are permuted.
    examples: Vec<u64>,
    /// Where in `examples` each class begins, and its end; empty if they are not permuted.
    classes: Vec<usize>,
    /// Indices into `examples`, row after row.
    slots: Vec<usize>,
    /// Slots up to and with each row.
    row_ends: Vec<usize>,
    /// Places that hold a token, in all rows.
    filled: u64,
}

impl ExampleRows {
    /// One example a row.
    pub(crate) fn padded(dataset: &TokenDataset, context: usize) -> Result<Self> {
        let places = places(dataset, context)?;
        let n = places.len();
        Ok(Self {
            examples: (0..n as u64).collect(),
            classes: vec![],
            slots: (0..n).collect(),
            row_ends: (1..=n).collect(),
            filled: places.iter().sum(),
        })
    }

    /// Several a row, in their order: a row ends before the example that no longer fits.
    pub(crate) fn in_order(dataset: &TokenDataset, context: usize) -> Result<Self> {
        let places = places(dataset, context)?;
        let (mut row_ends, mut used) = (vec![], 0);
        for (i, len) in places.iter().enumerate() {
            if used + len > context as u64 {
                row_ends.push(i);
                used = 0;
            }
            used += len;
        }
        row_ends.push(places.len());
        Ok(Self {
            examples: (0..places.len() as u64).collect(),
            classes: vec![],
            slots: (0..places.len()).collect(),
            row_ends,
            filled: places.iter().sum(),
        })
    }

    /// Several a row, packed best-fit decreasing: from the longest to the shortest, each into the fullest row that it
    /// fits into.
    pub(crate) fn best_fit(dataset: &TokenDataset, context: usize) -> Result<Self> {
        let places = places(dataset, context)?;
        let mut examples: Vec<u64> = (0..places.len() as u64).collect();
        examples.sort_by_key(|&i| std::cmp::Reverse(places[i as usize]));
        let mut classes = vec![0];
        for same in examples.chunk_by(|&a, &b| places[a as usize] == places[b as usize]) {
            classes.push(classes.last().copied().unwrap_or(0) + same.len());
        }
        let mut rows: Vec<Vec<usize>> = vec![];
        // Rows by the places left in them.
        let mut open: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (slot, &example) in examples.iter().enumerate() {
            let len = places[example as usize];
            let fullest = open.range(len..).next().map(|(&left, _)| left);
            let row = fullest.and_then(|left| {
                let of_it = open.get_mut(&left)?;
                let row = of_it.pop();
                if of_it.is_empty() {
                    open.remove(&left);
                }
                row.map(|row| (row, left))
            });
            let (row, left) = row.unwrap_or((rows.len(), context as u64));
            if row == rows.len() {
                rows.push(vec![]);
            }
            rows[row].push(slot);
            if left > len {
                open.entry(left - len).or_default().push(row);
            }
        }
        let row_ends = rows.iter().scan(0, |end, row| {
            *end += row.len();
            Some(*end)
        });
        let row_ends = row_ends.collect();
        Ok(Self { examples, classes, slots: rows.concat(), row_ends, filled: places.iter().sum() })
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> u64 {
        self.row_ends.len() as u64
    }

    /// Places that hold a token, in all rows.
    pub(crate) fn filled(&self) -> u64 {
        self.filled
    }

    /// The examples of row `r` in an epoch, as document indices.
    pub(crate) fn row(&self, r: u64, seed: u64, epoch: u64) -> impl Iterator<Item = u64> + '_ {
        let r = r as usize;
        let first = if r == 0 { 0 } else { self.row_ends[r - 1] };
        self.slots[first..self.row_ends[r]].iter().map(move |&slot| self.examples[self.permuted(slot, seed, epoch)])
    }

    fn permuted(&self, slot: usize, seed: u64, epoch: u64) -> usize {
        let class = self.classes.partition_point(|&begin| begin <= slot);
        match (class.checked_sub(1).and_then(|c| self.classes.get(c)), self.classes.get(class)) {
            (Some(&begin), Some(&end)) if end - begin > 1 => {
                let purpose = (begin as u64) << 8 | EXAMPLES;
                let permutation = Permutation::new((end - begin) as u64, key(seed, epoch, purpose));
                begin + permutation.at((slot - begin) as u64) as usize
            }
            _ => slot,
        }
    }
}

/// Places that each example takes.
fn places(dataset: &TokenDataset, context: usize) -> Result<Vec<u64>> {
    let n = dataset.num_documents();
    let places = (0..n).map(|i| Ok(dataset.document_len(i)?.saturating_sub(1))).collect::<Result<Vec<_>>>()?;
    let examples = places.iter().filter(|&&len| len > context as u64).count() as u64;
    match places.iter().enumerate().max_by_key(|&(_, len)| len) {
        Some((document, &len)) if examples > 0 => Err(Error::LongExamples {
            examples,
            context,
            document: document as u64,
            longest: len + 1,
            needed: len,
            limit: context + 1,
        }),
        _ => Ok(places),
    }
}
