//! The dropout mask: its share, its key, and its independence of slicing, threads and instruction set.

use half::bf16;
use tallow_kernels::dropout::{Mask, dropout};
use tallow_kernels::rng::philox4x32;
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];

fn mask(p: f64) -> Mask {
    let threshold = (p * 4_294_967_296.0) as u32;
    Mask { key: [5, 9], counter: [2, 3], offset: 0, threshold, scale: (1.0 / (1.0 - p)) as f32 }
}

fn run(level: Level, mask: Mask, len: usize) -> Vec<f32> {
    let mut y = vec![0.0; len];
    dropout(level, mask, &vec![1.0; len], &mut y);
    y
}

#[test]
fn the_mask_is_philox_word_by_word() {
    for (level, len) in LEVELS.iter().flat_map(|l| [1, 4, 63, 65, 20_001].map(|n| (*l, n))) {
        for (i, y) in run(level, mask(0.3), len).into_iter().enumerate() {
            let word = philox4x32([i as u32 / 4, 0, 2, 3], [5, 9])[i % 4];
            assert_eq!(y, if word >= mask(0.3).threshold { mask(0.3).scale } else { 0.0 }, "{level:?} {i}");
        }
    }
}

#[test]
fn a_slice_of_a_tensor_sees_the_mask_of_the_whole() {
    let whole = run(Level::Avx2, mask(0.5), 30_000);
    for (offset, len) in [(1, 10), (2, 100), (7, 20_000), (8192, 9), (29_999, 1)] {
        let part = run(Level::Avx2, Mask { offset: offset as u64, ..mask(0.5) }, len);
        assert_eq!(part, whole[offset..offset + len]);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    assert_eq!(pool.install(|| run(Level::Avx2, mask(0.5), 30_000)), whole);
}

#[test]
fn about_p_are_dropped_and_keys_differ() {
    for p in [0.1, 0.5, 0.9] {
        let y = run(Level::Avx512, mask(p), 100_000);
        let dropped = y.iter().filter(|&&v| v == 0.0).count() as f64 / y.len() as f64;
        assert!((dropped - p).abs() < 0.01, "{dropped} of {p}");
    }
    let one = run(Level::Avx512, mask(0.5), 64);
    assert_ne!(one, run(Level::Avx512, Mask { counter: [2, 4], ..mask(0.5) }, 64));
    assert_ne!(one, run(Level::Avx512, Mask { counter: [3, 3], ..mask(0.5) }, 64));
    assert_ne!(one, run(Level::Avx512, Mask { key: [5, 8], ..mask(0.5) }, 64));
}

#[test]
fn nan_shows_through_and_bf16_agrees() {
    let mut y = vec![0.0; 50];
    dropout(Level::Avx2, mask(0.5), &[f32::NAN; 50], &mut y);
    assert!(y.iter().all(|v| v.is_nan()));
    let mut y = vec![bf16::ZERO; 50];
    dropout(Level::Avx2, mask(0.5), &[bf16::ONE; 50], &mut y);
    assert_eq!(y.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), run(Level::Avx2, mask(0.5), 50));
}
