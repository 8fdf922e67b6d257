//! Block-wise backward against the whole graph, recomputation, accumulation, and what must not leak.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tallow_models::{Decoder, parse_config};
use tallow_nn::{ContiguousCache, DropoutContext, ForwardContext, ParamStore, RandomInit, StoreOptions, plan_params};
use tallow_ops::{CrossEntropyOptions, KeyRanges, no_grad};
use tallow_train::{ActivationCheckpointing, Error, StepOptions, audit_gradients, forward_backward};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const B: usize = 3;
const T: usize = 9;
const VOCAB: u32 = 23;

fn llama() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
           "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 32, "initializer_range": 0.3})
}

fn gpt2() -> Value {
    json!({"architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2,
           "n_positions": 32, "initializer_range": 0.3})
}

fn tied_with_dropout() -> Value {
    let mut value = llama();
    value["tie_word_embeddings"] = json!(true);
    value["residual_dropout"] = json!(0.2);
    value
}

fn build(config: &Value, dtype: DType) -> Result<(ParamStore, Box<dyn Decoder>)> {
    let config = parse_config(config)?.config;
    let (_, specs) = plan_params(|b| config.build(b))?;
    let store = ParamStore::new(specs, &StoreOptions::trainable(dtype, Device::Cpu), &RandomInit { seed: 5 })?;
    let model = store.build(|b| config.build(b))?;
    Ok((store, model))
}

fn ids(rows: usize) -> Result<(Tensor, Tensor)> {
    let row = |r: usize, shift: usize| (0..T).map(move |i| ((r * 31 + (i + shift) * 7) as u32 * 13 + 5) % VOCAB);
    let all = |shift| (0..rows).flat_map(|r| row(r, shift)).collect::<Vec<u32>>();
    let tensor = |shift| Tensor::from_vec(all(shift), (rows, T), &Device::Cpu);
    Ok((tensor(0)?, tensor(1)?))
}

fn mean_over(targets: usize) -> CrossEntropyOptions {
    CrossEntropyOptions { scale: 1.0 / targets as f64, ..Default::default() }
}

/// Every gradient, by parameter, after which the buckets are empty again.
fn take_gradients(store: &ParamStore) -> Result<Vec<(String, Vec<f32>)>> {
    let mut all = vec![];
    for param in store.params() {
        let grad = store.grad(param)?.ok_or("a trainable parameter without a slot")?;
        all.push((param.spec.name.clone(), grad.flatten_all()?.to_vec1()?));
    }
    for bucket in store.buckets() {
        tallow_ops::fill_zero(bucket.grad.as_ref().ok_or("no gradients")?)?;
    }
    Ok(all)
}

fn step(checkpointing: ActivationCheckpointing) -> StepOptions {
    StepOptions { checkpointing, ..StepOptions::default() }
}

fn gradients(config: &Value, checkpointing: ActivationCheckpointing) -> Result<Vec<(String, Vec<f32>)>> {
    let (store, model) = build(config, DType::F32)?;
    let (x, y) = ids(B)?;
    let mut cx = ForwardContext::causal(B, T)?;
    cx.dropout = Some(DropoutContext { seed: 3, step: 7 });
    forward_backward(model.as_ref(), &x, (&y).into(), &mut cx, &mean_over(B * T), step(checkpointing))?;
    take_gradients(&store)
}

fn largest_difference(a: &[(String, Vec<f32>)], b: &[(String, Vec<f32>)]) -> f32 {
    let pairs = a.iter().zip(b).flat_map(|((n, x), (m, y))| {
        assert_eq!(n, m);
        x.iter().zip(y)
    });
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
}

#[test]
fn block_wise_equals_the_whole_graph() -> Result<()> {
    for config in [llama(), gpt2()] {
        let (store, model) = build(&config, DType::F32)?;
        let (x, y) = ids(B)?;
        let mut cx = ForwardContext::causal(B, T)?;
        let mut h = model.embed(&x, &mut cx)?;
        for index in 0..model.shape().num_layers {
            h = model.block(index, &h, &mut cx)?;
        }
        model.loss(&h, (&y).into(), &mean_over(B * T), None)?.loss.backward()?;
        let whole = take_gradients(&store)?;
        let by_block = gradients(&config, ActivationCheckpointing::None)?;
        assert_eq!(largest_difference(&whole, &by_block), 0.0);
    }
    Ok(())
}

#[test]
fn recomputed_blocks_give_the_same_bits_dropout_included() -> Result<()> {
    let kept = gradients(&tied_with_dropout(), ActivationCheckpointing::None)?;
    let recomputed = gradients(&tied_with_dropout(), ActivationCheckpointing::Blocks)?;
    assert_eq!(largest_difference(&kept, &recomputed), 0.0);
    let without = gradients(
        &{
            let mut value = tied_with_dropout();
            value["residual_dropout"] = json!(0.0);
            value
        },
        ActivationCheckpointing::None,
    )?;
    assert!(largest_difference(&kept, &without) > 1e-4, "dropout has no effect");
    Ok(())
}

#[test]
fn accumulation_equals_the_whole_batch() -> Result<()> {
    let config = llama();
    let whole = gradients(&config, ActivationCheckpointing::None)?;
    let (store, model) = build(&config, DType::F32)?;
    let (x, y) = ids(B)?;
    for row in 0..B {
        let mut cx = ForwardContext::causal(1, T)?;
        let (x, y) = (x.narrow(0, row, 1)?, y.narrow(0, row, 1)?);
        let kept = ActivationCheckpointing::None;
        forward_backward(model.as_ref(), &x, (&y).into(), &mut cx, &mean_over(B * T), step(kept))?;
    }
    let difference = largest_difference(&whole, &take_gradients(&store)?);
    let largest = whole.iter().flat_map(|(_, g)| g).fold(0.0f32, |m, g| m.max(g.abs()));
    assert!(difference < 1e-5 * largest, "{difference} of {largest}");
    Ok(())
}

#[test]
fn every_parameter_gets_a_gradient_in_both_dtypes() -> Result<()> {
    for config in [llama(), gpt2(), tied_with_dropout()] {
        for dtype in [DType::F32, DType::BF16] {
            let (store, model) = build(&config, dtype)?;
            let (x, y) = ids(B)?;
            let mut cx = ForwardContext::causal(B, T)?;
            forward_backward(model.as_ref(), &x, (&y).into(), &mut cx, &mean_over(B * T), StepOptions::default())?;
            audit_gradients(&store, &|_| true)?;
        }
    }
    Ok(())
}

#[test]
fn the_audit_names_a_parameter_without_a_gradient() -> Result<()> {
    let (store, model) = build(&llama(), DType::F32)?;
    let (x, y) = ids(B)?;
    let mut cx = ForwardContext::causal(B, T)?;
    forward_backward(model.as_ref(), &x, (&y).into(), &mut cx, &mean_over(B * T), StepOptions::default())?;
    let victim = store.params().iter().find(|p| p.spec.name.contains("layers.1.mlp.up_proj")).ok_or("no such")?;
    tallow_ops::fill_zero(&store.grad(victim)?.ok_or("no slot")?.flatten_all()?)?;
    match audit_gradients(&store, &|_| true) {
        Err(Error::Audit { parameter, .. }) => assert_eq!(parameter, "model.layers.1.mlp.up_proj.weight"),
        other => panic!("expected the audit to fail, got {other:?}"),
    }
    Ok(())
}

#[test]
fn a_finite_difference_agrees_with_the_gradient() -> Result<()> {
    let grads = gradients(&llama(), ActivationCheckpointing::None)?;
    let (store, model) = build(&llama(), DType::F32)?;
    let (x, y) = ids(B)?;
    let loss = || -> Result<f64> {
        let sums = tallow_train::evaluate(model.as_ref(), &x, (&y).into(), &mut ForwardContext::causal(B, T)?)?;
        Ok(sums.mean())
    };
    for (param, (name, grad)) in store.params().iter().zip(&grads) {
        let (at, &g) = grad.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).ok_or("empty")?;
        let flat = store.value(param)?.flatten_all()?;
        let old = flat.narrow(0, at, 1)?.to_vec1::<f32>()?[0];
        let eps = 1e-2f32;
        let at_shift = |shift: f32| -> Result<f64> {
            flat.slice_set(&Tensor::new(&[old + shift], &Device::Cpu)?, 0, at)?;
            loss()
        };
        let slope = (at_shift(eps)? - at_shift(-eps)?) / f64::from(2.0 * eps);
        at_shift(0.0)?;
        let error = (slope - f64::from(g)).abs() / f64::from(g.abs()).max(1e-3);
        assert!(error < 2e-2, "{name}[{at}]: difference quotient {slope}, gradient {g}");
    }
    Ok(())
}

#[test]
fn a_packed_document_equals_itself_alone_bit_for_bit() -> Result<()> {
    for config in [llama(), gpt2()] {
        let (_, model) = build(&config, DType::F32)?;
        let (x, _) = ids(2)?;
        let (a, b) = (x.get(0)?.narrow(0, 0, 4)?, x.get(1)?.narrow(0, 0, 5)?);
        let packed = |a: &Tensor| -> Result<Tensor> {
            let row = Tensor::cat(&[a, &b], 0)?.unsqueeze(0)?;
            let doc_start: Vec<u32> = [[0; 4].as_slice(), &[4; 5]].concat();
            let positions = (0..4).chain(0..5).collect();
            let ranges = KeyRanges::causal_documents(1, 9, &doc_start, None)?;
            let mut cx = ForwardContext::whole(Arc::new(positions), Arc::new(ranges));
            Ok(model.logits(&row, &mut cx)?.narrow(1, 4, 5)?.flatten_all()?)
        };
        let edited = Tensor::new(&[1u32, 1, 2, 0], &Device::Cpu)?;
        let first = packed(&a)?.to_vec1::<f32>()?;
        assert_eq!(first, packed(&edited)?.to_vec1::<f32>()?);
        let alone = model.logits(&b.unsqueeze(0)?, &mut ForwardContext::causal(1, 5)?)?;
        let alone = alone.flatten_all()?.to_vec1::<f32>()?;
        let difference = first.iter().zip(&alone).map(|(p, q)| (p - q).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-5, "{difference}");
    }
    Ok(())
}

#[test]
fn logits_over_a_cache_equal_logits_without() -> Result<()> {
    for config in [llama(), gpt2()] {
        let (_, model) = build(&config, DType::F32)?;
        let (x, _) = ids(2)?;
        let whole = no_grad(|| model.logits(&x, &mut ForwardContext::causal(2, T)?))?;
        let mut cache = ContiguousCache::new(model.shape().num_layers, T, DType::F32, &Device::Cpu);
        for (start, len) in [(0, 4), (4, 1), (5, 1), (6, 3)] {
            let positions = (0..2).flat_map(|_| start as u32..(start + len) as u32).collect();
            let ranges = KeyRanges::causal(2, len, start + len)?;
            let mut cx = ForwardContext::whole(Arc::new(positions), Arc::new(ranges));
            cx.cache = Some(&mut cache);
            let part = no_grad(|| model.logits(&x.narrow(1, start, len)?, &mut cx))?;
            let expected = whole.narrow(1, start, len)?;
            let difference = (part - expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            assert!(difference < 1e-4, "at {start}: {difference}");
        }
    }
    Ok(())
}

#[test]
fn no_grad_leaves_no_trace() -> Result<()> {
    let (store, model) = build(&llama(), DType::F32)?;
    let (x, _) = ids(1)?;
    let logits = no_grad(|| model.logits(&x, &mut ForwardContext::causal(1, T)?))?;
    assert!(!logits.track_op());
    assert!(take_gradients(&store)?.iter().all(|(_, g)| g.iter().all(|x| *x == 0.0)));
    Ok(())
}
