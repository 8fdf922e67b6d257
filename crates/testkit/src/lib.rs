//! Development only: what the tests of ops and models stand on.
//!
//! For: comparing a fused op with its composed reference ([`compare`]), with finite differences ([`finite_differences`]),
//! and through every way in which a weight can enter ([`trainable`], [`slot_sum`]), within one table of tolerances.
//! Not for: anything that is shipped; every function panics at the first surprise.
//!
//! ```
//! use tallow_testkit::{compare, random, ADD};
//!
//! let inputs = [random((3, 5), 1, 1.0), random((3, 5), 2, 1.0)];
//! let sum = |x: &[candle_core::Tensor]| tallow_ops::residual_add(&x[0], &x[1]);
//! compare("residual_add", &inputs, &sum, &|x| &x[0] + &x[1], &ADD);
//! ```
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Result, Shape, Tensor, Var};
use tallow_ops::{Weight, backward_from, record};

/// How far a result may be from the reference, as a share of the largest wanted value (or of 1): forward, gradients.
pub struct Tolerance {
    /// Of the result and of the gradients, in f32.
    pub f32: (f64, f64),
    /// The same in bf16.
    pub bf16: (f64, f64),
}

/// `attention`. In bf16 results are rounded once (2^-9 = 2e-3 of a value), and attention's backward reads its own
/// rounded result.
pub const ATTENTION: Tolerance = Tolerance { f32: (3e-6, 1e-5), bf16: (6e-3, 2e-2) };
/// `rms_norm`, `layer_norm`.
pub const NORM: Tolerance = Tolerance { f32: (5e-6, 1e-5), bf16: (6e-3, 8e-3) };
/// `rope`.
pub const ROPE: Tolerance = Tolerance { f32: (1e-6, 1e-6), bf16: (4e-3, 4e-3) };
/// `silu`, `gelu`, `relu`, `swiglu`.
pub const ACTIVATION: Tolerance = Tolerance { f32: (2e-6, 5e-6), bf16: (4e-3, 6e-3) };
/// `linear`.
pub const LINEAR: Tolerance = Tolerance { f32: (2e-6, 3e-6), bf16: (4e-3, 4e-3) };
/// `linear_cross_entropy`.
pub const CROSS_ENTROPY: Tolerance = Tolerance { f32: (2e-6, 5e-6), bf16: (4e-3, 6e-3) };
/// `residual_add`.
pub const ADD: Tolerance = Tolerance { f32: (1e-7, 1e-7), bf16: (4e-3, 1e-7) };

impl Tolerance {
    fn of(&self, dtype: DType) -> (f64, f64) {
        if dtype == DType::BF16 { self.bf16 } else { self.f32 }
    }
}

/// Normal values with standard deviation `std`, the same for the same stream.
pub fn random(shape: impl Into<Shape>, stream: u64, std: f32) -> Tensor {
    let shape = shape.into();
    let mut values = vec![0.0; shape.elem_count()];
    tallow_kernels::rng::fill_normal(&mut values, 23, stream, std);
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// The same values behind an offset and with gaps between the rows.
pub fn with_gaps(x: &Tensor) -> Tensor {
    let last = x.rank() - 1;
    let pad = Tensor::full(
        7f32,
        {
            let mut d = x.dims().to_vec();
            d[last] = 3;
            d
        },
        x.device(),
    )
    .unwrap();
    let pad = pad.to_dtype(x.dtype()).unwrap();
    let wide = Tensor::cat(&[&pad, x, &pad], last).unwrap();
    let view = wide.narrow(last, 3, x.dim(last).unwrap()).unwrap();
    assert!(!view.is_contiguous() || x.elem_count() == x.dim(last).unwrap());
    view
}

/// The same values, stored with the last two dimensions swapped.
pub fn turned(x: &Tensor) -> Tensor {
    x.t().unwrap().contiguous().unwrap().t().unwrap()
}

/// All values, widened to f32.
pub fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// All values as bits, for comparisons that allow nothing.
pub fn bits(x: &Tensor) -> Vec<u32> {
    values(x).into_iter().map(f32::to_bits).collect()
}

/// Fails if a value is farther from the wanted one than `tolerance` of the largest wanted one (or of 1).
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let (got, want) = (values(got), values(want));
    let bound = tolerance * want.iter().fold(1.0, |m: f64, v| m.max(f64::from(v.abs())));
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        let apart = (f64::from(*g) - f64::from(*w)).abs();
        assert!(apart <= bound, "{what} [{i}]: got {g}, want {w}, apart {apart:e}, bound {bound:e}");
    }
}

/// An op over its inputs.
pub type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<Tensor>;

/// Result and the gradient of every input for a given gradient of the result.
pub fn run(op: Op<'_>, inputs: &[Tensor], dy: &Tensor) -> (Tensor, Vec<Tensor>) {
    let vars: Vec<Var> = inputs.iter().map(|x| Var::from_tensor(x).unwrap()).collect();
    run_vars(op, &vars, dy)
}

/// As [`run`], on a [`Tape`](tallow_ops::Tape).
pub fn run_recorded(op: Op<'_>, inputs: &[Tensor], dy: &Tensor) -> (Tensor, Vec<Tensor>) {
    let (y, tape) = record(&inputs.iter().collect::<Vec<_>>(), || op(inputs)).unwrap();
    let grads = tape.backward(y.clone(), dy.to_dtype(y.dtype()).unwrap()).unwrap();
    (y, grads)
}

fn run_vars(op: Op<'_>, vars: &[Var], dy: &Tensor) -> (Tensor, Vec<Tensor>) {
    let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
    let y = op(&tensors).unwrap();
    let grads = backward_from(&y, &dy.to_dtype(y.dtype()).unwrap()).unwrap();
    let grads = vars.iter().map(|v| grads.get(v).expect("a gradient for every input").clone()).collect();
    (y.detach(), grads)
}

/// Compares `fused` in f32 and bf16 with `reference` in f32 on the same values: result and every gradient, with
/// contiguous inputs and with views that are not.
pub fn compare(what: &str, inputs: &[Tensor], fused: Op<'_>, reference: Op<'_>, tolerance: &Tolerance) {
    for dtype in [DType::F32, DType::BF16] {
        let (forward, gradient) = tolerance.of(dtype);
        let inputs: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(dtype).unwrap()).collect();
        let wide: Vec<Tensor> = inputs.iter().map(|x| x.to_dtype(DType::F32).unwrap()).collect();
        let shape = reference(&wide).unwrap().shape().clone();
        let dy = random(shape, 99, 1.0).to_dtype(dtype).unwrap();
        let (want, want_grads) = run(reference, &wide, &dy.to_dtype(DType::F32).unwrap());
        let (got, got_grads) = run(fused, &inputs, &dy);
        assert_eq!(got.dtype(), dtype, "{what}");
        assert_close(&format!("{what} {dtype:?}"), &got, &want, forward);
        for (i, (g, w)) in got_grads.iter().zip(&want_grads).enumerate() {
            assert_eq!(g.dtype(), dtype, "{what}: gradient {i}");
            assert_close(&format!("{what} {dtype:?} gradient {i}"), g, w, gradient);
        }
        let (again, again_grads) = run_recorded(fused, &inputs, &dy);
        assert_eq!(bits(&again), bits(&got), "{what} {dtype:?}: on a tape of ours");
        for (i, (a, g)) in again_grads.iter().zip(&got_grads).enumerate() {
            assert_eq!(a.shape(), g.shape(), "{what} {dtype:?}: on a tape of ours, gradient {i}");
            // Not their bits: candle adds to zeros, and -0 + 0 is 0.
            assert_eq!(values(a), values(g), "{what} {dtype:?}: on a tape of ours, gradient {i}");
        }
        for view in [with_gaps, turned] {
            let through = |x: &[Tensor]| {
                fused(&x.iter().map(|x| if x.rank() > 1 { view(x) } else { x.clone() }).collect::<Vec<_>>())
            };
            let (again, again_grads) = run(&through, &inputs, &dy);
            assert_eq!(bits(&again), bits(&got), "{what} {dtype:?}: strided inputs");
            for (i, (a, g)) in again_grads.iter().zip(&got_grads).enumerate() {
                assert_eq!(bits(a), bits(g), "{what} {dtype:?}: strided inputs, gradient {i}");
            }
        }
    }
}

/// Central differences along random directions against the gradients, in f32.
pub fn finite_differences(what: &str, inputs: &[Tensor], op: Op<'_>, step: f64, tolerance: f64) {
    let shape = op(inputs).unwrap().shape().clone();
    let dy = random(shape, 98, 1.0);
    let (_, grads) = run(op, inputs, &dy);
    let loss = |inputs: &[Tensor]| -> f64 {
        let y = values(&op(inputs).unwrap());
        y.iter().zip(values(&dy)).map(|(y, d)| f64::from(*y) * f64::from(d)).sum()
    };
    for (i, grad) in grads.iter().enumerate() {
        for direction in 0..3 {
            let u = random(inputs[i].shape(), 200 + direction, 1.0);
            let moved = |by: f64| {
                let mut moved = inputs.to_vec();
                moved[i] = (&inputs[i] + (&u * by).unwrap()).unwrap();
                loss(&moved)
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            let (g, u) = (values(grad), values(&u));
            let want: f64 = g.iter().zip(&u).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
            let size: f64 = g.iter().zip(&u).map(|(g, u)| (f64::from(*g) * f64::from(*u)).powi(2)).sum::<f64>().sqrt();
            assert!(
                (slope - want).abs() <= tolerance * (size + 1.0),
                "{what}, input {i}: slope {slope}, gradient {want}"
            );
        }
    }
}

/// `value` as a trainable weight over a slot in the middle of a flat bucket that holds ones.
pub fn trainable(value: &Tensor) -> (Weight, Tensor) {
    let n = value.elem_count();
    let bucket = Tensor::ones(n + 9, DType::F32, value.device()).unwrap();
    let slot = bucket.narrow(0, 4, n).unwrap().reshape(value.shape()).unwrap();
    (Weight::trainable(value.clone(), slot).unwrap(), bucket)
}

/// What was added to the slot of a [`trainable`] weight; fails if its neighbours in the bucket changed.
pub fn slot_sum(weight: &Weight, bucket: &Tensor) -> Tensor {
    let all = values(bucket);
    let n = weight.shape().elem_count();
    assert!(all[..4].iter().chain(&all[4 + n..]).all(|v| *v == 1.0), "the bucket changed outside the slot");
    (weight.grad().unwrap() - 1.0).unwrap()
}
