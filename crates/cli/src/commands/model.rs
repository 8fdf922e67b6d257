//! Opening the model that `--model` names, for the commands that run one.

use std::path::Path;

use clap::{Args, ValueEnum};
use tallow::adapters::NamedAdapter;
use tallow::open::{Base, Dtype, OpenModel, OpenOptions, open_with};

/// The model to run.
#[derive(Args)]
pub struct ModelArgs {
    /// A Hugging Face directory, a .gguf file, a hub id, or a name in the local store
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// An adapter of the model, used beside it: a PEFT directory (a run's `final/`) or a GGUF file; several are added by their
    /// weights, 1 unless given. The tokenizer is that of one that adds tokens, else of the first that has one
    #[arg(long, value_name = "DIR[=WEIGHT]", value_parser = parse_adapter)]
    pub adapter: Vec<NamedAdapter>,
    /// What the adapter is put beside: as it was trained (quantized, after QLoRA), or the model's own weights
    #[arg(long, value_enum, default_value_t = BaseArg::Trained, requires = "adapter")]
    pub base: BaseArg,
    /// Dtype to compute in
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    pub dtype: DtypeArg,
}

/// Dtype to compute in.
#[derive(Clone, Copy, ValueEnum)]
pub enum DtypeArg {
    /// 32 bits
    F32,
    /// bf16 weights and activations
    Bf16,
}

/// What an adapter is put beside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BaseArg {
    /// What it was trained beside
    Trained,
    /// The model's own weights
    Original,
}

impl From<BaseArg> for Base {
    fn from(base: BaseArg) -> Self {
        match base {
            BaseArg::Trained => Base::AsTrained,
            BaseArg::Original => Base::Original,
        }
    }
}

/// `DIR` or `DIR=WEIGHT`; what exists whole is a folder.
pub fn parse_adapter(text: &str) -> Result<NamedAdapter, String> {
    let Some((dir, weight)) = text.rsplit_once('=').filter(|_| !Path::new(text).exists()) else {
        return Ok(NamedAdapter::new(text));
    };
    match weight.parse::<f32>() {
        Ok(weight) if weight.is_finite() => Ok(NamedAdapter { weight, ..NamedAdapter::new(dir) }),
        _ => Err(format!("there is no folder {text}, and {weight:?} is no weight: a finite number, e.g. {dir}=0.5")),
    }
}

impl ModelArgs {
    /// Opens it, telling the user what its files say that has no effect.
    pub fn open(&self) -> anyhow::Result<OpenModel> {
        let dtype = match self.dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::Bf16 => Dtype::Bf16,
        };
        let how = OpenOptions { adapters: &self.adapter, base: self.base.into(), dtype };
        let model = open_with(&self.model, how)?;
        if let Some(quantization) = model.quantization() {
            eprintln!(
                "note: {} is quantized to {quantization}, as the adapter was trained; --base original for its own weights",
                self.model
            );
        }
        for notice in model.notices() {
            eprintln!("{notice}");
        }
        for key in model.checkpoint().unknown_keys() {
            eprintln!("note: {}: config.json has `{key}`, which is not known and has no effect", self.model);
        }
        Ok(model)
    }
}
