//! Largest magnitudes of the blocks, and their own quantization in 8 bits.

use rayon::prelude::*;

/// Magnitudes that share a scale.
pub(super) const BLOCK: usize = 256;
/// Steps of `-1..=1` that a share is first rounded to.
const STEPS: f32 = 65_535.0;

/// The largest magnitude of each block.
#[derive(Clone, Debug, PartialEq)]
pub enum Absmax {
    /// As they are.
    Plain(Vec<f32>),
    /// `dynamic_map()[code] * scale + offset`, with a scale for 256 codes.
    Double {
        /// One a block.
        codes: Vec<u8>,
        /// Largest distance from the offset within 256 blocks.
        scales: Vec<f32>,
        /// Mean of all magnitudes.
        offset: f32,
    },
}

/// [`Absmax`] without its owner.
#[derive(Clone, Copy)]
pub(super) enum View<'a> {
    Plain(&'a [f32]),
    Double { codes: &'a [u8], scales: &'a [f32], offset: f32 },
}

impl View<'_> {
    #[inline(always)]
    pub(super) fn get(&self, block: usize) -> f32 {
        match self {
            View::Plain(absmax) => absmax[block],
            View::Double { codes, scales, offset } => MAP[usize::from(codes[block])] * scales[block / BLOCK] + offset,
        }
    }
}

impl Absmax {
    /// Quantizes magnitudes around their mean.
    pub fn double(absmax: &[f32]) -> Self {
        let sum: f64 = absmax.iter().map(|&x| f64::from(x)).sum();
        Self::double_around(absmax, (sum / absmax.len().max(1) as f64) as f32)
    }

    /// Quantizes magnitudes around `offset`.
    pub fn double_around(absmax: &[f32], offset: f32) -> Self {
        let (mut codes, mut scales) = (vec![0; absmax.len()], vec![0.0; absmax.len().div_ceil(BLOCK)]);
        let outs = codes.par_chunks_mut(BLOCK).zip(&mut scales);
        outs.zip(absmax.par_chunks(BLOCK)).for_each(|((codes, scale), absmax)| {
            *scale = absmax.iter().fold(0f32, |largest, x| largest.max((x - offset).abs()));
            let inverse = 1.0 / *scale;
            // Where all are equal the codes stay 0, whatever that stands for.
            if *scale > 0.0 {
                codes.iter_mut().zip(absmax).for_each(|(code, x)| *code = nearest((x - offset) * inverse));
            }
        });
        Self::Double { codes, scales, offset }
    }

    /// Number of blocks.
    #[allow(clippy::len_without_is_empty, reason = "as of a tensor, not of a list")]
    pub fn len(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Double { codes, .. } => codes.len(),
        }
    }

    /// Memory.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => size_of_val(&absmax[..]),
            Self::Double { codes, scales, offset } => codes.len() + size_of_val(&scales[..]) + size_of_val(offset),
        }
    }

    /// The magnitude of every block.
    pub fn values(&self) -> Vec<f32> {
        (0..self.len()).map(|block| self.view().get(block)).collect()
    }

    pub(super) fn view(&self) -> View<'_> {
        match self {
            Self::Plain(absmax) => View::Plain(absmax),
            Self::Double { codes, scales, offset } => View::Double { codes, scales, offset: *offset },
        }
    }
}

/// The code of a share in -1..=1.
fn nearest(share: f32) -> u8 {
    let step = ((share.clamp(-1.0, 1.0) + 1.0) * 0.5 * STEPS + 0.5).trunc();
    let share = -1.0 + 2.0 * step / STEPS;
    MIDDLES.partition_point(|middle| *middle < share) as u8
}

/// The signed dynamic map of 8 bits by rising value (8-Bit Approximations for Parallelism in Deep Learning, Dettmers
/// 2015): for each power of ten from 1e-6 to 1 twice as many middles of steps from a tenth of it to the whole, both signs,
/// zero, and one.
pub fn dynamic_map() -> &'static [f32; 256] {
    &MAP
}

static MAP: [f32; 256] = map();
/// Between the entries of the map.
static MIDDLES: [f32; 255] = middles();

const fn middles() -> [f32; 255] {
    let mut middles = [0.0; 255];
    let mut i = 0;
    while i < 255 {
        middles[i] = 0.5 * (MAP[i] + MAP[i + 1]);
        i += 1;
    }
    middles
}

const fn map() -> [f32; 256] {
    let powers = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut map = [0.0; 256];
    let (mut exponent, mut at) = (0, 128);
    while exponent < powers.len() {
        let steps = 1 << exponent;
        let mut i = 0;
        while i < steps {
            let value = powers[exponent] * ((boundary(i, steps) + boundary(i + 1, steps)) / 2.0);
            map[at] = value;
            map[254 - at] = -value;
            at += 1;
            i += 1;
        }
        exponent += 1;
    }
    map[255] = 1.0;
    map
}

/// Point `i` of `steps` equal ones from 0.1 to 1, counted from the nearer end: an f32 step, multiplied and added in one.
const fn boundary(i: usize, steps: usize) -> f32 {
    let step = ((1.0 - 0.1f32) / steps as f32) as f64;
    let point = if i < steps.div_ceil(2) { 0.1f32 as f64 + step * i as f64 } else { 1.0 - step * (steps - i) as f64 };
    point as f32
}
