//! Records of a file of JSON lines.

use std::fmt;
use std::io::{BufRead, Read};

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::open::Stream;
use super::{ReadOptions, Record, Records};

/// What is made of a line.
pub(super) trait ParseLine: Send {
    /// What it is made into.
    type Item;

    /// A line that is not empty; `None` if it holds no text, else what is wrong with it.
    fn parse(&mut self, json: &[u8], line: u64) -> Result<Option<Self::Item>, String>;
}

pub(super) struct JsonRecords<P> {
    stream: Stream,
    parser: P,
    cap: usize,
    buffer: Vec<u8>,
    line: u64,
    over: bool,
}

impl<P: ParseLine> JsonRecords<P> {
    pub(super) fn new(stream: Stream, parser: P, options: &ReadOptions) -> Self {
        Self { stream, parser, cap: options.max_document_bytes, buffer: vec![], line: 0, over: false }
    }

    /// One line without its end. `Ok(None)` behind the last, `Ok(Some(false))` if it was too long to keep.
    fn read_line(&mut self) -> std::io::Result<Option<bool>> {
        self.buffer.clear();
        let n = self.stream.by_ref().take(self.cap as u64 + 1).read_until(b'\n', &mut self.buffer)?;
        if n == 0 {
            return Ok(None);
        }
        self.line += 1;
        if self.buffer.last() != Some(&b'\n') && n > self.cap {
            skip_line(&mut self.stream)?;
            return Ok(Some(false));
        }
        Ok(Some(true))
    }

    fn parse(&mut self) -> Option<Record<P::Item>> {
        let line = self.line;
        let bytes = match line {
            1 => self.buffer.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&self.buffer),
            _ => &self.buffer,
        };
        let bytes = bytes.trim_ascii();
        if bytes.is_empty() {
            return None;
        }
        Some(match self.parser.parse(bytes, line) {
            Ok(Some(item)) => Record::Document { item, line },
            Ok(None) => Record::Blank,
            Err(reason) => Record::Malformed { line, reason },
        })
    }
}

/// What is wrong with a line that is no record: what it is instead, else what serde_json says. That counts lines within what it
/// was given: always 1 here, and the column says enough.
pub(super) fn json_reason(json: &[u8], error: &serde_json::Error, such_as: &str) -> String {
    let each = format!("each line holds one, e.g. {such_as}");
    let said = error.to_string().replace(" at line 1 column", ", at column");
    match json.first() {
        Some(b'[') => format!("is a list, not a record: {each}, with no brackets around all of them"),
        Some(b'{') if error.is_eof() => format!("the record does not end on its line ({said}): {each}"),
        Some(b'{') => said,
        _ => {
            let shown: String = String::from_utf8_lossy(json).chars().take(20).collect();
            format!("is no JSON object (it begins with {shown:?}): {each}")
        }
    }
}

impl<P: ParseLine> Records<P::Item> for JsonRecords<P> {
    fn next_record(&mut self) -> Option<Record<P::Item>> {
        while !self.over {
            match self.read_line() {
                Ok(None) => self.over = true,
                Ok(Some(true)) => {
                    if let Some(record) = self.parse() {
                        return Some(record);
                    }
                }
                Ok(Some(false)) => {
                    let reason = format!("the line is longer than {} bytes (max_document_bytes)", self.cap);
                    return Some(Record::Malformed { line: self.line, reason });
                }
                Err(e) => {
                    self.over = true;
                    return Some(Record::Damaged { line: self.line, reason: e.to_string() });
                }
            }
        }
        None
    }
}

/// Reads on to the end of the line without keeping it.
fn skip_line(stream: &mut Stream) -> std::io::Result<()> {
    loop {
        let chunk = stream.fill_buf()?;
        if chunk.is_empty() {
            return Ok(());
        }
        match chunk.iter().position(|&b| b == b'\n') {
            Some(at) => {
                stream.consume(at + 1);
                return Ok(());
            }
            None => {
                let n = chunk.len();
                stream.consume(n);
            }
        }
    }
}

/// Takes one string field out of an object, and checks but does not keep the others.
pub(super) struct TextField(pub(super) String);

impl ParseLine for TextField {
    type Item = String;

    fn parse(&mut self, json: &[u8], _line: u64) -> Result<Option<String>, String> {
        let mut parser = serde_json::Deserializer::from_slice(json);
        let text = FieldSeed { field: &self.0 }.deserialize(&mut parser).and_then(|t| parser.end().map(|()| t));
        text.map(|text| Some(text).filter(|t| !t.trim().is_empty()))
            .map_err(|e| json_reason(json, &e, &format!("{{\"{}\": \"..\"}}", self.0)))
    }
}

struct FieldSeed<'a> {
    field: &'a str,
}

impl<'de> DeserializeSeed<'de> for FieldSeed<'_> {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FieldSeed<'_> {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an object with a string field `{}`", self.field)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<String, A::Error> {
        use serde::de::Error;
        let mut text = None;
        while let Some(is_text) = map.next_key_seed(KeyIs(self.field))? {
            if !is_text {
                map.next_value::<IgnoredAny>()?;
            } else if text.replace(map.next_value::<String>()?).is_some() {
                return Err(A::Error::custom(format!("field `{}` appears twice", self.field)));
            }
        }
        text.ok_or_else(|| A::Error::custom(format!("no field `{}`", self.field)))
    }
}

/// Whether a key is this one.
struct KeyIs<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for KeyIs<'_> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyIs<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}
