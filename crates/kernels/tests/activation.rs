//! Activations of every instruction set against f64, forward and backward, over odd lengths and extreme values.

use half::bf16;
use tallow_kernels::activation::{Activation, activation, activation_backward, swiglu, swiglu_backward};
use tallow_kernels::elementwise::add;
use tallow_kernels::lanes::Element;
use tallow_kernels::rng::fill_normal;
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];
const ALL: [Activation; 4] = [Activation::Silu, Activation::GeluExact, Activation::GeluTanh, Activation::Relu];
/// Past every unrolling and vector width; the last one takes several tasks.
const LENGTHS: [usize; 8] = [0, 1, 7, 15, 16, 17, 100, 40_003];

/// Normal distribution function: a series of positive terms, exact to about 1e-15.
fn phi(x: f64) -> f64 {
    let z = x.abs() / 2f64.sqrt();
    if z > 6.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let (mut term, mut sum, mut n) = (z, z, 0.0);
    while term > 1e-18 * sum {
        n += 1.0;
        term *= 2.0 * z * z / (2.0 * n + 1.0);
        sum += term;
    }
    let erf = 2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp() * sum;
    0.5 * (1.0 + erf.copysign(x))
}

fn value(f: Activation, x: f64) -> f64 {
    match f {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluExact => x * phi(x),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
    }
}

fn slope(f: Activation, x: f64) -> f64 {
    if f == Activation::Relu {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    (value(f, x + 1e-5) - value(f, x - 1e-5)) / 2e-5
}

fn random<T: Element>(len: usize, stream: u64, std: f32) -> Vec<T> {
    let mut values = vec![0.0; len];
    fill_normal(&mut values, 11, stream, std);
    values.into_iter().map(T::from_f32).collect()
}

fn close<T: Element>(what: &str, got: &[T], want: impl Iterator<Item = f64>, tolerance: f64) {
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got.to_f32());
        assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{what} [{i}]: got {got}, want {want}");
    }
}

fn check<T: Element>(tolerance: f64) {
    for (len, level, f) in LENGTHS.iter().flat_map(|n| LEVELS.iter().flat_map(move |l| ALL.map(|f| (*n, *l, f)))) {
        // One element further on, so that no pointer is aligned.
        let (x, dy) = (random::<T>(len + 1, 1, 3.0), random::<T>(len + 1, 2, 1.0));
        let (x, dy) = (&x[1..], &dy[1..]);
        let (mut y, mut dx) = (vec![T::ZERO; len], vec![T::ZERO; len]);
        activation(level, f, x, &mut y);
        activation_backward(level, f, x, dy, &mut dx);
        let wide = |v: &T| f64::from(v.to_f32());
        close(&format!("{f:?} {level:?}"), &y, x.iter().map(|x| value(f, wide(x))), tolerance);
        let want = x.iter().zip(dy).map(|(x, dy)| slope(f, wide(x)) * wide(dy));
        close(&format!("{f:?}' {level:?}"), &dx, want, 3.0 * tolerance);
    }
}

#[test]
fn f32_matches_f64() {
    check::<f32>(1e-6);
}

#[test]
fn bf16_matches_f64() {
    check::<bf16>(4e-3);
}

#[test]
fn swiglu_and_its_gradients() {
    for (len, level) in LENGTHS.iter().flat_map(|n| LEVELS.map(|l| (*n, l))) {
        let [gate, up, dy] = [1, 2, 3].map(|stream| random::<f32>(len, stream, 2.0));
        let (mut y, mut dgate, mut dup) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
        swiglu(level, &gate, &up, &mut y);
        swiglu_backward(level, &gate, &up, &dy, &mut dgate, &mut dup);
        let at = |i: usize| (f64::from(gate[i]), f64::from(up[i]), f64::from(dy[i]));
        close("y", &y, (0..len).map(|i| value(Activation::Silu, at(i).0) * at(i).1), 1e-6);
        close("dgate", &dgate, (0..len).map(|i| slope(Activation::Silu, at(i).0) * at(i).1 * at(i).2), 2e-6);
        close("dup", &dup, (0..len).map(|i| value(Activation::Silu, at(i).0) * at(i).2), 1e-6);
    }
}

#[test]
fn extreme_values() {
    let x = [1e4, -1e4, 1e30, -1e30, 0.0, -0.0, 1e-30, -88.0, 88.0, -103.0, 3e38, -3e38];
    for (level, f) in LEVELS.iter().flat_map(|l| ALL.map(|f| (*l, f))) {
        let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
        activation(level, f, &x, &mut y);
        activation_backward(level, f, &x, &[1.0; 12], &mut dx);
        for (i, &x) in x.iter().enumerate().filter(|(_, x)| x.abs() > 100.0) {
            let (want, want_slope) = if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) };
            assert!((y[i] - want).abs() < 1e-30, "{f:?} {level:?} at {x}: {}", y[i]);
            assert!((dx[i] - want_slope).abs() < 1e-30, "{f:?}' {level:?} at {x}: {}", dx[i]);
        }
        assert!(y.iter().chain(&dx).all(|v| v.is_finite()));
    }
}

#[test]
fn nan_is_not_hidden() {
    for (level, f) in LEVELS.iter().flat_map(|l| ALL.map(|f| (*l, f))) {
        for (len, at) in [(1, 0), (16, 5), (37, 36)] {
            let mut x = vec![1.0f32; len];
            x[at] = f32::NAN;
            let mut y = vec![0.0; len];
            activation(level, f, &x, &mut y);
            assert!(y[at].is_nan() && y.iter().filter(|v| v.is_nan()).count() == 1, "{f:?} {level:?}");
            let x: Vec<_> = x.into_iter().map(bf16::from_f32).collect();
            let mut y = vec![bf16::ZERO; len];
            activation(level, f, &x, &mut y);
            assert!(y[at].is_nan(), "{f:?} {level:?} bf16");
        }
    }
}

#[test]
fn bf16_addition_rounds_to_nearest_even_at_every_level() {
    let mut a: Vec<bf16> = random(1003, 1, 5.0);
    let mut b: Vec<bf16> = random(1003, 2, 0.1);
    (a[0], b[0]) = (bf16::MAX, bf16::MAX);
    (a[1], b[1]) = (bf16::INFINITY, bf16::NEG_INFINITY);
    (a[2], b[2]) = (bf16::from_f32(1.0), bf16::from_f32(0.00390625));
    for level in LEVELS {
        let mut out = vec![bf16::ZERO; a.len()];
        add(level, &a, &b, &mut out);
        for ((a, b), out) in a.iter().zip(&b).zip(&out) {
            let want = bf16::from_f32(a.to_f32() + b.to_f32());
            assert!(
                out.to_bits() == want.to_bits() || (out.is_nan() && want.is_nan()),
                "{a} + {b} = {out}, not {want}"
            );
        }
    }
}
