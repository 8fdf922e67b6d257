//! `tallow finetune`: teach an existing model something.

use std::io::Write;

use clap::Args;

use super::pretrain::{Job, RunFile, train};
use super::preview;
use crate::interrupt::Interrupt;

/// A commented run file.
pub const EXAMPLE: &str = include_str!("../../../../models/runs/finetune.toml");

/// Arguments of `tallow finetune`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow finetune --example > tune.toml
  tallow finetune tune.toml --preview 3
  tallow plan tune.toml
  tallow finetune tune.toml
  tallow finetune tune.toml --resume
  tallow finetune tune.toml --set adapter.rank=64 --set optimizer.lr=1e-4 --set output=runs/second
  tallow generate --model SmolLM2-135M-Instruct.Q4_1.gguf --adapter runs/tuned/final --prompt 'Hello'

With [adapter] in the run file, final/ is a PEFT directory that the peft package loads; without, a Hugging Face directory.
--preview marks what is learnt by colours on a terminal (NO_COLOR turns them off, CLICOLOR_FORCE=1 on), elsewhere by ⟦ ⟧.
Ctrl-C and SIGTERM save a checkpoint and leave with 130; a second one leaves at once. The run file's keys are in
docs/config.md.")]
pub struct FinetuneArgs {
    #[command(flatten)]
    file: RunFile,
    /// Continue the run in the output directory from its newest checkpoint
    #[arg(long)]
    resume: bool,
    /// Show the first N rows as the model will see them (what is learnt, what is only read), and leave
    #[arg(long, value_name = "N", conflicts_with = "resume", value_parser = clap::value_parser!(u64).range(1..))]
    preview: Option<u64>,
    /// Print a commented run file, and leave
    #[arg(long, exclusive = true)]
    example: bool,
    /// One JSON object a line on stdout: every step, validation and checkpoint, or the rows of --preview
    #[arg(long)]
    json: bool,
}

/// Runs `tallow finetune`.
pub fn run(args: FinetuneArgs) -> anyhow::Result<()> {
    if args.example {
        std::io::stdout().write_all(EXAMPLE.as_bytes())?;
        return Ok(());
    }
    if let Some(rows) = args.preview {
        // A run that is there already is in nobody's way.
        return preview::show(&args.file.prepare(Job::Preview, true)?, rows, args.json);
    }
    let run = args.file.prepare(Job::Finetune, args.resume)?;
    let interrupt = Interrupt::listen("saving a checkpoint")?;
    train(run, args.resume, args.json, &interrupt)?;
    Ok(())
}
