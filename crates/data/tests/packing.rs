//! Rows of whole examples: each once an epoch, none cut, masked and weighted as it was prepared.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tallow_data::*;

/// Prepares prompts with completions; returns the folder and the training split.
fn prepared(records: &[Value], shard_tokens: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.jsonl");
    let lines: Vec<_> = records.iter().map(Value::to_string).collect();
    std::fs::write(&file, lines.join("\n")).unwrap();
    let out = dir.path().join("out");
    let options = ChatOptions { shard_tokens, ..ChatOptions::default() };
    prepare_chat(&[file], &Utf8Chat, &out, &options, &mut |_| {}).unwrap();
    let train = out.join("train");
    (dir, train)
}

fn open(dir: &Path) -> TokenDataset {
    TokenDataset::open(&[dir.to_owned()]).unwrap()
}

fn options(context_length: usize, packing: bool, shuffle: bool, seed: u64) -> LoaderOptions {
    LoaderOptions { context_length, packing, shuffle, seed, ..LoaderOptions::default() }
}

fn loader(dir: &Path, options: LoaderOptions) -> Loader {
    Loader::new(open(dir), options).unwrap()
}

fn pair(prompt: &str, completion: &str) -> Value {
    json!({"prompt": prompt, "completion": completion})
}

/// Prompts and completions of all lengths; a conversation with a weight now and then.
fn records() -> impl Strategy<Value = Vec<Value>> {
    let pair = ("[a-f]{0,12}", "[g-m]{1,12}").prop_map(|(p, c)| pair(&p, &c));
    let chat = (1usize..4, "[n-z]{1,6}").prop_map(|(w, c)| {
        let weight = w as f64 / 2.0;
        json!({"prompt": [], "completion": [{"role": "assistant", "content": c, "weight": weight}]})
    });
    // One file is of one shape, and these are both prompts with completions.
    prop::collection::vec(prop_oneof![3 => pair, 1 => chat], 1..30)
}

/// An example as a row shows it: ids, targets and weights of its places.
type Seen = (Vec<u32>, Vec<u32>, Vec<u32>);

/// The examples of a row or batch, by its document starts; checks what holds for every row.
fn examples_of(row: &Row, t: usize) -> Vec<Seen> {
    assert_eq!([row.input_ids.len(), row.targets.len(), row.positions.len(), row.doc_start.len()], [t; 4]);
    assert!(row.weights.is_empty() || row.weights.len() == t);
    let weight = |i: usize| match row.targets[i] {
        IGNORE_INDEX => 0.0,
        _ => row.weights.get(i).copied().unwrap_or(1.0),
    };
    assert!((0..row.weights.len()).all(|i| row.weights[i] == weight(i)));
    assert_eq!(row.num_targets, row.targets.iter().filter(|&&t| t != IGNORE_INDEX).count());
    assert_eq!(row.weight_sum, (0..t).map(|i| f64::from(weight(i))).sum::<f64>());
    let mut found = vec![];
    let mut from = 0;
    while from < t {
        assert_eq!(row.doc_start[from], from as u32);
        let len = row.doc_start[from..].iter().take_while(|&&s| s == from as u32).count();
        let places = from..from + len;
        assert!(places.clone().all(|i| row.positions[i] == (i - from) as u32));
        if row.input_ids[from] == Utf8Chat::BOS {
            let weights = places.clone().map(|i| weight(i).to_bits()).collect();
            found.push((row.input_ids[places.clone()].to_vec(), row.targets[places].to_vec(), weights));
        } else {
            assert!(from + len == t && row.targets[from..].iter().all(|&t| t == IGNORE_INDEX), "padding, at the end");
        }
        from += len;
    }
    found
}

/// The examples as they should be seen, from the dataset.
fn expected(dataset: &TokenDataset) -> BTreeMap<Seen, usize> {
    let mut all = BTreeMap::new();
    for i in 0..dataset.num_documents() {
        let ids = dataset.document(i).unwrap().to_vec();
        let mut weights = vec![0f32; ids.len()];
        for span in dataset.spans(i).unwrap() {
            weights[span.tokens.start as usize..span.tokens.end as usize].fill(span.weight);
        }
        let target = |i: usize| if weights[i] > 0.0 { ids[i] } else { IGNORE_INDEX };
        let targets = (1..ids.len()).map(target).collect();
        let weights = weights[1..].iter().map(|w| w.to_bits()).collect();
        *all.entry((ids[..ids.len() - 1].to_vec(), targets, weights)).or_default() += 1;
    }
    all
}

fn seen(loader: &Loader, samples: std::ops::Range<u64>) -> BTreeMap<Seen, usize> {
    let (mut all, mut row) = (BTreeMap::new(), Row::default());
    for index in samples {
        loader.sample(index, &mut row).unwrap();
        for example in examples_of(&row, loader.options().context_length) {
            *all.entry(example).or_default() += 1;
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn every_example_whole_once_an_epoch(
        records in records(), t in 25usize..90, packing: bool, shuffle: bool, seed: u64, shard_tokens in 1u64..300,
    ) {
        let (_keep, dir) = prepared(&records, shard_tokens);
        let loader = loader(&dir, options(t, packing, shuffle, seed));
        let expected = expected(&open(&dir));
        prop_assert_eq!(expected.values().sum::<usize>(), records.len());
        let rows = loader.rows_per_epoch();
        for epoch in [0, 1, 6] {
            prop_assert_eq!(&seen(&loader, epoch * rows..(epoch + 1) * rows), &expected);
        }
        let places: usize = expected.iter().map(|(e, n)| e.0.len() * n).sum();
        prop_assert!((loader.packing_efficiency() - places as f64 / (rows as f64 * t as f64)).abs() < 1e-12);
        // As evaluation reads them: every target once, whatever the batch.
        let batches: Vec<_> = open(&dir).sequential(t, 3).unwrap().map(Result::unwrap).collect();
        prop_assert_eq!(batches.iter().map(|b| b.num_targets as u64).sum::<u64>(), open(&dir).num_targets());
        let weights: f64 = expected.iter().map(|(e, n)| e.2.iter().map(|w| f64::from(f32::from_bits(*w))).sum::<f64>() * *n as f64).sum();
        prop_assert!((batches.iter().map(|b| b.weight_sum).sum::<f64>() - weights).abs() < 1e-9);
    }

    #[test]
    fn any_slices_of_the_samples_are_the_same_rows(
        records in records(), t in 25usize..60, packing: bool, first in 0u64..100, cut in 0usize..8,
    ) {
        let (_keep, dir) = prepared(&records, 64);
        let whole = loader(&dir, options(t, packing, true, 3)).batch(first, 8).unwrap();
        // Other loaders, as on other ranks or after a restart, that were never asked for anything before.
        let head = loader(&dir, options(t, packing, true, 3)).batch(first, cut).unwrap();
        let tail = loader(&dir, options(t, packing, true, 3)).batch(first + cut as u64, 8 - cut).unwrap();
        prop_assert_eq!(&whole.input_ids, &[&head.input_ids[..], &tail.input_ids].concat());
        prop_assert_eq!(&whole.targets, &[&head.targets[..], &tail.targets].concat());
        prop_assert_eq!(&whole.doc_start, &[&head.doc_start[..], &tail.doc_start].concat());
        let weights = |b: &Batch| -> Vec<f32> {
            let weight = |(i, t): (usize, &u32)| match *t {
                IGNORE_INDEX => 0.0,
                _ => b.weights.get(i).copied().unwrap_or(1.0),
            };
            b.targets.iter().enumerate().map(weight).collect()
        };
        prop_assert_eq!(weights(&whole), [weights(&head), weights(&tail)].concat());
        prop_assert!(whole.weights.is_empty() || whole.weights == weights(&whole));
        prop_assert!((whole.weight_sum - head.weight_sum - tail.weight_sum).abs() < 1e-9);
    }
}

#[test]
fn rows_by_hand() {
    let weighted = json!({"prompt": [], "completion": [{"role": "assistant", "content": "w", "weight": 0.5}]});
    let (_keep, dir) = prepared(&[pair("ab", "c"), pair("d", "ef"), weighted], 1000);
    let batch = loader(&dir, options(16, true, false, 0)).batch(0, 2).unwrap();
    let [bos, turn, end] = [Utf8Chat::BOS, Utf8Chat::TURN, Utf8Chat::END];
    let [a, b, c, d, e, f, w] = b"abcdefw".map(u32::from);
    let no = IGNORE_INDEX;
    // ^abc$ and ^def$ are four places each: the end of each is only a target. The third does not fit beside them.
    assert_eq!(batch.input_ids[..16], [bos, a, b, c, bos, d, e, f, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(batch.targets[..9], [no, no, c, end, no, e, f, end, no]);
    assert_eq!(batch.positions[..9], [0, 1, 2, 3, 0, 1, 2, 3, 0]);
    assert_eq!(batch.doc_start[..9], [0, 0, 0, 0, 4, 4, 4, 4, 8]);
    // Weights only where some are not 1, and then for the rows before too.
    assert_eq!(batch.weights[..9], [0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
    let header: Vec<u32> = "assistant\n".bytes().map(u32::from).collect();
    assert_eq!(batch.input_ids[16..29], [&[bos, turn], &header[..], &[w]].concat());
    assert_eq!(batch.targets[16 + 11..16 + 14], [w, end, no]);
    assert_eq!(batch.weights[16 + 10..16 + 14], [0.0, 0.5, 0.5, 0.0]);
    assert_eq!((batch.num_targets, batch.weight_sum), (5 + 2, 5.0 + 1.0));
    let first = loader(&dir, options(16, true, false, 0)).batch(0, 1).unwrap();
    assert_eq!((first.weights.len(), first.num_targets, first.weight_sum), (0, 5, 5.0));
    // Text without spans costs nothing.
    assert_eq!(Batch::default().weights.capacity(), 0);
}

#[test]
fn text_has_no_weights_and_sums_its_targets() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a.txt"), "some text").unwrap();
    let out = dir.path().join("out");
    prepare(&[dir.path().join("a.txt")], &Utf8Bytes, &out, &PrepareOptions::default(), &mut |_| {}).unwrap();
    let loader = loader(&out.join("train"), options(16, true, true, 0));
    let batch = loader.batch(0, 2).unwrap();
    assert_eq!((batch.num_targets, batch.weight_sum, batch.weights.len()), (18, 18.0, 0));
    assert_eq!(loader.packing_efficiency(), 10.0 / 16.0);
}

#[test]
fn best_fit_leaves_little_empty() {
    // Lengths as of answers: many short, few long.
    let length = |i: usize| 4 + (i * 7919 % 97) * (i * 31 % 7) / 6;
    let records: Vec<_> = (0..2000).map(|i| pair("q", &"a".repeat(length(i)))).collect();
    let (_keep, dir) = prepared(&records, 1 << 20);
    let [packed, in_order, padded] = [(true, true), (true, false), (false, true)]
        .map(|(p, s)| loader(&dir, options(128, p, s, 0)).packing_efficiency());
    assert!(packed > 0.98 && in_order < packed && padded < 0.5, "{packed} {in_order} {padded}");
}

#[test]
fn epochs_and_seeds_differ_and_going_on_is_the_uninterrupted_run() {
    // Pairs of equal lengths, so that what shares a row can differ too.
    let records: Vec<_> = (0..60u32).map(|i| pair(&format!("{i:02}"), &"x".repeat(1 + (i % 5) as usize))).collect();
    let (_keep, dir) = prepared(&records, 200);
    let make = |seed| loader(&dir, options(24, true, true, seed));
    let epoch = |seed, e: u64| {
        let l = make(seed);
        l.batch(e * l.rows_per_epoch(), l.rows_per_epoch() as usize).unwrap()
    };
    assert_ne!(epoch(1, 0), epoch(1, 1));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_eq!(epoch(1, 1), epoch(1, 1));
    let rows_of = |batch: Batch| -> std::collections::BTreeSet<Vec<u32>> {
        batch.input_ids.chunks(24).map(<[u32]>::to_vec).collect()
    };
    let (first, second) = (rows_of(epoch(1, 0)), rows_of(epoch(1, 1)));
    assert!(first.intersection(&second).count() < first.len() / 2, "other examples share a row");

    let uninterrupted: Vec<_> = make(5).prefetch(0, 4).take(12).map(Result::unwrap).collect();
    for stop in 0..12u64 {
        let saved = serde_json::to_string(&make(5).state(4 * stop)).unwrap();
        let state: LoaderState = serde_json::from_str(&saved).unwrap();
        let again = make(5);
        again.check_state(&state).unwrap();
        let rest: Vec<_> = again.prefetch(state.next_index, 4).take(12 - stop as usize).map(Result::unwrap).collect();
        assert_eq!(rest, uninterrupted[stop as usize..]);
    }
}

/// A change here changes the order of examples of every run that is being resumed.
#[test]
fn the_order_is_the_same_for_ever() {
    let records: Vec<_> =
        (0..12u8).map(|i| pair(&char::from(b'a' + i).to_string(), &"x".repeat(1 + i as usize % 3))).collect();
    let (_keep, dir) = prepared(&records, 200);
    let batch = loader(&dir, options(10, true, true, 42)).batch(0, 6).unwrap();
    let prompts = |row: &[u32]| -> String {
        row.iter().filter(|id| (97..109).contains(*id)).map(|&id| char::from(id as u8)).collect()
    };
    let rows: Vec<_> = batch.input_ids.chunks(10).map(prompts).collect();
    assert_eq!(rows, ["eb", "hk", "gjd", "if", "cl", "a"]);
}

#[test]
fn what_differs_is_named_on_resuming() {
    let (_k1, a) = prepared(&[pair("q", "a")], 100);
    let weighted = |w| json!({"prompt": [], "completion": [{"role": "assistant", "content": "x", "weight": w}]});
    let (_k2, b) = prepared(&[weighted(1)], 100);
    let (_k3, c) = prepared(&[weighted(2)], 100);
    let told = |l: Loader, state: &LoaderState| l.check_state(state).unwrap_err().to_string();
    let state = loader(&a, options(32, true, true, 1)).state(4);
    assert!(told(loader(&b, options(32, true, true, 1)), &state).contains("training data"));
    assert!(told(loader(&a, options(32, false, true, 1)), &state).contains("packing"));
    // The same tokens with other weights are other data.
    let state = loader(&b, options(32, true, true, 1)).state(4);
    assert!(told(loader(&c, options(32, true, true, 1)), &state).contains("training data"));
}

#[test]
fn an_example_longer_than_a_row_is_refused() {
    let (_keep, dir) = prepared(&[pair("q", "a"), pair("q", &"a".repeat(20)), pair("q", &"a".repeat(30))], 100);
    for (packing, shuffle) in [(true, true), (true, false), (false, true)] {
        let told = Loader::new(open(&dir), options(16, packing, shuffle, 0)).unwrap_err().to_string();
        assert!(told.contains("2 examples are longer than a row of 16 tokens (document 2 has 33 tokens)"), "{told}");
        assert!(told.contains("set context_length to 32 or more") && told.contains("max_tokens = 17"), "{told}");
        Loader::new(open(&dir), options(32, packing, shuffle, 0)).unwrap();
    }
    assert!(open(&dir).sequential(16, 1).is_err());
    let cut = LoaderOptions { truncate: true, ..options(32, false, true, 0) };
    let told = Loader::new(open(&dir), cut).unwrap_err().to_string();
    assert!(told.contains("truncate = true: examples stay whole; prepare them with max_tokens"), "{told}");
}

#[test]
fn several_shards_and_folders_of_examples_are_one_dataset() {
    let records: Vec<_> = (0..20).map(|i| pair("q", &format!("answer {i}"))).collect();
    let (_k1, a) = prepared(&records, 40);
    let (_k2, b) = prepared(&[pair("r", "b")], 40);
    let dataset = TokenDataset::open(&[a, b]).unwrap();
    assert_eq!(dataset.num_documents(), 21);
    assert_eq!(dataset.spans(20).unwrap(), [Span { tokens: 2..4, weight: 1.0 }]);
    assert_eq!(dataset.spans(19).unwrap(), [Span { tokens: 2..12, weight: 1.0 }]);
    assert!(dataset.spans(21).is_err());
    let loader = Loader::new(dataset.clone(), options(40, true, true, 0)).unwrap();
    let rows = loader.rows_per_epoch();
    assert_eq!(seen(&loader, 0..rows), expected(&dataset));
}
