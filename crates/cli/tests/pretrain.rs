//! `tallow pretrain` and `tallow plan`, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;

use rig::run::{metrics, names, pretrain, story, weights, workshop};
use rig::{fails, object, stdout, tallow};
use serde_json::{Value, json};

#[test]
fn a_run_directory_has_all_that_it_promises() {
    let dir = workshop();
    let output = pretrain(dir.path(), &[], &[]);
    assert_eq!(stdout(&output), "", "progress goes to stderr");
    let run = dir.path().join("out");
    let events = |name: &str| name.starts_with("events.out.tfevents.");
    let plain: Vec<String> = names(&run).into_iter().filter(|name| !events(name)).collect();
    assert_eq!(plain, ["checkpoints", "curve.svg", "final", "metrics.jsonl", "resolved.toml"]);
    assert_eq!(names(&run).iter().filter(|name| events(name)).count(), 1);
    assert!(fs::read_to_string(run.join("curve.svg")).expect("a curve").starts_with("<svg"));
    assert!(names(&run.join("checkpoints")).contains(&"step-12".to_owned()));
    let model = names(&run.join("final"));
    for file in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        assert!(model.contains(&file.to_owned()), "{file} not in {model:?}");
    }

    let lines = metrics(&run);
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("loss").is_some()).collect();
    assert_eq!(steps.len(), 12);
    for (i, line) in steps.iter().enumerate() {
        assert_eq!((&line["step"], &line["tokens"]), (&json!(i + 1), &json!((i + 1) * 4 * 32)));
        for key in ["loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory"] {
            assert!(line[key].as_f64().is_some_and(|x| x > 0.0), "{key} in {line}");
        }
        assert!(line["data_wait_s"].as_f64().is_some_and(|x| x >= 0.0), "{line}");
    }
    let evals: Vec<u64> =
        lines.iter().filter(|l| l.get("valid_loss").is_some()).filter_map(|l| l["step"].as_u64()).collect();
    assert_eq!(evals, [6, 12]);
    let loss = |line: &Value| line["loss"].as_f64().expect("a loss");
    assert!(loss(steps[11]) < loss(steps[0]) - 0.3, "nothing was learnt");

    let resolved: toml::Table =
        toml::from_str(&fs::read_to_string(run.join("resolved.toml")).expect("resolved")).expect("TOML");
    assert_eq!(resolved["steps"].as_integer(), Some(12));
    assert_eq!(resolved["micro_batch_size"].as_integer(), Some(4));
    assert_eq!(resolved["run"]["optimizer"]["weight_decay"].as_float(), Some(0.1));
}

#[test]
fn json_is_all_of_stdout_one_object_a_line() {
    let dir = workshop();
    let output = pretrain(dir.path(), &["train.steps=3", "checkpoint.every=2"], &["--json"]);
    let lines: Vec<Value> =
        stdout(&output).lines().map(|line| serde_json::from_str(line).expect("a JSON object")).collect();
    assert_eq!(lines.iter().filter(|l| l.get("loss").is_some()).count(), 3);
    assert!(lines.iter().any(|l| l["saved"].as_str().is_some_and(|path| path.ends_with("step-2"))));
    assert!(lines.last().expect("lines")["final"].as_str().is_some_and(|path| path.ends_with("final")));
}

#[test]
fn the_same_run_gives_the_same_bytes_and_accumulation_almost_the_same() {
    let dir = workshop();
    let at = |name: &str| dir.path().join(name);
    for (name, more) in [("a", ""), ("b", ""), ("c", "train.micro_batch_size=2"), ("d", "seed=6")] {
        let output = format!("output={name}");
        let set: Vec<&str> = [output.as_str(), more].into_iter().filter(|s| !s.is_empty()).collect();
        stdout(&pretrain(dir.path(), &set, &[]));
    }
    assert_eq!(weights(&at("a")), weights(&at("b")));
    assert_ne!(weights(&at("a")), weights(&at("d")), "the seed does nothing");
    let losses = |name: &str| -> Vec<f64> { metrics(&at(name)).iter().filter_map(|l| l["loss"].as_f64()).collect() };
    for (whole, parts) in losses("a").iter().zip(losses("c")) {
        assert!((whole - parts).abs() < 1e-4 * whole, "{whole} and {parts}");
    }
}

#[test]
fn bf16_padding_and_activation_checkpointing_train() {
    let dir = workshop();
    let first_and_last = |name: &str, set: &[&str]| {
        let output = format!("output={name}");
        let set: Vec<&str> = [&[output.as_str()], set].concat();
        stdout(&pretrain(dir.path(), &set, &[]));
        let losses: Vec<f64> = metrics(&dir.path().join(name)).iter().filter_map(|l| l["loss"].as_f64()).collect();
        (losses[0], losses[losses.len() - 1])
    };
    let (f32_first, f32_last) = first_and_last("f32", &[]);
    let (first, last) = first_and_last("bf16", &["train.dtype=bf16"]);
    assert!((first - f32_first).abs() < 0.02 && (last - f32_last).abs() < 0.1, "{first} {last}");
    let (first, last) = first_and_last("blocks", &["train.activation_checkpointing=blocks"]);
    assert!((first - f32_first).abs() < 1e-5 && (last - f32_last).abs() < 1e-3, "{first} {last}");
    let (first, last) = first_and_last("padded", &["data.packing=false"]);
    assert!(last < first - 0.2, "{first} {last}");
    for kind in ["linear", "wsd", "constant"] {
        let (first, last) = first_and_last(kind, &[&format!("schedule.kind={kind}")]);
        assert!(last < first, "{kind}");
    }
}

#[test]
fn length_in_tokens_and_epochs() {
    let dir = workshop();
    fs::write(
        dir.path().join("run.toml"),
        fs::read_to_string(dir.path().join("run.toml")).expect("read").replace("steps = 12\n", ""),
    )
    .expect("written");
    let plan = |set: &str| object(&tallow(dir.path(), &format!("plan run.toml --json --set {set}")));
    let tokens = plan("train.tokens=1000");
    assert_eq!((&tokens["steps"], &tokens["tokens"]), (&json!(8), &json!(1024)), "rounded up to a whole step");
    let (one, two) = (plan("train.epochs=1"), plan("train.epochs=2.0"));
    let steps = |plan: &Value| plan["steps"].as_u64().expect("steps");
    assert!((2 * steps(&one)).abs_diff(steps(&two)) <= 1);
    let rows = one["train_tokens"].as_u64().expect("tokens").div_ceil(32);
    assert!(steps(&one).abs_diff(rows.div_ceil(4)) <= 1);
}

#[test]
fn plan_says_what_a_run_takes_and_writes_nothing() {
    let dir = workshop();
    let plan = object(&tallow(dir.path(), "plan run.toml --json"));
    let memory = plan["memory"].as_object().expect("buckets");
    let bytes = |key: &str| memory[key].as_u64().expect("bytes");
    let buckets = ["weights", "gradients", "optimizer", "activations", "transient", "fixed"];
    assert_eq!(buckets.iter().map(|key| bytes(key)).sum::<u64>(), bytes("total"));
    let params = plan["params"].as_u64().expect("params");
    // Embedding and head of 300 rows, and per block 4 attention matrices, 3 of the feed-forward, 2 norms; a last norm.
    assert_eq!(params, 2 * 300 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32);
    assert_eq!((bytes("weights"), bytes("gradients"), bytes("optimizer")), (4 * params, 4 * params, 8 * params));
    assert!(plan["flops"].as_f64() > Some(0.0) && plan["expected_s"].as_f64() > Some(0.0));
    let text = stdout(&tallow(dir.path(), "plan run.toml"));
    for word in ["parameters", "steps", "weights", "optimizer", "FLOPs", "time"] {
        assert!(text.contains(word), "no {word} in {text}");
    }
    assert!(!dir.path().join("out").exists());
}

#[test]
fn raw_text_is_prepared_once_and_found_again() {
    let dir = workshop();
    fs::create_dir(dir.path().join("elsewhere")).expect("a folder");
    let raw = ["data.train=['text']", "data.valid=['text/stories.jsonl']", "train.steps=2"];
    let with = |output: &str| {
        let output = format!("output={output}");
        let set: Vec<&str> = [&raw[..], &[output.as_str()]].concat();
        stdout(&pretrain(dir.path(), &set, &[]));
        names(&dir.path().join(".tallow-cache"))
    };
    let first = with("a");
    assert!(!first.is_empty());
    assert_eq!(with("b"), first);
    assert_eq!(weights(&dir.path().join("a")), weights(&dir.path().join("b")));
    let added = json!({ "text": story(999) }).to_string() + "\n";
    fs::write(dir.path().join("text/more.jsonl"), added).expect("written");
    assert!(with("c").len() > first.len(), "other text is other data");
}

#[test]
fn paths_are_relative_to_the_run_file() {
    let dir = workshop();
    let other = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("run.toml");
    let mut command = rig::command();
    command.current_dir(other.path()).args(["pretrain"]).arg(&file).args(["--set", "train.steps=1"]);
    stdout(&command.output().expect("runs"));
    assert!(dir.path().join("out/final").is_dir());
    assert_eq!(names(other.path()), Vec::<String>::new());
}

#[test]
fn an_output_that_holds_another_run_is_refused() {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &["train.steps=1"], &[]));
    let before = weights(&dir.path().join("out"));
    fails(&pretrain(dir.path(), &["train.steps=1"], &[]), 2, &["out", "another run", "--resume"]);
    assert_eq!(weights(&dir.path().join("out")), before);
}

#[test]
fn an_existing_model_is_continued() {
    let dir = workshop();
    stdout(&pretrain(dir.path(), &[], &[]));
    let text = fs::read_to_string(dir.path().join("run.toml")).expect("read");
    let model = &text[text.find("[model]").expect("a section")..text.find("[data]").expect("a section")];
    fs::write(dir.path().join("run.toml"), text.replace(model, "[model]\nfrom = \"out/final\"\n\n")).expect("written");
    stdout(&pretrain(dir.path(), &["output=more", "optimizer.lr=1e-4", "train.steps=3"], &[]));
    let losses = |name: &str| -> Vec<f64> {
        metrics(&dir.path().join(name)).iter().filter_map(|line| line["loss"].as_f64()).collect()
    };
    let (last, next) = (losses("out")[11], losses("more")[0]);
    assert!((last - next).abs() < 0.5, "{next} does not go on from {last}");
    assert!(dir.path().join("more/final/tokenizer.json").is_file(), "the model brought its tokenizer");
    let tokens = "data.context_length=64";
    fails(&pretrain(dir.path(), &["output=x", tokens], &[]), 2, &["data.context_length", "64", "32 positions"]);
    fails(&pretrain(dir.path(), &["output=x", "model.from=nowhere"], &[]), 2, &["model.from", "nowhere"]);
    assert!(!dir.path().join("x").exists());
}

#[test]
fn last_and_best_checkpoints_are_kept() {
    let dir = workshop();
    // A rate this high makes the run worse after a good start.
    let set = [
        "train.steps=24",
        "optimizer.lr=0.5",
        "schedule.warmup_steps=0",
        "eval.every=2",
        "checkpoint.every=2",
        "checkpoint.keep=1",
    ];
    stdout(&pretrain(dir.path(), &set, &[]));
    let run = dir.path().join("out");
    let evals: Vec<(u64, f64)> =
        metrics(&run).iter().filter_map(|line| Some((line["step"].as_u64()?, line["valid_loss"].as_f64()?))).collect();
    let best = evals.iter().min_by(|a, b| a.1.total_cmp(&b.1)).expect("evals").0;
    let mut expected = vec![format!("step-{best}"), "step-24".to_owned()];
    expected.sort();
    expected.dedup();
    assert_eq!(names(&run.join("checkpoints")), expected);
    // A checkpoint is a model like any other.
    let generate = format!("generate --model out/checkpoints/step-{best} --prompt the --max-tokens 3 --json");
    object(&tallow(dir.path(), &generate));
}

#[test]
fn a_loss_that_is_not_finite_follows_the_policy() {
    let dir = workshop();
    let run = |name: &str, more: &[&str]| {
        let output = format!("output={name}");
        let set: Vec<&str> = [&["optimizer.lr=1e30", "checkpoint.every=1"], more, &[output.as_str()]].concat();
        pretrain(dir.path(), &set, &[])
    };
    fails(&run("stop", &[]), 1, &["step ", "the loss is", "optimizer.lr"]);
    fails(&run("skip", &["anomaly.nan=skip", "anomaly.max_skips=3"]), 1, &["after 3 skipped", "anomaly.max_skips"]);
    let skipped = metrics(&dir.path().join("skip"));
    let skipped: Vec<&Value> = skipped.iter().filter(|line| line["skipped"] == json!(true)).collect();
    assert_eq!(skipped.len(), 3);
    assert!(skipped.iter().all(|line| line["loss"].is_null()), "JSON has no NaN");
    let back = ["anomaly.nan=rollback", "anomaly.max_rollbacks=2"];
    fails(&run("back", &back), 1, &["rolled back to step", "after 2 rollbacks", "anomaly.max_rollbacks"]);
    for name in ["stop", "skip", "back"] {
        assert!(dir.path().join(name).join("curve.svg").is_file(), "{name}: what there is to see is drawn");
        assert!(!dir.path().join(name).join("final").exists(), "{name}");
    }
}

/// The stories, and a document of noise among them: rows of it are spikes of the loss.
fn noisy(dir: &Path) {
    let noise = |i: u32| char::from(33 + (i.wrapping_mul(2_654_435_761) >> 13) as u8 % 90);
    let mut lines: String = (0..120).map(|i| json!({ "text": story(i) }).to_string() + "\n").collect();
    lines += &(json!({ "text": (0..400).map(noise).collect::<String>() }).to_string() + "\n");
    fs::write(dir.join("noisy.jsonl"), lines).expect("written");
}

#[test]
fn spikes_are_skipped_or_rolled_back() {
    let dir = workshop();
    noisy(dir.path());
    let run = |policy: &str| {
        let (spike, output) = (format!("anomaly.spike={policy}"), format!("output={policy}"));
        let set = [
            "data.train=['noisy.jsonl']",
            "data.valid=[]",
            "train.steps=200",
            "train.batch_size=1",
            "optimizer.lr=3e-3",
            "checkpoint.every=10",
            "anomaly.window=16",
            "anomaly.spike_factor=12",
            "anomaly.max_rollbacks=50",
            &spike,
            &output,
        ];
        pretrain(dir.path(), &set, &[])
    };
    fails(&run("stop"), 1, &["the loss spikes to"]);
    for policy in ["skip", "rollback"] {
        let output = run(policy);
        stdout(&output);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = if policy == "skip" { "the step is skipped" } else { "rolled back to step" };
        assert!(message.contains(said), "{message}");
        let lines = metrics(&dir.path().join(policy));
        let steps: Vec<u64> = lines.iter().filter_map(|line| line["step"].as_u64()).collect();
        assert_eq!(steps, (1..=200).collect::<Vec<u64>>(), "{policy}: every step once");
        assert_eq!(lines.iter().any(|line| line["skipped"] == json!(true)), policy == "skip");
    }
}
