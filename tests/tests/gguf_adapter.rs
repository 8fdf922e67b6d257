//! Adapters as GGUF files: what is written, and that it is the same adapter when it is read back.

use std::path::{Path, PathBuf};

use tallow::adapters::PeftAdapter;
use tallow::formats::TensorSource;
use tallow::formats::gguf::GgufFile;
use tallow::formats::hf::ModelDir;
use tallow::gguf_adapter::{open_adapter, write_adapter};
use tallow::models::Checkpoint;
use tallow::nn::{Fill, plan_params};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn write(name: &str, base: &str, out: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf").join(base))?)?;
    let config = checkpoint.config();
    let (_, specs) = plan_params(|b| config.build(b))?;
    let files = PeftAdapter::open(&root().join("peft").join(name))?;
    let plan = files.plan(&specs)?;
    Ok(write_adapter(out, &checkpoint, config, &specs, &plan, &files)?)
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
    // Row `half * pairs + i` of a head is row `2 i + half` in GGUF.
    let checkpoint = Checkpoint::open_dir(&ModelDir::open(&root().join("hf/llama-gqa"))?)?;
    let (head, rank) = (checkpoint.config().shape().head_dim, 4);
    let (q, stored) = (theirs("q_proj.lora_B")?, values(&file, "blk.1.attn_q.weight.lora_b")?);
    for row in 0..q.len() / rank {
        let (h, within) = (row / head, row % head);
        let to = h * head + 2 * (within % (head / 2)) + within / (head / 2);
        assert_eq!(q[row * rank..][..rank], stored[to * rank..][..rank], "row {row}");
    }
    Ok(())
}
