//! What to do when the loss is not finite or jumps: stop, skip the step, or roll back to the last checkpoint.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::reference::documented;

documented! {
    /// `[anomaly]`: the policy for a loss or gradient that is not finite, and for a spike of the loss.
    ///
    /// A loss is a spike when it is above `m + spike_factor * s`, where `m` is the median of the last `window` ordinary
    /// losses and `s = max(1.4826 * MAD, 0.005 * |m|)`: the median absolute deviation, scaled so that it estimates the
    /// standard deviation of a normal distribution, and kept off zero. A median is not moved by the spikes it is to find.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct AnomalyConfig {
        /// When the loss or the gradient norm is NaN or infinite: `stop` (default), `skip` or `rollback`.
        pub nan: Policy,
        /// When the loss spikes: `off` (default), `stop`, `skip` or `rollback`.
        pub spike: SpikePolicy,
        /// How many robust standard deviations above the median make a spike; above 0 (default 8).
        pub spike_factor: f64,
        /// Over how many of the last ordinary losses the median is taken, at least 8 (default 64). Nothing is called a
        /// spike before that many were seen.
        pub window: usize,
        /// The most steps skipped in a row; one more stops the run (default 10).
        pub max_skips: u64,
        /// The most rollbacks in a run; one more stops it (default 3).
        pub max_rollbacks: u64,
    }
}

impl Default for AnomalyConfig {
    fn default() -> Self {
        Self {
            nan: Policy::Stop,
            spike: SpikePolicy::Off,
            spike_factor: 8.0,
            window: 64,
            max_skips: 10,
            max_rollbacks: 3,
        }
    }
}

/// The largest accepted `window`: the state is sorted at every step.
const MAX_WINDOW: usize = 1 << 16;

/// What to do about a step that went wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// End the run with an error; the last checkpoint stays.
    #[default]
    Stop,
    /// Leave the weights as they are and go on with the next batch.
    Skip,
    /// Go back to the last checkpoint and on from behind the offending batch.
    Rollback,
}

/// What to do about a spike of the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpikePolicy {
    /// Nothing: spikes are not looked for.
    #[default]
    Off,
    /// As [`Policy::Stop`].
    Stop,
    /// As [`Policy::Skip`].
    Skip,
    /// As [`Policy::Rollback`].
    Rollback,
}

impl SpikePolicy {
    fn policy(self) -> Option<Policy> {
        match self {
            Self::Off => None,
            Self::Stop => Some(Policy::Stop),
            Self::Skip => Some(Policy::Skip),
            Self::Rollback => Some(Policy::Rollback),
        }
    }
}

/// A policy that cannot be followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[error("anomaly.{key} = {value}: {reason}")]
pub struct AnomalyError {
    /// The key within `[anomaly]`.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What would be right.
    pub reason: String,
}

impl AnomalyConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// For a factor that is not positive and finite, or a window out of its range.
    pub fn validate(&self) -> Result<(), AnomalyError> {
        if !(self.spike_factor > 0.0 && self.spike_factor.is_finite()) {
            let reason = "must be above 0 and finite, e.g. 8".into();
            return Err(AnomalyError { key: "spike_factor", value: self.spike_factor.to_string(), reason });
        }
        if !(8..=MAX_WINDOW).contains(&self.window) {
            let reason = format!("must be from 8 to {MAX_WINDOW}, e.g. 64");
            return Err(AnomalyError { key: "window", value: self.window.to_string(), reason });
        }
        Ok(())
    }
}

/// What to do with the step that was observed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Use its gradient.
    Ok,
    /// Throw its gradient away.
    Skip {
        /// What was seen.
        reason: String,
    },
    /// Go back to the last checkpoint.
    Rollback {
        /// What was seen.
        reason: String,
    },
    /// End the run.
    Stop {
        /// What was seen, and what can be done about it.
        reason: String,
    },
}

/// Watches loss and gradient norm from step to step.
///
/// Its state serialises exactly, so a resumed run judges as the uninterrupted one would have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnomalyDetector {
    config: AnomalyConfig,
    /// The last ordinary losses, oldest first, as bits: JSON readers need not round-trip every decimal.
    #[serde(with = "as_bits")]
    recent: VecDeque<f64>,
    skips_in_a_row: u64,
    skips: u64,
    rollbacks: u64,
}

impl AnomalyDetector {
    /// A detector that has seen nothing. Check `config` with [`AnomalyConfig::validate`] first.
    pub fn new(config: AnomalyConfig) -> Self {
        Self { config, recent: VecDeque::new(), skips_in_a_row: 0, skips: 0, rollbacks: 0 }
    }

    /// Judges a step by its mean loss and the norm of its gradient before clipping. Call it once a step, before the
    /// weights are touched.
    pub fn observe(&mut self, loss: f64, grad_norm: f64) -> Verdict {
        match self.judge(loss, grad_norm) {
            None => {
                self.remember(loss);
                self.skips_in_a_row = 0;
                Verdict::Ok
            }
            Some((policy, reason)) => self.act(policy, reason),
        }
    }

    /// The same memory under another policy: a resumed run may judge otherwise.
    #[must_use]
    pub fn with_config(self, config: AnomalyConfig) -> Self {
        Self { config, ..self }
    }

    /// The same memory of losses with the counts of `other`: after a rollback the losses since are void, what was done
    /// about them is not.
    #[must_use]
    pub fn with_counts_of(self, other: &Self) -> Self {
        let Self { skips_in_a_row, skips, rollbacks, .. } = *other;
        Self { skips_in_a_row, skips, rollbacks, ..self }
    }

    /// Steps skipped so far.
    pub fn skips(&self) -> u64 {
        self.skips
    }

    /// Rollbacks so far.
    pub fn rollbacks(&self) -> u64 {
        self.rollbacks
    }

    /// The loss above which a step is a spike; `None` while spikes are off or the window is not full.
    pub fn threshold(&self) -> Option<f64> {
        self.config.spike.policy()?;
        if self.recent.len() < self.config.window {
            return None;
        }
        let center = median(self.recent.iter().copied())?;
        let mad = median(self.recent.iter().map(|x| (x - center).abs()))?;
        let deviation = (1.4826 * mad).max(0.005 * center.abs());
        Some(center + self.config.spike_factor * deviation)
    }

    fn judge(&self, loss: f64, grad_norm: f64) -> Option<(Policy, String)> {
        if !loss.is_finite() {
            return Some((self.config.nan, format!("the loss is {loss}")));
        }
        if !grad_norm.is_finite() {
            return Some((self.config.nan, format!("the gradient norm is {grad_norm}")));
        }
        let (policy, threshold) = (self.config.spike.policy()?, self.threshold()?);
        let reason = || format!("the loss spikes to {loss:.4}, above {threshold:.4}");
        (loss > threshold).then(|| (policy, reason()))
    }

    fn act(&mut self, policy: Policy, reason: String) -> Verdict {
        match policy {
            Policy::Stop => {
                let way_out = "lower optimizer.lr, lengthen schedule.warmup_steps, or let anomaly skip such steps";
                Verdict::Stop { reason: format!("{reason}; {way_out}") }
            }
            Policy::Skip if self.skips_in_a_row >= self.config.max_skips => {
                let many = self.config.max_skips;
                Verdict::Stop { reason: format!("{reason}, after {many} skipped steps in a row (anomaly.max_skips)") }
            }
            Policy::Rollback if self.rollbacks >= self.config.max_rollbacks => {
                let many = self.config.max_rollbacks;
                Verdict::Stop { reason: format!("{reason}, after {many} rollbacks (anomaly.max_rollbacks)") }
            }
            Policy::Skip => {
                self.skips_in_a_row += 1;
                self.skips += 1;
                Verdict::Skip { reason }
            }
            Policy::Rollback => {
                self.rollbacks += 1;
                Verdict::Rollback { reason }
            }
        }
    }

    fn remember(&mut self, loss: f64) {
        while self.recent.len() >= self.config.window.max(1) {
            self.recent.pop_front();
        }
        self.recent.push_back(loss);
    }
}

/// The middle value, or the mean of the two middle ones. `None` of nothing.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some(0.5 * (low + high))
}

/// `f64`s as the integers of their bits.
mod as_bits {
    use std::collections::VecDeque;

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &VecDeque<f64>, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(values.iter().map(|x| x.to_bits()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<VecDeque<f64>, D::Error> {
        let bits = Vec::<u64>::deserialize(from)?;
        Ok(bits.into_iter().map(f64::from_bits).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detector(nan: Policy, spike: SpikePolicy) -> AnomalyDetector {
        AnomalyDetector::new(AnomalyConfig { nan, spike, window: 16, ..AnomalyConfig::default() })
    }

    /// Losses around `level` with a fixed, irregular ripple.
    fn ripple(level: f64, count: usize) -> impl Iterator<Item = f64> {
        (0..count).map(move |i| level + 0.05 * ((i * i * 7 % 11) as f64 / 5.0 - 1.0))
    }

    fn calm(detector: &mut AnomalyDetector, level: f64, count: usize) {
        for loss in ripple(level, count) {
            assert_eq!(detector.observe(loss, 1.0), Verdict::Ok);
        }
    }

    #[test]
    fn whatever_is_not_finite_follows_the_nan_policy() {
        for bad in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (2.0, f64::NAN), (2.0, f64::NEG_INFINITY)] {
            let verdict = |policy| detector(policy, SpikePolicy::Off).observe(bad.0, bad.1);
            assert!(matches!(verdict(Policy::Stop), Verdict::Stop { .. }), "{bad:?}");
            assert!(matches!(verdict(Policy::Skip), Verdict::Skip { .. }), "{bad:?}");
            assert!(matches!(verdict(Policy::Rollback), Verdict::Rollback { .. }), "{bad:?}");
        }
    }

    #[test]
    fn a_spike_is_found_and_does_not_move_the_threshold() {
        let mut detector = detector(Policy::Stop, SpikePolicy::Skip);
        calm(&mut detector, 3.0, 40);
        let before = detector.threshold().unwrap();
        assert!((3.05..4.0).contains(&before), "{before}");
        assert!(matches!(detector.observe(5.0, 1.0), Verdict::Skip { .. }));
        assert_eq!(detector.threshold(), Some(before));
        assert_eq!(detector.observe(3.0, 1.0), Verdict::Ok);
        assert_eq!(detector.skips(), 1);
    }

    #[test]
    fn threshold_follows_its_formula() {
        let mut detector = detector(Policy::Stop, SpikePolicy::Stop);
        let losses: Vec<f64> = ripple(3.0, 16).collect();
        calm(&mut detector, 3.0, 16);
        let mut sorted = losses.clone();
        sorted.sort_by(f64::total_cmp);
        let m = (sorted[7] + sorted[8]) / 2.0;
        let mut deviations: Vec<f64> = losses.iter().map(|x| (x - m).abs()).collect();
        deviations.sort_by(f64::total_cmp);
        let expected = m + 8.0 * 1.4826 * (deviations[7] + deviations[8]) / 2.0;
        assert!((detector.threshold().unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn a_falling_loss_is_never_a_spike_and_off_means_off() {
        let mut falling = detector(Policy::Stop, SpikePolicy::Stop);
        for step in 0..500 {
            let loss = 2.0 + 7.0 * (-(step as f64) / 60.0).exp();
            assert_eq!(falling.observe(loss, 1.0), Verdict::Ok, "step {step}");
        }
        let mut off = detector(Policy::Stop, SpikePolicy::Off);
        calm(&mut off, 3.0, 40);
        assert_eq!(off.observe(1e6, 1.0), Verdict::Ok);
    }

    #[test]
    fn nothing_is_a_spike_before_the_window_is_full() {
        let mut detector = detector(Policy::Stop, SpikePolicy::Stop);
        calm(&mut detector, 3.0, 15);
        assert_eq!(detector.observe(100.0, 1.0), Verdict::Ok);
    }

    #[test]
    fn too_many_skips_in_a_row_or_rollbacks_stop_the_run() {
        let mut skipping = detector(Policy::Skip, SpikePolicy::Off);
        for _ in 0..10 {
            assert!(matches!(skipping.observe(f64::NAN, 1.0), Verdict::Skip { .. }));
        }
        let Verdict::Stop { reason } = skipping.observe(f64::NAN, 1.0) else { panic!("went on") };
        assert!(reason.contains("max_skips"), "{reason}");

        let mut broken = detector(Policy::Skip, SpikePolicy::Off);
        for step in 0..100 {
            let loss = if step % 2 == 0 { f64::NAN } else { 3.0 };
            assert!(!matches!(broken.observe(loss, 1.0), Verdict::Stop { .. }), "an ordinary step starts anew");
        }

        let mut back = detector(Policy::Rollback, SpikePolicy::Off);
        for _ in 0..3 {
            assert!(matches!(back.observe(f64::NAN, 1.0), Verdict::Rollback { .. }));
            assert_eq!(back.observe(3.0, 1.0), Verdict::Ok);
        }
        assert!(matches!(back.observe(f64::NAN, 1.0), Verdict::Stop { .. }));
    }

    #[test]
    fn a_saved_detector_judges_as_the_original() {
        let mut original = detector(Policy::Stop, SpikePolicy::Skip);
        for loss in ripple(0.1, 23) {
            original.observe(loss / 3.0, 1.0);
        }
        let text = serde_json::to_string(&original).unwrap();
        let mut restored: AnomalyDetector = serde_json::from_str(&text).unwrap();
        assert_eq!(restored, original);
        for loss in ripple(0.2, 50) {
            assert_eq!(restored.observe(loss, 1.0), original.observe(loss, 1.0));
        }
    }

    #[test]
    fn bad_values_are_named() {
        let default = AnomalyConfig::default;
        assert_eq!(default().validate(), Ok(()));
        let factor = AnomalyConfig { spike_factor: f64::NAN, ..default() }.validate().unwrap_err().to_string();
        assert!(factor.contains("anomaly.spike_factor"), "{factor}");
        let window = AnomalyConfig { window: 0, ..default() }.validate().unwrap_err().to_string();
        assert!(window.contains("anomaly.window = 0"), "{window}");
        assert!(toml::from_str::<AnomalyConfig>("nan = \"ignore\"").is_err());
        assert!(toml::from_str::<AnomalyConfig>("spikes = \"skip\"").is_err());
        let config: AnomalyConfig = toml::from_str("nan = \"rollback\"\nspike = \"off\"").unwrap();
        assert_eq!(config, AnomalyConfig { nan: Policy::Rollback, ..default() });
    }
}
