//! Adapters as GGUF files: what is written, and that it is the same adapter when it is read back.

#[allow(dead_code, reason = "parity.rs reads more of a fixture")]
mod hf_fixture;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use hf_fixture::{Loaded, Result};
use tallow::adapters::{AdapterFill, PeftAdapter};
use tallow::formats::TensorSource;
use tallow::formats::gguf::GgufFile;
use tallow::formats::hf::ModelDir;
use tallow::gguf_adapter::{Parts, open_adapter, write_adapter};
use tallow::models::Checkpoint;
use tallow::nn::{Fill, ParamStore, StoreOptions, plan_params};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn write(name: &str, base: &str, out: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
    let config = checkpoint.config();
    let (_, specs) = plan_params(|b| config.build(b))?;
    let files = PeftAdapter::open(&root().join("peft").join(name))?;
    let plan = files.plan(&specs)?;
    Ok(write_adapter(out, Parts { model: &checkpoint, config, base: &specs, plan: &plan, files: &files })?)
}

fn values(file: &dyn TensorSource, name: &str) -> Result<Vec<f32>> {
    let mut values = vec![0f32; file.info(name).ok_or(name)?.num_elements()];
    file.read_f32(name, &mut values)?;
    Ok(values)
}

#[test]
fn an_adapter_comes_back_with_its_products() -> Result<()> {
    let cases = [
        ("lora-all-linear", "mistral-window"),
        ("lora-qv", "llama-gqa"),
        ("embedding", "llama-gqa"),
        ("patterns", "llama-head-dim"),
        ("rslora", "llama-biases"),
        ("gpt2", "gpt2"),
    ];
    for (name, base) in cases {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("adapter.gguf");
        write(name, base, &out)?;
        let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
        let config = checkpoint.config();
        let (_, specs) = plan_params(|b| config.build(b))?;
        let before = PeftAdapter::open(&root().join("peft").join(name))?;
        let after = open_adapter(&out, config, &specs)?;
        let (old, new) = (before.plan(&specs)?, after.plan(&specs)?);
        for spec in &specs {
            let Some(module) = spec.name.strip_suffix(".weight") else { continue };
            let Some((_, was)) = old.modules().find(|(m, _)| *m == module) else { continue };
            let (_, is) = new.modules().find(|(m, _)| *m == module).ok_or(module)?;
            for (matrix, factor) in old.specs_of(module, spec).iter().zip([1.0, was.scale / is.scale]) {
                let (mut x, mut y) = (vec![0f32; matrix.num_elements()], vec![0f32; matrix.num_elements()]);
                before.fill(matrix, &mut x)?;
                after.fill(matrix, &mut y)?;
                let same =
                    |(x, y): (&f32, &f32)| (f64::from(*x) * factor - f64::from(*y)).abs() <= 1e-6 * f64::from(x.abs());
                assert!(x.iter().zip(&y).all(same), "{name}: {}", matrix.name);
            }
        }
        assert_eq!(old.modules().count(), new.modules().count(), "{name}");
    }
    Ok(())
}

#[test]
fn what_llama_cpp_has_no_adapters_for_is_refused() -> Result<()> {
    let cases = [
        ("dora", "llama-gqa", "tallow merge"),
        ("save-head", "llama-gqa", "tallow merge"),
        ("save-norms", "llama-rope-llama3", "tallow merge"),
        ("embedding-tied", "llama-tied", "tied"),
    ];
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("adapter.gguf");
    for (name, base, says) in cases {
        let told = write(name, base, &out).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(told.contains(says) && !out.exists(), "{name}: {told}");
    }
    Ok(())
}

#[test]
fn header_names_and_row_order_are_llama_cpps() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("adapter.gguf");
    write("lora-qv", "llama-gqa", &out)?;
    let file = GgufFile::open(&out)?;
    assert_eq!(file.get_str("general.type")?, "adapter");
    assert_eq!(file.get_str("general.architecture")?, "llama");
    assert_eq!(file.get_str("adapter.type")?, "lora");
    assert_eq!(file.get_f32("adapter.lora.alpha")?, 8.0);
    let peft =
        tallow::formats::safetensors::SafetensorsFile::open(&root().join("peft/lora-qv/adapter_model.safetensors"))?;
    let theirs = |module: &str| values(&peft, &format!("base_model.model.model.layers.1.self_attn.{module}.weight"));
    for (ours, module) in [("attn_q.weight.lora_a", "q_proj.lora_A"), ("attn_v.weight.lora_b", "v_proj.lora_B")] {
        assert_eq!(values(&file, &format!("blk.1.{ours}"))?, theirs(module)?, "{ours}");
    }
    Ok(())
}

#[test]
fn rows_of_queries_and_of_fewer_keys_have_the_order_of_gguf() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("adapter.gguf");
    write("lora-all-linear", "mistral-window", &out)?;
    let written = GgufFile::open(&out)?;
    let peft = root().join("peft/lora-all-linear/adapter_model.safetensors");
    let peft = tallow::formats::safetensors::SafetensorsFile::open(&peft)?;
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf/mistral-window"))?)?;
    let (head, rank) = (checkpoint.config().shape().head_dim, 4);
    for (module, name, heads) in [("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)] {
        let theirs = values(&peft, &format!("base_model.model.model.layers.1.self_attn.{module}.lora_B.weight"))?;
        assert_eq!(theirs.len(), heads * head * rank, "{module}");
        // Row `half * pairs + i` of a head is row `2 i + half` in GGUF: so we write it, and so llama.cpp's script does.
        for file in [&written, &GgufFile::open(&llama_cpps("lora-all-linear"))?] {
            let stored = values(file, &format!("blk.1.{name}.weight.lora_b"))?;
            for row in 0..heads * head {
                let (h, within) = (row / head, row % head);
                let to = h * head + 2 * (within % (head / 2)) + within / (head / 2);
                assert_eq!(theirs[row * rank..][..rank], stored[to * rank..][..rank], "{module}: row {row}");
            }
        }
    }
    Ok(())
}

/// Adapters that llama.cpp's own script converted, and their bases.
const LLAMA_CPPS: [(&str, &str); 2] = [("lora-all-linear", "mistral-window"), ("embedding", "llama-gqa")];

fn llama_cpps(name: &str) -> PathBuf {
    root().join("llama_cpp_lora").join(format!("{name}.gguf"))
}

#[test]
fn adapters_that_llama_cpp_converted_give_the_logits_of_peft() -> Result<()> {
    for (name, base) in LLAMA_CPPS {
        let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
        let config = checkpoint.config();
        let (_, base_specs) = plan_params(|b| config.build(b))?;
        let files = open_adapter(&llama_cpps(name), config, &base_specs)?;
        let plan = files.plan(&base_specs)?;
        let (_, specs) = plan_params(|b| plan.build(b, |b| config.build(b)))?;
        let fill = AdapterFill::of_files(&checkpoint, &plan, &specs, &files);
        let store = ParamStore::new(specs.clone(), &StoreOptions::frozen(DType::F32, Device::Cpu), &fill)?;
        let decoder = store.build(|b| plan.build(b, |b| config.build(b)))?;
        let model = Loaded { checkpoint, store, decoder };
        let expected = root().join("peft").join(name).join("expected.safetensors");
        let expected = candle_core::safetensors::load(expected, &Device::Cpu)?;
        let ids = expected.get("input_ids").ok_or("no ids")?.to_dtype(DType::U32)?;
        let difference = (model.logits(&ids)? - expected.get("logits").ok_or("no logits")?)?;
        let largest = difference.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        println!("{name}: {largest:.1e}");
        // As for the PEFT directory itself.
        assert!(largest < 2e-5, "{name}: logits differ by {largest:.2e}");
    }
    Ok(())
}

#[test]
fn what_is_written_is_what_llama_cpps_script_writes() -> Result<()> {
    for (name, base) in LLAMA_CPPS {
        let dir = tempfile::tempdir()?;
        let out = dir.path().join("adapter.gguf");
        write(name, base, &out)?;
        let (ours, theirs) = (GgufFile::open(&out)?, GgufFile::open(&llama_cpps(name))?);
        for key in ["general.type", "general.architecture", "adapter.type"] {
            assert_eq!(ours.get_str(key)?, theirs.get_str(key)?, "{name}: {key}");
        }
        assert_eq!(ours.get_f32("adapter.lora.alpha")?, theirs.get_f32("adapter.lora.alpha")?, "{name}");
        let (mut a, mut b) = (ours.names(), theirs.names());
        a.sort_unstable();
        b.sort_unstable();
        assert_eq!(a, b, "{name}");
        for tensor in a {
            let shape = |file: &GgufFile| file.info(tensor).map(|info| info.shape.clone());
            assert_eq!(shape(&ours), shape(&theirs), "{name}: {tensor}");
            assert_eq!(values(&ours, tensor)?, values(&theirs, tensor)?, "{name}: {tensor}");
        }
    }
    Ok(())
}

#[test]
fn llama_cpps_script_swaps_the_matrices_of_gpt2_which_is_told() -> Result<()> {
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf/gpt2"))?)?;
    let config = checkpoint.config();
    let (_, specs) = plan_params(|b| config.build(b))?;
    let told = open_adapter(&llama_cpps("gpt2"), config, &specs).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(told.contains("blk.0.attn_qkv.weight.lora_") && told.contains("tallow convert"), "{told}");
    Ok(())
}
