//! [`ParamStore`]: every parameter of a model, in a few flat buckets.
//!
//! One bucket a stage of the decoder (embedding, each block, head), frozen parameters apart from trained ones, and
//! within a bucket the parameters that decay before those that do not. A flat bucket is what the fused optimizer, a
//! checkpoint, a collective and a shard want; a layer sees a view of it as its weight.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use tallow_ops::{PackedMatrix, Weight};

use crate::factory::{Build, LayerFactory};
use crate::{Error, Init, ParamSpec, Result};

/// Parameters start at multiples of this many elements (a cache line of f32), the gaps are zero.
const ALIGN: usize = 16;

/// Where initial values come from.
pub trait Fill: Sync {
    /// Writes the values of `spec`, in memory order (`[out, in]` for a linear weight), into `out`.
    ///
    /// # Errors
    /// If the source does not have them in that shape.
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> Result<()>;
}

/// Random initial values as each [`Init`] says: a pure function of the seed, the parameter's name and the element.
#[derive(Clone, Copy, Debug)]
pub struct RandomInit {
    /// The run's seed.
    pub seed: u64,
}

impl Fill for RandomInit {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> Result<()> {
        match spec.init {
            Init::Zeros => out.fill(0.0),
            Init::Ones => out.fill(1.0),
            Init::Normal(std) => {
                tallow_ops::fill_normal(out, self.seed, tallow_ops::stream_of(&spec.name), std);
            }
            Init::Uniform(most) => {
                tallow_ops::fill_uniform(out, self.seed, tallow_ops::stream_of(&spec.name), -most, most);
            }
        }
        Ok(())
    }
}

/// Keeps matrices that are not trained in fewer bits.
pub trait Pack: Sync {
    /// The matrix of `spec`, whose values `fill` has; `None` to keep it as it is.
    ///
    /// # Errors
    /// If its values cannot be had, or it cannot be packed as asked.
    fn pack(&self, spec: &ParamSpec, fill: &dyn Fill) -> Result<Option<Arc<dyn PackedMatrix>>>;

    /// Bytes of what [`pack`](Self::pack) will make of `spec`, before there are values.
    ///
    /// # Errors
    /// If it cannot be packed as asked.
    fn planned_bytes(&self, spec: &ParamSpec) -> Result<Option<usize>>;
}

/// How a store holds its parameters.
pub struct StoreOptions<'a> {
    /// Dtype that the ops compute in: f32 or bf16.
    pub dtype: DType,
    /// Device of the buckets.
    pub device: Device,
    /// Which parameters are trained; these get an f32 master copy and an f32 gradient.
    pub trainable: &'a (dyn Fn(&ParamSpec) -> bool + Sync),
    /// What is packed of the others.
    pub pack: Option<&'a dyn Pack>,
}

impl StoreOptions<'_> {
    /// Every parameter trained.
    pub fn trainable(dtype: DType, device: Device) -> Self {
        Self { dtype, device, trainable: &|_| true, pack: None }
    }

    /// None trained: inference.
    pub fn frozen(dtype: DType, device: Device) -> Self {
        Self { dtype, device, trainable: &|_| false, pack: None }
    }
}

/// A flat run of parameters of one stage.
#[derive(Clone, Debug)]
pub struct Bucket {
    /// See [`ParamSpec::stage`].
    pub stage: usize,
    /// Whether its parameters are trained.
    pub trainable: bool,
    /// Elements, gaps included.
    pub len: usize,
    /// The first `decay_len` elements belong to parameters with weight decay.
    pub decay_len: usize,
    /// f32 master weights `[len]`; the same storage as `compute` when that is f32. Present if trainable.
    pub master: Option<Tensor>,
    /// What the ops read, `[len]`, f32 or bf16.
    pub compute: Tensor,
    /// Sum of gradients, f32 `[len]`. Present if trainable.
    pub grad: Option<Tensor>,
}

/// Where a parameter lies.
#[derive(Clone, Debug)]
pub struct Param {
    /// What was asked for.
    pub spec: ParamSpec,
    /// Index of its bucket.
    pub bucket: usize,
    /// First element within the bucket.
    pub offset: usize,
}

/// A parameter that lies in no bucket.
#[derive(Clone, Debug)]
pub struct PackedParam {
    /// What was asked for.
    pub spec: ParamSpec,
    /// Its values.
    pub matrix: Arc<dyn PackedMatrix>,
}

/// Every parameter of a model. The order is that in which the model asked, the same in every process.
pub struct ParamStore {
    params: Vec<Param>,
    packed: Vec<PackedParam>,
    buckets: Vec<Bucket>,
    weights: HashMap<String, Weight>,
    dtype: DType,
    device: Device,
}

impl ParamStore {
    /// Lays out `specs` (from [`plan_params`](crate::plan_params)), fills them, and allocates gradients for the trained.
    ///
    /// # Errors
    /// If a value cannot be had from `fill`, or memory cannot be allocated on the device.
    pub fn new(specs: Vec<ParamSpec>, options: &StoreOptions, fill: &dyn Fill) -> Result<Self> {
        if !matches!(options.dtype, DType::F32 | DType::BF16) {
            return Err(Error::Config {
                key: "dtype",
                value: options.dtype.as_str().into(),
                reason: "weights are held as `f32` or `bf16`".into(),
            });
        }
        let (packed, specs) = take_packed(specs, options, fill)?;
        let (params, layouts) = lay_out(specs, options.trainable);
        let mut buckets = Vec::with_capacity(layouts.len());
        for (index, layout) in layouts.iter().enumerate() {
            let members: Vec<&Param> = params.iter().filter(|p| p.bucket == index).collect();
            buckets.push(layout.allocate(&members, options, fill)?);
        }
        let mut weights = HashMap::new();
        for PackedParam { spec, matrix } in &packed {
            weights.insert(spec.name.clone(), Weight::packed(matrix.clone(), options.dtype)?);
        }
        let (dtype, device) = (options.dtype, options.device.clone());
        let mut store = Self { params, packed, buckets, weights, dtype, device };
        for param in &store.params {
            store.weights.insert(param.spec.name.clone(), store.weight_of(param)?);
        }
        Ok(store)
    }

    /// Builds a model whose layers are views of this store.
    ///
    /// # Errors
    /// Whatever `build` returns; a parameter that the plan did not have is [`Error::Param`].
    pub fn build<M>(&self, build: impl FnOnce(&Build) -> Result<M>) -> Result<M> {
        build(&Build::new(self))
    }

    /// All parameters that lie in buckets, in the order of asking.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// The parameters that are packed, in the order of asking.
    pub fn packed(&self) -> &[PackedParam] {
        &self.packed
    }

    /// The parameters that are trained, in the order of asking.
    pub fn trained(&self) -> impl Iterator<Item = &Param> {
        self.params.iter().filter(|param| self.buckets[param.bucket].trainable)
    }

    /// The first stage with a parameter that is trained: below it nothing needs a gradient.
    pub fn first_trained_stage(&self) -> Option<usize> {
        self.buckets.iter().filter(|bucket| bucket.trainable).map(|bucket| bucket.stage).min()
    }

    /// All buckets, by stage.
    pub fn buckets(&self) -> &[Bucket] {
        &self.buckets
    }

    /// Number of elements of all parameters.
    pub fn num_elements(&self) -> usize {
        let packed: usize = self.packed.iter().map(|p| p.spec.num_elements()).sum();
        packed + self.params.iter().map(|p| p.spec.num_elements()).sum::<usize>()
    }

    /// The value of a parameter, in its own shape: the f32 master where there is one, else what the ops read.
    ///
    /// # Errors
    /// If `param` is not of this store.
    pub fn value(&self, param: &Param) -> Result<Tensor> {
        let bucket = &self.buckets[param.bucket];
        view(bucket.master.as_ref().unwrap_or(&bucket.compute), param)
    }

    /// The f32 gradient of a trained parameter, in its own shape.
    ///
    /// # Errors
    /// If `param` is not of this store.
    pub fn grad(&self, param: &Param) -> Result<Option<Tensor>> {
        self.buckets[param.bucket].grad.as_ref().map(|grad| view(grad, param)).transpose()
    }

    fn weight_of(&self, param: &Param) -> Result<Weight> {
        let bucket = &self.buckets[param.bucket];
        let value = view(&bucket.compute, param)?;
        Ok(match &bucket.grad {
            Some(grad) => Weight::trainable(value, view(grad, param)?)?,
            None => Weight::frozen(value),
        })
    }
}

impl LayerFactory for ParamStore {
    fn weight(&self, spec: &ParamSpec) -> Result<Weight> {
        let weight = self.weights.get(&spec.name).ok_or_else(|| Error::Param {
            name: spec.name.clone(),
            reason: "is not in the plan that this store was made from".into(),
        })?;
        if weight.shape().dims() != spec.shape {
            let reason = format!("is {:?} in the store but {:?} was asked for", weight.shape().dims(), spec.shape);
            return Err(Error::Param { name: spec.name.clone(), reason });
        }
        Ok(weight.clone())
    }

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn device(&self) -> &Device {
        &self.device
    }
}

fn view(flat: &Tensor, param: &Param) -> Result<Tensor> {
    let flat = flat.narrow(0, param.offset, param.spec.num_elements())?;
    Ok(flat.reshape(param.spec.shape.as_slice())?)
}

struct BucketLayout {
    stage: usize,
    trainable: bool,
    len: usize,
    decay_len: usize,
}

/// Packs what is to be packed; the rest comes back as it was.
fn take_packed(
    specs: Vec<ParamSpec>,
    options: &StoreOptions,
    fill: &dyn Fill,
) -> Result<(Vec<PackedParam>, Vec<ParamSpec>)> {
    let Some(pack) = options.pack else { return Ok((vec![], specs)) };
    let (mut packed, mut rest) = (vec![], vec![]);
    for spec in specs {
        let matrix = if (options.trainable)(&spec) { None } else { pack.pack(&spec, fill)? };
        match matrix {
            Some(matrix) if spec.shape == [matrix.dims().0, matrix.dims().1] => {
                packed.push(PackedParam { spec, matrix })
            }
            Some(matrix) => {
                let reason = format!("was packed as {:?} but is {:?}", matrix.dims(), spec.shape);
                return Err(Error::Param { name: spec.name, reason });
            }
            None => rest.push(spec),
        }
    }
    Ok((packed, rest))
}

/// Puts every parameter in its bucket, decaying ones first, and keeps the order of asking otherwise.
fn lay_out(specs: Vec<ParamSpec>, trainable: &dyn Fn(&ParamSpec) -> bool) -> (Vec<Param>, Vec<BucketLayout>) {
    let mut keys: Vec<(usize, bool)> = specs.iter().map(|s| (s.stage, !trainable(s))).collect();
    keys.sort_unstable();
    keys.dedup();
    let mut layouts: Vec<BucketLayout> =
        keys.iter().map(|&(stage, frozen)| BucketLayout { stage, trainable: !frozen, len: 0, decay_len: 0 }).collect();
    let bucket_of = |spec: &ParamSpec| keys.partition_point(|&key| key < (spec.stage, !trainable(spec)));
    let mut params: Vec<Param> =
        specs.into_iter().map(|spec| Param { bucket: bucket_of(&spec), spec, offset: 0 }).collect();
    for decay in [true, false] {
        for param in params.iter_mut().filter(|p| p.spec.decay == decay) {
            let layout = &mut layouts[param.bucket];
            param.offset = layout.len;
            layout.len += param.spec.num_elements().next_multiple_of(ALIGN);
            if decay {
                layout.decay_len = layout.len;
            }
        }
    }
    (params, layouts)
}

impl BucketLayout {
    fn allocate(&self, members: &[&Param], options: &StoreOptions, fill: &dyn Fill) -> Result<Bucket> {
        let flat = fill_flat(self.len, members, fill)?;
        let (master, compute) = match (options.dtype, self.trainable) {
            (DType::F32, trainable) => {
                let compute = Tensor::from_vec(flat, self.len, &options.device)?;
                (trainable.then(|| compute.clone()), compute)
            }
            (_, trainable) => {
                let rounded: Vec<bf16> = flat.par_iter().map(|&x| bf16::from_f32(x)).collect();
                let compute = Tensor::from_vec(rounded, self.len, &options.device)?;
                let master = trainable.then(|| Tensor::from_vec(flat, self.len, &options.device)).transpose()?;
                (master, compute)
            }
        };
        let grad = self.trainable.then(|| Tensor::zeros(self.len, DType::F32, &options.device)).transpose()?;
        Ok(Bucket {
            stage: self.stage,
            trainable: self.trainable,
            len: self.len,
            decay_len: self.decay_len,
            master,
            compute,
            grad,
        })
    }
}

fn fill_flat(len: usize, members: &[&Param], fill: &dyn Fill) -> Result<Vec<f32>> {
    let mut flat = vec![0f32; len];
    let mut sorted: Vec<&Param> = members.to_vec();
    sorted.sort_by_key(|p| p.offset);
    let mut rest = flat.as_mut_slice();
    let mut at = 0;
    let mut jobs = Vec::with_capacity(sorted.len());
    for param in sorted {
        let (_, tail) = rest.split_at_mut(param.offset - at);
        let (slice, tail) = tail.split_at_mut(param.spec.num_elements());
        (rest, at) = (tail, param.offset + slice.len());
        jobs.push((&param.spec, slice));
    }
    jobs.into_par_iter().try_for_each(|(spec, slice)| fill.fill(spec, slice))?;
    Ok(flat)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Role, plan_params};

    fn two_layers(b: &Build) -> Result<(crate::Linear, crate::RmsNorm)> {
        let b = b.stage(1);
        Ok((b.linear("proj", Role::MlpIn, 3, 5, true)?, b.rms_norm("norm", 7, 1e-5)?))
    }

    fn store(dtype: DType) -> Result<ParamStore> {
        let (_, specs) = plan_params(two_layers)?;
        ParamStore::new(specs, &StoreOptions::trainable(dtype, Device::Cpu), &RandomInit { seed: 3 })
    }

    #[test]
    fn decaying_parameters_come_first_and_are_aligned() -> Result<()> {
        let store = store(DType::F32)?;
        assert_eq!(store.buckets().len(), 1);
        assert_eq!((store.buckets()[0].decay_len, store.buckets()[0].len), (16, 48));
        assert!(store.params().iter().all(|p| p.offset % ALIGN == 0));
        assert_eq!(store.num_elements(), 3 * 5 + 5 + 7);
        Ok(())
    }

    #[test]
    fn f32_layers_see_the_master_itself() -> Result<()> {
        let store = store(DType::F32)?;
        let (proj, _) = store.build(two_layers)?;
        let before = proj.weight().map(|w| w.value()?.to_vec2::<f32>()).transpose()?;
        let master = store.buckets()[0].master.as_ref().expect("trainable");
        master.slice_set(&Tensor::ones(15, DType::F32, &Device::Cpu)?, 0, 0)?;
        let after = proj.weight().map(|w| w.value()?.to_vec2::<f32>()).transpose()?;
        assert_ne!(before, after);
        assert_eq!(after, Some(vec![vec![1.0; 3]; 5]));
        Ok(())
    }

    #[test]
    fn random_values_depend_on_name_and_seed_only() -> Result<()> {
        let (a, b) = (store(DType::F32)?, store(DType::F32)?);
        let param = &a.params()[0];
        assert_eq!(a.value(param)?.to_vec2::<f32>()?, b.value(param)?.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_parameter_outside_the_plan_is_an_error() -> Result<()> {
        let store = store(DType::BF16)?;
        let error = store.build(|b| b.linear("other", Role::MlpIn, 3, 5, false)).expect_err("not planned");
        assert!(error.to_string().contains("other.weight"), "{error}");
        Ok(())
    }
}
