//! `tallow data`, driven as a process.
#![allow(clippy::expect_used, reason = "a test")]

mod rig;

use std::fs;

use rig::{fails, object, stdout, tallow};
use serde_json::{Value, json};

/// A folder with `text/` and a tokenizer trained on it.
fn corpus() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let text = dir.path().join("text");
    fs::create_dir(&text).expect("a folder");
    let line = |i: usize| format!("Document {i} tells of the river, and of the {} boats on it.", i * 7);
    let lines: String = (0..200).map(|i| json!({ "text": line(i), "id": i }).to_string() + "\n").collect();
    fs::write(text.join("a.jsonl"), lines).expect("written");
    fs::write(text.join("b.txt"), "First story.\n\nSecond story.\n").expect("written");
    stdout(&tallow(dir.path(), "tokenizer train --input text --vocab-size 280 --out tokenizer.json"));
    dir
}

const PREPARE: &str = "data prepare --input text --tokenizer tokenizer.json --out data";

#[test]
fn prepare_inspect_verify() {
    let dir = corpus();
    let report = object(&tallow(dir.path(), &format!("{PREPARE} --valid-fraction 0.1 --json")));
    let documents = |split: &str| report[split]["documents"].as_u64().expect("a number");
    assert_eq!(documents("train") + documents("valid"), 201);
    assert!(documents("valid") > 0);
    assert_eq!(report["read"]["documents"], 201);

    let seen = object(&tallow(dir.path(), "data inspect data --tokenizer tokenizer.json --documents 2 --json"));
    let splits = seen["splits"].as_array().expect("list");
    assert_eq!(splits.len(), 2);
    assert_eq!(splits[0]["index"]["num_documents"], report["train"]["documents"]);
    let text = splits[0]["first_texts"][0].as_str().expect("a text");
    assert!(text.starts_with("Document ") && text.ends_with("<|endoftext|>"), "{text}");
    let shown = stdout(&tallow(dir.path(), "data inspect data/train --tokenizer tokenizer.json"));
    assert!(shown.contains("vocabulary 280") && shown.contains("Document "), "{shown}");

    let verified = object(&tallow(dir.path(), "data verify data --json"));
    assert_eq!(verified["damaged"], json!([]));
    assert_eq!(verified["shards"], 2);
}

#[test]
fn one_flipped_byte_is_found() {
    let dir = corpus();
    stdout(&tallow(dir.path(), PREPARE));
    let seen = object(&tallow(dir.path(), "data inspect data --json"));
    let file = seen["splits"][0]["index"]["shards"][0]["file"].as_str().expect("a name").to_owned();
    let path = dir.path().join("data/train").join(&file);
    let mut bytes = fs::read(&path).expect("read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).expect("written");
    fails(&tallow(dir.path(), "data verify data"), 1, &[&file, "sha256"]);
    let output = tallow(dir.path(), "data verify data --json");
    let found: Value = serde_json::from_slice(&output.stdout).expect("one JSON object, damaged or not");
    assert_eq!((output.status.code(), found["damaged"].as_array().map(Vec::len)), (Some(1), Some(1)));
}

#[test]
fn plain_text_is_cut_as_asked() {
    let dir = corpus();
    let documents = |args: &str| {
        let args = format!("data prepare --input text/b.txt --tokenizer tokenizer.json --json {args}");
        object(&tallow(dir.path(), &args))["train"]["documents"].as_u64().expect("a number")
    };
    assert_eq!(documents("--out one"), 1);
    assert_eq!(documents("--out two --split blank-lines"), 2);
    assert_eq!(documents("--out three --separator story"), 3);
}

#[test]
fn malformed_records_are_named_never_lost_in_silence() {
    let dir = corpus();
    let mut lines = fs::read_to_string(dir.path().join("text/a.jsonl")).expect("read");
    lines.push_str("{\"text\": oops}\n");
    fs::write(dir.path().join("text/a.jsonl"), &lines).expect("written");
    let output = tallow(dir.path(), &format!("{PREPARE} --json"));
    assert_eq!(object(&output)["read"]["num_malformed"], 1);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("a.jsonl") && message.contains("line 201"), "{message}");
    let strict = format!("{PREPARE}2 --on-malformed error");
    fails(&tallow(dir.path(), &strict), 1, &["a.jsonl", "line 201"]);
    assert!(!dir.path().join("data2").exists(), "nothing half-written");
}

#[test]
fn wrong_usage_leaves_with_2() {
    let dir = corpus();
    stdout(&tallow(dir.path(), PREPARE));
    let other = "data prepare --input text --tokenizer tokenizer.json --out other";
    for (args, words) in [
        (PREPARE.to_owned(), &["data", "--overwrite"][..]),
        (format!("{other} --valid-fraction 0.9"), &["--valid-fraction 0.9"]),
        (format!("{other} --shard-tokens 0"), &["--shard-tokens 0"]),
        (format!("{other} --separator a --split blank-lines"), &["cannot be used with"]),
        ("data prepare --input text --out other".into(), &["--tokenizer"]),
        ("data inspect".into(), &["DIR"]),
    ] {
        fails(&tallow(dir.path(), &args), 2, words);
    }
    stdout(&tallow(dir.path(), &format!("{PREPARE} --overwrite")));

    // A tokenizer without an end-of-text token.
    stdout(&tallow(
        dir.path(),
        "tokenizer train --input text --vocab-size 270 --special <x> --out bare/tokenizer.json",
    ));
    let bare = "data prepare --input text --tokenizer bare --out other";
    fails(&tallow(dir.path(), bare), 2, &["--no-eos"]);
    stdout(&tallow(dir.path(), &format!("{bare} --no-eos")));

    stdout(&tallow(dir.path(), "tokenizer train --input text --vocab-size 270 --out foreign"));
    fails(&tallow(dir.path(), "data inspect data --tokenizer foreign"), 2, &["another tokenizer"]);
}

#[test]
fn bad_input_leaves_with_1_and_names_it() {
    let dir = corpus();
    fs::write(dir.path().join("x.bin"), "?").expect("written");
    let rest = "--tokenizer tokenizer.json --out data";
    for (args, words) in [
        (format!("data prepare --input nowhere {rest}"), &["nowhere"][..]),
        (format!("data prepare --input x.bin {rest}"), &["x.bin", ".jsonl"]),
        (format!("data prepare --input text/a.jsonl --field body {rest}"), &["a.jsonl", "body"]),
        ("data inspect text".into(), &["text"]),
        ("data verify nowhere".into(), &["nowhere"]),
    ] {
        fails(&tallow(dir.path(), &args), 1, words);
        assert!(!dir.path().join("data").exists(), "{args}");
    }
}
