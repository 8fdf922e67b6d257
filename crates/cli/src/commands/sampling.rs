//! How tokens are drawn: the options that every command which generates has.

use clap::Args;
use tallow_engine::GenerateOptions;
use tallow_sampler::{SamplerError, SamplerOptions, StopMatcher};

use crate::exit;

/// How tokens are drawn, and where a text ends.
#[derive(Args)]
pub struct SamplingArgs {
    /// The most tokens to generate
    #[arg(long, default_value_t = 128)]
    pub max_tokens: usize,
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
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let (id, bias) = text.split_once('=').ok_or("must be ID=BIAS, e.g. 50256=-100")?;
    let id = id.trim().parse().map_err(|e| format!("`{id}` is not a token id: {e}"))?;
    let bias = bias.trim().parse().map_err(|e| format!("`{bias}` is not a number: {e}"))?;
    Ok((id, bias))
}

impl SamplingArgs {
    /// The options, checked, with the ids that end a text.
    pub fn options(&self, stop_ids: Vec<u32>) -> anyhow::Result<GenerateOptions> {
        let sampler = self.sampler();
        sampler.validate().map_err(usage_of_sampler)?;
        Ok(GenerateOptions { max_tokens: self.max_tokens, sampler, stop_ids, adapters: None })
    }

    /// The strings that end a text.
    pub fn stops(&self) -> anyhow::Result<StopMatcher> {
        StopMatcher::new(&self.stop, &[]).map_err(usage_of_sampler)
    }

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

pub fn usage_of_engine(error: tallow_engine::Error) -> anyhow::Error {
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
