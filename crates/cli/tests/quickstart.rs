//! `tallow quickstart`, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rig::run::{metrics, names, workshop};
use rig::{command, fails, stdout, tallow};

/// The quickstart over the workshop's text, with a model that trains in a moment.
fn quickstart(dir: &Path, more: &str) -> Command {
    let small = "quickstart --input text --out quick --set model.hidden_size=32 --set model.num_attention_heads=2 \
                 --set model.num_key_value_heads=2 --set model.intermediate_size=48 --set data.context_length=32";
    let mut command = command();
    command.current_dir(dir).args(small.split_whitespace()).args(more.split_whitespace());
    command
}

#[test]
fn it_ends_with_a_curve_a_model_and_samples() {
    let dir = workshop();
    let output = quickstart(dir.path(), "--set train.steps=60").output().expect("runs");
    let written = stdout(&output);
    assert!(written.contains("The people of the United States"), "{written}");
    let quick = dir.path().join("quick");
    for name in ["tokenizer.json", "run.toml", "curve.svg", "metrics.jsonl", "samples.txt", "final", "data"] {
        assert!(quick.join(name).exists(), "no {name} in {:?}", names(&quick));
    }
    assert_eq!(fs::read_to_string(quick.join("samples.txt")).expect("samples"), written);
    let losses: Vec<f64> = metrics(&quick).iter().filter_map(|line| line["loss"].as_f64()).collect();
    assert!(losses.len() == 60 && losses[59] < losses[0] - 0.5, "{losses:?}");

    fs::write(quick.join("notes.txt"), "mine").expect("written");
    fails(&quickstart(dir.path(), "").output().expect("runs"), 2, &["quick", "--overwrite"]);
    stdout(&quickstart(dir.path(), "--set train.steps=60 --overwrite").output().expect("runs"));
    assert_eq!(fs::read_to_string(quick.join("notes.txt")).expect("kept"), "mine");
    assert_eq!(metrics(&quick).iter().filter(|line| line.get("loss").is_some()).count(), 60);
}

#[test]
fn stopped_it_goes_on_as_any_other_run() {
    let dir = workshop();
    let mut command = quickstart(dir.path(), "--set train.steps=100000 --set eval.every=0");
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs");
    let begin = Instant::now();
    while !dir.path().join("quick/metrics.jsonl").is_file() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the run does not start");
        std::thread::sleep(Duration::from_millis(2));
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill runs").success());
    fails(&child.wait_with_output().expect("ends"), 130, &["tallow pretrain quick/run.toml --resume"]);
    let done = names(&dir.path().join("quick/checkpoints"))[0].replace("step-", "").parse::<u64>().expect("a step");
    let shorter = format!("--set train.steps={} --set schedule.warmup_steps=0", done + 40);
    let resume = format!("pretrain quick/run.toml --resume {shorter}");
    stdout(&tallow(dir.path(), &resume));
    assert!(dir.path().join("quick/final/model.safetensors").is_file());
}

#[test]
fn mistakes_are_found_before_anything_is_made() {
    let dir = workshop();
    for (more, word) in [("--set train.stepz=1", "`steps`"), ("--set train.batch_size=0", "train.batch_size")] {
        fails(&quickstart(dir.path(), more).output().expect("runs"), 2, &[word]);
    }
    fs::create_dir(dir.path().join("quick")).expect("made");
    fs::write(dir.path().join("quick/config.json"), "{\"model_type\": \"llama\"}").expect("written");
    fails(&quickstart(dir.path(), "").output().expect("runs"), 2, &["quick", "holds a model (config.json)"]);
    assert_eq!(names(&dir.path().join("quick")), ["config.json"]);
    fs::remove_dir_all(dir.path().join("quick")).expect("removed");
    fails(&tallow(dir.path(), "quickstart --input absent --out quick"), 1, &["absent"]);
}
