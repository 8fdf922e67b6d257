//! Adapters: against their composed references, finite differences, and what a merged matrix would give.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use tallow_ops::{
    CrossEntropyOptions, LoraWeights, PackedMatrix, Targets, Weight, dropout, embedding, linear, linear_cross_entropy,
    lora_linear, lora_linear_sum, merge_lora, merged_norms, no_grad, record, reference, scale_outputs,
};
use tallow_testkit::{LINEAR, assert_close, bits, random, run, run_recorded, slot_sum, trainable, values};

const SCALE: f64 = 1.5;

/// Inputs: x, W, bias, A, B.
fn fused(x: &[Tensor]) -> Result<Tensor> {
    let lora = LoraWeights { a: x[3].clone().into(), b: x[4].clone().into(), scale: SCALE };
    lora_linear(&x[0], None, &x[1].clone().into(), Some(&x[2].clone().into()), &lora)
}

fn composed(x: &[Tensor]) -> Result<Tensor> {
    reference::lora_linear(&x[0], &x[0], &x[1], Some(&x[2]), (&x[3], &x[4], SCALE))
}

fn inputs(n: usize, c: usize, o: usize, r: usize) -> [Tensor; 5] {
    let scale = 1.0 / (c as f32).sqrt();
    [
        random((n, c), 1, 1.0),
        random((o, c), 2, scale),
        random(o, 3, 1.0),
        random((r, c), 4, scale),
        random((o, r), 5, 0.5),
    ]
}

#[test]
fn the_fused_op_matches_the_reference_on_both_tapes() {
    for (n, c, o, r) in [(1, 1, 1, 1), (3, 5, 7, 2), (33, 40, 24, 8), (130, 257, 129, 16)] {
        for dtype in [DType::F32, DType::BF16] {
            let inputs = inputs(n, c, o, r).map(|x| x.to_dtype(dtype).unwrap());
            let wide = inputs.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
            let dy = random((n, o), 99, 1.0).to_dtype(dtype).unwrap();
            let (want, want_grads) = run(&composed, &wide, &dy.to_dtype(DType::F32).unwrap());
            let (forward, gradient) = match dtype {
                // The narrow product between the two matrices is rounded as well.
                DType::BF16 => (1.5e-2, 2e-2),
                _ => LINEAR.f32,
            };
            for (tape, (got, grads)) in
                [("ours", run_recorded(&fused, &inputs, &dy)), ("candle's", run(&fused, &inputs, &dy))]
            {
                let what = format!("{n} x {c} -> {r} -> {o} {dtype:?} on {tape} tape");
                assert_close(&what, &got, &want, forward);
                for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
                    assert_close(&format!("{what}, gradient {i}"), g, w, gradient);
                }
            }
        }
    }
}

#[test]
fn what_is_dropped_reaches_the_adapter_alone() {
    let [x, w, bias, a, b] = inputs(6, 8, 5, 3);
    let dropped = |x: &Tensor| {
        let key = tallow_ops::DropoutKey { seed: 1, step: 2, layer: 3, site: 4, offset: 0 };
        dropout(x, 0.5, key)
    };
    let op = |x: &[Tensor]| {
        let lora = LoraWeights { a: x[3].clone().into(), b: x[4].clone().into(), scale: SCALE };
        lora_linear(&x[0], Some(&dropped(&x[0])?), &x[1].clone().into(), Some(&x[2].clone().into()), &lora)
    };
    let composed =
        |x: &[Tensor]| reference::lora_linear(&x[0], &dropped(&x[0])?, &x[1], Some(&x[2]), (&x[3], &x[4], SCALE));
    let dy = random((6, 5), 99, 1.0);
    let inputs = [x, w, bias, a, b];
    let (want, want_grads) = run(&composed, &inputs, &dy);
    let (got, grads) = run_recorded(&op, &inputs, &dy);
    assert_close("dropped", &got, &want, 2e-6);
    for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
        assert_close(&format!("dropped, gradient {i}"), g, w, 3e-6);
    }
    assert!(bits(&got) != bits(&fused(&inputs).unwrap()));
}

#[test]
fn only_what_is_trained_gets_a_gradient() {
    let [x, w, _, a, b] = inputs(6, 8, 5, 3);
    let dy = random((6, 5), 99, 1.0);
    let reference_inputs = [x.clone(), w.clone(), a.clone(), b.clone()];
    let composed = |x: &[Tensor]| reference::lora_linear(&x[0], &x[0], &x[1], None, (&x[2], &x[3], SCALE));
    let (_, want) = run(&composed, &reference_inputs, &dy);
    let ((a, a_bucket), (b, b_bucket)) = (trainable(&a), trainable(&b));
    let lora = LoraWeights { a, b, scale: SCALE };
    let (y, tape) = record(&[&x], || lora_linear(&x, None, &Weight::frozen(w), None, &lora)).unwrap();
    let dx = tape.backward(y, dy).unwrap();
    assert_close("dx", &dx[0], &want[0], 3e-6);
    assert_close("dA", &slot_sum(&lora.a, &a_bucket), &want[2], 3e-6);
    assert_close("dB", &slot_sum(&lora.b, &b_bucket), &want[3], 3e-6);
}

#[test]
fn scaled_outputs_match_the_reference() {
    let norm = Arc::new(values(&random(7, 9, 1.0)).into_iter().map(|x| x.abs() + 0.5).collect::<Vec<f32>>());
    for dtype in [DType::F32, DType::BF16] {
        let inputs =
            [random((3, 4, 7), 1, 1.0), random(7, 2, 1.0), random(7, 3, 1.0)].map(|x| x.to_dtype(dtype).unwrap());
        let wide = inputs.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
        let fused = |x: &[Tensor]| scale_outputs(&x[0], &x[1].clone().into(), &norm, Some(&x[2].clone().into()));
        let composed = |x: &[Tensor]| reference::scale_outputs(&x[0], &x[1], &norm, Some(&x[2]));
        let dy = random((3, 4, 7), 99, 1.0).to_dtype(dtype).unwrap();
        let (want, want_grads) = run(&composed, &wide, &dy.to_dtype(DType::F32).unwrap());
        let tolerance = if dtype == DType::F32 { 2e-6 } else { 8e-3 };
        for (got, grads) in [run_recorded(&fused, &inputs, &dy), run(&fused, &inputs, &dy)] {
            assert_close("scaled", &got, &want, tolerance);
            for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
                assert_close(&format!("scaled, gradient {i}"), g, w, tolerance);
            }
        }
    }
}

#[test]
fn a_merged_matrix_is_the_sum_and_its_gradients_reach_both_factors() {
    let [_, w, _, a, b] = inputs(1, 40, 300, 4);
    let weight = Weight::frozen(w.clone());
    let op = |x: &[Tensor]| {
        merge_lora(&weight, &LoraWeights { a: x[0].clone().into(), b: x[1].clone().into(), scale: SCALE })
    };
    let composed = |x: &[Tensor]| &w + (x[1].matmul(&x[0])? * SCALE)?;
    let dy = random((300, 40), 99, 1.0);
    let (want, want_grads) = run(&composed, &[a.clone(), b.clone()], &dy);
    let (got, grads) = run_recorded(&op, &[a.clone(), b.clone()], &dy);
    assert_close("merged", &got, &want, 1e-6);
    for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
        assert_close(&format!("merged, gradient {i}"), g, w, 3e-6);
    }
    let lora = LoraWeights { a: Weight::frozen(a), b: Weight::frozen(b), scale: SCALE };
    let norms = merged_norms(&weight, &lora).unwrap();
    let rows = want.to_vec2::<f32>().unwrap();
    for (norm, row) in norms.iter().zip(rows) {
        let exact = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((f64::from(*norm) - exact).abs() < 1e-5 * exact);
    }
}

/// A head with an adapter: the loss takes the merged matrix off the tape it was recorded on.
#[test]
fn a_merged_head_trains_its_factors() {
    let [x, w, _, a, b] = inputs(6, 8, 21, 3);
    let ids = Tensor::new(&[1u32, 5, 20, 0, 3, 7], &Device::Cpu).unwrap();
    let options = CrossEntropyOptions { scale: 1.0 / 6.0, ..Default::default() };
    let weight = Weight::frozen(w.clone());
    let op = |x: &[Tensor]| {
        let lora = LoraWeights { a: x[1].clone().into(), b: x[2].clone().into(), scale: SCALE };
        Ok(linear_cross_entropy(&x[0], &merge_lora(&weight, &lora)?.into(), &ids, &options)?.loss)
    };
    let composed = |x: &[Tensor]| {
        let merged = (&w + (x[2].matmul(&x[1])? * SCALE)?)?;
        Ok(reference::linear_cross_entropy(&x[0], &merged, &ids, &options)?.loss)
    };
    let one = Tensor::new(1f32, &Device::Cpu).unwrap();
    let inputs = [x, a, b];
    let (want, want_grads) = run(&composed, &inputs, &one);
    let (got, grads) = run_recorded(&op, &inputs, &one);
    assert_close("loss", &got, &want, 2e-6);
    for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
        assert_close(&format!("head, gradient {i}"), g, w, 5e-6);
    }
}

/// Eighths, one byte each.
#[derive(Debug)]
struct Eighths {
    columns: usize,
    codes: Vec<i8>,
}

impl PackedMatrix for Eighths {
    fn dims(&self) -> (usize, usize) {
        (self.codes.len() / self.columns, self.columns)
    }

    fn bytes(&self) -> usize {
        self.codes.len()
    }

    fn unpack(&self, rows: Range<usize>, out: &mut [f32]) {
        let codes = &self.codes[rows.start * self.columns..rows.end * self.columns];
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(*code) / 8.0);
    }
}

#[test]
fn packed_weights_give_what_their_values_give() {
    let (o, c) = (50, 12);
    let codes: Vec<i8> = (0..o * c).map(|i| ((i * 37) % 17) as i8 - 8).collect();
    let dense: Vec<f32> = codes.iter().map(|&x| f32::from(x) / 8.0).collect();
    let dense = Tensor::from_vec(dense, (o, c), &Device::Cpu).unwrap();
    let matrix = Arc::new(Eighths { columns: c, codes });
    for dtype in [DType::F32, DType::BF16] {
        let (packed, frozen) =
            (Weight::packed(matrix.clone(), dtype).unwrap(), Weight::frozen(dense.to_dtype(dtype).unwrap()));
        assert_eq!((packed.shape(), packed.dtype()), (frozen.shape(), dtype));
        let x = random((9, c), 1, 1.0).to_dtype(dtype).unwrap();
        let dy = random((9, o), 2, 1.0).to_dtype(dtype).unwrap();
        let through = |weight: &Weight| run_recorded(&|x| linear(&x[0], weight, None), std::slice::from_ref(&x), &dy);
        let ((y, dx), (want, want_dx)) = (through(&packed), through(&frozen));
        assert_eq!((bits(&y), bits(&dx[0])), (bits(&want), bits(&want_dx[0])));
        let candle = run(&|x| linear(&x[0], &packed, None), std::slice::from_ref(&x), &dy);
        assert_eq!(bits(&candle.1[0]), bits(&dx[0]));
        let ids = Tensor::new(&[3u32, 49, 0, 3], &Device::Cpu).unwrap();
        let rows = |weight: &Weight| bits(&no_grad(|| embedding(&ids, weight)).unwrap());
        assert_eq!(rows(&packed), rows(&frozen));
        let targets = Tensor::new(&[0u32, 1, 2, 3, 4, 5, 6, 7, 49], &Device::Cpu).unwrap();
        let loss = |weight: &Weight| {
            linear_cross_entropy(&x, weight, &targets, &CrossEntropyOptions::default()).unwrap().nll_sum
        };
        assert_eq!(loss(&packed), loss(&frozen));
    }
    let weight = Weight::packed(matrix, DType::F32).unwrap();
    assert!(
        weight.rows(40..51).is_err()
            && Weight::packed(Arc::new(Eighths { columns: 1, codes: vec![1] }), DType::F16).is_err()
    );
}

#[test]
fn weights_of_targets_and_smoothing_match_the_reference() {
    let (n, c, v) = (17, 9, 31);
    let ids: Vec<u32> = (0..n).map(|i| if i % 5 == 4 { u32::MAX } else { (i * 7 % v) as u32 }).collect();
    let ids = Tensor::from_vec(ids, n, &Device::Cpu).unwrap();
    let weights: Vec<f32> = (0..n).map(|i| (i % 4) as f32 * 0.75).collect();
    let inputs = [random((n, c), 1, 1.0), random((v, c), 2, 1.0)];
    for (label_smoothing, chunk) in [(0.0, None), (0.1, Some(4)), (0.4, Some(1))] {
        let options = CrossEntropyOptions { scale: 0.3, z_loss: 0.01, label_smoothing, chunk, ..Default::default() };
        let targets = Targets { ids: &ids, weights: Some(&weights) };
        let fused = |x: &[Tensor]| Ok(linear_cross_entropy(&x[0], &x[1].clone().into(), targets, &options)?.loss);
        let composed = |x: &[Tensor]| Ok(reference::linear_cross_entropy(&x[0], &x[1], targets, &options)?.loss);
        let one = Tensor::new(1f32, &Device::Cpu).unwrap();
        let (want, want_grads) = run(&composed, &inputs, &one);
        let (got, grads) = run_recorded(&fused, &inputs, &one);
        assert_close("loss", &got, &want, 2e-6);
        for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
            assert_close(&format!("weighted, smoothing {label_smoothing}, gradient {i}"), g, w, 5e-6);
        }
        let sums = linear_cross_entropy(&inputs[0], &inputs[1].clone().into(), targets, &options).unwrap();
        let counted: f64 = (0..n).filter(|i| i % 5 != 4).map(|i| f64::from(weights[i])).sum();
        assert!((sums.weight_sum - counted).abs() < 1e-9 && sums.num_targets == 14);
    }
    let wrong = |weights: &[f32], smoothing: f64| {
        let targets = Targets { ids: &ids, weights: Some(weights) };
        let options = CrossEntropyOptions { label_smoothing: smoothing, ..Default::default() };
        linear_cross_entropy(&inputs[0], &inputs[1].clone().into(), targets, &options).err().map(|e| e.to_string())
    };
    assert!(wrong(&weights[1..], 0.0).unwrap().contains("weights for"));
    assert!(wrong(&[-1.0; 17], 0.0).unwrap().contains("at least 0"));
    assert!(wrong(&[f32::NAN; 17], 0.0).unwrap().contains("at least 0"));
    assert!(wrong(&weights, 1.0).unwrap().contains("smoothing"));
}

#[test]
fn shapes_that_do_not_fit_are_errors() {
    let [x, w, bias, a, b] = inputs(6, 8, 5, 3);
    let op = |x: &Tensor, w: &Tensor, a: &Tensor, b: &Tensor| {
        let lora = LoraWeights { a: a.clone().into(), b: b.clone().into(), scale: 1.0 };
        lora_linear(x, None, &w.clone().into(), None, &lora).err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(op(&x, &w, &a, &b), "");
    assert!(op(&x, &w, &a, &a).contains("lora_linear"));
    assert!(op(&x, &w, &w, &b).contains("lora_linear"));
    assert!(op(&x, &w, &b, &b).contains("expected"));
    assert!(op(&x, &w, &a, &b.to_dtype(DType::BF16).unwrap()).contains("dtype"));
    let norm = Arc::new(vec![1.0; 4]);
    assert!(scale_outputs(&x, &bias.clone().into(), &norm, None).is_err());
}

#[test]
fn several_adapters_are_added_and_each_gets_its_gradient() {
    let [x, w, bias, a, b] = inputs(6, 8, 5, 3);
    let (a2, b2) = (random((2, 8), 6, 0.4), random((5, 2), 7, 0.5));
    let op = |x: &[Tensor]| {
        let lora = |i: usize, scale: f64| LoraWeights { a: x[i].clone().into(), b: x[i + 1].clone().into(), scale };
        lora_linear_sum(&x[0], None, &x[1].clone().into(), Some(&x[2].clone().into()), &[lora(3, SCALE), lora(5, -0.5)])
    };
    let composed = |x: &[Tensor]| {
        let y = reference::lora_linear(&x[0], &x[0], &x[1], Some(&x[2]), (&x[3], &x[4], SCALE))?;
        y - (reference::linear(&reference::linear(&x[0], &x[5], None)?, &x[6], None)? * 0.5)?
    };
    let dy = random((6, 5), 99, 1.0);
    let inputs = [x, w, bias, a, b, a2, b2];
    let (want, want_grads) = run(&composed, &inputs, &dy);
    for (got, grads) in [run_recorded(&op, &inputs, &dy), run(&op, &inputs, &dy)] {
        assert_close("two adapters", &got, &want, 3e-6);
        for (i, (g, w)) in grads.iter().zip(&want_grads).enumerate() {
            assert_close(&format!("two adapters, gradient {i}"), g, w, 4e-6);
        }
    }
}
