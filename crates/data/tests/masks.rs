//! What is learnt of an example, how it is stored, and what is left out.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tallow_data::*;
use tallow_tokenizer::{EncodedChat, Message};

const BOS: u32 = Utf8Chat::BOS;
const TURN: u32 = Utf8Chat::TURN;
const END: u32 = Utf8Chat::END;

fn write(dir: &Path, name: &str, records: &[Value]) -> PathBuf {
    let path = dir.join(name);
    let lines: Vec<_> = records.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    path
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

fn chat(question: &str, answer: &str) -> Value {
    json!({"messages": [user(question), assistant(answer)]})
}

fn run(dir: &Path, records: &[Value], options: ChatOptions) -> Result<(ChatReport, TokenDataset)> {
    run_with(dir, records, &Utf8Chat, options)
}

fn run_with(
    dir: &Path,
    records: &[Value],
    encoder: &dyn EncodeChat,
    options: ChatOptions,
) -> Result<(ChatReport, TokenDataset)> {
    let file = write(dir, "a.jsonl", records);
    let out = dir.join("out");
    let options = ChatOptions { overwrite: true, ..options };
    let report = prepare_chat(&[file], encoder, &out, &options, &mut |_| {})?;
    Ok((report, TokenDataset::open(&[out.join("train")])?))
}

fn error(records: &[Value], options: ChatOptions) -> String {
    run(tempfile::tempdir().unwrap().path(), records, options).unwrap_err().to_string()
}

/// The preview of the only record, special ids as `^` (begin), `|` (turn) and `$` (end).
fn masked(record: Value, options: ChatOptions) -> Vec<(String, f32)> {
    let dir = tempfile::tempdir().unwrap();
    let (_, dataset) = run(dir.path(), &[record], options).unwrap();
    let show = |id: u32| match id {
        BOS => '^',
        TURN => '|',
        END => '$',
        byte => byte as u8 as char,
    };
    let runs = preview(&dataset, 0).unwrap();
    runs.into_iter().map(|(ids, weight)| (ids.into_iter().map(show).collect(), weight)).collect()
}

fn on(train_on: TrainOn) -> ChatOptions {
    ChatOptions { train_on, ..ChatOptions::default() }
}

fn runs(expected: &[(&str, f32)]) -> Vec<(String, f32)> {
    expected.iter().map(|(text, weight)| ((*text).to_owned(), *weight)).collect()
}

#[test]
fn the_assistant_the_last_turn_or_everything() {
    let record = json!({"messages": [user("q"), assistant("a"), user("r"), assistant("bc")]});
    let expected = [("^|user\nq$|assistant\n", 0.0), ("a$", 1.0), ("|user\nr$|assistant\n", 0.0), ("bc$", 1.0)];
    assert_eq!(masked(record.clone(), on(TrainOn::Assistant)), runs(&expected));
    let expected = [("^|user\nq$|assistant\na$|user\nr$|assistant\n", 0.0), ("bc$", 1.0)];
    assert_eq!(masked(record.clone(), on(TrainOn::Last)), runs(&expected));
    let expected = [("^", 0.0), ("|user\nq$|assistant\na$|user\nr$|assistant\nbc$", 1.0)];
    assert_eq!(masked(record, on(TrainOn::All)), runs(&expected));
}

#[test]
fn weights_of_turns_are_multiplied_in() {
    let record = json!({"messages": [
        {"role": "user", "content": "q", "weight": 2},
        {"role": "assistant", "content": "a", "weight": 0},
        user("r"),
        {"role": "assistant", "content": "b", "weight": 0.5},
        {"role": "assistant", "content": "c", "train": true},
    ]});
    let expected =
        [("^|user\nq$|assistant\na$|user\nr$|assistant\n", 0.0), ("b$", 0.5), ("|assistant\n", 0.0), ("c$", 1.0)];
    assert_eq!(masked(record.clone(), on(TrainOn::Assistant)), runs(&expected));
    let expected = [
        ("^", 0.0),
        ("|user\n", 1.0),
        ("q$", 2.0),
        ("|assistant\n", 1.0),
        ("a$", 0.0),
        ("|user\nr$|assistant\n", 1.0),
        ("b$", 0.5),
        ("|assistant\nc$", 1.0),
    ];
    assert_eq!(masked(record, on(TrainOn::All)), runs(&expected));
}

#[test]
fn completions_prompts_of_messages_tools_and_text() {
    let record = json!({"prompt": "p", "completion": "c"});
    assert_eq!(masked(record.clone(), on(TrainOn::Assistant)), runs(&[("^p", 0.0), ("c$", 1.0)]));
    assert_eq!(masked(record, on(TrainOn::All)), runs(&[("^", 0.0), ("pc$", 1.0)]));
    // Nothing is to be masked here, so that all of it is learnt is no mistake.
    assert_eq!(masked(json!({"prompt": "", "completion": "c"}), on(TrainOn::Last)), runs(&[("^", 0.0), ("c$", 1.0)]));
    assert_eq!(masked(json!({"text": "t"}), on(TrainOn::Last)), runs(&[("^", 0.0), ("t$", 1.0)]));

    let lists = json!({"prompt": [user("q"), assistant("a")], "completion": [assistant("b")]});
    let expected = [("^|user\nq$|assistant\na$|assistant\n", 0.0), ("b$", 1.0)];
    assert_eq!(masked(lists, on(TrainOn::Assistant)), runs(&expected));
    let weighted =
        json!({"prompt": [{"role": "assistant", "content": "a", "weight": 3}], "completion": [assistant("b")]});
    let expected = [("^|assistant\n", 0.0), ("a$", 3.0), ("|assistant\n", 0.0), ("b$", 1.0)];
    assert_eq!(masked(weighted, on(TrainOn::Assistant)), runs(&expected));

    let call = json!({"tools": [{"n": 1}], "messages": [
        user("q"), {"role": "assistant", "tool_calls": [1]}, {"role": "tool", "content": "r"}, assistant("a"),
    ]});
    let expected = [
        ("^|tools\n[{\"n\":1}]$|user\nq$|assistant\n", 0.0),
        ("[1]$", 1.0),
        ("|tool\nr$|assistant\n", 0.0),
        ("a$", 1.0),
    ];
    assert_eq!(masked(call, on(TrainOn::Assistant)), runs(&expected));
}

/// An encoder that is wrong in one way.
struct Broken(&'static str);

impl EncodeChat for Broken {
    fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<EncodedChat> {
        let mut chat = Utf8Chat.encode_chat(messages, tools, wanted)?;
        match self.0 {
            "all" => chat.spans[0].1 = 1..chat.ids.len(),
            "none" => chat.spans.clear(),
            "id" => chat.ids[3] = 259,
            "outside" => chat.spans[0].1.end += 1,
            "refuses" if messages[0].content.as_deref() == Some("bad") => {
                return Err(Error::Encode { source: "roles must alternate".into() });
            }
            _ => {}
        }
        Ok(chat)
    }

    fn encode_completion(&self, prompt: &str, completion: &str) -> Result<EncodedChat> {
        Utf8Chat.encode_completion(prompt, completion)
    }

    fn vocab_size(&self) -> usize {
        259
    }

    fn fingerprint(&self) -> String {
        format!("broken-{}", self.0)
    }

    fn tokenizer_fingerprint(&self) -> String {
        "bytes".to_owned()
    }
}

#[test]
fn masks_of_nothing_and_of_everything_are_errors() {
    let silent = json!({"messages": [user("q"), {"role": "assistant", "content": "a", "weight": 0}]});
    let records = [chat("q", "a"), silent];
    let told = error(&records, ChatOptions::default());
    assert!(told.contains("a.jsonl, line 2: none of its 22 tokens would be learnt; give a turn"), "{told}");
    assert!(told.contains("nothing_learnt = \"skip\""), "{told}");
    let dir = tempfile::tempdir().unwrap();
    let skip = ChatOptions { nothing_learnt: NothingLearnt::Skip, ..ChatOptions::default() };
    let (report, dataset) = run(dir.path(), &records, skip.clone()).unwrap();
    assert_eq!((report.examples, report.nothing_learnt.examples, report.nothing_learnt.tokens), (1, 1, 22));
    assert!(report.problems().contains("1 example was without anything to learn and left out (22 tokens lost):"));
    assert!(report.problems().contains("a.jsonl, line 2: "));
    assert_eq!(dataset.examples().unwrap().nothing_learnt, 1);
    let told = run(dir.path(), &records[1..], skip).unwrap_err().to_string();
    assert!(told.contains("no example in") && told.contains("without anything to learn"), "{told}");

    let with = |encoder: &Broken, options| run_with(dir.path(), &[chat("q", "a"), chat("bad", "b")], encoder, options);
    let told = with(&Broken("all"), ChatOptions::default()).unwrap_err().to_string();
    assert!(told.contains("line 1: all of its 22 tokens would be learnt, the prompt too; the template"), "{told}");
    with(&Broken(""), on(TrainOn::All)).unwrap();
    for (what, says) in [("none", "where [1] were asked for"), ("id", "id 259"), ("outside", "for turn 1, behind 0")] {
        let told = with(&Broken(what), ChatOptions::default()).unwrap_err().to_string();
        assert!(told.contains("defect of the tokenizer") && told.contains(says), "{told}");
    }
}

#[test]
fn a_conversation_that_the_template_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let records = [chat("q", "a"), chat("bad", "b")];
    let with = |options| run_with(dir.path(), &records, &Broken("refuses"), options);
    let told = with(ChatOptions::default()).unwrap_err().to_string();
    assert!(told.contains("a.jsonl, line 2: encoding: roles must alternate; mend the example"), "{told}");
    let told =
        with(ChatOptions { on_malformed: OnMalformed::Report, ..ChatOptions::default() }).unwrap_err().to_string();
    assert!(told.contains("1 of 2 records are malformed") && told.contains("line 2: encoding"), "{told}");
    let (report, dataset) = with(ChatOptions { on_malformed: OnMalformed::Skip, ..ChatOptions::default() }).unwrap();
    assert_eq!((report.examples, report.refused.examples, dataset.examples().unwrap().refused), (1, 1, 1));
    assert_eq!(dataset.tokenizer_fingerprint(), "bytes");
    assert_eq!(dataset.examples().unwrap().encoder_fingerprint, "broken-refuses");
}

#[test]
fn the_first_mistake_is_the_one_that_is_told() {
    // Line 2 is found in encoding, line 3 in reading, which is ahead of it.
    let silent = json!({"messages": [user("q"), {"role": "assistant", "content": "a", "weight": 0}]});
    let told = error(&[chat("q", "a"), silent, json!({"messages": 5})], ChatOptions::default());
    assert!(told.contains("line 2"), "{told}");
}

#[test]
fn examples_that_are_too_long() {
    // ^|user\nq$|assistant\n are 20 tokens.
    let records = [chat("q", "short"), chat("q", &"l".repeat(50)), chat(&"q".repeat(50), "a")];
    let limited = |too_long| ChatOptions { max_tokens: Some(30), too_long, ..ChatOptions::default() };
    let dir = tempfile::tempdir().unwrap();
    let (report, dataset) = run(dir.path(), &records, limited(TooLong::Drop)).unwrap();
    assert_eq!((report.examples, report.dropped.examples, report.dropped.tokens), (1, 2, 71 + 71));
    assert!(report.problems().contains("2 examples were longer than max_tokens and left out"), "{}", report.problems());
    assert!(report.dropped.first[0].to_string().ends_with("a.jsonl, line 2: 71 tokens"), "{:?}", report.dropped);
    let index = dataset.examples().unwrap();
    assert_eq!((index.dropped, index.lost_tokens, index.max_tokens), (2, 142, Some(30)));

    let told = error(&records, limited(TooLong::Error));
    assert!(told.contains("line 2: 71 tokens, more than max_tokens = 30; shorten it"), "{told}");

    let (report, dataset) = run(dir.path(), &records, limited(TooLong::TruncateEnd)).unwrap();
    assert_eq!((report.examples, report.truncated.examples, report.truncated.tokens), (2, 1, 41));
    // Of the third nothing is left to learn.
    assert_eq!((report.dropped.examples, report.dropped.first[0].line, report.longest), (1, 3, 30));
    assert_eq!(dataset.document_len(1).unwrap(), 30);
    assert_eq!(dataset.spans(1).unwrap(), [Span { tokens: 20..30, weight: 1.0 }]);
    assert_eq!(dataset.num_targets(), 6 + 10);

    let told = error(&records, ChatOptions { max_tokens: Some(5), ..ChatOptions::default() });
    assert!(told.contains("no example in") && told.contains("3 examples were longer than max_tokens"), "{told}");
    let told = error(&records, ChatOptions { max_tokens: Some(1), ..ChatOptions::default() });
    assert!(told.contains("max_tokens = 1: must be at least 2"), "{told}");
}

#[test]
fn whole_examples_are_held_out_and_copies_stay_together() {
    let dir = tempfile::tempdir().unwrap();
    let records: Vec<_> = (0..300).map(|i| chat(&format!("question {}", i % 150), "the answer")).collect();
    let file = write(dir.path(), "a.jsonl", &records);
    let out = dir.path().join("out");
    let options = ChatOptions { valid_fraction: 0.1, shard_tokens: 500, ..ChatOptions::default() };
    let report = prepare_chat(std::slice::from_ref(&file), &Utf8Chat, &out, &options, &mut |_| {}).unwrap();
    assert_eq!(report.train.documents + report.valid.documents, 300);
    assert!((10..60).contains(&report.valid.documents) && report.valid.documents.is_multiple_of(2), "{report:?}");
    let ids = |split: &str| -> Vec<Vec<u32>> {
        let dataset = TokenDataset::open(&[out.join(split)]).unwrap();
        (0..dataset.num_documents()).map(|i| dataset.document(i).unwrap().to_vec()).collect()
    };
    let (train, valid) = (ids("train"), ids("valid"));
    assert!(valid.iter().all(|v| !train.contains(v)));
    assert!(report.train.shards > 3);

    // Few: never cut, and never fewer than one.
    let options = ChatOptions { overwrite: true, valid_fraction: 0.01, ..options };
    let few = write(dir.path(), "b.jsonl", &[chat("a long question", "and its answer"), chat("q", "a")]);
    let report = prepare_chat(&[few], &Utf8Chat, &out, &options, &mut |_| {}).unwrap();
    assert_eq!((report.train.documents, report.valid.documents, report.valid.text_bytes), (1, 1, 1));
    let one = write(dir.path(), "c.jsonl", &[chat("q", "a")]);
    let told = prepare_chat(&[one], &Utf8Chat, &out, &options, &mut |_| {}).unwrap_err().to_string();
    assert!(told.contains("valid_fraction = 0.01: one example cannot be divided"), "{told}");
    let wrong = ChatOptions { valid_fraction: 0.9, ..options };
    let told = prepare_chat(&[file], &Utf8Chat, &out, &wrong, &mut |_| {}).unwrap_err().to_string();
    assert!(told.starts_with("valid_fraction = 0.9"), "{told}");
}

#[test]
fn cached_folders_are_found_again_unless_anything_that_matters_is_other() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "a.jsonl", &[chat("q", "a"), chat("r", "b")]);
    let made = std::cell::Cell::new(0);
    let get = |encoder: &dyn EncodeChat, options: ChatOptions| {
        let cache = ChatCacheOptions { root: dir.path().join("cache"), prepare: options };
        let file = std::slice::from_ref(&file);
        let found = cached_prepare_chat(file, encoder, &cache, &mut |_| made.set(made.get() + 1)).unwrap();
        (found, made.get())
    };
    let (first, count) = get(&Utf8Chat, ChatOptions::default());
    assert_eq!((count, first.valid.as_ref()), (1, None));
    assert_eq!(get(&Utf8Chat, ChatOptions { overwrite: true, ..ChatOptions::default() }), (first.clone(), 1));
    let others: [(&dyn EncodeChat, ChatOptions); 4] = [
        (&Utf8Chat, on(TrainOn::Last)),
        (&Utf8Chat, ChatOptions { max_tokens: Some(100), ..ChatOptions::default() }),
        (&Broken(""), ChatOptions::default()),
        (&Utf8Chat, ChatOptions { valid_fraction: 0.5, ..ChatOptions::default() }),
    ];
    for (i, (encoder, options)) in others.into_iter().enumerate() {
        let (found, count) = get(encoder, options.clone());
        assert!(found != first && count == i + 2);
        assert_eq!(get(encoder, options), (found.clone(), count));
        assert!(TokenDataset::open(&[found.train]).unwrap().examples().is_some());
        assert!(found.valid.is_none_or(|v| TokenDataset::open(&[v]).unwrap().num_documents() == 1));
    }
    write(dir.path(), "a.jsonl", &[chat("q", "a"), chat("r", "b"), chat("s", "c")]);
    assert_eq!(get(&Utf8Chat, ChatOptions::default()).1, 6);
}

#[test]
fn looking_into_examples() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &[chat("q", "añ"), chat("q", "b")], ChatOptions::default()).unwrap();
    let found = inspect(&dir.path().join("out"), 1, 4).unwrap();
    assert_eq!((found[0].num_targets, found[0].index.num_documents), (4 + 2, 2));
    assert_eq!(found[0].first_documents, [vec![BOS, TURN, u32::from(b'u'), u32::from(b's')]]);
    // Bytes of what is learnt: the answers.
    assert_eq!((found[0].index.text_bytes, found[0].bytes_per_token), (4, 4.0 / 6.0));
    let examples = found[0].index.examples.as_ref().unwrap();
    assert_eq!((examples.train_on, examples.too_long, examples.dropped), (TrainOn::Assistant, TooLong::Drop, 0));
    let verified = verify(&dir.path().join("out")).unwrap();
    assert_eq!((verified.shards, verified.damaged), (1, vec![]));
}

fn with(bytes: &[u8], at: usize, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[at..at + new.len()].copy_from_slice(new);
    bytes
}

#[test]
fn damaged_spans_are_an_error_that_names_file_and_place() {
    let dir = tempfile::tempdir().unwrap();
    let record = json!({"messages": [user("q"), assistant("a"), user("r"), assistant("bc")]});
    run(dir.path(), &[record, chat("q", "a")], ChatOptions::default()).unwrap();
    let split = dir.path().join("out/train");
    let path = split.join("shard-00000.spans");
    let good = std::fs::read(&path).unwrap();
    assert_eq!(good.len(), 64 + 8 * 3 + 12 * 3);
    let told = || TokenDataset::open(std::slice::from_ref(&split)).unwrap_err().to_string();
    for len in 0..good.len() {
        std::fs::write(&path, &good[..len]).unwrap();
        assert!(told().contains("shard-00000.spans, byte "), "{len}");
        assert_eq!(verify(&split).unwrap().damaged.len(), 1, "{len}");
    }
    for at in 0..good.len() {
        for bit in 0..8 {
            std::fs::write(&path, with(&good, at, &[good[at] ^ (1 << bit)])).unwrap();
            assert!(at >= 64 || told().contains("shard-00000.spans, byte "), "byte {at} of the header");
            drop(TokenDataset::open(std::slice::from_ref(&split)).map(|d| d.spans(1)));
        }
        let damaged = verify(&split).unwrap().damaged;
        assert!(damaged.len() == 1 && damaged[0].path == path, "byte {at}");
    }
    let spans = 64 + 8 * 3;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("an impossible number of bytes", with(&good, 24, &u64::MAX.to_le_bytes())),
        ("border 0", with(&good, 64, &1u64.to_le_bytes())),
        ("border 1", with(&good, 72, &u64::MAX.to_le_bytes())),
        ("border 2", with(&good, 80, &1u64.to_le_bytes())),
        ("the spans end at 2 of 3", with(&good, 80, &2u64.to_le_bytes())),
        ("a span 22..22 behind 0", with(&good, spans, &22u32.to_le_bytes())),
        ("a span 20..99 behind 0", with(&good, spans + 4, &99u32.to_le_bytes())),
        ("behind 22 in a document", with(&good, spans + 12, &21u32.to_le_bytes())),
        ("a weight of NaN", with(&good, spans + 8, &f32::NAN.to_le_bytes())),
        ("a weight of -1", with(&good, spans + 8, &(-1f32).to_le_bytes())),
        ("its index says 3 of 7", with(&good, spans + 8, &0f32.to_le_bytes())),
        ("the file has", [&good[..], &[0]].concat()),
    ];
    for (reason, bytes) in cases {
        std::fs::write(&path, bytes).unwrap();
        assert!(told().contains(reason), "{reason}: {}", told());
    }
    std::fs::remove_file(&path).unwrap();
    assert!(told().contains("the file of spans is missing"));
    std::fs::write(&path, &good).unwrap();
    let index = std::fs::read_to_string(split.join("index.json")).unwrap();
    for (from, to, reason) in [
        ("\"examples\": {", "\"others\": {", "unknown field"),
        ("shard-00000.spans", "../shard-00000.spans", "not a file of this folder"),
    ] {
        std::fs::write(split.join("index.json"), index.replace(from, to)).unwrap();
        assert!(told().contains(reason), "{}", told());
    }
    let mut value: Value = serde_json::from_str(&index).unwrap();
    value.as_object_mut().unwrap().remove("examples");
    std::fs::write(split.join("index.json"), value.to_string()).unwrap();
    assert!(told().contains("has spans without `examples`"), "{}", told());
}

#[test]
fn text_is_prepared_as_before_and_does_not_mix_with_examples() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "t.jsonl", &[json!({"text": "some text"})]);
    let options = PrepareOptions::default();
    prepare(&[file], &Utf8Bytes, &dir.path().join("text"), &options, &mut |_| {}).unwrap();
    let train = dir.path().join("text/train");
    let index = std::fs::read_to_string(train.join("index.json")).unwrap();
    assert!(!index.contains("spans") && !index.contains("examples"));
    let dataset = TokenDataset::open(std::slice::from_ref(&train)).unwrap();
    assert_eq!((dataset.examples(), dataset.spans(0).unwrap()), (None, vec![Span { tokens: 0..10, weight: 1.0 }]));
    assert_eq!(preview(&dataset, 0).unwrap().len(), 1);

    run(dir.path(), &[chat("q", "a")], ChatOptions::default()).unwrap();
    // As if of the same tokenizer.
    let index = index.replace("utf8-bytes-v1", "utf8-chat-v1").replace(": 257", ": 259").replace(": 256", ": null");
    std::fs::write(train.join("index.json"), index).unwrap();
    let shard = train.join("shard-00000.tok");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, with(&bytes, 32, &259u32.to_le_bytes())).unwrap();
    let told = TokenDataset::open(&[train, dir.path().join("out/train")]).unwrap_err().to_string();
    assert!(told.contains("differ in kind: plain text and examples"), "{told}");
}
