//! Multi-head attention with grouped keys and values.
//!
//! Shapes: b batch, t time, h query heads, g key/value heads, d head size, c channels.

use std::sync::Arc;

use candle_core::Tensor;
use tallow_ops::{RopeLayout, RopeTable, attention, reshape, rope};

use crate::{ForwardContext, Result};

/// Sizes of an attention layer.
#[derive(Clone, Debug)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor on the logits, `1 / sqrt(head_dim)` as a rule.
    pub scale: f64,
}

/// `softmax(rope(q) rope(k)^T * scale) v`, over the range of keys that the context gives each query.
#[derive(Clone, Debug)]
pub struct Attention {
    /// Sizes.
    pub config: AttentionConfig,
    /// Rotary table; `None` where positions are learned.
    pub rope: Option<Arc<RopeTable>>,
    /// Index of the layer, for the cache.
    pub layer: usize,
}

impl Attention {
    /// `q [b, t, h, d]`, `k, v [b, t, g, d]`, views with contiguous channels as well -> `[b, t, h * d]`.
    ///
    /// # Errors
    /// If the shapes do not fit, a position is past the rotary table, or the cache is full.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        let (b, t, _, _) = q.dims4()?;
        let AttentionConfig { num_heads: h, head_dim: d, scale, .. } = self.config;
        let (mut q_bthd, mut k_btgd, mut v_btgd) = (q.clone(), k.clone(), v.clone());
        if let Some(table) = &self.rope {
            q_bthd = rope(&q_bthd, table, &cx.positions, RopeLayout::Half)?;
            k_btgd = rope(&k_btgd, table, &cx.positions, RopeLayout::Half)?;
        }
        if let Some(cache) = cx.cache.as_deref_mut() {
            (k_btgd, v_btgd) = cache.append(self.layer, &k_btgd, &v_btgd)?;
        }
        let y_bthd = attention(&q_bthd, &k_btgd, &v_btgd, &cx.ranges, scale)?;
        Ok(reshape(&y_bthd, (b, t, h * d))?)
    }
}
