//! Opening the model that `--model` names, for the commands that run one.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tallow::models::{Quantization, QuantizeConfig};
use tallow::open::{Base, Dtype, OpenModel, OpenOptions, open_with};

/// The model to run.
#[derive(Args)]
pub struct ModelArgs {
    /// A Hugging Face directory, a .gguf file, a hub id, or a name in the local store
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// An adapter of the model, used beside it: a PEFT directory (a run's `final/`) or a GGUF file
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
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

/// How a base is quantized, in words.
pub fn in_words(quantization: QuantizeConfig) -> String {
    let QuantizeConfig { projections, embeddings, block, double } = quantization;
    let blocks = match projections {
        Quantization::FourBit(_) if double => format!(", blocks of {block}, double quantization"),
        Quantization::FourBit(_) => format!(", blocks of {block}"),
        _ => String::new(),
    };
    format!("{projections} (embeddings {embeddings}{blocks})")
}

impl ModelArgs {
    /// Opens it, telling the user what its files say that has no effect.
    pub fn open(&self) -> anyhow::Result<OpenModel> {
        let dtype = match self.dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::Bf16 => Dtype::Bf16,
        };
        let how = OpenOptions { adapter: self.adapter.as_deref(), base: self.base.into(), dtype };
        let model = open_with(&self.model, how)?;
        if let Some(quantization) = model.quantization() {
            eprintln!(
                "note: {} is quantized to {}, as the adapter was trained; --base original for its own weights",
                self.model,
                in_words(quantization)
            );
        }
        for key in model.checkpoint().unknown_keys() {
            eprintln!("note: {}: config.json has `{key}`, which is not known and has no effect", self.model);
        }
        Ok(model)
    }
}
