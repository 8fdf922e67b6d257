//! `finetune` with adapters that start within their matrices, and with tokens that the model did not have.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;

use rig::run::{names, trajectory};
use rig::school::{finetune, school};
use rig::{fails, object, stdout, tallow};
use serde_json::{Value, json};

/// Runs to the end, then once more from the checkpoint of step 2 on: weights and losses are the same. What it said at first.
fn trained_and_resumed(at: &Path, set: &[&str]) -> String {
    let first = finetune(at, set, &[]);
    let said = stdout(&first) + &String::from_utf8_lossy(&first.stderr);
    let adapter = at.join("tuned/final/adapter_model.safetensors");
    let (whole, told) = (fs::read(&adapter).expect("an adapter"), trajectory(&at.join("tuned")));
    for name in names(&at.join("tuned/checkpoints")).iter().filter(|name| *name != "step-2") {
        fs::remove_dir_all(at.join("tuned/checkpoints").join(name)).expect("removed");
    }
    fs::remove_dir_all(at.join("tuned/final")).expect("removed");
    stdout(&finetune(at, set, &["--resume"]));
    assert!(fs::read(&adapter).expect("an adapter") == whole, "other weights after resuming: {set:?}");
    assert_eq!(trajectory(&at.join("tuned")), told, "{set:?}");
    said
}

fn adapter_config(at: &Path) -> Value {
    let text = fs::read(at.join("tuned/final/adapter_config.json")).expect("a configuration");
    serde_json::from_slice(&text).expect("JSON")
}

/// Summed nats of `text` under a model and what else is said.
fn score(at: &Path, text: &str, more: &str) -> f64 {
    let scored = object(&tallow(at, &format!("score --text {text} --json {more}")));
    scored["nll"].as_f64().expect("a number")
}

/// Merges the adapter and finds the merged model to say the same.
fn merged_says_the_same(at: &Path, text: &str) {
    let merged = object(&tallow(at, "merge --model out/final --adapter tuned/final --out merged --json"));
    assert!(merged["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-4), "{merged}");
    let apart = score(at, text, "--model merged") - score(at, text, "--model out/final --adapter tuned/final");
    assert!(apart.abs() < 1e-3, "{apart}");
}

#[test]
fn an_adapter_that_starts_within_its_matrices_is_resumed_and_merged() {
    for set in [vec!["adapter.init=olora"], vec!["adapter.init=olora", "adapter.quantize=nf4", "adapter.rslora=true"]] {
        let dir = school();
        let at = dir.path();
        trained_and_resumed(at, &set);
        let config = adapter_config(at);
        assert_eq!((&config["r"], &config["tallow"]["adapter_init"]), (&json!(8), &json!("olora")), "{config}");
        merged_says_the_same(at, "fox");
        // An adapter of that rank and alpha that starts elsewhere is another run.
        let other = ["adapter.rank=8", "adapter.alpha=64.0"];
        let other: Vec<&str> = set[1..].iter().copied().chain(other).collect();
        fails(&finetune(at, &other, &["--resume"]), 2, &["`adapter.", "\"olora\"", "the run was started with"]);
        let only_init: Vec<&str> = set[1..].to_vec();
        let words = ["`adapter.init` = \"kaiming\"", "the run was started with \"olora\""];
        fails(&finetune(at, &only_init, &["--resume"]), 2, &words);
    }
    let dir = school();
    let refused = ["adapter.init=olora", "adapter.targets=embed_tokens"];
    fails(&finetune(dir.path(), &refused, &[]), 2, &["adapter.init", "embed_tokens", "kaiming"]);
    fails(&finetune(dir.path(), &["adapter.init=olora", "adapter.kind=dora"], &[]), 2, &["adapter.init", "DoRA"]);
}

#[test]
fn new_tokens_are_trained_beside_an_adapter_and_used_with_it() {
    let dir = school();
    let at = dir.path();
    fs::copy(at.join("chat.jsonl"), at.join("plain.jsonl")).expect("copied");
    let lines = fs::read_to_string(at.join("chat.jsonl")).expect("read").replace("a fox", "<think>a</think> fox");
    fs::write(at.join("chat.jsonl"), lines).expect("written");
    let rows = |at: &Path| -> u64 {
        let text = fs::read(at.join("config.json")).expect("a configuration");
        serde_json::from_slice::<Value>(&text).expect("JSON")["vocab_size"].as_u64().expect("a number")
    };
    let before = rows(&at.join("out/final"));
    let set = ["tokenizer.add_tokens=[\"<think>\", \"</think>\"]"];
    let said = trained_and_resumed(at, &set);
    assert!(said.contains("2 tokens are added"), "{said}");
    let counted = said.lines().find(|line| line.starts_with("note: added tokens in data.train: ")).expect("counts");
    assert!(counted.contains("<think> ") && counted.contains("</think> ") && counted.ends_with(" times"), "{counted}");
    assert!(!said.contains("holds none of the added tokens"), "{said}");
    let config = adapter_config(at);
    let ids = config["trainable_token_indices"].clone();
    let list = ids.as_array().cloned().or_else(|| ids["embed_tokens"].as_array().cloned()).expect("a list");
    assert_eq!(list, [json!(before), json!(before + 1)], "{config}");
    // Seen as one token each, and likelier than before they were taught.
    let adapted = "--model out/final --adapter tuned/final";
    let encoded = object(&tallow(at, "tokenizer encode --tokenizer tuned/final --json --text <think>a"));
    assert_eq!(encoded["ids"][0], json!(before), "{encoded}");
    score(at, "<think>a</think>", adapted);
    let generated = object(&tallow(at, &format!("generate {adapted} --prompt <think> --max-tokens 3 --json")));
    assert!(generated["completion_tokens"].as_u64().is_some_and(|n| n <= 3), "{generated}");
    merged_says_the_same(at, "<think>a</think>");
    assert_eq!(rows(&at.join("merged")), before + 2);
    let words = ["rows of tokens", "`tallow merge` writes a whole model with it, as safetensors"];
    fails(&tallow(at, &format!("convert {adapted} --to gguf --out x.gguf")), 1, &words);
    let words = ["whole models are not written as GGUF yet", "LoRA matrices and nothing else", "safetensors"];
    fails(&tallow(at, "convert --model merged --to gguf --out x.gguf"), 2, &words);
    let two = "--model out/final --adapter tuned/final --adapter tuned/checkpoints/step-4";
    fails(&tallow(at, &format!("score --text fox {two}")), 1, &["rows of tokens"]);
    fails(&tallow(at, &format!("score --text fox {adapted}=0")), 1, &["rows of tokens"]);

    // Behind an adapter whose tokenizer does not know them they are found as well.
    stdout(&finetune(at, &["output=plain", "data.train=['plain.jsonl']"], &[]));
    let (one, two) = ("--adapter plain/final", "--adapter tuned/final");
    let orders = [format!("--model out/final {one} {two}"), format!("--model out/final {two} {one}")];
    let [first, second] = orders.map(|order| score(at, "<think>a</think>", &order));
    assert!((first - second).abs() < 1e-3, "{first} and {second}");

    // A token that no example holds has no gradient, which is no fault of the run's.
    let rare = finetune(at, &["output=rare", "tokenizer.add_tokens=[\"<rare>\"]"], &[]);
    stdout(&rare);
    let said = String::from_utf8_lossy(&rare.stderr).into_owned();
    assert!(said.contains("warning: data.train holds none of the added tokens <rare>"), "{said}");
    let special = finetune(at, &["output=special", "train.steps=1", "tokenizer.add_special_tokens=[\"<rare>\"]"], &[]);
    stdout(&special);
    let said = String::from_utf8_lossy(&special.stderr).into_owned();
    assert!(said.contains("written there as in tokenizer.add_special_tokens?"), "{said}");
    // With other tokens it is another run, whose data only differ with them.
    let words = ["`tokenizer.add_tokens` = [\"<else>\"]", "the run was started with [\"<rare>\"]"];
    fails(&finetune(at, &["output=rare", "tokenizer.add_tokens=[\"<else>\"]"], &["--resume"]), 2, &words);

    // All of the model, with rows for them.
    let whole = ["tokenizer.add_tokens=[\"<think>\"]", "output=whole"];
    let run =
        fs::read_to_string(at.join("tune.toml")).expect("read").replace("[adapter]\nrank = 4\ndropout = 0.1\n", "");
    fs::write(at.join("tune.toml"), &run).expect("written");
    stdout(&finetune(at, &whole, &[]));
    assert_eq!(rows(&at.join("whole/final")), before + 1);
    score(at, "<think>a", "--model whole/final");

    let twice = ["output=x", "tokenizer.add_tokens=[\"<a>\", \"<a>\"]"];
    fails(&finetune(at, &twice, &[]), 2, &["tokenizer.add_tokens", "<a>", "twice"]);
    // The template's own tokens would be found in what a message says.
    let template =
        ["output=x", "tokenizer.chat_template=chatml", "tokenizer.add_tokens=[\"<|im_start|>\", \"<|im_end|>\"]"];
    fails(&finetune(at, &template, &[]), 2, &["tokenizer.add_tokens", "<|im_start|>", "add_special_tokens"]);
    let special = ["output=s", template[1], "tokenizer.add_special_tokens=[\"<|im_start|>\", \"<|im_end|>\"]"];
    stdout(&finetune(at, &special, &[]));
    let known = ["output=x", "tokenizer.add_tokens=[\"a\"]"];
    fails(&finetune(at, &known, &[]), 2, &["tokenizer.add_tokens", "\"a\"", "already"]);
}

#[test]
fn rows_of_tokens_that_there_are_can_be_trained() {
    let dir = school();
    let at = dir.path();
    for quantize in ["none", "nf4"] {
        let quantize = format!("adapter.quantize={quantize}");
        let set = ["adapter.train_tokens=[\"<|endoftext|>\", \"a\"]", "adapter.quantize_embeddings=none", &quantize];
        fs::remove_dir_all(at.join("tuned")).ok();
        trained_and_resumed(at, &set);
        assert!(!adapter_config(at)["trainable_token_indices"].is_null());
        fs::remove_dir_all(at.join("merged")).ok();
        merged_says_the_same(at, "a");
    }
    let unknown = ["output=x", "adapter.train_tokens=[\"<nowhere>\"]"];
    fails(&finetune(at, &unknown, &[]), 2, &["adapter.train_tokens", "<nowhere>", "add_tokens"]);
    let both = ["output=x", "adapter.train_tokens=[\"a\"]", "adapter.targets=embed_tokens"];
    fails(&finetune(at, &both, &[]), 2, &["adapter.train_tokens", "embed_tokens"]);
}
