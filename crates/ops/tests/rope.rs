//! `rope` against the composed reference and against what rotation is.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tallow_ops::{RopeLayout, RopeTable, reference, rope};
use tallow_testkit::*;

fn table(half: usize, max_positions: usize) -> Arc<RopeTable> {
    let inv_freq: Vec<f32> = (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect();
    Arc::new(RopeTable::new(&inv_freq, max_positions, 1.0))
}

#[test]
fn matches_the_reference_whole_and_partial() {
    for (b, t, h, d, half) in
        [(1, 1, 1, 8, 4), (2, 3, 4, 20, 10), (2, 17, 3, 64, 32), (1, 33, 2, 80, 20), (1, 129, 6, 64, 32)]
    {
        let table = table(half, 200);
        let positions = Arc::new((0..b * t).map(|i| (i * 37 % 200) as u32).collect::<Vec<_>>());
        for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
            compare(
                &format!("rope {layout:?} b {b} t {t} h {h} d {d} rotated {}", 2 * half),
                &[random((b, t, h, d), 1, 1.0)],
                &|x| rope(&x[0], &table, &positions, layout),
                &|x| reference::rope(&x[0], &table, &positions, layout),
                &ROPE,
            );
        }
    }
}

#[test]
fn finite_differences_agree() {
    let (table, positions) = (table(4, 9), Arc::new(vec![3, 8, 0, 5]));
    let x = [random((2, 2, 3, 10), 1, 1.0)];
    finite_differences("rope", &x, &|x| rope(&x[0], &table, &positions, RopeLayout::Half), 1e-2, 1e-3);
}

#[test]
fn the_first_pair_turns_by_the_position() {
    let table = table(1, 100);
    let x = Tensor::new(&[[[[1f32, 0.0]], [[1.0, 0.0]]]], &Device::Cpu).unwrap();
    let y = values(&rope(&x, &table, &Arc::new(vec![1, 50]), RopeLayout::Half).unwrap());
    for (got, want) in y.iter().zip([1f32.cos(), 1f32.sin(), 50f32.cos(), 50f32.sin()]) {
        assert!((got - want).abs() < 1e-6);
    }
}

#[test]
fn products_depend_on_distance_alone() {
    let (table, q, k) = (table(16, 1000), random((1, 1, 1, 32), 1, 1.0), random((1, 1, 1, 32), 2, 1.0));
    let product = |i: u32, j: u32| {
        let [q, k] =
            [(&q, i), (&k, j)].map(|(x, p)| rope(x, &table, &Arc::new(vec![p]), RopeLayout::Interleaved).unwrap());
        values(&(q * k).unwrap()).iter().sum::<f32>()
    };
    assert!((product(7, 3) - product(904, 900)).abs() < 1e-3);
    assert!((product(7, 3) - product(7, 4)).abs() > 1e-3);
}

#[test]
fn attention_scaling_scales_the_rotated_channels() {
    let plain = Arc::new(RopeTable::new(&[1.0, 0.1], 10, 1.0));
    let scaled = Arc::new(RopeTable::new(&[1.0, 0.1], 10, 1.5));
    let (x, p) = (random((1, 1, 1, 6), 1, 1.0), Arc::new(vec![4]));
    let [a, b] = [plain, scaled].map(|t| values(&rope(&x, &t, &p, RopeLayout::Half).unwrap()));
    assert!(a[..4].iter().zip(&b).all(|(a, b)| (1.5 * a - b).abs() < 1e-6));
    assert_eq!(a[4..], b[4..]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (x, table) = (random((1, 3, 2, 8), 1, 1.0), table(4, 10));
    let error = |x: &Tensor, p: Vec<u32>| rope(x, &table, &Arc::new(p), RopeLayout::Half).unwrap_err().to_string();
    assert!(error(&x, vec![0, 1, 10]).contains("position 10"));
    assert!(error(&x, vec![0, 1, u32::MAX]).contains("4294967295"));
    assert!(error(&x, vec![0, 1]).contains("2 positions"));
    assert!(error(&random((1, 3, 2, 6), 1, 1.0), vec![0, 1, 2]).contains("8 channels"));
    assert!(!error(&random((3, 8), 1, 1.0), vec![0, 1, 2]).is_empty());
    assert!(error(&x.to_dtype(DType::F64).unwrap(), vec![0, 1, 2]).contains("F64"));
}
