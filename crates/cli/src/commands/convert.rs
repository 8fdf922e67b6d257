//! `tallow convert`: another form of the same thing.

use std::io::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use tallow::convert::adapter_to_gguf;

use crate::exit;
use crate::terminal;

use super::merge::TEXT;

/// What to write.
#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// A GGUF file, as llama.cpp reads it
    Gguf,
}

/// Arguments of `tallow convert`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow convert --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --to gguf --out tuned.gguf
  llama-cli -m SmolLM2-135M-Instruct.Q4_1.gguf --lora tuned.gguf
  tallow chat --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter tuned.gguf

Adapters are converted, not whole models. One that is more than LoRA matrices (DoRA, modules trained whole) has no such
form: use `tallow merge`.")]
pub struct ConvertArgs {
    /// The model that the adapter was made for
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The adapter to convert, a PEFT directory
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// What to write
    #[arg(long, value_name = "FORMAT")]
    to: Format,
    /// The file to write
    #[arg(long, value_name = "FILE")]
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
    let Format::Gguf = args.to;
    let difference = adapter_to_gguf(&args.model, &args.adapter, &args.out, TEXT)?;
    if args.json {
        let (max, tokens) = (difference.max_logit_difference, difference.tokens);
        writeln!(std::io::stdout(), "{}", json!({"out": args.out, "max_logit_difference": max, "tokens": tokens}))?;
        return Ok(());
    }
    terminal::line(&format!("adapter in {}", args.out.display()));
    terminal::line(&format!(
        "read back beside its model, over {} tokens: largest difference of a logit {:.2e}",
        difference.tokens, difference.max_logit_difference
    ));
    Ok(())
}
