//! `tallow bench`: measure this machine.

use std::time::Instant;

use candle_core::{DType, Device};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use tallow_engine::{GenerateOptions, generate};
use tallow_train::ActivationCheckpointing;
use tallow_train::bench::TrainBench;

use super::model::{DtypeArg, ModelArgs};
use crate::exit;

/// What to measure.
#[derive(Subcommand)]
pub enum BenchCommand {
    /// Training steps of a Llama-like model of a given shape
    Train(TrainArgs),
    /// Prompt and decode speed of a model
    Generate(GenerateBenchArgs),
    /// Single kernels, forward and backward
    Ops(OpsArgs),
}

/// Arguments of `tallow bench train`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow bench train --json
  tallow bench train --dtype bf16 --dim 768 --layers 12 --heads 12 --ffn 2048 --context 512 --vocab 50257 --batch 2 --tied")]
pub struct TrainArgs {
    /// Channels
    #[arg(long, default_value_t = 384)]
    dim: usize,
    /// Blocks
    #[arg(long, default_value_t = 6)]
    layers: usize,
    /// Query heads
    #[arg(long, default_value_t = 6)]
    heads: usize,
    /// Key/value heads (as many as query heads unless told)
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Feed-forward width
    #[arg(long, default_value_t = 1024)]
    ffn: usize,
    /// Tokens a row
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Vocabulary
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// Rows a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Embedding and head share their weights
    #[arg(long)]
    tied: bool,
    /// Dtype of compute
    #[arg(long, value_enum, default_value_t = DtypeArg::F32)]
    dtype: DtypeArg,
    /// Steps that count
    #[arg(long, default_value_t = 10)]
    steps: usize,
    /// Steps before them
    #[arg(long, default_value_t = 3)]
    warmup: usize,
    /// Keep only the inputs of blocks for the backward
    #[arg(long)]
    checkpointing: bool,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = DeviceArg::Cpu)]
    device: DeviceArg,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
enum DeviceArg {
    /// This machine's processors
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

/// Arguments of `tallow bench generate`.
#[derive(Args)]
pub struct GenerateBenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(long, default_value_t = 128)]
    decode: usize,
    /// Measurements; the median is reported
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `tallow bench ops`.
#[derive(Args)]
pub struct OpsArgs {
    /// Only ops whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs `tallow bench`.
pub fn run(command: BenchCommand) -> anyhow::Result<()> {
    match command {
        BenchCommand::Train(args) => train(args),
        BenchCommand::Generate(args) => bench_generate(args),
        BenchCommand::Ops(args) => super::bench_ops::run(args.filter.as_deref(), args.json),
    }
}

fn train(args: TrainArgs) -> anyhow::Result<()> {
    if args.device == DeviceArg::Cuda {
        return Err(exit::usage("--device cuda: this build has no CUDA; use --device cpu".into()));
    }
    if args.steps == 0 {
        return Err(exit::usage("--steps must be at least 1".into()));
    }
    let bench = TrainBench {
        dim: args.dim,
        layers: args.layers,
        heads: args.heads,
        kv_heads: args.kv_heads.filter(|&n| n > 0).unwrap_or(args.heads),
        ffn: args.ffn,
        context: args.context,
        vocab: args.vocab,
        batch: args.batch,
        tied: args.tied,
        dtype: match args.dtype {
            DtypeArg::F32 => DType::F32,
            DtypeArg::Bf16 => DType::BF16,
        },
        steps: args.steps,
        warmup: args.warmup,
        checkpointing: match args.checkpointing {
            true => ActivationCheckpointing::Blocks,
            false => ActivationCheckpointing::None,
        },
    };
    let report = bench.run(&Device::Cpu)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    println!(
        "{:.1} tokens/s   {:.1} ms a step   {:.1} model GFLOP/s   {:.0} MB   {:.1} M parameters   loss {:.4}",
        report.tokens_per_s,
        report.step_ms,
        report.model_gflops,
        report.peak_bytes as f64 / 1e6,
        report.params as f64 / 1e6,
        report.loss
    );
    Ok(())
}

fn bench_generate(args: GenerateBenchArgs) -> anyhow::Result<()> {
    if args.runs == 0 || args.prompt == 0 {
        return Err(exit::usage("--runs and --prompt must be at least 1".into()));
    }
    let start = Instant::now();
    let model = args.model.open()?;
    let load_s = start.elapsed().as_secs_f64();
    let vocab = model.decoder().shape().vocab_size;
    let usable = vocab.min(40_000).saturating_sub(200).max(1);
    let id = |i: usize| (vocab.min(100).saturating_sub(1) + i * 37 % usable) as u32 % vocab as u32;
    let prompt: Vec<u32> = (0..args.prompt).map(id).collect();
    let (mut prompt_speed, mut decode_speed) = (vec![], vec![]);
    for _ in 0..args.runs {
        let start = Instant::now();
        let one = GenerateOptions { max_tokens: 1, ..GenerateOptions::default() };
        generate(model.decoder(), model.device(), &prompt, &one, &mut |_| true)?;
        prompt_speed.push(args.prompt as f64 / start.elapsed().as_secs_f64());
        let mut first = None;
        let all = GenerateOptions { max_tokens: args.decode + 1, ..GenerateOptions::default() };
        let out = generate(model.decoder(), model.device(), &prompt[..1], &all, &mut |_| {
            first.get_or_insert_with(Instant::now);
            true
        })?;
        let seconds = first.map_or(f64::NAN, |first| first.elapsed().as_secs_f64());
        decode_speed.push((out.ids.len().saturating_sub(1)) as f64 / seconds);
    }
    let report = json!({
        "prompt_tokens_per_s": median(&mut prompt_speed),
        "decode_tokens_per_s": median(&mut decode_speed),
        "load_s": load_s,
        "peak_bytes": tallow_train::memory::peak_resident(),
    });
    if args.json {
        println!("{report}");
    } else {
        println!(
            "prompt {:.1} tokens/s   decode {:.1} tokens/s   load {load_s:.2} s",
            report["prompt_tokens_per_s"].as_f64().unwrap_or(f64::NAN),
            report["decode_tokens_per_s"].as_f64().unwrap_or(f64::NAN)
        );
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
