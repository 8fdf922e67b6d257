//! The tape: the same gradients as candle's, nothing cut in silence, no more kept than is read.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use candle_core::{DType, Result, Tensor};
use tallow_ops::{
    CrossEntropyOptions, RopeLayout, RopeTable, Weight, composed_of, constant, linear, linear_cross_entropy, narrow,
    no_grad, record, reshape, residual_add, rms_norm, rope, swiglu,
};
use tallow_testkit::{assert_close, bits, random, run, run_recorded, slot_sum, trainable, values};

/// A feed-forward block with a residual stream, every tensor of which is used more than once somewhere.
fn block(x: &[Tensor]) -> Result<Tensor> {
    let y = rms_norm(&x[0], &x[1].clone().into(), 1e-5)?;
    let (gate, up) = (linear(&y, &x[2].clone().into(), None)?, linear(&y, &x[3].clone().into(), None)?);
    let h = swiglu(&gate, &up)?;
    let square = swiglu(&h, &h)?;
    let x1 = residual_add(&x[0], &linear(&square, &x[4].clone().into(), None)?)?;
    residual_add(&x1, &x1)
}

fn block_inputs(dtype: DType) -> Vec<Tensor> {
    let shapes: [(&[usize], f32); 5] =
        [(&[2, 7, 12], 1.0), (&[12], 1.0), (&[20, 12], 0.3), (&[20, 12], 0.3), (&[12, 20], 0.2)];
    let make = |(i, (shape, std)): (usize, (&[usize], f32))| random(shape, i as u64, std).to_dtype(dtype).unwrap();
    shapes.into_iter().enumerate().map(make).collect()
}

#[test]
fn both_tapes_give_the_same_gradients() {
    let inputs = block_inputs(DType::F32);
    let dy = random((2, 7, 12), 9, 1.0);
    let (y, grads) = run_recorded(&block, &inputs, &dy);
    let (want_y, want) = run(&block, &inputs, &dy);
    assert_eq!(bits(&y), bits(&want_y));
    for (i, (g, w)) in grads.iter().zip(&want).enumerate() {
        // The order of additions differs.
        assert_close(&format!("gradient {i}"), g, w, 1e-6);
    }
    let inputs = block_inputs(DType::BF16);
    let (_, rough) = run_recorded(&block, &inputs, &dy);
    for (i, (g, w)) in rough.iter().zip(&want).enumerate() {
        assert_close(&format!("bf16 gradient {i}"), g, w, 0.1);
    }
}

#[test]
fn trained_weights_get_their_sums_and_frozen_ones_nothing() {
    let [x, w] = [random((5, 6), 1, 1.0), random((4, 6), 2, 1.0)];
    let dy = random((5, 4), 3, 1.0);
    let (weight, bucket) = trainable(&w);
    for times in 1..=2 {
        let (y, tape) = record(&[], || linear(&constant(&x)?, &weight, None)).unwrap();
        assert!(tape.holds(&y) && tape.backward(y.clone(), dy.clone()).unwrap().is_empty());
        let want = (dy.t().unwrap().matmul(&x).unwrap() * f64::from(times)).unwrap();
        assert_close("slot", &slot_sum(&weight, &bucket), &want, 1e-6);
    }
    let before = values(&bucket);
    let (y, tape) = record(&[&x], || linear(&x, &Weight::frozen(w.clone()), None)).unwrap();
    let dx = tape.backward(y.clone(), dy.clone()).unwrap().pop().unwrap();
    assert_close("dx", &dx, &dy.matmul(&w).unwrap(), 1e-6);
    let (y, tape) = record(&[&x], || no_grad(|| linear(&x, &weight, None))).unwrap();
    assert!(!tape.holds(&y));
    assert!(tape.backward(y.clone(), dy).unwrap_err().to_string().contains("nothing that was recorded"));
    assert_eq!(values(&bucket), before);
}

#[test]
fn views_pass_gradients_to_their_places() {
    let x = random((2, 3, 12), 1, 1.0);
    let parts = |x: &Tensor| -> Result<Tensor> {
        let x = reshape(x, (2, 3, 6, 2))?;
        let [a, b, c] = [0, 2, 4].map(|start| narrow(&x, 2, start, 2));
        let (a, b, c) = (a?, b?, c?);
        // Of three views one is used twice.
        let sum = composed_of("sum", &[&a, &b, &a], |x| ((&x[0] + (&x[1] * 2.0)?)? + &x[2])?.contiguous())?;
        let rest = composed_of("rest", &[&c], |x| (&x[0] * 5.0)?.contiguous())?;
        reshape(&residual_add(&sum, &rest)?, ((), 2))
    };
    let (y, tape) = record(&[&x], || parts(&x)).unwrap();
    let ones = y.ones_like().unwrap();
    let dx = tape.backward(y.clone(), ones).unwrap().pop().unwrap();
    assert_eq!(dx.dims(), x.dims());
    for row in values(&dx).chunks(12) {
        assert_eq!(row, [2., 2., 2., 2., 2., 2., 2., 2., 5., 5., 5., 5.]);
    }
    // Outside of a recording they are candle's own.
    assert_eq!(values(&parts(&x).unwrap()), values(&y));
}

#[test]
fn a_composition_of_candle_ops_is_one_op() {
    let (x, w) = (random((4, 3), 1, 1.0), random((3, 3), 2, 1.0));
    let (weight, bucket) = trainable(&w);
    let made = |x: &Tensor| composed_of("tanh", &[x], |x| linear(&x[0], &weight, None)?.tanh());
    let (y, tape) = record(&[&x], || made(&x)).unwrap();
    let dy = random((4, 3), 3, 1.0);
    let dx = tape.backward(y.clone(), dy.clone()).unwrap().pop().unwrap();
    let dz = (&dy * (1.0 - y.sqr().unwrap()).unwrap()).unwrap();
    assert_close("dx", &dx, &dz.matmul(&w).unwrap(), 1e-6);
    assert_close("dw", &slot_sum(&weight, &bucket), &dz.t().unwrap().matmul(&x).unwrap(), 1e-6);
}

#[test]
fn the_loss_is_an_op_like_any_other_but_starts_from_one() {
    let (x, w) = (random((5, 6), 1, 1.0), random((9, 6), 2, 1.0));
    let targets = Tensor::new(&[0u32, 3, 8, 1, 2], x.device()).unwrap();
    let (weight, bucket) = trainable(&w);
    let loss = |x: &Tensor| linear_cross_entropy(x, &weight, &targets, &CrossEntropyOptions::default());
    let (made, tape) = record(&[&x], || loss(&x)).unwrap();
    let one = made.loss.ones_like().unwrap();
    let dx = tape.backward(made.loss, one).unwrap().pop().unwrap();
    let recorded = |x: &[Tensor]| {
        linear_cross_entropy(&x[0], &x[1].clone().into(), &targets, &CrossEntropyOptions::default())
            .map(|made| made.loss)
    };
    let (_, want) = run(&recorded, &[x.clone(), w.clone()], &Tensor::new(1f32, x.device()).unwrap());
    assert_eq!(bits(&dx), bits(&want[0]));
    assert_close("dw", &slot_sum(&weight, &bucket), &want[1], 1e-6);
    let (made, tape) = record(&[&x], || loss(&x)).unwrap();
    let two = (made.loss.ones_like().unwrap() * 2.0).unwrap();
    let (stopped, aside) = record(&[&x], || {
        constant(&loss(&x)?.loss)?;
        linear(&x, &Weight::frozen(w.clone()), None)
    })
    .unwrap();
    let error = aside.backward(stopped.clone(), stopped).unwrap_err().to_string();
    assert!(error.contains("weights have theirs already"), "{error}");
    assert!(tape.backward(made.loss, two).unwrap_err().to_string().contains("CrossEntropyOptions::scale"));
}

#[test]
fn what_cuts_the_gradient_is_an_error() {
    let (x, w) = (random((4, 6), 1, 1.0), random((6, 6), 2, 1.0));
    let w = Weight::frozen(w);
    let cut = |f: &dyn Fn() -> Result<Tensor>| match record(&[&x], f) {
        Ok((y, tape)) => tape.backward(y.clone(), y.detach()).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    // A candle op in the way, met by an op of ours.
    let error = cut(&|| linear(&(linear(&x, &w, None)? * 2.0)?, &w, None));
    assert!(error.contains("linear: an operand [4, 6] is not on the tape") && error.contains("composed_of"), "{error}");
    // On one of two ways.
    let error = cut(&|| residual_add(&linear(&x, &w, None)?, &(&x * 2.0)?));
    assert!(error.contains("residual-add: an operand [4, 6]"), "{error}");
    // At the end.
    let error = cut(&|| linear(&x, &w, None)? * 2.0);
    assert!(error.contains("nothing that was recorded"), "{error}");
    // A result that something unrecorded alone has used.
    let error = cut(&|| {
        let y = linear(&x, &w, None)?;
        let z = linear(&x, &w, None)?;
        assert!(z.sum_all()?.to_scalar::<f32>()?.is_finite());
        Ok(y)
    });
    assert!(error.contains("result of linear") && error.contains("used by nothing"), "{error}");
    // A candle op on a recorded weight.
    let v = random((6, 6), 3, 1.0);
    let two = |v: &Tensor| linear(&linear(&x, &v.clone().into(), None)?, &(v * 2.0)?.into(), None);
    let error = record(&[&x, &v], || two(&v)).err().unwrap().to_string();
    assert!(error.contains("not on the tape"), "{error}");
    // In what composes candle ops.
    let error = cut(&|| residual_add(&x, &composed_of("half", &[&x], |x| &x[0].detach() + &random((4, 6), 6, 1.0))?));
    assert!(error.contains("half: the ops in it cut the gradient"), "{error}");
    let error = cut(&|| residual_add(&x, &composed_of("half", &[&(&x * 2.0)?], |x| &x[0] + 1.0)?));
    assert!(error.contains("half: an operand [4, 6] is not on the tape"), "{error}");
    let captured = candle_core::Var::from_tensor(&x).unwrap();
    let error = cut(&|| composed_of("half", &[&x], |x| &x[0] * captured.as_tensor()));
    assert!(error.contains("half: a variable in it is none of its inputs"), "{error}");
    let error = cut(&|| {
        let y = linear(&x, &w, None)?;
        composed_of("half", &[&x, &y], |x| &x[0].detach() + &x[1])
    });
    assert!(error.contains("half: an op in it cuts the gradient of operand 0"), "{error}");
    // Where only weights are trained.
    let (weight, _) = trainable(&random((6, 6), 4, 1.0));
    let error = record(&[], || {
        let c = constant(&x)?;
        let y = linear(&c, &weight, None)?;
        residual_add(&y, &(&y * 2.0)?)
    });
    assert!(error.err().unwrap().to_string().contains("not on the tape"));
    // An input that nothing has used.
    let (other, _) = (random((4, 6), 5, 1.0), ());
    let (y, tape) = record(&[&x, &other], || linear(&x, &w, None)).unwrap();
    assert!(tape.backward(y.clone(), y.detach()).unwrap_err().to_string().contains("input 1 got no gradient"));
    // Both tapes at once.
    let var = candle_core::Var::from_tensor(&x).unwrap();
    let error = record(&[], || linear(var.as_tensor(), &w, None)).err().unwrap().to_string();
    assert!(error.contains("candle's tape"), "{error}");
    // Shapes.
    let (y, tape) = record(&[&x], || linear(&x, &w, None)).unwrap();
    assert!(tape.backward(y.clone(), random((4, 5), 1, 1.0)).is_err());
}

#[test]
fn an_error_or_a_panic_within_leaves_nothing_recording() {
    let (x, w) = (random((4, 6), 1, 1.0), random((6, 6), 2, 1.0));
    let (weight, _) = trainable(&w);
    assert!(record(&[&x], || linear(&x, &Weight::frozen(random((3, 5), 1, 1.0)), None)).is_err());
    assert!(
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            record(&[&x], || -> Result<Tensor> { panic!("within") })
        }))
        .is_err()
    );
    // On candle's tape again.
    assert!(linear(&x, &weight, None).unwrap().track_op());
    // A recording within a recording is on its own.
    let (inner, outer) = record(&[&x], || -> Result<_> {
        let y = linear(&x, &weight, None)?;
        let inner = record(&[&y], || linear(&y, &weight, None))?;
        Ok((linear(&y, &weight, None)?, inner))
    })
    .unwrap();
    let (y, (z, tape)) = inner;
    assert!(outer.holds(&y) && !outer.holds(&z) && tape.holds(&z) && !tape.holds(&y));
}

#[test]
fn constants_stop_a_gradient_and_frozen_parts_are_constants() {
    let (x, w) = (random((4, 6), 1, 1.0), random((6, 6), 2, 1.0));
    let (weight, bucket) = trainable(&w);
    let frozen = Weight::frozen(w.clone());
    let (y, tape) = record(&[&x], || {
        let stopped = constant(&linear(&x, &frozen, None)?)?;
        let aside = no_grad(|| linear(&x, &weight, None))?;
        residual_add(&residual_add(&x, &stopped)?, &aside)
    })
    .unwrap();
    let dy = random((4, 6), 3, 1.0);
    assert_eq!(bits(&tape.backward(y, dy.clone()).unwrap()[0]), bits(&dy));
    let (y, tape) = record(&[&x], || {
        let stopped = constant(&x)?;
        let aside = linear(&stopped, &frozen, None)?;
        // Read without gradients alone.
        let read = linear(&x, &frozen, None)?;
        let read = no_grad(|| narrow(&reshape(&read, (2, 12))?, 1, 0, 12))?;
        assert!(no_grad(|| linear(&reshape(&read, (4, 6))?, &weight, None))?.elem_count() == 24);
        residual_add(&x, &residual_add(&aside, &no_grad(|| linear(&x, &weight, None))?)?)
    })
    .unwrap();
    assert_eq!(bits(&tape.backward(y, dy.clone()).unwrap()[0]), bits(&dy));
    assert!(values(&slot_sum(&weight, &bucket)).iter().all(|v| *v == 0.0));
    let (y, tape) = record(&[], || linear(&constant(&x)?, &frozen, None)).unwrap();
    assert!(tape.is_empty() && !tape.holds(&y));
    // A frozen weight made of a recorded tensor stays frozen.
    let (y, tape) = record(&[&x], || linear(&x, &Weight::frozen(narrow(&x, 0, 0, 3)?), None)).unwrap();
    assert!(tape.backward(y, random((4, 3), 3, 1.0)).unwrap_err().to_string().contains("used by nothing"));
}

/// A fused projection whose parts are turned: views with gaps through an op that needs none.
#[test]
fn views_with_gaps_are_the_same_on_the_tape() {
    let x = random((1, 5, 6, 4), 1, 1.0);
    let table = std::sync::Arc::new(RopeTable::new(&[1.0, 0.1], 5, 1.0));
    let positions = std::sync::Arc::new((0..5).collect::<Vec<u32>>());
    let turn = |x: &Tensor| rope(x, &table, &positions, RopeLayout::Half);
    let dy = random((1, 5, 2, 4), 2, 1.0);
    let (y, tape) = record(&[&x], || turn(&narrow(&x, 2, 2, 2)?)).unwrap();
    let dx = tape.backward(y, dy.clone()).unwrap().pop().unwrap();
    let (_, want) = run(&|x| turn(&x[0].narrow(2, 2, 2)?), std::slice::from_ref(&x), &dy);
    assert_eq!(values(&dx), values(&want[0]));
}
