//! Head and loss in one: against all logits at once, in chunks of any size, with ignored targets and z-loss.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Device, Result, Tensor, Var};
use tallow_ops::{
    CrossEntropyOptions, FourBitKind, IGNORE_INDEX, Weight, composed_of, linear_cross_entropy, logprobs_top, no_grad,
    reference,
};
use tallow_testkit::{CROSS_ENTROPY, assert_close, compare, finite_differences, random, slot_sum, trainable, values};

fn targets(n: usize, v: usize, ignore_every: usize) -> Tensor {
    let id = |i: usize| if i % ignore_every == ignore_every - 1 { IGNORE_INDEX } else { (i * 7 % v) as u32 };
    Tensor::from_vec((0..n).map(id).collect::<Vec<u32>>(), n, &Device::Cpu).unwrap()
}

fn fused(x: &[Tensor], t: &Tensor, options: &CrossEntropyOptions) -> Result<Tensor> {
    // The corpus seeds its own gradient; a loss on the tape takes any.
    let loss = linear_cross_entropy(&x[0], &x[1].clone().into(), t, options)?.loss;
    composed_of("cast", &[&loss], |loss| loss[0].to_dtype(x[0].dtype()))
}

fn composed(x: &[Tensor], t: &Tensor, options: &CrossEntropyOptions) -> Result<Tensor> {
    Ok(reference::linear_cross_entropy(&x[0], &x[1], t, options)?.loss)
}

#[test]
fn matches_the_reference_in_chunks_of_any_size() {
    for (n, c, v) in [(1, 1, 2), (3, 8, 5), (17, 33, 65), (130, 24, 300)] {
        for (chunk, z_loss, ignore_every) in [(None, 0.0, 99), (Some(1), 0.0, 3), (Some(5), 1e-2, 4)] {
            let options =
                CrossEntropyOptions { scale: 1.0 / n as f64, z_loss, chunk, ..CrossEntropyOptions::default() };
            let t = targets(n, v, ignore_every);
            let inputs = [random((n, c), 1, 1.0), random((v, c), 2, 1.0)];
            let what = format!("cross-entropy {n} x {c} -> {v}, chunk {chunk:?}, z {z_loss}");
            compare(&what, &inputs, &|x| fused(x, &t, &options), &|x| composed(x, &t, &options), &CROSS_ENTROPY);
        }
    }
}

#[test]
fn finite_differences_agree() {
    let options = CrossEntropyOptions { scale: 0.3, z_loss: 0.05, chunk: Some(3), ..CrossEntropyOptions::default() };
    let t = targets(8, 11, 3);
    let inputs = [random((8, 6), 1, 1.0), random((11, 6), 2, 1.0)];
    finite_differences("cross-entropy", &inputs, &|x| fused(x, &t, &options), 1e-2, 2e-3);
}

#[test]
fn a_slot_has_its_gradient_when_the_loss_returns() {
    for dtype in [DType::F32, DType::BF16] {
        let (n, c, v) = (29, 12, 41);
        let [x, w] = [((n, c), 1), ((v, c), 2)].map(|(s, k)| random(s, k, 1.0).to_dtype(dtype).unwrap());
        let t = targets(n, v, 5);
        let options = CrossEntropyOptions { scale: 1.0 / 24.0, chunk: Some(8), ..CrossEntropyOptions::default() };
        let wide = [&x, &w].map(|x| Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap());
        let tensors = wide.each_ref().map(|v| v.as_tensor().clone());
        let want = composed(&tensors, &t, &options).unwrap().backward().unwrap();
        let (weight, bucket) = trainable(&w);
        let var = Var::from_tensor(&x).unwrap();
        let loss = linear_cross_entropy(var.as_tensor(), &weight, &t, &options).unwrap();
        let tolerance = if dtype == DType::F32 { 3e-6 } else { 3e-3 };
        assert_close("slot", &slot_sum(&weight, &bucket), want.get(&wide[1]).unwrap(), tolerance);
        let grads = loss.loss.backward().unwrap();
        assert_close("dx", grads.get(&var).unwrap(), want.get(&wide[0]).unwrap(), tolerance);
        // Anything but the loss itself as the start would leave the slot wrong by that factor.
        let scaled = (linear_cross_entropy(var.as_tensor(), &weight, &t, &options).unwrap().loss * 2.0).unwrap();
        assert!(scaled.backward().unwrap_err().to_string().contains("CrossEntropyOptions::scale"));
    }
}

#[test]
fn sums_count_what_is_not_ignored() {
    let (x, w) = (random((10, 4), 1, 1.0), random((6, 4), 2, 1.0));
    let t = targets(10, 6, 5);
    let options = CrossEntropyOptions::default();
    let got = no_grad(|| linear_cross_entropy(&x, &Weight::frozen(w.clone()), &t, &options)).unwrap();
    let want = reference::linear_cross_entropy(&x, &w, &t, &options).unwrap();
    assert_eq!((got.num_targets, want.num_targets), (8, 8));
    assert!((got.nll_sum - want.nll_sum).abs() < 1e-5);
    assert!(!got.loss.track_op());
    let none = Tensor::full(IGNORE_INDEX, 10, &Device::Cpu).unwrap();
    let (weight, bucket) = trainable(&w);
    let got = linear_cross_entropy(&x, &weight, &none, &options).unwrap();
    assert_eq!((got.num_targets, got.nll_sum), (0, 0.0));
    assert!(values(&slot_sum(&weight, &bucket)).iter().all(|g| *g == 0.0));
}

#[test]
fn extreme_logits_stay_finite_and_nan_is_seen() {
    let x = (random((4, 8), 1, 1.0) * 1e4).unwrap();
    let (w, t) = (random((9, 8), 2, 1.0), targets(4, 9, 99));
    let options = CrossEntropyOptions::default();
    let want = reference::linear_cross_entropy(&x, &w, &t, &options).unwrap().nll_sum;
    let (weight, bucket) = trainable(&w);
    let got = linear_cross_entropy(&x, &weight, &t, &options).unwrap();
    assert!(got.nll_sum.is_finite() && (got.nll_sum - want).abs() <= 1e-5 * want);
    assert!(values(&slot_sum(&weight, &bucket)).iter().all(|g| g.is_finite()));
    let bad = (x * f64::NAN).unwrap();
    assert!(linear_cross_entropy(&bad, &w.into(), &t, &options).unwrap().nll_sum.is_nan());
}

#[test]
fn the_most_likely_tokens() {
    for dtype in [DType::F32, DType::BF16] {
        let (n, c, v) = (21, 16, 50);
        let [x, w] = [((n, c), 1), ((v, c), 2)].map(|(s, k)| random(s, k, 1.0).to_dtype(dtype).unwrap());
        let ids: Vec<u32> = (0..n as u32).map(|i| i * 3 % v as u32).collect();
        let logits = reference::linear(&x.to_dtype(DType::F32).unwrap(), &w.to_dtype(DType::F32).unwrap(), None);
        let want = candle_nn::ops::log_softmax(&logits.unwrap(), 1).unwrap().to_vec2::<f32>().unwrap();
        for k in [0, 1, 7, 50, 99] {
            let got = logprobs_top(&x, &Weight::frozen(w.clone()), &ids, k).unwrap();
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got.target - want[ids[i] as usize]).abs() < 1e-4);
                let mut order: Vec<u32> = (0..v as u32).collect();
                order.sort_by(|&a, &b| want[b as usize].total_cmp(&want[a as usize]));
                assert_eq!(got.top.len(), k.min(v));
                for ((id, logprob), wanted) in got.top.iter().zip(order) {
                    assert!((logprob - want[wanted as usize]).abs() < 1e-4);
                    assert!((logprob - want[*id as usize]).abs() < 1e-4);
                }
            }
        }
    }
    let (x, w) =
        (Tensor::ones((1, 2), DType::F32, &Device::Cpu).unwrap(), Tensor::ones((5, 2), DType::F32, &Device::Cpu));
    let top = logprobs_top(&x, &w.unwrap().into(), &[0], 3).unwrap();
    assert_eq!(top[0].top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1, 2], "equal ones by id");
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (x, w) = (random((4, 8), 1, 1.0), random((9, 8), 2, 1.0));
    let options = CrossEntropyOptions::default();
    let bad = |x: &Tensor, w: &Tensor, t: Vec<u32>| {
        let t = Tensor::from_vec(t.clone(), t.len(), &Device::Cpu).unwrap();
        linear_cross_entropy(x, &w.clone().into(), &t, &options).err().unwrap().to_string()
    };
    assert!(bad(&x, &w, vec![0, 1, 9, 2]).contains("target 9 at index 2"));
    assert!(bad(&x, &w, vec![0, 1]).contains("targets [4]"));
    assert!(bad(&x, &random((9, 7), 1, 1.0), vec![0; 4]).contains("[v, c]"));
    assert!(bad(&x, &w.to_dtype(DType::BF16).unwrap(), vec![0; 4]).contains("dtype"));
    assert!(logprobs_top(&x, &w.clone().into(), &[0, 0, 0, 9], 1).unwrap_err().to_string().contains("target 9"));
    assert!(logprobs_top(&x, &w.into(), &[0], 1).unwrap_err().to_string().contains("4 rows"));
}

/// Rows in 4 bits, a packed head of several parts.
fn packed_head(v: usize, c: usize, dtype: DType) -> (Weight, Weight) {
    let wide = values(&random((v, c), 2, 1.0));
    let four = tallow_ops::quantize_four_bit(&wide, &[v, c], FourBitKind::Nf4, 64, true).unwrap();
    let packed = Weight::packed(std::sync::Arc::new(four), dtype).unwrap();
    let plain = Weight::frozen(packed.value().unwrap());
    (packed, plain)
}

#[test]
fn a_packed_head_is_that_of_its_values() {
    // Parts of 1,024 rows, the last of 452.
    let (n, c, v) = (70, 2048, 2500);
    let t = targets(n, v, 7);
    let options = CrossEntropyOptions { scale: 1.0 / n as f64, chunk: Some(64), ..CrossEntropyOptions::default() };
    for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 8e-3)] {
        let (packed, plain) = packed_head(v, c, dtype);
        let x = random((n, c), 1, 0.1).to_dtype(dtype).unwrap();
        let run = |weight: &Weight| {
            let x = Var::from_tensor(&x).unwrap();
            let loss = linear_cross_entropy(x.as_tensor(), weight, &t, &options).unwrap();
            let dx = loss.loss.backward().unwrap().get(x.as_tensor()).unwrap().to_dtype(DType::F32).unwrap();
            (loss.nll_sum, values(&dx))
        };
        let ((a, da), (b, db)) = (run(&packed), run(&plain));
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{dtype:?}: {a} and {b}");
        let largest = db.iter().fold(0f32, |most, x| most.max(x.abs()));
        let apart = da.iter().zip(&db).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(largest > 0.0 && apart <= tolerance * largest, "{dtype:?}: {apart:e} of {largest:e}");
        let ids: Vec<u32> = (0..n as u32).collect();
        let (a, b) = (logprobs_top(&x, &packed, &ids, 3).unwrap(), logprobs_top(&x, &plain, &ids, 3).unwrap());
        for (a, b) in a.iter().zip(&b) {
            assert!((a.target - b.target).abs() <= 1e-5, "{a:?} {b:?}");
            assert_eq!(a.top.iter().map(|t| t.0).collect::<Vec<_>>(), b.top.iter().map(|t| t.0).collect::<Vec<_>>());
        }
    }
}
