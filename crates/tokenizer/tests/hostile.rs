//! Broken and hostile files: every one is an error that names what is wrong, or a tokenizer that works; never a panic,
//! never memory out of proportion to the file.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::path::Path;

use proptest::prelude::*;
use tallow_tokenizer::{Error, GgufVocab, Tokenizer, TrainOptions, train, train_files};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)).unwrap()
}

/// Reads `bytes` as a file of that name; whatever loads must also encode and decode.
fn read(name: &str, bytes: &[u8]) -> Result<Tokenizer, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let tokenizer = Tokenizer::from_path(&path)?;
    for text in ["", "hello  wörld <s> 12", "\u{10FFFF}\u{0}", "ﬁ①"] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
    Ok(tokenizer)
}

fn small() -> Tokenizer {
    let options = TrainOptions { vocab_size: 280, ..TrainOptions::default() };
    train(["some words and more words, and some more"], &options, |_| {}).unwrap()
}

#[test]
fn every_truncation_is_an_error() {
    let json = serde_json::to_vec(&small().to_json().unwrap()).unwrap();
    for length in (0..json.len()).step_by(97) {
        let error = read("tokenizer.json", &json[..length]).unwrap_err();
        assert!(matches!(error, Error::Malformed { .. }) && error.to_string().contains("tokenizer.json"), "{error}");
    }
    // A protobuf cut between two fields is whole: only the vocabulary shrinks.
    let model = fixture("bpe.model");
    let mut errors = 0;
    for length in (0..model.len()).step_by(41) {
        errors += usize::from(read("cut.model", &model[..length]).is_err());
    }
    assert!(errors > 100, "{errors}");
}

#[test]
fn paths_that_hold_no_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_path(dir.path()), Err(Error::UnknownFormat { .. })));
    assert!(matches!(Tokenizer::from_path(dir.path().join("none.json")), Err(Error::Io { .. })));
    let other = dir.path().join("weights.bin");
    std::fs::write(&other, b"x").unwrap();
    assert!(matches!(Tokenizer::from_path(&other), Err(Error::UnknownFormat { .. })));
    assert!(matches!(read("x.tiktoken", b"YQ== 0\n"), Err(Error::UnknownEncoding { .. })));
    std::fs::write(dir.path().join("tokenizer.json"), serde_json::to_vec(&small().to_json().unwrap()).unwrap())
        .unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), b"{").unwrap();
    assert!(Tokenizer::from_path(dir.path()).unwrap_err().to_string().contains("tokenizer_config.json"));
}

#[test]
fn a_save_that_cannot_be_made_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let blocked = dir.path().join("file");
    std::fs::write(&blocked, b"in the way").unwrap();
    assert!(matches!(small().save(blocked.join("sub")), Err(Error::Io { .. })));
    assert_eq!(std::fs::read(&blocked).unwrap(), b"in the way");
    // The target of the rename is a folder: the write fails and the temporary file goes.
    std::fs::create_dir(dir.path().join("tokenizer_config.json")).unwrap();
    assert!(matches!(small().save(dir.path()), Err(Error::Io { .. })));
    let left = std::fs::read_dir(dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().contains("tmp"));
    assert_eq!(left.count(), 0);
}

#[test]
fn training_files_name_the_line_that_is_not_text() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.txt");
    std::fs::write(&path, b"fine\nfine too\nbroken \xFF here\n").unwrap();
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let error = train_files(&[&path], &options, |_| {}).unwrap_err();
    assert!(matches!(&error, Error::NotUtf8 { line: 3, .. }), "{error}");
    let missing = train_files(&[dir.path().join("none.txt")], &options, |_| {}).unwrap_err();
    assert!(missing.to_string().contains("none.txt"));
}

#[test]
fn files_and_documents_train_alike() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text.txt");
    let text = "alpha beta gamma\n\n  delta alpha beta\n".repeat(50_000);
    std::fs::write(&path, &text).unwrap();
    let options = TrainOptions { vocab_size: 300, ..TrainOptions::default() };
    let from_file = train_files(&[&path], &options, |_| {}).unwrap();
    assert_eq!(from_file.fingerprint(), train([text], &options, |_| {}).unwrap().fingerprint());
}

fn gguf() -> GgufVocab {
    let tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"].map(String::from).to_vec();
    let types = vec![2, 3, 3, 1, 1, 1, 1, 1, 1];
    let scores = (0..9).map(|i| -(i as f32)).collect();
    GgufVocab {
        model: "llama".into(),
        tokens,
        scores: Some(scores),
        token_types: Some(types),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufVocab::default()
    }
}

#[test]
fn a_gguf_vocabulary_is_checked_key_by_key() {
    let good = Tokenizer::from_gguf(gguf()).unwrap();
    assert_eq!(good.encode("ab a", true).unwrap(), [1, 8, 6]);
    assert_eq!(good.decode(&[1, 8, 6], true).unwrap(), "ab a");
    #[allow(clippy::type_complexity, reason = "a table")]
    #[allow(clippy::type_complexity, reason = "a table")]
    #[allow(clippy::type_complexity, reason = "a table")]
    let broken: [(&str, fn(&mut GgufVocab)); 10] = [
        ("tokenizer.ggml.model", |v| v.model = "rwkv".into()),
        ("tokenizer.ggml.tokens", |v| v.tokens.clear()),
        ("tokenizer.ggml.scores", |v| v.scores = Some(vec![0.0])),
        ("scores is missing", |v| v.scores = None),
        ("not a number", |v| v.scores = Some(vec![f32::NAN; 9])),
        ("tokenizer.ggml.token_type", |v| v.token_types = Some(vec![1])),
        ("which is no type", |v| v.token_types = Some(vec![9; 9])),
        ("bos_token_id", |v| v.bos = Some(9)),
        ("twice", |v| v.tokens[4] = "b".into()),
        ("tokenizer.ggml.merges", |v| v.model = "gpt2".into()),
    ];
    for (needle, breakage) in broken {
        let mut vocab = gguf();
        breakage(&mut vocab);
        let message = Tokenizer::from_gguf(vocab).unwrap_err().to_string();
        assert!(message.contains(needle), "{needle}: {message}");
    }
    let mut unknown_pre = gguf();
    unknown_pre.model = "gpt2".into();
    unknown_pre.pre = Some("next-year".into());
    assert!(matches!(Tokenizer::from_gguf(unknown_pre), Err(Error::UnknownPreTokenizer { .. })));
}

#[test]
fn truncation_and_padding_settings_drop_no_ids() {
    let mut json = small().to_json().unwrap();
    json["truncation"] = serde_json::json!({
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    });
    // An option of the other pipeline, so that it is the one in use.
    json["pre_tokenizer"]["pretokenizers"][2]["add_prefix_space"] = serde_json::json!(true);
    let tokenizer = Tokenizer::from_json(&serde_json::to_vec(&json).unwrap()).unwrap();
    assert!(tokenizer.encode("many words and more words", false).unwrap().len() > 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn flipped_bytes_never_panic(at in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        for name in ["bpe.model", "unigram.model"] {
            let mut bytes = fixture(name);
            for (index, value) in &at {
                let index = index.index(bytes.len());
                bytes[index] = *value;
            }
            let _ = read(name, &bytes);
        }
    }

    #[test]
    fn changed_json_never_panics(at in any::<prop::sample::Index>(), value in 0usize..8) {
        let mut json = small().to_json().unwrap();
        let mut places = Vec::new();
        collect("", &json, &mut places);
        let replacement = [
            serde_json::json!(null), serde_json::json!(-1), serde_json::json!(1e30), serde_json::json!(""),
            serde_json::json!([]), serde_json::json!({}), serde_json::json!(true), serde_json::json!(4_294_967_295u32),
        ][value].clone();
        if let Some(place) = json.pointer_mut(&places[at.index(places.len())]) {
            *place = replacement;
        }
        let _ = read("tokenizer.json", &serde_json::to_vec(&json).unwrap());
    }
}

/// The pointers of all values but the vocabulary's and merges' own, which would drown the others.
fn collect(path: &str, value: &serde_json::Value, out: &mut Vec<String>) {
    out.push(path.to_string());
    if path == "/model/vocab" || path == "/model/merges" {
        out.push(format!("{path}/0"));
        return;
    }
    match value {
        serde_json::Value::Object(map) => map.iter().for_each(|(key, v)| collect(&format!("{path}/{key}"), v, out)),
        serde_json::Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, v)| collect(&format!("{path}/{i}"), v, out));
        }
        _ => {}
    }
}
