//! `attention` and `KeyRanges` against the composed reference, finite differences and the invariants of packing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use tallow_ops::{KeyRanges, attention, backward_from, reference};
use tallow_testkit::*;

fn inputs(b: usize, (tq, tk): (usize, usize), (h, g): (usize, usize), d: usize) -> [Tensor; 3] {
    [random((b, tq, h, d), 1, 1.0), random((b, tk, g, d), 2, 1.0), random((b, tk, g, d), 3, 1.0)]
}

fn check(what: &str, inputs: &[Tensor], ranges: KeyRanges) {
    let (ranges, scale) = (Arc::new(ranges), 1.0 / (inputs[0].dim(3).unwrap() as f64).sqrt());
    compare(
        what,
        inputs,
        &|x| attention(&x[0], &x[1], &x[2], &ranges, scale),
        &|x| reference::attention(&x[0], &x[1], &x[2], &ranges, scale),
        &ATTENTION,
    );
}

#[test]
fn causal_matches_the_reference_over_odd_sizes() {
    for (t, heads, d) in [
        (1, (1, 1), 8),
        (3, (4, 2), 20),
        (17, (6, 1), 64),
        (33, (4, 2), 80),
        (129, (1, 1), 128),
        (129, (4, 2), 20),
        (257, (6, 1), 64),
    ] {
        let ranges = KeyRanges::causal(2, t, t).unwrap();
        check(&format!("causal t {t} heads {heads:?} d {d}"), &inputs(2, (t, t), heads, d), ranges);
    }
}

#[test]
fn decode_shapes_match_the_reference() {
    for (tq, tk, heads, d) in [(1, 17, (4, 2), 64), (1, 1100, (6, 1), 80), (4, 600, (2, 1), 20), (33, 129, (4, 2), 8)] {
        let ranges = KeyRanges::causal(2, tq, tk).unwrap();
        check(&format!("decode {tq} of {tk}"), &inputs(2, (tq, tk), heads, d), ranges);
    }
}

/// Where each token's document begins, documents of random lengths.
fn documents(b: usize, t: usize, seed: u64) -> Vec<u32> {
    let mut draws = vec![0.0; b * t];
    tallow_kernels::rng::fill_uniform(&mut draws, seed, 0, 0.0, 1.0);
    let mut starts = Vec::new();
    for row in draws.chunks(t) {
        let mut start = 0;
        for (i, draw) in row.iter().enumerate() {
            start = if *draw < 0.05 { i as u32 } else { start };
            starts.push(start);
        }
    }
    starts
}

#[test]
fn documents_windows_and_lengths_match_the_reference() {
    for (seed, t) in [(1, 33), (2, 129), (3, 257)] {
        let starts = documents(2, t, seed);
        for window in [None, Some(1), Some(20)] {
            let ranges = KeyRanges::causal_documents(2, t, &starts, window).unwrap();
            check(&format!("documents t {t} window {window:?}"), &inputs(2, (t, t), (4, 2), 20), ranges);
        }
        let lens = [t as u32 / 2, t as u32];
        check("bidirectional", &inputs(2, (t, t), (2, 2), 20), KeyRanges::bidirectional(2, t, Some(&lens)).unwrap());
        check("all to all", &inputs(2, (t, t), (2, 1), 20), KeyRanges::bidirectional(2, t, None).unwrap());
    }
}

/// Where the prefix of each token's document ends: after a random part of it, from none to all.
fn prefixes(starts: &[u32], t: usize, seed: u64) -> Vec<u32> {
    let mut draws = vec![0.0; starts.len()];
    tallow_kernels::rng::fill_uniform(&mut draws, seed, 1, 0.0, 1.0);
    let mut ends = Vec::new();
    for row in starts.chunks(t) {
        for document in row.chunk_by(|a, b| a == b) {
            let prefix = (draws[ends.len()] * (document.len() + 1) as f32) as u32;
            ends.extend(document.iter().map(|start| start + prefix));
        }
    }
    ends
}

#[test]
fn prefixes_match_the_reference() {
    for (seed, t, heads, d) in [(1, 7, (2, 2), 8), (2, 33, (4, 2), 20), (3, 129, (6, 1), 64), (4, 257, (4, 2), 80)] {
        let starts = documents(2, t, seed);
        let ranges = KeyRanges::prefix_documents(2, t, &starts, &prefixes(&starts, t, seed)).unwrap();
        assert_ne!(ranges, KeyRanges::causal_documents(2, t, &starts, None).unwrap());
        check(&format!("prefixes t {t} heads {heads:?} d {d}"), &inputs(2, (t, t), heads, d), ranges);
        // One document, of which most is the prefix: tiles that are all seen beside causal ones.
        let ends = vec![t as u32 * 2 / 3; 2 * t];
        let ranges = KeyRanges::prefix_documents(2, t, &vec![0; 2 * t], &ends).unwrap();
        check(&format!("one prefix t {t}"), &inputs(2, (t, t), heads, d), ranges);
    }
    let ranges = Arc::new(KeyRanges::prefix_documents(1, 11, &[0; 11], &[6; 11]).unwrap());
    let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], &ranges, 0.4);
    finite_differences("prefix", &inputs(1, (11, 11), (2, 1), 6), &op, 1e-2, 3e-3);
}

#[test]
fn an_empty_prefix_is_causal_bit_for_bit_and_a_prefix_never_sees_what_follows() {
    let t = 150;
    let starts = documents(2, t, 9);
    let causal = Arc::new(KeyRanges::causal_documents(2, t, &starts, None).unwrap());
    let empty = Arc::new(KeyRanges::prefix_documents(2, t, &starts, &starts).unwrap());
    let prefix = Arc::new(KeyRanges::prefix_documents(1, t, &vec![0; t], &vec![60; t]).unwrap());
    for dtype in [DType::F32, DType::BF16] {
        let x = inputs(2, (t, t), (4, 2), 20).map(|x| x.to_dtype(dtype).unwrap());
        let dy = random((2, t, 4, 20), 5, 1.0).to_dtype(dtype).unwrap();
        let through =
            |ranges: &Arc<KeyRanges>| run(&|x: &[Tensor]| attention(&x[0], &x[1], &x[2], ranges, 0.3), &x, &dy);
        let ((y, grads), (z, others)) = (through(&causal), through(&empty));
        assert_eq!(bits(&y), bits(&z));
        assert!(grads.iter().zip(&others).all(|(a, b)| bits(a) == bits(b)));

        let x = x.map(|x| x.narrow(0, 0, 1).unwrap());
        let y = |edit: usize| {
            let edited = |x: &Tensor| {
                let one = (x.narrow(1, edit, 1).unwrap() * 1.7).unwrap();
                Tensor::cat(&[&x.narrow(1, 0, edit).unwrap(), &one, &x.narrow(1, edit + 1, t - edit - 1).unwrap()], 1)
            };
            let (k, v) = (edited(&x[1]).unwrap(), edited(&x[2]).unwrap());
            let y = attention(&x[0], &k, &v, &prefix, 0.3).unwrap();
            (0..t).map(|i| bits(&y.narrow(1, i, 1).unwrap())).collect::<Vec<_>>()
        };
        let plain = attention(&x[0], &x[1], &x[2], &prefix, 0.3).unwrap();
        for (edit, first) in [(59, 0), (3, 0), (60, 60), (100, 100)] {
            let seen: Vec<bool> =
                y(edit).iter().enumerate().map(|(i, y)| *y != bits(&plain.narrow(1, i, 1).unwrap())).collect();
            assert!(seen.iter().enumerate().all(|(i, seen)| *seen == (i >= first)), "{dtype:?}: key {edit}: {seen:?}");
        }
    }
}

#[test]
fn empty_ranges_give_zeros_and_no_gradients() {
    let (t, d) = (40, 20);
    let (mut lo, mut hi): (Vec<u32>, Vec<u32>) = (vec![0; t], (1..=t as u32).collect());
    (lo[7], hi[7]) = (5, 5);
    (lo[33], hi[33]) = (0, 0);
    let ranges = KeyRanges::new(1, t, t, lo, hi).unwrap();
    let x = inputs(1, (t, t), (2, 1), d);
    check("empty ranges", &x, ranges.clone());
    let y = attention(&x[0], &x[1], &x[2], &Arc::new(ranges), 0.2).unwrap();
    assert_eq!(values(&y.narrow(1, 7, 1).unwrap()), vec![0.0; 2 * d]);
    let nothing = Arc::new(KeyRanges::bidirectional(1, t, Some(&[0])).unwrap());
    let dy = random((1, t, 2, d), 5, 1.0);
    let (y, grads) = run(&|x| attention(&x[0], &x[1], &x[2], &nothing, 0.2), &x, &dy);
    assert!([&y, &grads[0], &grads[1], &grads[2]].iter().all(|x| values(x).iter().all(|v| *v == 0.0)));
}

#[test]
fn finite_differences_agree() {
    for (tq, tk, heads) in [(5, 7, (2, 1)), (13, 13, (2, 2))] {
        let ranges = Arc::new(KeyRanges::causal(2, tq, tk).unwrap());
        let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], &ranges, 0.4);
        finite_differences(&format!("{tq} of {tk}"), &inputs(2, (tq, tk), heads, 6), &op, 1e-2, 3e-3);
    }
}

#[test]
fn editing_one_document_leaves_the_other_bit_for_bit() {
    let (t, first) = (150, 70);
    let starts: Vec<u32> = (0..t).map(|i| if i < first { 0 } else { first as u32 }).collect();
    let ranges = Arc::new(KeyRanges::causal_documents(1, t, &starts, None).unwrap());
    let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], &ranges, 0.3);
    for dtype in [DType::F32, DType::BF16] {
        let x = inputs(1, (t, t), (4, 2), 20).map(|x| x.to_dtype(dtype).unwrap());
        let dy = random((1, t, 4, 20), 5, 1.0).to_dtype(dtype).unwrap();
        let edit = |x: &Tensor| {
            let head = (x.narrow(1, 0, first).unwrap() * 3.7).unwrap();
            Tensor::cat(&[&head, &x.narrow(1, first, t - first).unwrap()], 1).unwrap()
        };
        let (y, grads) = run(&op, &x, &dy);
        let (edited, edited_grads) = run(&op, &[edit(&x[0]), edit(&x[1]), edit(&x[2])], &edit(&dy));
        let second = |x: &Tensor| bits(&x.narrow(1, first, t - first).unwrap());
        assert_eq!(second(&y), second(&edited));
        assert_ne!(bits(&y), bits(&edited));
        for (a, b) in grads.iter().zip(&edited_grads) {
            assert_eq!(second(a), second(b));
        }
    }
}

#[test]
fn a_packed_document_is_the_document_alone() {
    let (t, first) = (90, 37);
    let starts: Vec<u32> = (0..t).map(|i| if i < first { 0 } else { first as u32 }).collect();
    let x = inputs(1, (t, t), (2, 1), 20);
    let ranges = Arc::new(KeyRanges::causal_documents(1, t, &starts, None).unwrap());
    let packed = attention(&x[0], &x[1], &x[2], &ranges, 0.3).unwrap();
    let alone = x.each_ref().map(|x| x.narrow(1, first, t - first).unwrap());
    let ranges = Arc::new(KeyRanges::causal(1, t - first, t - first).unwrap());
    let alone = attention(&alone[0], &alone[1], &alone[2], &ranges, 0.3).unwrap();
    assert_close("second document", &packed.narrow(1, first, t - first).unwrap(), &alone, 2e-6);
}

#[test]
fn decoding_token_by_token_is_the_whole_pass() {
    let (b, t, d) = (2, 70, 20);
    let x = inputs(b, (t, t), (4, 2), d);
    let whole = attention(&x[0], &x[1], &x[2], &Arc::new(KeyRanges::causal(b, t, t).unwrap()), 0.3).unwrap();
    // A cache with room for more than is held: views with gaps between the rows of the batch.
    let [k, v] = [&x[1], &x[2]].map(|x| x.pad_with_zeros(1, 0, 30).unwrap());
    for at in 0..t {
        let (q, k, v) =
            (x[0].narrow(1, at, 1).unwrap(), k.narrow(1, 0, at + 1).unwrap(), v.narrow(1, 0, at + 1).unwrap());
        let y = attention(&q, &k, &v, &Arc::new(KeyRanges::causal(b, 1, at + 1).unwrap()), 0.3).unwrap();
        assert_close(&format!("token {at}"), &y, &whole.narrow(1, at, 1).unwrap(), 2e-6);
    }
}

#[test]
fn gradients_reach_tracked_operands_only() {
    let [q, k, v] = inputs(1, (9, 9), (1, 1), 8);
    let ranges = Arc::new(KeyRanges::causal(1, 9, 9).unwrap());
    let k = Var::from_tensor(&k).unwrap();
    let y = attention(&q, k.as_tensor(), &v, &ranges, 0.3).unwrap();
    let grads = backward_from(&y, &q).unwrap();
    assert!(grads.get(&k).is_some() && grads.get(&q).is_none() && grads.get(&v).is_none());
    assert!(!attention(&q, &v, &v, &ranges, 0.3).unwrap().track_op());
}

#[test]
fn extreme_logits_and_nan() {
    let (t, d) = (40, 16);
    let [q, k, v] = inputs(1, (t, t), (1, 1), d);
    let ranges = Arc::new(KeyRanges::causal(1, t, t).unwrap());
    let (q, k) = ((q * 1e3).unwrap(), (k * 1e2).unwrap());
    let op = |x: &[Tensor]| attention(&x[0], &x[1], &x[2], &ranges, 0.25);
    let (y, grads) = run(&op, &[q.clone(), k.clone(), v.clone()], &random((1, t, 1, d), 5, 1.0));
    assert!([&y, &grads[0], &grads[1], &grads[2]].iter().all(|x| values(x).iter().all(|v| v.is_finite())));
    assert_close("1e5 logits", &y, &reference::attention(&q, &k, &v, &ranges, 0.25).unwrap(), 0.05);
    let nan = (v.narrow(1, 3, 1).unwrap() * f64::NAN).unwrap();
    let v = Tensor::cat(&[&v.narrow(1, 0, 3).unwrap(), &nan, &v.narrow(1, 4, t - 4).unwrap()], 1).unwrap();
    let y = values(&op(&[(q * 1e-3).unwrap(), (k * 1e-2).unwrap(), v]).unwrap());
    assert!(y[..3 * d].iter().all(|v| v.is_finite()) && y[3 * d..].iter().all(|v| v.is_nan()));
}

#[test]
fn ranges_are_what_they_say() {
    let causal = KeyRanges::causal(2, 2, 5).unwrap();
    assert_eq!((causal.lo(), causal.hi()), (&[0; 4][..], &[4, 5, 4, 5][..]));
    assert_eq!((causal.dims(), causal.pairs()), ((2, 2, 5), 18));
    let documents = KeyRanges::causal_documents(1, 5, &[0, 0, 2, 2, 2], Some(2)).unwrap();
    assert_eq!((documents.lo(), documents.hi()), (&[0, 0, 2, 2, 3][..], &[1, 2, 3, 4, 5][..]));
    let prefix = KeyRanges::prefix_documents(1, 5, &[0, 0, 2, 2, 2], &[0, 0, 4, 4, 4]).unwrap();
    assert_eq!((prefix.lo(), prefix.hi()), (&[0, 0, 2, 2, 2][..], &[1, 2, 4, 4, 5][..]));
    let window = KeyRanges::causal(1, 1, 9).unwrap().with_window(4).unwrap();
    assert_eq!((window.lo(), window.hi()), (&[5][..], &[9][..]));
    assert_eq!(KeyRanges::bidirectional(2, 2, Some(&[1, 2])).unwrap().hi(), [1, 1, 2, 2]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let text = |r: candle_core::Result<KeyRanges>| r.unwrap_err().to_string();
    assert!(text(KeyRanges::causal(1, 6, 5)).contains("6 queries"));
    assert!(text(KeyRanges::causal(0, 1, 1)).contains("at least 1"));
    assert!(text(KeyRanges::causal(usize::MAX, 2, 5)).contains("too large"));
    assert!(text(KeyRanges::bidirectional(usize::MAX / 2, 3, None)).contains("too large"));
    assert!(text(KeyRanges::causal_documents(1, 3, &[0, 2, 0], None)).contains("token 1"));
    assert!(text(KeyRanges::causal_documents(1, 3, &[0], None)).contains("1 values"));
    assert!(text(KeyRanges::causal_documents(1, 3, &[0; 3], Some(0))).contains("window"));
    assert!(text(KeyRanges::prefix_documents(1, 3, &[0; 3], &[3])).contains("1 values"));
    assert!(text(KeyRanges::prefix_documents(1, 3, &[0; 3], &[4, 0, 0])).contains("token 0"));
    assert!(text(KeyRanges::prefix_documents(1, 3, &[0, 0, 2], &[2, 3, 2])).contains("token 1"));
    assert!(text(KeyRanges::bidirectional(2, 3, Some(&[3]))).contains("1 lengths"));
    assert!(text(KeyRanges::bidirectional(1, 3, Some(&[4]))).contains("[0, 4)"));
    assert!(text(KeyRanges::new(1, 1, 4, vec![3], vec![2])).contains("[3, 2)"));

    let [q, k, v] = inputs(1, (9, 9), (4, 2), 8);
    let ranges = Arc::new(KeyRanges::causal(1, 9, 9).unwrap());
    let error = |q: &Tensor, k: &Tensor, v: &Tensor| attention(q, k, v, &ranges, 1.0).unwrap_err().to_string();
    assert!(error(&q, &k, &v.narrow(1, 0, 8).unwrap()).contains("[b, tk, g, d]"));
    assert!(error(&q.narrow(2, 0, 3).unwrap(), &k, &v).contains("dividing h"));
    assert!(error(&q.narrow(1, 0, 8).unwrap(), &k, &v).contains("ranges"));
    assert!(error(&q, &k.to_dtype(DType::BF16).unwrap(), &v).contains("BF16"));
    let zeros = Tensor::zeros((1, 9, 2, 0), DType::F32, &Device::Cpu).unwrap();
    assert!(!error(&zeros, &zeros, &zeros).is_empty());
}
