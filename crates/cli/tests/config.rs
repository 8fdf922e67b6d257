//! Run files and the generated reference pages, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;

use rig::run::{names, pretrain, workshop};
use rig::{fails, object, stdout, tallow};

#[test]
fn the_example_runs_as_its_comments_say() {
    let dir = workshop();
    let example = stdout(&tallow(dir.path(), "pretrain --example"));
    let made = tempfile::tempdir().expect("a folder");
    fs::create_dir(made.path().join("text")).expect("a folder");
    fs::copy(dir.path().join("text/stories.jsonl"), made.path().join("text/stories.jsonl")).expect("copied");
    fs::write(made.path().join("run.toml"), &example).expect("written");
    let commands: Vec<&str> = example.lines().filter_map(|line| line.strip_prefix("#   tallow ")).collect();
    assert_eq!(commands.len(), 2);
    for command in commands {
        stdout(&tallow(made.path(), command));
    }
    // As it is but for its length.
    stdout(&pretrain(made.path(), &["train.steps=1", "train.batch_size=1"], &[]));
    assert!(made.path().join("runs/first/final/model.safetensors").is_file());
    fails(&tallow(made.path(), "pretrain --example run.toml"), 2, &["--example"]);
}

#[test]
fn an_unknown_key_names_file_line_key_value_and_the_nearest() {
    let dir = workshop();
    let text = fs::read_to_string(dir.path().join("run.toml")).expect("read");
    let line_of = |needle: &str| text.lines().position(|l| l == needle).expect("a line") + 1;
    for (from, to, words) in [
        ("steps = 12", "step = 12", ["`train.step` = 12", "nearest is `steps`"]),
        ("hidden_size = 32", "hiden_size = 32", ["`model.hiden_size` = 32", "nearest is `hidden_size`"]),
        ("lr = 3e-3", "lr = \"fast\"", ["`optimizer.lr` = \"fast\"", "expected a number"]),
        ("every = 5", "evry = 5", ["`checkpoint.evry` = 5", "nearest is `every`"]),
        ("num_attention_heads = 2", "num_attention_heads = 5", ["`model.hidden_size`", "num_attention_heads = 5"]),
        ("context_length = 32", "context_length = 0", ["`data.context_length` = 0", "at least 1"]),
        ("seed = 5", "sed = 5", ["`sed` = 5", "nearest is `seed`"]),
    ] {
        fs::write(dir.path().join("bad.toml"), text.replacen(from, to, 1)).expect("written");
        let line = match words[0] {
            "`model.hidden_size`" => line_of("hidden_size = 32"),
            _ => line_of(from),
        };
        let place = format!("bad.toml:{line}: ");
        for command in ["pretrain bad.toml", "plan bad.toml --json", "pretrain bad.toml --json"] {
            fails(&tallow(dir.path(), command), 2, &[&place, words[0], words[1]]);
        }
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn set_is_as_strict_as_the_file_and_wins_over_it() {
    let dir = workshop();
    for (set, words) in [
        ("train.stepz=1", &["--set", "train.stepz", "`steps`"][..]),
        ("train.steps", &["key=value"]),
        ("train.batch_size=0", &["--set", "train.batch_size", "at least 1"]),
        ("schedule.kind=cosin", &["schedule.kind", "cosine, linear, wsd, constant", "nearest is `cosine`"]),
        ("train.tokens=100.5", &["train.tokens", "100.5"]),
        ("parallel.dp=2", &["parallel.dp", "not available yet"]),
        ("adapter.kind=lora", &["adapter", "finetun"]),
        ("model.preset=lama-14m", &["model.preset", "nearest is `llama-14m`"]),
        ("device=cuda", &["device", "auto, cpu"]),
        ("objective.kind=sft", &["objective.kind", "tallow finetune"]),
        ("schedule.warmup_steps=99", &["schedule.warmup_steps", "99", "12 steps"]),
        ("model.vocab_size=100", &["model.vocab_size", "100", "300 tokens"]),
    ] {
        fails(&pretrain(dir.path(), &[set], &[]), 2, words);
    }
    let plan = object(&tallow(dir.path(), "plan run.toml --json --set train.steps=7 --set parallel.tp=1"));
    assert_eq!(plan["steps"], 7);
    assert_eq!(names(&dir.path().join("out")), Vec::<String>::new());
}

/// Compares a page of docs/ with what the program prints; `TALLOW_BLESS=1` writes the page anew.
fn page_is_current(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(name);
    if std::env::var_os("TALLOW_BLESS").is_some() {
        fs::write(&path, text).expect("written");
    }
    let page = fs::read_to_string(&path).unwrap_or_default();
    assert!(page == text, "docs/{name} is stale: run this test with TALLOW_BLESS=1");
}

#[test]
fn the_reference_pages_are_those_of_this_program() {
    page_is_current("config.md", &stdout(&tallow(Path::new("."), "reference config")));
    page_is_current("cli.md", &stdout(&tallow(Path::new("."), "reference cli")));
}

#[test]
fn every_command_has_an_example_in_its_help() {
    let page = stdout(&tallow(Path::new("."), "reference cli"));
    for section in page.split("\n## ").chain(page.split("\n### ")).skip(1) {
        let name = section.lines().next().unwrap_or_default();
        let leaf = !section.contains("\nCommands:\n");
        assert!(!leaf || section.contains("Example"), "{name} has no example");
    }
}
