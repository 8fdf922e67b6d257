//! A tiny pretrained model and conversations to teach it from, made in the test.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::json;

use super::run::{pretrain, workshop};
use super::{command, stdout};

/// The run file: LoRA with dropout, accumulation, held-out examples.
pub const RUN: &str = r#"output = "tuned"
seed = 3

[model]
from = "out/final"

[tokenizer]
chat_template = "alpaca"

[data]
train = ["chat.jsonl"]
valid_fraction = 0.2
context_length = 192

[adapter]
rank = 4
dropout = 0.1

[train]
steps = 6
batch_size = 4
micro_batch_size = 2

[optimizer]
lr = 1e-2

[eval]
every = 3

[checkpoint]
every = 2
keep = 9
"#;

/// A tiny pretrained model in `out/final`, `chat.jsonl` and `tune.toml`.
pub fn school() -> tempfile::TempDir {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &["train.steps=4", "data.context_length=256", "eval.every=0"], &[]));
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let lines: String = (0..40)
        .map(|i| {
            let messages = [turn("user", &format!("who went over the hill {i}")), turn("assistant", "a fox")];
            json!({ "messages": messages }).to_string() + "\n"
        })
        .collect();
    fs::write(dir.path().join("chat.jsonl"), lines).expect("written");
    fs::write(dir.path().join("tune.toml"), RUN).expect("written");
    dir
}

/// `tallow finetune tune.toml` in `dir` with `--set` for each of `set`, and the `flags`.
pub fn finetune(dir: &Path, set: &[&str], flags: &[&str]) -> Output {
    finetune_command(dir, set, flags).output().expect("the binary runs")
}

/// The same, not started yet.
pub fn finetune_command(dir: &Path, set: &[&str], flags: &[&str]) -> std::process::Command {
    let mut command = command();
    command.current_dir(dir).args(["finetune", "tune.toml"]).args(flags);
    for assignment in set {
        command.args(["--set", assignment]);
    }
    command
}
