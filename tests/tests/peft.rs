//! Parity with the `peft` package: its adapters over transformers' models, as `scripts/fixtures/peft_adapters.py` wrote them.
//!
//! Run with `--nocapture` to see the largest difference of each case.

#[allow(dead_code, reason = "parity.rs reads more of a fixture")]
mod hf_fixture;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hf_fixture::{Loaded, Result};
use tallow::adapters::{AdapterFill, AdapterPlan, PeftAdapter, merge_into, write_peft};
use tallow::formats::hf::ModelDir;
use tallow::models::Checkpoint;
use tallow::nn::{Fill, ParamSpec, ParamStore, StoreOptions, plan_params};
use tallow::ops::CrossEntropyOptions;
use tallow::train::{StepOptions, forward_backward};

/// Base and adapter of each.
const CASES: &[(&str, &str)] = &[
    ("dora", "llama-gqa"),
    ("embedding", "llama-gqa"),
    ("embedding-tied", "llama-tied"),
    ("gpt2", "gpt2"),
    ("gpt2-dora", "gpt2-untied"),
    ("lora-all-linear", "mistral-window"),
    ("lora-qv", "llama-gqa"),
    ("patterns", "llama-head-dim"),
    ("regex-layers", "llama-gqa"),
    ("rslora", "llama-biases"),
    ("save-head", "llama-gqa"),
    ("save-norms", "llama-rope-llama3"),
    ("tokens", "llama-gqa"),
    ("tokens-gpt2", "gpt2"),
    ("tokens-tied", "llama-tied"),
];

/// Of a logit, of the mean loss in nats, and of a gradient's element as a share of the largest of its parameter.
const TOLERANCE: (f64, f64, f64) = (2e-5, 2e-6, 2e-5);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn max_abs(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
}

struct Case {
    files: PeftAdapter,
    plan: AdapterPlan,
    base_specs: Vec<ParamSpec>,
    model: Loaded,
    expected: HashMap<String, Tensor>,
}

fn open(name: &str, base: &str) -> Result<Case> {
    let dir = root().join("peft").join(name);
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
    let config = checkpoint.config();
    let (_, base_specs) = plan_params(|b| config.build(b))?;
    let files = PeftAdapter::open(&dir)?;
    assert!(files.base_model().is_some_and(|named| named.ends_with(base)), "{name}");
    let plan = files.plan(&base_specs)?;
    let (_, specs) = plan_params(|b| plan.build(b, |b| config.build(b)))?;
    let trainable = |spec: &ParamSpec| plan.is_trained(spec);
    let options = StoreOptions { trainable: &trainable, ..StoreOptions::frozen(DType::F32, Device::Cpu) };
    let fill = AdapterFill::of_files(&checkpoint, &plan, &specs, &files);
    let store = ParamStore::new(specs.clone(), &options, &fill)?;
    let decoder = store.build(|b| plan.build(b, |b| config.build(b)))?;
    let expected = candle_core::safetensors::load(dir.join("expected.safetensors"), &Device::Cpu)?;
    Ok(Case { files, plan, base_specs, model: Loaded { checkpoint, store, decoder }, expected })
}

impl Case {
    fn tensor(&self, name: &str) -> Result<&Tensor> {
        Ok(self.expected.get(name).ok_or_else(|| format!("no {name} in expected.safetensors"))?)
    }

    fn ids(&self) -> Result<Tensor> {
        Ok(self.tensor("input_ids")?.to_dtype(DType::U32)?)
    }
}

#[test]
fn every_fixture_is_a_case() -> Result<()> {
    let entries = std::fs::read_dir(root().join("peft"))?.collect::<std::io::Result<Vec<_>>>()?;
    let mut found: Vec<String> = entries.iter().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    found.sort();
    assert_eq!(found, CASES.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    Ok(())
}

#[test]
fn logits_loss_and_every_gradient_are_those_of_peft() -> Result<()> {
    for (name, base) in CASES {
        let case = open(name, base)?;
        let ids = case.ids()?;
        let (b, t) = ids.dims2()?;
        let logit = max_abs(&(case.model.logits(&ids)? - case.tensor("logits")?)?)?;
        assert!(logit < TOLERANCE.0, "{name}: logits differ by {logit:.2e}");

        let targets = case.tensor("targets")?.flatten_all()?.to_vec1::<i64>()?;
        let counted = targets.iter().filter(|&&id| id >= 0).count();
        let targets: Vec<u32> = targets.iter().map(|&id| u32::try_from(id).unwrap_or(u32::MAX)).collect();
        let targets = Tensor::from_vec(targets, (b, t), &Device::Cpu)?;
        let mut cx = case.model.context(b, 0, t)?;
        let options = CrossEntropyOptions { scale: 1.0 / counted as f64, ..Default::default() };
        let first_stage = case.model.store.first_trained_stage().ok_or("nothing is trained")?;
        let step = StepOptions { first_stage, ..StepOptions::default() };
        let decoder = case.model.decoder.as_ref();
        let sums = forward_backward(decoder, &ids, (&targets).into(), &mut cx, &options, step)?;
        let want = f64::from(case.tensor("loss")?.flatten_all()?.to_vec1::<f32>()?[0]);
        let loss = (sums.mean() - want).abs();
        assert!(loss < TOLERANCE.1, "{name}: loss differs by {loss:.2e}");

        let mut worst = 0f64;
        let mut compared = 0;
        for param in case.model.store.params() {
            let Some(ours) = case.model.store.grad(param)? else {
                assert!(!case.plan.is_trained(&param.spec), "{name}: {} has no gradient", param.spec.name);
                continue;
            };
            let ours = if param.spec.stored_transposed { ours.t()? } else { ours };
            let theirs = case.tensor(&format!("base_model.model.{}", param.spec.name))?;
            let relative = max_abs(&(ours - theirs)?)? / max_abs(theirs)?;
            assert!(relative < TOLERANCE.2, "{name}: gradient of {}: {relative:.2e}", param.spec.name);
            (worst, compared) = (worst.max(relative), compared + 1);
        }
        let theirs = case.expected.keys().filter(|key| key.starts_with("base_model.")).count();
        assert_eq!(compared, theirs, "{name}: gradients compared and recorded");
        println!(
            "{name:16} logit {logit:.1e}, loss {loss:.1e}, gradient {worst:.1e} of its largest, {compared} of them"
        );
    }
    Ok(())
}

/// Values of the base with the adapter added.
struct Merged<'a>(&'a Case);

impl Fill for Merged<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow::nn::Result<()> {
        let case = self.0;
        if case.plan.is_trained(spec) {
            return case.files.fill(spec, out);
        }
        case.model.checkpoint.fill(spec, out)?;
        merge_into(&case.plan, &case.base_specs, spec, &case.files, 1.0, out)
    }
}

#[test]
fn merged_logits_are_those_of_peft() -> Result<()> {
    for (name, base) in CASES {
        let case = open(name, base)?;
        let config = case.model.checkpoint.config();
        let options = StoreOptions::frozen(DType::F32, Device::Cpu);
        let store = ParamStore::new(case.base_specs.clone(), &options, &Merged(&case))?;
        let decoder = store.build(|b| config.build(b))?;
        let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
        let merged = Loaded { checkpoint, store, decoder };
        let apart = max_abs(&(merged.logits(&case.ids()?)? - case.tensor("merged_logits")?)?)?;
        assert!(apart < TOLERANCE.0, "{name}: merged logits differ by {apart:.2e}");
        println!("{name:16} merged: logit {apart:.1e}");
    }
    Ok(())
}

#[test]
fn what_we_write_is_what_we_read() -> Result<()> {
    for (name, base) in CASES {
        let case = open(name, base)?;
        let dir = tempfile::tempdir()?;
        write_peft(dir.path(), &case.plan, &case.model.store, base, None)?;
        let again = PeftAdapter::open(dir.path())?;
        assert!(again.plan(&case.base_specs)?.is_same(&case.plan), "{name}");
        for param in case.model.store.trained() {
            let (mut a, mut b) = (vec![0f32; param.spec.num_elements()], vec![0f32; param.spec.num_elements()]);
            case.files.fill(&param.spec, &mut a)?;
            again.fill(&param.spec, &mut b)?;
            assert_eq!(a, b, "{name}: {}", param.spec.name);
        }
    }
    Ok(())
}

#[test]
fn an_adapter_of_another_model_is_an_error_that_names_it() -> Result<()> {
    let files = PeftAdapter::open(&root().join("peft/lora-qv"))?;
    for base in ["gpt2", "llama-head-dim"] {
        let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
        let config = checkpoint.config();
        let (_, specs) = plan_params(|b| config.build(b))?;
        let told = files.plan(&specs).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(told.contains("it was made for tests/fixtures/hf/llama-gqa"), "{base}: {told}");
    }
    let dir = tempfile::tempdir()?;
    assert!(PeftAdapter::open(dir.path()).is_err_and(|e| e.to_string().contains("adapter_config.json")));
    std::fs::write(dir.path().join("adapter_config.json"), r#"{"peft_type": "IA3"}"#)?;
    assert!(PeftAdapter::open(dir.path()).is_err_and(|e| e.to_string().contains("adapter_model.safetensors")));
    std::fs::copy(root().join("peft/lora-qv/adapter_model.safetensors"), dir.path().join("adapter_model.safetensors"))?;
    assert!(PeftAdapter::open(dir.path()).is_err_and(|e| e.to_string().contains("IA3")));
    for (config, said) in [
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "all"}"#, "bias"),
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"}"#, "pissa"),
        (r#"{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_parameters": ["x"]}"#, "target_parameters"),
        ("{", "JSON"),
    ] {
        std::fs::write(dir.path().join("adapter_config.json"), config)?;
        let told = PeftAdapter::open(dir.path()).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(told.contains(said), "{config}: {told}");
    }
    Ok(())
}
