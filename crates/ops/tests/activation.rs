//! SiLU, SwiGLU, GELU, ReLU and the residual addition against the composed reference.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use tallow_kernels::activation::Activation;
use tallow_ops::{Gelu, gelu, reference, relu, residual_add, silu, swiglu};
use tallow_testkit::*;

const SHAPES: [&[usize]; 5] = [&[1], &[3, 5], &[2, 3, 17], &[33, 80], &[2, 129, 130]];

#[test]
fn matches_the_reference_over_odd_sizes() {
    for dims in SHAPES {
        let inputs = [random(dims, 1, 2.0), random(dims, 2, 1.0)];
        for f in [Activation::Silu, Activation::GeluExact, Activation::GeluTanh, Activation::Relu] {
            let fused = |x: &[Tensor]| match f {
                Activation::Silu => silu(&x[0]),
                Activation::GeluExact => gelu(&x[0], Gelu::Exact),
                Activation::GeluTanh => gelu(&x[0], Gelu::Tanh),
                Activation::Relu => relu(&x[0]),
            };
            let composed = |x: &[Tensor]| reference::activation(&x[0], f);
            compare(&format!("{f:?} {dims:?}"), &inputs[..1], &fused, &composed, &ACTIVATION);
        }
        let composed = |x: &[Tensor]| reference::swiglu(&x[0], &x[1]);
        compare(&format!("swiglu {dims:?}"), &inputs, &|x| swiglu(&x[0], &x[1]), &composed, &ACTIVATION);
        compare(&format!("add {dims:?}"), &inputs, &|x| residual_add(&x[0], &x[1]), &|x| &x[0] + &x[1], &ADD);
    }
}

#[test]
fn finite_differences_agree() {
    let inputs = [random((5, 11), 1, 1.0), random((5, 11), 2, 1.0)];
    finite_differences("silu", &inputs[..1], &|x| silu(&x[0]), 1e-2, 1e-3);
    finite_differences("gelu", &inputs[..1], &|x| gelu(&x[0], Gelu::Exact), 1e-2, 1e-3);
    finite_differences("gelu tanh", &inputs[..1], &|x| gelu(&x[0], Gelu::Tanh), 1e-2, 1e-3);
    finite_differences("swiglu", &inputs, &|x| swiglu(&x[0], &x[1]), 1e-2, 1e-3);
    finite_differences("add", &inputs, &|x| residual_add(&x[0], &x[1]), 1e-2, 1e-3);
}

#[test]
fn the_same_tensor_twice_sums_its_gradients() {
    let x = Var::from_tensor(&random((3, 7), 1, 1.0)).unwrap();
    let y = residual_add(x.as_tensor(), x.as_tensor()).unwrap();
    let grads = y.backward().unwrap();
    assert_eq!(values(grads.get(&x).unwrap()), vec![2.0; 21]);
    let y = swiglu(x.as_tensor(), x.as_tensor()).unwrap().backward().unwrap();
    let want = (silu(x.as_tensor()).unwrap() * x.as_tensor()).unwrap().backward().unwrap();
    assert_close("swiglu(x, x)", y.get(&x).unwrap(), want.get(&x).unwrap(), 1e-6);
}

#[test]
fn only_tracked_operands_get_a_gradient() {
    let (x, y) = (Var::from_tensor(&random((3, 7), 1, 1.0)).unwrap(), random((3, 7), 2, 1.0));
    for z in [swiglu(&y, x.as_tensor()).unwrap(), residual_add(x.as_tensor(), &y).unwrap()] {
        let grads = z.backward().unwrap();
        assert!(grads.get(&x).is_some() && grads.get(&y).is_none());
    }
    assert!(!silu(&y).unwrap().track_op());
}

#[test]
fn extreme_values_and_nan() {
    let x = Tensor::new(&[1e4f32, -1e4, 0.0, f32::NAN, 88.7, -88.7], &Device::Cpu).unwrap();
    for y in [silu(&x).unwrap(), gelu(&x, Gelu::Exact).unwrap(), gelu(&x, Gelu::Tanh).unwrap(), relu(&x).unwrap()] {
        let y = values(&y);
        assert!(y[0] == 1e4 && y[1] == 0.0 && y[2] == 0.0 && y[3].is_nan(), "{y:?}");
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (x, y) = (random((3, 7), 1, 1.0), random((7, 3), 2, 1.0));
    assert!(swiglu(&x, &y).unwrap_err().to_string().contains("[3, 7]"));
    assert!(residual_add(&x, &x.to_dtype(DType::BF16).unwrap()).unwrap_err().to_string().contains("BF16"));
    assert!(silu(&x.to_dtype(DType::F64).unwrap()).unwrap_err().to_string().contains("F64"));
    assert!(residual_add(&x.to_dtype(DType::F64).unwrap(), &x.to_dtype(DType::F64).unwrap()).is_err());
    assert_eq!(silu(&Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap()).unwrap().dims(), [0, 3]);
}
