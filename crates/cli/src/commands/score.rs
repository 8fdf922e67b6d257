//! `tallow score`: log-probabilities and perplexity of a text.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;

use super::model::ModelArgs;
use super::tokenizer::read_text;

/// Arguments of `tallow score`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow score --model final --text 'The capital of France is' --top 3 --json
  tallow score --model final --input chapter.txt
  tallow score --model final --ids 464,3139,286 --json")]
pub struct ScoreArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    text: Text,
    /// The likeliest tokens to report at each place
    #[arg(long, default_value_t = 0, value_name = "K")]
    top: usize,
    /// One JSON object: ids, logprobs, top, nll, tokens, perplexity
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Text {
    /// The text to score
    #[arg(long, allow_hyphen_values = true)]
    text: Option<String>,
    /// A file of text to score, or - for standard input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Token ids to score, as they are: nothing is put in front
    #[arg(long, value_delimiter = ',', num_args = 1, value_name = "ID,ID,..")]
    ids: Option<Vec<u32>>,
}

/// Runs `tallow score`.
pub fn run(args: ScoreArgs) -> anyhow::Result<()> {
    let text = match (&args.text.text, &args.text.input) {
        (Some(text), _) => Some(text.clone()),
        (None, Some(path)) => Some(read_text(path)?),
        (None, None) => None,
    };
    let model = args.model.open()?;
    let ids = match (text, args.text.ids) {
        (Some(text), _) => model.tokenizer()?.encode(&text, true)?,
        (None, ids) => ids.unwrap_or_default(),
    };
    let score = tallow_engine::score(model.decoder(), model.device(), &ids, args.top)?;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&score)?)?;
        return Ok(());
    }
    let tokenizer = model.tokenizer().ok();
    let show = |id: u32| tokenizer.and_then(|t| t.decode(&[id], false).ok()).unwrap_or_default();
    for (i, (&id, logprob)) in score.ids.iter().zip(&score.logprobs).enumerate() {
        let logprob = logprob.map_or_else(|| "       -".into(), |p| format!("{p:8.4}"));
        let top: Vec<String> =
            score.top.get(i).into_iter().flatten().map(|&(id, p)| format!("{:?} {p:.4}", show(id))).collect();
        let next = if top.is_empty() { String::new() } else { format!("   next: {}", top.join(", ")) };
        writeln!(out, "{id:>8} {logprob} {:?}{next}", show(id))?;
    }
    if let Some(perplexity) = score.perplexity {
        writeln!(out, "{} tokens, {:.4} nats in all, perplexity {perplexity:.3}", score.tokens, score.nll)?;
    }
    Ok(())
}
