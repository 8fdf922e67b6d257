//! `tallow generate`, `score` and `bench`, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::path::Path;
use std::process::{Output, Stdio};

use rig::run::{model, pretrain, workshop};
use rig::{command, fails, object, stdout, tallow};
use serde_json::{Value, json};

const PROMPT: &str = "the miller went over";

/// `tallow generate` with a prompt and more flags.
fn generate(dir: &Path, flags: &str) -> Output {
    let mut command = command();
    command.current_dir(dir).args(["generate", "--model", "out/final", "--prompt", PROMPT]);
    command.args(flags.split_whitespace()).output().expect("runs")
}

fn ids(answer: &Value) -> Vec<u64> {
    answer["ids"].as_array().expect("ids").iter().filter_map(Value::as_u64).collect()
}

#[test]
fn json_has_the_shape_of_the_contract() {
    let dir = workshop();
    model(dir.path());
    let answer = object(&generate(dir.path(), "--max-tokens 8 --temperature 0 --json"));
    let keys: Vec<&String> = answer.as_object().expect("object").keys().collect();
    assert_eq!(keys, ["text", "ids", "finish_reason", "prompt_tokens", "completion_tokens"]);
    assert_eq!(answer["completion_tokens"].as_u64(), Some(ids(&answer).len() as u64));
    assert_eq!(answer["finish_reason"], "length");
    let encode = ["tokenizer", "encode", "--tokenizer", "out/final", "--text", PROMPT, "--json"];
    let encoded = object(&command().args(encode).current_dir(dir.path()).output().expect("runs"));
    assert_eq!(answer["prompt_tokens"].as_u64(), encoded["ids"].as_array().map(|ids| ids.len() as u64));
    let list: Vec<String> = ids(&answer).iter().map(u64::to_string).collect();
    let decode = format!("tokenizer decode --tokenizer out/final --ids {} --skip-special --json", list.join(","));
    assert_eq!(object(&tallow(dir.path(), &decode))["text"], answer["text"]);
}

#[test]
fn the_stream_is_prompt_and_text() {
    let dir = workshop();
    model(dir.path());
    for flags in ["--max-tokens 12 --seed 3", "--max-tokens 0", "--max-tokens 9 --seed 4 --stop e"] {
        let answer = object(&generate(dir.path(), &format!("{flags} --json")));
        let text = answer["text"].as_str().expect("text");
        assert_eq!(stdout(&generate(dir.path(), flags)), format!("{PROMPT}{text}\n"), "{flags}");
    }
}

#[test]
fn a_chat_template_that_is_not_applied_is_told() {
    let dir = workshop();
    model(dir.path());
    let told = || {
        let out = generate(dir.path(), "--max-tokens 1");
        stdout(&out);
        String::from_utf8_lossy(&out.stderr).contains("`tallow chat` applies it")
    };
    assert!(!told());
    std::fs::write(dir.path().join("out/final/chat_template.jinja"), "{{ messages[0].content }}").expect("written");
    assert!(told());
}

#[test]
fn text_appears_while_it_is_made() {
    let dir = workshop();
    model(dir.path());
    let mut command = command();
    command.current_dir(dir.path()).args(["generate", "--model", "out/final", "--prompt", "the", "--max-tokens", "20"]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("runs");
    let mut first = [0u8; 3];
    std::io::Read::read_exact(child.stdout.as_mut().expect("stdout"), &mut first).expect("the prompt comes first");
    assert_eq!(&first, b"the");
    // The reader goes away: not a failure, and no panic.
    drop(child.stdout.take());
    assert!(child.wait().expect("ends").success());
}

#[test]
fn every_sampler_flag_does_what_it_says() {
    let dir = workshop();
    model(dir.path());
    let with = |flags: &str| ids(&object(&generate(dir.path(), &format!("--max-tokens 10 --json {flags}"))));
    let greedy = with("--temperature 0");
    assert_eq!(with("--temperature 0 --seed 9"), greedy, "nothing is drawn");
    assert_eq!(with("--top-k 1"), greedy);
    assert_eq!(with("--top-p 0.000001"), greedy);
    assert_eq!(with("--min-p 1"), greedy);
    assert_eq!(with("--seed 7"), with("--seed 7"));
    assert_ne!(with("--seed 7 --temperature 2"), with("--seed 8 --temperature 2"));
    assert_eq!(with("--temperature 0 --logit-bias 70=1000"), vec![70; 10]);
    let banned = format!("--temperature 0 --logit-bias {}=-inf", greedy[0]);
    assert!(!with(&banned).contains(&greedy[0]));
    for penalty in ["--repetition-penalty 50", "--presence-penalty 100", "--frequency-penalty 100"] {
        let mut seen = with(&format!("--temperature 0 --repeat-last-n -1 {penalty}"));
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10, "{penalty}: a token came twice");
    }
    let text = object(&generate(dir.path(), "--max-tokens 10 --temperature 0 --json"));
    let text = text["text"].as_str().expect("text");
    let stop = text.chars().nth(text.chars().count() / 2).expect("some text").to_string();
    let mut stopped = command();
    stopped.current_dir(dir.path()).args([
        "generate",
        "--model",
        "out/final",
        "--prompt",
        PROMPT,
        "--temperature",
        "0",
    ]);
    let answer = object(&stopped.args(["--max-tokens", "10", "--stop", &stop, "--json"]).output().expect("runs"));
    assert_eq!(answer["finish_reason"], "stop");
    assert_eq!(answer["text"].as_str(), text.split(&stop).next());
}

#[test]
fn generation_ends_where_the_positions_do() {
    let dir = workshop();
    model(dir.path());
    let answer = object(&generate(dir.path(), "--max-tokens 1000 --temperature 0 --logit-bias 70=1000 --json"));
    let (prompt, made) = (answer["prompt_tokens"].as_u64().expect("n"), ids(&answer).len() as u64);
    assert!((32..=33).contains(&(prompt + made)), "{prompt} and {made}");
    assert_eq!(answer["finish_reason"], "length");
    let long = "the river ".repeat(40);
    let mut command = command();
    command.current_dir(dir.path()).args(["generate", "--model", "out/final", "--prompt", &long]);
    fails(&command.output().expect("runs"), 1, &["32 positions"]);
}

#[test]
fn scores_are_those_of_the_model_that_generates() {
    let dir = workshop();
    model(dir.path());
    let answer = object(&generate(dir.path(), "--max-tokens 5 --temperature 0 --json"));
    let encode = ["tokenizer", "encode", "--tokenizer", "out/final", "--text", PROMPT];
    let prompt = stdout(&command().args(encode).current_dir(dir.path()).output().expect("runs"));
    let all: Vec<String> =
        prompt.trim().split(',').map(str::to_owned).chain(ids(&answer).iter().map(u64::to_string)).collect();
    let score = object(&tallow(dir.path(), &format!("score --model out/final --ids {} --top 3 --json", all.join(","))));
    let keys: Vec<&String> = score.as_object().expect("object").keys().collect();
    assert_eq!(keys, ["ids", "logprobs", "top", "nll", "tokens", "perplexity"]);
    let scored: Vec<String> = score["ids"].as_array().expect("ids").iter().map(Value::to_string).collect();
    assert_eq!(scored, all, "nothing is put in front of --ids");
    let logprobs = score["logprobs"].as_array().expect("logprobs");
    assert!(logprobs[0].is_null() && logprobs.len() == all.len());
    let sum: f64 = logprobs.iter().filter_map(Value::as_f64).sum();
    let (nll, tokens) = (score["nll"].as_f64().expect("nll"), score["tokens"].as_f64().expect("tokens"));
    assert!((nll + sum).abs() < 1e-9 && tokens == all.len() as f64 - 1.0);
    assert!((score["perplexity"].as_f64().expect("perplexity") - (nll / tokens).exp()).abs() < 1e-9);
    let made = ids(&answer);
    for (i, id) in made.iter().enumerate() {
        let top = score["top"][all.len() - made.len() + i - 1].as_array().expect("top");
        assert_eq!(top.len(), 3);
        assert_eq!(top[0][0].as_u64(), Some(*id), "the likeliest token is the greedy one");
        assert!(top.windows(2).all(|pair| pair[0][1].as_f64() >= pair[1][1].as_f64()));
        assert!(
            (top[0][1].as_f64().expect("p") - logprobs[all.len() - made.len() + i].as_f64().expect("p")).abs() < 1e-5
        );
    }
    // The same ids as text, from a file and from standard input.
    std::fs::write(dir.path().join("text.txt"), PROMPT).expect("written");
    let by_file = object(&tallow(dir.path(), "score --model out/final --input text.txt --json"));
    let text = ["score", "--model", "out/final", "--json", "--text", PROMPT];
    assert_eq!(object(&command().args(text).current_dir(dir.path()).output().expect("runs")), by_file);
    let table = stdout(&tallow(dir.path(), "score --model out/final --input text.txt --top 2"));
    assert!(table.contains("perplexity") && table.contains("next:"), "{table}");
}

#[test]
fn wrong_flags_leave_with_2_and_name_the_flag() {
    let dir = workshop();
    model(dir.path());
    for (flags, words) in [
        ("--temperature -1", &["--temperature -1", "0.8"][..]),
        ("--top-p 0", &["--top-p 0", "0.95"]),
        ("--min-p 2", &["--min-p 2"]),
        ("--repetition-penalty 0", &["--repetition-penalty 0"]),
        ("--repeat-last-n 0 --presence-penalty 1", &["--repeat-last-n 0"]),
        ("--logit-bias 5", &["--logit-bias", "ID=BIAS"]),
        ("--logit-bias 5=nan", &["--logit-bias"]),
        ("--logit-bias 99999=1", &["--logit-bias", "99999", "0 to 299"]),
        ("--top-k many", &["--top-k", "many"]),
        ("--adaptor x", &["--adaptor"]),
    ] {
        fails(&generate(dir.path(), &format!("{flags} --json")), 2, words);
    }
    let empty_stop = ["generate", "--model", "out/final", "--prompt", "a", "--stop", "", "--json"];
    fails(&command().args(empty_stop).current_dir(dir.path()).output().expect("runs"), 2, &["--stop"]);
    fails(&tallow(dir.path(), "generate --model out/final"), 2, &["--prompt"]);
    fails(&tallow(dir.path(), "score --model out/final --json"), 2, &["--text", "--ids"]);
    fails(&tallow(dir.path(), "score --model out/final --ids 1,300 --json"), 1, &["300", "vocabulary"]);
    fails(&tallow(dir.path(), "generate --model nowhere --prompt a"), 1, &["nowhere"]);
}

#[test]
fn benches_report_the_contract_s_keys() {
    let dir = workshop();
    let train = "bench train --dim 32 --layers 1 --heads 2 --kv-heads 1 --ffn 48 --context 16 --vocab 50 --batch 2";
    for dtype in ["f32", "bf16"] {
        let report = object(&tallow(
            dir.path(),
            &format!("{train} --dtype {dtype} --steps 2 --warmup 1 --tied --threads 2 --device cpu --json"),
        ));
        for key in ["tokens_per_s", "step_ms", "model_gflops", "mfu", "peak_bytes", "params", "loss"] {
            assert!(report[key].as_f64().is_some_and(|x| x > 0.0), "{key} in {report}");
        }
        // Tied embedding, one block with a shared key/value head, two norms and the last one.
        assert_eq!(report["params"], json!(50 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32));
    }
    stdout(&pretrain(dir.path(), &["train.steps=1"], &[]));
    let report = object(&tallow(
        dir.path(),
        "bench generate --model out/final --prompt 20 --decode 5 --runs 2 --threads 2 --batch 1 --json",
    ));
    let keys: Vec<&String> = report.as_object().expect("object").keys().collect();
    assert_eq!(keys, ["prompt_tokens_per_s", "decode_tokens_per_s", "load_s", "peak_bytes"]);
    assert!(report.as_object().expect("object").values().all(|x| x.as_f64().is_some_and(|x| x > 0.0)), "{report}");
    for line in stdout(&tallow(dir.path(), "bench ops --filter rms --json")).lines() {
        let line: Value = serde_json::from_str(line).expect("a JSON object");
        assert!(line["op"].as_str().is_some_and(|op| op.contains("rms")), "{line}");
        assert!(line["forward_ms"].as_f64() > Some(0.0) && line["peak_fraction"].as_f64() > Some(0.0), "{line}");
    }
    for (args, word) in [
        ("bench train --steps 0", "--steps"),
        ("bench train --device cuda", "--device"),
        ("bench train --dim 30 --heads 4", "hidden_size"),
        ("bench generate --model out/final --prompt 0", "--prompt"),
        ("bench generate --model out/final --prompt 500", "--prompt"),
        ("bench generate --model out/final --prompt 5 --decode 5 --batch 2", "--batch"),
        ("bench ops --filter nothing-like-it", "--filter"),
    ] {
        fails(&tallow(dir.path(), args), 2, &[word]);
    }
}
