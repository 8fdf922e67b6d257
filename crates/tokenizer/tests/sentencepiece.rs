//! SentencePiece models against ids by the sentencepiece library (`fixtures/make_sentencepiece.py` made them).
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tallow_tokenizer::Tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A model of the sentencepiece source package, if fetched.
fn asset(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TALLOW_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/assets"), PathBuf::from);
    let path = folder.join("sentencepiece").join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: sentencepiece/{name} is not there; run scripts/fetch-assets sentencepiece");
    None
}

fn expected() -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixture("sentencepiece.json")).unwrap()).unwrap()
}

fn check(name: &str, path: &Path) -> Tokenizer {
    let tokenizer = Tokenizer::from_path(path).unwrap();
    let expected = expected();
    let texts = expected["texts"].as_array().unwrap();
    let mut failures = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let text = text.as_str().unwrap();
        let want: Vec<u32> = serde_json::from_value(expected["ids"][name][index].clone()).unwrap();
        let got = tokenizer.encode(text, false).unwrap();
        if got != want {
            let written =
                |ids: &[u32]| ids.iter().map(|&i| tokenizer.id_to_token(i).unwrap().to_string()).collect::<Vec<_>>();
            failures.push(format!("{text:?}\n  want {:?}\n  got  {:?}", written(&want), written(&got)));
        }
        // SentencePiece writes an unknown token as " ⁇ "; a tokenizer.json has no such thing.
        if !want.contains(&tokenizer.unk_id().unwrap()) {
            let decoded = expected["decoded"][name][index].as_str().unwrap();
            assert_eq!(tokenizer.decode(&want, true).unwrap(), decoded, "{name} decoding {text:?}");
        }
    }
    assert!(failures.is_empty(), "{name}: {} of {} differ:\n{}", failures.len(), texts.len(), failures.join("\n"));
    tokenizer
}

#[test]
fn bpe_with_byte_fallback() {
    let tokenizer = check("bpe.model", &fixture("bpe.model"));
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.pad_id()),
        (Some(1), Some(2), Some(0), None)
    );
    let ids = tokenizer.encode("☃ ok", false).unwrap();
    let mut stream = tokenizer.decode_stream(false);
    let mut out: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    out.push_str(&stream.flush().unwrap().unwrap_or_default());
    assert_eq!(out, "☃ ok", "bytes and the leading space are put right");
}

#[test]
fn unigram() {
    check("unigram.model", &fixture("unigram.model"));
}

#[test]
fn models_of_the_source_package() {
    for name in ["test_model.model", "test_ja_model.model"] {
        let (Some(path), Some(book)) = (asset(name), asset("botchan.txt")) else { return };
        let tokenizer = check(name, &path);
        let mut digest = Sha256::new();
        for line in std::fs::read_to_string(book).unwrap().lines() {
            let ids: Vec<String> = tokenizer.encode(line, false).unwrap().iter().map(u32::to_string).collect();
            digest.update(ids.join(" ") + "\n");
        }
        let digest: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, expected()["botchan_sha256"][name].as_str().unwrap(), "{name} over a whole book");
    }
}

#[test]
fn a_saved_model_gives_the_same_ids() {
    for name in ["bpe.model", "unigram.model"] {
        let tokenizer = Tokenizer::from_path(fixture(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        let again = Tokenizer::from_path(dir.path()).unwrap();
        assert_eq!(again.fingerprint(), tokenizer.fingerprint());
        assert_eq!((again.bos_id(), again.eos_id()), (tokenizer.bos_id(), tokenizer.eos_id()));
    }
}
