//! Shards and indices that are not what was written.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::path::{Path, PathBuf};

use tallow_data::*;

fn prepared(dir: &Path) -> PathBuf {
    let file = dir.join("a.txt");
    std::fs::write(&file, "one text\n\nanother text\n\na third\n").unwrap();
    let options = PrepareOptions { text_split: TextSplit::BlankLines, ..PrepareOptions::default() };
    prepare(&[file], &Utf8Bytes, &dir.join("out"), &options, &mut |_| {}).unwrap();
    dir.join("out/train")
}

fn with(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

/// Reads all of it as a loader would.
fn read_all(split: &Path) -> Result<u64> {
    let dataset = TokenDataset::open(&[split.to_owned()])?;
    (0..dataset.num_documents()).map(|i| dataset.document(i).map(|d| d.len() as u64)).sum()
}

#[test]
fn every_structural_damage_is_an_error_that_names_shard_and_place() {
    let dir = tempfile::tempdir().unwrap();
    let split = prepared(dir.path());
    let shard = split.join("shard-00000.tok");
    let good = std::fs::read(&shard).unwrap();
    let tokens = u64::from_le_bytes(good[16..24].try_into().unwrap());
    let offsets = (64 + tokens as usize * 2).next_multiple_of(8);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("ends inside its header", good[..40].to_vec()),
        ("ends inside its header", vec![]),
        ("the file has", good[..good.len() - 1].to_vec()),
        ("the file has", [&good[..], &[0]].concat()),
        ("does not begin with TALLOWTK", with(&good, 0, b"X")),
        ("version 2; this program reads version 1", with(&good, 8, &[2])),
        ("4 bytes a token", with(&good, 12, &[4])),
        ("the file has", with(&good, 16, &(tokens + 4).to_le_bytes())),
        ("an impossible number of bytes", with(&good, 16, &u64::MAX.to_le_bytes())),
        ("an impossible number of bytes", with(&good, 24, &u64::MAX.to_le_bytes())),
        ("its index says", with(&good, 32, &300u32.to_le_bytes())),
        ("border 0", with(&good, offsets, &1u64.to_le_bytes())),
        ("border 1", with(&good, offsets + 8, &0u64.to_le_bytes())),
        ("border 1", with(&good, offsets + 8, &u64::MAX.to_le_bytes())),
        ("the documents end at", with(&good, offsets + 24, &(tokens - 1).to_le_bytes())),
        ("token 300 is outside the vocabulary of 257", with(&good, 64 + 6, &300u16.to_le_bytes())),
    ];
    for (reason, bytes) in cases {
        std::fs::write(&shard, bytes).unwrap();
        let told = read_all(&split).unwrap_err().to_string();
        assert!(told.contains(reason) && told.contains("shard-00000.tok, byte "), "{reason}: {told}");
        let report = verify(&split).unwrap();
        assert_eq!(report.damaged.len(), 1, "{reason}");
    }
    std::fs::remove_file(&shard).unwrap();
    assert!(read_all(&split).unwrap_err().to_string().contains("the shard is missing"));
    assert_eq!(verify(&split).unwrap().damaged.len(), 1);
    std::fs::write(&shard, &good).unwrap();
    assert_eq!(read_all(&split).unwrap(), tokens);
}

#[test]
fn verify_sees_any_flipped_bit() {
    let dir = tempfile::tempdir().unwrap();
    let split = prepared(dir.path());
    assert_eq!(verify(&split).unwrap().damaged, []);
    assert_eq!(verify(&dir.path().join("out")).unwrap().shards, 1);
    let shard = split.join("shard-00000.tok");
    let good = std::fs::read(&shard).unwrap();
    for at in 0..good.len() {
        std::fs::write(&shard, with(&good, at, &[good[at] ^ (1 << (at % 8))])).unwrap();
        assert_eq!(verify(&split).unwrap().damaged.len(), 1, "byte {at}");
        // And reading it never panics, whatever the bit was.
        drop(read_all(&split));
    }
}

#[test]
fn an_index_that_is_not_one() {
    let dir = tempfile::tempdir().unwrap();
    let split = prepared(dir.path());
    let path = split.join("index.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let cases = [
        ("EOF", "{".to_owned()),
        ("reads `tallow-tokens` version 1", good.replace("\"version\": 1", "\"version\": 9")),
        ("reads `tallow-tokens`", good.replace("tallow-tokens", "other-tokens")),
        ("the totals are not the sums", good.replacen("\"num_documents\": 3", "\"num_documents\": 4", 1)),
        ("not a file of this folder", good.replace("shard-00000.tok", "../shard-00000.tok")),
        ("unknown field", good.replacen("\"split\"", "\"spilt\"", 1)),
        ("a vocabulary of 0", good.replace("\"vocab_size\": 257", "\"vocab_size\": 0")),
    ];
    for (reason, text) in cases {
        assert_ne!(text, good, "{reason}");
        std::fs::write(&path, text).unwrap();
        let told = read_all(&split).unwrap_err().to_string();
        assert!(told.contains(reason) && told.contains("index.json"), "{reason}: {told}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(read_all(&split).unwrap_err().to_string().contains("tallow data prepare"));
}

#[test]
fn folders_of_different_tokenizers_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let a = prepared(dir.path());
    let b = dir.path().join("b");
    std::fs::create_dir(&b).unwrap();
    for entry in std::fs::read_dir(&a).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), b.join(entry.file_name())).unwrap();
    }
    let index = std::fs::read_to_string(b.join("index.json")).unwrap();
    std::fs::write(b.join("index.json"), index.replace("utf8-bytes-v1", "another")).unwrap();
    let told = TokenDataset::open(&[a, b]).unwrap_err().to_string();
    assert!(told.contains("differ in tokenizer: utf8-bytes-v1 and another"), "{told}");
}
