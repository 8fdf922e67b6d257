//! The exponential of a number up to 0, and sums of it: the same bits on every platform, and simple enough for the
//! compiler to run several lanes at once.

/// Below this the result would be under the smallest normal number: 0 is given instead.
const LOWEST: f32 = -87.33;

/// `e^x` for `x <= 0`; the relative error is below 2e-7, and `e^0` is exactly 1.
///
/// The system's `expf` differs between platforms in the last bit, which is enough to change a drawn token; this one is
/// plain multiplications and additions. `x = n ln 2 + r` with `|r| <= ln 2 / 2`, then a polynomial in `r` times `2^n`.
/// Source of the coefficients: `expf` of the Cephes library, <https://www.netlib.org/cephes/>.
pub(crate) fn exp(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < LOWEST { LOWEST } else { x };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let y = (p * r * r + r + 1.0) * f32::from_bits(power);
    if x < LOWEST { 0.0 } else { y }
}

/// Whether [`exp`] gives more than 0.
pub(crate) fn is_above_zero(x: f32) -> bool {
    x >= LOWEST
}

/// `sum exp(score(item) - max)` in f64, where no score is above `max`. The order of the additions is fixed.
pub(crate) fn sum_exp<T: Copy>(items: &[T], max: f32, score: impl Fn(T) -> f32) -> f64 {
    // Separate sums need not wait for one another.
    let mut lanes = [0.0f64; 8];
    let mut chunks = items.chunks_exact(lanes.len());
    for chunk in &mut chunks {
        for (lane, &item) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(score(item) - max));
        }
    }
    let rest: f64 = chunks.remainder().iter().map(|&item| f64::from(exp(score(item) - max))).sum();
    lanes.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_error_over_the_whole_range() {
        let mut worst = 0.0f64;
        for i in 0..=873_000 {
            let x = -(i as f32) * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(exp(x)) - exact) / exact).abs());
        }
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn the_ends_are_exact() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::MIN), 0.0);
        assert!(exp(LOWEST) >= f32::MIN_POSITIVE && is_above_zero(LOWEST));
        assert!(exp(LOWEST.next_down()) == 0.0 && !is_above_zero(LOWEST.next_down()));
        // The same bits everywhere: a change of these would change the text that a seed gives.
        let bits = [-1.0, -0.3, -20.5].map(|x| exp(x).to_bits());
        assert_eq!(bits, [-1.0f64, -0.3f32 as f64, -20.5].map(|x| (x.exp() as f32).to_bits()));
    }

    #[test]
    fn the_sum_is_that_of_its_terms_at_every_length() {
        for len in 0..40 {
            let values: Vec<f32> = (0..len).map(|i| -(i as f32) * 0.37).collect();
            let expected: f64 = values.iter().map(|v| f64::from(*v - 0.5).exp()).sum();
            assert!((sum_exp(&values, 0.5, |v| v) - expected).abs() < 1e-6);
        }
    }
}
