//! Rows of token ids, as the tensors and masks that a forward pass takes.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use tallow_data::Batch;
use tallow_models::Shape;
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
    /// Rows `rows` of `batch` for a model of `shape`: a query sees its own document up to itself, no more than the sliding
    /// window of it, and in a prefix LM all of its prompt.
    pub(crate) fn new(batch: &Batch, rows: Range<usize>, shape: &Shape, device: &Device) -> Result<Self> {
        let (b, t) = (rows.len(), batch.context);
        let span = rows.start * t..rows.end * t;
        let (doc_start, prefix_end) = (&batch.doc_start[span.clone()], batch.prefix_end.get(span.clone()));
        let ranges = match prefix_end.filter(|_| shape.prefix_lm) {
            // No window reaches into it: one that is shorter than a row is refused.
            Some(prefix_end) => KeyRanges::prefix_documents(b, t, doc_start, prefix_end)?,
            None => KeyRanges::causal_documents(b, t, doc_start, shape.sliding_window)?,
        };
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

#[cfg(test)]
mod tests {
    use tallow_data::{ChatOptions, Loader, LoaderOptions, TokenDataset, TrainOn, Utf8Chat, prepare_chat};
    use tallow_models::parse_config;

    use super::*;

    #[test]
    fn packed_prompts_are_seen_both_ways_by_a_prefix_lm_alone() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("pairs.jsonl");
        std::fs::write(
            &file,
            "{\"prompt\": \"abc\", \"completion\": \"xy\"}\n{\"prompt\": \"d\", \"completion\": \"z\"}\n",
        )?;
        let options = ChatOptions { train_on: TrainOn::Last, ..ChatOptions::default() };
        prepare_chat(&[file], &Utf8Chat, &dir.path().join("tokens"), &options, &mut |_| {})?;
        let dataset = TokenDataset::open(&[dir.path().join("tokens/train")])?;
        let options = LoaderOptions { context_length: 12, shuffle: false, ..LoaderOptions::default() };
        let batch = Loader::new(dataset, options)?.batch(0, 1)?;

        let config = |prefix_lm: bool| {
            parse_config(
                &serde_json::json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 259, "hidden_size": 8,
                "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "prefix_lm": prefix_lm}),
            )
        };
        // BOS a b c x y, of which the first four are the prompt; BOS d z, of which two are; padding.
        let lo = [0, 0, 0, 0, 0, 0, 6, 6, 6, 9, 9, 9];
        let ranges = |prefix_lm| -> Result<KeyRanges> {
            let shape = config(prefix_lm)?.config.shape();
            Ok(KeyRanges::clone(&MicroBatch::new(&batch, 0..1, &shape, &Device::Cpu)?.ranges))
        };
        let (prefix, causal) = (ranges(true)?, ranges(false)?);
        assert_eq!((prefix.lo(), prefix.hi()), (&lo[..], &[4, 4, 4, 4, 5, 6, 8, 8, 9, 10, 11, 12][..]));
        assert_eq!((causal.lo(), causal.hi()), (&lo[..], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][..]));
        Ok(())
    }
}
