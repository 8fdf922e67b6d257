//! Rotary embedding of every instruction set against complex multiplication in f64.

use half::bf16;
use tallow_kernels::lanes::Element;
use tallow_kernels::rng::fill_normal;
use tallow_kernels::rope::{Pairs, Rotation, rope};
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];

fn check<T: Element>(tokens: usize, heads: usize, d: usize, half: usize, tolerance: f64) {
    let mut x = vec![0.0; tokens * heads * d];
    fill_normal(&mut x, 17, 1, 1.0);
    let x: Vec<T> = x.into_iter().map(T::from_f32).collect();
    let angle = |p: usize, i: usize| p as f64 * 0.7f64.powi(i as i32);
    let table = |f: fn(f64) -> f64| -> Vec<f32> {
        (0..11).flat_map(|p| (0..half).map(move |i| f(angle(p, i)) as f32)).collect()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let positions: Vec<u32> = (0..tokens).map(|t| (t * 7 % 11) as u32).collect();
    for (level, pairs) in LEVELS.iter().flat_map(|l| [(*l, Pairs::Half), (*l, Pairs::Interleaved)]) {
        let rotation = Rotation { cos: &cos, sin: &sin, half, positions: &positions, pairs, inverse: false };
        let mut y = vec![T::ZERO; x.len()];
        rope(level, &x, heads, d, rotation, &mut y);
        for (row, (x, y)) in x.chunks(d).zip(y.chunks(d)).enumerate() {
            let position = positions[row / heads] as usize;
            let wide = |v: T| f64::from(v.to_f32());
            for i in 0..half {
                let (a, b) = if pairs == Pairs::Half { (i, i + half) } else { (2 * i, 2 * i + 1) };
                let (sin, cos) = angle(position, i).sin_cos();
                let (re, im) = (wide(x[a]) * cos - wide(x[b]) * sin, wide(x[b]) * cos + wide(x[a]) * sin);
                assert!(
                    (wide(y[a]) - re).abs() < tolerance && (wide(y[b]) - im).abs() < tolerance,
                    "{pairs:?} {level:?}"
                );
            }
            assert_eq!(x[2 * half..], y[2 * half..], "channels past the rotated ones");
        }
        let mut back = vec![T::ZERO; x.len()];
        rope(level, &y, heads, d, Rotation { inverse: true, ..rotation }, &mut back);
        assert!(back.iter().zip(&x).all(|(b, x)| (b.to_f32() - x.to_f32()).abs() < tolerance as f32));
    }
}

#[test]
fn whole_and_partial_rotation_over_odd_sizes() {
    for (tokens, heads, d, half) in [(1, 1, 2, 1), (3, 2, 8, 3), (33, 3, 20, 10), (5, 4, 64, 32), (700, 2, 80, 16)] {
        check::<f32>(tokens, heads, d, half, 1e-6);
        check::<bf16>(tokens, heads, d, half, 5e-2);
    }
}

#[test]
fn no_rotated_channels_is_a_copy() {
    check::<f32>(3, 2, 6, 0, 1e-9);
}
