//! From files to shards: what is written, what is refused, and what a kill leaves.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::path::{Path, PathBuf};

use tallow_data::*;

/// An encoder of one id a character, with any size of vocabulary, that can stop in the middle.
struct Characters {
    vocab: usize,
    fail_on: Option<&'static str>,
}

impl Encode for Characters {
    fn encode_documents(&self, docs: &[&str]) -> Result<Vec<Vec<u32>>> {
        if let Some(bad) = self.fail_on.filter(|bad| docs.iter().any(|d| d.contains(bad))) {
            return Err(Error::Encode { source: format!("cannot encode {bad}").into() });
        }
        Ok(docs.iter().map(|d| d.chars().map(u32::from).collect()).collect())
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn eos_id(&self) -> Option<u32> {
        Some(self.vocab as u32 - 1)
    }

    fn bos_id(&self) -> Option<u32> {
        Some(self.vocab as u32 - 2)
    }

    fn fingerprint(&self) -> String {
        format!("characters-{}", self.vocab)
    }
}

fn jsonl(dir: &Path, name: &str, docs: impl IntoIterator<Item = String>) -> PathBuf {
    let path = dir.join(name);
    let lines: Vec<_> = docs.into_iter().map(|d| serde_json::json!({ "text": d }).to_string()).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn run(inputs: &[PathBuf], out: &Path, options: PrepareOptions) -> Result<PrepareReport> {
    prepare(inputs, &Utf8Bytes, out, &options, &mut |_| {})
}

/// The texts of a split, sorted.
fn texts(split: &Path) -> Vec<String> {
    let dataset = TokenDataset::open(&[split.to_owned()]).unwrap();
    let text = |i| {
        let ids = dataset.document(i).unwrap().to_vec();
        assert_eq!(ids.last(), Some(&Utf8Bytes::EOS));
        let bytes: Vec<u8> = ids[..ids.len() - 1].iter().map(|&id| id as u8).collect();
        assert_eq!(dataset.document_bytes(i).unwrap(), bytes.len() as u64);
        String::from_utf8(bytes).unwrap()
    };
    let mut texts: Vec<_> = (0..dataset.num_documents()).map(text).collect();
    texts.sort();
    texts
}

#[test]
fn both_splits_hold_every_document_once_whatever_the_order() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<_> = (0..500).map(|i| format!("document {i} with some text")).collect();
    let forward = jsonl(dir.path(), "a.jsonl", docs.clone());
    let backward = jsonl(dir.path(), "b.jsonl", docs.iter().rev().cloned());
    let options = PrepareOptions { valid_fraction: 0.1, shard_tokens: 2000, ..PrepareOptions::default() };
    let report = run(&[forward], &dir.path().join("x"), options.clone()).unwrap();
    run(&[backward], &dir.path().join("y"), options).unwrap();
    let [train, valid] = ["train", "valid"].map(|s| texts(&dir.path().join("x").join(s)));
    assert_eq!(train, texts(&dir.path().join("y/train")));
    assert_eq!(valid, texts(&dir.path().join("y/valid")));
    assert!((20..100).contains(&valid.len()), "{}", report.split_rule);
    let mut all = [train, valid].concat();
    let mut expected = docs;
    all.sort();
    expected.sort();
    assert_eq!(all, expected);
    assert!(report.train.shards > 3);
    assert_eq!((report.documents, report.train.documents + report.valid.documents), (500, 500));
    assert_eq!(entries(dir.path()), ["a.jsonl", "b.jsonl", "x", "y"]);
}

#[test]
fn one_file_gives_its_tail() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..1000).map(|i| format!("line number {i}\n")).collect();
    let file = dir.path().join("book.txt");
    std::fs::write(&file, &text).unwrap();
    let options = PrepareOptions { valid_fraction: 0.1, ..PrepareOptions::default() };
    let report = run(&[file], &dir.path().join("out"), options).unwrap();
    let (train, valid) = (texts(&dir.path().join("out/train")), texts(&dir.path().join("out/valid")));
    assert_eq!(train.concat() + &valid.concat(), text);
    assert!(valid[0].starts_with("line number 9"), "{}", &valid[0][..20]);
    let share = report.valid.text_bytes as f64 / text.len() as f64;
    assert!((0.08..0.12).contains(&share) && report.split_rule.contains("tail"), "{share} {}", report.split_rule);
    let index = SplitIndex::read(&dir.path().join("out/valid")).unwrap();
    assert_eq!((index.split_rule, index.sources.len()), (report.split_rule, 1));
}

#[test]
fn narrow_and_wide_ids() {
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", ["añb".to_owned(), "\u{1F600}!".to_owned()]);
    for (vocab, width) in [(1 << 16, 2), ((1 << 16) + 1, 4), (200_000, 4)] {
        let encoder = Characters { vocab, fail_on: None };
        let out = dir.path().join(format!("v{vocab}"));
        let options = PrepareOptions { prepend_bos: true, ..PrepareOptions::default() };
        let report = prepare(std::slice::from_ref(&file), &encoder, &out, &options, &mut |_| {});
        if vocab < 0x1F600 {
            let error = report.unwrap_err();
            assert!(matches!(&error, Error::EncoderContract { .. }), "{error}");
            assert!(!out.exists());
            continue;
        }
        report.unwrap();
        let dataset = TokenDataset::open(&[out.join("train")]).unwrap();
        assert_eq!(SplitIndex::read(&out.join("train")).unwrap().token_bytes, width);
        assert_eq!((dataset.eos_id(), dataset.bos_id()), (Some(vocab as u32 - 1), Some(vocab as u32 - 2)));
        let bos = vocab as u32 - 2;
        assert_eq!(dataset.document(1).unwrap().to_vec(), [bos, 0x1F600, 33, bos + 1]);
        assert_eq!(dataset.document(1).unwrap().get(1), Some(0x1F600));
        assert_eq!(dataset.document(1).unwrap().get(4), None);
    }
    let encoder = Characters { vocab: 1 << 16, fail_on: None };
    let plain = jsonl(dir.path(), "b.jsonl", ["\u{fffd}".to_owned()]);
    prepare(&[plain], &encoder, &dir.path().join("edge"), &PrepareOptions::default(), &mut |_| {}).unwrap();
    let dataset = TokenDataset::open(&[dir.path().join("edge/train")]).unwrap();
    assert_eq!(dataset.document(0).unwrap().to_vec(), [0xfffd, 0xffff]);
}

#[test]
fn the_result_is_the_same_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let docs = (0..3000).map(|i| format!("{i} ").repeat(1 + i % 50));
    let file = jsonl(dir.path(), "a.jsonl", docs);
    let hashes = [1, 3].map(|threads| {
        let out = dir.path().join(format!("t{threads}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let options = PrepareOptions { shard_tokens: 50_000, valid_fraction: 0.05, ..PrepareOptions::default() };
        pool.install(|| run(std::slice::from_ref(&file), &out, options)).unwrap();
        ["train", "valid"].map(|s| SplitIndex::read(&out.join(s)).unwrap().shards)
    });
    assert_eq!(hashes[0], hashes[1]);
}

#[test]
fn an_existing_folder_is_kept_unless_told_otherwise() {
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", ["first".to_owned()]);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    run(std::slice::from_ref(&file), &out, PrepareOptions::default()).unwrap();
    let again = run(std::slice::from_ref(&file), &out, PrepareOptions::default()).unwrap_err();
    assert!(again.to_string().contains("exists already") && again.to_string().contains("overwrite"), "{again}");
    assert_eq!(texts(&out.join("train")), ["first"]);
    let file = jsonl(dir.path(), "a.jsonl", ["second".to_owned()]);
    // A failing replacement leaves the old one.
    let options = PrepareOptions { overwrite: true, ..PrepareOptions::default() };
    let encoder = Characters { vocab: 300, fail_on: Some("second") };
    assert!(prepare(std::slice::from_ref(&file), &encoder, &out, &options, &mut |_| {}).is_err());
    assert_eq!(texts(&out.join("train")), ["first"]);
    run(&[file], &out, options).unwrap();
    assert_eq!(texts(&out.join("train")), ["second"]);
    assert_eq!(entries(dir.path()), ["a.jsonl", "out"]);
    std::fs::write(dir.path().join("plain"), "a file").unwrap();
    assert!(run(&[dir.path().join("a.jsonl")], &dir.path().join("plain"), PrepareOptions::default()).is_err());
    // What was not prepared is never replaced, least of all the text itself.
    let words = dir.path().join("words");
    std::fs::create_dir(&words).unwrap();
    std::fs::write(words.join("a.txt"), "third").unwrap();
    let options = PrepareOptions { overwrite: true, ..PrepareOptions::default() };
    let error = run(std::slice::from_ref(&words), &words, options).unwrap_err().to_string();
    assert!(error.contains("other things than prepared tokens"), "{error}");
    assert_eq!(entries(&words), ["a.txt"]);
}

#[test]
fn failures_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("deep/out");
    let file = jsonl(dir.path(), "a.jsonl", (0..10_000).map(|i| format!("text {i}")));
    let encoder = Characters { vocab: 300, fail_on: Some("text 9876") };
    let error =
        prepare(std::slice::from_ref(&file), &encoder, &out, &PrepareOptions::default(), &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("cannot encode"), "{error}");
    let bad = dir.path().join("bad.jsonl");
    std::fs::write(&bad, "{\"text\": \"a\"}\nnonsense\n").unwrap();
    assert!(matches!(run(&[bad], &out, PrepareOptions::default()), Err(Error::TooManyMalformed { .. })));
    let blank = dir.path().join("blank.txt");
    std::fs::write(&blank, " \n ").unwrap();
    assert!(matches!(run(&[blank], &out, PrepareOptions::default()), Err(Error::NoDocuments { .. })));
    let one_byte = dir.path().join("one.txt");
    std::fs::write(&one_byte, "x").unwrap();
    let held = PrepareOptions { valid_fraction: 0.1, ..PrepareOptions::default() };
    assert!(run(&[one_byte], &out, held).unwrap_err().to_string().contains("too few to hold any out"));
    assert_eq!(entries(&dir.path().join("deep")), [""; 0]);
    for (name, options) in [
        ("valid_fraction = 0.9", PrepareOptions { valid_fraction: 0.9, ..PrepareOptions::default() }),
        ("valid_fraction = NaN", PrepareOptions { valid_fraction: f64::NAN, ..PrepareOptions::default() }),
        ("shard_tokens = 0", PrepareOptions { shard_tokens: 0, ..PrepareOptions::default() }),
        ("prepend_bos = true", PrepareOptions { prepend_bos: true, ..PrepareOptions::default() }),
    ] {
        let error = run(std::slice::from_ref(&file), &out, options).unwrap_err().to_string();
        assert!(error.starts_with(name), "{error}");
    }
}

#[cfg(unix)]
#[test]
fn a_disk_that_refuses_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", ["text".to_owned()]);
    let locked = dir.path().join("locked");
    std::fs::create_dir(&locked).unwrap();
    std::fs::set_permissions(&locked, std::fs::Permissions::from_mode(0o555)).unwrap();
    if std::fs::write(locked.join("probe"), "").is_ok() {
        println!("skipped: this user writes where permissions forbid it (root)");
        return;
    }
    let error = run(&[file], &locked.join("out"), PrepareOptions::default()).unwrap_err();
    assert!(error.to_string().contains("locked"), "{error}");
}

#[test]
fn cached_folders_are_found_again_and_renewed_when_the_text_changes() {
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", ["first".to_owned()]);
    let cache = CacheOptions { root: dir.path().join("cache"), prepare: PrepareOptions::default() };
    let encoded = std::cell::Cell::new(0);
    let get = |file: &PathBuf, encoder: &dyn Encode| {
        cached_prepare(std::slice::from_ref(file), encoder, &cache, &mut |_| encoded.set(encoded.get() + 1)).unwrap()
    };
    let first = get(&file, &Utf8Bytes);
    assert_eq!((get(&file, &Utf8Bytes), encoded.get()), (first.clone(), 1));
    assert_eq!(texts(&first), ["first"]);
    let other = get(&file, &Characters { vocab: 300, fail_on: None });
    assert!(other != first && encoded.get() == 2);
    let file = jsonl(dir.path(), "a.jsonl", ["first", "and second"].map(str::to_owned));
    assert_eq!(texts(&get(&file, &Utf8Bytes)), ["and second", "first"]);
    assert_eq!((texts(&first), encoded.get()), (vec!["first".to_owned()], 3));
    // Several at once: one prepares, the others wait for it.
    let file = jsonl(dir.path(), "b.jsonl", (0..2000).map(|i| format!("text {i}")));
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let found: Vec<_> = std::thread::scope(|s| {
        let get = || {
            cached_prepare(std::slice::from_ref(&file), &Utf8Bytes, &cache, &mut |_| {
                calls.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            })
        };
        let threads: Vec<_> = (0..4).map(|_| s.spawn(get)).collect();
        threads.into_iter().map(|t| t.join().unwrap().unwrap()).collect()
    });
    assert!(found.iter().all(|f| f == &found[0]));
    assert_eq!(calls.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn looking_into_what_was_prepared() {
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", ["a".to_owned(), "bcd".to_owned(), "e".repeat(100)]);
    let out = dir.path().join("out");
    run(&[file], &out, PrepareOptions::default()).unwrap();
    let found = inspect(&out, 2, 3).unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].first_documents, [vec![97, 256], vec![98, 99, 100]]);
    assert_eq!(found[0].shortest_median_longest, [2, 4, 101]);
    let buckets: Vec<_> = found[0].lengths.iter().map(|b| (b.from, b.to, b.documents)).collect();
    assert_eq!(buckets, [(2, 3, 1), (4, 7, 1), (64, 127, 1)]);
    assert!(inspect(&dir.path().join("nothing"), 1, 1).unwrap_err().to_string().contains("no such folder"));
    let told = TokenDataset::open(&[out]).unwrap_err().to_string();
    assert!(told.contains("name one of them") && told.contains("train"), "{told}");
}

/// The test below starts this one again as a process that it can kill; alone it does nothing.
#[test]
fn endless_preparation_in_a_child() {
    let Ok(dir) = std::env::var("TALLOW_TEST_PREPARE_IN") else { return };
    let dir = PathBuf::from(dir);
    let file = dir.join("a.jsonl");
    let options = PrepareOptions { overwrite: true, valid_fraction: 0.1, shard_tokens: 4000, ..Default::default() };
    loop {
        run(std::slice::from_ref(&file), &dir.join("out"), options.clone()).unwrap();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_whole_folders() {
    let dir = tempfile::tempdir().unwrap();
    let file = jsonl(dir.path(), "a.jsonl", (0..400).map(|i| format!("text number {i} ").repeat(20)));
    run(&[file], &dir.path().join("out"), PrepareOptions::default()).unwrap();
    let first = SplitIndex::read(&dir.path().join("out/train")).unwrap();
    for round in 0..20 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "endless_preparation_in_a_child"])
            .env("TALLOW_TEST_PREPARE_IN", dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let changed = || SplitIndex::read(&dir.path().join("out/train")).is_ok_and(|i| i.shards != first.shards);
        let patience = std::time::Instant::now();
        while round == 0 && !changed() {
            assert!(patience.elapsed().as_secs() < 60, "no preparation came to its end");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_millis(13 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        // Whatever has the name is complete; between two renames nothing has it, and what had it is put aside whole.
        let out = dir.path().join("out");
        let kept = if out.exists() { out } else { dir.path().join(".out.old") };
        let report = verify(&kept).unwrap();
        assert!(report.shards > 0 && report.damaged.is_empty(), "{report:?}");
    }
    // What the kills left is cleared away by the next run.
    let options = PrepareOptions { overwrite: true, ..PrepareOptions::default() };
    run(&[dir.path().join("a.jsonl")], &dir.path().join("out"), options).unwrap();
    assert_eq!(entries(dir.path()), ["a.jsonl", "out"]);
}

/// The test below runs this one as a process of its own; alone it does nothing.
#[test]
fn preparation_onto_a_full_disk_in_a_child() {
    let Ok(dir) = std::env::var("TALLOW_TEST_FULL_DISK_IN") else { return };
    let dir = PathBuf::from(dir);
    let error = run(&[dir.join("a.jsonl")], &dir.join("out"), PrepareOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("shard-00000.tok")), "{error}");
    println!("the write was refused");
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_that_names_the_file_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    jsonl(dir.path(), "a.jsonl", (0..2000).map(|i| format!("text number {i} ").repeat(20)));
    // A limit of file size stands in for a full disk: the same write fails, in the middle of a shard.
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; ulimit -f 200; exec \"$0\" --exact preparation_onto_a_full_disk_in_a_child --nocapture",
        ])
        .arg(std::env::current_exe().unwrap())
        .env("TALLOW_TEST_FULL_DISK_IN", dir.path())
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("the write was refused"), "{told}");
    assert_eq!(entries(dir.path()), ["a.jsonl"]);
}

#[test]
fn what_a_trained_tokenizer_encoded_decodes_to_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<_> = (0..300).map(|i| format!("Sentence {i} — naïve, größer, 東京 {}\n", i * i)).collect();
    let options = tallow_tokenizer::TrainOptions { vocab_size: 400, ..Default::default() };
    let tokenizer = tallow_tokenizer::train(&docs, &options, |_| {}).unwrap();
    let file = jsonl(dir.path(), "a.jsonl", docs.clone());
    let out = dir.path().join("out");
    let report = prepare(&[file], &tokenizer, &out, &PrepareOptions::default(), &mut |_| {}).unwrap();
    let dataset = TokenDataset::open(&[out.join("train")]).unwrap();
    assert_eq!(dataset.tokenizer_fingerprint(), tokenizer.fingerprint());
    assert_eq!((dataset.vocab_size(), dataset.eos_id()), (tokenizer.vocab_size(), tokenizer.eos_id()));
    for (i, doc) in docs.iter().enumerate() {
        let ids = dataset.document(i as u64).unwrap().to_vec();
        assert_eq!(ids.last().copied(), tokenizer.eos_id());
        assert_eq!(&tokenizer.decode(&ids, true).unwrap(), doc);
        assert_eq!(ids[..ids.len() - 1], tokenizer.encode(doc, false).unwrap());
    }
    let bytes: usize = docs.iter().map(String::len).sum();
    assert_eq!(report.train.text_bytes, bytes as u64);
    assert!((dataset.bytes_per_token() - bytes as f64 / (report.train.tokens - 300) as f64).abs() < 1e-12);
}
