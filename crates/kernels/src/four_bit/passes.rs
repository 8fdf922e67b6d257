//! Quantizing and dequantizing a run of values, for each instruction set.

use super::absmax::View;
use super::codes::Borders;
use crate::lanes::{Element, LOOKED_UP, simd_fn};

/// Magnitudes are taken for at least this.
const TINY: f32 = 1e-38;

simd_fn! {
    /// Codes of `x`, which begins at a block and ends with one or with the tensor, and its largest magnitudes.
    pub(super) fn quantize[T: Element](
        s,
        borders: &Borders,
        block: usize,
        x: &[T],
        codes: &mut [u8],
        absmax: &mut [f32],
    ) {
        for ((x, codes), absmax) in x.chunks(block).zip(codes.chunks_mut(block / 2)).zip(absmax) {
            let mut largest = s.splat(0.0);
            for x in x.chunks(S::LANES) {
                let v = T::load_part(s, x);
                largest = s.max(largest, s.max(v, s.sub(s.splat(0.0), v)));
            }
            let largest = s.max_lane(largest);
            let scale = largest.max(TINY);
            // A block that is cut short is divided, a whole one multiplied with the reciprocal, as bitsandbytes does.
            let whole = x.len() == block;
            *absmax = if whole { largest } else { scale };
            let inverse = 1.0 / scale;
            for (x, codes) in x.chunks(LOOKED_UP).zip(codes.chunks_mut(LOOKED_UP / 2)) {
                let mut share = [0f32; LOOKED_UP];
                for (share, x) in share.iter_mut().zip(x) {
                    let x = x.to_f32();
                    *share = if whole { x * inverse } else { x / scale };
                }
                let mut rank = [0u32; LOOKED_UP];
                for border in &borders.between {
                    rank.iter_mut().zip(&share).for_each(|(rank, share)| *rank += u32::from(share > border));
                }
                for (byte, pair) in codes.iter_mut().zip(rank.chunks_exact(2)) {
                    *byte = borders.order[pair[0] as usize & 15] << 4 | borders.order[pair[1] as usize & 15];
                }
            }
        }
    }
}

/// Code `at` of a tensor.
#[inline(always)]
fn code(codes: &[u8], at: usize) -> usize {
    let byte = usize::from(codes[at / 2]);
    if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 }
}

simd_fn! {
    /// The values from `start` on.
    pub(super) fn dequantize[T: Element](
        s,
        table: &[f32; 16],
        block: usize,
        codes: &[u8],
        absmax: View,
        start: usize,
        out: &mut [T],
    ) {
        let (mut at, mut out) = (start, out);
        while !out.is_empty() {
            let index = at / block;
            let (mut run, rest) = out.split_at_mut(((index + 1) * block - at).min(out.len()));
            out = rest;
            // Products and rounding once a block: a value is then a look-up alone.
            let scale = s.splat(absmax.get(index));
            let mut scaled = [T::ZERO; 16];
            for i in (0..16).step_by(S::LANES) {
                T::store(s, s.mul(s.load(&table[i..]), scale), &mut scaled[i..]);
            }
            if !at.is_multiple_of(2) {
                run[0] = scaled[code(codes, at)];
                run = &mut run[1..];
                at += 1;
            }
            while run.len() >= LOOKED_UP {
                T::lookup(s, &scaled, &codes[at / 2..], run);
                run = &mut run[LOOKED_UP..];
                at += LOOKED_UP;
            }
            for y in run {
                *y = scaled[code(codes, at)];
                at += 1;
            }
        }
    }
}
