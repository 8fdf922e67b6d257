//! `finetune`, `merge` and adapters in the other commands, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;

use rig::run::{names, trajectory};
use rig::school::{RUN, finetune, school};
use rig::{fails, object, stdout, tallow};
use serde_json::json;

#[test]
fn an_adapter_is_trained_resumed_used_and_merged() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(at, &[], &[]));
    let adapter = at.join("tuned/final/adapter_model.safetensors");
    let (whole, told) = (fs::read(&adapter).expect("an adapter"), trajectory(&at.join("tuned")));
    assert!(!at.join("tuned/final/model.safetensors").exists(), "the base is not saved");

    // From the checkpoint of step 2 on, as if nothing had come after it.
    for name in names(&at.join("tuned/checkpoints")).iter().filter(|name| *name != "step-2") {
        fs::remove_dir_all(at.join("tuned/checkpoints").join(name)).expect("removed");
    }
    fs::remove_dir_all(at.join("tuned/final")).expect("removed");
    stdout(&finetune(at, &[], &["--resume"]));
    assert!(fs::read(&adapter).expect("an adapter") == whole, "other weights after resuming");
    assert_eq!(trajectory(&at.join("tuned")), told);
    fails(&finetune(at, &["adapter.rank=2"], &["--resume"]), 2, &["adapter"]);

    let score = |more: &str| object(&tallow(at, &format!("score --text fox --json {more}")))["nll"].as_f64();
    let (base, tuned) = (score("--model out/final"), score("--model out/final --adapter tuned/final"));
    assert!(base.is_some() && base != tuned);
    let merged = object(&tallow(at, "merge --model out/final --adapter tuned/final --out merged --json"));
    assert!(merged["max_logit_difference"].as_f64().is_some_and(|x| x < 1e-4), "{merged}");
    assert!(merged["mean_kl"].as_f64().is_some_and(|x| x.abs() < 1e-6) && merged["argmax_differs"] == 0, "{merged}");
    let apart = score("--model merged").zip(tuned).map(|(a, b)| (a - b).abs());
    assert!(apart.is_some_and(|x| x < 1e-3), "{apart:?}");
    fails(&tallow(at, "merge --model out/final --adapter tuned/final --out merged"), 2, &["exists already"]);
    let generated =
        object(&tallow(at, "generate --model out/final --adapter tuned/final --prompt fox --max-tokens 3 --json"));
    assert!(generated["completion_tokens"].as_u64().is_some_and(|n| n <= 3));
}

#[test]
fn dora_full_weights_and_early_stopping_run() {
    let dir = school();
    let at = dir.path();
    stdout(&finetune(
        at,
        &["adapter.kind=dora", "output=dora", "adapter.lr_ratio=4", "objective.neftune_alpha=5"],
        &[],
    ));
    assert!(at.join("dora/final/adapter_config.json").is_file());
    // A rate at which nothing changes.
    let set = ["output=stopped", "optimizer.lr=1e-12", "eval.every=1", "eval.patience=1", "train.steps=50"];
    let out = finetune(at, &set, &[]);
    let told = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && told.contains("eval.patience"), "{told}");
    let text = RUN.split("[adapter]").next().expect("a part").to_owned()
        + "[train]\nsteps = 2\nbatch_size = 2\n[optimizer]\nlr = 1e-3\n";
    fs::write(at.join("tune.toml"), text).expect("written");
    stdout(&finetune(at, &["output=full"], &[]));
    assert!(at.join("full/final/model.safetensors").is_file());
}

#[test]
fn mistakes_name_the_key_or_the_line() {
    let dir = school();
    let at = dir.path();
    fails(&finetune(at, &["adapter.rank=1000"], &[]), 2, &["adapter.rank", "1000"]);
    fails(&finetune(at, &["adapter.targets=q_prj"], &[]), 2, &["adapter.targets", "q_proj"]);
    fails(&finetune(at, &["model.from=nowhere"], &[]), 2, &["model.from"]);
    fails(&finetune(at, &["tokenizer.chat_template=chatml"], &[]), 2, &["tokenizer.chat_template", "<|im_"]);
    fails(&finetune(at, &["data.train=['none.jsonl']"], &[]), 2, &["data.train", "none.jsonl"]);
    fs::write(at.join("bad.jsonl"), "{\"messages\": [{\"content\": \"x\"}]}\n").expect("written");
    fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &["bad.jsonl, line 1", "role"]);
    let empty = json!({ "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "" }] });
    fs::write(at.join("bad.jsonl"), format!("{empty}\n")).expect("written");
    fails(&finetune(at, &["data.train=['bad.jsonl']"], &[]), 2, &["bad.jsonl, line 1"]);
    fails(&tallow(at, "generate --model out/final --adapter out --prompt x"), 1, &["adapter_config.json"]);
    fails(&tallow(at, "pretrain tune.toml"), 2, &["tallow finetune"]);
}
