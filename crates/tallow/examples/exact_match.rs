//! How often a model's answers are those of conversations held out: exact match and F1, by task.
//!
//! ```text
//! cargo run --release -p tallow --example exact_match -- --model MODEL [--adapter DIR] --data HELDOUT.jsonl
//!     [--max-tokens 32] [--limit N] [--samples 2] [--threads N] [--json]
//! ```
//!
//! A record is `{"messages": [..]}` that ends with a turn of the assistant, its reference; a field `task` beside it groups
//! the figures. The turns before it are rendered by the model's own template, as `tallow chat` does, and continued
//! greedily to the end of the turn or `--max-tokens`. The whole answer is compared, as SQuAD does
//! ([`tallow::eval`]): a right answer within a sentence is no exact match, but has an F1. `--limit` takes the first records
//! only, `--samples` shows so many answers a task. With `--json` the figures are one line of JSON on stdout.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::json;
use tallow::adapters::NamedAdapter;
use tallow::engine::{FinishReason, GenerateOptions, generate};
use tallow::eval::{exact_match, f1};
use tallow::open::{Dtype, open_adapted};
use tallow::sampler::SamplerOptions;
use tallow::tokenizer::{ChatOptions, Message, SpecialInContent};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: exact_match --model MODEL [--adapter DIR] --data HELDOUT.jsonl [--max-tokens 32] [--limit N] \
                     [--samples 2] [--threads N] [--json]";

struct Args {
    model: String,
    adapter: Option<PathBuf>,
    data: PathBuf,
    max_tokens: usize,
    limit: usize,
    samples: usize,
    threads: Option<usize>,
    json: bool,
}

/// A line of the data.
#[derive(Deserialize)]
struct Record {
    #[serde(default)]
    task: String,
    messages: Vec<Message>,
}

/// Sums over answers.
#[derive(Clone, Copy, Default)]
struct Tally {
    examples: usize,
    exact: usize,
    f1: f64,
    /// Answers that `--max-tokens` cut off.
    cut: usize,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.examples += other.examples;
        self.exact += other.exact;
        self.f1 += other.f1;
        self.cut += other.cut;
    }

    /// Exact match and F1 in percent.
    fn percent(&self) -> (f64, f64) {
        let n = self.examples.max(1) as f64;
        (100.0 * self.exact as f64 / n, 100.0 * self.f1 / n)
    }

    fn json(&self) -> serde_json::Value {
        let (exact, f1) = self.percent();
        json!({"examples": self.examples, "exact_match": exact, "f1": f1, "cut": self.cut})
    }
}

fn main() -> Result<()> {
    let args = parse(std::env::args().skip(1))?;
    tallow::kernels::simd::init()?;
    if let Some(threads) = args.threads {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    let records = read(&args)?;
    let adapters: Vec<NamedAdapter> = args.adapter.iter().map(NamedAdapter::new).collect();
    let model = open_adapted(&args.model, &adapters, Dtype::F32)?;
    let tokenizer = model.tokenizer()?;
    let encoder = tokenizer.chat_encoder()?;
    let rendering = ChatOptions {
        add_generation_prompt: true,
        special_in_content: SpecialInContent::Text,
        ..ChatOptions::default()
    };
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampler: SamplerOptions::greedy(),
        stop_ids: model.stop_ids(),
        adapters: None,
    };
    let mut err = std::io::stderr();
    let (mut tasks, mut total) = (BTreeMap::<&str, Tally>::new(), Tally::default());
    let (started, mut last) = (Instant::now(), Instant::now());
    for (record, reference) in &records {
        let prompt = encoder.encode(&record.messages, &rendering)?;
        let out = generate(model.decoder(), model.device(), &prompt, &options, &mut |_| true)?;
        let answer = tokenizer.decode(&out.ids, true)?;
        let one = Tally {
            examples: 1,
            exact: usize::from(exact_match(&answer, reference)),
            f1: f1(&answer, reference),
            cut: usize::from(out.finish_reason == FinishReason::Length),
        };
        let tally = tasks.entry(&record.task).or_default();
        tally.add(one);
        total.add(one);
        if tally.examples <= args.samples {
            let asked = record.messages.last().and_then(|m| m.content.as_deref()).unwrap_or_default();
            let asked = asked.rsplit_once("\n\n").map_or(asked, |(_, input)| input);
            writeln!(err, "[{}] {asked}\n  answer {answer:?}, reference {reference:?}, F1 {:.2}", record.task, one.f1)?;
        }
        if last.elapsed() >= Duration::from_secs(5) {
            last = Instant::now();
            let (exact, f1) = total.percent();
            writeln!(err, "{} of {}: exact match {exact:.1}%, F1 {f1:.1}%", total.examples, records.len())?;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let tasks: BTreeMap<_, _> = tasks.iter().map(|(task, tally)| (task, tally.json())).collect();
        let adapter = args.adapter.as_deref();
        let figures =
            json!({"model": args.model, "adapter": adapter, "total": total.json(), "tasks": tasks, "seconds": seconds});
        println!("{figures}");
        return Ok(());
    }
    println!("{:<24} {:>8} {:>12} {:>6} {:>5}", "task", "examples", "exact match", "F1", "cut");
    for (task, tally) in tasks.iter().chain([(&"all", &total)]) {
        let (exact, f1) = tally.percent();
        println!("{task:<24} {:>8} {exact:>11.1}% {f1:>5.1}% {:>5}", tally.examples, tally.cut);
    }
    println!("{seconds:.1} s");
    Ok(())
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args> {
    let (mut model, mut data) = (None, None);
    let (model_needed, data_needed) =
        (|| format!("--model is missing\n{USAGE}"), || format!("--data is missing\n{USAGE}"));
    let mut parsed = Args {
        model: String::new(),
        adapter: None,
        data: PathBuf::new(),
        max_tokens: 32,
        limit: usize::MAX,
        samples: 2,
        threads: None,
        json: false,
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
        let number = |text: String| text.parse::<usize>().map_err(|e| format!("{arg} {text}: {e}"));
        match arg.as_str() {
            "--model" => model = Some(value()?),
            "--adapter" => parsed.adapter = Some(value()?.into()),
            "--data" => data = Some(PathBuf::from(value()?)),
            "--max-tokens" => parsed.max_tokens = number(value()?)?,
            "--limit" => parsed.limit = number(value()?)?,
            "--samples" => parsed.samples = number(value()?)?,
            "--threads" => parsed.threads = Some(number(value()?)?),
            "--json" => parsed.json = true,
            other => return Err(format!("there is no {other}\n{USAGE}").into()),
        }
    }
    parsed.model = model.ok_or_else(model_needed)?;
    parsed.data = data.ok_or_else(data_needed)?;
    Ok(parsed)
}

/// The records, without their last turn, and what that says.
fn read(args: &Args) -> Result<Vec<(Record, String)>> {
    let shown = args.data.display();
    let text = std::fs::read_to_string(&args.data).map_err(|e| format!("{shown}: {e}"))?;
    let mut records = vec![];
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (i, line) in lines.take(args.limit) {
        let at = format!("{shown}, line {}", i + 1);
        let mut record: Record = serde_json::from_str(line).map_err(|e| format!("{at}: {e}"))?;
        let reference = match record.messages.pop() {
            Some(Message { role, content: Some(content), .. }) if role == "assistant" => content,
            _ => return Err(format!("{at}: the last of `messages` is no turn of the assistant with content").into()),
        };
        records.push((record, reference));
    }
    if records.is_empty() {
        return Err(format!("{shown}: no records").into());
    }
    Ok(records)
}
