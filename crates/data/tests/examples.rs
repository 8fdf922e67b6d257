//! Records of every shape, and every way in which they are not of one.
#![allow(clippy::unwrap_used)] // in the helpers too, not only in the tests

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::data_type::{ByteArray, ByteArrayType, DataType, DoubleType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use serde_json::{Value, json};
use tallow_data::*;

fn write(dir: &Path, name: &str, records: &[Value]) -> PathBuf {
    let lines: Vec<_> = records.iter().map(Value::to_string).collect();
    text(dir, name, &lines.join("\n"))
}

fn text(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn read(path: &Path, options: ExampleOptions) -> Result<Vec<Content>> {
    examples(&[path.to_owned()], options)?.map(|e| e.map(|e| e.content)).collect()
}

fn one(record: Value) -> Content {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", &[record]);
    read(&path, ExampleOptions::default()).unwrap().pop().unwrap()
}

fn refused(path: &Path, options: ExampleOptions) -> String {
    read(path, options).unwrap_err().to_string()
}

/// (role, content, weight) of each turn.
fn turns(content: &Content) -> Vec<(&str, Option<&str>, Option<f32>)> {
    let Content::Chat { turns, .. } = content else { panic!("{content:?}") };
    turns.iter().map(|t| (t.message.role.as_str(), t.message.content.as_deref(), t.weight)).collect()
}

fn user(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn assistant(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

#[test]
fn conversations_in_both_shapes() {
    let chat = one(json!({"id": 7, "tools": [{"type": "function"}], "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}], "weight": 0},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "assistant", "content": "c", "weight": 0.5, "name": null},
        {"role": "assistant", "content": "d", "train": true},
        {"role": "assistant", "content": "e", "weight": false},
    ]}));
    assert_eq!(
        turns(&chat),
        [
            ("system", Some("S"), None),
            ("user", Some("ab"), None),
            ("assistant", None, Some(0.0)),
            ("tool", Some(""), None),
            ("assistant", Some("c"), Some(0.5)),
            ("assistant", Some("d"), Some(1.0)),
            ("assistant", Some("e"), Some(0.0)),
        ]
    );
    let Content::Chat { turns: all, tools } = &chat else { panic!() };
    assert_eq!(tools, &Some(json!([{"type": "function"}])));
    assert_eq!(all[2].message.extra.keys().collect::<Vec<_>>(), ["tool_calls"]);
    assert!(all[4].message.extra.is_empty() && all.iter().all(|t| !t.prompt));

    let shared = one(json!({"system": "S", "conversations": [
        {"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": null}, {"from": "tool", "value": "c"},
        {"from": "observation", "value": "d"}, {"role": "assistant", "content": "e"},
    ]}));
    let roles: Vec<_> = turns(&shared).iter().map(|t| (t.0, t.1.unwrap())).collect();
    let expected =
        [("system", "S"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("tool", "d"), ("assistant", "e")];
    assert_eq!(roles, expected);
}

#[test]
fn prompts_instructions_and_text() {
    let plain = one(json!({"prompt": "p", "completion": " c", "extra": 1}));
    assert_eq!(plain, Content::Completion { prompt: "p".into(), completion: " c".into() });

    let lists = one(json!({"prompt": [user("a"), assistant("b")], "completion": [assistant("c")], "tools": "[{}]"}));
    assert_eq!(turns(&lists).len(), 3);
    let Content::Chat { turns: all, tools } = lists else { panic!() };
    assert_eq!(all.iter().map(|t| t.prompt).collect::<Vec<_>>(), [true, true, false]);
    assert_eq!(tools, Some(json!([{}])));

    // The field that the published set carries beside the others is not a second shape.
    let record = json!({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "rendered"});
    assert_eq!(turns(&one(record.clone())), [("user", Some("Add.\n\n1, 2"), None), ("assistant", Some("3"), None)]);
    assert_eq!(turns(&one(json!({"instruction": "Go.", "input": "", "output": "3"})))[0].1, Some("Go."));

    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", &[record, json!({"instruction": "Go.", "input": null, "output": "Gone."})]);
    let found = read(&path, ExampleOptions { alpaca: AlpacaAs::Prompt, ..Default::default() }).unwrap();
    let Content::Completion { prompt, completion } = &found[0] else { panic!() };
    assert!(prompt.ends_with("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n") && completion == "3");
    let Content::Completion { prompt, .. } = &found[1] else { panic!() };
    assert_eq!(
        prompt,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nGo.\n\n### Response:\n"
    );

    assert_eq!(one(json!({"text": "all of it"})), Content::Text("all of it".into()));
}

#[test]
fn every_mistake_is_named_with_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let good = json!({"messages": [user("q"), assistant("a")]});
    let chat = |messages: Value| json!({ "messages": messages }).to_string();
    let cases = [
        ("`messages`, message 1: no `role`", chat(json!([{"content": "x"}, assistant("a")]))),
        ("message 2: its role is 5", chat(json!([user("x"), {"role": 5, "content": "y"}]))),
        ("message 1: both `role` and `from`", chat(json!([{"role": "user", "from": "human", "content": "x"}]))),
        ("from \"alien\", who is not known; known are human", chat(json!([{"from": "alien", "value": "x"}]))),
        ("message 2: the assistant's turn is empty", chat(json!([user("x"), assistant(" \n")]))),
        ("message 2: the assistant's turn is empty", chat(json!([user("x"), {"role": "assistant", "content": null}]))),
        ("the assistant's turn is empty", chat(json!([{"role": "assistant", "content": "", "tool_calls": []}]))),
        (
            "the assistant's `content` is a number, not text",
            chat(json!([user("x"), {"role": "assistant", "content": 4}])),
        ),
        ("the user's turn has no `content`", chat(json!([{"role": "user"}, assistant("a")]))),
        ("a part of type `image_url`; only text", chat(json!([{"role": "user", "content": [{"type": "image_url"}]}]))),
        ("a part of content without a `type`", chat(json!([{"role": "user", "content": ["x"]}]))),
        ("no turn of the assistant", chat(json!([user("x")]))),
        ("no turn of the assistant", chat(json!([]))),
        ("`messages` is an object, not a list", chat(json!({"role": "user"}))),
        ("message 1: text, not an object", chat(json!(["hello"]))),
        ("weight -1; it must be a number from 0", chat(json!([{"role": "assistant", "content": "a", "weight": -1}]))),
        ("weight \"1\"", chat(json!([{"role": "assistant", "content": "a", "weight": "1"}]))),
        ("weight 1e+300", chat(json!([{"role": "assistant", "content": "a", "weight": 1e300}]))),
        ("train 1; it must be true or false", chat(json!([{"role": "assistant", "content": "a", "train": 1}]))),
        ("both `weight` and `train`", chat(json!([{"role": "assistant", "content": "a", "train": true, "weight": 1}]))),
        (
            "key `content` stands twice",
            r#"{"messages": [{"role": "user", "content": "x", "content": "y"}]}"#.to_owned(),
        ),
        ("key `messages` stands twice", r#"{"messages": [], "messages": []}"#.to_owned()),
        ("`tools` is an object", json!({"messages": [assistant("a")], "tools": {}}).to_string()),
        ("`tools` is text that is not JSON", json!({"messages": [assistant("a")], "tools": "x"}).to_string()),
        ("a field `history` is not read", json!({"messages": [assistant("a")], "history": [["q", "a"]]}).to_string()),
        (
            "a field `system` and a system turn",
            json!({"system": "S", "messages": [{"role": "system", "content": "T"}, assistant("a")]}).to_string(),
        ),
        ("its fields are `question`, `answer`; known are", json!({"question": "q", "answer": "a"}).to_string()),
        ("of no known shape", json!({"messages": null, "prompt": "p"}).to_string()),
        ("a list, not an object with fields", "[1]".to_owned()),
        ("EOF", r#"{"messages": ["#.to_owned()),
        ("it has both `messages` and `prompt` + `completion`; say which to read with shape", {
            json!({"messages": [assistant("a")], "prompt": "p", "completion": "c"}).to_string()
        }),
        (
            "a record of `prompt` + `completion`, where line 1 is one of `messages`",
            json!({"prompt": "p", "completion": "c"}).to_string(),
        ),
    ];
    for (reason, line) in cases {
        let path = text(dir.path(), "a.jsonl", &format!("{good}\n\n{line}\n"));
        let told = refused(&path, ExampleOptions::default());
        assert!(told.contains(reason) && told.contains("a.jsonl, line 3: "), "{reason}: {told}");
        assert!(told.contains("on_malformed"), "{told}");
        // And with the policy to leave such records out, the others are read.
        let skip = ExampleOptions { on_malformed: OnMalformed::Skip, ..Default::default() };
        let mut reader = examples(&[path], skip).unwrap();
        assert_eq!(reader.by_ref().count(), 1);
        assert_eq!((reader.report().num_malformed, reader.report().malformed[0].line), (1, 3));
    }
    let others = [
        ("`completion` is empty", json!({"prompt": "p", "completion": " "})),
        ("make them two texts, or two lists", json!({"prompt": "p", "completion": [assistant("a")]})),
        ("no turn of the assistant in `completion`", json!({"prompt": [assistant("a")], "completion": [user("x")]})),
        ("`completion`, message 1: no `role`", json!({"prompt": [user("a")], "completion": [{}]})),
        ("`tools` needs a template", json!({"prompt": "p", "completion": "c", "tools": [{}]})),
        ("`output` is empty", json!({"instruction": "i", "output": ""})),
        ("`input` is a number", json!({"instruction": "i", "input": 3, "output": "o"})),
        ("`text` is a list", json!({"text": ["x"]})),
    ];
    for (reason, record) in others {
        let told = refused(&write(dir.path(), "b.jsonl", &[record]), ExampleOptions::default());
        assert!(told.contains(reason) && told.contains("b.jsonl, line 1: "), "{reason}: {told}");
    }
}

#[test]
fn the_shape_can_be_fixed() {
    let dir = tempfile::tempdir().unwrap();
    let both = json!({"messages": [assistant("a")], "prompt": "p", "completion": "c", "text": "t"});
    let path = write(dir.path(), "a.jsonl", &[both, json!({"text": "only"})]);
    let of = |shape| ExampleOptions { shape: Some(shape), ..Default::default() };
    let found = read(&path, of(Shape::Text)).unwrap();
    assert_eq!(found, [Content::Text("t".into()), Content::Text("only".into())]);
    let told = refused(&path, of(Shape::Completion));
    assert!(
        told.contains("line 2: no `prompt` + `completion` (shape = \"completion\") among its fields `text`"),
        "{told}"
    );
    // A prompt without a completion is no shape of its own.
    assert_eq!(turns(&one(json!({"prompt": "p", "messages": [assistant("a")]}))).len(), 1);
    // Each file has its own.
    let other = write(dir.path(), "b.jsonl", &[json!({"text": "x"})]);
    let one = write(dir.path(), "c.jsonl", &[json!({"prompt": "p", "completion": "c"})]);
    assert_eq!(examples(&[other, one], ExampleOptions::default()).unwrap().count(), 2);
}

#[test]
fn files_are_found_as_for_text_but_plain_text_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    text(dir.path(), "README.md", "# A data set");
    let line = json!({"text": "x"}).to_string();
    let mut gz = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
    gz.write_all(line.as_bytes()).unwrap();
    std::fs::write(dir.path().join("a.jsonl.gz"), gz.finish().unwrap()).unwrap();
    std::fs::write(dir.path().join("b.jsonl.zst"), zstd::encode_all(line.as_bytes(), 3).unwrap()).unwrap();
    let mut reader = examples(&[dir.path().to_owned()], ExampleOptions::default()).unwrap();
    assert_eq!(reader.by_ref().count(), 2);
    assert!(reader.report().problems().contains("README.md: plain text, not records"));
    assert_eq!((reader.report().documents, reader.report().bytes), (2, 2));
    let told = examples(&[dir.path().join("README.md")], ExampleOptions::default()).err().unwrap().to_string();
    assert!(told.contains("README.md: plain text holds no records") && told.contains(".jsonl"), "{told}");
    let blank = write(dir.path(), "blank.jsonl", &[json!({"text": " "}), json!({"text": "x"})]);
    let mut reader = examples(&[blank], ExampleOptions::default()).unwrap();
    assert_eq!((reader.by_ref().count(), reader.report().blank_documents), (1, 1));
}

/// Values of one column of a group of rows, with their levels.
type Column<T> = (Vec<T>, Vec<i16>, Vec<i16>);

/// Role, content and weight of a turn.
type Turned<'a> = (&'a str, Option<&'a str>, Option<f64>);

/// Conversations as other programs write them: a list of structs, one column a key, and `tools` as JSON text.
fn parquet_file(path: &Path, chats: &[Vec<Turned>], tools: &[Option<&str>]) {
    let schema = parse_message_type(
        "message m {
            optional group messages (LIST) { repeated group list { optional group element {
                optional binary role (UTF8); optional binary content (UTF8); optional double weight;
            } } }
            optional binary tools (UTF8);
        }",
    );
    let file = std::fs::File::create(path).unwrap();
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(file, Arc::new(schema.unwrap()), properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    fn levels<T>(chats: &[Vec<Option<T>>]) -> (Vec<i16>, Vec<i16>) {
        let cell = |(i, cell): (usize, &Option<T>)| (if cell.is_some() { 4 } else { 3 }, i16::from(i > 0));
        chats.iter().flat_map(|chat| chat.iter().enumerate().map(cell)).unzip()
    }
    let bytes = |s: &str| ByteArray::from(s.as_bytes().to_vec());
    let pick = |f: &dyn Fn(&Turned) -> Option<ByteArray>| -> Column<ByteArray> {
        let cells: Vec<Vec<_>> = chats.iter().map(|chat| chat.iter().map(f).collect()).collect();
        let (def, rep) = levels(&cells);
        (cells.into_iter().flatten().flatten().collect(), def, rep)
    };
    fn put<T: DataType>(
        group: &mut parquet::file::writer::SerializedRowGroupWriter<'_, std::fs::File>,
        values: &[T::T],
        def: &[i16],
        rep: Option<&[i16]>,
    ) {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<T>().write_batch(values, Some(def), rep).unwrap();
        column.close().unwrap();
    }
    for (values, def, rep) in [pick(&|m| Some(bytes(m.0))), pick(&|m| m.1.map(bytes))] {
        put::<ByteArrayType>(&mut group, &values, &def, Some(&rep));
    }
    let weights: Vec<Vec<_>> = chats.iter().map(|chat| chat.iter().map(|m| m.2).collect()).collect();
    let (def, rep) = levels(&weights);
    let weights: Vec<f64> = weights.into_iter().flatten().flatten().collect();
    put::<DoubleType>(&mut group, &weights, &def, Some(&rep));
    let def: Vec<i16> = tools.iter().map(|t| i16::from(t.is_some())).collect();
    let tools: Vec<_> = tools.iter().flatten().map(|t| bytes(t)).collect();
    put::<ByteArrayType>(&mut group, &tools, &def, None);
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_lists_of_structs() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let mut chats: Vec<Vec<_>> = (0..300)
        .map(|_| vec![("user", Some("q"), None), ("assistant", Some("añ"), None), ("assistant", Some("b"), Some(0.25))])
        .collect();
    chats[7].truncate(2);
    let mut tools = vec![None; 300];
    tools[1] = Some("[{\"a\": null}]");
    parquet_file(&path, &chats, &tools);
    let found = read(&path, ExampleOptions::default()).unwrap();
    assert_eq!(found.len(), 300);
    let expected = [("user", Some("q"), None), ("assistant", Some("añ"), None), ("assistant", Some("b"), Some(0.25))];
    assert_eq!(turns(&found[0]), expected);
    assert_eq!(turns(&found[7]), expected[..2]);
    let Content::Chat { tools, .. } = &found[1] else { panic!() };
    assert_eq!(tools, &Some(json!([{"a": null}])));

    chats[4][1].1 = None;
    parquet_file(&path, &chats, &[None; 300]);
    let told = refused(&path, ExampleOptions::default());
    assert!(told.contains("a.parquet, line 5: `messages`, message 2: the assistant's turn is empty"), "{told}");

    let whole = std::fs::read(&path).unwrap();
    for at in (4..whole.len()).step_by(37) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x55;
        std::fs::write(&path, flipped).unwrap();
        // Whatever it makes of it: no panic, and never more rows than there were.
        let skip = ExampleOptions { on_malformed: OnMalformed::Skip, ..Default::default() };
        assert!(read(&path, skip).map_or(0, |f| f.len()) <= 300);
    }
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert!(matches!(read(&path, ExampleOptions::default()), Err(Error::DamagedFile { .. })));
}

#[test]
fn a_table_without_any_column_of_use_names_those_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let schema = Arc::new(parse_message_type("message m { required int32 question; required int32 answer; }").unwrap());
    let file = std::fs::File::create(&path).unwrap();
    SerializedFileWriter::new(file, schema, Arc::default()).unwrap().close().unwrap();
    let told = refused(&path, ExampleOptions::default());
    assert!(told.contains("no column of any known shape; there are: question, answer"), "{told}");
}

#[test]
fn columns_of_a_table_that_nothing_is_read_from_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let schema =
        "message m { required binary text (UTF8); required binary mesages (UTF8); required binary id (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut file = SerializedFileWriter::new(std::fs::File::create(&path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = file.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        let values = ["one", "two"].map(ByteArray::from);
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    file.close().unwrap();
    let mut found = examples(&[path], ExampleOptions::default()).unwrap();
    assert_eq!(found.by_ref().map(Result::unwrap).count(), 2);
    let told: Vec<String> = found.into_report().unread_fields.iter().map(ToString::to_string).collect();
    assert!(told.len() == 2 && told[0].contains("a.parquet: the field `id` of 2 records is not read"), "{told:?}");
    assert!(told[1].contains("`mesages`") && told[1].ends_with("the nearest that is read is `messages`"), "{told:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_json_is_an_example_or_reported(
        keys in prop::collection::vec(prop::sample::select(vec![
            "messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "tools", "system",
        ]), 0..4),
        values in prop::collection::vec(value(), 4),
    ) {
        let record: Value = keys.iter().zip(values).map(|(k, v)| ((*k).to_owned(), v)).collect::<serde_json::Map<_, _>>().into();
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "a.jsonl", &[record]);
        let options = ExampleOptions { on_malformed: OnMalformed::Skip, ..Default::default() };
        let mut reader = examples(&[path], options).unwrap();
        for example in &mut reader {
            if let Content::Chat { turns, .. } = example.unwrap().content {
                prop_assert!(turns.iter().any(|t| t.message.role == "assistant"));
                prop_assert!(turns.iter().all(|t| t.weight.is_none_or(|w| w.is_finite() && w >= 0.0)));
            }
        }
        let report = reader.report();
        prop_assert_eq!(report.documents + report.num_malformed + report.blank_documents, 1);
    }
}

/// Values near to those that mean something.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop::sample::select(vec![
        json!(null),
        json!(true),
        json!(-0.5),
        json!(3),
        json!("assistant"),
        json!("gpt"),
        json!("text"),
        json!(""),
        json!([]),
    ]);
    leaf.prop_recursive(4, 32, 4, |inner| {
        let key = prop::sample::select(vec![
            "role",
            "content",
            "from",
            "value",
            "weight",
            "train",
            "type",
            "text",
            "tool_calls",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4).prop_map(|m| m
                .into_iter()
                .map(|(k, v)| (k.to_owned(), v))
                .collect::<serde_json::Map<_, _>>()
                .into()),
        ]
    })
}

#[test]
fn a_misspelt_role_names_the_nearest_and_is_malformed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chats.jsonl");
    let good = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let of = |role: &str| json!({"messages": [{"role": "critic", "content": "a"}, {"role": role, "content": "b"}]});
    std::fs::write(&path, format!("{good}\n{}\n", of("asistant"))).unwrap();
    let known = KnownWords { roles: vec!["critic".to_owned()], ..KnownWords::default() };
    let options = ExampleOptions { known, ..ExampleOptions::default() };
    let told = read(&path, options.clone()).unwrap_err().to_string();
    for part in ["chats.jsonl, line 2", "message 2", "\"asistant\"", "nearest is \"assistant\"", "on_malformed"] {
        assert!(told.contains(part), "no {part} in: {told}");
    }
    let told = read(&path, ExampleOptions::default()).unwrap_err().to_string();
    assert!(told.contains("message 1") && told.contains("\"critic\""), "{told}");
    let skip = ExampleOptions { on_malformed: OnMalformed::Skip, ..options };
    assert_eq!(read(&path, skip).unwrap().len(), 1);
}

#[test]
fn fields_that_nobody_reads_are_counted_by_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chats.jsonl");
    let message = json!({"role": "assistant", "content": "b", "weigth": 2, "mood": "glad"});
    let record = json!({"mesages": 1, "id": 7, "messages": [message, message]});
    let plain = json!({"messages": [{"role": "assistant", "content": "b", "name": "c"}], "text": "rendered"});
    std::fs::write(&path, format!("{plain}\n{record}\n{record}\n")).unwrap();
    let known = KnownWords { message_fields: vec!["mood".to_owned()], ..KnownWords::default() };
    let mut found = examples(&[path], ExampleOptions { known, ..ExampleOptions::default() }).unwrap();
    assert_eq!(found.by_ref().filter(Result::is_ok).count(), 3);
    let unread = found.into_report().unread_fields;
    let told: Vec<_> = unread.iter().map(|f| (f.field.as_str(), f.records, f.line, f.nearest.as_deref())).collect();
    let expected =
        [("id", 2, 2, None), ("mesages", 2, 2, Some("messages")), ("messages[].weigth", 2, 2, Some("weight"))];
    assert_eq!(told, expected);
    assert!(unread[1].to_string().contains("`mesages` of 2 records is not read"), "{}", unread[1]);
}

#[test]
fn a_weight_beyond_all_measure_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("chats.jsonl");
    for (weight, fine) in [(1000.0, true), (1001.0, false), (1e30, false)] {
        let record = json!({"messages": [{"role": "assistant", "content": "b", "weight": weight}]});
        std::fs::write(&path, record.to_string()).unwrap();
        let told = read(&path, ExampleOptions::default());
        assert_eq!(told.is_ok(), fine, "{weight}");
        assert!(told.err().is_none_or(|e| e.to_string().contains("line 1") && e.to_string().contains("to 1000")));
    }
}
