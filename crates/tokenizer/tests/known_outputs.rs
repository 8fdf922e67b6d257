//! Known ids from outside: llama.cpp's vocabularies with their expected ids, and tiktoken's test plan.
//!
//! The files come by `scripts/fetch-assets tokenizers` into `$TALLOW_ASSETS` (`target/assets` of the workspace by
//! default). A test whose files are absent says so and passes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

mod gguf_vocab;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tallow_tokenizer::{EncodeOptions, Tokenizer};

/// Vocabularies that are known to fail, each with the reason. The test fails if one of them starts to pass.
const KNOWN_FAILURES: &[(&str, &str)] = &[];

fn asset(name: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TALLOW_ASSETS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/assets"), PathBuf::from);
    let path = folder.join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: {name} is not there; run scripts/fetch-assets tokenizers");
    None
}

/// The cases of an `.inp`, with the ids of its `.out`.
fn cases(gguf: &Path) -> Vec<(String, Vec<u32>)> {
    let beside = |extension: &str| {
        let mut name = gguf.as_os_str().to_os_string();
        name.push(extension);
        std::fs::read_to_string(name).unwrap()
    };
    let (input, output) = (beside(".inp"), beside(".out"));
    let texts: Vec<&str> = input.split("\n__ggml_vocab_test__\n").collect();
    let ids: Vec<Vec<u32>> =
        output.lines().map(|line| line.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    // The file ends with the separator, which leaves an empty last text without ids.
    let count = if texts.len() == ids.len() + 1 && texts.last() == Some(&"") { ids.len() } else { texts.len() };
    assert_eq!(count, ids.len(), "{}", gguf.display());
    texts[..count].iter().map(|t| t.to_string()).zip(ids).collect()
}

#[test]
fn llama_cpp_vocabularies() {
    let Some(folder) = asset("ggml-vocab") else { return };
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .filter(|path| path.with_extension("gguf.inp").exists())
        .collect();
    files.sort();
    assert_eq!(files.len(), 15, "{files:?}");
    let mut wrong = Vec::new();
    for file in &files {
        let name = file.file_stem().unwrap().to_string_lossy().replace("ggml-vocab-", "");
        let tokenizer = match Tokenizer::from_gguf(gguf_vocab::read(file)) {
            Ok(tokenizer) => tokenizer,
            Err(error) => {
                println!("{name:16} {error}");
                wrong.push(name);
                continue;
            }
        };
        if name == "bert-bge" {
            let framed = tokenizer.encode("a", true).unwrap();
            assert_eq!((framed[0], framed[2]), (101, 102), "[CLS] and [SEP] are assumed as llama.cpp does");
        }
        let cases = cases(file);
        let mut failed = 0;
        for (text, expected) in &cases {
            let ids = tokenizer.encode_with(text, EncodeOptions { parse_special: true, ..Default::default() }).unwrap();
            if ids != *expected {
                failed += 1;
                if failed <= 2 {
                    let tokens: Vec<_> = ids.iter().map(|&id| tokenizer.id_to_token(id)).collect();
                    println!("  {name} {text:?}\n    want {expected:?}\n    got  {ids:?} {tokens:?}");
                }
            }
            assert_eq!(streamed(&tokenizer, &ids), tokenizer.decode(&ids, false).unwrap(), "{name}");
        }
        let pre = tokenizer.pre_tokenizer().map_or("-".to_string(), |p| p.to_string());
        println!("{name:16} {:9} {pre:16} {}/{} cases", tokenizer.model(), cases.len() - failed, cases.len());
        if failed > 0 {
            wrong.push(name);
        }
    }
    let known: Vec<&str> = KNOWN_FAILURES.iter().map(|(name, _)| *name).collect();
    assert_eq!(wrong, known, "vocabularies that fail, against those known to");
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = tokenizer.decode_stream(false);
    let mut out: String = ids.iter().filter_map(|&id| stream.push(id).unwrap()).collect();
    out.push_str(&stream.flush().unwrap().unwrap_or_default());
    out
}

#[test]
fn tiktoken_test_plans() {
    let Some(folder) = asset("tiktoken") else { return };
    let plans = std::fs::read_to_string(folder.join("TestPlans.txt")).unwrap().replace("\r\n", "\n");
    let mut tokenizers: BTreeMap<String, Tokenizer> = BTreeMap::new();
    let (mut passed, mut failed) = (BTreeMap::<String, usize>::new(), Vec::new());
    for plan in plans.split("EncodingName: ").filter(|p| !p.trim().is_empty()) {
        let (name, rest) = plan.split_once("\nSample: ").unwrap();
        let (sample, encoded) = rest.rsplit_once("\nEncoded: ").unwrap();
        let expected: Vec<u32> = serde_json::from_str(encoded.trim()).unwrap();
        let tokenizer = tokenizers.entry(name.to_string()).or_insert_with(|| {
            // The edit encoding shares its ranks with the base one.
            let file = folder.join(format!("{}.tiktoken", name.replace("_edit", "_base")));
            let tokenizer = Tokenizer::from_tiktoken(&file, name).unwrap();
            if !name.ends_with("_edit") {
                assert_eq!(Tokenizer::from_path(&file).unwrap().fingerprint(), tokenizer.fingerprint());
            }
            tokenizer
        });
        let ids = tokenizer.encode(sample, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), sample);
        if ids == expected {
            *passed.entry(name.to_string()).or_default() += 1;
        } else {
            failed.push(format!("{name}: {sample:?}\n want {expected:?}\n got  {ids:?}"));
        }
    }
    println!("{passed:?}");
    assert!(failed.is_empty(), "{} cases fail, such as {}", failed.len(), failed[0]);
    assert_eq!(passed.values().sum::<usize>(), 313);
}
