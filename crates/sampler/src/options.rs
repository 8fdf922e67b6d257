//! What a user may set, and what is wrong with it.

use std::collections::BTreeSet;
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use crate::{Result, SamplerError};

/// How a token is chosen. The default draws from the model's own distribution: every processor is off.
///
/// Unknown keys are refused when it is read from a file. [`validate`](Self::validate) is called by
/// [`Sampler::new`](crate::Sampler::new); call it earlier to report a mistake before anything is loaded.
///
/// ```
/// use tallow_sampler::SamplerOptions;
/// let wrong = SamplerOptions { top_p: 1.5, ..SamplerOptions::default() };
/// let message = wrong.validate().map_err(|error| error.to_string());
/// assert_eq!(message, Err("top_p = 1.5: must be above 0 and at most 1; for example top_p = 0.95".to_string()));
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplerOptions {
    /// Divides the logits. 0 is greedy: always the most likely token, the lowest id of a tie. The filters below keep
    /// the most likely token whatever their value, so they change nothing then. Default 1.
    pub temperature: f32,
    /// Keeps the `top_k` most likely tokens. 0 (default) keeps all.
    pub top_k: usize,
    /// Keeps the smallest set of most likely tokens whose probability reaches `top_p`, in (0, 1]. 1 (default) keeps all.
    /// Source: Holtzman et al. 2020, <https://arxiv.org/abs/1904.09751>.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the most likely one, in [0, 1]. 0 (default) keeps all.
    /// Source: Nguyen et al. 2024, <https://arxiv.org/abs/2407.01082>.
    pub min_p: f32,
    /// Divides positive logits of tokens seen lately and multiplies negative ones, once a token. 1 (default) is off.
    /// Source: Keskar et al. 2019, <https://arxiv.org/abs/1909.05858>, section 4.1.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token seen lately, once. 0 (default) is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of every token seen lately, for each time it was seen. 0 (default) is off.
    pub frequency_penalty: f32,
    /// How many of the last tokens the three penalties look at: 64 by default, -1 for all, prompt included.
    pub repeat_last_n: i32,
    /// `(token id, added to its logit)`: `-inf` forbids the token. Empty by default.
    pub logit_bias: Vec<(u32, f32)>,
    /// Keys the random draw, together with the position of the token. Default 0.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repeat_last_n: 64,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Always the most likely token, everything else off.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether any of the three penalties is on.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks every value; the error names the key, the value, the reason and a value that works.
    pub fn validate(&self) -> Result<()> {
        let check = |ok: bool, key, value: f32, reason, working| {
            if ok { Ok(()) } else { Err(invalid(key, value, reason, working)) }
        };
        let t = self.temperature;
        check(t.is_finite() && t >= 0.0, "temperature", t, "must be 0 (greedy) or above, and finite", "0.8")?;
        let p = self.top_p;
        check(p > 0.0 && p <= 1.0, "top_p", p, "must be above 0 and at most 1", "0.95")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "must be from 0 to 1", "0.05")?;
        let r = self.repetition_penalty;
        check(r.is_finite() && r > 0.0, "repetition_penalty", r, "must be above 0 and finite; 1 is off", "1.1")?;
        let (presence, frequency) = (self.presence_penalty, self.frequency_penalty);
        check(presence.is_finite(), "presence_penalty", presence, "must be finite; 0 is off", "0.5")?;
        check(frequency.is_finite(), "frequency_penalty", frequency, "must be finite; 0 is off", "0.5")?;
        if self.repeat_last_n < -1 {
            return Err(invalid("repeat_last_n", self.repeat_last_n, "must be -1 (all tokens) or above", "64"));
        }
        if self.repeat_last_n == 0 && self.has_penalties() {
            let reason = "a penalty is set, but it would look at no token";
            return Err(invalid("repeat_last_n", 0, reason, "64"));
        }
        self.validate_bias()
    }

    fn validate_bias(&self) -> Result<()> {
        let mut seen = BTreeSet::new();
        for &(id, bias) in &self.logit_bias {
            let shown = format!("[[{id}, {bias}]]");
            if bias.is_nan() || bias == f32::INFINITY {
                let reason = "a bias must be finite, or -inf to forbid the token";
                return Err(invalid("logit_bias", shown, reason, format!("[[{id}, 100.0]]")));
            }
            if !seen.insert(id) {
                let reason = format!("token {id} is listed twice");
                return Err(invalid("logit_bias", shown, reason, format!("[[{id}, {bias}]]")));
            }
        }
        Ok(())
    }
}

pub(crate) fn invalid(
    key: &'static str,
    value: impl Display,
    reason: impl Into<String>,
    working: impl Into<String>,
) -> SamplerError {
    SamplerError::InvalidOption { key, value: value.to_string(), reason: reason.into(), working: working.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The key of the error that `change` causes, and its message.
    fn rejected(change: impl FnOnce(&mut SamplerOptions)) -> (&'static str, String) {
        let mut options = SamplerOptions::default();
        change(&mut options);
        match options.validate() {
            Err(error @ SamplerError::InvalidOption { key, .. }) => (key, error.to_string()),
            other => panic!("accepted: {other:?}"),
        }
    }

    #[test]
    fn each_wrong_value_names_its_key() {
        assert_eq!(rejected(|o| o.temperature = -0.1).0, "temperature");
        assert_eq!(rejected(|o| o.temperature = f32::NAN).0, "temperature");
        assert_eq!(rejected(|o| o.temperature = f32::INFINITY).0, "temperature");
        assert_eq!(rejected(|o| o.top_p = 0.0).0, "top_p");
        assert_eq!(rejected(|o| o.top_p = f32::NAN).0, "top_p");
        assert_eq!(rejected(|o| o.min_p = 1.1).0, "min_p");
        assert_eq!(rejected(|o| o.min_p = f32::NAN).0, "min_p");
        assert_eq!(rejected(|o| o.repetition_penalty = 0.0).0, "repetition_penalty");
        assert_eq!(rejected(|o| o.presence_penalty = f32::NAN).0, "presence_penalty");
        assert_eq!(rejected(|o| o.frequency_penalty = f32::INFINITY).0, "frequency_penalty");
        assert_eq!(rejected(|o| o.repeat_last_n = -2).0, "repeat_last_n");
        assert_eq!(rejected(|o| o.logit_bias = vec![(3, f32::NAN)]).0, "logit_bias");
        assert_eq!(rejected(|o| o.logit_bias = vec![(3, 1.0), (3, 2.0)]).0, "logit_bias");
    }

    #[test]
    fn a_message_has_value_reason_and_a_way_out() {
        let (_, message) = rejected(|o| o.min_p = 2.0);
        assert_eq!(message, "min_p = 2: must be from 0 to 1; for example min_p = 0.05");
    }

    #[test]
    fn a_penalty_over_no_tokens_is_not_silently_ignored() {
        let (key, _) = rejected(|o| {
            o.repeat_last_n = 0;
            o.frequency_penalty = 0.5;
        });
        assert_eq!(key, "repeat_last_n");
        assert!(SamplerOptions { repeat_last_n: 0, ..SamplerOptions::default() }.validate().is_ok());
    }

    #[test]
    fn edges_are_accepted() {
        let edge = SamplerOptions {
            temperature: 0.0,
            top_k: usize::MAX,
            min_p: 1.0,
            repeat_last_n: -1,
            logit_bias: vec![(0, f32::NEG_INFINITY), (u32::MAX, -100.0)],
            ..SamplerOptions::default()
        };
        assert_eq!(edge.validate(), Ok(()));
    }

    #[test]
    fn serde_fills_defaults_round_trips_and_refuses_typos() {
        let read: SamplerOptions = serde_json::from_str(r#"{"temperature":0.5,"logit_bias":[[3,-1.5]]}"#).unwrap();
        assert_eq!((read.temperature, read.top_p, read.logit_bias.as_slice()), (0.5, 1.0, &[(3, -1.5)][..]));
        let text = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<SamplerOptions>(&text).unwrap(), read);
        let error = serde_json::from_str::<SamplerOptions>(r#"{"temprature":0.5}"#).unwrap_err().to_string();
        assert!(error.contains("temprature") && error.contains("temperature"), "{error}");
    }
}
