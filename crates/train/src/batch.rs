//! Rows of token ids, as the tensors and masks that a forward pass takes.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tallow_data::Batch;
use tallow_nn::ForwardContext;
use tallow_ops::{KeyRanges, Targets};

use crate::Result;

/// Some rows of a batch on a device.
pub(crate) struct MicroBatch {
    /// `[b, t]` u32.
    pub(crate) ids: Tensor,
    /// `[b, t]` u32, `IGNORE_INDEX` where nothing is predicted.
    targets: Tensor,
    /// How much each counts; `None` for 1.
    weights: Option<Vec<f32>>,
    positions: Arc<Vec<u32>>,
    ranges: Arc<KeyRanges>,
}

impl MicroBatch {
    /// Rows `rows` of `batch`; a query sees its own document up to itself, and no more than `window` tokens of it.
    pub(crate) fn new(batch: &Batch, rows: Range<usize>, window: Option<usize>, device: &Device) -> Result<Self> {
        let (b, t) = (rows.len(), batch.context);
        let span = rows.start * t..rows.end * t;
        let ranges = KeyRanges::causal_documents(b, t, &batch.doc_start[span.clone()], window)?;
        Ok(Self {
            ids: Tensor::from_slice(&batch.input_ids[span.clone()], (b, t), device)?,
            targets: Tensor::from_slice(&batch.targets[span.clone()], (b, t), device)?,
            weights: (!batch.weights.is_empty()).then(|| batch.weights[span.clone()].to_vec()),
            positions: Arc::new(batch.positions[span].to_vec()),
            ranges: Arc::new(ranges),
        })
    }

    pub(crate) fn targets(&self) -> Targets<'_> {
        Targets { ids: &self.targets, weights: self.weights.as_deref() }
    }

    pub(crate) fn context(&self) -> ForwardContext<'static> {
        ForwardContext::whole(self.positions.clone(), self.ranges.clone())
    }
}
