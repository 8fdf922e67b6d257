//! `tallow bench`: measure this machine.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use candle_core::{DType, Device};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use tallow::open::OpenModel;
use tallow_engine::{GenerateOptions, generate};
use tallow_kernels::peak;
use tallow_sampler::SamplerOptions;
use tallow_train::ActivationCheckpointing;
use tallow_train::bench::TrainBench;
use tallow_train::profile::Peaks;

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
  tallow bench train --steps 3 --profile trace.json
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
    /// Write a Chrome trace of the steps there, and print what each op took beside the least it could have taken
    #[arg(long, value_name = "TRACE.json")]
    profile: Option<PathBuf>,
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
#[command(after_help = "\
Example:
  tallow bench generate --model SmolLM2-135M.gguf --prompt 512 --decode 128 --json")]
pub struct GenerateBenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode
    #[arg(long, default_value_t = 128)]
    decode: usize,
    /// Sequences at once; this build runs one
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Measurements; the median is reported
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// One JSON object
    #[arg(long)]
    json: bool,
}

/// Arguments of `tallow bench ops`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow bench ops
  tallow bench ops --filter linear --json")]
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
    if args.steps == 0 || args.batch == 0 {
        return Err(exit::usage("--steps and --batch must be at least 1".into()));
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
    let (mut report, profile) = match &args.profile {
        Some(path) => {
            // Found out before minutes are spent.
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            if path.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
                return Err(exit::usage(format!("--profile {}: is no place for a file", path.display())));
            }
            let (report, profile) = bench.profile(&Device::Cpu)?;
            (report, Some(profile))
        }
        None => (bench.run(&Device::Cpu)?, None),
    };
    let peak = match args.dtype {
        DtypeArg::F32 => peak::f32_flops(),
        DtypeArg::Bf16 => peak::bf16_flops(),
    };
    let mfu = report.model_gflops * 1e9 / peak;
    report.mfu = Some(mfu);
    let mut out = std::io::stdout().lock();
    if let (Some(path), Some(profile)) = (&args.profile, &profile) {
        let trace = profile.chrome_trace().to_string();
        tallow_formats::atomic_write(path, trace.as_bytes())?;
        let peaks = Peaks { flops: peak, bandwidth: peak::bandwidth().copy };
        match args.json {
            true => eprint!("{}", profile.table(peaks)),
            false => write!(out, "{}", profile.table(peaks))?,
        }
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:.1} tokens/s   {:.1} ms a step   {:.1} model GFLOP/s   mfu {:.1}%   {:.0} MB   {:.1} M parameters   loss {:.4}",
        report.tokens_per_s,
        report.step_ms,
        report.model_gflops,
        100.0 * mfu,
        report.peak_bytes as f64 / 1e6,
        report.params as f64 / 1e6,
        report.loss
    )?;
    Ok(())
}

fn bench_generate(args: GenerateBenchArgs) -> anyhow::Result<()> {
    if args.runs == 0 || args.prompt == 0 || args.decode == 0 {
        return Err(exit::usage("--runs, --prompt and --decode must be at least 1".into()));
    }
    if args.batch != 1 {
        let reason = "generation of several sequences at once is not available yet in this build; use --batch 1";
        return Err(exit::usage(format!("--batch {}: {reason}", args.batch)));
    }
    let start = Instant::now();
    let model = args.model.open()?;
    let load_s = start.elapsed().as_secs_f64();
    let shape = model.decoder().shape();
    for (flag, tokens) in [("--prompt", args.prompt), ("--decode", args.decode + 1)] {
        if tokens > shape.max_positions {
            let reason = format!("the model has {} positions", shape.max_positions);
            return Err(exit::usage(format!("{flag}: {tokens} tokens do not fit; {reason}")));
        }
    }
    let prompt = prompt_ids(args.prompt, shape.vocab_size);
    let (mut prompt_speed, mut decode_speed) = (vec![], vec![]);
    // The first run touches every weight for the first time.
    for run in 0..=args.runs {
        let (prompt_s, decode_s) = (time_prompt(&model, &prompt)?, time_decode(&model, &prompt[..1], args.decode)?);
        if run > 0 {
            prompt_speed.push(args.prompt as f64 / prompt_s);
            decode_speed.push(args.decode as f64 / decode_s);
        }
    }
    let (prompt_speed, decode_speed) = (median(&mut prompt_speed), median(&mut decode_speed));
    let mut out = std::io::stdout().lock();
    if args.json {
        let report = json!({
            "prompt_tokens_per_s": prompt_speed,
            "decode_tokens_per_s": decode_speed,
            "load_s": load_s,
            "peak_bytes": tallow_train::memory::peak_resident(),
        });
        writeln!(out, "{report}")?;
    } else {
        writeln!(out, "prompt {prompt_speed:.1} tokens/s   decode {decode_speed:.1} tokens/s   load {load_s:.2} s")?;
    }
    Ok(())
}

/// The same ids as the peer's benchmark, where the vocabulary is large enough.
fn prompt_ids(tokens: usize, vocab: usize) -> Vec<u32> {
    let usable = vocab.min(40_000).saturating_sub(200).max(1);
    (0..tokens).map(|i| ((100 + i * 37 % usable) % vocab.max(1)) as u32).collect()
}

/// Seconds from an empty cache to the logits behind the prompt.
fn time_prompt(model: &OpenModel, prompt: &[u32]) -> anyhow::Result<f64> {
    let one = GenerateOptions { max_tokens: 1, sampler: SamplerOptions::greedy(), stop_ids: vec![], adapters: None };
    let start = Instant::now();
    generate(model.decoder(), model.device(), prompt, &one, &mut |_| true)?;
    Ok(start.elapsed().as_secs_f64())
}

/// Seconds of `tokens` greedy steps behind an almost empty cache.
fn time_decode(model: &OpenModel, prompt: &[u32], tokens: usize) -> anyhow::Result<f64> {
    let all =
        GenerateOptions { max_tokens: tokens + 1, sampler: SamplerOptions::greedy(), stop_ids: vec![], adapters: None };
    let mut first = None;
    generate(model.decoder(), model.device(), prompt, &all, &mut |_| {
        first.get_or_insert_with(Instant::now);
        true
    })?;
    Ok(first.map_or(f64::NAN, |first| first.elapsed().as_secs_f64()))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
