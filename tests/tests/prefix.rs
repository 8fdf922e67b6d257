//! A prefix LM generates with the mask that it is trained with: over a cache as over whole rows.
#![allow(clippy::expect_used, reason = "a test")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use tallow::engine::{Error, GenerateOptions, generate};
use tallow::models::{Decoder, parse_config};
use tallow::nn::{ForwardContext, ParamStore, RandomInit, StoreOptions, plan_params};
use tallow::ops::{KeyRanges, no_grad};
use tallow::sampler::SamplerOptions;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const VOCAB: usize = 61;

fn llama() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 640, "initializer_range": 0.4})
}

fn gpt2() -> Value {
    json!({"architectures": ["GPT2LMHeadModel"], "vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4,
           "n_positions": 640, "initializer_range": 0.4})
}

fn build(mut config: Value, prefix_lm: bool) -> Result<Box<dyn Decoder>> {
    config["prefix_lm"] = json!(prefix_lm);
    let config = parse_config(&config)?.config;
    assert_eq!(config.to_hf().get("prefix_lm"), prefix_lm.then_some(&json!(true)), "written only where it is so");
    let (_, specs) = plan_params(|b| config.build(b))?;
    let store = ParamStore::new(specs, &StoreOptions::frozen(DType::F32, Device::Cpu), &RandomInit { seed: 5 })?;
    Ok(store.build(|b| config.build(b))?)
}

fn greedy(model: &dyn Decoder, prompt: &[u32]) -> std::result::Result<Vec<u32>, Error> {
    let sampler = SamplerOptions { temperature: 0.0, ..SamplerOptions::default() };
    let options = GenerateOptions { max_tokens: 12, sampler, stop_ids: vec![], adapters: None };
    Ok(generate(model, &Device::Cpu, prompt, &options, &mut |_| true)?.ids)
}

/// The likeliest token behind each of `ids`, of which the first `prefix` are the prompt, in one pass as in training.
fn likeliest(model: &dyn Decoder, ids: &[u32], prefix: usize) -> Result<Vec<u32>> {
    let t = ids.len();
    let ranges = KeyRanges::prefix_documents(1, t, &vec![0; t], &vec![prefix as u32; t])?;
    let mut cx = ForwardContext::whole(Arc::new((0..t as u32).collect()), Arc::new(ranges));
    let logits = no_grad(|| model.logits(&Tensor::from_slice(ids, (1, t), &Device::Cpu)?, &mut cx))?;
    Ok(logits.squeeze(0)?.argmax(1)?.to_vec1()?)
}

#[test]
fn generating_sees_what_training_sees() -> Result<()> {
    for (config, prompt_len) in [(llama(), 7), (llama(), 600), (gpt2(), 20)] {
        let model = build(config.clone(), true)?;
        let prompt: Vec<u32> = (0..prompt_len).map(|i| (i * i * 7 + 3) as u32 % VOCAB as u32).collect();
        let made = greedy(model.as_ref(), &prompt)?;
        let all = [prompt.as_slice(), &made].concat();
        let told = likeliest(model.as_ref(), &all, prompt_len)?;
        assert_eq!(made, &told[prompt_len - 1..all.len() - 1], "a prompt of {prompt_len}");
        // The mask matters to this model, and a causal one is as it was.
        let causal = build(config, false)?;
        let others = greedy(causal.as_ref(), &prompt)?;
        assert_ne!(made, others, "a prompt of {prompt_len}: both masks say the same");
        let all = [prompt.as_slice(), &others].concat();
        assert_eq!(others, &likeliest(causal.as_ref(), &all, 0)?[prompt_len - 1..all.len() - 1]);
    }
    Ok(())
}

#[test]
fn a_prompt_beyond_the_window_is_refused() -> Result<()> {
    let mut config = llama();
    config["architectures"] = json!(["MistralForCausalLM"]);
    config["sliding_window"] = json!(16);
    let model = build(config.clone(), true)?;
    assert_eq!(greedy(model.as_ref(), &[1; 16])?.len(), 12);
    match greedy(model.as_ref(), &[1; 17]) {
        Err(Error::PrefixWindow { given: 17, window: 16 }) => {}
        other => panic!("expected an error, got {other:?}"),
    }
    assert_eq!(greedy(build(config, false)?.as_ref(), &[1; 17])?.len(), 12);
    Ok(())
}
