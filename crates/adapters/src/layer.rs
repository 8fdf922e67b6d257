//! The layers that an adapter stands beside.

use std::sync::{Arc, OnceLock};

use candle_core::Tensor;
use tallow_nn::{Embedding, Error, ForwardContext, Head, HeadMatrix, Linear, LinearSpec, Lookup, Projection, Result};
use tallow_ops::{
    LoraWeights, Weight, composed_of, embedding, linear, lora_linear, merge_lora, merged_norms, residual_add,
    scale_outputs, stream_of,
};

/// `y = x W^T + b + s (x A^T) B^T`, and with magnitudes `m` DoRA's `m / |W + s B A| (x W^T + s (x A^T) B^T) + b`, where the
/// norm is a constant for the gradient (Liu et al. 2024, section 4.3). Dropout acts on what the adapter sees, on nothing else.
#[derive(Debug)]
pub(crate) struct LoraProjection {
    base: Linear,
    weight: Weight,
    lora: LoraWeights,
    magnitude: Option<Weight>,
    /// Norms, once nothing can change them any more.
    norms: OnceLock<Arc<Vec<f32>>>,
    dropout: f64,
    layer: usize,
    site: u32,
}

impl LoraProjection {
    pub(crate) fn new(
        base: Linear,
        lora: LoraWeights,
        magnitude: Option<Weight>,
        dropout: f64,
        spec: &LinearSpec,
    ) -> Result<Self> {
        let Some(weight) = base.weight().cloned() else {
            let reason = "is no plain matrix, so no adapter can stand beside it".into();
            return Err(Error::Param { name: spec.name.clone(), reason });
        };
        // Far from the numbers that models give their own places.
        let site = stream_of(&spec.name) as u32 | 1 << 31;
        Ok(Self { base, weight, lora, magnitude, norms: OnceLock::new(), dropout, layer: spec.stage, site })
    }

    fn norms(&self, magnitude: &Weight) -> Result<Arc<Vec<f32>>> {
        if let Some(norms) = self.norms.get() {
            return Ok(norms.clone());
        }
        let mut norms = merged_norms(&self.weight, &self.lora)?;
        // A row of zeros stays one, as its magnitude is zero too.
        norms.iter_mut().for_each(|norm| *norm = norm.max(f32::MIN_POSITIVE));
        let norms = Arc::new(norms);
        let trained = [magnitude, &self.lora.a, &self.lora.b].iter().any(|weight| weight.grad().is_some());
        if !trained {
            return Ok(self.norms.get_or_init(|| norms).clone());
        }
        Ok(norms)
    }
}

impl Projection for LoraProjection {
    fn forward(&self, x: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        let dropped = match cx.dropout {
            Some(_) if self.dropout > 0.0 => Some(cx.dropout(x.clone(), self.dropout, self.layer, self.site)?),
            _ => None,
        };
        let bias = self.base.bias();
        let Some(magnitude) = &self.magnitude else {
            return Ok(lora_linear(x, dropped.as_ref(), &self.weight, bias, &self.lora)?);
        };
        let y = lora_linear(x, dropped.as_ref(), &self.weight, None, &self.lora)?;
        Ok(scale_outputs(&y, magnitude, &self.norms(magnitude)?, bias)?)
    }

    fn weight(&self) -> Option<&Weight> {
        None
    }

    fn bias(&self) -> Option<&Weight> {
        self.base.bias()
    }
}

/// `y = E[id] + s A[id] B^T`, `A [vocab, r]` here.
#[derive(Debug)]
pub(crate) struct LoraEmbedding {
    base: Embedding,
    lora: LoraWeights,
}

impl LoraEmbedding {
    pub(crate) fn new(base: Embedding, lora: LoraWeights) -> Self {
        Self { base, lora }
    }
}

impl Lookup for LoraEmbedding {
    fn forward(&self, ids: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        let y = self.base.forward(ids, cx)?;
        let down = embedding(ids, &self.lora.a)?;
        let z = linear(&down, &self.lora.b, None)?;
        let z = composed_of("lora-embedding", &[&z], |z| &z[0] * self.lora.scale)?;
        Ok(residual_add(&y, &z)?)
    }

    fn weight(&self) -> &Weight {
        self.base.weight()
    }
}

/// A head's matrix with its adapter added.
#[derive(Debug)]
pub(crate) struct LoraHead {
    weight: Weight,
    lora: LoraWeights,
    merged: OnceLock<Weight>,
}

impl LoraHead {
    pub(crate) fn head(base: Head, lora: LoraWeights) -> Head {
        match base {
            Head::Plain(weight) => Head::Of(Arc::new(Self { weight, lora, merged: OnceLock::new() })),
            other => other,
        }
    }
}

impl HeadMatrix for LoraHead {
    fn weight(&self) -> Result<Weight> {
        if let Some(merged) = self.merged.get() {
            return Ok(merged.clone());
        }
        let merged = merge_lora(&self.weight, &self.lora)?;
        if [&self.lora.a, &self.lora.b].iter().any(|weight| weight.grad().is_some()) {
            return Ok(merged.into());
        }
        Ok(self.merged.get_or_init(|| Weight::frozen(merged)).clone())
    }
}
