//! Conversations with short answers, to fine-tune on and to hold out, from tasks of Natural Instructions (Mishra et al.
//! 2021, <https://arxiv.org/abs/2104.08773>) as BIG-bench publishes them.
//!
//! ```text
//! cargo run --release -p tallow --example natural_instructions -- TASK_JSON.. --train N --valid N --seed S --out DIR
//! ```
//!
//! Writes `DIR/train.jsonl` and `DIR/heldout.jsonl`, a record `{"task", "messages": [user, assistant]}` a line, N in all,
//! divided evenly between the tasks. The same files and seed give the same bytes. `scripts/fetch-assets
//! natural-instructions` fetches four tasks and runs this.
//!
//! - A task's definition (60 to 350 words) becomes [one or two sentences](SHORT); of a task not named there, what follows
//!   `Prompt:` in the definition.
//! - Only examples on which all annotators gave one answer are taken.
//! - No line of an input (a sentence, fact or question) stands in two examples, of whatever task: what is held out shares
//!   no text with what is learnt.
//!
//! The files carry the canary of BIG-bench, which asks that they stay out of training corpora: results of BIG-bench say
//! nothing about a model tuned on them.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tallow::sampler::uniform;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "usage: natural_instructions TASK_JSON.. --train N --valid N --seed S --out DIR";

/// The end of a task's name, what the task is called in the records, and the instruction that its inputs get.
const SHORT: [(&str, &str, &str); 4] = [
    (
        "miscellaenous_question_typing",
        "question_typing",
        "Give the type of the answer: Humans, Event, Entity, Facility, Location, Law, Organization, Date, Time, Money, \
         Quantity, Description, Abbreviation or Other.",
    ),
    (
        "qasc_find_overlapping_words",
        "overlapping_word",
        "Write one significant word that stands in both sentences. Answer with that word only.",
    ),
    (
        "qasc_answer_generation",
        "answer_from_fact",
        "Answer the question with words from the fact. Do not write a sentence.",
    ),
    (
        "essential_terms_identifying_essential_words",
        "essential_words",
        "List the words of the question that are essential for choosing the correct answer, separated by commas.",
    ),
];

/// Which files, and how much of them.
#[derive(Default)]
struct Args {
    tasks: Vec<PathBuf>,
    train: usize,
    valid: usize,
    seed: u64,
    out: PathBuf,
}

/// One example: what it is from, what it asks with the instruction, and what to answer.
struct Example {
    task: String,
    prompt: String,
    answer: String,
    /// The lines of its input without their labels, as they are compared with others.
    lines: Vec<String>,
}

fn main() -> Result<()> {
    let args = parse(std::env::args().skip(1))?;
    let tasks = args.tasks.len();
    let (mut train, mut valid, mut seen) = (vec![], vec![], HashSet::new());
    for (i, path) in args.tasks.iter().enumerate() {
        let mut examples = read(path)?;
        shuffle(&mut examples, args.seed, i as u64 + 1);
        let available = examples.len();
        let mut fresh = examples.into_iter().filter(|example| {
            let new = example.lines.iter().all(|line| !seen.contains(line));
            if new {
                seen.extend(example.lines.iter().cloned());
            }
            new
        });
        let share = |total: usize| total / tasks + usize::from(i < total % tasks);
        let wanted = share(args.valid) + share(args.train);
        let before = valid.len() + train.len();
        valid.extend(fresh.by_ref().take(share(args.valid)));
        train.extend(fresh.take(share(args.train)));
        let found = valid.len() + train.len() - before;
        if found < wanted {
            let shown = path.display();
            return Err(format!("{shown}: {found} of {available} examples share no line, {wanted} are wanted").into());
        }
    }
    let learnt: HashSet<String> = train.iter().map(|example| plain(&example.prompt)).collect();
    if let Some(both) = valid.iter().find(|example| learnt.contains(&plain(&example.prompt))) {
        return Err(format!("an input is both learnt and held out: {}", both.prompt).into());
    }
    // The tasks mixed, so that the first few of a file are of all.
    shuffle(&mut train, args.seed, 0);
    shuffle(&mut valid, args.seed, 0);
    std::fs::create_dir_all(&args.out)?;
    write(&args.out.join("train.jsonl"), &train)?;
    write(&args.out.join("heldout.jsonl"), &valid)
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Args> {
    let mut parsed = Args::default();
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value\n{USAGE}"));
        match arg.as_str() {
            "--train" => parsed.train = value()?.parse().map_err(|e| format!("--train: {e}"))?,
            "--valid" => parsed.valid = value()?.parse().map_err(|e| format!("--valid: {e}"))?,
            "--seed" => parsed.seed = value()?.parse().map_err(|e| format!("--seed: {e}"))?,
            "--out" => parsed.out = value()?.into(),
            flag if flag.starts_with('-') => return Err(format!("there is no {flag}\n{USAGE}").into()),
            path => parsed.tasks.push(path.into()),
        }
    }
    if parsed.tasks.is_empty() || parsed.train == 0 || parsed.valid == 0 || parsed.out.as_os_str().is_empty() {
        return Err(USAGE.into());
    }
    Ok(parsed)
}

/// The examples of a task on which its annotators agree.
fn read(path: &Path) -> Result<Vec<Example>> {
    let wrong = |what: &str| format!("{}: {what}; expected a task.json of BIG-bench", path.display());
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let task: Value = serde_json::from_str(&text).map_err(|e| wrong(&e.to_string()))?;
    let name = task["name"].as_str().ok_or_else(|| wrong("no `name`"))?;
    let (name, instruction) = match SHORT.iter().find(|(end, ..)| name.ends_with(end)) {
        Some((_, short, instruction)) => (*short, *instruction),
        None => {
            let prefix = task["task_prefix"].as_str().unwrap_or_default();
            (name, prefix.rsplit_once("Prompt:").ok_or_else(|| wrong("no `Prompt:` in `task_prefix`"))?.1.trim())
        }
    };
    let mut examples = vec![];
    for example in task["examples"].as_array().ok_or_else(|| wrong("no list `examples`"))? {
        let input = example["input"].as_str().ok_or_else(|| wrong("an example without `input`"))?;
        let answer = match &example["target"] {
            Value::String(answer) => answer,
            Value::Array(answers) => match answers.as_slice() {
                [Value::String(answer)] => answer,
                _ => continue,
            },
            _ => return Err(wrong("an example without `target`").into()),
        };
        if answer.trim().is_empty() {
            continue;
        }
        let input = input.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>();
        examples.push(Example {
            task: name.to_owned(),
            prompt: format!("{instruction}\n\n{}", input.join("\n")),
            answer: answer.trim().to_owned(),
            lines: input.iter().map(|line| plain(line.split_once(": ").map_or(line, |(_, text)| text))).collect(),
        });
    }
    Ok(examples)
}

/// `text` in lower case, letters and digits only, words one space apart.
fn plain(text: &str) -> String {
    text.to_lowercase().split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Fisher and Yates, keyed by `(seed, stream)`.
fn shuffle<T>(list: &mut [T], seed: u64, stream: u64) {
    for i in (1..list.len()).rev() {
        list.swap(i, (uniform(seed, i as u64, stream) * (i + 1) as f64) as usize);
    }
}

fn write(path: &Path, examples: &[Example]) -> Result<()> {
    let mut text = String::new();
    for Example { task, prompt, answer, .. } in examples {
        let messages = json!([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]);
        text.push_str(&json!({"task": task, "messages": messages}).to_string());
        text.push('\n');
    }
    std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
    println!("{}: {} examples", path.display(), examples.len());
    Ok(())
}
