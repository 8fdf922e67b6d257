//! Several adapters beside one model: against merged weights, and against each alone.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use tallow::adapters::{AdapterPlan, AdapterSet, LoraConfig, NamedAdapter, Targets, write_peft};
use tallow::engine::{GenerateOptions, generate};
use tallow::formats::hf::ModelDir;
use tallow::models::{Checkpoint, Decoder, Shape};
use tallow::nn::{
    Fill, ForwardContext, Head, HeadMatrix, Init, ParamSpec, ParamStore, RandomInit, StoreOptions, plan_params,
};
use tallow::ops::Weight;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const IDS: [u32; 9] = [3, 14, 15, 9, 26, 5, 3, 8, 9];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn base() -> Result<(Checkpoint, Vec<ParamSpec>)> {
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&fixture("hf/llama-gqa"))?)?;
    let (_, specs) = plan_params(|b| checkpoint.config().build(b))?;
    Ok((checkpoint, specs))
}

fn named(path: &Path, weight: f32) -> NamedAdapter {
    NamedAdapter { weight, ..NamedAdapter::new(path) }
}

/// A trained adapter: neither of its matrices is zero.
struct Trained;

impl Fill for Trained {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow::nn::Result<()> {
        RandomInit { seed: 7 }.fill(&ParamSpec { init: Init::Normal(0.2), ..spec.clone() }, out)
    }
}

/// One of the head and the feed-forward, which no fixture has.
fn of_head(dir: &Path) -> Result<()> {
    let (checkpoint, specs) = base()?;
    let targets = Targets::Names(vec!["lm_head".into(), "up_proj".into(), "q_proj".into()]);
    let plan = AdapterPlan::new(&LoraConfig { rank: 3, targets, ..LoraConfig::default() }, &specs)?;
    let (_, specs) = plan_params(|b| plan.build(b, |b| checkpoint.config().build(b)))?;
    let store = ParamStore::new(specs, &StoreOptions::frozen(DType::F32, Device::Cpu), &Trained)?;
    Ok(write_peft(dir, &plan, &store, "llama-gqa", None)?)
}

fn logits(model: &dyn Decoder, weights: Option<&[f32]>) -> Result<Vec<f32>> {
    let mut cx = ForwardContext::causal(1, IDS.len())?;
    cx.adapters = weights.map(Arc::from);
    let logits = model.logits(&Tensor::from_slice(&IDS, (1, IDS.len()), &Device::Cpu)?, &mut cx)?;
    Ok(logits.flatten_all()?.to_vec1()?)
}

/// The model with `adapters` beside it.
fn beside(adapters: &[NamedAdapter]) -> Result<(Box<dyn Decoder>, ParamStore)> {
    let (checkpoint, base) = base()?;
    let set = AdapterSet::open(adapters, &base, &checkpoint)?;
    let (_, specs) = plan_params(|b| set.build(b, |b| checkpoint.config().build(b)))?;
    let store = ParamStore::new(specs, &StoreOptions::frozen(DType::F32, Device::Cpu), &set.fill(&checkpoint))?;
    Ok((store.build(|b| set.build(b, |b| checkpoint.config().build(b)))?, store))
}

fn merged(adapters: &[NamedAdapter]) -> Result<Box<dyn Decoder>> {
    let (checkpoint, base) = base()?;
    let set = AdapterSet::open(adapters, &base, &checkpoint)?;
    let fill = set.merged(&checkpoint, &base);
    let store = ParamStore::new(base.clone(), &StoreOptions::frozen(DType::F32, Device::Cpu), &fill)?;
    Ok(store.build(|b| checkpoint.config().build(b))?)
}

fn plain() -> Result<(Box<dyn Decoder>, ParamStore)> {
    let (checkpoint, base) = base()?;
    let store = ParamStore::new(base, &StoreOptions::frozen(DType::F32, Device::Cpu), &checkpoint)?;
    Ok((store.build(|b| checkpoint.config().build(b))?, store))
}

#[test]
fn weights_of_a_pass_give_what_merged_weights_give() -> Result<()> {
    let dir = tempfile::tempdir()?;
    of_head(dir.path())?;
    let paths = [fixture("peft/lora-qv"), fixture("peft/embedding"), dir.path().to_path_buf()];
    let all = |weights: [f32; 3]| -> Vec<NamedAdapter> {
        paths.iter().zip(weights).map(|(path, weight)| named(path, weight)).collect()
    };
    let (model, store) = beside(&all([1.0; 3]))?;
    let (untouched, base_store) = plain()?;
    for weights in [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.3, -0.5, 0.0], [0.7, 1.5, -0.4]] {
        let (got, want) = (logits(model.as_ref(), Some(&weights))?, logits(merged(&all(weights))?.as_ref(), None)?);
        let largest = want.iter().fold(0f32, |most, x| most.max(x.abs()));
        let apart = got.iter().zip(&want).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / largest;
        assert!(apart < 1e-5, "{weights:?}: {apart:.1e} of the largest logit");
        println!("{weights:?}: {apart:.1e} of the largest logit");
        // Those that a model is opened with are the ones of a pass that names none.
        assert_eq!(logits(beside(&all(weights))?.0.as_ref(), None)?, got, "{weights:?}");
    }
    for (i, path) in paths.iter().enumerate() {
        let weights: Vec<f32> = (0..3).map(|j| f32::from(u8::from(i == j))).collect();
        let alone = beside(&[named(path, 1.0)])?.0;
        assert_eq!(logits(model.as_ref(), Some(&weights))?, logits(alone.as_ref(), None)?, "{}", path.display());
        let options = |adapters: Option<Arc<[f32]>>| GenerateOptions { max_tokens: 5, adapters, ..Default::default() };
        let switched = generate(model.as_ref(), &Device::Cpu, &IDS, &options(Some(weights.into())), &mut |_| true)?;
        assert_eq!(switched, generate(alone.as_ref(), &Device::Cpu, &IDS, &options(None), &mut |_| true)?);
    }
    assert_eq!(logits(model.as_ref(), Some(&[0.0; 3]))?, logits(untouched.as_ref(), None)?);

    let elements = |store: &ParamStore, wanted: fn(&str) -> bool| -> usize {
        let params = store.params().iter().filter(|param| wanted(&param.spec.name));
        params.map(|param| param.spec.num_elements()).sum()
    };
    assert_eq!(elements(&store, |name| !name.contains(".lora_")), elements(&base_store, |_| true), "one base");
    Ok(())
}

#[test]
fn what_does_not_go_together_is_an_error_that_names_both() -> Result<()> {
    let (checkpoint, base) = base()?;
    let copied = tempfile::tempdir()?;
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("peft/save-head").join(file), copied.path().join(file))?;
    }
    let at = |name: &str| fixture("peft").join(name);
    let open = |adapters: &[NamedAdapter]| AdapterSet::open(adapters, &base, &checkpoint);
    let told = |adapters: &[NamedAdapter]| open(adapters).err().map(|e| e.to_string()).unwrap_or_default();
    let [dora, qv, head] = ["dora", "lora-qv", "save-head"].map(at);
    let [d, q, h] = [&dora, &qv, &head].map(|path| named(path, 1.0));
    for (adapters, parts) in [
        (vec![q.clone(), d.clone()], ["DoRA", "lora-qv"]),
        (vec![h.clone(), named(copied.path(), 1.0)], ["save-head", "modules_to_save"]),
        (vec![q.clone(), q.clone()], ["lora-qv", "twice"]),
        (vec![named(&qv, f32::NAN)], ["lora-qv", "finite"]),
        (vec![named(&dora, 0.5)], ["dora=0.5", "1 or 0"]),
        (vec![q.clone(), named(&head, 0.0)], ["save-head=0", "left out"]),
    ] {
        let told = told(&adapters);
        assert!(parts.iter().all(|part| told.contains(part)), "{told}");
    }
    assert!(open(&[h, q])?.weights_of(&[1.0]).is_err());

    let alone = beside(&[d])?.0;
    assert_eq!(logits(alone.as_ref(), Some(&[0.0]))?, logits(plain()?.0.as_ref(), None)?);
    assert!(logits(alone.as_ref(), Some(&[0.5])).is_err() && logits(alone.as_ref(), Some(&[1.0, 1.0])).is_err());
    Ok(())
}

/// A head that counts how often its matrix is asked for.
#[derive(Debug)]
struct Counted(Head, Arc<AtomicUsize>);

impl HeadMatrix for Counted {
    fn weight(&self, adapters: Option<&[f32]>) -> tallow::nn::Result<Weight> {
        self.1.fetch_add(1, Ordering::Relaxed);
        Ok(self.0.table(adapters)?.table().weight.clone())
    }

    fn dtype(&self) -> DType {
        self.0.dtype()
    }
}

struct WithHead(Box<dyn Decoder>, Head);

impl Decoder for WithHead {
    fn shape(&self) -> &Shape {
        self.0.shape()
    }

    fn embed(&self, ids: &Tensor, cx: &mut ForwardContext) -> tallow::nn::Result<Tensor> {
        self.0.embed(ids, cx)
    }

    fn block(&self, index: usize, x: &Tensor, cx: &mut ForwardContext) -> tallow::nn::Result<Tensor> {
        self.0.block(index, x, cx)
    }

    fn final_norm(&self, x: &Tensor) -> tallow::nn::Result<Tensor> {
        self.0.final_norm(x)
    }

    fn head(&self) -> &Head {
        &self.1
    }
}

#[test]
fn a_head_with_an_adapter_is_computed_for_tokens_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    of_head(dir.path())?;
    let (model, _store) = beside(&[named(dir.path(), 1.0)])?;
    let count = Arc::new(AtomicUsize::new(0));
    let head = Head::Of(Arc::new(Counted(model.head().clone(), count.clone())));
    let model = WithHead(model, head);
    // Others than those that the model has of its own.
    let options = GenerateOptions { max_tokens: 4, adapters: Some(Arc::from([0.5])), ..GenerateOptions::default() };
    let out = generate(&model, &Device::Cpu, &IDS, &options, &mut |_| true)?;
    assert_eq!((out.ids.len(), count.load(Ordering::Relaxed)), (4, 4));
    Ok(())
}
