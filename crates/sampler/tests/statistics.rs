//! The draws follow the distribution: chi-square tests with fixed seeds, so they pass or fail for good.
#![allow(clippy::unwrap_used)] // helpers of tests are not #[test] functions themselves

use tallow_sampler::{Sampler, SamplerOptions};

/// Pearson's statistic of `draws` draws at positions 0, 1, ... against the sampler's own distribution, and its degrees
/// of freedom.
fn chi_square(options: SamplerOptions, logits: &[f32], expected: &[(u32, f64)], draws: u64) -> (f64, usize) {
    let mut sampler = Sampler::new(options).unwrap();
    let mut counts = vec![0u32; logits.len()];
    for position in 0..draws {
        counts[sampler.sample_at(logits, &[], position).unwrap().id as usize] += 1;
    }
    let total: u32 = expected.iter().map(|(id, _)| counts[*id as usize]).sum();
    assert_eq!(u64::from(total), draws, "a token outside the distribution was drawn");
    let statistic = expected.iter().map(|&(id, p)| {
        let mean = p * draws as f64;
        assert!(mean >= 5.0, "too few draws for the test to mean anything");
        (f64::from(counts[id as usize]) - mean).powi(2) / mean
    });
    (statistic.sum(), expected.len() - 1)
}

/// The value that the statistic exceeds with probability about 0.001: Wilson and Hilferty's approximation, z = 3.09.
fn critical(degrees: usize) -> f64 {
    let d = degrees as f64;
    d * (1.0 - 2.0 / (9.0 * d) + 3.09 * (2.0 / (9.0 * d)).sqrt()).powi(3)
}

fn logits() -> Vec<f32> {
    (0..32).map(|i| ((i * 11 % 32) as f32) * 0.12 - 2.0).collect()
}

#[test]
fn plain_sampling_follows_the_softmax() {
    let logits = logits();
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let softmax: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(|&l| f64::from(l).exp() / total)).collect();
    for seed in [0, 1, 0xDEAD_BEEF_0BAD_CAFE] {
        let options = SamplerOptions { seed, ..SamplerOptions::default() };
        let (statistic, degrees) = chi_square(options, &logits, &softmax, 60_000);
        assert!(statistic < critical(degrees), "seed {seed}: {statistic} over {degrees} degrees of freedom");
    }
}

#[test]
fn temperature_and_filters_follow_the_renormalised_softmax() {
    let logits = logits();
    // By hand, apart from the crate: temper, sort, cut at 12, cut at 0.8 of what is left.
    let mut ranked: Vec<(u32, f64)> = (0u32..).zip(logits.iter().map(|&l| (f64::from(l) / 0.7).exp())).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    ranked.truncate(12);
    let total: f64 = ranked.iter().map(|r| r.1).sum();
    let mut sum = 0.0;
    let kept = ranked.iter().take_while(|r| {
        let before = sum;
        sum += r.1 / total;
        before < 0.8
    });
    let kept: Vec<(u32, f64)> = kept.copied().collect();
    let total: f64 = kept.iter().map(|r| r.1).sum();
    let expected: Vec<(u32, f64)> = kept.iter().map(|&(id, weight)| (id, weight / total)).collect();
    assert!(expected.len() > 3 && expected.len() < 12);
    let options = SamplerOptions { temperature: 0.7, top_k: 12, top_p: 0.8, seed: 5, ..SamplerOptions::default() };
    let (statistic, degrees) = chi_square(options, &logits, &expected, 60_000);
    assert!(statistic < critical(degrees), "{statistic} over {degrees} degrees of freedom");
}

#[test]
fn the_test_rejects_a_wrong_distribution() {
    // The power of the test above: drawing at temperature 1.05 is told from temperature 1.
    let logits = logits();
    let expected = Sampler::new(SamplerOptions::default()).unwrap().distribution(&logits, &[]).unwrap();
    let options = SamplerOptions { temperature: 1.05, ..SamplerOptions::default() };
    let (statistic, degrees) = chi_square(options, &logits, &expected, 60_000);
    assert!(statistic > critical(degrees), "{statistic} over {degrees} degrees of freedom");
}

#[test]
fn neighbouring_positions_and_seeds_are_independent() {
    // Pairs of draws over 4 equal tokens: 16 equal cells, for (position, position + 1) and for (seed, seed + 1).
    let logits = [0.0; 4];
    let mut cells = [[0u32; 16]; 2];
    let draw = |seed: u64, position: u64| {
        let mut sampler = Sampler::new(SamplerOptions { seed, ..SamplerOptions::default() }).unwrap();
        sampler.sample_at(&logits, &[], position).unwrap().id as usize
    };
    for i in 0..8_000 {
        cells[0][draw(9, 2 * i) * 4 + draw(9, 2 * i + 1)] += 1;
        cells[1][draw(2 * i, 3) * 4 + draw(2 * i + 1, 3)] += 1;
    }
    for counts in cells {
        let statistic: f64 = counts.iter().map(|&c| (f64::from(c) - 500.0).powi(2) / 500.0).sum();
        assert!(statistic < critical(15), "{statistic}: {counts:?}");
    }
}
