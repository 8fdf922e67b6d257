//! Opening the model that `--model` names, for the commands that run one.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use tallow::open::{Dtype, OpenModel, open_adapted};

/// The model to run.
#[derive(Args)]
pub struct ModelArgs {
    /// A Hugging Face directory, a .gguf file, a hub id, or a name in the local store
    #[arg(long, value_name = "MODEL")]
    pub model: String,
    /// An adapter of the model, used beside it: a PEFT directory (a run's `final/`) or a GGUF file
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
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

impl ModelArgs {
    /// Opens it, telling the user what its files say that has no effect.
    pub fn open(&self) -> anyhow::Result<OpenModel> {
        let dtype = match self.dtype {
            DtypeArg::F32 => Dtype::F32,
            DtypeArg::Bf16 => Dtype::Bf16,
        };
        let model = open_adapted(&self.model, self.adapter.as_deref(), dtype)?;
        for key in model.checkpoint().unknown_keys() {
            eprintln!("note: {}: config.json has `{key}`, which is not known and has no effect", self.model);
        }
        Ok(model)
    }
}
