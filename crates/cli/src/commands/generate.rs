//! `tallow generate`: continue a prompt.

use std::io::Write;

use clap::Args;
use serde_json::json;
use tallow_engine::{FinishReason, GenerateOptions, generate};
use tallow_sampler::{SamplerError, SamplerOptions, StopMatcher};
use tallow_tokenizer::DecodeStream;

use super::model::ModelArgs;
use crate::exit;

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
    /// The most tokens to generate
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token always
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f32,
    /// Keep the K likeliest tokens (0: all)
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens that together have this probability (1: all)
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest (0: all)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,
    /// Divides the logits of tokens seen already (1: off)
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    repetition_penalty: f32,
    /// Subtracted from the logits of tokens seen already (0: off)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtracted from a token's logit for each time it was seen (0: off)
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Tokens that the penalties look back (-1: all)
    #[arg(long, default_value_t = 64, allow_negative_numbers = true)]
    repeat_last_n: i32,
    /// Added to the logit of a token, as ID=BIAS; may be repeated
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Ends the text before this string; may be repeated
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Same seed, same text
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Do not put the tokenizer's beginning-of-sequence token in front
    #[arg(long)]
    no_bos: bool,
    /// One JSON object: text, ids, finish_reason, prompt_tokens, completion_tokens
    #[arg(long)]
    json: bool,
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("must be ID=BIAS, e.g. 50256=-100")?;
    let id = id.trim().parse().map_err(|e| format!("`{id}` is not a token id: {e}"))?;
    let bias = bias.trim().parse().map_err(|e| format!("`{bias}` is not a number: {e}"))?;
    Ok((id, bias))
}

impl GenerateArgs {
    fn sampler(&self) -> SamplerOptions {
        SamplerOptions {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repeat_last_n: self.repeat_last_n,
            logit_bias: self.logit_bias.clone(),
            seed: self.seed,
        }
    }
}

/// Runs `tallow generate`.
pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let sampler = args.sampler();
    sampler.validate().map_err(usage_of_sampler)?;
    let stops = StopMatcher::new(&args.stop, &[]).map_err(usage_of_sampler)?;
    let model = args.model.open()?;
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode(&args.prompt, !args.no_bos)?;
    let options = GenerateOptions { max_tokens: args.max_tokens, sampler, stop_ids: model.stop_ids() };
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

/// Turns ids into text, stops at stop strings, and shows what is certain.
struct Writer {
    /// Goes in front of the text; `None` where nothing is to be shown. A prompt that fails is not shown.
    prompt: Option<String>,
    text: String,
    stream: DecodeStream,
    stops: StopMatcher,
}

impl Writer {
    /// Takes the next id; whether to go on.
    fn token(&mut self, id: u32) -> anyhow::Result<bool> {
        if let Some(piece) = self.stream.push(id)? {
            let certain = self.stops.push(&piece).text;
            self.emit(&certain)?;
        }
        Ok(!self.stops.is_stopped())
    }

    /// What was held back, as half a character or as the beginning of a stop string.
    fn finish(&mut self) -> anyhow::Result<()> {
        if self.stops.is_stopped() {
            return Ok(());
        }
        let rest = self.stream.flush()?.unwrap_or_default();
        let mut rest = self.stops.push(&rest).text;
        rest.push_str(&self.stops.finish());
        Ok(self.emit(&rest)?)
    }

    fn emit(&mut self, piece: &str) -> std::io::Result<()> {
        self.text.push_str(piece);
        self.show(piece)
    }

    fn show(&mut self, text: &str) -> std::io::Result<()> {
        let Some(prompt) = &mut self.prompt else { return Ok(()) };
        let mut out = std::io::stdout().lock();
        out.write_all(std::mem::take(prompt).as_bytes())?;
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// A wrong option is the user's to mend: the flag by its own name.
fn usage_of_sampler(error: SamplerError) -> anyhow::Error {
    match error {
        SamplerError::InvalidOption { key, value, reason, working } => {
            let flag = key.replace('_', "-");
            exit::usage(format!("--{flag} {value}: {reason}; for example --{flag} {working}"))
        }
        other => exit::usage(other.to_string()),
    }
}

fn usage_of_engine(error: tallow_engine::Error) -> anyhow::Error {
    use tallow_engine::Error::{Empty, Sampler};
    match error {
        Sampler(SamplerError::UnknownToken { what: "logit_bias", id, vocab_size }) => {
            let last = vocab_size.saturating_sub(1);
            exit::usage(format!("--logit-bias names token {id}, but the model's ids are 0 to {last}"))
        }
        Empty { .. } => exit::usage("--prompt: there is no token to continue; give some text".into()),
        other => other.into(),
    }
}
