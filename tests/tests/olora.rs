//! OLoRA beside `peft` (`scripts/fixtures/peft_olora.py`): where the adapter starts, what it computes there and after a step,
//! over a packed base and in bf16; and the files, which are plain LoRA of twice the rank.

#[allow(dead_code, reason = "parity.rs reads more of a fixture")]
mod hf_fixture;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hf_fixture::{Loaded, Result};
use tallow::adapters::{AdapterFill, AdapterPlan, LoraConfig, LoraInit, PeftAdapter, SavedAdapter, write_peft};
use tallow::formats::hf::ModelDir;
use tallow::models::{Checkpoint, Quantization, QuantizeConfig, QuantizedBase};
use tallow::nn::{Fill, Pack, Param, ParamSpec, ParamStore, RandomInit, StoreOptions, plan_params};
use tallow::ops::{CrossEntropyOptions, FourBitKind};
use tallow::train::{StepOptions, forward_backward};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn base() -> Result<Checkpoint> {
    Ok(Checkpoint::open_dir(&ModelDir::open(&root().join("hf/llama-gqa"))?)?)
}

fn expected() -> Result<HashMap<String, Tensor>> {
    Ok(candle_core::safetensors::load(root().join("olora.safetensors"), &Device::Cpu)?)
}

fn settings() -> LoraConfig {
    LoraConfig { rank: 3, alpha: 5.0, init: LoraInit::Olora, ..LoraConfig::default() }
}

/// The model of `base` with a new adapter, and the plan of both.
fn begun(config: &LoraConfig, dtype: DType, quantize: Option<QuantizeConfig>) -> Result<(Loaded, AdapterPlan)> {
    let checkpoint = base()?;
    let model = checkpoint.config();
    let (_, base_specs) = plan_params(|b| model.build(b))?;
    let plan = AdapterPlan::new(config, &base_specs)?;
    let (_, specs) = plan_params(|b| plan.build(b, |b| model.build(b)))?;
    let store = {
        let packed = quantize.map(|q| QuantizedBase::new(q, &checkpoint, &base_specs)).transpose()?;
        let pack = packed.as_ref().map(|pack| plan.pack(pack));
        let pack = pack.as_ref().map(|pack| pack as &dyn Pack);
        let trainable = |spec: &ParamSpec| plan.is_trained(spec);
        let options = StoreOptions { trainable: &trainable, pack, ..StoreOptions::frozen(dtype, Device::Cpu) };
        let fill = AdapterFill::new(&checkpoint, &plan, &specs, pack, dtype, RandomInit { seed: 1 })?;
        ParamStore::new(specs.clone(), &options, &fill)?
    };
    let decoder = store.build(|b| plan.build(b, |b| model.build(b)))?;
    Ok((Loaded { checkpoint, store, decoder }, plan))
}

fn max_abs(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
}

fn apart(a: &Tensor, b: &Tensor) -> Result<f64> {
    max_abs(&(a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?)
}

/// Mean loss of the fixture's rows; gradients are added to the store.
fn step(model: &Loaded, ids: &Tensor) -> Result<f64> {
    let (b, t) = ids.dims2()?;
    let next = ids.narrow(1, 1, t - 1)?;
    let none = Tensor::full(u32::MAX, (b, 1), &Device::Cpu)?;
    let targets = Tensor::cat(&[&next, &none], 1)?.contiguous()?;
    let options = CrossEntropyOptions { scale: 1.0 / (b * (t - 1)) as f64, ..Default::default() };
    let first_stage = model.store.first_trained_stage().ok_or("nothing is trained")?;
    let step = StepOptions { first_stage, ..StepOptions::default() };
    let decoder = model.decoder.as_ref();
    Ok(forward_backward(decoder, ids, (&targets).into(), &mut model.context(b, 0, t)?, &options, step)?.mean())
}

/// Takes a tenth of its gradient from every trained parameter.
fn descend(store: &ParamStore) -> Result<()> {
    for bucket in store.buckets() {
        let (Some(master), Some(grad)) = (&bucket.master, &bucket.grad) else { continue };
        master.slice_set(&(master - (grad * 0.1)?)?, 0, 0)?;
        if bucket.compute.dtype() != master.dtype() {
            tallow::ops::cast_to_bf16(master, &bucket.compute)?;
        }
    }
    Ok(())
}

fn named<'a>(store: &'a ParamStore, module: &str, part: &str) -> Result<&'a Param> {
    let name = format!("{module}.{part}.weight");
    Ok(store.params().iter().find(|p| p.spec.name == name).ok_or(name)?)
}

#[test]
fn it_starts_where_peft_starts_it_and_moves_as_there() -> Result<()> {
    let expected = expected()?;
    let ids = expected["input_ids"].to_dtype(DType::U32)?;
    let (model, plan) = begun(&settings(), DType::F32, None)?;
    let start = apart(&model.logits(&ids)?, &expected["logits"])?;
    assert!(start < 2e-5, "logits at the start: {start:.2e}");
    let loss = step(&model, &ids)? - f64::from(expected["loss"].flatten_all()?.to_vec1::<f32>()?[0]);
    assert!(loss.abs() < 2e-6, "loss {loss:.2e}");
    let (mut products, mut gradients) = (0f64, 0f64);
    for (module, _) in plan.modules() {
        let (a, b) = (named(&model.store, module, "lora_A")?, named(&model.store, module, "lora_B")?);
        let of = |name: &str| expected.get(&format!("{name}.A")).zip(expected.get(&format!("{name}.B")));
        let (their_a, their_b) = of(module).ok_or("no start")?;
        let product = model.store.value(b)?.matmul(&model.store.value(a)?)?;
        let their_product = their_b.matmul(their_a)?;
        products = products.max(apart(&product, &their_product)? / max_abs(&their_product)?);
        // The columns of Q have a sign of their own each, so the gradients are compared through what does not: dB A and B dA.
        let (their_da, their_db) = of(&format!("grad.{module}")).ok_or("no gradients")?;
        let grad = |param| -> Result<Tensor> { Ok(model.store.grad(param)?.ok_or("no gradient")?) };
        let ours = [grad(b)?.matmul(&model.store.value(a)?)?, model.store.value(b)?.matmul(&grad(a)?)?];
        for (ours, theirs) in ours.iter().zip([their_db.matmul(their_a)?, their_b.matmul(their_da)?]) {
            gradients = gradients.max(apart(ours, &theirs)? / max_abs(&theirs)?);
        }
    }
    println!("start {start:.1e}, products {products:.1e}, gradients {gradients:.1e}");
    assert!(products < 1e-5 && gradients < 2e-5, "products {products:.2e}, gradients {gradients:.2e}");
    descend(&model.store)?;
    let moved = apart(&model.logits(&ids)?, &expected["moved_logits"])?;
    let way = apart(&expected["moved_logits"], &expected["logits"])?;
    assert!(moved < 2e-5 && way > 1e-2, "after a step: {moved:.2e} of {way:.2e}");
    Ok(())
}

#[test]
fn over_a_packed_base_and_in_bf16_it_starts_as_the_base() -> Result<()> {
    let ids = expected()?["input_ids"].to_dtype(DType::U32)?;
    let nf4 = QuantizeConfig {
        projections: Quantization::FourBit(FourBitKind::Nf4),
        embeddings: Quantization::None,
        block: 64,
        double: true,
    };
    // In bf16 a sum is rounded where its parts are added: not the same bits, though the parts cancel.
    for (dtype, quantize, tolerance) in
        [(DType::F32, Some(nf4), 5e-6), (DType::BF16, None, 2e-2), (DType::BF16, Some(nf4), 2e-2)]
    {
        let (model, plan) = begun(&settings(), dtype, quantize)?;
        let plain = LoraConfig { init: LoraInit::Kaiming, ..settings() };
        let (base, _) = begun(&plain, dtype, quantize)?;
        let (ours, want) = (model.logits(&ids)?, base.logits(&ids)?);
        let norm = |x: &Tensor| -> Result<f32> { Ok(x.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt()) };
        let start = norm(&(&ours - &want)?)? / norm(&want)?;
        println!("{dtype:?} {}: {start:.1e}", quantize.is_some());
        assert!(start < tolerance, "{dtype:?}: {start:.2e}");
        assert_eq!(model.store.packed().len(), if quantize.is_some() { 14 } else { 0 });
        for (module, _) in plan.modules() {
            for part in ["A", "B"] {
                let now = model.store.value(named(&model.store, module, &format!("lora_{part}"))?)?;
                let start = model.store.value(named(&model.store, module, &format!("lora_start_{part}"))?)?;
                assert_eq!(apart(&now, &start)?, 0.0, "{module} {part}");
            }
        }
    }
    Ok(())
}

#[test]
fn its_files_are_plain_lora_of_twice_the_rank_and_it_goes_on_from_them() -> Result<()> {
    let ids = expected()?["input_ids"].to_dtype(DType::U32)?;
    let mut ranks = settings();
    ranks.ranks = [("q_proj".to_owned(), 2)].into();
    ranks.alphas = [("v_proj".to_owned(), 7.0)].into();
    for config in [settings(), LoraConfig { rslora: true, ..ranks }] {
        let (model, plan) = begun(&config, DType::F32, None)?;
        step(&model, &ids)?;
        descend(&model.store)?;
        let trained = model.logits(&ids)?;
        let dir = tempfile::tempdir()?;
        write_peft(dir.path(), &plan, &model.store, "llama-gqa", None)?;

        let files = PeftAdapter::open(dir.path())?;
        let checkpoint = base()?;
        let shape = checkpoint.config();
        let (_, base_specs) = plan_params(|b| shape.build(b))?;
        let read = files.plan(&base_specs)?;
        assert!(plan.in_files().is_same(&read) && !plan.is_same(&read));
        let (_, specs) = plan_params(|b| read.build(b, |b| shape.build(b)))?;
        let fill = AdapterFill::of_files(&checkpoint, &read, &specs, &files);
        let store = ParamStore::new(specs.clone(), &StoreOptions::frozen(DType::F32, Device::Cpu), &fill)?;
        let decoder = store.build(|b| read.build(b, |b| shape.build(b)))?;
        let again = Loaded { checkpoint: base()?, store, decoder };
        let differ = apart(&again.logits(&ids)?, &trained)?;
        assert!(differ < 1e-5, "{differ:.2e}");

        let saved = SavedAdapter::new(PeftAdapter::open(dir.path())?, plan.clone());
        let ours = model.store.params().iter().filter(|p| plan.is_trained(&p.spec) || plan.is_start(&p.spec));
        let mut compared = 0;
        for param in ours {
            let mut values = vec![f32::NAN; param.spec.num_elements()];
            saved.fill(&param.spec, &mut values)?;
            assert_eq!(values, model.store.value(param)?.flatten_all()?.to_vec1::<f32>()?, "{}", param.spec.name);
            compared += 1;
        }
        assert_eq!(compared, 4 * plan.modules().count());
    }
    Ok(())
}

#[test]
fn what_it_cannot_do_is_an_error_that_names_it() -> Result<()> {
    let checkpoint = base()?;
    let (_, specs) = plan_params(|b| checkpoint.config().build(b))?;
    for name in ["lm_head", "embed_tokens"] {
        let targets = tallow::adapters::Targets::Names(vec![name.into()]);
        let told = AdapterPlan::new(&LoraConfig { targets, ..settings() }, &specs).err().map(|e| e.to_string());
        assert!(told.as_ref().is_some_and(|told| told.contains("init") && told.contains(name)), "{told:?}");
    }
    let told = AdapterPlan::new(&LoraConfig { dora: true, ..settings() }, &specs).err().map(|e| e.to_string());
    assert!(told.as_ref().is_some_and(|told| told.contains("DoRA")), "{told:?}");
    Ok(())
}
