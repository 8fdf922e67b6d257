//! `tallow merge`: an adapter added to its model.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tallow::adapters::NamedAdapter;
use tallow::merge::merge;

use super::model::parse_adapter;
use crate::exit;
use crate::terminal;

/// What merged and adapted are compared over unless told.
const TEXT: &str = "The merged model is compared with the adapter beside its base over this text: a few sentences of plain \
English, some numbers (3.14159, 1789, 42), a list of names, and a line of code such as `let x = f(y) + 1;`.";

/// Arguments of `tallow merge`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow merge --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --out merged
  tallow generate --model merged --prompt 'Hello'

A quantized model is dequantized first, and the merged one is written in f32: the base it was trained beside, to the bit.")]
pub struct MergeArgs {
    /// The model that the adapter was made for
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The adapter, a PEFT directory; several are added by their weights, 1 unless given
    #[arg(long, value_name = "DIR[=WEIGHT]", value_parser = parse_adapter, required = true)]
    adapter: Vec<NamedAdapter>,
    /// The Hugging Face directory to write
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The text over which merged and adapted are compared
    #[arg(long, value_name = "TEXT", default_value = TEXT, hide_default_value = true)]
    text: String,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Runs `tallow merge`.
pub fn run(args: MergeArgs) -> anyhow::Result<()> {
    if args.out.exists() {
        return Err(exit::usage(format!("--out {}: exists already; choose another name", args.out.display())));
    }
    let merged = merge(&args.model, &args.adapter, &args.text)?;
    let difference = merged.difference;
    merged.save(&args.out)?;
    if args.json {
        let out = json!({
            "out": args.out,
            "max_logit_difference": difference.max_logit_difference,
            "mean_kl": difference.mean_kl,
            "argmax_differs": difference.argmax_differs,
            "tokens": difference.tokens,
        });
        writeln!(std::io::stdout(), "{out}")?;
        return Ok(());
    }
    terminal::line(&format!("merged model in {}", args.out.display()));
    terminal::line(&format!(
        "merged against adapter beside its base, over {} tokens: largest difference of a logit {:.2e}, mean KL {:.2e} nats, \
         likeliest token differs at {}",
        difference.tokens, difference.max_logit_difference, difference.mean_kl, difference.argmax_differs
    ));
    Ok(())
}
