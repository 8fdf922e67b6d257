//! [`AdapterFactory`]: a factory that puts adapters beside what another one gives.

use std::sync::Arc;

use candle_core::{DType, Device};
use tallow_nn::{Embedding, Error, Head, LayerFactory, Linear, LinearSpec, ParamSpec, Result};
use tallow_ops::{LoraWeights, ReplacedRows, Weight};

use crate::AdapterPlan;
use crate::layer::{Beside, LoraEmbedding, LoraHead, LoraProjection};
use crate::tokens::{TokenEmbedding, with_rows};

/// Asks `inner` for every layer, and for the matrices of the adapters beside those that their plans name.
pub struct AdapterFactory<'a> {
    inner: &'a dyn LayerFactory,
    plans: Vec<&'a AdapterPlan>,
    weights: Arc<[f32]>,
}

/// The name of a parameter of adapter `index`: the first's as it is, as where it is the only one.
pub(crate) fn indexed(index: usize, name: &str) -> String {
    if index == 0 { name.to_owned() } else { format!("adapters.{index}.{name}") }
}

impl<'a> AdapterFactory<'a> {
    /// One adapter around `inner`, as `plan` says.
    pub fn new(inner: &'a dyn LayerFactory, plan: &'a AdapterPlan) -> Self {
        Self::of_all(inner, vec![plan], Arc::new([1.0]))
    }

    /// Several, with their weights where a pass names none.
    pub(crate) fn of_all(inner: &'a dyn LayerFactory, plans: Vec<&'a AdapterPlan>, weights: Arc<[f32]>) -> Self {
        Self { inner, plans, weights }
    }

    /// The adapters' weights beside `base`, in the order of [`AdapterPlan::specs_of`]. Only one alone has magnitudes.
    fn beside(&self, module: &str, base: &ParamSpec) -> Result<Option<(Beside, Option<Weight>)>> {
        let (mut loras, mut magnitude) = (vec![], None);
        for (index, plan) in self.plans.iter().enumerate() {
            let Some(adapted) = plan.modules.get(module) else { continue };
            let named = |spec: ParamSpec| ParamSpec { name: indexed(index, &spec.name), ..spec };
            let specs = plan.specs_of(module, base).into_iter().map(named);
            let weights = specs.map(|spec| self.inner.weight(&spec)).collect::<Result<Vec<_>>>()?;
            let mut weights = weights.into_iter();
            let (Some(a), Some(b)) = (weights.next(), weights.next()) else {
                return Err(Error::Param { name: module.into(), reason: "its adapter has no matrices".into() });
            };
            loras.push((index, LoraWeights { a, b, scale: adapted.scale }));
            magnitude = weights.next();
            if let Some([a, b]) = plan.start_specs_of(module, base) {
                let (a, b) = (self.inner.weight(&named(a))?, self.inner.weight(&named(b))?);
                loras.push((index, LoraWeights { a, b, scale: -adapted.scale }));
            }
        }
        Ok((!loras.is_empty()).then(|| (Beside { loras, weights: self.weights.clone() }, magnitude)))
    }
}

impl AdapterFactory<'_> {
    /// The rows of a table that an adapter has. Only one of several has some.
    fn token_rows(&self, module: &str, base: &ParamSpec) -> Result<Option<ReplacedRows>> {
        for (index, plan) in self.plans.iter().enumerate() {
            let Some(tokens) = plan.tokens.get(module) else { continue };
            let spec = crate::tokens::spec(module, base, tokens.len());
            let rows = self.inner.weight(&ParamSpec { name: indexed(index, &spec.name), ..spec })?;
            return Ok(Some(ReplacedRows::new(rows, tokens.as_slice())?));
        }
        Ok(None)
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
        let Some((beside, magnitude)) = self.beside(&spec.name, &spec.weight_spec())? else { return Ok(base) };
        let dropout = self.plans.first().map_or(0.0, |plan| plan.config.dropout);
        Ok(Linear::new(LoraProjection::new(base, beside, magnitude, dropout, spec)?))
    }

    fn embedding(&self, spec: &ParamSpec) -> Result<Embedding> {
        let base = self.inner.embedding(spec)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        if let Some(rows) = self.token_rows(module, spec)? {
            return Ok(Embedding::of(TokenEmbedding::new(base, rows)));
        }
        match self.beside(module, spec)? {
            Some((beside, _)) => Ok(Embedding::of(LoraEmbedding::new(base, beside))),
            None => Ok(base),
        }
    }

    fn head(&self, spec: &ParamSpec) -> Result<Head> {
        let base = self.inner.head(spec)?;
        let module = spec.name.strip_suffix(".weight").unwrap_or(&spec.name);
        if let Some(rows) = self.token_rows(module, spec)? {
            return Ok(with_rows(base, &rows));
        }
        match self.beside(module, spec)? {
            Some((beside, _)) => Ok(LoraHead::head(base, beside)),
            None => Ok(base),
        }
    }
}
