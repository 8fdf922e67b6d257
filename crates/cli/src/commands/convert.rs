//! `tallow convert`: another form of the same thing.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use tallow::convert::{Converted, adapter_to_gguf, to_safetensors};

use crate::exit;
use crate::terminal;

use super::merge::TEXT;

/// What to write.
#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// An adapter as a GGUF file, as llama.cpp reads it
    Gguf,
    /// A model as a Hugging Face directory, in f32
    Safetensors,
}

/// Arguments of `tallow convert`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow convert --model SmolLM2-135M-Instruct.Q4_1.gguf --to safetensors --out SmolLM2-135M-Instruct
  tallow convert --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --to gguf --out tuned.gguf
  llama-cli -m SmolLM2-135M-Instruct.Q4_1.gguf --lora tuned.gguf
  tallow chat --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter tuned.gguf

A quantized model is dequantized. Whole models are not written as GGUF yet. An adapter that is more than LoRA matrices (DoRA,
added tokens, modules trained whole) has no such form: `tallow merge` writes a model with it, as safetensors.")]
pub struct ConvertArgs {
    /// The model, or the one that the adapter was made for
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The adapter to convert instead, a PEFT directory
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// The file or directory to write
    #[arg(long, value_name = "OUT")]
    out: PathBuf,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `tallow convert`.
pub fn run(args: ConvertArgs) -> anyhow::Result<()> {
    if args.out.exists() {
        return Err(exit::usage(format!("--out {}: exists already; choose another name", args.out.display())));
    }
    let Converted { difference, notes } = match (args.to, &args.adapter) {
        (Format::Gguf, Some(adapter)) => adapter_to_gguf(&args.model, adapter, &args.out, TEXT)?,
        (Format::Safetensors, None) => to_safetensors(&args.model, &args.out, TEXT)?,
        (Format::Gguf, None) => {
            let hint = "whole models are not written as GGUF yet, only adapters (--adapter) that are LoRA matrices and nothing \
                        else; --to safetensors writes a Hugging Face directory, of which llama.cpp's convert_hf_to_gguf.py \
                        makes a GGUF file";
            return Err(exit::usage(format!("--to gguf: {hint}")));
        }
        (Format::Safetensors, Some(_)) => {
            let hint = "an adapter is a PEFT directory already; `tallow merge` writes a model with it";
            return Err(exit::usage(format!("--to safetensors: {hint}")));
        }
    };
    for note in notes {
        eprintln!("{note}");
    }
    if args.json {
        let (max, tokens) = (difference.max_logit_difference, difference.tokens);
        writeln!(std::io::stdout(), "{}", json!({"out": args.out, "max_logit_difference": max, "tokens": tokens}))?;
        return Ok(());
    }
    terminal::line(&format!("written to {}", args.out.display()));
    terminal::line(&format!(
        "read back and compared over {} tokens: largest difference of a logit {:.2e}",
        difference.tokens, difference.max_logit_difference
    ));
    Ok(())
}
