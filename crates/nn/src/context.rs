//! What a forward pass is told besides its input.

use std::sync::Arc;

use candle_core::Tensor;
use tallow_ops::{DropoutKey, KeyRanges, dropout};

use crate::{KvCache, Result};

/// Numbers of the places in a block where dropout acts, so that each draws its own mask.
pub mod site {
    /// After the embeddings.
    pub const EMBEDDING: u32 = 0;
    /// On the attention's output, before the residual addition.
    pub const ATTENTION: u32 = 1;
    /// On the feed-forward's output, before the residual addition.
    pub const MLP: u32 = 2;
}

/// Which dropout masks a pass draws. The same context gives the same masks, so a recomputed block sees what it saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutContext {
    /// The run's seed.
    pub seed: u64,
    /// The micro-batch, counted over the whole run and unique over ranks.
    pub step: u64,
}

/// What a forward pass is told besides its input: where each token stands, what it may see, and the cache.
pub struct ForwardContext<'a> {
    /// Position of each token within its document, `b * t` values, row by row.
    pub positions: Arc<Vec<u32>>,
    /// Range of keys that each query sees.
    pub ranges: Arc<KeyRanges>,
    /// Keys and values of earlier tokens; `None` in training.
    pub cache: Option<&'a mut dyn KvCache>,
    /// Dropout masks; `None` outside training.
    pub dropout: Option<DropoutContext>,
    /// Weight of each adapter by its index, where the model holds any: one of weight 0 is skipped. `None` for those that the
    /// model was built with. What a cache holds was computed with some weights and is good for no others.
    pub adapters: Option<Arc<[f32]>>,
}

impl ForwardContext<'_> {
    /// A pass over whole rows: no cache, no dropout.
    pub fn whole(positions: Arc<Vec<u32>>, ranges: Arc<KeyRanges>) -> Self {
        Self { positions, ranges, cache: None, dropout: None, adapters: None }
    }

    /// Plain causal rows of `t` tokens each, positions from 0.
    ///
    /// # Errors
    /// If `b` or `t` is zero.
    pub fn causal(b: usize, t: usize) -> Result<Self> {
        let positions = (0..b).flat_map(|_| 0..t as u32).collect();
        Ok(Self::whole(Arc::new(positions), Arc::new(KeyRanges::causal(b, t, t)?)))
    }

    /// Applies dropout with probability `p` where this pass trains and `p > 0`.
    ///
    /// # Errors
    /// If `p` is not in `[0, 1)`.
    pub fn dropout(&self, x: Tensor, p: f64, layer: usize, site: u32) -> Result<Tensor> {
        match self.dropout {
            Some(DropoutContext { seed, step }) if p > 0.0 => {
                Ok(dropout(&x, p, DropoutKey { seed, step, layer: layer as u32, site, offset: 0 })?)
            }
            _ => Ok(x),
        }
    }
}
