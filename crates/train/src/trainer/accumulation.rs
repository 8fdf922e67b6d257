//! One batch of 8 rows against 8 rows one after another, over rows that teach very different numbers of tokens.

use std::path::Path;

use serde_json::{Value, json};
use tallow_data::{ChatOptions, LoaderOptions, TokenDataset, TooLong, Utf8Chat, prepare_chat};
use tallow_models::parse_config;

use super::*;
use crate::checkpoint::Artifact;
use crate::config::RunConfig;
use crate::resolve::Facts;

/// A parameter's name and its numbers.
type Named = (String, Vec<f32>);
type Anyhow<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const ROWS: usize = 8;
const CONTEXT: usize = 64;
/// Of the largest value of each parameter (or of its gradient). f32 has a relative step of 1.2e-7.
const BOUND: f32 = 2e-6;

fn llama() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48,
           "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "max_position_embeddings": 64, "initializer_range": 0.2})
}

fn gpt2() -> Value {
    json!({"architectures": ["GPT2LMHeadModel"], "vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 2,
           "n_positions": 64, "initializer_range": 0.2})
}

/// The same model, whose prompts are seen both ways.
fn prefix_lm(mut model: Value) -> Value {
    model["prefix_lm"] = json!(true);
    model
}

/// Eight examples, one a row: 1, 2, 3, 7, 20, 40 and 55 learnt tokens, and one with a weight for each answer.
fn examples(dir: &Path) -> Anyhow<TokenDataset> {
    let completion = |prompt: usize, learnt: usize| {
        let text = |from: usize, len: usize| (0..len).map(|i| char::from(b'a' + ((from + i * 7) % 26) as u8)).collect();
        let (prompt, completion): (String, String) = (text(learnt, prompt), text(3 * learnt + 1, learnt - 1));
        json!({ "prompt": prompt, "completion": completion })
    };
    let turn = |role: &str, content: &str, weight: Option<f64>| match weight {
        Some(weight) => json!({ "role": role, "content": content, "weight": weight }),
        None => json!({ "role": role, "content": content }),
    };
    let weighted = json!({ "messages": [turn("user", "Who?", None), turn("assistant", "A fox.", Some(0.25)),
                                        turn("user", "And?", None), turn("assistant", "Two.", Some(3.0))] });
    // The first one is cut behind its only learnt token.
    let mut records = vec![completion(CONTEXT - 1, 9)];
    records.extend([2, 3, 7, 20, 40, 55].map(|learnt| completion(8, learnt)));
    let files = ["completions.jsonl", "weighted.jsonl"].map(|name| dir.join(name));
    for (file, records) in files.iter().zip([records, vec![weighted]]) {
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(file, lines)?;
    }
    let options =
        ChatOptions { max_tokens: Some(CONTEXT + 1), too_long: TooLong::TruncateEnd, ..ChatOptions::default() };
    prepare_chat(&files, &Utf8Chat, &dir.join("tokens"), &options, &mut |_| {})?;
    Ok(TokenDataset::open(&[dir.join("tokens/train")])?)
}

fn run_config(adapter: bool, micro_batch_size: usize) -> Anyhow<RunConfig> {
    let mut text = format!(
        "output = 'out'\n[model]\nfrom = 'base'\n[data]\ntrain = ['x']\ncontext_length = {CONTEXT}\npacking = false\n\
         [objective]\nkind = 'sft'\nz_loss = 1e-3\nlabel_smoothing = 0.1\n\
         [train]\nsteps = 1\nbatch_size = {ROWS}\nmicro_batch_size = {micro_batch_size}\n"
    );
    // Far above what rounding leaves of a gradient: 1e-8 would make a whole step of either sign from it.
    text += "[optimizer]\neps = 0.1\nlr = 1e-2\n[schedule]\nwarmup_steps = 0\n";
    if adapter {
        text += "[adapter]\nrank = 4\ntargets = 'all-linear'\ndropout = 0.0\n";
    }
    Ok(RunConfig::parse(&text, Path::new("run.toml"), &[])?)
}

fn trainer(
    model: &Value,
    adapter: bool,
    micro_batch_size: usize,
    dataset: &TokenDataset,
    dir: &Path,
) -> Anyhow<Trainer> {
    let (config, fill) = (parse_config(model)?.config, RandomInit { seed: 7 });
    let run = run_config(adapter, micro_batch_size)?;
    let (_, base) = plan_params(|b| config.build(b))?;
    let plan =
        run.adapter.as_ref().map(|section| Ok::<_, Error>(AdapterPlan::new(&section.lora()?, &base)?)).transpose()?;
    let specs = match &plan {
        Some(plan) => plan_params(|b| plan.build(b, |b| config.build(b)))?.1,
        None => base.clone(),
    };
    let options = LoaderOptions { context_length: CONTEXT, packing: false, seed: 1, ..LoaderOptions::default() };
    let loader = Loader::new(dataset.clone(), options)?;
    let facts =
        Facts { rows_per_epoch: loader.rows_per_epoch(), memory: None, peak_flops: None, earlier_micro_batch: None };
    let resolved = Resolved::new(run, config.as_ref(), &specs, plan.as_ref(), None, facts)?;
    let artifact = match &plan {
        None => Artifact::Model(parse_config(model)?.config),
        Some(plan) => {
            Artifact::Adapter { plan: Box::new(plan.clone()), base, base_model: "base".into(), notes: json!({}) }
        }
    };
    let checkpoints = Checkpoints::new(dir.join(format!("{micro_batch_size}")), 1, artifact, None);
    let parts = ModelParts { config: config.as_ref(), fill: &fill, adapter: plan.as_ref(), pack: None };
    let trainer = Trainer::new(resolved, parts, loader, None, checkpoints)?;
    // A new adapter's second matrices are zero, and with them the gradients of the first ones.
    for (n, param) in trainer.store.trained().filter(|p| p.spec.name.ends_with(".lora_B.weight")).enumerate() {
        let value = trainer.store.value(param)?;
        let mut numbers = vec![0.0; value.elem_count()];
        tallow_kernels::rng::fill_uniform(&mut numbers, 11, n as u64, -0.03, 0.03);
        let numbers = candle_core::Tensor::from_vec(numbers, value.elem_count(), &Device::Cpu)?;
        value.flatten_all()?.slice_set(&numbers, 0, 0)?;
    }
    Ok(trainer)
}

/// By parameter: its gradient, or its values.
fn each(trainer: &Trainer, gradient: bool) -> Anyhow<Vec<Named>> {
    let of = |param: &tallow_nn::Param| {
        let tensor = match gradient {
            true => trainer.store.grad(param)?.ok_or("a trained parameter without a gradient")?,
            false => trainer.store.value(param)?,
        };
        Ok((param.spec.name.clone(), tensor.flatten_all()?.to_vec1()?))
    };
    trainer.store.trained().map(of).collect()
}

fn largest(values: impl Iterator<Item = f32>) -> f32 {
    values.fold(0.0, |most, x| most.max(x.abs()))
}

/// The largest difference of a parameter, relative to its largest value.
fn apart(what: &str, a: &[Named], b: &[Named]) -> f32 {
    assert_eq!(a.len(), b.len());
    let of = |((name, x), (other, y)): (&Named, &Named)| {
        assert_eq!((name, x.len()), (other, y.len()));
        let size = largest(x.iter().copied());
        assert!(size > 1e-5, "{what} {name}: nothing to compare, {size}");
        let apart = largest(x.iter().zip(y).map(|(x, y)| x - y)) / size;
        assert!(apart <= BOUND, "{what} {name}: {apart:e} of its largest value");
        apart
    };
    largest(a.iter().zip(b).map(of))
}

struct Quiet;

impl Observer for Quiet {
    fn event(&mut self, _: Event) -> Result<()> {
        Ok(())
    }
}

#[test]
fn eight_rows_at_once_are_eight_rows_one_after_another() -> Anyhow<()> {
    let dir = tempfile::tempdir()?;
    let dataset = examples(dir.path())?;
    for (name, model, adapter) in [
        ("llama", llama(), false),
        ("llama, LoRA", llama(), true),
        ("llama, prefix", prefix_lm(llama()), false),
        ("gpt2", gpt2(), false),
        ("gpt2, LoRA", gpt2(), true),
    ] {
        let dir = tempfile::tempdir()?;
        let mut whole = trainer(&model, adapter, ROWS, &dataset, dir.path())?;
        let batch = whole.loader.batch(0, ROWS)?;
        let of_rows = batch.targets.chunks(CONTEXT).map(|row| row.iter().filter(|&&id| id != u32::MAX).count());
        let mut learnt: Vec<usize> = of_rows.collect();
        learnt.sort_unstable();
        assert_eq!(learnt, [1, 2, 3, 7, 12, 20, 40, 55]);
        assert_eq!(batch.weight_sum, 128.0 + 7.0 * 0.25 + 5.0 * 3.0, "the weights of messages count");

        let at_once = whole.forward_backward(&batch)?;
        let (gradients, values) = (each(&whole, true)?, each(&whole, false)?);
        whole.forget_gradient()?;
        whole.train(&mut Quiet, &|| false)?;
        let after = each(&whole, false)?;
        let moved = largest(values.iter().zip(&after).flat_map(|(a, b)| a.1.iter().zip(&b.1).map(|(a, b)| a - b)));
        assert!(moved > 1e-4, "{name}: the step moved nothing: {moved}");
        for rows in [1, 2] {
            let mut parts = trainer(&model, adapter, rows, &dataset, dir.path())?;
            let sums = parts.forward_backward(&batch)?;
            assert_eq!((sums.targets, sums.weight), (at_once.targets, at_once.weight));
            let off = (sums.mean() / at_once.mean() - 1.0).abs();
            assert!(off < 1e-7, "{name}: loss {} and {}", at_once.mean(), sums.mean());
            let worst = apart(&format!("{name}, {rows} at once: gradient of"), &gradients, &each(&parts, true)?);
            assert_eq!(values, each(&parts, false)?, "they began elsewhere");
            parts.forget_gradient()?;
            parts.train(&mut Quiet, &|| false)?;
            let stepped = apart(&format!("{name}, {rows} at once: value of"), &after, &each(&parts, false)?);
            println!("{name}, {rows} at once: loss {off:.1e}, gradients {worst:.1e}, after a step {stepped:.1e}");
        }
        // What dividing each row by its own targets would be is something else.
        let alone = (0..ROWS as u64).map(|row| whole.loader.batch(row, 1).map(|b| b.weight_sum));
        let alone: Vec<f64> = alone.collect::<tallow_data::Result<_>>()?;
        assert!(alone.iter().any(|sum| (sum * ROWS as f64 / batch.weight_sum - 1.0).abs() > 0.5));
    }
    Ok(())
}
