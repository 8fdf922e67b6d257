//! [`Table`]: the matrix of a vocabulary, some of whose rows may be trained apart from it.

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

use crate::Weight;
use crate::operand::composed;

/// Rows `[n, c]` that stand in for those of `n` tokens of a table: new tokens, say, beside a table that is frozen.
#[derive(Clone, Debug)]
pub struct ReplacedRows {
    rows: Weight,
    ids: Arc<[u32]>,
    /// Token and row, by token.
    sorted: Arc<[(u32, u32)]>,
}

impl ReplacedRows {
    /// `rows [n, c]`, the first for token `ids[0]` and so on.
    ///
    /// # Errors
    /// If there are not as many rows as ids, there are none, or an id is there twice.
    pub fn new(rows: Weight, ids: impl Into<Arc<[u32]>>) -> Result<Self> {
        let ids = ids.into();
        let mut sorted: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(&id, row)| (id, row)).collect();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            bail!("rows of a table: token {} is there twice", twice[0].0)
        }
        match rows.shape().dims() {
            &[n, _] if n == ids.len() && n > 0 => Ok(Self { rows, ids, sorted: sorted.into() }),
            dims => bail!("rows of a table: {dims:?} for {} tokens", ids.len()),
        }
    }

    /// The rows `[n, c]`.
    pub fn rows(&self) -> &Weight {
        &self.rows
    }

    /// The tokens, in the order of the rows.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The row of a token.
    pub(crate) fn row_of(&self, id: u32) -> Option<u32> {
        self.sorted.binary_search_by_key(&id, |(id, _)| *id).ok().map(|at| self.sorted[at].1)
    }
}

/// A matrix `[v, c]` with a row for each token, as an embedding or a head takes it.
#[derive(Clone, Copy, Debug)]
pub struct Table<'a> {
    /// The matrix.
    pub weight: &'a Weight,
    /// What stands in for some of its rows; these rows of the matrix count for nothing then (as long as they are finite), and get
    /// no gradient.
    pub replaced: Option<&'a ReplacedRows>,
}

impl<'a> From<&'a Weight> for Table<'a> {
    fn from(weight: &'a Weight) -> Self {
        Self { weight, replaced: None }
    }
}

impl<'a> Table<'a> {
    /// Fails where the rows do not fit the matrix.
    pub(crate) fn check(&self, op: &str) -> Result<()> {
        let Some(replaced) = self.replaced else { return Ok(()) };
        let (ws, rs) = (self.weight.shape().dims(), replaced.rows.shape().dims());
        let &[v, c] = ws else { bail!("{op}: a table is [v, c], got {ws:?}") };
        if rs[1] != c || replaced.rows.dtype() != self.weight.dtype() {
            let (ours, theirs) = (self.weight.dtype(), replaced.rows.dtype());
            bail!("{op}: rows {rs:?} {theirs:?} stand in for some of a table {ws:?} {ours:?}")
        }
        match replaced.sorted.last() {
            Some((id, _)) if *id as usize >= v => bail!("{op}: token {id} is not below the {v} rows of the table"),
            _ => Ok(()),
        }
    }

    /// The weights that may be trained.
    pub(crate) fn weights(&self) -> impl Iterator<Item = &'a Weight> {
        std::iter::once(self.weight).chain(self.replaced.map(|replaced| &replaced.rows))
    }

    /// The whole matrix, on candle's tape.
    pub(crate) fn composed(&self) -> Result<Tensor> {
        let weight = composed(self.weight)?;
        let Some(replaced) = self.replaced else { return Ok(weight) };
        let rows = composed(&replaced.rows)?;
        let ids = Tensor::new(replaced.ids(), weight.device())?;
        // Taken away first: a difference of the two would be rounded to the larger.
        weight.index_add(&ids, &weight.index_select(&ids, 0)?.neg()?, 0)?.index_add(&ids, &rows, 0)
    }
}
