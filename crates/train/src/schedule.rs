//! The learning rate over time: warm-up, then cosine, linear, warm-up-stable-decay, or constant.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::reference::documented;

documented! {
    /// `[schedule]`: how the learning rate moves from step to step.
    ///
    /// With `s` the step from 0, `w` the warm-up steps, `n` all steps, `r` the final ratio and
    /// `p = (s - w) / max(1, n - w)`, the rate is the optimizer's `lr` times:
    ///
    /// | kind | factor |
    /// |---|---|
    /// | any, `s < w` | `(s + 1) / w` |
    /// | `cosine` | `r + (1 - r) * (1 + cos(pi * p)) / 2` |
    /// | `linear` | `1 - (1 - r) * p` |
    /// | `wsd` | 1, then over the last `decay_fraction` of all steps linearly down to `r` |
    /// | `constant` | 1 |
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct ScheduleConfig {
        /// `cosine` (default), `linear`, `wsd` or `constant`.
        pub kind: ScheduleKind,
        /// Steps of linear warm-up from near 0 to the full rate. Unset: 2% of all steps. 0: none.
        #[serde(skip_serializing_if = "Option::is_none")]
        pub warmup_steps: Option<u64>,
        /// The rate at the end as a part of the full rate, from 0 to 1 (default 0.1). `constant` takes no notice of it.
        pub final_lr_ratio: f64,
        /// `wsd` only: the part of all steps, at the end, over which the rate falls; above 0, at most 1 (default 0.2).
        pub decay_fraction: f64,
    }
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self { kind: ScheduleKind::Cosine, warmup_steps: None, final_lr_ratio: 0.1, decay_fraction: 0.2 }
    }
}

/// The shape of the rate after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduleKind {
    /// Half a cosine wave (Loshchilov and Hutter 2017, without restarts).
    #[default]
    Cosine,
    /// A straight line.
    Linear,
    /// Warm-up, stable, decay (Hu et al. 2024): a plateau can be continued without having fixed its length before.
    Wsd,
    /// The full rate to the end.
    Constant,
}

/// A schedule that cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[error("schedule.{key} = {value}: {reason}")]
pub struct ScheduleError {
    /// The key within `[schedule]`.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What is wrong with it, and what would be right.
    pub reason: String,
}

impl ScheduleConfig {
    /// Checks every value against a run of `total_steps` steps.
    ///
    /// # Errors
    /// For a ratio or fraction out of its range, or a warm-up (and decay) that does not fit in the run.
    pub fn validate(&self, total_steps: u64) -> Result<(), ScheduleError> {
        let wrong = |key, value: String, reason: String| Err(ScheduleError { key, value, reason });
        if !(0.0..=1.0).contains(&self.final_lr_ratio) {
            let reason = "must be from 0 to 1, e.g. 0.1 to end at a tenth of the rate".into();
            return wrong("final_lr_ratio", self.final_lr_ratio.to_string(), reason);
        }
        if !(self.decay_fraction > 0.0 && self.decay_fraction <= 1.0) {
            let reason = "must be above 0 and at most 1, e.g. 0.2 to decay over the last fifth".into();
            return wrong("decay_fraction", self.decay_fraction.to_string(), reason);
        }
        let warmup = self.warmup(total_steps);
        if warmup > total_steps {
            let reason =
                format!("longer than the run of {total_steps} steps; at most {total_steps}, or leave it unset");
            return wrong("warmup_steps", warmup.to_string(), reason);
        }
        let room = 1.0 - warmup as f64 / total_steps.max(1) as f64;
        if self.kind == ScheduleKind::Wsd && self.decay_fraction > room {
            let reason =
                format!("with {warmup} warm-up steps of {total_steps} the decay may take at most {:.3}", room.max(0.0));
            return wrong("decay_fraction", self.decay_fraction.to_string(), reason);
        }
        Ok(())
    }

    /// Warm-up steps of a run of `total_steps` steps: as set, or 2%.
    pub fn warmup(&self, total_steps: u64) -> u64 {
        self.warmup_steps.unwrap_or(total_steps / 50)
    }

    /// The learning rate of `step` (the first is 0) in a run of `total_steps`, for the full rate `base_lr`.
    ///
    /// A step past the end gets the rate of the end.
    pub fn lr(&self, base_lr: f64, step: u64, total_steps: u64) -> f64 {
        let warmup = self.warmup(total_steps);
        let step = step.min(total_steps.max(warmup));
        if step < warmup {
            return base_lr * (step + 1) as f64 / warmup as f64;
        }
        let r = self.final_lr_ratio;
        let progress = (step - warmup) as f64 / total_steps.saturating_sub(warmup).max(1) as f64;
        base_lr
            * match self.kind {
                ScheduleKind::Cosine => r + (1.0 - r) * 0.5 * (1.0 + (PI * progress).cos()),
                ScheduleKind::Linear => 1.0 - (1.0 - r) * progress,
                ScheduleKind::Wsd => 1.0 - (1.0 - r) * self.decayed(step, total_steps),
                ScheduleKind::Constant => 1.0,
            }
    }

    /// How much of the final decay of `wsd` is behind, from 0 to 1.
    fn decayed(&self, step: u64, total_steps: u64) -> f64 {
        let total = total_steps.max(1) as f64;
        let start = total * (1.0 - self.decay_fraction);
        ((step as f64 - start) / (total - start)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind, warmup: u64) -> ScheduleConfig {
        ScheduleConfig { kind, warmup_steps: Some(warmup), final_lr_ratio: 0.1, decay_fraction: 0.2 }
    }

    const KINDS: [ScheduleKind; 4] =
        [ScheduleKind::Cosine, ScheduleKind::Linear, ScheduleKind::Wsd, ScheduleKind::Constant];

    #[test]
    fn table_of_rates() {
        use ScheduleKind::{Constant, Cosine, Linear, Wsd};
        // (kind, step, expected): 100 steps, 10 of warm-up, a full rate of 2, worked out by hand.
        let table = [
            (Cosine, 0, 0.2),
            (Cosine, 4, 1.0),
            (Cosine, 9, 2.0),
            (Cosine, 10, 2.0),
            (Cosine, 55, 2.0 * (0.1 + 0.9 * 0.5)),
            (Cosine, 40, 2.0 * (0.1 + 0.9 * 0.75)),
            (Cosine, 100, 0.2),
            (Linear, 9, 2.0),
            (Linear, 10, 2.0),
            (Linear, 55, 2.0 * 0.55),
            (Linear, 100, 0.2),
            (Wsd, 0, 0.2),
            (Wsd, 79, 2.0),
            (Wsd, 80, 2.0),
            (Wsd, 90, 2.0 * 0.55),
            (Wsd, 100, 0.2),
            (Constant, 0, 0.2),
            (Constant, 99, 2.0),
        ];
        for (kind, step, expected) in table {
            let lr = schedule(kind, 10).lr(2.0, step, 100);
            assert!((lr - expected).abs() < 1e-12, "{kind:?} at {step}: {lr}, not {expected}");
        }
    }

    #[test]
    fn rises_through_the_warmup_then_never_rises_again() {
        for kind in KINDS {
            for (warmup, total) in [(0, 1), (0, 37), (1, 2), (13, 200), (200, 200)] {
                let config = schedule(kind, warmup);
                let rates: Vec<f64> = (0..total).map(|s| config.lr(3e-4, s, total)).collect();
                let (up, down) = rates.split_at(warmup as usize);
                assert!(up.windows(2).all(|w| w[0] < w[1]), "{kind:?} {warmup}/{total}");
                assert!(down.windows(2).all(|w| w[0] >= w[1]), "{kind:?} {warmup}/{total}");
                assert!(rates.iter().all(|r| *r > 0.0 && *r <= 3e-4 * (1.0 + 1e-12)), "{kind:?} {warmup}/{total}");
            }
        }
    }

    #[test]
    fn a_step_past_the_end_keeps_the_last_rate() {
        for kind in KINDS {
            let config = schedule(kind, 10);
            assert_eq!(config.lr(1.0, 100, 100), config.lr(1.0, 1_000_000, 100), "{kind:?}");
        }
    }

    #[test]
    fn unset_warmup_is_two_percent_and_short_runs_have_none() {
        let config = ScheduleConfig::default();
        assert_eq!(config.warmup(1000), 20);
        assert_eq!(config.warmup(10), 0);
        assert_eq!(config.lr(1.0, 0, 10), 1.0);
    }

    #[test]
    fn bad_values_name_key_value_and_a_way_out() {
        let default = ScheduleConfig::default();
        for (config, key) in [
            (ScheduleConfig { final_lr_ratio: 1.5, ..default.clone() }, "final_lr_ratio = 1.5"),
            (ScheduleConfig { final_lr_ratio: f64::NAN, ..default.clone() }, "final_lr_ratio = NaN"),
            (ScheduleConfig { decay_fraction: 0.0, ..default.clone() }, "decay_fraction = 0"),
            (ScheduleConfig { warmup_steps: Some(101), ..default.clone() }, "warmup_steps = 101"),
            (ScheduleConfig { decay_fraction: 0.95, ..schedule(ScheduleKind::Wsd, 10) }, "decay_fraction = 0.95"),
        ] {
            let message = config.validate(100).map_err(|e| e.to_string()).unwrap_err();
            assert!(message.contains(key), "{message}");
        }
        for kind in KINDS {
            assert_eq!(schedule(kind, 10).validate(100), Ok(()));
        }
    }

    #[test]
    fn reads_from_toml_strictly() {
        let config: ScheduleConfig = toml::from_str("kind = \"wsd\"\nwarmup_steps = 5").unwrap();
        assert_eq!(config, ScheduleConfig { warmup_steps: Some(5), ..schedule(ScheduleKind::Wsd, 5) });
        assert!(toml::from_str::<ScheduleConfig>("warmup = 5").unwrap_err().to_string().contains("warmup_steps"));
        let written = toml::to_string(&ScheduleConfig::default()).unwrap();
        assert_eq!(toml::from_str::<ScheduleConfig>(&written).unwrap(), ScheduleConfig::default());
    }
}
