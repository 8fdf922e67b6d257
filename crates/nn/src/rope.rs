//! Rotary position embedding as checkpoints configure it.

use std::f64::consts::PI;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tallow_ops::RopeTable;

use crate::{Error, Result};

/// `rope_scaling` of a Hugging Face configuration: how frequencies are stretched for longer contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// Frequencies as they are.
    Default,
    /// All frequencies divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// Stretch, at least 1.
        factor: f64,
    },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        /// Stretch of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the first training.
        original_max_position_embeddings: usize,
    },
}

/// Frequencies of rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Rotated channels of a head, even.
    pub rotary_dim: usize,
    /// Base `theta` of the frequencies `theta^(-2i / rotary_dim)`.
    pub theta: f64,
    /// Positions in the table.
    pub max_positions: usize,
    /// Stretching.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Inverse frequencies, `rotary_dim / 2` values in radians a position.
    pub fn inv_freq(&self) -> Vec<f32> {
        (0..self.rotary_dim / 2)
            .map(|i| {
                let freq = self.theta.powf(-2.0 * i as f64 / self.rotary_dim as f64);
                self.stretch(freq) as f32
            })
            .collect()
    }

    fn stretch(&self, freq: f64) -> f64 {
        match self.scaling {
            RopeScaling::Default => freq,
            RopeScaling::Linear { factor } => freq / factor,
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = original_max_position_embeddings as f64;
                let wavelength = 2.0 * PI / freq;
                if wavelength < original / high_freq_factor {
                    return freq;
                }
                if wavelength > original / low_freq_factor {
                    return freq / factor;
                }
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * freq / factor + smooth * freq
            }
        }
    }

    /// The table of cosines and sines.
    ///
    /// # Errors
    /// If `rotary_dim` is odd or zero, or the table would be empty.
    pub fn table(&self) -> Result<Arc<RopeTable>> {
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) {
            return Err(Error::Config {
                key: "head_dim",
                value: self.rotary_dim.to_string(),
                reason: "rotary embedding turns pairs of channels, so the head size must be even, e.g. 64".into(),
            });
        }
        Ok(Arc::new(RopeTable::new(&self.inv_freq(), self.max_positions, 1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_keeps_high_and_stretches_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let plain = RopeConfig { rotary_dim: 128, theta: 5e5, max_positions: 8, scaling: RopeScaling::Default };
        let stretched = RopeConfig { scaling, ..plain.clone() };
        let (a, b) = (plain.inv_freq(), stretched.inv_freq());
        assert_eq!(a[0], b[0]);
        assert!((a[63] / b[63] - 8.0).abs() < 1e-4);
        assert!(a.iter().zip(&b).all(|(a, b)| b <= a));
    }
}
