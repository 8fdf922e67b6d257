//! Adapters beside a base of fewer bits: against the same adapter beside the same values in f32, and what the base takes.

#[path = "../../crates/formats/tests/support/gguf.rs"]
mod gguf;
#[allow(dead_code, reason = "parity.rs reads more of a fixture")]
mod hf_fixture;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use gguf::{Gguf, Meta};
use hf_fixture::{Loaded, Result};
use tallow::adapters::{AdapterFill, AdapterPlan, LoraConfig, PeftAdapter};
use tallow::formats::gguf::{GgmlType, GgufFile};
use tallow::formats::hf::ModelDir;
use tallow::models::{Checkpoint, Quantization, QuantizeConfig, QuantizedBase, parse_config};
use tallow::nn::{Fill, Init, Pack, ParamSpec, ParamStore, RandomInit, StoreOptions, plan_params};
use tallow::ops::{CrossEntropyOptions, FourBitKind};
use tallow::train::{Held, StepOptions, forward_backward};

const NF4: Quantization = Quantization::FourBit(FourBitKind::Nf4);
const FP4: Quantization = Quantization::FourBit(FourBitKind::Fp4);

fn config(projections: Quantization, embeddings: Quantization, block: usize, double: bool) -> QuantizeConfig {
    QuantizeConfig { projections, embeddings, block, double }
}

/// The values that a packed base stands for, as numbers; what is trained as it is.
struct Unpacked<'a>(&'a dyn Fill, &'a dyn Pack, &'a AdapterPlan);

impl Fill for Unpacked<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow::nn::Result<()> {
        let matrix = if self.2.is_trained(spec) { None } else { self.1.pack(spec, self.0)? };
        match matrix {
            Some(matrix) => matrix.unpack(0..matrix.dims().0, out),
            None => self.0.fill(spec, out)?,
        }
        Ok(())
    }
}

/// What becomes of the base.
#[derive(Clone, Copy)]
enum Base<'a> {
    Whole,
    Packed(&'a dyn Pack),
    /// Packed and unpacked again, held as f32.
    Unpacked(&'a dyn Pack),
}

/// What stands beside it.
#[derive(Clone, Copy)]
enum Adapter<'a> {
    Files(&'a PeftAdapter),
    /// Random, `lora_B` too.
    Random(&'a LoraConfig),
}

/// A new adapter whose second matrices are no zeros.
struct Begun<'a>(&'a dyn Fill);

impl Fill for Begun<'_> {
    fn fill(&self, spec: &ParamSpec, out: &mut [f32]) -> tallow::nn::Result<()> {
        match spec.name.ends_with("lora_B.weight") {
            true => RandomInit { seed: 7 }.fill(&ParamSpec { init: Init::Normal(0.1), ..spec.clone() }, out),
            false => self.0.fill(spec, out),
        }
    }
}

/// The model with an adapter.
fn adapted(checkpoint: Checkpoint, adapter: Adapter, base: Base, dtype: DType) -> Result<(Loaded, AdapterPlan)> {
    let model = checkpoint.config();
    let (_, base_specs) = plan_params(|b| model.build(b))?;
    let plan = match adapter {
        Adapter::Files(files) => files.plan(&base_specs)?,
        Adapter::Random(config) => AdapterPlan::new(config, &base_specs)?,
    };
    let (_, specs) = plan_params(|b| plan.build(b, |b| model.build(b)))?;
    let trainable = |spec: &ParamSpec| plan.is_trained(spec);
    let pack = if let Base::Packed(pack) = base { Some(pack) } else { None };
    let options = StoreOptions { trainable: &trainable, pack, ..StoreOptions::frozen(dtype, Device::Cpu) };
    let fill = match adapter {
        Adapter::Files(files) => AdapterFill::of_files(&checkpoint, &plan, &specs, files),
        Adapter::Random(_) => {
            let pack = if let Base::Packed(pack) | Base::Unpacked(pack) = base { Some(pack) } else { None };
            AdapterFill::new(&checkpoint, &plan, &specs, pack, dtype, RandomInit { seed: 3 })?
        }
    };
    let begun = Begun(&fill);
    let fill: &dyn Fill = if let Adapter::Random(_) = adapter { &begun } else { &fill };
    let store = match base {
        Base::Unpacked(pack) => ParamStore::new(specs.clone(), &options, &Unpacked(fill, pack, &plan))?,
        _ => ParamStore::new(specs.clone(), &options, fill)?,
    };
    let decoder = store.build(|b| plan.build(b, |b| model.build(b)))?;
    Ok((Loaded { checkpoint, store, decoder }, plan))
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// By name.
type Gradients = Vec<(String, Vec<f32>)>;

fn loss_and_gradients(model: &Loaded, ids: &Tensor) -> Result<(f64, Gradients)> {
    let (b, t) = ids.dims2()?;
    let options = CrossEntropyOptions { scale: 1.0 / (b * t) as f64, ..Default::default() };
    let step = StepOptions {
        first_stage: model.store.first_trained_stage().ok_or("nothing is trained")?,
        ..StepOptions::default()
    };
    let mut cx = model.context(b, 0, t)?;
    let sums = forward_backward(model.decoder.as_ref(), ids, ids.into(), &mut cx, &options, step)?;
    let mut gradients = vec![];
    for param in model.store.params() {
        if let Some(grad) = model.store.grad(param)? {
            gradients.push((param.spec.name.clone(), grad.flatten_all()?.to_vec1()?));
        }
    }
    Ok((sums.mean(), gradients))
}

#[test]
fn a_packed_base_gives_the_losses_and_gradients_of_its_values() -> Result<()> {
    let settings = [
        config(NF4, NF4, 64, true),
        config(FP4, Quantization::None, 32, false),
        config(Quantization::None, NF4, 128, false),
    ];
    for (name, base) in [
        ("lora-all-linear", "mistral-window"),
        ("dora", "llama-gqa"),
        ("embedding", "llama-gqa"),
        ("embedding-tied", "llama-tied"),
        ("gpt2", "gpt2"),
        ("gpt2-dora", "gpt2-untied"),
        ("save-head", "llama-gqa"),
    ] {
        let open =
            || -> Result<Checkpoint> { Ok(Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?) };
        let (source, files) = (open()?, PeftAdapter::open(&root().join("peft").join(name))?);
        let expected =
            candle_core::safetensors::load(root().join("peft").join(name).join("expected.safetensors"), &Device::Cpu)?;
        let ids = expected.get("input_ids").ok_or("no ids")?.to_dtype(DType::U32)?;
        for setting in settings {
            let (_, specs) = plan_params(|b| source.config().build(b))?;
            let pack = QuantizedBase::new(setting, &source, &specs)?;
            let (packed, plan) = adapted(open()?, Adapter::Files(&files), Base::Packed(&pack), DType::F32)?;
            let (plain, _) = adapted(open()?, Adapter::Files(&files), Base::Unpacked(&pack), DType::F32)?;
            let what = format!("{name} over {setting:?}");
            assert!(!packed.store.packed().is_empty(), "{what}");
            for param in packed.store.packed() {
                assert!(!plan.is_trained(&param.spec), "{what}: {} is trained", param.spec.name);
                assert_eq!(Some(param.matrix.bytes()), pack.planned_bytes(&param.spec)?, "{what}: {}", param.spec.name);
            }
            let (a, b) = (loss_and_gradients(&packed, &ids)?, loss_and_gradients(&plain, &ids)?);
            // A packed head is summed in other parts; all else is the same arithmetic.
            assert!((a.0 - b.0).abs() <= 1e-6, "{what}: losses {} and {}", a.0, b.0);
            assert_eq!(a.1.len(), b.1.len(), "{what}");
            for ((name, a), (_, b)) in a.1.iter().zip(&b.1) {
                let largest = b.iter().fold(0f32, |most, x| most.max(x.abs()));
                let apart = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
                assert!(largest > 0.0 && apart <= 1e-5 * largest, "{what}: {name} {apart:e} of {largest:e}");
            }
            // And 4 bits are not the model itself.
            let (whole, _) = adapted(open()?, Adapter::Files(&files), Base::Whole, DType::F32)?;
            assert!((loss_and_gradients(&whole, &ids)?.0 - a.0).abs() > 1e-6, "{what}: nothing was quantized");
        }
    }
    Ok(())
}

/// The norm of the difference as a share of the second's.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let norm = b.iter().map(|&b| square(b.into())).sum::<f64>().sqrt();
    a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum::<f64>().sqrt() / norm
}

/// Largest differences of what `a` and `b` are made of, as shares of the norms: of the logits, and of any gradient.
fn differences(a: &(Vec<f32>, Gradients), b: &(Vec<f32>, Gradients)) -> (f64, f64) {
    assert!(!a.1.is_empty() && a.1.len() == b.1.len());
    let each = a.1.iter().zip(&b.1).map(|((_, a), (_, b))| apart(a, b));
    (apart(&a.0, &b.0), each.fold(0.0, |most: f64, x| if x > most || x.is_nan() { x } else { most }))
}

/// Of bf16 beside an equal base in bf16, which differs by no more than the order of sums (measured: not at all), and beside it in
/// f32: of the logits and of any gradient, where layers amplify the rounding (measured
/// up to 2.1e-2 and 0.23, the latter in `gpt2-untied`, whose attention is nearly one-hot; 4.1e-2 over blocks of Q8_0).
const IN_BF16: (f64, (f64, f64)) = (1.0 / 256.0, (3e-2, 0.35));

#[test]
fn a_packed_base_in_bf16_gives_what_its_values_in_bf16_give() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let blocks = |kind| checkpoint(dir.path(), &quantized_llama(kind, 1e-3));
    let compare =
        |open: &dyn Fn() -> Result<Checkpoint>, adapter: Adapter, setting, ids: &Tensor, what: &str| -> Result<()> {
            let source = open()?;
            let (_, specs) = plan_params(|b| source.config().build(b))?;
            let pack = QuantizedBase::new(setting, &source, &specs)?;
            let made = |base, dtype| -> Result<(Vec<f32>, Gradients)> {
                let (model, _) = adapted(open()?, adapter, base, dtype)?;
                assert_eq!(model.store.packed().is_empty(), !matches!(base, Base::Packed(_)), "{what}");
                let logits = model.logits(ids)?.flatten_all()?.to_vec1()?;
                Ok((logits, loss_and_gradients(&model, ids)?.1))
            };
            let packed = made(Base::Packed(&pack), DType::BF16)?;
            let same = differences(&packed, &made(Base::Unpacked(&pack), DType::BF16)?);
            let rounded = differences(&packed, &made(Base::Unpacked(&pack), DType::F32)?);
            println!("{what:24} bf16 {:.1e} {:.1e}; f32 {:.1e} {:.1e}", same.0, same.1, rounded.0, rounded.1);
            assert!(same.0 < IN_BF16.0 && same.1 < IN_BF16.0, "{what}: {same:?}");
            assert!(rounded.0 < IN_BF16.1.0 && rounded.1 < IN_BF16.1.1, "{what}: {rounded:?}");
            Ok(())
        };
    for (name, base) in [
        ("lora-all-linear", "mistral-window"),
        ("dora", "llama-gqa"),
        ("embedding", "llama-gqa"),
        ("gpt2", "gpt2"),
        ("gpt2-dora", "gpt2-untied"),
        ("save-head", "llama-gqa"),
    ] {
        let open =
            || -> Result<Checkpoint> { Ok(Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?) };
        let files = PeftAdapter::open(&root().join("peft").join(name))?;
        let expected =
            candle_core::safetensors::load(root().join("peft").join(name).join("expected.safetensors"), &Device::Cpu)?;
        let ids = expected.get("input_ids").ok_or("no ids")?.to_dtype(DType::U32)?;
        compare(&open, Adapter::Files(&files), config(NF4, NF4, 64, true), &ids, name)?;
    }
    let ids = Tensor::from_vec((0..24).map(|i| i * 7 % 19).collect::<Vec<u32>>(), (2, 12), &Device::Cpu)?;
    for dora in [false, true] {
        let lora = LoraConfig { rank: 4, alpha: 8.0, dora, ..LoraConfig::default() };
        for (kind, keep) in [(8, Quantization::Q8_0), (2, Quantization::Gguf), (8, NF4)] {
            let setting = config(keep, keep, 64, true);
            compare(
                &|| blocks(kind),
                Adapter::Random(&lora),
                setting,
                &ids,
                &format!("blocks {kind} {keep} dora {dora}"),
            )?;
        }
    }
    Ok(())
}

/// A tiny llama whose matrices hold arbitrary blocks: rows of 64 values in Q8_0 (type 8) or Q4_0 (2), with scales from `scale` to
/// three times that.
fn quantized_llama(kind: u32, scale: f32) -> Gguf {
    let block_bytes = if kind == 8 { 34 } else { 18 };
    let blocks = |rows: usize, columns: usize, salt: usize| -> Vec<u8> {
        let block = |i: usize| {
            let scale = half_bits(scale * (1.0 + 0.2 * ((i * 7 + salt) % 11) as f32)).to_le_bytes();
            scale.into_iter().chain((2..block_bytes).map(move |j| ((i * 131 + j * 17 + salt * 29) % 251) as u8))
        };
        (0..rows * columns / 32).flat_map(block).collect()
    };
    let mut gguf = Gguf::new()
        .meta("general.architecture", Meta::text("llama"))
        .meta("llama.embedding_length", Meta::U32(64))
        .meta("llama.feed_forward_length", Meta::U32(96))
        .meta("llama.block_count", Meta::U32(1))
        .meta("llama.attention.head_count", Meta::U32(4))
        .meta("llama.attention.head_count_kv", Meta::U32(2))
        .meta("llama.context_length", Meta::U32(16))
        .meta("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
    let matrices = [
        ("token_embd", 19, 64),
        ("blk.0.attn_q", 64, 64),
        ("blk.0.attn_k", 32, 64),
        ("blk.0.attn_v", 32, 64),
        ("blk.0.attn_output", 64, 64),
        ("blk.0.ffn_gate", 96, 64),
        ("blk.0.ffn_up", 96, 64),
        ("blk.0.ffn_down", 64, 96),
    ];
    for (salt, (name, rows, columns)) in matrices.into_iter().enumerate() {
        let dims = [columns as u64, rows as u64];
        gguf = gguf.tensor(&format!("{name}.weight"), &dims, kind, blocks(rows, columns, salt));
    }
    ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]
        .into_iter()
        .fold(gguf, |gguf, name| gguf.f32s(&format!("{name}.weight"), &[64], 1.0))
}

/// An f16 of a positive normal number.
fn half_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    ((((bits >> 23) as i32 - 127 + 15) as u16) << 10) | ((bits >> 13) & 0x3ff) as u16
}

fn checkpoint(dir: &Path, gguf: &Gguf) -> Result<Checkpoint> {
    let path = dir.join("m.gguf");
    std::fs::write(&path, gguf.build())?;
    Ok(Checkpoint::open_gguf(GgufFile::open(&path)?)?)
}

#[test]
fn the_blocks_of_a_gguf_file_are_kept_as_they_are() -> Result<()> {
    for (kind, keep) in [(8, Quantization::Q8_0), (8, Quantization::Gguf), (2, Quantization::Stored(GgmlType::Q4_0))] {
        let dir = tempfile::tempdir()?;
        let checkpoint = checkpoint(dir.path(), &quantized_llama(kind, 0.01))?;
        let (_, specs) = plan_params(|b| checkpoint.config().build(b))?;
        let pack = QuantizedBase::new(config(keep, keep, 64, true), &checkpoint, &specs)?;
        let mut kept = 0;
        for spec in &specs {
            let mut values = vec![0f32; spec.num_elements()];
            checkpoint.fill(spec, &mut values)?;
            let Some(matrix) = pack.pack(spec, &checkpoint)? else {
                assert_eq!(spec.shape.len(), 1, "{}", spec.name);
                continue;
            };
            let mut unpacked = vec![f32::NAN; values.len()];
            matrix.unpack(0..spec.shape[0], &mut unpacked);
            assert_eq!(unpacked, values, "{} in {keep}", spec.name);
            assert_eq!(Some(matrix.bytes()), pack.planned_bytes(spec)?);
            kept += 1;
        }
        assert_eq!(kept, 8, "{keep}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_kept_is_refused_with_what_there_is() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let of_blocks = checkpoint(dir.path(), &quantized_llama(2, 0.01))?;
    let of_numbers = Checkpoint::open_dir(&ModelDir::open(&root().join("hf/llama-gqa"))?)?;
    let error = |checkpoint: &Checkpoint, config| -> Result<String> {
        let (_, specs) = plan_params(|b| checkpoint.config().build(b))?;
        Ok(QuantizedBase::new(config, checkpoint, &specs).err().ok_or("was taken")?.to_string())
    };
    let none = Quantization::None;
    let other = error(&of_blocks, config(Quantization::Stored(GgmlType::Q6_K), none, 64, true))?;
    assert!(other.contains("blocks of q4_0, not of q6_k"), "{other}");
    let numbers = error(&of_numbers, config(Quantization::Gguf, none, 64, true))?;
    assert!(numbers.contains("no quantized blocks") && numbers.contains("nf4"), "{numbers}");
    let rows = error(&of_numbers, config(NF4, Quantization::Q8_0, 64, true))?;
    assert!(rows.contains("quantize_embeddings") && rows.contains("blocks of 32"), "{rows}");
    let block = error(&of_blocks, config(NF4, none, 48, true))?;
    assert!(block.contains("power of two"), "{block}");
    assert!("q9".parse::<Quantization>().is_err_and(|e| e.contains("nf4, fp4 and q8_0")));
    for name in ["none", "nf4", "fp4", "q8_0", "gguf", "q4_k", "q6_k"] {
        assert_eq!(name.parse::<Quantization>()?.to_string(), name);
    }
    Ok(())
}

#[test]
fn a_base_of_a_thousand_million_parameters_takes_at_most_six_tenths_of_a_byte_each() -> Result<()> {
    // TinyLlama-1.1B: what `quantize = "nf4"` gives without further settings, and Llama-3.2-1B, a quarter of which is its
    // embedding, with that in 4 bits as well.
    let tinyllama = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    });
    let llama = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "tie_word_embeddings": true,
    });
    let any = Checkpoint::open_dir(&ModelDir::open(&root().join("hf/llama-gqa"))?)?;
    for (name, keys, embeddings) in [("TinyLlama-1.1B", tinyllama, Quantization::Q8_0), ("Llama-3.2-1B", llama, NF4)] {
        let model = parse_config(&keys)?.config;
        let (_, base) = plan_params(|b| model.build(b))?;
        let pack = QuantizedBase::new(config(NF4, embeddings, 64, true), &any, &base)?;
        let plan = AdapterPlan::new(&LoraConfig::default(), &base)?;
        let (_, specs) = plan_params(|b| plan.build(b, |b| model.build(b)))?;
        let held = Held::adapted(&plan, &specs, model.shape().num_layers, Some(&pack))?;
        let parameters: usize = base.iter().map(ParamSpec::num_elements).sum();
        let each = (held.packed + 4 * held.frozen) as f64 / parameters as f64;
        println!("{name}: {parameters} parameters, {each:.4} bytes each");
        assert!(parameters > 1_000_000_000 && each <= 0.6, "{name}: {each}");

        // And what a block takes is what its plan says: one of them is packed.
        for spec in base.iter().filter(|spec| spec.name.contains("layers.0.")) {
            let matrix = pack.pack(spec, &RandomInit { seed: 1 })?;
            assert_eq!(matrix.map(|m| m.bytes()), pack.planned_bytes(spec)?, "{}", spec.name);
        }
    }
    Ok(())
}
