//! `tallow pretrain`: run a run file.

use std::path::{Path, PathBuf};

use clap::Args;
use tallow::open::{OpenFiles, open_files};
use tallow_train::{Event, Finish, From, Observer, Run, RunConfig};

use crate::exit;
use crate::interrupt::Interrupt;
use crate::terminal::Watcher;

/// A commented run file that runs.
pub const EXAMPLE: &str = include_str!("../../../../models/runs/example.toml");

/// Arguments of `tallow pretrain`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow pretrain --example > run.toml
  tallow pretrain run.toml
  tallow pretrain run.toml --resume
  tallow pretrain run.toml --set train.steps=200 --set optimizer.lr=3e-4 --set output=runs/second")]
pub struct PretrainArgs {
    #[command(flatten)]
    file: RunFile,
    /// Continue the run in the output directory from its newest checkpoint
    #[arg(long)]
    resume: bool,
    /// Print a commented run file that runs, and leave
    #[arg(long, exclusive = true)]
    example: bool,
    /// One JSON object a line on stdout: every step, validation and checkpoint
    #[arg(long)]
    json: bool,
}

/// A run file and what is set on top of it.
#[derive(Args)]
pub struct RunFile {
    /// The run file
    #[arg(value_name = "RUN.toml", required_unless_present = "example")]
    path: Option<PathBuf>,
    /// Set a key of the run file, e.g. train.steps=200; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RunFile {
    /// Reads it and finds all that it names. Progress goes to stderr.
    pub fn prepare(&self) -> anyhow::Result<Run> {
        let path = self.path.as_deref().unwrap_or(Path::new("run.toml"));
        if !path.is_file() {
            let hint = "write one with `tallow pretrain --example > run.toml`";
            return Err(exit::usage(format!("{}: there is no such file; {hint}", path.display())));
        }
        let config = RunConfig::load(path, &self.set)?;
        prepare(config, path.parent().unwrap_or(Path::new("")))
    }
}

/// Finds all that a run names, with paths relative to `base`.
pub fn prepare(config: RunConfig, base: &Path) -> anyhow::Result<Run> {
    let from = match &config.model.from {
        None => None,
        Some(from) => {
            let local = base.join(from);
            let name = if local.exists() { local.to_string_lossy().into_owned() } else { from.clone() };
            let OpenFiles { checkpoint, tokenizer } = open_files(&name)?;
            Some(From { checkpoint, tokenizer })
        }
    };
    Ok(Run::prepare(config, base, from, None, &mut |line| eprintln!("{line}"))?)
}

/// Runs `tallow pretrain`.
pub fn run(args: PretrainArgs) -> anyhow::Result<()> {
    if args.example {
        print!("{EXAMPLE}");
        return Ok(());
    }
    let run = args.file.prepare()?;
    let interrupt = Interrupt::listen("saving a checkpoint")?;
    train(run, args.resume, args.json, &interrupt)?;
    Ok(())
}

/// Trains a prepared run to its end and writes `final/`; returns that directory.
pub fn train(run: Run, resume: bool, json: bool, interrupt: &Interrupt) -> anyhow::Result<PathBuf> {
    run.claim_output(resume)?;
    let output = run.output().to_path_buf();
    let resolved = run.resolved.clone();
    let mut trainer = run.into_trainer()?;
    let mut notices = Notices::default();
    let resumed = resume && trainer.resume(&mut notices)?;
    let from_step = resumed.then(|| trainer.step_index());
    let mut watcher = Watcher::new(&output, &resolved, from_step, json)?;
    for notice in notices.0 {
        watcher.event(Event::Notice(notice))?;
    }
    if resume && !resumed {
        watcher.event(Event::Notice("there is no checkpoint yet: starting from the beginning".into()))?;
    }
    let finish = trainer.train(&mut watcher, &|| interrupt.raised())?;
    watcher.finish()?;
    if finish == Finish::Interrupted {
        eprintln!("stopped at step {}; continue with --resume", trainer.step_index());
        return Err(exit::Interrupted.into());
    }
    let final_dir = output.join("final");
    trainer.save_final(&final_dir)?;
    if !json {
        eprintln!("wrote {}", final_dir.display());
    }
    Ok(final_dir)
}

/// Keeps notices until there is a place to print them.
#[derive(Default)]
struct Notices(Vec<String>);

impl Observer for Notices {
    fn event(&mut self, event: Event) -> tallow_train::Result<()> {
        if let Event::Notice(notice) = event {
            self.0.push(notice);
        }
        Ok(())
    }
}
