//! What a model is fed: rows, and batches of them.

use crate::Span;

/// The target where nothing is to be predicted.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// One row of `T` tokens (`T` is the loader's context length). All lists have `T` entries, `weights` perhaps none.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Of examples: index in the row of the first token of the same example that is learnt, so that what is in front of it
    /// is given (a prompt); the example's start if nothing is. Empty for plain text.
    pub prefix_end: Vec<u32>,
    /// How much each target counts, 0 where it is [`IGNORE_INDEX`]. Empty if all that are not count 1.
    pub weights: Vec<f32>,
    /// Targets that are not [`IGNORE_INDEX`].
    pub num_targets: usize,
    /// Sum of the weights of these targets: what a loss is normalised by.
    pub weight_sum: f64,
}

impl Row {
    pub(crate) fn clear(&mut self) {
        self.input_ids.clear();
        self.targets.clear();
        self.positions.clear();
        self.doc_start.clear();
        self.prefix_end.clear();
        self.weights.clear();
        self.num_targets = 0;
        self.weight_sum = 0.0;
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
        self.weight_sum += next.len() as f64;
        self.targets.resize(self.input_ids.len(), IGNORE_INDEX);
        self.positions.extend(0..len as u32);
        self.doc_start.resize(self.input_ids.len(), start);
    }

    /// Appends an example: all of its tokens but the last are inputs, those in `spans` are targets.
    pub(crate) fn push_example(&mut self, tokens: crate::Tokens<'_>, spans: impl Iterator<Item = Span>) {
        let Some(inputs) = tokens.len().checked_sub(1).and_then(|n| tokens.slice(0..n)) else { return };
        let start = self.len();
        inputs.extend_into(&mut self.input_ids);
        self.targets.resize(self.len(), IGNORE_INDEX);
        self.positions.extend(0..inputs.len() as u32);
        self.doc_start.resize(self.len(), start as u32);
        if !self.weights.is_empty() {
            self.weights.resize(self.len(), 0.0);
        }
        let mut prefix_end = start;
        for Span { tokens: span, weight } in spans.filter(|s| s.weight > 0.0) {
            let span = span.start.max(1) as usize..span.end as usize;
            let Some(learnt) = tokens.slice(span.clone()) else { continue };
            // Token `i` is the target of input `i - 1`.
            let places = start + span.start - 1..start + span.end - 1;
            if prefix_end == start {
                prefix_end = (start + span.start).min(self.len());
            }
            if weight != 1.0 && self.weights.is_empty() {
                self.weights = ones(&self.targets);
            }
            for (target, id) in self.targets[places.clone()].iter_mut().zip(learnt.iter()) {
                *target = id;
            }
            if !self.weights.is_empty() {
                self.weights[places].fill(weight);
            }
            self.num_targets += learnt.len();
            self.weight_sum += f64::from(weight) * learnt.len() as f64;
        }
        self.prefix_end.resize(self.len(), prefix_end as u32);
    }

    /// Fills the row up to `context` positions that nothing is learnt from.
    pub(crate) fn pad(&mut self, context: usize) {
        let start = self.len() as u32;
        self.input_ids.resize(context, 0);
        self.targets.resize(context, IGNORE_INDEX);
        self.doc_start.resize(context, start);
        self.positions.extend(0..context as u32 - start);
        if !self.prefix_end.is_empty() {
            self.prefix_end.resize(context, start);
        }
        if !self.weights.is_empty() {
            self.weights.resize(context, 0.0);
        }
    }
}

/// The weights of targets that all count 1.
fn ones(targets: &[u32]) -> Vec<f32> {
    targets.iter().map(|&t| if t == IGNORE_INDEX { 0.0 } else { 1.0 }).collect()
}

/// Rows one behind another: each list is `[batch, context]`, row-major; `weights` perhaps empty.
#[derive(Clone, Debug, Default, PartialEq)]
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
    /// Ends of prefixes, see [`Row::prefix_end`]. Empty for plain text.
    pub prefix_end: Vec<u32>,
    /// Weights of targets, see [`Row::weights`]. Empty if every target of every row counts 1.
    pub weights: Vec<f32>,
    /// Targets that are not [`IGNORE_INDEX`], over all rows.
    pub num_targets: usize,
    /// Sum of the weights of these targets: what a loss is normalised by. `num_targets` where `weights` is empty.
    pub weight_sum: f64,
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
            prefix_end: vec![],
            weights: vec![],
            num_targets: 0,
            weight_sum: 0.0,
        }
    }

    pub(crate) fn push(&mut self, row: &Row) {
        if self.weights.is_empty() && !row.weights.is_empty() {
            self.weights = ones(&self.targets);
        }
        if !row.weights.is_empty() {
            self.weights.extend_from_slice(&row.weights);
        } else if !self.weights.is_empty() {
            self.weights.extend(ones(&row.targets));
        }
        self.batch += 1;
        self.input_ids.extend_from_slice(&row.input_ids);
        self.targets.extend_from_slice(&row.targets);
        self.positions.extend_from_slice(&row.positions);
        self.doc_start.extend_from_slice(&row.doc_start);
        self.prefix_end.extend_from_slice(&row.prefix_end);
        self.num_targets += row.num_targets;
        self.weight_sum += row.weight_sum;
    }
}
