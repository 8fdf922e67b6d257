//! `tallow tokenizer`, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use rig::{command, fails, object, stdout, tallow};
use serde_json::{Value, json};

/// A folder with a small corpus of three kinds of files.
fn corpus() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let text = dir.path().join("text");
    fs::create_dir(&text).expect("a folder");
    let story = "The miller's daughter walked to the mill, and the mill stood still. ";
    fs::write(text.join("a.txt"), story.repeat(40)).expect("written");
    let lines: String = (0..30).map(|i| json!({ "text": format!("line {i}: {story}") }).to_string() + "\n").collect();
    fs::write(text.join("b.jsonl"), lines).expect("written");
    dir
}

fn train(dir: &Path, kind: &str, size: usize) {
    stdout(&tallow(dir, &format!("tokenizer train --input text --vocab-size {size} --kind {kind} --out {kind}.json")));
}

#[test]
fn train_encode_decode_round_trip() {
    let dir = corpus();
    let args = "tokenizer train --input text --vocab-size 290 --kind bpe --pre gpt-2 --out tokenizer.json --json";
    let made = object(&tallow(dir.path(), args));
    assert_eq!((&made["vocab_size"], &made["pre"], &made["documents"]), (&json!(290), &json!("gpt-2"), &json!(31)));

    let text = "The mill — était 磨坊 🙂\n stood\tstill.";
    fs::write(dir.path().join("in.txt"), text).expect("written");
    let encoded = object(&tallow(dir.path(), "tokenizer encode --tokenizer tokenizer.json --input in.txt --json"));
    let keys: Vec<&String> = encoded.as_object().expect("object").keys().collect();
    assert_eq!(keys, ["ids", "tokens"]);
    let ids: Vec<String> = encoded["ids"].as_array().expect("list").iter().map(Value::to_string).collect();
    assert_eq!(encoded["tokens"].as_array().map(Vec::len), Some(ids.len()));
    assert!(ids.len() < text.len(), "merges were learned");

    let decode = format!("tokenizer decode --tokenizer tokenizer.json --ids {}", ids.join(","));
    assert_eq!(stdout(&tallow(dir.path(), &decode)), text, "exactly the text where no terminal reads it");
    assert_eq!(object(&tallow(dir.path(), &format!("{decode} --json"))), json!({ "text": text }));
    let plain = stdout(&tallow(dir.path(), "tokenizer encode --tokenizer tokenizer.json --input in.txt"));
    assert_eq!(plain, ids.join(",") + "\n");
    fs::write(dir.path().join("ids.txt"), plain).expect("written");
    assert_eq!(stdout(&tallow(dir.path(), "tokenizer decode --tokenizer tokenizer.json --input ids.txt")), text);
}

#[test]
fn every_kind_trains() {
    let dir = corpus();
    for kind in ["bpe", "wordpiece", "unigram"] {
        train(dir.path(), kind, 360);
        let encoded =
            object(&tallow(dir.path(), &format!("tokenizer encode --tokenizer {kind}.json --text mill --json")));
        assert!(!encoded["ids"].as_array().expect("list").is_empty(), "{kind}");
    }
}

#[test]
fn special_tokens_in_text_stay_text_unless_asked() {
    let dir = corpus();
    let args = "tokenizer train --input text --vocab-size 300 --special <|endoftext|> --special <|user|> --out t.json";
    stdout(&tallow(dir.path(), args));
    let encode = "tokenizer encode --tokenizer t.json --text <|user|> --json";
    let as_text = object(&tallow(dir.path(), encode));
    assert!(as_text["ids"].as_array().expect("list").len() > 1);
    let parsed = object(&tallow(dir.path(), &format!("{encode} --parse-special")));
    assert_eq!(parsed, json!({ "ids": [1], "tokens": ["<|user|>"] }));
    assert_eq!(stdout(&tallow(dir.path(), "tokenizer decode --tokenizer t.json --ids 1 --skip-special")), "");
}

#[test]
fn standard_input_is_text_too() {
    let dir = corpus();
    train(dir.path(), "bpe", 290);
    let mut command = command();
    command.args(["tokenizer", "encode", "--tokenizer", "bpe.json", "--input", "-"]).current_dir(dir.path());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("runs");
    std::io::Write::write_all(&mut child.stdin.take().expect("stdin"), b"the mill").expect("written");
    let piped = stdout(&child.wait_with_output().expect("ends"));
    fs::write(dir.path().join("in.txt"), "the mill").expect("written");
    assert_eq!(piped, stdout(&tallow(dir.path(), "tokenizer encode --tokenizer bpe.json --input in.txt")));
}

#[test]
fn wrong_usage_leaves_with_2_and_says_what_is_right() {
    let dir = corpus();
    train(dir.path(), "bpe", 290);
    let encode = "tokenizer encode --tokenizer bpe.json";
    for (args, words) in [
        ("tokenizer train --input text --out t.json", &["--vocab-size"][..]),
        ("tokenizer train --input text --vocab-size 300 --kind bpee --out t.json", &["bpee", "wordpiece"]),
        ("tokenizer train --input text --vocab-size 300 --pre gpt2000 --out t.json", &["gpt2000", "llama-bpe"]),
        ("tokenizer train --input text --vocab-size 10 --out t.json", &["--vocab-size 10"]),
        (encode, &["--text", "--input"]),
        (&format!("{encode} --text a --input b"), &["cannot be used with"]),
        ("tokenizer decode --tokenizer bpe.json --ids 1,x", &["--ids", "x"]),
    ] {
        fails(&tallow(dir.path(), args), 2, words);
    }
    assert!(!dir.path().join("t.json").exists(), "nothing was written");
}

#[test]
fn bad_files_leave_with_1_and_name_the_file() {
    let dir = corpus();
    train(dir.path(), "bpe", 290);
    fs::write(dir.path().join("broken.json"), "{\"model\": ").expect("written");
    fs::write(dir.path().join("latin1.txt"), b"caf\xe9").expect("written");
    fs::write(dir.path().join("words.txt"), "1 2 three").expect("written");
    for (args, words) in [
        ("tokenizer train --input nowhere --vocab-size 300 --out t.json", &["nowhere"][..]),
        ("tokenizer encode --tokenizer absent.json --text a", &["absent.json"]),
        ("tokenizer encode --tokenizer broken.json --text a", &["broken.json"]),
        ("tokenizer encode --tokenizer bpe.json --input latin1.txt", &["latin1.txt", "UTF-8", "byte 3"]),
        ("tokenizer encode --tokenizer bpe.json --input absent.txt", &["absent.txt"]),
        ("tokenizer decode --tokenizer bpe.json --ids 999999", &["999999", "290"]),
        ("tokenizer decode --tokenizer bpe.json --input words.txt", &["words.txt", "entry 3", "three"]),
    ] {
        fails(&tallow(dir.path(), args), 1, words);
    }
}

#[test]
fn help_has_examples() {
    let dir = tempfile::tempdir().expect("a folder");
    for command in ["train", "encode", "decode"] {
        let help = stdout(&tallow(dir.path(), &format!("tokenizer {command} --help")));
        assert!(help.contains("Examples:") && help.contains(&format!("tallow tokenizer {command} ")), "{help}");
    }
}
