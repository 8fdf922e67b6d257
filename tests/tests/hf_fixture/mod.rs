//! A directory below `tests/fixtures/hf`, written by `scripts/fixtures/hf_models.py`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tallow::formats::hf::ModelDir;
use tallow::models::{Checkpoint, Decoder};
use tallow::nn::{ForwardContext, ParamStore, StoreOptions, plan_params};
use tallow::ops::{CrossEntropyOptions, KeyRanges};

pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Names that `expected.safetensors` holds besides those of parameters.
const NOT_GRADIENTS: &[&str] = &["input_ids", "targets", "logits", "loss", "greedy"];
/// What transformers calls a target that is not there.
const NO_TARGET: i64 = -100;

/// A model as transformers wrote it, and what transformers makes of it.
pub struct Fixture {
    pub name: String,
    pub dir: PathBuf,
    expected: HashMap<String, Tensor>,
}

/// A model of ours over the weights of a fixture.
pub struct Loaded {
    pub checkpoint: Checkpoint,
    pub store: ParamStore,
    pub decoder: Box<dyn Decoder>,
}

/// Opens a Hugging Face directory with every parameter trained, as a trainer that continues from it does.
pub fn load(dir: &Path, dtype: DType) -> Result<Loaded> {
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(dir)?)?;
    assert_eq!(checkpoint.unknown_keys(), Vec::<String>::new(), "{}", dir.display());
    let config = checkpoint.config();
    let (_, specs) = plan_params(|b| config.build(b))?;
    checkpoint.check(&specs)?;
    let store = ParamStore::new(specs, &StoreOptions::trainable(dtype, Device::Cpu), &checkpoint)?;
    let decoder = store.build(|b| config.build(b))?;
    Ok(Loaded { checkpoint, store, decoder })
}

impl Loaded {
    /// Context of `t` new tokens in each of `b` rows behind `held` earlier ones, with the model's window.
    pub fn context<'a>(&self, b: usize, held: usize, t: usize) -> Result<ForwardContext<'a>> {
        let positions = (0..b).flat_map(|_| held as u32..(held + t) as u32).collect();
        let mut ranges = KeyRanges::causal(b, t, held + t)?;
        if let Some(window) = self.decoder.shape().sliding_window {
            ranges = ranges.with_window(window)?;
        }
        Ok(ForwardContext::whole(Arc::new(positions), Arc::new(ranges)))
    }

    /// f32 logits of whole rows, without a trace on the tape.
    pub fn logits(&self, ids: &Tensor) -> Result<Tensor> {
        let (b, t) = ids.dims2()?;
        let mut cx = self.context(b, 0, t)?;
        Ok(tallow::ops::no_grad(|| self.decoder.logits(ids, &mut cx))?.to_dtype(DType::F32)?)
    }
}

impl Fixture {
    pub fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/hf")
    }

    pub fn open(name: &str) -> Result<Self> {
        let dir = Self::root().join(name);
        let expected = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu)?;
        Ok(Self { name: name.into(), dir, expected })
    }

    pub fn load(&self, dtype: DType) -> Result<Loaded> {
        load(&self.dir, dtype)
    }

    fn tensor(&self, name: &str) -> &Tensor {
        self.expected.get(name).unwrap_or_else(|| panic!("{}: no `{name}`", self.name))
    }

    /// `[b, t]` u32.
    pub fn ids(&self) -> Result<Tensor> {
        Ok(self.tensor("input_ids").to_dtype(DType::U32)?)
    }

    /// `[b, t]` u32, and how many of them count.
    pub fn targets(&self) -> Result<(Tensor, usize)> {
        let stored = self.tensor("targets");
        let ignored = CrossEntropyOptions::default().ignore_index;
        let ours = |id: i64| if id == NO_TARGET { Ok(ignored) } else { u32::try_from(id) };
        let ids = stored.flatten_all()?.to_vec1::<i64>()?.into_iter().map(ours).collect::<Result<Vec<_>, _>>()?;
        let counted = ids.iter().filter(|&&id| id != ignored).count();
        Ok((Tensor::from_vec(ids, stored.shape(), &Device::Cpu)?, counted))
    }

    /// `[b, t, v]` f32.
    pub fn logits(&self) -> &Tensor {
        self.tensor("logits")
    }

    /// Mean over the targets that count.
    pub fn loss(&self) -> Result<f64> {
        Ok(f64::from(self.tensor("loss").to_vec1::<f32>()?[0]))
    }

    /// A prompt, and the likeliest continuation.
    pub fn greedy(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let prompt = self.ids()?.get(0)?.narrow(0, 0, 5)?.to_vec1()?;
        Ok((prompt, self.tensor("greedy").to_dtype(DType::U32)?.to_vec1()?))
    }

    /// The gradient of the mean loss by parameter, in the shapes of the checkpoint.
    pub fn gradients(&self) -> BTreeMap<&str, &Tensor> {
        let gradients = self.expected.iter().filter(|(name, _)| !NOT_GRADIENTS.contains(&name.as_str()));
        gradients.map(|(name, gradient)| (name.as_str(), gradient)).collect()
    }
}
