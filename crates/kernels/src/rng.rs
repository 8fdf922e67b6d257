//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
//!
//! Every number is a function of a key and an index, so that a mask or an initial weight is the same whatever the
//! threads, the order of computation and the number of ranks, and needs no state in a checkpoint.

use rayon::prelude::*;

const ROUNDS: usize = 10;
const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const CHUNK: usize = 8 * 1024;

/// Four random words for a counter and a key.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..ROUNDS {
        let p0 = u64::from(MULTIPLIER[0]) * u64::from(c0);
        let p1 = u64::from(MULTIPLIER[1]) * u64::from(c2);
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// A 64-bit key from parts: a chain of SplitMix64 finalisers, so that nearby seeds give unrelated keys.
pub fn key_from(parts: &[u64]) -> [u32; 2] {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for &part in parts {
        state = mix(state.wrapping_add(part).wrapping_add(0x9E37_79B9_7F4A_7C15));
    }
    [state as u32, (state >> 32) as u32]
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The stream of a parameter: FNV-1a (64 bits) of its name.
pub fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

/// Word 2 of the counter: which distribution draws, so that two fills of one stream never share numbers.
#[derive(Clone, Copy)]
enum Draw {
    Uniform = 1,
    Normal = 2,
    Truncated = 3,
}

#[inline(always)]
fn block(key: [u32; 2], index: u64, draw: Draw, attempt: u32) -> [u32; 4] {
    philox4x32([index as u32, (index >> 32) as u32, draw as u32, attempt], key)
}

/// In [0, 1), with 24 random bits.
#[inline(always)]
fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / 16_777_216.0)
}

/// Two independent standard normals (Box and Muller 1958), computed in f64.
fn box_muller(a: u32, b: u32) -> [f64; 2] {
    // In (0, 1], so that the logarithm is finite.
    let u = (f64::from(a) + 1.0) / 4_294_967_296.0;
    let angle = f64::from(b) * (std::f64::consts::TAU / 4_294_967_296.0);
    let radius = (-2.0 * u.ln()).sqrt();
    let (sin, cos) = angle.sin_cos();
    [radius * cos, radius * sin]
}

fn normal4(key: [u32; 2], index: u64, draw: Draw, attempt: u32) -> [f64; 4] {
    let [a, b, c, d] = block(key, index, draw, attempt);
    let ([p, q], [r, s]) = (box_muller(a, b), box_muller(c, d));
    [p, q, r, s]
}

/// The `index`-th standard normal of a stream: what [`fill_normal`] with `std = 1` writes there.
pub fn normal(seed: u64, stream: u64, index: u64) -> f32 {
    normal4(key_from(&[seed, stream]), index / 4, Draw::Normal, 0)[(index % 4) as usize] as f32
}

/// `out[i] = std * N(0, 1)`; element `i` depends on `(seed, stream, i)` alone.
pub fn fill_normal(out: &mut [f32], seed: u64, stream: u64, std: f32) {
    let key = key_from(&[seed, stream]);
    fill(out, |index, four| {
        let values = normal4(key, index, Draw::Normal, 0);
        four.iter_mut().zip(values).for_each(|(o, v)| *o = (f64::from(std) * v) as f32);
    });
}

/// Like [`fill_normal`] with values beyond `cutoff` standard deviations drawn again (`cutoff >= 0.5` is enforced, so
/// that the drawing ends soon).
pub fn fill_truncated_normal(out: &mut [f32], seed: u64, stream: u64, std: f32, cutoff: f32) {
    let key = key_from(&[seed, stream]);
    let cutoff = f64::from(cutoff.max(0.5));
    fill(out, |index, four| {
        for (lane, o) in four.iter_mut().enumerate() {
            let mut value = 0.0;
            for attempt in 0..=u32::MAX {
                value = normal4(key, index, Draw::Truncated, attempt)[lane];
                if value.abs() <= cutoff {
                    break;
                }
            }
            *o = (f64::from(std) * value) as f32;
        }
    });
}

/// `out[i]` uniform in `[low, high)`; element `i` depends on `(seed, stream, i)` alone.
pub fn fill_uniform(out: &mut [f32], seed: u64, stream: u64, low: f32, high: f32) {
    let key = key_from(&[seed, stream]);
    fill(out, |index, four| {
        let words = block(key, index, Draw::Uniform, 0);
        four.iter_mut().zip(words).for_each(|(o, w)| *o = low + (high - low) * unit(w));
    });
}

fn fill(out: &mut [f32], four_at: impl Fn(u64, &mut [f32]) + Sync) {
    out.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, out)| {
        let first = (chunk * CHUNK / 4) as u64;
        for (i, four) in out.chunks_mut(4).enumerate() {
            four_at(first + i as u64, four);
        }
    });
}
