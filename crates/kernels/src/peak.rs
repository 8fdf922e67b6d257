//! What this machine can do at most, measured: multiply-adds from registers, and bytes to and from memory.
//!
//! Each measure runs on all threads of the current rayon pool for about a fifth of a second, in short rounds, and
//! reports the best round: other programs only ever make a round slower. Results are kept for the life of the process.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::simd::{self, Bf16, Level, level};

/// How long a measure takes.
const BUDGET: Duration = Duration::from_millis(200);
/// About how long a round of arithmetic takes: long beside reading a clock, short beside a time slice of other work.
const ROUND: Duration = Duration::from_millis(1);
/// Independent chains of multiply-adds: latency times throughput of any CPU so far (4 cycles, 2 a cycle), and some.
const CHAINS: usize = 12;

/// Bytes a second between memory and all cores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bandwidth {
    /// Bytes read a second.
    pub read: f64,
    /// Bytes read plus bytes written a second, copying.
    pub copy: f64,
}

/// Peak f32 FLOP/s of all threads, at the [`level`] in use. A fused multiply-add counts 2. With AMX the rate of products in
/// three parts of bf16 ([`f32_in_parts`]), where that is more.
pub fn f32_flops() -> f64 {
    static PEAK: OnceLock<f64> = OnceLock::new();
    *PEAK.get_or_init(|| {
        let in_parts = if f32_in_parts() { bf16_flops() / PRODUCTS_OF_PARTS } else { 0.0 };
        let (chain, flops): (fn(u64), usize) = match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Amx => (x86::f32_avx512, 2 * 16),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => (x86::f32_avx2, 2 * 8),
            _ => (portable, 2 * PORTABLE_LANES),
        };
        measure(chain, (flops * CHAINS) as f64).max(in_parts)
    })
}

/// Products of bf16 that stand for one of f32 in three parts.
const PRODUCTS_OF_PARTS: f64 = 6.0;

/// True if products of f32 matrices are made of bf16's, in three exact parts of each value, at the [`level`] in use.
pub fn f32_in_parts() -> bool {
    simd::bf16(level()) == Some(Bf16::Tiles)
}

/// Peak FLOP/s of all threads on bf16 products summed in f32. Where the CPU has no such instruction, or a lower
/// [`level`] is in use, bf16 is widened and this is [`f32_flops`].
pub fn bf16_flops() -> f64 {
    static PEAK: OnceLock<f64> = OnceLock::new();
    let (chain, flops): (fn(u64), usize) = match simd::bf16(level()) {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        Some(Bf16::Tiles) => (tiles, crate::amx::Tiles::BUSY_FLOPS),
        #[cfg(target_arch = "x86_64")]
        Some(Bf16::Pairs) => (x86::bf16_avx512, 2 * 32 * CHAINS),
        _ => return f32_flops(),
    };
    *PEAK.get_or_init(|| measure(chain, flops as f64))
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn tiles(turns: u64) {
    if let Some(amx) = crate::amx::Amx::new() {
        crate::amx::Tiles::configure(amx).busy(turns);
    }
}

/// True if bf16 is multiplied by instructions for it (see [`simd::bf16`]) at the [`level`] in use.
pub fn native_bf16() -> bool {
    simd::bf16(level()).is_some()
}

/// Memory bandwidth of all threads together, over buffers of 256 MiB.
pub fn bandwidth() -> Bandwidth {
    static PEAK: OnceLock<Bandwidth> = OnceLock::new();
    *PEAK.get_or_init(|| {
        const WORDS: usize = (256 << 20) / 8;
        let chunk = WORDS.div_ceil(rayon::current_num_threads());
        let mut from = vec![0u64; WORDS];
        // Each thread writes its part first, so that the pages exist and lie near it.
        from.par_chunks_mut(chunk).for_each(|part| part.fill(0x5555));
        let bytes = (WORDS * 8) as f64;
        let read = best(|| {
            let sum = from.par_chunks(chunk).map(sum).reduce(|| 0, u64::wrapping_add);
            black_box(sum);
            bytes
        });
        let mut to = vec![0u64; WORDS];
        to.par_chunks_mut(chunk).for_each(|part| part.fill(0xaaaa));
        let copy = best(|| {
            to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&to);
            2.0 * bytes
        });
        Bandwidth { read, copy }
    })
}

fn sum(words: &[u64]) -> u64 {
    const WIDTH: usize = 32;
    let mut sums = [0u64; WIDTH];
    let (runs, rest) = words.as_chunks::<WIDTH>();
    for run in runs {
        for (sum, word) in sums.iter_mut().zip(run) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

/// The largest amount a second over repeated rounds; a round returns its amount.
fn best(mut round: impl FnMut() -> f64) -> f64 {
    let begin = Instant::now();
    let mut best = 0f64;
    loop {
        let start = Instant::now();
        let amount = round();
        best = best.max(amount / start.elapsed().as_secs_f64());
        if begin.elapsed() >= BUDGET {
            return best;
        }
    }
}

/// FLOP/s of `chain(n)` on all threads at once, where each of its `n` turns is `flops` operations: the sum of each
/// thread's best round, so that a thread which has to wait for its core does not spoil the rounds of the others.
fn measure(chain: fn(u64), flops: f64) -> f64 {
    let mut turns = 1 << 10;
    loop {
        let start = Instant::now();
        chain(turns);
        if start.elapsed() >= ROUND || turns >= 1 << 40 {
            break;
        }
        turns *= 2;
    }
    let rates = rayon::broadcast(|_| {
        best(|| {
            chain(turns);
            flops * turns as f64
        })
    });
    rates.iter().sum()
}

/// Lanes of the portable chain: what the compiler makes of them is what other portable code gets.
const PORTABLE_LANES: usize = 4;

fn portable(turns: u64) {
    let (mul, add) = (black_box([0.999f32; PORTABLE_LANES]), black_box([1e-3f32; PORTABLE_LANES]));
    let mut sums = [[0.5f32; PORTABLE_LANES]; CHAINS];
    for _ in 0..turns {
        for sum in &mut sums {
            for lane in 0..PORTABLE_LANES {
                // `mul_add` is a library call where the baseline has no such instruction.
                sum[lane] = if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                    sum[lane].mul_add(mul[lane], add[lane])
                } else {
                    sum[lane] * mul[lane] + add[lane]
                };
            }
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_epi32,
        _mm512_set1_ps,
    };
    use std::hint::black_box;
    use std::mem::transmute;

    use super::CHAINS;

    pub(super) fn f32_avx512(turns: u64) {
        #[target_feature(enable = "avx512f")]
        fn chain(turns: u64) {
            let (mul, add) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(1e-3)));
            let mut sums = [_mm512_set1_ps(black_box(0.5)); CHAINS];
            for _ in 0..turns {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, mul, add);
                }
            }
            black_box(sums);
        }
        assert!(is_x86_feature_detected!("avx512f"));
        // SAFETY: the CPU has the feature.
        unsafe { chain(turns) }
    }

    pub(super) fn f32_avx2(turns: u64) {
        #[target_feature(enable = "avx2,fma")]
        fn chain(turns: u64) {
            let (mul, add) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(1e-3)));
            let mut sums = [_mm256_set1_ps(black_box(0.5)); CHAINS];
            for _ in 0..turns {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, mul, add);
                }
            }
            black_box(sums);
        }
        assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"));
        // SAFETY: the CPU has both features.
        unsafe { chain(turns) }
    }

    pub(super) fn bf16_avx512(turns: u64) {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn chain(turns: u64) {
            // Pairs (1, 1) and (0.5, -0.5) as bf16: every product sum is 0, so the chains stay where they are.
            let ones = _mm512_set1_epi32(black_box(0x3f80_3f80));
            let halves = _mm512_set1_epi32(black_box(0x3f00_bf00u32 as i32));
            // SAFETY: both types are 512 bits, and all bits are values.
            let (a, b) = unsafe { (transmute::<__m512i, __m512bh>(ones), transmute::<__m512i, __m512bh>(halves)) };
            let mut sums = [_mm512_set1_ps(black_box(0.5)); CHAINS];
            for _ in 0..turns {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
            black_box(sums);
        }
        assert!(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"));
        // SAFETY: the CPU has both features.
        unsafe { chain(turns) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_are_plausible_and_kept() {
        let peak = f32_flops();
        assert!((1e8..1e16).contains(&peak), "{peak:e} FLOP/s");
        assert_eq!(peak, f32_flops());
        assert!((1e8..1e16).contains(&bf16_flops()), "{:e} FLOP/s", bf16_flops());
        assert!(measure(portable, (2 * PORTABLE_LANES * CHAINS) as f64) > 1e7);
    }

    #[test]
    fn bandwidth_is_plausible() {
        let bandwidth = bandwidth();
        for bytes in [bandwidth.read, bandwidth.copy] {
            assert!((1e8..1e14).contains(&bytes), "{bytes:e} bytes/s");
        }
    }

    #[test]
    fn sum_takes_every_word() {
        let words: Vec<u64> = (0..1003).collect();
        assert_eq!(sum(&words), 1002 * 1003 / 2);
    }
}
