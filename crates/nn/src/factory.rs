//! [`LayerFactory`]: models ask, they never load.

use std::cell::RefCell;
use std::collections::HashSet;

use candle_core::{DType, Device, Tensor};
use tallow_ops::Weight;

use crate::layers::{Embedding, Head, LayerNorm, Linear, Plain, RmsNorm};
use crate::{Error, Init, ParamSpec, Result, Role};

/// A projection as a model asks for it.
#[derive(Clone, Debug)]
pub struct LinearSpec {
    /// Name without `.weight`, e.g. `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Input width.
    pub d_in: usize,
    /// Output width.
    pub d_out: usize,
    /// With a bias.
    pub bias: bool,
    /// The checkpoint stores `[in, out]`.
    pub stored_transposed: bool,
    /// Standard deviation of the initial weights.
    pub init_std: f32,
    /// See [`ParamSpec::stage`].
    pub stage: usize,
}

impl LinearSpec {
    /// Its matrix.
    pub fn weight_spec(&self) -> ParamSpec {
        ParamSpec {
            name: format!("{}.weight", self.name),
            shape: vec![self.d_out, self.d_in],
            role: self.role,
            init: Init::Normal(self.init_std),
            decay: self.role.decays(),
            stored_transposed: self.stored_transposed,
            stage: self.stage,
        }
    }
}

/// Where layers come from. Loading, sharding, quantizing and adapting are factories around a factory, composed in that
/// order; a wrapper that changes projections overrides [`linear`](Self::linear) and delegates the rest.
pub trait LayerFactory {
    /// The parameter `spec.name` with `spec.shape`.
    ///
    /// # Errors
    /// If the parameter is unknown here or of another shape.
    fn weight(&self, spec: &ParamSpec) -> Result<Weight>;

    /// Dtype of activations and of the weights they meet.
    fn dtype(&self) -> DType;

    /// Device that the layers live on.
    fn device(&self) -> &Device;

    /// A projection `y = x W^T + b`.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    fn linear(&self, spec: &LinearSpec) -> Result<Linear> {
        let weight = self.weight(&spec.weight_spec())?;
        let bias = spec.bias.then(|| {
            self.weight(&ParamSpec {
                name: format!("{}.bias", spec.name),
                shape: vec![spec.d_out],
                role: spec.role,
                init: Init::Zeros,
                decay: false,
                stored_transposed: false,
                stage: spec.stage,
            })
        });
        Ok(Linear::new(Plain { weight, bias: bias.transpose()? }))
    }

    /// A table of vectors, of `spec.shape` `[num, dim]`.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    fn embedding(&self, spec: &ParamSpec) -> Result<Embedding> {
        Ok(Embedding::new(self.weight(spec)?))
    }

    /// A head with a matrix of its own, of `spec.shape` `[vocab, hidden]`.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
    fn head(&self, spec: &ParamSpec) -> Result<Head> {
        Ok(Head::Plain(self.weight(spec)?))
    }
}

/// A place in a model under construction: a factory, a name prefix and a stage. What a model's `build` is given.
#[derive(Clone)]
pub struct Build<'a> {
    factory: &'a dyn LayerFactory,
    prefix: String,
    stage: usize,
    init_std: f32,
    stored_transposed: bool,
}

impl<'a> Build<'a> {
    /// The root of a model over `factory`.
    pub fn new(factory: &'a dyn LayerFactory) -> Self {
        Self { factory, prefix: String::new(), stage: 0, init_std: 0.02, stored_transposed: false }
    }

    /// The factory behind it, for a factory around it.
    pub fn factory(&self) -> &'a dyn LayerFactory {
        self.factory
    }

    /// The place `name` below this one (dots are allowed).
    pub fn at(&self, name: &str) -> Self {
        Self { prefix: self.full(name), ..self.clone() }
    }

    /// The same place, in another stage (see [`ParamSpec::stage`]).
    pub fn stage(&self, stage: usize) -> Self {
        Self { stage, ..self.clone() }
    }

    /// The same place with another standard deviation for initial weights (0.02 unless told).
    pub fn init_std(&self, init_std: f32) -> Self {
        Self { init_std, ..self.clone() }
    }

    /// The same place where checkpoints store linear weights as `[in, out]`.
    pub fn stored_transposed(&self) -> Self {
        Self { stored_transposed: true, ..self.clone() }
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> DType {
        self.factory.dtype()
    }

    /// Device of the layers.
    pub fn device(&self) -> &Device {
        self.factory.device()
    }

    /// A projection from `d_in` to `d_out`.
    ///
    /// # Errors
    /// As [`LayerFactory::weight`].
    pub fn linear(&self, name: &str, role: Role, d_in: usize, d_out: usize, bias: bool) -> Result<Linear> {
        self.factory.linear(&LinearSpec {
            name: self.full(name),
            role,
            d_in,
            d_out,
            bias,
            stored_transposed: self.stored_transposed,
            init_std: self.init_std,
            stage: self.stage,
        })
    }

    /// A table of `num` rows of width `dim`.
    ///
    /// # Errors
    /// As [`LayerFactory::weight`].
    pub fn embedding(&self, name: &str, role: Role, num: usize, dim: usize) -> Result<Embedding> {
        self.factory.embedding(&self.spec(name, "weight", vec![num, dim], role, Init::Normal(self.init_std)))
    }

    /// RMS normalisation over `dim` channels.
    ///
    /// # Errors
    /// As [`LayerFactory::weight`].
    pub fn rms_norm(&self, name: &str, dim: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.param(name, "weight", vec![dim], Role::Norm, Init::Ones)?, eps))
    }

    /// Layer normalisation with gain and bias over `dim` channels.
    ///
    /// # Errors
    /// As [`LayerFactory::weight`].
    pub fn layer_norm(&self, name: &str, dim: usize, eps: f64) -> Result<LayerNorm> {
        let weight = self.param(name, "weight", vec![dim], Role::Norm, Init::Ones)?;
        let bias = self.param(name, "bias", vec![dim], Role::Norm, Init::Zeros)?;
        Ok(LayerNorm::new(weight, bias, eps))
    }

    /// A language-model head `[vocab, hidden]` of its own.
    ///
    /// # Errors
    /// As [`LayerFactory::weight`].
    pub fn head(&self, name: &str, vocab: usize, hidden: usize) -> Result<Head> {
        let init = Init::Normal(self.init_std);
        self.factory.head(&self.spec(name, "weight", vec![vocab, hidden], Role::Head, init))
    }

    fn param(&self, name: &str, leaf: &str, shape: Vec<usize>, role: Role, init: Init) -> Result<Weight> {
        self.factory.weight(&self.spec(name, leaf, shape, role, init))
    }

    fn spec(&self, name: &str, leaf: &str, shape: Vec<usize>, role: Role, init: Init) -> ParamSpec {
        ParamSpec {
            name: format!("{}.{leaf}", self.full(name)),
            shape,
            role,
            init,
            decay: role.decays(),
            stored_transposed: false,
            stage: self.stage,
        }
    }

    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) }
    }
}

/// Runs a model's `build` over a factory that only writes down what is asked for: no parameter takes memory.
///
/// Returns what `build` returned (its layers hold zero-stride placeholders) and the parameters in the order of asking.
///
/// # Errors
/// Whatever `build` returns, or [`Error::Param`] if a name is asked for twice.
pub fn plan_params<M>(build: impl FnOnce(&Build) -> Result<M>) -> Result<(M, Vec<ParamSpec>)> {
    let planner = Planner { specs: RefCell::default(), names: RefCell::default() };
    let model = build(&Build::new(&planner))?;
    Ok((model, planner.specs.into_inner()))
}

struct Planner {
    specs: RefCell<Vec<ParamSpec>>,
    /// Of `specs`: a configuration may ask for thousands of layers before anyone looks whether its file has them.
    names: RefCell<HashSet<String>>,
}

impl LayerFactory for Planner {
    fn weight(&self, spec: &ParamSpec) -> Result<Weight> {
        if !self.names.borrow_mut().insert(spec.name.clone()) {
            return Err(Error::Param { name: spec.name.clone(), reason: "asked for twice by its model".into() });
        }
        self.specs.borrow_mut().push(spec.clone());
        let placeholder = Tensor::zeros((), DType::F32, &Device::Cpu)?.broadcast_as(spec.shape.as_slice())?;
        Ok(Weight::frozen(placeholder))
    }

    fn dtype(&self) -> DType {
        DType::F32
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }
}
