//! Damaged and hostile files: each is an error that names the file and what in it is wrong, or a source that can be read;
//! never a panic, never memory out of proportion to the file.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests, and their helpers")]

#[path = "support/alloc.rs"]
mod alloc;
mod support;

use std::path::Path;

use alloc::allocated;
use proptest::prelude::*;
use support::gguf::{Gguf, Meta, string};
use support::{Folder, assert_says, read_all, safetensors};
use tallow_formats::gguf::GgufFile;
use tallow_formats::hf::ModelDir;
use tallow_formats::safetensors::{INDEX, SafetensorsFile, ShardedSafetensors};
use tallow_formats::{ModelLocation, resolve_model};

/// More than any file here can need.
const MOST_MEMORY: usize = 2 << 20;

/// One of the two below.
type Open = fn(&Path) -> Result<(), String>;

/// Opens a file in bounded memory and reads everything it offers.
fn open_safetensors(path: &Path) -> Result<(), String> {
    let (file, taken) = allocated(|| SafetensorsFile::open(path));
    assert!(taken < MOST_MEMORY, "{taken} bytes were allocated");
    file.map(|file| read_all(&file)).map_err(|e| e.to_string())
}

/// As [`open_safetensors`].
fn open_gguf(path: &Path) -> Result<(), String> {
    let (file, taken) = allocated(|| GgufFile::open(path));
    assert!(taken < MOST_MEMORY, "{taken} bytes were allocated");
    file.map(|file| {
        read_all(&file);
        let _ = file.tokenizer_fields();
    })
    .map_err(|e| e.to_string())
}

#[test]
fn allocations_are_counted() {
    let (vec, taken) = allocated(|| vec![1u8; 12_345]);
    assert!((vec.len()..20_000).contains(&taken), "{taken}");
}

fn entry(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn bad_safetensors_say_what_is_wrong() {
    let one = |dtype: &str, shape: &str, start, end| format!("{{{}}}", entry("t", dtype, shape, start, end));
    let two = |second: String| format!("{{{},{second}}}", entry("t", "F32", "[2]", 0, 8));
    let sizes = |length: u64, rest: &[u8]| [&length.to_le_bytes()[..], rest].concat();
    let deep = format!("{{\"t\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let many_dims = format!("[{}1]", "1,".repeat(40));
    // Each size is possible, and their sum with the header's length is not.
    let part = (1u64 << 61) - 1;
    let parts = (0..8).map(|i| entry(&format!("t{i}"), "U8", &format!("[{part}]"), i * part, (i + 1) * part));
    let eight = format!("{{{}}}", parts.collect::<Vec<_>>().join(","));
    let data = [0u8; 8];
    let with = |header: &str| safetensors(header, &data);
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["is empty"]),
        ("short", vec![0; 7], &["7 bytes hold no header"]),
        ("longer than the file", sizes(100, b"{}"), &["header of 100 bytes", "cut off"]),
        ("absurd length", sizes(u64::MAX, b"{}"), &["header of 18446744073709551615 bytes", "at most"]),
        ("zip", b"PK\x03\x04........".to_vec(), &["is no safetensors file"]),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["git lfs pull"]),
        ("no JSON", with("{\"t\""), &["tensor `t`", "EOF"]),
        ("no object", with("[1]"), &["not the JSON", "an object of tensors by name"]),
        ("no UTF-8", [&sizes(4, b"{\"\xff\"")[..], &data].concat(), &["not the JSON"]),
        ("two values", with("{} {}"), &["not the JSON"]),
        ("nested too deep", with(&deep), &["`t`", "in the header"]),
        ("no entry", with(r#"{"t":3}"#), &["tensor `t`", "in the header"]),
        ("no dtype", with(r#"{"t":{"shape":[2],"data_offsets":[0,8]}}"#), &["tensor `t`", "missing field `dtype`"]),
        ("no offsets", with(r#"{"t":{"shape":[2],"dtype":"F32"}}"#), &["tensor `t`", "missing field `data_offsets`"]),
        ("negative size", with(&one("F32", "[-2]", 0, 8)), &["tensor `t`", "`-2`"]),
        ("broken size", with(&one("F32", "[2.5]", 0, 8)), &["tensor `t`", "2.5"]),
        ("NaN size", with(&one("F32", "[NaN]", 0, 8)), &["tensor `t`", "expected"]),
        ("infinite size", with(&one("F32", "[1e999]", 0, 8)), &["tensor `t`", "out of range"]),
        ("size past 64 bits", with(&one("F32", "[18446744073709551616]", 0, 8)), &["tensor `t`"]),
        ("dims overflow", with(&one("F32", "[4294967296,4294967296]", 0, 8)), &["tensor `t`", "more than a computer"]),
        ("bytes overflow", with(&one("F64", "[4611686018427387904]", 0, 8)), &["tensor `t`", "more than a computer"]),
        ("too many dims", with(&one("F32", &many_dims, 0, 4)), &["tensor `t`", "41 dimensions"]),
        ("unknown dtype", with(&one("F31", "[2]", 0, 8)), &["tensor `t`", "`F31` is not supported", "F32"]),
        ("wrong size", with(&one("F16", "[2]", 0, 8)), &["tensor `t`", "0 to 8", "4 bytes", "[2] of F16"]),
        ("backwards", with(&one("F32", "[2]", 8, 0)), &["tensor `t`", "8 to 0"]),
        ("past the end", with(&one("F32", "[4]", 0, 16)), &["tensor `t`", "end at 16", "holds 8", "cut off"]),
        ("far past the end", with(&one("U8", "[8]", u64::MAX - 8, u64::MAX)), &["tensor `t`", "cut off"]),
        ("sum of sizes overflows", with(&eight), &["tensor `t0`", "end at 2305843009213693951", "cut off"]),
        ("gap", with(&one("F32", "[1]", 4, 8)), &["tensor `t`", "bytes 0 to 4"]),
        ("rest", with(&one("F32", "[1]", 0, 4)), &["last 4 bytes belong to no tensor"]),
        ("same bytes", with(&two(entry("u", "I32", "[2]", 0, 8))), &["tensor `u`", "overlap those of `t`"]),
        ("overlap", with(&two(entry("u", "F32", "[1]", 4, 8))), &["tensor `u`", "overlap those of `t`"]),
        ("twice", with(&two(entry("t", "F32", "[2]", 0, 8))), &["tensor `t`", "is there twice"]),
        ("metadata", with(r#"{"__metadata__":{"a":1}}"#), &["`__metadata__`", "expected a string"]),
        ("metadata twice", with(r#"{"__metadata__":{},"__metadata__":{}}"#), &["__metadata__", "is there twice"]),
    ];
    let folder = Folder::new();
    for (case, bytes, fragments) in cases {
        let message = open_safetensors(&folder.write("x.safetensors", bytes)).unwrap_err();
        assert_says(case, &message, &["x.safetensors"]);
        assert_says(case, &message, fragments);
    }
}

fn small_safetensors() -> Vec<u8> {
    let header = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{},{},{}}}"#,
        entry("a", "F32", "[2,2]", 0, 16),
        entry("b", "BF16", "[3]", 16, 22),
        entry("c", "U8", "[2]", 22, 24)
    );
    safetensors(&header, &[0x3f; 24])
}

fn small_gguf() -> Vec<u8> {
    Gguf::new()
        .meta("general.architecture", Meta::text("llama"))
        .meta("general.alignment", Meta::U32(32))
        .meta("llama.block_count", Meta::U64(2))
        .meta("eps", Meta::F32(1e-5))
        .meta("nested", Meta::Array(9, vec![Meta::Array(7, vec![Meta::Bool(true)])]))
        .meta("tokenizer.ggml.model", Meta::text("gpt2"))
        .meta("tokenizer.ggml.tokens", Meta::texts(["a", "b"]))
        .meta("tokenizer.ggml.merges", Meta::texts(["a b"]))
        .f32s("x", &[2, 4], 1.0)
        .tensor("q", &[32, 2], 8, vec![0x11; 68])
        .tensor("k", &[256], 12, vec![0x22; 144])
        .build()
}

/// Every prefix of a whole file is an error.
fn truncate(name: &str, whole: &[u8], open: Open) {
    let folder = Folder::new();
    open(&folder.write(name, whole)).unwrap();
    for len in 0..whole.len() {
        let message = open(&folder.write(name, &whole[..len])).expect_err(&format!("{len} bytes"));
        assert_says("cut off", &message, &[name]);
    }
}

/// Every bit of a file turned, and every byte set to what often breaks a reader.
fn flip(name: &str, whole: &[u8], open: Open) {
    let folder = Folder::new();
    let mut refused = 0;
    for at in 0..whole.len() {
        let values = (0..8).map(|bit| whole[at] ^ 1 << bit).chain([0x00, 0x7f, 0x80, 0xff]);
        for value in values {
            let mut bytes = whole.to_vec();
            bytes[at] = value;
            refused += usize::from(open(&folder.write(name, bytes)).is_err());
        }
    }
    assert!(refused > whole.len(), "{refused} of {} damages were noticed", 12 * whole.len());
}

#[test]
fn every_truncation_of_safetensors_is_an_error() {
    truncate("x.safetensors", &small_safetensors(), open_safetensors);
}

#[test]
fn every_truncation_of_a_gguf_is_an_error() {
    truncate("m.gguf", &small_gguf(), open_gguf);
}

#[test]
fn no_flipped_bit_of_safetensors_panics_or_takes_memory() {
    flip("x.safetensors", &small_safetensors(), open_safetensors);
}

#[test]
fn no_flipped_bit_of_a_gguf_panics_or_takes_memory() {
    flip("m.gguf", &small_gguf(), open_gguf);
}

#[test]
fn bad_gguf_headers_say_what_is_wrong() {
    let base = || Gguf::new().meta("general.architecture", Meta::text("llama"));
    let version = |version: u32| Gguf { version, ..base() }.build();
    let raw = |kind: u32, parts: &[&[u8]]| base().meta("k", Meta::Raw(kind, parts.concat())).build();
    let (count, most) = (|n: u64| n.to_le_bytes(), u64::MAX.to_le_bytes());
    let kind = |n: u32| n.to_le_bytes();
    let alignment = |value| base().meta("general.alignment", value).build();
    // Arrays of one array each: twelve bytes a level.
    let nested = [kind(9), kind(1), kind(0)].concat().repeat(50);
    let mut twice = base().meta("k", Meta::U32(1));
    twice.metadata.push(("k".into(), Meta::U32(2)));
    let mut not_utf8 = base().meta("kkkk", Meta::U32(1)).build();
    let at = not_utf8.windows(4).position(|w| w == b"kkkk").unwrap();
    not_utf8[at] = 0xff;
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty", vec![], &["is empty"]),
        ("magic", b"GGML\x03\0\0\0".to_vec(), &["does not begin with GGUF"]),
        ("lfs", b"version https://git-lfs.github.com/spec/v1\n".to_vec(), &["git lfs pull"]),
        ("version 0", version(0), &["version 0", "2 and 3 are supported"]),
        ("version 1", version(1), &["version 1", "convert the model anew"]),
        ("version 4", version(4), &["version 4"]),
        ("big endian", version(3u32.swap_bytes()), &["big-endian"]),
        (
            "tensors",
            Gguf { num_tensors: Some(u64::MAX), ..base() }.build(),
            &["18446744073709551615 tensors", "byte 8"],
        ),
        ("some tensors", Gguf { num_tensors: Some(1000), ..base() }.build(), &["1000 tensors", "do not fit"]),
        ("one tensor", Gguf { num_tensors: Some(1), ..base() }.build(), &["tensor number 0", "the file ends"]),
        ("keys", Gguf { num_keys: Some(1 << 60), ..base() }.build(), &["1152921504606846976 keys", "byte 16"]),
        ("one key too many", Gguf { num_keys: Some(2), ..base() }.build(), &["key number 1", "the file ends"]),
        ("long key", [&base().build()[..24], &most, b"general.architecture"].concat(), &["key number 0", "do not fit"]),
        ("key not UTF-8", not_utf8, &["key number 1", "not UTF-8"]),
        ("text", raw(8, &[&most, b"text"]), &["`k`", "bytes of text", "do not fit"]),
        ("text not UTF-8", raw(8, &[&count(1), b"\xff"]), &["`k`", "not UTF-8"]),
        ("value type", raw(13, &[&[0; 8]]), &["`k`", "value type 13", "unknown"]),
        ("boolean", raw(7, &[&[2]]), &["`k`", "2 at byte", "no boolean"]),
        ("array length", raw(9, &[&kind(0), &most]), &["`k`", "array elements", "do not fit"]),
        ("array of texts", raw(9, &[&kind(8), &count(3), &[0; 16]]), &["`k`", "3 array elements", "do not fit"]),
        ("array of nothing", raw(9, &[&kind(77), &count(0)]), &["`k`", "value type 77", "unknown"]),
        ("nested arrays", raw(9, &[&nested]), &["`k`", "nested deeper than 4"]),
        ("twice", twice.build(), &["`k`", "is there twice"]),
        ("alignment 0", alignment(Meta::U32(0)), &["`general.alignment`", "is 0", "no power of two"]),
        ("alignment 3", alignment(Meta::U32(3)), &["`general.alignment`", "is 3", "no power of two"]),
        ("alignment huge", alignment(Meta::U64(1 << 63)), &["`general.alignment`", "no power of two"]),
        ("alignment text", alignment(Meta::text("32")), &["`general.alignment`", "a string"]),
        ("alignment negative", alignment(Meta::I32(-32)), &["`general.alignment`"]),
    ];
    let folder = Folder::new();
    for (case, bytes, fragments) in cases {
        let message = open_gguf(&folder.write("m.gguf", bytes)).unwrap_err();
        assert_says(case, &message, &["m.gguf"]);
        assert_says(case, &message, fragments);
    }
}

#[test]
fn bad_gguf_tensors_say_what_is_wrong() {
    let one = |dims: &[u64], kind: u32, bytes: usize| Gguf::new().tensor("t", dims, kind, vec![0; bytes]);
    let at = |offset: u64| {
        let mut gguf = one(&[8], 0, 32);
        gguf.tensors[0].offset = Some(offset);
        gguf
    };
    let two = |name: &str, offset: u64| {
        let mut gguf = one(&[16], 0, 64).tensor(name, &[8], 0, vec![0; 32]);
        gguf.tensors[1].offset = Some(offset);
        gguf
    };
    let cases: Vec<(&str, Gguf, &[&str])> = vec![
        ("five dims", one(&[1; 5], 0, 4), &["`t`", "5 dimensions; at most 4"]),
        ("unknown type", one(&[4], 99, 16), &["tensor `t`", "type number 99 is not supported", "Q8_0"]),
        ("named type", one(&[256], 23, 136), &["tensor `t`", "type IQ4_XS is not supported", "Q8_0"]),
        ("dims overflow", one(&[1 << 32, 1 << 32], 0, 4), &["tensor `t`", "more than a computer"]),
        ("bytes overflow", one(&[1 << 62], 0, 4), &["tensor `t`", "more than a computer"]),
        ("all dims", one(&[u64::MAX; 4], 0, 4), &["tensor `t`", "more than a computer"]),
        ("row of a block", one(&[33, 32], 2, 18 * 33), &["tensor `t`", "rows of 33 values", "Q4_0 blocks of 32"]),
        ("row of a k block", one(&[128, 2], 12, 144), &["tensor `t`", "rows of 128 values", "Q4_K blocks of 256"]),
        ("scalar block", one(&[], 8, 34), &["tensor `t`", "rows of 1 values"]),
        ("cut off", one(&[64], 0, 252), &["tensor `t`", "256 bytes", "cut off"]),
        ("past the end", at(64), &["tensor `t`", "beyond the end"]),
        ("far past the end", at(u64::MAX - 31), &["tensor `t`", "beyond the end"]),
        ("offset", at(4), &["tensor `t`", "offset 4 is no multiple of the alignment 32"]),
        ("twice", two("t", 64), &["tensor `t`", "is there twice"]),
        ("same bytes", two("u", 0), &["overlap those of"]),
        ("overlap", two("u", 32), &["tensor `u`", "overlap those of `t`"]),
    ];
    let folder = Folder::new();
    for (case, gguf, fragments) in cases {
        let message = open_gguf(&folder.write("m.gguf", gguf.build())).unwrap_err();
        assert_says(case, &message, &["m.gguf"]);
        assert_says(case, &message, fragments);
    }
}

#[test]
fn a_large_header_takes_bounded_memory() {
    // Every element takes one byte of the file but a whole value in memory.
    let elements = 16 << 20;
    let array = [0u32.to_le_bytes().to_vec(), (elements as u64).to_le_bytes().to_vec(), vec![0; elements]].concat();
    let folder = Folder::new();
    let path = folder.write("m.gguf", Gguf::new().meta("k", Meta::Raw(9, array)).build());
    let (file, taken) = allocated(|| GgufFile::open(&path));
    assert_says("array", &file.unwrap_err().to_string(), &["m.gguf", "`k`", "more than 256 MiB"]);
    assert!(taken < MOST_MEMORY, "{taken} bytes were allocated before it was noticed");
}

#[test]
fn bad_indexes_say_what_is_wrong() {
    let shard = |name: &str| safetensors(&format!("{{{}}}", entry(name, "F32", "[1]", 0, 4)), &[0; 4]);
    let folder = Folder::new();
    folder.write("one.safetensors", shard("a"));
    folder.write("two.safetensors", shard("a"));
    folder.write("three.safetensors", shard("b"));
    folder.write("damaged.safetensors", &shard("a")[..20]);
    std::fs::create_dir(folder.path().join("sub")).unwrap();
    folder.write("sub/one.safetensors", shard("a"));
    let map = |tensor: &str, file: &str| serde_json::json!({"weight_map": {tensor: file}}).to_string();
    let absolute = folder.path().join("one.safetensors");
    let cases: Vec<(&str, String, &[&str])> = vec![
        ("no JSON", "{".into(), &[INDEX]),
        ("no object", "[]".into(), &[INDEX]),
        ("no map", "{}".into(), &[INDEX, "`weight_map`", "is missing"]),
        ("null map", r#"{"weight_map": null}"#.into(), &[INDEX, "`weight_map`", "is missing"]),
        ("list", r#"{"weight_map": ["a"]}"#.into(), &[INDEX, "`weight_map` to be an object"]),
        ("empty map", r#"{"weight_map": {}}"#.into(), &[INDEX, "`weight_map`", "lists no tensor"]),
        ("number", r#"{"weight_map": {"a": 1}}"#.into(), &[INDEX, "`a`", "expected a string"]),
        ("missing shard", map("a", "four.safetensors"), &[INDEX, "`a`", "four.safetensors", "is missing"]),
        ("damaged shard", map("a", "damaged.safetensors"), &["damaged.safetensors", "cut off"]),
        ("lacking tensor", map("b", "one.safetensors"), &["one.safetensors", "`b`", "is not there", INDEX]),
        ("up", map("a", "../one.safetensors"), &[INDEX, "`a`", "../one.safetensors", "not a plain file name"]),
        ("two dots", map("a", ".."), &[INDEX, "`a`", "not a plain file name"]),
        ("dot", map("a", "."), &[INDEX, "`a`", "not a plain file name"]),
        ("no name", map("a", ""), &[INDEX, "`a`", "not a plain file name"]),
        ("below", map("a", "sub/one.safetensors"), &[INDEX, "`a`", "not a plain file name"]),
        ("absolute", map("a", &absolute.display().to_string()), &[INDEX, "`a`", "not a plain file name"]),
        ("windows", map("a", "..\\one.safetensors"), &[INDEX, "`a`", "not a plain file name"]),
        ("drive", map("a", "C:one.safetensors"), &[INDEX, "`a`", "not a plain file name"]),
        ("nul", map("a", "one\0"), &[INDEX, "`a`", "not a plain file name"]),
        ("folder", map("a", "sub"), &["sub", "not a plain file"]),
        ("itself", map("a", INDEX), &[INDEX, "no safetensors file"]),
        (
            "twice",
            r#"{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}"#.into(),
            &[INDEX, "`a`", "in `weight_map` twice"],
        ),
        (
            "in two files",
            r#"{"weight_map": {"a": "one.safetensors", "b": "three.safetensors", "c": "two.safetensors"}}"#.into(),
            &["two.safetensors", "`c`", "is not there"],
        ),
    ];
    for (case, text, fragments) in cases {
        let (result, taken) = allocated(|| ShardedSafetensors::open(&folder.write(INDEX, text)));
        assert_says(case, &result.unwrap_err().to_string(), fragments);
        assert!(taken < MOST_MEMORY, "{case}: {taken} bytes");
    }
    let both =
        safetensors(&format!("{{{},{}}}", entry("a", "F32", "[1]", 0, 4), entry("c", "F32", "[1]", 4, 8)), &[0; 8]);
    folder.write("two.safetensors", both);
    let text = r#"{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}"#;
    let message = ShardedSafetensors::open(&folder.write(INDEX, text)).unwrap_err().to_string();
    assert_says("a tensor in two shards", &message, &["two.safetensors", "`a`", "is in", "one.safetensors"]);
}

#[test]
fn folders_say_what_they_lack() {
    let folder = Folder::new();
    let message = |folder: &Folder| ModelDir::open(folder.path()).unwrap_err().to_string();
    assert_says("empty", &message(&folder), &["config.json is missing", "the folder is empty"]);
    folder.write("m.gguf", "");
    assert_says("gguf", &message(&folder), &["config.json is missing", "give that file"]);
    folder.write("config.json", "{");
    assert_says("no JSON", &message(&folder), &["config.json", "is not JSON"]);
    folder.write("config.json", "[".repeat(100_000));
    assert_says("nested", &message(&folder), &["config.json", "is not JSON"]);
    folder.write("config.json", "3");
    assert_says("no object", &message(&folder), &["config.json", "is not a JSON object"]);
    folder.write("config.json", vec![b' '; (16 << 20) + 1]);
    let (result, taken) = allocated(|| ModelDir::open(folder.path()));
    assert_says("large", &result.unwrap_err().to_string(), &["config.json", "too many for a configuration"]);
    assert!(taken < MOST_MEMORY);
    folder.write("config.json", "{}");
    let weights = |folder: &Folder| ModelDir::open(folder.path()).unwrap().open_weights().err().unwrap().to_string();
    assert_says("no weights", &weights(&folder), &["model.safetensors is missing", "m.gguf"]);
    folder.write("pytorch_model.bin", "");
    assert_says("pickle", &weights(&folder), &["pytorch_model.bin", "save_pretrained"]);
    std::fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    assert_says("a folder", &weights(&folder), &["model.safetensors", "not a plain file"]);
    let none = ModelDir::open(&folder.path().join("none")).unwrap_err().to_string();
    assert_says("no folder", &none, &["none", "is missing"]);
}

#[test]
fn names_of_models_are_found_or_explained() {
    let folder = Folder::new();
    let gguf = folder.write("M.GGUF", "");
    let other = folder.write("m.bin", "");
    let text = |path: &Path| path.display().to_string();
    assert_eq!(resolve_model(&text(&gguf)).unwrap(), ModelLocation::Gguf(gguf));
    assert_eq!(resolve_model(&text(folder.path())).unwrap(), ModelLocation::HfDir(folder.path().into()));
    let message = |name: &str| resolve_model(name).unwrap_err().to_string();
    assert_says("other", &message(&text(&other)), &["m.bin", "neither a folder nor a .gguf file"]);
    assert_says("empty", &message(""), &["the name is empty"]);
    assert_says("hub", &message("some-owner/some-model"), &["some-owner/some-model", "hub id", "--features hub"]);
    assert_says("missing", &message(&text(&folder.path().join("x.gguf"))), &["x.gguf", "no such file or folder"]);
    assert_says("outside the store", &message("../../no/such/model"), &["no such file or folder"]);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_without_waiting() {
    let folder = Folder::new();
    let pipe = folder.path().join("pipe.safetensors");
    // Where there is no mkfifo there is nothing to test.
    if std::process::Command::new("mkfifo").arg(&pipe).status().is_ok_and(|status| status.success()) {
        assert_says("pipe", &open_safetensors(&pipe).unwrap_err(), &["pipe.safetensors", "not a plain file"]);
        assert!(open_gguf(&pipe).is_err());
    }
}

proptest! {
    #[test]
    fn several_damages_at_once_are_survived(
        damages in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<proptest::sample::Index>(),
        cuts: bool,
    ) {
        let folder = Folder::new();
        let kinds: [(&str, Vec<u8>, Open); 2] =
            [("x.safetensors", small_safetensors(), open_safetensors), ("m.gguf", small_gguf(), open_gguf)];
        for (name, mut bytes, open) in kinds {
            for (at, value) in &damages {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()));
            }
            let _ = open(&folder.write(name, bytes));
        }
    }

    #[test]
    fn any_tail_behind_a_gguf_magic_is_survived(tail in proptest::collection::vec(any::<u8>(), 0..200), huge: u64) {
        let folder = Folder::new();
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([1u8, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(string("k"));
        bytes.extend(&tail);
        bytes.extend(huge.to_le_bytes());
        let _ = open_gguf(&folder.write("m.gguf", bytes));
    }

    #[test]
    fn any_sizes_in_a_safetensors_header_are_survived(
        shape in proptest::collection::vec(any::<u64>(), 0..5),
        start: u64,
        end: u64,
        dtype in proptest::sample::select(vec!["F64", "F32", "BF16", "U8", "BOOL", "F4"]),
    ) {
        let folder = Folder::new();
        let header = format!("{{{}}}", entry("t", dtype, &format!("{shape:?}"), start, end));
        let _ = open_safetensors(&folder.write("x.safetensors", safetensors(&header, &[0; 16])));
    }
}
