//! What a model is fed: rows, and batches of them.

/// The target where nothing is to be predicted.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// One row of `T` tokens (`T` is the loader's context length). All lists have `T` entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// Token ids; 0 where the row is padded.
    pub input_ids: Vec<u32>,
    /// The token behind each in its document, or [`IGNORE_INDEX`] behind a document's last token and in padding.
    pub targets: Vec<u32>,
    /// Distance from the first token of the same document in this row: 0 at each document's start, and 0 at the start
    /// of a row that continues a document.
    pub positions: Vec<u32>,
    /// Index in the row of the first token of the same document: token `i` may see `doc_start[i]..=i`. Padding is a
    /// document of its own.
    pub doc_start: Vec<u32>,
    /// Targets that are not [`IGNORE_INDEX`].
    pub num_targets: usize,
}

impl Row {
    pub(crate) fn clear(&mut self) {
        self.input_ids.clear();
        self.targets.clear();
        self.positions.clear();
        self.doc_start.clear();
        self.num_targets = 0;
    }

    /// Number of positions filled so far.
    pub(crate) fn len(&self) -> usize {
        self.input_ids.len()
    }

    /// Appends `tokens` of one document (with its next token, if it has one, only as a target).
    pub(crate) fn push_span(&mut self, tokens: crate::Tokens<'_>, next: crate::Tokens<'_>) {
        let (start, len) = (self.len() as u32, tokens.len());
        tokens.extend_into(&mut self.input_ids);
        next.extend_into(&mut self.targets);
        self.num_targets += next.len();
        self.targets.resize(self.input_ids.len(), IGNORE_INDEX);
        self.positions.extend(0..len as u32);
        self.doc_start.resize(self.input_ids.len(), start);
    }

    /// Fills the row up to `context` positions that nothing is learnt from.
    pub(crate) fn pad(&mut self, context: usize) {
        let start = self.len() as u32;
        self.input_ids.resize(context, 0);
        self.targets.resize(context, IGNORE_INDEX);
        self.doc_start.resize(context, start);
        self.positions.extend(0..context as u32 - start);
    }
}

/// Rows one behind another: each list is `[batch, context]`, row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub batch: usize,
    /// Tokens a row.
    pub context: usize,
    /// Token ids, see [`Row::input_ids`].
    pub input_ids: Vec<u32>,
    /// Targets, see [`Row::targets`].
    pub targets: Vec<u32>,
    /// Positions, see [`Row::positions`].
    pub positions: Vec<u32>,
    /// Starts of documents within each row, see [`Row::doc_start`].
    pub doc_start: Vec<u32>,
    /// Targets that are not [`IGNORE_INDEX`], over all rows.
    pub num_targets: usize,
}

impl Batch {
    pub(crate) fn with_capacity(rows: usize, context: usize) -> Self {
        let list = || Vec::with_capacity(rows * context);
        Self {
            batch: 0,
            context,
            input_ids: list(),
            targets: list(),
            positions: list(),
            doc_start: list(),
            num_targets: 0,
        }
    }

    pub(crate) fn push(&mut self, row: &Row) {
        self.batch += 1;
        self.input_ids.extend_from_slice(&row.input_ids);
        self.targets.extend_from_slice(&row.targets);
        self.positions.extend_from_slice(&row.positions);
        self.doc_start.extend_from_slice(&row.doc_start);
        self.num_targets += row.num_targets;
    }
}
