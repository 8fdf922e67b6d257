//! The layers that an adapter stands beside.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use candle_core::{DType, Tensor};
use tallow_nn::{Embedding, Error, ForwardContext, Head, HeadMatrix, Linear, LinearSpec, Lookup, Projection, Result};
use tallow_ops::{
    LoraWeights, Weight, composed_of, embedding, linear, lora_linear_sum, merge_lora, merged_norms, residual_add,
    scale_outputs, stream_of,
};

/// The adapters beside one matrix, each with its index among those that the model holds.
#[derive(Debug)]
pub(crate) struct Beside {
    pub(crate) loras: Vec<(usize, LoraWeights)>,
    /// Weights where a pass names none.
    pub(crate) weights: Arc<[f32]>,
}

impl Beside {
    /// Those whose weight in this pass is not zero, their factors times that.
    fn active(&self, adapters: Option<&[f32]>) -> Result<Vec<LoraWeights>> {
        let weights = adapters.unwrap_or(&self.weights);
        if weights.len() != self.weights.len() || weights.iter().any(|weight| !weight.is_finite()) {
            let (held, given) = (self.weights.len(), weights.len());
            let reason = format!("{weights:?} are {given}: the model holds {held}, each with a finite weight");
            return Err(Error::Param { name: "ForwardContext::adapters".into(), reason });
        }
        let scaled = |(index, lora): &(usize, LoraWeights)| {
            let scale = lora.scale * f64::from(weights[*index]);
            (scale != 0.0).then(|| LoraWeights { scale, ..lora.clone() })
        };
        Ok(self.loras.iter().filter_map(scaled).collect())
    }

    fn trained(&self) -> bool {
        self.loras.iter().any(|(_, lora)| lora.a.grad().is_some() || lora.b.grad().is_some())
    }
}

/// `y = x W^T + b + sum_i w_i s_i (x A_i^T) B_i^T`, and with magnitudes `m` DoRA's `m / |W + s B A| (x W^T + s (x A^T) B^T) + b`, where the
/// norm is a constant for the gradient (Liu et al. 2024, section 4.3). Dropout acts on what the adapter sees, on nothing else.
#[derive(Debug)]
pub(crate) struct LoraProjection {
    base: Linear,
    weight: Weight,
    beside: Beside,
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
        beside: Beside,
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
        Ok(Self { base, weight, beside, magnitude, norms: OnceLock::new(), dropout, layer: spec.stage, site })
    }

    fn norms(&self, magnitude: &Weight, lora: &LoraWeights) -> Result<Arc<Vec<f32>>> {
        if let Some(norms) = self.norms.get() {
            return Ok(norms.clone());
        }
        let mut norms = merged_norms(&self.weight, lora)?;
        // A row of zeros stays one, as its magnitude is zero too.
        norms.iter_mut().for_each(|norm| *norm = norm.max(f32::MIN_POSITIVE));
        let norms = Arc::new(norms);
        if magnitude.grad().is_none() && !self.beside.trained() {
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
        let active = self.beside.active(cx.adapters.as_deref())?;
        let (Some(magnitude), [lora]) = (&self.magnitude, active.as_slice()) else {
            return Ok(lora_linear_sum(x, dropped.as_ref(), &self.weight, bias, &active)?);
        };
        if self.beside.loras.iter().all(|(_, whole)| whole.scale != lora.scale) {
            let reason = "an adapter with magnitudes (DoRA) is no sum: its weight can be 1 or 0".into();
            return Err(Error::Param { name: "ForwardContext::adapters".into(), reason });
        }
        let y = lora_linear_sum(x, dropped.as_ref(), &self.weight, None, &active)?;
        Ok(scale_outputs(&y, magnitude, &self.norms(magnitude, lora)?, bias)?)
    }

    fn weight(&self) -> Option<&Weight> {
        None
    }

    fn bias(&self) -> Option<&Weight> {
        self.base.bias()
    }
}

/// `y = E[id] + sum_i w_i s_i A_i[id] B_i^T`, `A [vocab, r]` here.
#[derive(Debug)]
pub(crate) struct LoraEmbedding {
    base: Embedding,
    beside: Beside,
}

impl LoraEmbedding {
    pub(crate) fn new(base: Embedding, beside: Beside) -> Self {
        Self { base, beside }
    }
}

impl Lookup for LoraEmbedding {
    fn forward(&self, ids: &Tensor, cx: &ForwardContext) -> Result<Tensor> {
        let mut y = self.base.forward(ids, cx)?;
        for lora in self.beside.active(cx.adapters.as_deref())? {
            let down = embedding(ids, &lora.a)?;
            let z = linear(&down, &lora.b, None)?;
            let z = composed_of("lora-embedding", &[&z], |z| &z[0] * lora.scale)?;
            y = residual_add(&y, &z)?;
        }
        Ok(y)
    }

    fn weight(&self) -> &Weight {
        self.base.weight()
    }
}

/// A head's matrix with its adapters added.
#[derive(Debug)]
pub(crate) struct LoraHead {
    weight: Weight,
    beside: Beside,
    /// The last one made and the factors that it was made with, where nothing is trained.
    merged: Mutex<Option<(Vec<f64>, Weight)>>,
}

impl LoraHead {
    pub(crate) fn head(base: Head, beside: Beside) -> Head {
        match base {
            Head::Plain(weight) => Head::Of(Arc::new(Self { weight, beside, merged: Mutex::new(None) })),
            other => other,
        }
    }
}

impl HeadMatrix for LoraHead {
    fn dtype(&self) -> DType {
        self.weight.dtype()
    }

    fn weight(&self, adapters: Option<&[f32]>) -> Result<Weight> {
        let active = self.beside.active(adapters)?;
        if active.is_empty() {
            return Ok(self.weight.clone());
        }
        match (self.beside.trained(), active.as_slice()) {
            (false, _) => {}
            (true, [lora]) => return Ok(merge_lora(&self.weight, lora)?.into()),
            (true, _) => {
                let reason = "has several adapters beside a head, one of which is trained: train it alone".into();
                return Err(Error::Param { name: "ForwardContext::adapters".into(), reason });
            }
        }
        // Which are active is told by the factors of all of them, zeros included.
        let weights = adapters.unwrap_or(&self.beside.weights);
        let factors: Vec<f64> =
            self.beside.loras.iter().map(|(index, lora)| lora.scale * f64::from(weights[*index])).collect();
        let mut merged = self.merged.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((made_with, weight)) = merged.as_ref()
            && *made_with == factors
        {
            return Ok(weight.clone());
        }
        let mut weight = self.weight.clone();
        for lora in &active {
            weight = Weight::frozen(merge_lora(&weight, lora)?);
        }
        *merged = Some((factors, weight.clone()));
        Ok(weight)
    }
}
