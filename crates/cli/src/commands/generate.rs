//! `tallow generate`: continue a prompt.

use std::io::Write;

use clap::Args;
use serde_json::json;
use tallow_engine::{FinishReason, generate};

use super::model::ModelArgs;
use super::sampling::{SamplingArgs, usage_of_engine};
use super::stream::Writer;

/// Arguments of `tallow generate`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow generate --model runs/quickstart/final --prompt 'Fellow citizens' --max-tokens 60
  tallow generate --model SmolLM2-135M.gguf --prompt 'Once upon a time' --temperature 0.8 --top-p 0.9 --seed 1
  tallow generate --model final --prompt 'The' --temperature 0 --json")]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue
    #[arg(long, allow_hyphen_values = true, value_name = "TEXT")]
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Do not put the tokenizer's beginning-of-sequence token in front
    #[arg(long)]
    no_bos: bool,
    /// One JSON object: text, ids, finish_reason, prompt_tokens, completion_tokens
    #[arg(long)]
    json: bool,
}

/// Runs `tallow generate`.
pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let (mut options, stops) = (args.sampling.options(vec![])?, args.sampling.stops()?);
    let model = args.model.open()?;
    options.stop_ids = model.stop_ids();
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode(&args.prompt, !args.no_bos)?;
    // Special tokens in a prompt are text, so nobody can have applied it by hand.
    if tokenizer.chat_template().is_some() {
        eprintln!("note: the model has a chat template, which --prompt is not put into; `tallow chat` applies it");
    }
    let mut stream = tokenizer.decode_stream(true);
    // A first word loses its space in some vocabularies: the stream must know that this one is not the first.
    if let Some(&last) = prompt.last() {
        stream.push(last)?;
    }
    let mut writer = Writer { prompt: (!args.json).then_some(args.prompt), text: String::new(), stream, stops };
    let mut failure = None;
    let out = generate(model.decoder(), model.device(), &prompt, &options, &mut |id| {
        writer.token(id).unwrap_or_else(|error| {
            failure = Some(error);
            false
        })
    });
    if let Some(error) = failure {
        return Err(error);
    }
    let out = out.map_err(usage_of_engine)?;
    writer.finish()?;
    let finish_reason = if writer.stops.is_stopped() { FinishReason::Stop } else { out.finish_reason };
    if args.json {
        let answer = json!({
            "text": writer.text,
            "ids": out.ids,
            "finish_reason": finish_reason,
            "prompt_tokens": prompt.len(),
            "completion_tokens": out.ids.len(),
        });
        writeln!(std::io::stdout(), "{answer}")?;
    } else {
        writer.show("\n")?;
    }
    Ok(())
}
