//! SiLU, SwiGLU, GELU (exact and tanh) and ReLU, forward and backward.
//!
//! Backward recomputes from the inputs, so that nothing is kept between the passes. All arithmetic is in f32.

use crate::elementwise::{Map1, Map2, Map3To2, map1, map2, map3_to_2};
use crate::lanes::{Element, Simd};
use crate::simd::Level;

/// A function of one value with its derivative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x Phi(x)`, `Phi` the normal distribution function (Hendrycks and Gimpel 2016).
    GeluExact,
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `max(x, 0)`, with derivative 0 at 0.
    Relu,
}

/// `out[i] = f(x[i])`.
///
/// # Panics
/// If the lengths differ.
pub fn activation<T: Element>(level: Level, f: Activation, x: &[T], out: &mut [T]) {
    match f {
        Activation::Silu => map1(level, Value(Silu), x, out),
        Activation::GeluExact => map1(level, Value(GeluExact), x, out),
        Activation::GeluTanh => map1(level, Value(GeluTanh), x, out),
        Activation::Relu => map1(level, Value(Relu), x, out),
    }
}

/// `dx[i] = f'(x[i]) dy[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn activation_backward<T: Element>(level: Level, f: Activation, x: &[T], dy: &[T], dx: &mut [T]) {
    match f {
        Activation::Silu => map2(level, Slope(Silu), x, dy, dx),
        Activation::GeluExact => map2(level, Slope(GeluExact), x, dy, dx),
        Activation::GeluTanh => map2(level, Slope(GeluTanh), x, dy, dx),
        Activation::Relu => map2(level, Slope(Relu), x, dy, dx),
    }
}

/// `out[i] = silu(gate[i]) up[i]` (SwiGLU, Shazeer 2020).
///
/// # Panics
/// If the lengths differ.
pub fn swiglu<T: Element>(level: Level, gate: &[T], up: &[T], out: &mut [T]) {
    map2(level, SwiGlu, gate, up, out);
}

/// `dgate[i] = silu'(gate[i]) up[i] dy[i]` and `dup[i] = silu(gate[i]) dy[i]`.
///
/// # Panics
/// If the lengths differ.
pub fn swiglu_backward<T: Element>(level: Level, gate: &[T], up: &[T], dy: &[T], dgate: &mut [T], dup: &mut [T]) {
    map3_to_2(level, SwiGlu, [gate, up, dy], dgate, dup);
}

/// Value and derivative at once.
trait Differentiable: Copy + Send + Sync {
    fn value<S: Simd>(self, s: S, x: S::V) -> S::V;
    fn slope<S: Simd>(self, s: S, x: S::V) -> S::V;
}

#[derive(Clone, Copy)]
struct Value<F>(F);

#[derive(Clone, Copy)]
struct Slope<F>(F);

impl<F: Differentiable> Map1 for Value<F> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V) -> S::V {
        self.0.value(s, a)
    }
}

impl<F: Differentiable> Map2 for Slope<F> {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V, dy: S::V) -> S::V {
        s.mul(self.0.slope(s, x), dy)
    }
}

#[derive(Clone, Copy)]
struct Silu;

impl Differentiable for Silu {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, s.sigmoid(x))
    }
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, x: S::V) -> S::V {
        let sigma = s.sigmoid(x);
        // sigma (1 + x (1 - sigma))
        let one = s.splat(1.0);
        s.mul(sigma, s.fma(x, s.sub(one, sigma), one))
    }
}

#[derive(Clone, Copy)]
struct SwiGlu;

impl Map2 for SwiGlu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, up: S::V) -> S::V {
        s.mul(Silu.value(s, gate), up)
    }
}

impl Map3To2 for SwiGlu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, up: S::V, dy: S::V) -> (S::V, S::V) {
        let sigma = s.sigmoid(gate);
        let one = s.splat(1.0);
        let silu = s.mul(gate, sigma);
        let slope = s.fma(silu, s.sub(one, sigma), sigma);
        (s.mul(s.mul(slope, up), dy), s.mul(silu, dy))
    }
}

#[derive(Clone, Copy)]
struct Relu;

impl Differentiable for Relu {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.max(s.splat(0.0), x)
    }
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.select_lt(s.splat(0.0), x, s.splat(1.0), s.splat(0.0))
    }
}

#[derive(Clone, Copy)]
struct GeluTanh;

impl GeluTanh {
    /// `2 sqrt(2 / pi)`: half of `1 + tanh(u)` is the logistic function of `2 u`, which has no cancellation.
    const TWICE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044_715;

    #[inline(always)]
    fn gate<S: Simd>(s: S, x: S::V, square: S::V) -> S::V {
        let inner = s.fma(square, s.splat(Self::TWICE * Self::CUBIC), s.splat(Self::TWICE));
        s.sigmoid(s.mul(x, inner))
    }
}

impl Differentiable for GeluTanh {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, Self::gate(s, x, s.mul(x, x)))
    }
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, x: S::V) -> S::V {
        // Past |x| = 10 the value is 0 or x in f32; the bound keeps x^3 finite. NaN passes both.
        let x = s.min(s.splat(10.0), s.max(s.splat(-10.0), x));
        let square = s.mul(x, x);
        let gate = Self::gate(s, x, square);
        let inner = s.fma(square, s.splat(3.0 * Self::TWICE * Self::CUBIC), s.splat(Self::TWICE));
        let spread = s.mul(gate, s.sub(s.splat(1.0), gate));
        s.fma(s.mul(x, inner), spread, gate)
    }
}

#[derive(Clone, Copy)]
struct GeluExact;

impl GeluExact {
    /// Coefficients, highest first, of `erfcx(z) / t` in `t = 1 / (1 + 0.4 z)`: Chebyshev interpolation at 11 nodes on
    /// `0 <= t <= 1`, relative error 1e-8. `erfcx(z) = e^(z^2) erfc(z)`.
    const ERFCX: [f32; 11] = [
        -0.029_868_629,
        0.143_841_07,
        -0.243_041_74,
        0.146_803_25,
        -0.053_793_17,
        0.087_120_645,
        0.118_095_12,
        0.171_890_57,
        0.207_600_72,
        0.225_676_32,
        0.225_675_83,
    ];

    /// `Phi(x)` and `e^(-x^2 / 2)`.
    #[inline(always)]
    fn phi<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
        let zero = s.splat(0.0);
        let minus = s.sub(zero, x);
        let magnitude = s.select_lt(x, zero, minus, x);
        let z = s.mul(magnitude, s.splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = s.div(s.splat(1.0), s.fma(s.splat(0.4), z, s.splat(1.0)));
        let mut p = s.splat(Self::ERFCX[0]);
        for c in &Self::ERFCX[1..] {
            p = s.fma(p, t, s.splat(*c));
        }
        let bell = s.exp(s.mul(s.mul(x, x), s.splat(-0.5)));
        let tail = s.mul(s.mul(s.splat(0.5), s.mul(p, t)), bell);
        (s.select_lt(x, zero, tail, s.sub(s.splat(1.0), tail)), bell)
    }
}

impl Differentiable for GeluExact {
    #[inline(always)]
    fn value<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.mul(x, Self::phi(s, x).0)
    }
    #[inline(always)]
    fn slope<S: Simd>(self, s: S, x: S::V) -> S::V {
        // 1 / sqrt(2 pi)
        const DENSITY: f32 = 0.398_942_3;
        let (phi, bell) = Self::phi(s, x);
        s.fma(s.mul(x, s.splat(DENSITY)), bell, phi)
    }
}
