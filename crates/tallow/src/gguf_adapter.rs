//! LoRA adapters as GGUF files, the form in which llama.cpp reads them.
//!
//! Such a file has `general.type = "adapter"`, one alpha for all, and for the base tensor `NAME` two tensors
//! `NAME.lora_a [rank, in]` and `NAME.lora_b [out, rank]`, whose product llama.cpp scales by `alpha / rank`. Rows of `lora_b`
//! have the order of the base's rows, which GGUF changes for rotated queries and keys. For the embedding `lora_a` is
//! `[vocabulary, rank]`.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::{Map, json};
use tallow_adapters::{Adapted, AdapterPlan, PEFT_PREFIX, PeftAdapter};
use tallow_formats::gguf::{GgufFile, GgufTensor, MetaValue, write_gguf};
use tallow_formats::{DType, TensorInfo, TensorSource};
use tallow_models::{ModelConfig, gguf};
use tallow_nn::{Fill, ParamSpec, Role};

use crate::open::{Error, Result};

/// The keys of an adapter's header.
const TYPE: &str = "general.type";
const ARCHITECTURE: &str = "general.architecture";
const ADAPTER_TYPE: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
/// Tokens from which on an adapter begins to work; without them it is another one.
const INVOCATION: &str = "adapter.alora.invocation_tokens";

/// The weights that the adapter was trained beside, as its PEFT files note them. llama.cpp passes over keys that it does not know.
const TRAINED_BESIDE: &str = "tallow.base_weights_sha256";
const NOTE: &str = "base_weights_sha256";

/// The way out where a LoRA adapter cannot say what is to be said. Whole models are not written as GGUF here.
const MERGE: &str = "`tallow merge` writes a whole model with it, as safetensors, of which llama.cpp's \
                     convert_hf_to_gguf.py makes a GGUF file";

/// Opens the adapter at `path`: a PEFT directory, or a GGUF file as llama.cpp reads it. `base` are the parameters of the
/// model without an adapter.
///
/// # Errors
/// If it is not there, malformed or another kind of adapter, or a GGUF adapter of another model.
pub fn open_adapter(path: &Path, config: &dyn ModelConfig, base: &[ParamSpec]) -> Result<PeftAdapter> {
    match path.is_file() {
        true => read(path, config, base),
        false if !path.exists() => Err(wrong(
            path,
            "there is no such folder or file; give a PEFT directory (a run's `final/`) or a GGUF file".into(),
        )),
        false => Ok(PeftAdapter::open(path)?),
    }
}

/// An adapter and the model that it is of.
#[derive(Clone, Copy)]
pub struct Parts<'a> {
    /// The values of the model.
    pub model: &'a dyn Fill,
    /// Its configuration.
    pub config: &'a dyn ModelConfig,
    /// Its parameters, without an adapter.
    pub base: &'a [ParamSpec],
    /// What the adapter stands beside.
    pub plan: &'a AdapterPlan,
    /// The values of the adapter.
    pub files: &'a PeftAdapter,
}

/// Writes an adapter for llama.cpp, in f32. What differs between
/// modules in alpha, or by rsLoRA, is multiplied into their `lora_b`; the alpha of most modules is that of the file.
///
/// # Errors
/// If it is more than LoRA matrices (DoRA, whole modules), adapts what llama.cpp cannot, or cannot be read or written.
pub fn write_adapter(out: &Path, parts: Parts) -> Result<()> {
    check(parts)?;
    let Parts { config, base, plan, files, .. } = parts;
    let alpha = alpha_of_most(plan);
    let mut tensors = vec![];
    for spec in base {
        let Some(module) = spec.name.strip_suffix(".weight") else { continue };
        let Some((_, adapted)) = plan.modules().find(|(name, _)| *name == module) else { continue };
        let name = gguf::tensor_name(&spec.name)
            .ok_or_else(|| wrong(files.path(), format!("GGUF has no name for `{module}`; {MERGE}")))?;
        let wanted = alpha_of(adapted);
        let factor = if wanted as f32 == alpha { 1.0 } else { (wanted / f64::from(alpha)) as f32 };
        let heads = gguf::permuted_heads(config, &spec.name);
        for (part, matrix) in ["lora_a", "lora_b"].into_iter().zip(plan.specs_of(module, spec)) {
            let (shape, is_b) = (matrix.shape.clone(), part == "lora_b");
            let values = move || -> tallow_nn::Result<Vec<f32>> {
                let mut values = vec![0f32; matrix.num_elements()];
                files.fill(&matrix, &mut values)?;
                if is_b {
                    values.iter_mut().for_each(|x| *x *= factor);
                    if let Some(heads) = heads {
                        gguf::permute(&mut values, heads, matrix.shape[1]);
                    }
                }
                Ok(values)
            };
            tensors.push(GgufTensor::from_values(format!("{name}.{part}"), shape, DType::F32, values));
        }
    }
    let text = |text: &str| MetaValue::String(text.to_owned());
    let mut metadata = vec![
        (ARCHITECTURE, text(gguf::architecture(config)?)),
        (TYPE, text("adapter")),
        (ADAPTER_TYPE, text("lora")),
        (ALPHA, MetaValue::F32(alpha)),
        ("general.file_type", MetaValue::U32(0)),
    ];
    if let Some(hash) = files.notes().and_then(|notes| notes.get(NOTE)?.as_str()) {
        metadata.push((TRAINED_BESIDE, text(hash)));
    }
    Ok(write_gguf(out, &metadata, &tensors)?)
}

fn wrong(path: &Path, reason: String) -> Error {
    Error::Convert { path: path.to_path_buf(), reason }
}

/// The alpha that llama.cpp, which divides by the rank, needs for a module.
fn alpha_of(adapted: &Adapted) -> f64 {
    adapted.scale * adapted.rank as f64
}

/// The alpha that most modules need, the least of several; never 0, which llama.cpp takes for none.
fn alpha_of_most(plan: &AdapterPlan) -> f32 {
    let alphas: Vec<f32> = plan.modules().map(|(_, adapted)| alpha_of(adapted) as f32).filter(|&x| x != 0.0).collect();
    let count = |alpha: f32| alphas.iter().filter(|&&other| other == alpha).count();
    alphas.iter().copied().max_by(|&x, &y| count(x).cmp(&count(y)).then(y.total_cmp(&x))).unwrap_or(1.0)
}

/// Refuses what the file could not say.
fn check(Parts { model, config, base, plan, files }: Parts) -> Result<()> {
    let wrong = |reason: String| Err(wrong(files.path(), reason));
    if let Some(name) = plan.saved().min() {
        return wrong(format!("holds `{name}` whole, which an adapter of llama.cpp cannot; {MERGE}"));
    }
    if let Some((module, _)) = plan.tokens().next() {
        return wrong(format!("holds rows of tokens of `{module}`, which an adapter of llama.cpp cannot; {MERGE}"));
    }
    for (module, adapted) in plan.modules() {
        if adapted.dora {
            return wrong(format!("`{module}` has magnitudes (DoRA), which llama.cpp does not know; {MERGE}"));
        }
        if adapted.embedding && config.shape().tied {
            return wrong(format!(
                "adapts `{module}`, to which the head of this model is tied: llama.cpp would apply it to both and fail; train \
                 it without the embedding"
            ));
        }
    }
    for spec in base.iter().filter(|spec| files.holds_base(spec)) {
        let (mut theirs, mut ours) = (vec![0f32; spec.num_elements()], vec![0f32; spec.num_elements()]);
        files.fill(spec, &mut theirs)?;
        model.fill(spec, &mut ours)?;
        if theirs != ours {
            let name = &spec.name;
            return wrong(format!("holds a `{name}` that is not the model's, which llama.cpp would ignore; {MERGE}"));
        }
    }
    Ok(())
}

/// An adapter's tensors under PEFT's names.
struct Renamed {
    path: PathBuf,
    tensors: BTreeMap<String, (TensorInfo, Vec<u8>)>,
}

impl TensorSource for Renamed {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info)
    }

    fn bytes(&self, name: &str) -> tallow_formats::Result<&[u8]> {
        let missing =
            || tallow_formats::Error::missing(&self.path, &format!("tensor `{name}`"), "fetch the adapter again");
        self.tensors.get(name).map(|(_, bytes)| bytes.as_slice()).ok_or_else(missing)
    }

    fn path_of(&self, _: &str) -> &Path {
        &self.path
    }
}

fn read(path: &Path, config: &dyn ModelConfig, base: &[ParamSpec]) -> Result<PeftAdapter> {
    let file = GgufFile::open(path)?;
    let architecture = gguf::architecture(config)?;
    for (key, expected, hint) in [
        (TYPE, "adapter", "give a model as --model"),
        (ADAPTER_TYPE, "lora", "only LoRA is supported"),
        (ARCHITECTURE, architecture, "it was made for another model"),
    ] {
        let is = file.opt_str(key)?.unwrap_or_default();
        if is != expected {
            return Err(wrong(path, format!("`{key}` is `{is}`, not `{expected}`; {hint}")));
        }
    }
    if file.get(INVOCATION).is_some() {
        return Err(wrong(path, format!("`{INVOCATION}`: adapters that begin at some tokens are not supported")));
    }
    // Without an alpha llama.cpp does not divide by the rank either.
    let alpha = file.opt_f32(ALPHA)?.filter(|&alpha| alpha != 0.0);
    let by_name: HashMap<String, &ParamSpec> =
        base.iter().filter_map(|spec| Some((gguf::tensor_name(&spec.name)?, spec))).collect();
    let mut tensors = BTreeMap::new();
    for name in file.names() {
        let Some((base_name, part)) = name.rsplit_once('.').filter(|(_, part)| matches!(*part, "lora_a" | "lora_b"))
        else {
            return Err(wrong(path, format!("tensor `{name}` is none of a LoRA adapter and would be ignored")));
        };
        let module = by_name.get(base_name).and_then(|spec| Some((*spec, spec.name.strip_suffix(".weight")?)));
        let Some((spec, module)) = module else {
            return Err(wrong(
                path,
                format!("tensor `{name}`: this model has no `{base_name}`; it was made for another"),
            ));
        };
        let (info, mut values) = matrix(&file, name)?;
        let (rows, columns) = (info.shape[0], info.shape[1]);
        let (embedding, is_a) = (spec.role == Role::Embed, part == "lora_a");
        let mut shape = vec![rows, columns];
        if is_a && embedding {
            values = (0..columns)
                .flat_map(|c| (0..rows).map(move |r| (r, c)))
                .map(|(r, c)| values[r * columns + c])
                .collect();
            shape = vec![columns, rows];
        } else if !is_a {
            let outputs = if embedding { spec.shape[1] } else { spec.shape[0] };
            if rows != outputs {
                let mut reason =
                    format!("tensor `{name}` is [{rows}, {columns}], but `{module}` of this model gives {outputs}");
                if spec.stored_transposed && rows == spec.shape[1] {
                    reason += "; llama.cpp's convert_lora_to_gguf.py swaps the two matrices of GPT-2's Conv1D layers: \
                               convert the PEFT directory with `tallow convert`";
                }
                return Err(wrong(path, reason));
            }
            if let Some(heads) = gguf::permuted_heads(config, &spec.name) {
                gguf::unpermute(&mut values, heads, columns);
            }
            if alpha.is_none() {
                values.iter_mut().for_each(|x| *x *= columns as f32);
            }
        }
        let part = match (embedding, is_a) {
            (true, true) => "lora_embedding_A",
            (true, false) => "lora_embedding_B",
            (false, true) => "lora_A.weight",
            (false, false) => "lora_B.weight",
        };
        let name = format!("{PEFT_PREFIX}{module}.{part}");
        let info = TensorInfo { name: name.clone(), dtype: DType::F32, shape };
        tensors.insert(name, (info, values.iter().flat_map(|x| x.to_le_bytes()).collect()));
    }
    let mut settings = Map::new();
    settings.insert("peft_type".into(), json!("LORA"));
    settings.insert("lora_alpha".into(), json!(alpha.unwrap_or(1.0)));
    if let Some(hash) = file.opt_str(TRAINED_BESIDE)? {
        settings.insert("tallow".into(), json!({ NOTE: hash }));
    }
    let tensors = Renamed { path: path.to_path_buf(), tensors };
    Ok(PeftAdapter::from_parts(path, settings, Box::new(tensors))?)
}

/// A tensor that is a matrix and not empty.
fn matrix<'a>(file: &'a GgufFile, name: &str) -> Result<(&'a TensorInfo, Vec<f32>)> {
    let info = file.info(name).filter(|info| info.shape.len() == 2 && info.num_elements() > 0);
    let info = info.ok_or_else(|| wrong(file.path(), format!("tensor `{name}` is no matrix")))?;
    let mut values = vec![0f32; info.num_elements()];
    file.read_f32(name, &mut values)?;
    Ok((info, values))
}
