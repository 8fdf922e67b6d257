//! `dropout`: the same mask forward and backward, a function of its key.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Var};
use tallow_ops::{DropoutKey, backward_from, dropout};
use tallow_testkit::*;

const KEY: DropoutKey = DropoutKey { seed: 1, step: 2, layer: 3, site: 4, offset: 0 };

#[test]
fn backward_draws_the_mask_of_forward() {
    for dtype in [DType::F32, DType::BF16] {
        for dims in [vec![1], vec![3, 17], vec![2, 129, 80]] {
            let x = Var::from_tensor(&random(dims.clone(), 1, 1.0).to_dtype(dtype).unwrap()).unwrap();
            let dy = random(dims, 2, 1.0).to_dtype(dtype).unwrap();
            let y = dropout(x.as_tensor(), 0.25, KEY).unwrap();
            let dx = backward_from(&y, &dy).unwrap().get(&x).unwrap().clone();
            let (x, y, dy, dx) = (values(&x), values(&y), values(&dy), values(&dx));
            for i in 0..x.len() {
                let kept = y[i] != 0.0;
                let close = |got: f32, of: f32| (got - of / 0.75).abs() <= 4e-3 * of.abs();
                assert!(if kept { close(y[i], x[i]) && close(dx[i], dy[i]) } else { dx[i] == 0.0 }, "{i}");
            }
        }
    }
}

#[test]
fn the_same_key_gives_the_same_mask_and_another_another() {
    let x = random((40, 40), 1, 1.0);
    let mask = |key| bits(&dropout(&x, 0.5, key).unwrap());
    assert_eq!(mask(KEY), mask(KEY));
    for other in [
        DropoutKey { seed: 2, ..KEY },
        DropoutKey { step: 3, ..KEY },
        DropoutKey { layer: 4, ..KEY },
        DropoutKey { site: 5, ..KEY },
        DropoutKey { offset: 4, ..KEY },
    ] {
        assert_ne!(mask(KEY), mask(other));
    }
    // A strided view sees the mask of its own order of elements; the mean stays about the same.
    assert_eq!(bits(&dropout(&with_gaps(&x), 0.5, KEY).unwrap()), mask(KEY));
    assert_eq!(bits(&dropout(&turned(&x), 0.5, KEY).unwrap()), mask(KEY));
}

#[test]
fn a_piece_with_its_offset_sees_the_mask_of_the_whole() {
    let x = random((10, 33), 1, 1.0);
    let whole = dropout(&x, 0.5, KEY).unwrap();
    let piece = dropout(&x.narrow(0, 4, 3).unwrap(), 0.5, DropoutKey { offset: 4 * 33, ..KEY }).unwrap();
    assert_eq!(bits(&piece), bits(&whole.narrow(0, 4, 3).unwrap()));
}

#[test]
fn zero_is_identity_and_the_range_is_checked() {
    let x = random((4, 4), 1, 1.0);
    assert_eq!(dropout(&x, 0.0, KEY).unwrap().id(), x.id());
    for p in [-0.1, 1.0, 1.5, f64::NAN, f64::INFINITY] {
        assert!(dropout(&x, p, KEY).unwrap_err().to_string().contains("[0, 1)"), "{p}");
    }
    assert!(dropout(&x.to_dtype(DType::F64).unwrap(), 0.5, KEY).is_err());
}
