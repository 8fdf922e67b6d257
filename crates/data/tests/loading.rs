//! Rows by global index: nothing lost, nothing doubled, nothing mixed, the same after any interruption.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tallow_data::*;

/// Prepares one JSON line a document; returns the folder and the training split.
fn prepared(docs: &[String], shard_tokens: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("docs.jsonl");
    let lines: Vec<_> = docs.iter().map(|d| serde_json::json!({ "text": d }).to_string()).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let out = dir.path().join("out");
    let options = PrepareOptions { shard_tokens, ..PrepareOptions::default() };
    prepare(&[file], &Utf8Bytes, &out, &options, &mut |_| {}).unwrap();
    let train = out.join("train");
    (dir, train)
}

fn open(dir: &Path) -> TokenDataset {
    TokenDataset::open(&[dir.to_owned()]).unwrap()
}

fn loader(dir: &Path, context_length: usize, packing: bool, seed: u64) -> Loader {
    let options = LoaderOptions { context_length, packing, seed, ..LoaderOptions::default() };
    Loader::new(open(dir), options).unwrap()
}

fn documents_strategy() -> impl Strategy<Value = Vec<String>> {
    // Each document in its own letters would be short; lengths from 1 to far more than a row.
    prop::collection::vec("[a-z]{1,40}", 1..20)
}

/// Every pair (token, next token) of the corpus, counted.
fn pairs_of_corpus(docs: &[String]) -> BTreeMap<(u32, u32), usize> {
    let mut pairs = BTreeMap::new();
    for doc in docs {
        let ids: Vec<u32> = doc.bytes().map(u32::from).chain([Utf8Bytes::EOS]).collect();
        for pair in ids.windows(2) {
            *pairs.entry((pair[0], pair[1])).or_default() += 1;
        }
    }
    pairs
}

fn pairs_of_epoch(loader: &Loader, epoch: u64) -> BTreeMap<(u32, u32), usize> {
    let mut pairs = BTreeMap::new();
    let mut row = Row::default();
    let rows = loader.rows_per_epoch();
    for index in epoch * rows..(epoch + 1) * rows {
        loader.sample(index, &mut row).unwrap();
        check_row(&row, loader.options().context_length);
        for (input, target) in row.input_ids.iter().zip(&row.targets) {
            if *target != IGNORE_INDEX {
                *pairs.entry((*input, *target)).or_default() += 1;
            }
        }
    }
    pairs
}

/// What holds for every row.
fn check_row(row: &Row, t: usize) {
    let lens = [row.input_ids.len(), row.targets.len(), row.positions.len(), row.doc_start.len()];
    assert_eq!(lens, [t; 4]);
    assert_eq!(row.num_targets, row.targets.iter().filter(|&&t| t != IGNORE_INDEX).count());
    for i in 0..t {
        assert_eq!(row.positions[i], i as u32 - row.doc_start[i]);
        let starts = row.positions[i] == 0;
        if i > 0 {
            assert_eq!(starts, row.doc_start[i] != row.doc_start[i - 1]);
            // Inside a document the target is the next input.
            assert!(starts || row.targets[i - 1] == row.input_ids[i] || row.targets[i - 1] == IGNORE_INDEX);
        }
        if row.input_ids[i] == Utf8Bytes::EOS {
            assert_eq!(row.targets[i], IGNORE_INDEX, "nothing is predicted behind the end of a document");
            assert!(i + 1 == t || row.positions[i + 1] == 0);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn every_token_is_a_target_once_an_epoch(
        docs in documents_strategy(), t in 1usize..50, packing: bool, seed: u64, shard_tokens in 1u64..200,
    ) {
        let (_keep, dir) = prepared(&docs, shard_tokens);
        let loader = loader(&dir, t, packing, seed);
        let expected = pairs_of_corpus(&docs);
        for epoch in [0, 1, 5] {
            prop_assert_eq!(&pairs_of_epoch(&loader, epoch), &expected);
        }
        let in_order: usize = open(&dir).sequential(t, 3).unwrap().map(|b| b.unwrap().num_targets).sum();
        prop_assert_eq!(in_order as u64, open(&dir).num_targets());
    }

    #[test]
    fn any_slices_of_the_samples_are_the_same_rows(
        docs in documents_strategy(), t in 1usize..20, packing: bool, first in 0u64..100, cut in 0usize..8,
    ) {
        let (_keep, dir) = prepared(&docs, 64);
        let whole = loader(&dir, t, packing, 3).batch(first, 8).unwrap();
        // Other loaders, as on other ranks, that were never asked for anything before.
        let head = loader(&dir, t, packing, 3).batch(first, cut).unwrap();
        let tail = loader(&dir, t, packing, 3).batch(first + cut as u64, 8 - cut).unwrap();
        prop_assert_eq!(whole.batch, 8);
        prop_assert_eq!(&whole.input_ids, &[head.input_ids, tail.input_ids].concat());
        prop_assert_eq!(&whole.targets, &[head.targets, tail.targets].concat());
        prop_assert_eq!(&whole.doc_start, &[head.doc_start, tail.doc_start].concat());
        prop_assert_eq!(&whole.positions, &[head.positions, tail.positions].concat());
        prop_assert_eq!(whole.num_targets, head.num_targets + tail.num_targets);
    }
}

#[test]
fn going_on_at_any_sample_is_the_uninterrupted_run() {
    let docs: Vec<_> = (0..12u8).map(|i| String::from((b'a' + i) as char).repeat(5 + 3 * i as usize)).collect();
    let (_keep, dir) = prepared(&docs, 100);
    let uninterrupted: Vec<_> = loader(&dir, 16, true, 5).prefetch(0, 4).take(12).map(Result::unwrap).collect();
    for stop in 0..12u64 {
        let saved = serde_json::to_string(&loader(&dir, 16, true, 5).state(4 * stop)).unwrap();
        let state: LoaderState = serde_json::from_str(&saved).unwrap();
        let again = loader(&dir, 16, true, 5);
        again.check_state(&state).unwrap();
        let rest: Vec<_> = again.prefetch(state.next_index, 4).take(12 - stop as usize).map(Result::unwrap).collect();
        assert_eq!(rest, uninterrupted[stop as usize..]);
    }
    // Two ranks, half of each batch each.
    let halves: Vec<Vec<_>> = [0, 2]
        .map(|first| loader(&dir, 16, true, 5).prefetch_strided(first, 2, 4).take(12).map(Result::unwrap).collect())
        .into();
    for (i, whole) in uninterrupted.iter().enumerate() {
        assert_eq!(whole.input_ids, [halves[0][i].input_ids.clone(), halves[1][i].input_ids.clone()].concat());
    }
}

#[test]
fn editing_one_document_leaves_the_tokens_of_the_others() {
    let docs: Vec<_> = (0..9u8).map(|i| String::from((b'a' + i) as char).repeat(7 + i as usize)).collect();
    let mut edited = docs.clone();
    edited[4] = "E".repeat(docs[4].len());
    let (_k1, before) = prepared(&docs, 1000);
    let (_k2, after) = prepared(&edited, 1000);
    let (before, after) = (loader(&before, 8, true, 1), loader(&after, 8, true, 1));
    let mut changed = 0;
    for index in 0..before.rows_per_epoch() {
        let (mut a, mut b) = (Row::default(), Row::default());
        before.sample(index, &mut a).unwrap();
        after.sample(index, &mut b).unwrap();
        assert_eq!((&a.doc_start, &a.positions), (&b.doc_start, &b.positions));
        for i in 0..8 {
            if a.input_ids[i] != b.input_ids[i] {
                assert_eq!((a.input_ids[i], b.input_ids[i]), (u32::from(b'e'), u32::from(b'E')));
                changed += 1;
            } else {
                assert_eq!(a.targets[i], b.targets[i], "another document's target changed");
            }
        }
    }
    assert_eq!(changed, docs[4].len(), "the edited document is read once, whole");
}

#[test]
fn epochs_differ_in_order_only_and_seeds_differ() {
    let docs: Vec<_> = (0..40).map(|i| format!("document number {i}")).collect();
    let (_keep, dir) = prepared(&docs, 10_000);
    let epoch = |seed, e: u64| {
        let l = loader(&dir, 32, true, seed);
        l.batch(e * l.rows_per_epoch(), l.rows_per_epoch() as usize).unwrap().input_ids
    };
    assert_ne!(epoch(1, 0), epoch(1, 1));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_eq!(epoch(1, 1), epoch(1, 1));
    let options = LoaderOptions { context_length: 32, shuffle: false, ..LoaderOptions::default() };
    let ordered = Loader::new(open(&dir), options).unwrap();
    let rows = ordered.rows_per_epoch();
    let text: Vec<u8> = ordered.batch(0, rows as usize).unwrap().input_ids.iter().map(|&id| id as u8).collect();
    assert!(text.starts_with(b"document number 0\0document number 1\0"), "documents in order without shuffling");
    assert_eq!(ordered.batch(0, 3).unwrap(), ordered.batch(7 * rows, 3).unwrap());
}

#[test]
fn fewer_rows_than_a_batch_go_round() {
    let (_keep, dir) = prepared(&["abc".to_owned()], 100);
    let loader = loader(&dir, 256, true, 0);
    assert_eq!(loader.rows_per_epoch(), 1);
    let batch = loader.batch(0, 5).unwrap();
    assert_eq!((batch.batch, batch.num_targets), (5, 15));
    assert_eq!(batch.input_ids[..5], [97, 98, 99, 256, 0]);
    assert_eq!(batch.targets[..5], [98, 99, 256, IGNORE_INDEX, IGNORE_INDEX]);
    assert_eq!(batch.doc_start[..6], [0, 0, 0, 0, 4, 4]);
}

#[test]
fn truncation_keeps_the_beginning_of_each_document() {
    let (_keep, dir) = prepared(&["abcdefgh".to_owned(), "xy".to_owned()], 100);
    let options =
        LoaderOptions { context_length: 3, packing: false, truncate: true, shuffle: false, ..LoaderOptions::default() };
    let loader = Loader::new(open(&dir), options).unwrap();
    let batch = loader.batch(0, 2).unwrap();
    assert_eq!(loader.rows_per_epoch(), 2);
    assert_eq!(batch.input_ids, [97, 98, 99, 120, 121, 0].map(|id| if id == 0 { 256 } else { id }));
    assert_eq!(batch.targets, [98, 99, 100, 121, 256, IGNORE_INDEX]);
}

#[test]
fn nothing_to_predict_is_said_with_numbers() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "a").unwrap();
    let options = PrepareOptions { append_eos: false, ..PrepareOptions::default() };
    let out = dir.path().join("out");
    prepare(&[dir.path().join("a.txt")], &Utf8Bytes, &out, &options, &mut |_| {}).unwrap();
    let dataset = open(&out.join("train"));
    for packing in [true, false] {
        let error = Loader::new(dataset.clone(), LoaderOptions { packing, ..LoaderOptions::default() }).unwrap_err();
        assert!(matches!(error, Error::NoRows { tokens: 1, documents: 1 }), "{error}");
    }
    let zero = Loader::new(dataset, LoaderOptions { context_length: 0, ..LoaderOptions::default() }).unwrap_err();
    assert!(zero.to_string().contains("context_length = 0"), "{zero}");
}

#[test]
fn another_dataset_or_option_cannot_be_resumed() {
    let (_k1, a) = prepared(&["one text".to_owned()], 100);
    let (_k2, b) = prepared(&["another text".to_owned()], 100);
    let state = loader(&a, 8, true, 1).state(40);
    let told = |l: Loader| l.check_state(&state).unwrap_err().to_string();
    assert!(told(loader(&b, 8, true, 1)).contains("training data"));
    assert!(told(loader(&a, 9, true, 1)).contains("context_length was 8 when the state was saved and is 9 now"));
    assert!(told(loader(&a, 8, true, 2)).contains("seed"));
    assert!(told(loader(&a, 8, false, 1)).contains("packing"));
    loader(&a, 8, true, 1).check_state(&state).unwrap();
}

#[test]
fn the_rows_of_a_long_document_are_not_neighbours() {
    let mut docs = vec!["L".repeat(6400)];
    docs.extend((0..200).map(|_| "s".repeat(63)));
    let (_keep, dir) = prepared(&docs, 1 << 20);
    let loader = loader(&dir, 64, true, 11);
    let mut most = 0;
    for step in 0..loader.rows_per_epoch() / 8 {
        let batch = loader.batch(step * 8, 8).unwrap();
        let long = batch.input_ids.chunks(64).filter(|row| row[32] == u32::from(b'L')).count();
        most = most.max(long);
    }
    assert!(most < 8, "a batch is all of one document");
}

#[test]
fn dropping_a_prefetch_ends_its_thread_and_errors_come_in_their_place() {
    let docs: Vec<_> = (0..50).map(|i| format!("some text {i}")).collect();
    let (_keep, dir) = prepared(&docs, 100_000);
    drop(loader(&dir, 8, true, 0).prefetch(0, 4));
    // A token outside the vocabulary is found when its shard is first read.
    let shard = dir.join("shard-00000.tok");
    let mut bytes = std::fs::read(&shard).unwrap();
    bytes[64 + 10] = 0xff;
    bytes[64 + 11] = 0xff;
    std::fs::write(&shard, bytes).unwrap();
    let mut prefetch = loader(&dir, 8, true, 0).prefetch(0, 4);
    let error = prefetch.next().unwrap().unwrap_err().to_string();
    assert!(error.contains("shard-00000.tok, byte 74") && error.contains("65535"), "{error}");
    assert!(prefetch.next().is_none());
}

#[test]
fn several_folders_are_one_dataset() {
    let (_k1, a) = prepared(&["first".to_owned(), "second".to_owned()], 4);
    let (_k2, b) = prepared(&["third".to_owned()], 100);
    let dataset = TokenDataset::open(&[a.clone(), b.clone()]).unwrap();
    assert_eq!((dataset.num_documents(), dataset.num_tokens()), (3, 6 + 7 + 6));
    let text = |i| dataset.document(i).unwrap().iter().map(|id| id as u8 as char).collect::<String>();
    assert_eq!([text(0), text(1), text(2)], ["first\0", "second\0", "third\0"]);
    assert_eq!((dataset.document_bytes(1).unwrap(), dataset.text_bytes()), (6, 16));
    assert!(dataset.document(3).is_err());
    assert_eq!(dataset.bytes_per_token(), 1.0);
    let swapped = TokenDataset::open(&[b, a]).unwrap();
    assert_ne!(swapped.fingerprint(), dataset.fingerprint());
    let mut lengths = HashMap::new();
    for i in 0..3 {
        *lengths.entry(dataset.document_len(i).unwrap()).or_insert(0) += 1;
    }
    assert_eq!(lengths, HashMap::from([(6, 2), (7, 1)]));
}
