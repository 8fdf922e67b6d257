//! A reader of GGUF metadata, for tests only: just enough to fill a `GgufVocab`.

use std::collections::HashMap;
use std::path::Path;

use tallow_tokenizer::GgufVocab;

#[derive(Debug)]
enum Value {
    Int(u64),
    Float(f32),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
}

struct Reader<'b>(&'b [u8]);

impl Reader<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (head, rest) = self.0.split_first_chunk().expect("truncated GGUF");
        self.0 = rest;
        *head
    }

    fn length(&mut self) -> usize {
        usize::try_from(u64::from_le_bytes(self.bytes())).expect("length")
    }

    fn text(&mut self) -> String {
        let length = self.length();
        let (head, rest) = self.0.split_at(length);
        self.0 = rest;
        String::from_utf8(head.to_vec()).expect("GGUF strings are UTF-8")
    }

    fn value(&mut self, kind: u32) -> Value {
        match kind {
            0 => Value::Int(u64::from(self.bytes::<1>()[0])),
            1 => Value::Int(i8::from_le_bytes(self.bytes()) as u64),
            2 => Value::Int(u64::from(u16::from_le_bytes(self.bytes()))),
            3 => Value::Int(i16::from_le_bytes(self.bytes()) as u64),
            4 => Value::Int(u64::from(u32::from_le_bytes(self.bytes()))),
            5 => Value::Int(i32::from_le_bytes(self.bytes()) as u64),
            6 => Value::Float(f32::from_le_bytes(self.bytes())),
            7 => Value::Bool(self.bytes::<1>()[0] != 0),
            8 => Value::Text(self.text()),
            9 => {
                let kind = u32::from_le_bytes(self.bytes());
                let length = self.length();
                Value::List((0..length).map(|_| self.value(kind)).collect())
            }
            10 => Value::Int(u64::from_le_bytes(self.bytes())),
            11 => Value::Int(i64::from_le_bytes(self.bytes()) as u64),
            12 => Value::Float(f64::from_le_bytes(self.bytes()) as f32),
            other => panic!("GGUF value type {other}"),
        }
    }
}

/// Reads the tokenizer metadata of a GGUF file.
pub fn read(path: &Path) -> GgufVocab {
    let file = std::fs::read(path).expect("readable GGUF");
    let mut reader = Reader(&file);
    assert_eq!(&reader.bytes::<4>(), b"GGUF");
    let version = u32::from_le_bytes(reader.bytes());
    assert!((2..=3).contains(&version), "GGUF version {version}");
    let (_tensors, keys) = (reader.length(), reader.length());
    let mut map = HashMap::new();
    for _ in 0..keys {
        let key = reader.text();
        let kind = u32::from_le_bytes(reader.bytes());
        map.insert(key, reader.value(kind));
    }
    let mut take = |key: &str| map.remove(&format!("tokenizer.ggml.{key}"));
    let list = |value: Option<Value>| match value {
        Some(Value::List(items)) => Some(items),
        _ => None,
    };
    let texts = |value| {
        list(value)
            .map(|items| items.into_iter().map(|v| if let Value::Text(t) = v { t } else { panic!("{v:?}") }).collect())
    };
    let int = |value| if let Some(Value::Int(i)) = value { Some(i as u32) } else { None };
    let flag = |value| if let Some(Value::Bool(b)) = value { Some(b) } else { None };
    let text = |value| if let Some(Value::Text(t)) = value { Some(t) } else { None };
    let ints = |v: Value| if let Value::Int(i) = v { i as u32 } else { panic!("{v:?}") };
    let floats = |v: Value| if let Value::Float(f) = v { f } else { panic!("{v:?}") };
    GgufVocab {
        model: text(take("model")).expect("tokenizer.ggml.model"),
        pre: text(take("pre")),
        tokens: texts(take("tokens")).expect("tokenizer.ggml.tokens"),
        scores: list(take("scores")).map(|l| l.into_iter().map(floats).collect()),
        token_types: list(take("token_type")).map(|l| l.into_iter().map(ints).collect()),
        merges: texts(take("merges")),
        bos: int(take("bos_token_id")),
        eos: int(take("eos_token_id")),
        unk: int(take("unknown_token_id")),
        pad: int(take("padding_token_id")),
        add_bos: flag(take("add_bos_token")),
        add_eos: flag(take("add_eos_token")),
        add_space_prefix: flag(take("add_space_prefix")),
        remove_extra_whitespaces: flag(take("remove_extra_whitespaces")),
        precompiled_charsmap: list(take("precompiled_charsmap"))
            .map(|l| l.into_iter().map(|v| ints(v) as u8).collect()),
        chat_template: text(map.remove("tokenizer.chat_template")),
    }
}
