//! A small corpus and a tiny run, made in the test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use super::{command, stdout, tallow};

/// A folder with `text/`, `tokenizer.json`, `data/train` and `data/valid`, and `run.toml`: dim 32, 2 layers, context 32.
pub fn workshop() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    fs::create_dir(dir.path().join("text")).expect("a folder");
    let lines: String = (0..120).map(|i| serde_json::json!({ "text": story(i) }).to_string() + "\n").collect();
    fs::write(dir.path().join("text/stories.jsonl"), lines).expect("written");
    stdout(&tallow(dir.path(), "tokenizer train --input text --vocab-size 300 --out tokenizer.json"));
    let prepare = "data prepare --input text --tokenizer tokenizer.json --out data --valid-fraction 0.1";
    stdout(&tallow(dir.path(), prepare));
    fs::write(dir.path().join("run.toml"), RUN).expect("written");
    dir
}

const RUN: &str = r#"output = "out"
seed = 5

[model]
architectures = ["LlamaForCausalLM"]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 2

[tokenizer]
path = "tokenizer.json"

[data]
train = ["data/train"]
valid = ["data/valid"]
context_length = 32

[train]
steps = 12
batch_size = 4

[optimizer]
lr = 3e-3

[eval]
every = 6

[checkpoint]
every = 5
"#;

/// Some sentences, other ones for each `seed`, the same in every process.
pub fn story(seed: u64) -> String {
    const WHO: [&str; 8] =
        ["the miller", "a fox", "her sister", "the old king", "a boat", "the river", "a child", "the wind"];
    const DID: [&str; 8] =
        ["went over", "sang to", "looked for", "carried", "forgot", "found", "waited for", "painted"];
    const WHAT: [&str; 8] =
        ["the hill", "a lantern", "the sea", "the harvest", "an apple", "the road", "a letter", "the winter"];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut pick = |words: &[&'static str; 8]| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        words[(state >> 40) as usize % 8]
    };
    (0..8).map(|_| format!("{} {} {}. ", pick(&WHO), pick(&DID), pick(&WHAT))).collect()
}

/// `tallow pretrain run.toml` in `dir` with `--set` for each of `set`, and the `flags`.
pub fn pretrain(dir: &Path, set: &[&str], flags: &[&str]) -> Output {
    pretrain_command(dir, set, flags).output().expect("the binary runs")
}

/// The same, not started yet.
pub fn pretrain_command(dir: &Path, set: &[&str], flags: &[&str]) -> std::process::Command {
    let mut command = command();
    command.current_dir(dir).args(["pretrain", "run.toml"]).args(flags);
    for assignment in set {
        command.args(["--set", assignment]);
    }
    command
}

/// The lines of a run's `metrics.jsonl`.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).expect("metrics");
    text.lines().map(|line| serde_json::from_str(line).expect("a JSON object a line")).collect()
}

/// What must not depend on how a run was interrupted: every step's number, tokens, loss, rate and gradient norm.
pub fn trajectory(run: &Path) -> Vec<String> {
    let step = |line: &Value| {
        let keys = ["step", "tokens", "loss", "lr", "grad_norm", "skipped", "valid_loss"];
        keys.map(|key| line[key].to_string()).join(" ")
    };
    metrics(run).iter().map(step).collect()
}

/// The bytes of the trained weights.
pub fn weights(run: &Path) -> Vec<u8> {
    fs::read(run.join("final/model.safetensors")).expect("final weights")
}

/// Names in a folder, sorted; none if it is not there.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A folder of a trained model.
pub fn model(dir: &Path) -> PathBuf {
    stdout(&pretrain(dir, &["train.steps=40"], &[]));
    dir.join("out/final")
}
