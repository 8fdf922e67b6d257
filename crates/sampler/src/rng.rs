//! A counter-based random number generator: the draw at a position depends on the seed and the position, nothing else.

/// Philox4x32 with 10 rounds: a keyed bijection of 128-bit counters whose outputs pass the usual statistical tests.
///
/// A generator without state: the value for `(key, counter)` can be computed at any time, in any order and on any
/// thread. Sampling keyed by position is therefore the same alone, in a batch, after a resume or a rollback.
///
/// Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.3
/// (<https://doi.org/10.1145/2063384.2063405>); checked against the known answers of the authors' Random123 library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    const ROUNDS: usize = 10;
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    /// The golden ratio and the square root of 3 less 1, as 32-bit fractions.
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

    /// The generator with this 64-bit key.
    pub fn new(seed: u64) -> Self {
        Self { key: split(seed) }
    }

    /// The 128 random bits of one counter.
    pub fn block(&self, counter: [u32; 4]) -> [u32; 4] {
        let (mut c, mut k) = (counter, self.key);
        for _ in 0..Self::ROUNDS {
            let [low0, high0] = split(u64::from(Self::MULTIPLIERS[0]) * u64::from(c[0]));
            let [low1, high1] = split(u64::from(Self::MULTIPLIERS[1]) * u64::from(c[2]));
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0];
            k = [k[0].wrapping_add(Self::WEYL[0]), k[1].wrapping_add(Self::WEYL[1])];
        }
        c
    }
}

/// A uniform number in [0, 1) with 53 random bits, keyed by `(seed, position)`; `stream` separates several draws at one
/// position (the sampler uses stream 0).
pub fn uniform(seed: u64, position: u64, stream: u64) -> f64 {
    let ([p0, p1], [s0, s1]) = (split(position), split(stream));
    let [low, high, ..] = Philox::new(seed).block([p0, p1, s0, s1]);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Low and high half.
fn split(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        let zero = Philox { key: [0, 0] }.block([0; 4]);
        assert_eq!(zero, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = Philox { key: [u32::MAX; 2] }.block([u32::MAX; 4]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = Philox { key: [0xa409_3822, 0x299f_31d0] }.block([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn uniform_is_in_range_and_depends_on_every_argument() {
        let draws: Vec<f64> = (0..10_000).map(|position| uniform(3, position, 0)).collect();
        assert!(draws.iter().all(|u| (0.0..1.0).contains(u)));
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        // Standard deviation of the mean: sqrt(1/12/10000) = 0.0029.
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert_ne!(uniform(1, 5, 0), uniform(2, 5, 0));
        assert_ne!(uniform(1, 5, 0), uniform(1, 6, 0));
        assert_ne!(uniform(1, 5, 0), uniform(1, 5, 1));
        assert_ne!(uniform(1, 5, 0), uniform(1, 5 + (1 << 32), 0));
        assert_ne!(uniform(1, 5, 0), uniform(1 + (1 << 32), 5, 0));
    }
}
