//! Norms of every instruction set against f64, forward and backward.

use half::bf16;
use tallow_kernels::lanes::Element;
use tallow_kernels::norm::{Stats, layer_norm, norm_backward, rms_norm};
use tallow_kernels::rng::fill_normal;
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];
/// Rows and channels; the last has more rows than a task and more than the parts of the weight gradient.
const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 5), (2, 16), (5, 33), (3, 384), (17, 100), (1500, 24)];
const EPS: f64 = 1e-5;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Rms,
    Layer,
}

fn random<T: Element>(len: usize, stream: u64, std: f32, mean: f32) -> Vec<T> {
    let mut values = vec![0.0; len + 1];
    fill_normal(&mut values, 13, stream, std);
    values.into_iter().map(|v| T::from_f32(v + mean)).collect()
}

/// `y, dx, dweight, dbias` by the formulas, in f64.
fn reference(kind: Kind, c: usize, x: &[f64], weight: &[f64], bias: Option<&[f64]>, dy: &[f64]) -> [Vec<f64>; 4] {
    let n = c as f64;
    let mut r = [vec![], vec![], vec![0.0; c], vec![0.0; c]];
    for (x, dy) in x.chunks(c).zip(dy.chunks(c)) {
        let mean = if kind == Kind::Layer { x.iter().sum::<f64>() / n } else { 0.0 };
        let rstd = 1.0 / (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + EPS).sqrt();
        let normal: Vec<f64> = x.iter().map(|x| (x - mean) * rstd).collect();
        let g: Vec<f64> = dy.iter().zip(weight).map(|(d, w)| d * w).collect();
        let project = g.iter().zip(&normal).map(|(g, z)| g * z).sum::<f64>() / n;
        let total = if kind == Kind::Layer { g.iter().sum::<f64>() / n } else { 0.0 };
        for i in 0..c {
            r[0].push(normal[i] * weight[i] + bias.map_or(0.0, |b| b[i]));
            r[1].push(rstd * (g[i] - total - normal[i] * project));
            r[2][i] += dy[i] * normal[i];
            r[3][i] += dy[i];
        }
    }
    r
}

fn close<T: Element>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let bound = tolerance * want.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got.to_f32());
        assert!((got - want).abs() <= bound, "{what} [{i}]: got {got}, want {want}, bound {bound}");
    }
}

fn check<T: Element>(kind: Kind, (rows, c): (usize, usize), with_bias: bool, level: Level, tolerance: f64) {
    let what = format!("{kind:?} {rows}x{c} bias {with_bias} {level:?}");
    let (x, dy) = (random::<T>(rows * c, 1, 2.0, 0.5), random::<T>(rows * c, 2, 1.0, 0.0));
    let (weight, bias) = (random::<T>(c, 3, 0.5, 1.0), random::<T>(c, 4, 1.0, 0.0));
    // One element in, so that no pointer is aligned.
    let (x, dy, weight, bias) = (&x[1..], &dy[1..], &weight[1..], &bias[1..]);
    let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|v| f64::from(v.to_f32())).collect() };
    let bias = with_bias.then_some(bias);
    let want = reference(kind, c, &wide(x), &wide(weight), bias.map(wide).as_deref(), &wide(dy));

    let mut y = vec![T::ZERO; rows * c];
    let (mut rstd, mut stats) = (vec![0.0; rows], vec![[0.0; 2]; rows]);
    let stats = match kind {
        Kind::Rms => {
            rms_norm(level, x, weight, EPS as f32, &mut y, &mut rstd);
            Stats::Rms(&rstd)
        }
        Kind::Layer => {
            layer_norm(level, x, weight, bias, EPS as f32, &mut y, &mut stats);
            Stats::Layer(&stats)
        }
    };
    close(&format!("{what} y"), &y, &want[0], tolerance);
    // The sums are added to what is there; `dx` is overwritten.
    let (mut dx, mut dweight, mut dbias) = (vec![T::from_f32(9.0); rows * c], vec![1.0f32; c], vec![2.0f32; c]);
    norm_backward(level, x, weight, dy, stats, Some(&mut dx), Some(&mut dweight), Some(&mut dbias));
    dweight.iter_mut().for_each(|v| *v -= 1.0);
    dbias.iter_mut().for_each(|v| *v -= 2.0);
    close(&format!("{what} dx"), &dx, &want[1], tolerance);
    close(&format!("{what} dweight"), &dweight, &want[2], 3e-6);
    close(&format!("{what} dbias"), &dbias, &want[3], 3e-6);
    // Each alone is the same as with the others.
    let mut alone = vec![T::ZERO; rows * c];
    norm_backward(level, x, weight, dy, stats, Some(&mut alone), None, None);
    assert_eq!(alone, dx, "{what}");
    let mut alone = vec![1.0f32; c];
    norm_backward(level, x, weight, dy, stats, None, Some(&mut alone), None);
    alone.iter_mut().for_each(|v| *v -= 1.0);
    assert_eq!(alone, dweight, "{what}");
}

#[test]
fn every_shape_kind_and_level() {
    for shape in SHAPES {
        for level in LEVELS {
            for (kind, bias) in [(Kind::Rms, false), (Kind::Layer, false), (Kind::Layer, true)] {
                check::<f32>(kind, shape, bias, level, 5e-6);
                check::<bf16>(kind, shape, bias, level, 8e-3);
            }
        }
    }
}

#[test]
fn a_row_far_from_zero_keeps_its_variance() {
    let x: Vec<f32> = (0..64).map(|i| 10_000.0 + (i % 4) as f32).collect();
    for level in LEVELS {
        let (mut y, mut stats) = (vec![0.0; 64], vec![[0.0; 2]; 1]);
        layer_norm(level, &x, &[1.0; 64], None, 0.0, &mut y, &mut stats);
        assert!((stats[0][1] - 1.0 / 1.25f32.sqrt()).abs() < 1e-5, "{stats:?}");
        assert!((y[0] + 1.5 / 1.25f32.sqrt()).abs() < 1e-3, "{}", y[0]);
    }
}

#[test]
fn zero_and_equal_rows_are_finite() {
    for (level, fill) in LEVELS.iter().flat_map(|l| [(*l, 0.0f32), (*l, 3.0)]) {
        let (x, dy) = ([fill; 40], [1.0; 40]);
        let (mut y, mut rstd, mut stats) = ([7.0; 40], [0.0; 2], [[0.0; 2]; 2]);
        let mut dx = [0.0; 40];
        rms_norm(level, &x, &[1.0; 20], 1e-6, &mut y, &mut rstd);
        norm_backward(level, &x, &[1.0; 20], &dy, Stats::Rms(&rstd), Some(&mut dx), None, None);
        assert!(y.iter().chain(&dx).all(|v| v.is_finite()));
        layer_norm(level, &x, &[1.0; 20], None, 1e-6, &mut y, &mut stats);
        assert_eq!(y, [0.0; 40]);
        norm_backward(level, &x, &[1.0; 20], &dy, Stats::Layer(&stats), Some(&mut dx), None, None);
        assert!(dx.iter().all(|v| v.abs() < 1e-3));
    }
}

#[test]
fn nan_stays_in_its_row() {
    for level in LEVELS {
        let mut x = [1.0f32; 63];
        x[21 + 20] = f32::NAN;
        let (mut y, mut rstd, mut stats) = ([0.0; 63], [0.0; 3], [[0.0; 2]; 3]);
        rms_norm(level, &x, &[1.0; 21], 1e-6, &mut y, &mut rstd);
        assert!(y[21..42].iter().all(|v| v.is_nan()) && y.iter().filter(|v| v.is_nan()).count() == 21);
        layer_norm(level, &x, &[1.0; 21], None, 1e-6, &mut y, &mut stats);
        assert!(y[21..42].iter().all(|v| v.is_nan()) && y.iter().filter(|v| v.is_nan()).count() == 21);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (rows, c) = (1500, 24);
    let (x, dy) = (random::<f32>(rows * c, 1, 1.0, 0.0), random::<f32>(rows * c, 2, 1.0, 0.0));
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let (mut y, mut rstd, mut dweight) = (vec![0.0; rows * c], vec![0.0; rows], vec![0.0; c]);
            rms_norm(Level::Avx512, &x[1..], &[0.5; 24], 1e-6, &mut y, &mut rstd);
            let stats = Stats::Rms(&rstd);
            norm_backward(Level::Avx512, &x[1..], &[0.5; 24], &dy[1..], stats, None, Some(&mut dweight), None);
            (y, dweight)
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(7));
}
