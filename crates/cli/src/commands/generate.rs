//! `tallow generate`: continue a prompt.

use std::io::Write;

use clap::Args;
use serde_json::json;
use tallow_engine::{FinishReason, GenerateOptions, generate};
use tallow_sampler::{SamplerOptions, StopMatcher};

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
    #[arg(long)]
    prompt: String,
    /// The most tokens to generate
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token always
    #[arg(long, default_value_t = 0.8)]
    temperature: f32,
    /// Keep the K likeliest tokens (0: all)
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens that together have this probability (1: all)
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this fraction as likely as the likeliest (0: all)
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Divides the logits of tokens seen already (1: off)
    #[arg(long, default_value_t = 1.0)]
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
    #[arg(long, value_name = "STRING")]
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
    sampler.validate().map_err(|e| exit::usage(e.to_string()))?;
    let model = args.model.open()?;
    let tokenizer = model.tokenizer()?;
    let prompt = tokenizer.encode(&args.prompt, !args.no_bos)?;
    let options = GenerateOptions { max_tokens: args.max_tokens, sampler, stop_ids: model.stop_ids() };
    let mut stream = tokenizer.decode_stream(true);
    let mut stops = StopMatcher::new(&args.stop, &[]).map_err(|e| exit::usage(e.to_string()))?;
    let mut text = String::new();
    let mut failure = None;
    let mut emit = |piece: &str| -> std::io::Result<()> {
        text.push_str(piece);
        if !args.json {
            let mut out = std::io::stdout().lock();
            out.write_all(piece.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    };
    if !args.json {
        print!("{}", args.prompt);
    }
    let mut on_token = |id: u32| -> anyhow::Result<bool> {
        if let Some(piece) = stream.push(id)? {
            emit(&stops.push(&piece).text)?;
        }
        Ok(!stops.is_stopped())
    };
    let out = generate(model.decoder(), model.device(), &prompt, &options, &mut |id| {
        on_token(id).unwrap_or_else(|error| {
            failure = Some(error);
            false
        })
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    let stopped = stops.is_stopped();
    if !stopped {
        let rest = stream.flush()?.unwrap_or_default();
        emit(&stops.push(&rest).text)?;
        emit(&stops.finish())?;
    }
    let finish_reason = if stopped || stops.is_stopped() { FinishReason::Stop } else { out.finish_reason };
    if args.json {
        let answer = json!({
            "text": text,
            "ids": out.ids,
            "finish_reason": finish_reason,
            "prompt_tokens": prompt.len(),
            "completion_tokens": out.ids.len(),
        });
        println!("{answer}");
    } else {
        println!();
    }
    Ok(())
}
