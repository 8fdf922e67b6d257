//! `tallow merge`: an adapter added to its model.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use tallow::adapters::NamedAdapter;
use tallow::merge::merge;
use tallow::open::Base;

use super::model::{BaseArg, parse_adapter};
use crate::exit;
use crate::terminal;

/// What merged and adapted are compared over unless told.
pub(super) const TEXT: &str = "The merged model is compared with the adapter beside its base over this text: a few sentences of plain \
English, some numbers (3.14159, 1789, 42), a list of names, and a line of code such as `let x = f(y) + 1;`.";

/// Arguments of `tallow merge`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow merge --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --out merged
  tallow generate --model merged --prompt 'Hello'

The merged model is written in f32. The weights of a quantized file are dequantized. After QLoRA the adapter is merged into the
dequantized base that it was trained beside; with --base original into the model's own weights, which it never saw: what that
changes is printed.")]
pub struct MergeArgs {
    /// The model that the adapter was made for
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// The adapter, a PEFT directory or a GGUF file; several are added by their weights, 1 unless given
    #[arg(long, value_name = "DIR[=WEIGHT]", value_parser = parse_adapter, required = true)]
    adapter: Vec<NamedAdapter>,
    /// What the adapter is merged into: the base as it was trained (dequantized, after QLoRA), or the model's own weights
    #[arg(long, value_enum, default_value_t = BaseArg::Trained)]
    base: BaseArg,
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
    let merged = merge(&args.model, &args.adapter, &args.text, args.base.into())?;
    let difference = merged.difference;
    for notice in merged.adapted.notices() {
        eprintln!("{notice}");
    }
    if let Some(reason) = &merged.not_compared {
        eprintln!("note: compared beside the model's own weights, since {reason}");
    }
    let quantization = merged.adapted.quantization().map(|quantization| quantization.to_string());
    let into = match (&quantization, merged.into) {
        (None, _) => "the model's own weights".to_owned(),
        (Some(quantization), Base::AsTrained) => {
            format!("the base that it was trained beside, dequantized: {quantization}")
        }
        (Some(quantization), Base::Original) => {
            format!("the model's own weights; it was trained beside {quantization}")
        }
    };
    merged.save(&args.out)?;
    if args.json {
        let out = json!({
            "out": args.out,
            "merged_into": if merged.into == Base::AsTrained { "trained" } else { "original" },
            "trained_beside": quantization,
            "max_logit_difference": difference.max_logit_difference,
            "mean_kl": difference.mean_kl,
            "argmax_differs": difference.argmax_differs,
            "tokens": difference.tokens,
        });
        writeln!(std::io::stdout(), "{out}")?;
        return Ok(());
    }
    terminal::line(&format!("merged model in {}, merged into {into}", args.out.display()));
    terminal::line(&format!(
        "merged against adapter beside its base, over {} tokens: largest difference of a logit {:.2e}, mean KL {:.2e} nats, \
         likeliest token differs at {}",
        difference.tokens, difference.max_logit_difference, difference.mean_kl, difference.argmax_differs
    ));
    Ok(())
}
