//! A table some of whose rows are trained apart from it: against the whole table with these rows in their places.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use tallow_ops::{
    CrossEntropyOptions, FourBitKind, IGNORE_INDEX, ReplacedRows, Table, Weight, embedding, head_logits,
    linear_cross_entropy, logprobs_top, no_grad, quantize_four_bit, record,
};
use tallow_testkit::{assert_close, random, slot_sum, trainable, values};

const IDS: [u32; 3] = [60, 3, 299];

/// A frozen table, plain or in 4 bits, its rows, the same as one trained table, and the place of each row in it.
fn tables(dtype: DType, packed: bool) -> (Weight, Tensor, Tensor) {
    let (v, c) = (300, 32);
    let wide = random((v, c), 2, 1.0);
    let table = if packed {
        let four = quantize_four_bit(&values(&wide), &[v, c], FourBitKind::Nf4, 64, true).unwrap();
        Weight::packed(Arc::new(four), dtype).unwrap()
    } else {
        Weight::frozen(wide.to_dtype(dtype).unwrap())
    };
    let rows = random((IDS.len(), c), 3, 1.0).to_dtype(dtype).unwrap();
    let mut whole = table.value().unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
    for (id, row) in IDS.iter().zip(rows.to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()) {
        whole[*id as usize] = row;
    }
    let whole = Tensor::new(whole, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
    (table, rows, whole)
}

/// A trained weight in its own dtype and the f32 place of its gradient.
fn trained(value: &Tensor) -> (Weight, Tensor) {
    let wide = value.to_dtype(DType::F32).unwrap();
    let (slot, bucket) = trainable(&wide);
    (Weight::trainable(value.clone(), slot.grad().unwrap().clone()).unwrap(), bucket)
}

fn rows_of(whole: &Tensor) -> Tensor {
    whole.index_select(&Tensor::new(&IDS, &Device::Cpu).unwrap(), 0).unwrap()
}

fn cases() -> Vec<(DType, bool, f64)> {
    vec![(DType::F32, false, 3e-6), (DType::F32, true, 3e-6), (DType::BF16, false, 1e-2), (DType::BF16, true, 1e-2)]
}

#[test]
fn a_lookup_takes_them_and_gives_them_their_gradient() {
    let ids = Tensor::from_vec(vec![3u32, 5, 299, 3, 0, 298], (2, 3), &Device::Cpu).unwrap();
    for (dtype, packed, tolerance) in cases() {
        let (table, rows, whole) = tables(dtype, packed);
        let (rows, bucket) = trained(&rows);
        let replaced = ReplacedRows::new(rows.clone(), IDS).unwrap();
        let (all, all_bucket) = trained(&whole);
        let dy = random((2, 3, 32), 9, 1.0).to_dtype(dtype).unwrap();
        let (y, tape) = record(&[], || embedding(&ids, Table { weight: &table, replaced: Some(&replaced) })).unwrap();
        assert_eq!(values(&y.to_dtype(DType::F32).unwrap()), {
            let (want, tape) = record(&[], || embedding(&ids, &all)).unwrap();
            let want_values = values(&want.to_dtype(DType::F32).unwrap());
            tape.backward(want, dy.clone()).unwrap();
            want_values
        });
        tape.backward(y, dy).unwrap();
        let (got, want) = (slot_sum(&rows, &bucket), rows_of(&slot_sum(&all, &all_bucket)));
        assert_close(&format!("{dtype:?} packed {packed}"), &got, &want, tolerance);
        // Token 60 is looked up nowhere.
        assert!(values(&got)[..32].iter().all(|x| *x == 0.0) && values(&got)[32..].iter().all(|x| *x != 0.0));
    }
}

#[test]
fn a_head_takes_them_and_gives_them_their_gradient() {
    let (n, c) = (70, 32);
    let id = |i: usize| if i % 7 == 6 { IGNORE_INDEX } else { (i * 60 % 300) as u32 };
    let t = Tensor::from_vec((0..n).map(id).collect::<Vec<u32>>(), n, &Device::Cpu).unwrap();
    for (dtype, packed, tolerance) in cases() {
        for chunk in [None, Some(16)] {
            let options = CrossEntropyOptions {
                scale: 1.0 / n as f64,
                chunk,
                label_smoothing: 0.1,
                z_loss: 1e-3,
                ..Default::default()
            };
            let (table, rows, whole) = tables(dtype, packed);
            let (rows, bucket) = trained(&rows);
            let replaced = ReplacedRows::new(rows.clone(), IDS).unwrap();
            let (all, all_bucket) = trained(&whole);
            let x = random((n, c), 1, 0.5).to_dtype(dtype).unwrap();
            let parted = Table { weight: &table, replaced: Some(&replaced) };
            let run = |table: Table| {
                let (made, tape) = record(&[&x], || linear_cross_entropy(&x, table, &t, &options)).unwrap();
                let dx = tape.backward(made.loss.clone(), made.loss.ones_like().unwrap()).unwrap();
                (made.nll_sum, dx[0].to_dtype(DType::F32).unwrap())
            };
            let ((nll, dx), (want, want_dx)) = (run(parted), run((&all).into()));
            assert!((nll - want).abs() <= 1e-6 * want.abs(), "{dtype:?} {packed}: {nll} and {want}");
            let what = format!("{dtype:?} packed {packed} chunk {chunk:?}");
            assert_close(&format!("{what}: dx"), &dx, &want_dx, tolerance);
            let (got, want) = (slot_sum(&rows, &bucket), rows_of(&slot_sum(&all, &all_bucket)));
            assert_close(&format!("{what}: rows"), &got, &want, tolerance);
            let logits = no_grad(|| head_logits(&x, parted)).unwrap();
            let want = no_grad(|| head_logits(&x, &all)).unwrap();
            assert!(logits.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-4), "{what}: logits");
            let ids: Vec<u32> = (0..n as u32).collect();
            let (a, b) = (logprobs_top(&x, parted, &ids, 3).unwrap(), logprobs_top(&x, &all, &ids, 3).unwrap());
            assert!(a.iter().zip(&b).all(|(a, b)| (a.target - b.target).abs() <= 1e-4), "{what}: log-probabilities");
        }
    }
}

#[test]
fn rows_that_do_not_fit_are_errors() {
    let rows = |n: usize, c: usize| Weight::frozen(random((n, c), 1, 1.0));
    let told =
        |rows: Weight, ids: &[u32]| ReplacedRows::new(rows, ids).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(told(rows(2, 4), &[1, 1]).contains("token 1 is there twice"));
    assert!(told(rows(2, 4), &[1]).contains("for 1 tokens"));
    let table = Weight::frozen(random((5, 4), 1, 1.0));
    let ids = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    for (replaced, said) in [
        (ReplacedRows::new(rows(1, 4), [5]).unwrap(), "token 5 is not below the 5 rows"),
        (ReplacedRows::new(rows(1, 3), [0]).unwrap(), "[1, 3]"),
    ] {
        let told = embedding(&ids, Table { weight: &table, replaced: Some(&replaced) }).unwrap_err().to_string();
        assert!(told.contains(said), "{told}");
    }
}
