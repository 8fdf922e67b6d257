//! [`AdapterFactory`]: a factory that puts adapters beside what another one gives.

use candle_core::{DType, Device};
use tallow_nn::{Embedding, Error, Head, LayerFactory, Linear, LinearSpec, ParamSpec, Result};
use tallow_ops::{LoraWeights, Weight};

use crate::AdapterPlan;
use crate::layer::{LoraEmbedding, LoraHead, LoraProjection};

/// Asks `inner` for every layer, and for the matrices of an adapter beside those that the plan names.
pub struct AdapterFactory<'a> {
    inner: &'a dyn LayerFactory,
    plan: &'a AdapterPlan,
}

impl<'a> AdapterFactory<'a> {
    /// Around `inner`, as `plan` says.
    pub fn new(inner: &'a dyn LayerFactory, plan: &'a AdapterPlan) -> Self {
        Self { inner, plan }
    }

    /// The adapter's weights beside `base`, in the order of [`AdapterPlan::specs_of`].
    fn adapter(&self, module: &str, base: &ParamSpec) -> Result<Option<(LoraWeights, Option<Weight>)>> {
        let Some(adapted) = self.plan.modules.get(module) else { return Ok(None) };
        let weights =
            self.plan.specs_of(module, base).iter().map(|spec| self.inner.weight(spec)).collect::<Result<Vec<_>>>()?;
        let mut weights = weights.into_iter();
        match (weights.next(), weights.next()) {
            (Some(a), Some(b)) => Ok(Some((LoraWeights { a, b, scale: adapted.scale }, weights.next()))),
            _ => Err(Error::Param { name: module.into(), reason: "its adapter has no matrices".into() }),
        }
    }
}

impl LayerFactory for AdapterFactory<'_> {
    fn weight(&self, spec: &ParamSpec) -> Result<Weight> {
        self.inner.weight(spec)
    }

    fn dtype(&self) -> DType {
        self.inner.dtype()
    }

    fn device(&self) -> &Device {
        self.inner.device()
    }

    fn linear(&self, spec: &LinearSpec) -> Result<Linear> {
        let base = self.inner.linear(spec)?;
        let Some((lora, magnitude)) = self.adapter(&spec.name, &spec.weight_spec())? else { return Ok(base) };
        let dropout = self.plan.config.dropout;
        Ok(Linear::new(LoraProjection::new(base, lora, magnitude, dropout, spec)?))
    }

    fn embedding(&self, spec: &ParamSpec) -> Result<Embedding> {
        let base = self.inner.embedding(spec)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        match self.adapter(module, spec)? {
            Some((lora, _)) => Ok(Embedding::of(LoraEmbedding::new(base, lora))),
            None => Ok(base),
        }
    }

    fn head(&self, spec: &ParamSpec) -> Result<Head> {
        let base = self.inner.head(spec)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        match self.adapter(module, spec)? {
            Some((lora, _)) => Ok(LoraHead::head(base, lora)),
            None => Ok(base),
        }
    }
}
