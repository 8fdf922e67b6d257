//! The optimizer's passes over buckets, against the formula in f64.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Tensor};
use tallow_ops::{AdamWBuckets, AdamWParams, adamw_step, cast_to_bf16, fill_zero, global_sq_norm};
use tallow_testkit::{random, values};

const PARAMS: AdamWParams =
    AdamWParams { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };

/// What PyTorch's `AdamW` does to one element in step 1 from zero moments.
fn expected(w: f32, g: f32) -> f64 {
    let (w, g) = (f64::from(w), f64::from(g) * 0.5);
    w * (1.0 - 0.01 * 0.1) - 0.01 * g / (g.abs() + 1e-8)
}

#[test]
fn a_step_changes_its_range_and_nothing_else() {
    let n = 1000;
    let start = random(n, 1, 1.0);
    let (grad, zeros) = (random(n, 2, 1.0), || Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap());
    let before = values(&grad);
    for range in [0..n, 100..901, 5..6, 7..7] {
        let (master, grad, m, v) = (start.copy().unwrap(), grad.copy().unwrap(), zeros(), zeros());
        let compute = start.to_dtype(DType::BF16).unwrap();
        let buckets = AdamWBuckets { master: &master, grad: &grad, m: &m, v: &v, compute: Some(&compute) };
        adamw_step(buckets, range.clone(), &PARAMS).unwrap();
        let (w, g, rounded) = (values(&master), values(&grad), values(&compute));
        for (i, old) in values(&start).into_iter().enumerate() {
            if range.contains(&i) {
                assert!((f64::from(w[i]) - expected(old, before[i])).abs() < 1e-6);
                assert_eq!((g[i], rounded[i]), (0.0, half::bf16::from_f32(w[i]).to_f32()));
            } else {
                assert_eq!((w[i], g[i], rounded[i]), (old, before[i], half::bf16::from_f32(old).to_f32()));
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_an_error() {
    let of = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
    let (a, b) = (of(10), of(9));
    let buckets = |grad| AdamWBuckets { master: &a, grad, m: &a, v: &a, compute: None };
    assert!(adamw_step(buckets(&b), 0..9, &PARAMS).unwrap_err().to_string().contains("lengths"));
    assert!(adamw_step(buckets(&a), 0..11, &PARAMS).is_err());
    assert!(fill_zero(&a.to_dtype(DType::F64).unwrap()).is_err());
    assert!(cast_to_bf16(&a, &b).is_err());
    assert!(global_sq_norm(&a.to_dtype(DType::BF16).unwrap()).is_err());
}

#[test]
fn norms_zeros_and_casts() {
    let x = random(70_001, 1, 1.0);
    let exact: f64 = values(&x).iter().map(|x| f64::from(*x).powi(2)).sum();
    assert!((global_sq_norm(&x).unwrap() - exact).abs() < 1e-5 * exact);
    let rounded = Tensor::zeros(70_001, DType::BF16, &Device::Cpu).unwrap();
    cast_to_bf16(&x, &rounded).unwrap();
    assert_eq!(values(&rounded), values(&x.to_dtype(DType::BF16).unwrap()));
    fill_zero(&x).unwrap();
    assert_eq!(global_sq_norm(&x).unwrap(), 0.0);
}
