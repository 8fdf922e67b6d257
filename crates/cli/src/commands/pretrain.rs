//! `tallow pretrain`: run a run file.

use std::cmp::Ordering;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use tallow::open::{OpenFiles, open_files};
use tallow_train::progress::several;
use tallow_train::{
    Event, Finish, From, InitSetting, ObjectiveKind, Observer, OutputClaim, PrepareRun, Resolved, Run, RunConfig,
    Source, TrainDtype,
};

use crate::exit;
use crate::interrupt::Interrupt;
use crate::terminal::{self, Watcher};

/// A commented run file that runs.
pub const EXAMPLE: &str = include_str!("../../../../models/runs/example.toml");

/// Arguments of `tallow pretrain`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow pretrain --example > run.toml
  tallow pretrain run.toml
  tallow pretrain run.toml --resume
  tallow pretrain run.toml --set train.steps=200 --set optimizer.lr=3e-4 --set output=runs/second

Ctrl-C and SIGTERM save a checkpoint and leave with 130; a second one leaves at once. The run file's keys are in
docs/config.md.")]
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
    #[arg(value_name = "RUN.toml")]
    path: Option<PathBuf>,
    /// Set a key of the run file, e.g. train.steps=200; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

impl RunFile {
    /// The run file at `path`, with `set` on top.
    pub fn new(path: PathBuf, set: Vec<String>) -> Self {
        Self { path: Some(path), set }
    }

    /// Reads it for `job` and finds all that it names. Progress goes to stderr.
    pub fn prepare(&self, job: Job, resume: bool) -> anyhow::Result<Run> {
        self.prepare_within(job, resume, None)
    }

    /// The same, for so much memory where it is given.
    pub fn prepare_within(&self, job: Job, resume: bool, memory: Option<u64>) -> anyhow::Result<Run> {
        let example = match job {
            Job::Finetune | Job::Preview => "tallow finetune --example > run.toml",
            Job::Pretrain | Job::Plan => "tallow pretrain --example > run.toml",
        };
        let Some(path) = self.path.as_deref() else {
            let hint = format!("name one, or write one with `{example}`");
            return Err(exit::usage(format!("a run file is needed: {hint}")));
        };
        if !path.is_file() {
            let what = not_a_file(path);
            return Err(exit::usage(format!("{}: {what}; write one with `{example}`", path.display())));
        }
        let source = Source::read(path, &self.set)?;
        let base = path.parent().unwrap_or(Path::new(""));
        for note in source.notes() {
            terminal::line(&note);
        }
        let finetunes = match job {
            Job::Pretrain => false,
            Job::Finetune | Job::Preview => true,
            Job::Plan => is_finetuning(&source, base)?,
        };
        let source = if finetunes { source.with_default("objective.kind", "sft") } else { source };
        let run = source.config().and_then(|config| {
            job.check(&config)?;
            config.validate()?;
            if resume {
                job.check_resumable(&config, base)?;
            }
            if finetunes {
                rate_notes(&source, &config).iter().for_each(|note| terminal::line(note));
            }
            prepare(config, base, resume, memory)
        });
        // Every error of a key, from wherever it comes, says where the key was written.
        Ok(run.map_err(|error| source.locate(error))?)
    }
}

/// What is at `path` where a run file is expected.
fn not_a_file(path: &Path) -> String {
    let has = |name: &str| path.join(name).is_file();
    if !path.exists() {
        return "there is no such file".into();
    }
    if has("resolved.toml") {
        return "is the folder of a run; name the run file that it was started with".into();
    }
    if has("config.json") || has("adapter_config.json") {
        return format!(
            "is the folder of a model; name a run file with [model] from = {:?}",
            path.display().to_string()
        );
    }
    match path.is_dir() {
        true => "is a folder; a run file is needed".into(),
        false => "is no regular file; a run file is needed".into(),
    }
}

/// Whether `tallow plan` is asked about a run of `tallow finetune`: an adapter is, and an existing model is unless its data can
/// only be text. Says what it takes it for where both commands could run it.
fn is_finetuning(source: &Source, base: &Path) -> tallow_train::Result<bool> {
    let config = source.config()?;
    if config.adapter.is_some() || config.model.from.is_none() || source.says("objective.kind") {
        return Ok(config.adapter.is_some() || config.objective.kind != ObjectiveKind::Causal);
    }
    let finetunes = !config.data.train.iter().any(|path| is_text(&base.join(path)));
    terminal::line(match finetunes {
        true => "note: planned as `tallow finetune` runs it; for `tallow pretrain` add --set objective.kind=causal",
        false => {
            "note: planned as `tallow pretrain` runs it, since data.train is text; for `tallow finetune` add --set objective.kind=sft"
        }
    });
    Ok(finetunes)
}

/// Whether what is at `path` can only be text, prepared or not, and no examples; so is a folder with any of it.
fn is_text(path: &Path) -> bool {
    if path.join("index.json").is_file() {
        return tallow_data::SplitIndex::read(path).is_ok_and(|index| index.examples.is_none());
    }
    if path.is_dir() {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        // A link to a folder may lead back to where it is.
        return entries.map(|entry| entry.path()).any(|path| !(path.is_symlink() && path.is_dir()) && is_text(&path));
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let name = name.trim_end_matches(".gz").trim_end_matches(".zst");
    [".txt", ".md", ".text"].iter().any(|extension| name.ends_with(extension))
}

/// The least learning rate at which OLoRA has been seen to go astray.
const HIGH_FOR_OLORA: f64 = 5e-4;

/// Learning rates that are meant for another kind of run.
fn rate_notes(source: &Source, config: &RunConfig) -> Vec<String> {
    let lr = config.optimizer.lr;
    match &config.adapter {
        None if !source.says("optimizer.lr") => {
            let decay = config.optimizer.weight_decay;
            let decay = match source.says("optimizer.weight_decay") {
                true => String::new(),
                false => format!(" (as is optimizer.weight_decay = {decay}; 0 is usual)"),
            };
            vec![format!(
                "note: optimizer.lr is not set, and {lr:e} is a rate of pretraining{decay}: training all of an existing model \
                 takes 1e-5 to 5e-5 as a rule"
            )]
        }
        Some(adapter) if adapter.init == InitSetting::Olora && lr >= HIGH_FOR_OLORA => vec![format!(
            "note: optimizer.lr = {lr:e} is high for adapter.init = \"olora\", whose matrices both have a size from the start: \
             a run may go astray; 1e-4 to 2e-4 is safer"
        )],
        _ => vec![],
    }
}

/// What a run file is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job {
    /// `tallow pretrain`.
    Pretrain,
    /// `tallow finetune`.
    Finetune,
    /// `tallow finetune --preview`, which trains nothing.
    Preview,
    /// `tallow plan`, of either.
    Plan,
}

impl Job {
    /// Refuses what belongs to the other command.
    fn check(self, config: &RunConfig) -> tallow_train::Result<()> {
        let wrong = |key: &str, value: &str, reason: &str| {
            Err(tallow_train::Error::Config {
                at: String::new(),
                key: key.into(),
                value: value.into(),
                reason: reason.into(),
            })
        };
        match self {
            Job::Pretrain if config.adapter.is_some() => {
                wrong("adapter", "(a section)", "belongs to finetuning; run it with `tallow finetune`, or remove it")
            }
            Job::Pretrain if config.objective.kind != ObjectiveKind::Causal => {
                let kind = if config.objective.is_prefix() { "\"prefix\"" } else { "\"sft\"" };
                wrong("objective.kind", kind, "belongs to finetuning; run it with `tallow finetune`")
            }
            Job::Finetune | Job::Preview if config.model.from.is_none() => {
                let reason = "an existing model is needed to finetune, e.g. from = \"SmolLM2-135M-Instruct.Q4_1.gguf\"";
                wrong("model.from", "(missing)", reason)
            }
            _ => Ok(()),
        }
    }
}

impl Job {
    /// Refuses to continue what is no run.
    fn check_resumable(self, config: &RunConfig, base: &Path) -> tallow_train::Result<()> {
        let Some(output) = config.output.as_deref().map(|output| base.join(output)) else { return Ok(()) };
        match self {
            Job::Pretrain | Job::Finetune => tallow_train::check_resumable(&output),
            Job::Preview | Job::Plan => Ok(()),
        }
    }
}

/// Finds all that a run names, with paths relative to `base`.
fn prepare(config: RunConfig, base: &Path, resume: bool, memory: Option<u64>) -> tallow_train::Result<Run> {
    let from = config.model.from.as_ref().map(|from| open_from(from, base)).transpose()?;
    let peak_flops = Some(peak_flops(config.train.dtype));
    Run::prepare(config, base, PrepareRun { from, peak_flops, resume, memory, progress: Some(&mut terminal::line) })
}

/// The existing model that `model.from` names: a path relative to the run file, or whatever `--model` takes.
fn open_from(from: &str, base: &Path) -> tallow_train::Result<From> {
    let local = base.join(from);
    let name = if local.exists() { local.to_string_lossy().into_owned() } else { from.to_owned() };
    let OpenFiles { checkpoint, tokenizer } = open_files(&name).map_err(|error| tallow_train::Error::Config {
        at: String::new(),
        key: "model.from".into(),
        value: format!("{from:?}"),
        reason: error.to_string(),
    })?;
    Ok(From { checkpoint, tokenizer })
}

/// This machine's measured peak in the dtype of a run.
pub fn peak_flops(dtype: TrainDtype) -> f64 {
    match dtype {
        TrainDtype::F32 => tallow_kernels::peak::f32_flops(),
        TrainDtype::Bf16 => tallow_kernels::peak::bf16_flops(),
    }
}

/// Runs `tallow pretrain`.
pub fn run(args: PretrainArgs) -> anyhow::Result<()> {
    if args.example {
        std::io::stdout().write_all(EXAMPLE.as_bytes())?;
        return Ok(());
    }
    let run = args.file.prepare(Job::Pretrain, args.resume)?;
    let interrupt = Interrupt::listen("saving a checkpoint")?;
    train(run, args.resume, args.json, &interrupt)?;
    Ok(())
}

/// Trains a prepared run to its end and writes `final/`; returns that directory.
pub fn train(run: Run, resume: bool, json: bool, interrupt: &Interrupt) -> anyhow::Result<PathBuf> {
    let claim = run.claim()?;
    let output = run.output().to_path_buf();
    let resolved = run.resolved.clone();
    let mut notices = Notices(vec![run.kind_in_words(), run.data_in_words()]);
    notices.0.extend(run.notices());
    let mut trainer = run.into_trainer()?;
    let resumed = resume && trainer.resume(&mut notices).map_err(|error| claim.explain(error))?;
    let final_dir = output.join("final");
    let done = trainer.step_index();
    if resumed && trainer.is_done() {
        notices.0.push(finished(done, trainer.out_of_patience(), &resolved, &claim));
        if !output.join("resolved.toml").exists() {
            claim.write_resolved(&resolved)?;
        }
        // Fewer are asked for than are done, or the model is written: nothing that is there is to be replaced.
        if final_dir.exists() && (done > resolved.steps || trainer.is_saved_in(&final_dir)?) {
            notices.0.iter().for_each(|notice| terminal::line(notice));
            if json {
                writeln!(std::io::stdout(), "{}", serde_json::json!({ "final": final_dir }))?;
            }
            return Ok(final_dir);
        }
    } else {
        notices.0.extend(claim.changes());
        claim.write_resolved(&resolved)?;
    }
    // Metrics without a checkpoint are those of steps that run again.
    let from_step = resume.then(|| trainer.step_index());
    let mut watcher = Watcher::new(&output, &resolved, from_step, json)?;
    if resume && !resumed {
        notices.0.push("there is no checkpoint yet: starting from the beginning".into());
    }
    for notice in notices.0 {
        watcher.event(Event::Notice(notice))?;
    }
    let finish = trainer.train(&mut watcher, &|| interrupt.raised());
    // The curve of a run that failed is the first thing to look at; its error is the one to report.
    let drawn = watcher.finish();
    if finish? == Finish::Interrupted {
        terminal::line(&format!("stopped at step {}; continue with --resume", trainer.step_index()));
        return Err(exit::Interrupted.into());
    }
    drawn?;
    trainer.save_final(&final_dir)?;
    watcher.done(&final_dir);
    Ok(final_dir)
}

/// What is said of a run that has no step left: it is left as it is, but for what a kill may have kept from being written.
fn finished(done: u64, out_of_patience: bool, resolved: &Resolved, claim: &OutputClaim) -> String {
    let steps = match done.cmp(&resolved.steps) {
        Ordering::Less => format!("it stopped early after {} (eval.patience)", several(done, "step")),
        Ordering::Equal => format!("all {} are done", several(done, "step")),
        Ordering::Greater => {
            format!("{} are done, and the run file asks for {}", several(done, "step"), resolved.steps)
        }
    };
    let changed = claim.changed_keys().collect::<Vec<_>>().join(", ");
    let changed = if changed.is_empty() { String::new() } else { format!(" (without effect: {changed})") };
    let train = &resolved.run.train;
    let key = match (train.tokens, train.epochs) {
        (Some(_), _) => "train.tokens",
        (_, Some(_)) => "train.epochs",
        _ => "train.steps",
    };
    let key = match (done < resolved.steps, out_of_patience) {
        (true, _) => "eval.patience".to_owned(),
        (false, true) => format!("{key} and eval.patience"),
        (false, false) => key.to_owned(),
    };
    format!("the run is finished: {steps}; nothing is trained, and resolved.toml stays{changed}; to go on, raise {key}")
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
