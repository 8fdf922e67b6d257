//! `rms_norm` and `layer_norm` against the composed reference, for every way a weight can enter.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use tallow_ops::{Weight, backward_from, layer_norm, no_grad, reference, rms_norm};
use tallow_testkit::*;

const EPS: f64 = 1e-5;

#[test]
fn matches_the_reference_over_odd_sizes() {
    for dims in [vec![1], vec![7], vec![3, 17], vec![2, 5, 33], vec![1, 1, 80], vec![2, 3, 4, 20], vec![40, 384]] {
        let c = *dims.last().unwrap();
        let what = format!("{dims:?}");
        let inputs = [(random(dims, 1, 2.0) + 0.3).unwrap(), (random(c, 2, 0.5) + 1.0).unwrap(), random(c, 3, 1.0)];
        compare(
            &format!("rms_norm {what}"),
            &inputs[..2],
            &|x| rms_norm(&x[0], &x[1].clone().into(), EPS),
            &|x| reference::rms_norm(&x[0], &x[1], EPS),
            &NORM,
        );
        if c == 1 {
            // A single channel is constant: only rounding is left of its gradient.
            continue;
        }
        compare(
            &format!("layer_norm {what}"),
            &inputs,
            &|x| layer_norm(&x[0], &x[1].clone().into(), Some(&x[2].clone().into()), EPS),
            &|x| reference::layer_norm(&x[0], &x[1], Some(&x[2]), EPS),
            &NORM,
        );
        compare(
            &format!("layer_norm without bias {what}"),
            &inputs[..2],
            &|x| layer_norm(&x[0], &x[1].clone().into(), None, EPS),
            &|x| reference::layer_norm(&x[0], &x[1], None, EPS),
            &NORM,
        );
    }
}

#[test]
fn finite_differences_agree() {
    let inputs = [random((4, 12), 1, 1.0), random(12, 2, 1.0), random(12, 3, 1.0)];
    finite_differences("rms_norm", &inputs[..2], &|x| rms_norm(&x[0], &x[1].clone().into(), EPS), 1e-2, 2e-3);
    let layer = |x: &[Tensor]| layer_norm(&x[0], &x[1].clone().into(), Some(&x[2].clone().into()), EPS);
    finite_differences("layer_norm", &inputs, &layer, 1e-2, 2e-3);
}

#[test]
fn a_slot_receives_what_the_tape_would() {
    for dtype in [DType::F32, DType::BF16] {
        let [x, w, b] =
            [random((6, 20), 1, 1.0), random(20, 2, 1.0), random(20, 3, 1.0)].map(|x| x.to_dtype(dtype).unwrap());
        let dy = random((6, 20), 4, 1.0).to_dtype(dtype).unwrap();
        let tape = |x: &[Tensor]| layer_norm(&x[0], &x[1].clone().into(), Some(&x[2].clone().into()), EPS);
        let (want_y, want) = run(&tape, &[x.clone(), w.clone(), b.clone()], &dy);

        let ((weight, weight_bucket), (bias, bias_bucket)) = (trainable(&w), trainable(&b));
        // Tracked input, then an input that is not: the anchor keeps the op on the tape.
        let var = Var::from_tensor(&x).unwrap();
        for (times, input) in [(1.0, var.as_tensor()), (2.0, &x)] {
            let y = layer_norm(input, &weight, Some(&bias), EPS).unwrap();
            assert_eq!(bits(&y), bits(&want_y));
            let grads = backward_from(&y, &dy).unwrap();
            assert_eq!(grads.get(input).map(bits), input.is_variable().then(|| bits(&want[0])));
            for (weight, bucket, want) in [(&weight, &weight_bucket, &want[1]), (&bias, &bias_bucket, &want[2])] {
                let want = (want.to_dtype(DType::F32).unwrap() * times).unwrap();
                let tolerance = if dtype == DType::F32 { 1e-6 } else { 4e-3 };
                assert_close("slot", &slot_sum(weight, bucket), &want, tolerance);
            }
        }
    }
}

#[test]
fn mixed_kinds_of_weights() {
    let [x, w, b] = [random((5, 16), 1, 1.0), random(16, 2, 1.0), random(16, 3, 1.0)];
    let dy = random((5, 16), 4, 1.0);
    let tape = |x: &[Tensor]| layer_norm(&x[0], &x[1].clone().into(), Some(&x[2].clone().into()), EPS);
    let (_, want) = run(&tape, &[x.clone(), w.clone(), b.clone()], &dy);
    // A frozen weight, a trainable bias, an input without gradient.
    let (bias, bucket) = trainable(&b);
    let y = layer_norm(&x, &Weight::frozen(w.clone()), Some(&bias), EPS).unwrap();
    backward_from(&y, &dy).unwrap();
    assert_close("bias slot", &slot_sum(&bias, &bucket), &want[2], 1e-6);
    // A trainable weight beside a tracked bias.
    let ((weight, bucket), bias) = (trainable(&w), Var::from_tensor(&b).unwrap());
    let y = layer_norm(&x, &weight, Some(&(&bias).into()), EPS).unwrap();
    let grads = backward_from(&y, &dy).unwrap();
    assert_close("weight slot", &slot_sum(&weight, &bucket), &want[1], 1e-6);
    assert_close("bias", grads.get(&bias).unwrap(), &want[2], 1e-6);
}

#[test]
fn frozen_weights_and_no_grad_record_nothing() {
    let (x, w) = (random((5, 16), 1, 1.0), random(16, 2, 1.0));
    assert!(!rms_norm(&x, &Weight::frozen(w.clone()), EPS).unwrap().track_op());
    let (weight, bucket) = trainable(&w);
    assert!(!no_grad(|| rms_norm(&x, &weight, EPS)).unwrap().track_op());
    assert!(rms_norm(&x, &weight, EPS).unwrap().track_op());
    // Recorded without gradients for the weight, backward of the input leaves its slot alone.
    let var = Var::from_tensor(&x).unwrap();
    let y = no_grad(|| rms_norm(var.as_tensor(), &weight, EPS)).unwrap();
    backward_from(&y, &x).unwrap();
    assert_eq!(values(&slot_sum(&weight, &bucket)), vec![0.0; 16]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (x, w) = (random((5, 16), 1, 1.0), random(16, 2, 1.0));
    let bad = |x: &Tensor, w: Tensor| rms_norm(x, &w.into(), EPS).unwrap_err().to_string();
    assert!(bad(&x, random(15, 1, 1.0)).contains("[16]"));
    assert!(bad(&x, w.to_dtype(DType::BF16).unwrap()).contains("BF16"));
    assert!(bad(&x.to_dtype(DType::F64).unwrap(), w.to_dtype(DType::F64).unwrap()).contains("F64"));
    assert!(!bad(&Tensor::zeros((3, 0), DType::F32, &Device::Cpu).unwrap(), random(0, 1, 1.0)).is_empty());
    assert!(!bad(&Tensor::new(1f32, &Device::Cpu).unwrap(), w.clone()).is_empty());
    let bias = random(3, 1, 1.0).into();
    assert!(layer_norm(&x, &w.into(), Some(&bias), EPS).unwrap_err().to_string().contains("bias"));
}

#[test]
fn no_rows_are_no_work() {
    let x = Tensor::zeros((0, 16), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(rms_norm(&x, &random(16, 2, 1.0).into(), EPS).unwrap().dims(), [0, 16]);
}

#[test]
fn large_rows_and_nan() {
    let x = (random((2, 32), 1, 1.0) * 1e6).unwrap();
    let w = random(32, 2, 1.0);
    let (got, want) = (rms_norm(&x, &w.clone().into(), EPS).unwrap(), reference::rms_norm(&x, &w, EPS).unwrap());
    assert_close("large rows", &got, &want, 3e-6);
    let x = (random((2, 32), 1, 1.0) * f64::NAN).unwrap();
    assert!(values(&rms_norm(&x, &w.into(), EPS).unwrap()).iter().all(|v| v.is_nan()));
}
