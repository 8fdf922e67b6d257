//! Rotary position embedding (Su et al. 2021) over heads of `d` channels.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::simd::Level;

/// Which channels form the pairs that are turned together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// `(i, i + r / 2)`.
    Half,
    /// `(2 i, 2 i + 1)`.
    Interleaved,
}

/// Cosines and sines of one call: `tables[0]` and `tables[1]` hold `num_positions * r / 2` values each.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
    /// Half of the rotated channels `r`.
    pub half: usize,
    /// Row of the tables for each token.
    pub positions: &'a [u32],
    /// Pairing.
    pub pairs: Pairs,
    /// Turns by the negative angle: the gradient.
    pub inverse: bool,
}

simd_fn! {
    fn rotate_half[T: Element](s, x: &[T], cos: &[f32], sin: &[f32], sign: f32, y: &mut [T]) {
        let half = cos.len();
        let (x0, x1) = x.split_at(half);
        let (y0, y1) = y.split_at_mut(half);
        let sign = s.splat(sign);
        let mut i = 0;
        while i < half {
            let end = (i + S::LANES).min(half);
            let (a, b) = (T::load_part(s, &x0[i..end]), T::load_part(s, &x1[i..end]));
            let (c, d) = (f32::load_part(s, &cos[i..end]), s.mul(sign, f32::load_part(s, &sin[i..end])));
            T::store_part(s, s.fnma(b, d, s.mul(a, c)), &mut y0[i..end]);
            T::store_part(s, s.fma(a, d, s.mul(b, c)), &mut y1[i..end]);
            i = end;
        }
    }
}

fn rotate_interleaved<T: Element>(x: &[T], cos: &[f32], sin: &[f32], sign: f32, y: &mut [T]) {
    for (((x, y), c), d) in x.chunks_exact(2).zip(y.chunks_exact_mut(2)).zip(cos).zip(sin) {
        let (a, b, d) = (x[0].to_f32(), x[1].to_f32(), sign * d);
        y[0] = T::from_f32(a * c - b * d);
        y[1] = T::from_f32(b * c + a * d);
    }
}

/// Turns the first `2 * half` channels of every head and copies the rest. `x`, `y`: `tokens * heads * d` values.
///
/// # Panics
/// If the lengths do not fit, or a position is past the tables.
pub fn rope<T: Element>(level: Level, x: &[T], heads: usize, d: usize, rotation: Rotation<'_>, y: &mut [T]) {
    let Rotation { cos, sin, half, positions, pairs, inverse } = rotation;
    let row = heads * d;
    assert!(row > 0 && 2 * half <= d && x.len() == positions.len() * row && y.len() == x.len());
    let sign = if inverse { -1.0 } else { 1.0 };
    let tokens = (crate::elementwise::CHUNK / row).max(1);
    y.par_chunks_mut(tokens * row).zip(x.par_chunks(tokens * row).zip(positions.par_chunks(tokens))).for_each(
        |(y, (x, positions))| {
            for ((y, x), &position) in y.chunks_exact_mut(row).zip(x.chunks_exact(row)).zip(positions) {
                let at = position as usize * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    match pairs {
                        Pairs::Half => rotate_half(level, &x[..2 * half], cos, sin, sign, &mut y[..2 * half]),
                        Pairs::Interleaved => {
                            rotate_interleaved(&x[..2 * half], cos, sin, sign, &mut y[..2 * half]);
                        }
                    }
                    y[2 * half..].copy_from_slice(&x[2 * half..]);
                }
            }
        },
    );
}
