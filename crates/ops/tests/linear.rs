//! Linear layers and lookups: the corpus, and every way in which a weight can take part.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Tensor, Var};
use tallow_ops::{Weight, backward_from, embedding, linear, no_grad, reference};
use tallow_testkit::{
    LINEAR, assert_close, bits, compare, finite_differences, random, run, slot_sum, trainable, values,
};

fn with_bias(x: &[Tensor]) -> candle_core::Result<Tensor> {
    linear(&x[0], &x[1].clone().into(), Some(&x[2].clone().into()))
}

fn plain(x: &[Tensor]) -> candle_core::Result<Tensor> {
    linear(&x[0], &x[1].clone().into(), None)
}

#[test]
fn linear_matches_the_reference() {
    for (rows, c, o) in [(1, 1, 1), (1, 64, 3), (3, 5, 7), (13, 33, 47), (65, 96, 31), (130, 257, 129), (700, 40, 24)] {
        let what = format!("linear {rows} x {c} -> {o}");
        let scale = 1.0 / (c as f32).sqrt();
        let inputs = [random((rows, c), 1, 1.0), random((o, c), 2, scale), random(o, 3, 1.0)];
        compare(&what, &inputs[..2], &plain, &|x| reference::linear(&x[0], &x[1], None), &LINEAR);
        let reference = |x: &[Tensor]| reference::linear(&x[0], &x[1], Some(&x[2]));
        compare(&format!("{what} + bias"), &inputs, &with_bias, &reference, &LINEAR);
    }
    let inputs = [random((2, 3, 4, 10), 1, 1.0), random((6, 10), 2, 0.3)];
    compare("linear of rank 4", &inputs, &plain, &|x| reference::linear(&x[0], &x[1], None), &LINEAR);
}

#[test]
fn finite_differences_agree() {
    let inputs = [random((4, 9), 1, 1.0), random((5, 9), 2, 0.4), random(5, 3, 1.0)];
    finite_differences("linear", &inputs, &with_bias, 1e-2, 1e-3);
    let ids = Tensor::new(&[[3u32, 0, 3], [1, 3, 5]], &Device::Cpu).unwrap();
    let table = [random((6, 4), 1, 1.0)];
    finite_differences("embedding", &table, &|x| embedding(&ids, &x[0].clone().into()), 1e-2, 1e-3);
}

#[test]
fn a_slot_receives_what_the_tape_would() {
    for dtype in [DType::F32, DType::BF16] {
        let shapes: [(&[usize], u64); 3] = [(&[6, 20], 1), (&[9, 20], 2), (&[9], 3)];
        let [x, w, b] = shapes.map(|(shape, stream)| random(shape, stream, 1.0).to_dtype(dtype).unwrap());
        let dy = random((6, 9), 4, 1.0).to_dtype(dtype).unwrap();
        let (want_y, want) = run(&with_bias, &[x.clone(), w.clone(), b.clone()], &dy);
        let ((weight, weight_bucket), (bias, bias_bucket)) = (trainable(&w), trainable(&b));
        let var = Var::from_tensor(&x).unwrap();
        for (times, input) in [(1.0, var.as_tensor()), (2.0, &x)] {
            let y = linear(input, &weight, Some(&bias)).unwrap();
            assert_eq!(bits(&y), bits(&want_y));
            let grads = backward_from(&y, &dy).unwrap();
            assert_eq!(grads.get(input).map(bits), input.is_variable().then(|| bits(&want[0])));
            for (weight, bucket, want) in [(&weight, &weight_bucket, &want[1]), (&bias, &bias_bucket, &want[2])] {
                let want = (want.to_dtype(DType::F32).unwrap() * times).unwrap();
                let tolerance = if dtype == DType::F32 { 2e-6 } else { 4e-3 };
                assert_close("slot", &slot_sum(weight, bucket), &want, tolerance);
            }
        }
    }
}

#[test]
fn frozen_weights_cost_no_gradient() {
    let [x, w] = [random((6, 20), 1, 1.0), random((9, 20), 2, 1.0)];
    let frozen = Weight::frozen(w.clone());
    assert!(!linear(&x, &frozen, None).unwrap().track_op());
    let var = Var::from_tensor(&x).unwrap();
    let y = linear(var.as_tensor(), &frozen, None).unwrap();
    let dy = random((6, 9), 4, 1.0);
    let grads = backward_from(&y, &dy).unwrap();
    assert_close("dx", grads.get(var.as_tensor()).unwrap(), &dy.matmul(&w).unwrap(), 2e-6);
    let (weight, bucket) = trainable(&w);
    assert!(!no_grad(|| linear(&x, &weight, None)).unwrap().track_op());
    let y = no_grad(|| linear(var.as_tensor(), &weight, None)).unwrap();
    backward_from(&y, &dy).unwrap();
    assert!(values(&slot_sum(&weight, &bucket)).iter().all(|v| *v == 0.0), "recorded without gradients");
}

#[test]
fn embedding_matches_the_reference_and_adds_repeated_ids_in_order() {
    for dtype in [DType::F32, DType::BF16] {
        let table = random((37, 11), 1, 1.0).to_dtype(dtype).unwrap();
        let ids: Vec<u32> = (0..3 * 50).map(|i| (i * i * 7 + 3) % 37).collect();
        let ids = Tensor::from_vec(ids, (3, 50), &Device::Cpu).unwrap();
        let dy = random((3, 50, 11), 2, 1.0).to_dtype(dtype).unwrap();
        let fused = |x: &[Tensor]| embedding(&ids, &x[0].clone().into());
        let (y, grads) = run(&fused, std::slice::from_ref(&table), &dy);
        let wide = [table.to_dtype(DType::F32).unwrap()];
        let reference = |x: &[Tensor]| reference::embedding(&ids, &x[0]);
        let (want, want_grads) = run(&reference, &wide, &dy.to_dtype(DType::F32).unwrap());
        assert_eq!(bits(&y), bits(&want));
        assert_close("table", &grads[0], &want_grads[0], if dtype == DType::F32 { 1e-6 } else { 4e-3 });
        let (weight, bucket) = trainable(&table);
        backward_from(&embedding(&ids, &weight).unwrap(), &dy).unwrap();
        assert_close("slot", &slot_sum(&weight, &bucket), &want_grads[0], 2e-6);
    }
}

#[test]
fn extreme_values_are_not_hidden() {
    let x = Tensor::new(&[[f32::INFINITY, 1.0], [f32::NAN, 0.0], [1e30, 1e30]], &Device::Cpu).unwrap();
    let w = Tensor::new(&[[1f32, 1.0], [0.0, 1.0]], &Device::Cpu).unwrap();
    let y = values(&linear(&x, &w.into(), None).unwrap());
    assert!(y[0].is_infinite() && y[1].is_nan() && y[2].is_nan() && y[3].is_nan());
    assert_eq!(y[4..], [2e30, 1e30]);
}

#[test]
fn no_rows_are_no_work() {
    let x = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(linear(&x, &random((3, 4), 1, 1.0).into(), None).unwrap().dims(), [0, 3]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (x, w) = (random((5, 16), 1, 1.0), random((3, 16), 2, 1.0));
    let bad = |x: &Tensor, w: &Tensor, b: Option<Tensor>| {
        linear(x, &w.clone().into(), b.map(Into::into).as_ref()).unwrap_err().to_string()
    };
    assert!(bad(&x, &random((3, 15), 1, 1.0), None).contains("[3, 15]"));
    assert!(bad(&x, &random(16, 1, 1.0), None).contains("[o, c]"));
    assert!(bad(&x, &w, Some(random(4, 1, 1.0))).contains("bias of [3]"));
    assert!(bad(&x, &w.to_dtype(DType::BF16).unwrap(), None).contains("BF16"));
    assert!(bad(&x.to_dtype(DType::F64).unwrap(), &w.to_dtype(DType::F64).unwrap(), None).contains("F64"));
    let lookup = |ids: Tensor| embedding(&ids, &w.clone().into()).unwrap_err().to_string();
    assert!(lookup(Tensor::new(&[0u32, 3], &Device::Cpu).unwrap()).contains("id 3 at index 1"));
    assert!(lookup(Tensor::new(&[u32::MAX], &Device::Cpu).unwrap()).contains("4294967295"));
    assert!(lookup(Tensor::new(&[0i64], &Device::Cpu).unwrap()).contains("u32"));
}
