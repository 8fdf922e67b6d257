//! The `tallow` binary: parse, resolve, call.
#![forbid(unsafe_code)]

mod commands;
mod exit;
mod interrupt;
mod terminal;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use commands::{
    bench, chat, completions, convert, data, doctor, finetune, generate, merge, plan, pretrain, quickstart, reference,
    score, tokenizer,
};

/// From raw text to a model that writes: tokenizer, data, training, generation, in one binary.
#[derive(Parser)]
#[command(name = "tallow", version, max_term_width = 100, after_help = EXAMPLES)]
struct Cli {
    /// Threads to compute with (all cores unless told)
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,

    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tallow quickstart                                     train a small model on real English, see it write
  tallow tokenizer train --input text/ --vocab-size 4096 --out tokenizer.json
  tallow data prepare --input text/ --tokenizer tokenizer.json --out data
  tallow pretrain --example > run.toml                  a commented run file
  tallow plan run.toml                                  memory, tokens and time, before anything runs
  tallow pretrain run.toml
  tallow generate --model runs/first/final --prompt 'Fellow citizens'
  tallow finetune --example > tune.toml                 teach an existing model from conversations
  tallow finetune tune.toml";

#[derive(Subcommand)]
enum Command {
    /// The main job on a small real corpus: tokenizer, data, pretraining, curve, sample
    Quickstart(quickstart::QuickstartArgs),
    /// Train a tokenizer, or encode and decode with one
    #[command(subcommand)]
    Tokenizer(tokenizer::TokenizerCommand),
    /// Turn text into token shards, or look at them
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Memory, tokens, FLOPs and time of a run, before anything runs
    Plan(plan::PlanArgs),
    /// Train a model from scratch, or continue one on plain text
    Pretrain(pretrain::PretrainArgs),
    /// Teach an existing model something: an adapter beside it, or all of it
    Finetune(finetune::FinetuneArgs),
    /// Add an adapter to its model, and measure what that changes
    Merge(merge::MergeArgs),
    /// Write an adapter as a GGUF file for llama.cpp, or a model as safetensors
    Convert(convert::ConvertArgs),
    /// Continue a prompt
    Generate(generate::GenerateArgs),
    /// A conversation in the terminal
    Chat(chat::ChatArgs),
    /// Log-probabilities and perplexity of a text
    Score(score::ScoreArgs),
    /// Measure this machine at training, generation or single kernels
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// What this machine and this build can do, and what is missing
    Doctor(doctor::DoctorArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print the pages of docs/ that are made from this program
    #[command(hide = true)]
    Reference(reference::ReferenceArgs),
}

/// Large buffers are kept from step to step.
#[global_allocator]
static ALLOCATOR: tallow_kernels::allocator::KeepLarge = tallow_kernels::allocator::KeepLarge;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tallow_kernels::memory::keep_large_allocations();
    // Backward recurses over the graph and the forward of a deep model nests: the main thread's stack is the system's.
    let worker = std::thread::Builder::new().name("tallow".into()).stack_size(256 << 20).spawn(move || run(cli));
    match worker.map(std::thread::JoinHandle::join) {
        Ok(Ok(code)) => code,
        Ok(Err(_)) => ExitCode::from(exit::FAILED),
        Err(error) => {
            eprintln!("error: cannot start a thread: {error}");
            ExitCode::from(exit::FAILED)
        }
    }
}

fn run(cli: Cli) -> ExitCode {
    let result = set_threads(cli.threads).and_then(|()| match cli.command {
        Command::Quickstart(args) => quickstart::run(args),
        Command::Tokenizer(command) => tokenizer::run(command),
        Command::Data(command) => data::run(command),
        Command::Plan(args) => plan::run(args),
        Command::Pretrain(args) => pretrain::run(args),
        Command::Finetune(args) => finetune::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::run(args),
        Command::Score(args) => score::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Reference(args) => reference::run(args),
    });
    exit::report(result)
}

fn set_threads(threads: Option<usize>) -> anyhow::Result<()> {
    tallow_kernels::simd::init().map_err(|e| exit::usage(e.to_string()))?;
    if let Some(threads) = threads {
        if threads == 0 {
            return Err(exit::usage("--threads must be at least 1".into()));
        }
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    Ok(())
}
