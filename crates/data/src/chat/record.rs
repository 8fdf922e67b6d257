//! Records to examples, whatever their shape.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value};
use tallow_tokenizer::Message;

use super::example::{AlpacaAs, Content, Shape, Turn};
use super::words::{KnownWords, near};
use crate::read::UnreadField;

type Result<T> = std::result::Result<T, String>;

/// The fields that may matter: what a table is read for.
pub(crate) fn columns() -> impl Iterator<Item = &'static str> {
    let fields = Shape::ALL.into_iter().flat_map(Shape::fields).copied();
    fields.chain(["input", "tools", "system", "history"])
}

/// More fields of one file than this are not kept account of.
const MAX_UNREAD: usize = 20;

/// Heaviest that a message may be: more is a slip of the keyboard, and would drown all others.
const MAX_WEIGHT: f32 = 1000.0;

/// The account of fields that nothing is read from, by file.
#[derive(Clone, Default)]
pub(crate) struct Unread(Arc<Mutex<Vec<UnreadField>>>);

impl Unread {
    pub(crate) fn of_file(&self, path: &Path) -> UnreadOfFile {
        UnreadOfFile { path: path.to_owned(), all: self.clone(), fields: BTreeMap::new() }
    }

    pub(crate) fn take(&self) -> Vec<UnreadField> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The fields of one file, which go into the whole account when its reader is dropped.
pub(crate) struct UnreadOfFile {
    path: PathBuf,
    all: Unread,
    /// Records with it, the line of the first and of the last.
    fields: BTreeMap<String, (u64, u64, u64, Option<String>)>,
}

impl UnreadOfFile {
    /// Notes a field, once a record.
    fn note(&mut self, field: &str, line: u64, nearest: impl FnOnce() -> Option<String>) {
        let full = self.fields.len() >= MAX_UNREAD;
        match self.fields.get_mut(field) {
            Some((_, _, last, _)) if *last == line => {}
            Some((records, _, last, _)) => (*records, *last) = (*records + 1, line),
            None if full => {}
            None => {
                self.fields.insert(field.to_owned(), (1, line, line, nearest()));
            }
        }
    }
}

impl Drop for UnreadOfFile {
    fn drop(&mut self) {
        let path = &self.path;
        let fields = std::mem::take(&mut self.fields).into_iter().map(|(field, (records, line, _, nearest))| {
            UnreadField { path: path.clone(), field, records, line, nearest }
        });
        self.all.0.lock().unwrap_or_else(PoisonError::into_inner).extend(fields);
    }
}

/// Reads the records of one file, which are all of one shape.
pub(crate) struct RecordReader {
    wanted: Option<Shape>,
    alpaca: AlpacaAs,
    known: Arc<KnownWords>,
    unread: UnreadOfFile,
    /// The shape of the first record, and its line.
    first: Option<(Shape, u64)>,
}

impl RecordReader {
    pub(crate) fn new(wanted: Option<Shape>, alpaca: AlpacaAs, known: Arc<KnownWords>, unread: UnreadOfFile) -> Self {
        Self { wanted, alpaca, known, unread, first: None }
    }

    /// Notes a column of a table that is left out before there are records.
    pub(crate) fn note_column(&mut self, column: &str, line: u64) {
        self.unread.note(column, line, || near(column, columns()));
    }

    /// The example that a record holds; `None` for a blank text.
    pub(crate) fn read(&mut self, record: Value, line: u64) -> Result<Option<Content>> {
        let Value::Object(mut record) = record else {
            return Err(format!("{}, not an object with fields such as `messages`", kind(&record)));
        };
        record.retain(|_, value| !value.is_null());
        let shape = self.shape(&record)?;
        let (first, first_line) = *self.first.get_or_insert((shape, line));
        if shape != first {
            let way_out = "a file must be of one shape: split it, or say which to read with shape";
            return Err(format!("a record of {shape}, where line {first_line} is one of {first}; {way_out}"));
        }
        for field in record.keys().filter(|key| columns().all(|known| known != key.as_str())) {
            self.unread.note(field, line, || near(field, columns()));
        }
        let (known, unread) = (&self.known, &mut self.unread);
        let mut turns = |value: Value, field: &'static str, prompt: bool| {
            let mut note = |name: &str| {
                unread.note(&format!("{field}[].{name}"), line, || known.near_message_field(name));
            };
            turns(value, field, prompt, known, &mut note)
        };
        let content = match shape {
            Shape::Messages => chat(turns(take(&mut record, "messages"), "messages", false)?, &mut record)?,
            Shape::Conversations => {
                chat(turns(take(&mut record, "conversations"), "conversations", false)?, &mut record)?
            }
            Shape::Completion => completion(&mut record, &mut turns)?,
            Shape::Alpaca => alpaca(&mut record, self.alpaca)?,
            Shape::Text => match text(&mut record, "text")? {
                text if text.trim().is_empty() => return Ok(None),
                text => Content::Text(text),
            },
        };
        Ok(Some(content))
    }

    fn shape(&self, record: &Map<String, Value>) -> Result<Shape> {
        let has = |shape: &Shape| shape.fields().iter().all(|f| record.contains_key(*f));
        let found = || record.keys().take(20).map(|k| format!("`{k}`")).collect::<Vec<_>>().join(", ");
        if let Some(wanted) = self.wanted {
            let missing = format!("no {wanted} (shape = \"{}\") among its fields {}", wanted.name(), found());
            return if has(&wanted) { Ok(wanted) } else { Err(missing) };
        }
        let mut shapes = Shape::ALL.into_iter().filter(has);
        let Some(shape) = shapes.next() else {
            let known = Shape::ALL.map(|s| s.to_string()).join(", ");
            return Err(format!("of no known shape: its fields are {}; known are {known}", found()));
        };
        match shapes.find(|s| *s != Shape::Text) {
            Some(other) => {
                let (a, b) = (shape.name(), other.name());
                let way_out = format!("say which to read with shape = \"{a}\" or \"{b}\"");
                Err(format!("it has both {shape} and {other}; {way_out}"))
            }
            None => Ok(shape),
        }
    }
}

fn take(record: &mut Map<String, Value>, field: &str) -> Value {
    record.remove(field).unwrap_or(Value::Null)
}

fn text(record: &mut Map<String, Value>, field: &str) -> Result<String> {
    match take(record, field) {
        Value::String(text) => Ok(text),
        other => Err(format!("`{field}` is {}, not text", kind(&other))),
    }
}

/// A conversation with what stands beside it in the record.
fn chat(mut turns: Vec<Turn>, record: &mut Map<String, Value>) -> Result<Content> {
    if record.contains_key("system") {
        let system = text(record, "system")?;
        if turns.first().is_some_and(|t| t.message.role == "system") {
            return Err("a field `system` and a system turn as well; keep one of them".to_owned());
        }
        if !system.is_empty() {
            let message = Message::new("system", system);
            turns.insert(0, Turn { message, weight: None, prompt: true });
        }
    }
    let history = take(record, "history");
    if !is_empty(&history) {
        return Err("a field `history` is not read; write its turns into `messages`".to_owned());
    }
    if !turns.iter().any(|t| t.message.role == "assistant") {
        return Err("no turn of the assistant, so there is nothing to learn; add its answer".to_owned());
    }
    Ok(Content::Chat { turns, tools: tools(take(record, "tools"))? })
}

/// Tools as a list, or as the JSON text of one, as tables often keep them.
fn tools(value: Value) -> Result<Option<Value>> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => {
            super::json::parse(text.as_bytes()).map_err(|e| format!("`tools` is text that is not JSON: {e}"))?
        }
        other => other,
    };
    match value {
        Value::Null => Ok(None),
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(list) => Ok(Some(Value::Array(list))),
        other => Err(format!("`tools` is {}, not a list of tools", kind(&other))),
    }
}

fn completion(
    record: &mut Map<String, Value>,
    turns: &mut dyn FnMut(Value, &'static str, bool) -> Result<Vec<Turn>>,
) -> Result<Content> {
    match (take(record, "prompt"), take(record, "completion")) {
        (Value::String(prompt), Value::String(completion)) => {
            if completion.trim().is_empty() {
                return Err("`completion` is empty, so there is nothing to learn".to_owned());
            }
            match ["tools", "system", "history"].iter().find(|f| record.get(**f).is_some_and(|v| !is_empty(v))) {
                Some(field) => {
                    Err(format!("`{field}` needs a template: make `prompt` and `completion` lists of messages"))
                }
                None => Ok(Content::Completion { prompt, completion }),
            }
        }
        (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
            let mut all = turns(prompt, "prompt", true)?;
            let completion = turns(completion, "completion", false)?;
            if !completion.iter().any(|t| t.message.role == "assistant") {
                return Err("no turn of the assistant in `completion`, so there is nothing to learn".to_owned());
            }
            all.extend(completion);
            chat(all, record)
        }
        (prompt, completion) => Err(format!(
            "`prompt` is {} and `completion` {}; make them two texts, or two lists of messages",
            kind(&prompt),
            kind(&completion)
        )),
    }
}

fn alpaca(record: &mut Map<String, Value>, become_: AlpacaAs) -> Result<Content> {
    let (instruction, output) = (text(record, "instruction")?, text(record, "output")?);
    let input = if record.contains_key("input") { text(record, "input")? } else { String::new() };
    if output.trim().is_empty() {
        return Err("`output` is empty, so there is nothing to learn".to_owned());
    }
    if become_ == AlpacaAs::Prompt {
        if let Some(field) =
            ["tools", "system", "history"].iter().find(|f| record.get(**f).is_some_and(|v| !is_empty(v)))
        {
            return Err(format!("`{field}` needs a template; use alpaca = \"messages\""));
        }
        return Ok(Content::Completion { prompt: alpaca_prompt(&instruction, &input), completion: output });
    }
    let user = if input.trim().is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
    let turn = |role, content: String| Turn { message: Message::new(role, content), weight: None, prompt: false };
    chat(vec![turn("user", user), turn("assistant", output)], record)
}

/// The text of the Alpaca set (`tatsu-lab/alpaca`, its field `text`) up to the response.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        return format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        );
    }
    format!(
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
         response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
         ### Response:\n"
    )
}

fn turns(
    value: Value,
    field: &str,
    prompt: bool,
    known: &KnownWords,
    unread: &mut dyn FnMut(&str),
) -> Result<Vec<Turn>> {
    let Value::Array(list) = value else {
        return Err(format!("`{field}` is {}, not a list of messages", kind(&value)));
    };
    let at = |i: usize, e: String| format!("`{field}`, message {}: {e}", i + 1);
    list.into_iter().enumerate().map(|(i, v)| turn(v, prompt, known, unread).map_err(|e| at(i, e))).collect()
}

fn turn(value: Value, prompt: bool, known: &KnownWords, unread: &mut dyn FnMut(&str)) -> Result<Turn> {
    let Value::Object(mut map) = value else {
        return Err(format!("{}, not an object with `role` and `content`", kind(&value)));
    };
    let weight = weight(&mut map)?;
    map.retain(|_, value| !value.is_null());
    let (role, said) = match (map.remove("role"), map.remove("from")) {
        (Some(_), Some(_)) => return Err("both `role` and `from`; keep one of them".to_owned()),
        (Some(Value::String(role)), None) if !role.trim().is_empty() => {
            known.check_role(&role)?;
            (role, "content")
        }
        (Some(other), None) => return Err(format!("its role is {other}, not a name such as \"user\"")),
        (None, Some(from)) => (role_of(&from)?.to_owned(), if map.contains_key("value") { "value" } else { "content" }),
        (None, None) => return Err("no `role` (nor `from`); say who speaks, e.g. \"role\": \"user\"".to_owned()),
    };
    let content = match map.remove(said) {
        None => None,
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => Some(parts_text(parts)?),
        Some(other) => return Err(format!("the {role}'s `{said}` is {}, not text", kind(&other))),
    };
    map.keys().filter(|name| !known.knows_message_field(name)).for_each(|name| unread(name));
    let calls = ["tool_calls", "function_call"].iter().any(|key| map.get(*key).is_some_and(|v| !is_empty(v)));
    let blank = content.as_ref().is_none_or(|c| c.trim().is_empty());
    if role == "assistant" && blank && !calls {
        return Err("the assistant's turn is empty; give it an answer, or leave the example out".to_owned());
    }
    if content.is_none() && !calls {
        return Err(format!("the {role}'s turn has no `{said}`; only a turn with `tool_calls` may have none"));
    }
    Ok(Turn { message: Message { role, content, extra: map }, weight, prompt })
}

/// The role of a `from` as the sets in the shape of ShareGPT have them.
fn role_of(from: &Value) -> Result<&'static str> {
    match from.as_str() {
        Some("human" | "user") => Ok("user"),
        Some("gpt" | "assistant" | "model") => Ok("assistant"),
        Some("system") => Ok("system"),
        Some("tool" | "observation" | "function_response") => Ok("tool"),
        _ => {
            let known = "human, user, gpt, assistant, model, system, tool, observation, function_response";
            Err(format!("from {from}, who is not known; known are {known}; or write `role` and `content`"))
        }
    }
}

/// The text of a content that is a list of parts.
fn parts_text(parts: Vec<Value>) -> Result<String> {
    let mut all = String::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text")) {
            (Some("text"), Some(Value::String(text))) => all.push_str(text),
            (Some("text"), _) => return Err("a part of type `text` without a `text`".to_owned()),
            (Some(other), _) => return Err(format!("a part of type `{other}`; only text can be learnt from")),
            (None, _) => return Err("a part of content without a `type`; write {\"type\": \"text\", ...}".to_owned()),
        }
    }
    Ok(all)
}

/// How much a turn counts, if it says so, by `weight` or by `train`.
fn weight(map: &mut Map<String, Value>) -> Result<Option<f32>> {
    let of_bool = |b: bool| if b { 1.0 } else { 0.0 };
    let said = |map: &mut Map<String, Value>, key| map.remove(key).filter(|v| !v.is_null());
    match (said(map, "weight"), said(map, "train")) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err("both `weight` and `train`; keep one of them".to_owned()),
        (Some(Value::Bool(b)), None) | (None, Some(Value::Bool(b))) => Ok(Some(of_bool(b))),
        (Some(value), None) => match value.as_f64().map(|w| w as f32) {
            Some(w) if (0.0..=MAX_WEIGHT).contains(&w) => Ok(Some(w)),
            _ => Err(format!("weight {value}; it must be a number from 0 (not to be learnt) to {MAX_WEIGHT}")),
        },
        (None, Some(value)) => Err(format!("train {value}; it must be true or false")),
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
