//! What Python and jinja2 do otherwise than minijinja, where templates rely on it: how values print, JSON as
//! `json.dumps` writes it, dictionaries with methods, and two tests.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use minijinja::value::{Enumerator, Kwargs, Object, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value as Json;

use super::strings;

/// Values of a template nest no deeper; deeper ones are an error instead of a long recursion.
const MAX_DEPTH: usize = 128;

/// A dictionary whose methods go before its keys: `schema.items()` with a key `items` is what JSON schemas do.
#[derive(Debug)]
struct Dict {
    keys: Vec<Value>,
    values: HashMap<Box<str>, Value>,
}

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values.get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys.clone())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.keys.len())
    }

    fn call_method(self: &Arc<Self>, state: &State<'_, '_>, method: &str, args: &[Value]) -> Result<Value, Error> {
        unknown_method_callback(state, &Value::from_dyn_object(self.clone()), method, args)
    }
}

/// JSON for a template, keys in their order.
pub(crate) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (None, Some(u)) => Value::from(u),
            (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from(items.iter().map(value).collect::<Vec<_>>()),
        Json::Object(map) => dict(map.iter().map(|(key, json)| (key.as_str(), value(json)))),
    }
}

/// A dictionary of these items, the keys in their order and each once.
pub(crate) fn dict<'k>(items: impl Iterator<Item = (&'k str, Value)>) -> Value {
    let (mut keys, mut values) = (Vec::new(), HashMap::new());
    for (key, value) in items {
        if values.insert(key.into(), value).is_none() {
            keys.push(Value::from(key));
        }
    }
    Value::from_object(Dict { keys, values })
}

/// Makes an environment print, test and call as Python's would.
pub(crate) fn install(env: &mut Environment<'_>) {
    env.set_formatter(print);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: Value| -> Result<String, Error> { text(&value) });
    env.add_test("iterable", |value: Value| is_sized(&value) || value.kind() == ValueKind::Iterable);
    env.add_test("sequence", |value: Value| is_sized(&value));
}

/// Strings, dictionaries and the undefined are sequences for jinja2, too: they have a length and items.
fn is_sized(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Undefined)
}

fn method(state: &State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str()
        && let Some(result) = strings::method(text, method, args)?
    {
        return Ok(result);
    }
    unknown_method_callback(state, value, method, args)
}

fn print(out: &mut Output, _state: &State, value: &Value) -> Result<(), Error> {
    match value.as_str() {
        Some(text) => out.write_str(text)?,
        None => out.write_str(&text(value)?)?,
    }
    Ok(())
}

/// `str(value)`.
fn text(value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_string());
    }
    let mut out = String::new();
    if !value.is_undefined() {
        repr(&mut out, value, 0)?;
    }
    Ok(out)
}

fn too_deep(depth: usize) -> Result<(), Error> {
    if depth < MAX_DEPTH {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidOperation, format!("a value nests deeper than {MAX_DEPTH} levels")))
}

fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string never fails.
    let _ = out.write_fmt(text);
}

/// `repr(value)`.
fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    too_deep(depth)?;
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => number(out, value, ["nan", "inf", "-inf"]),
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => write!(out, "{value}")?,
    }
    Ok(())
}

/// A string as Python writes it in source.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => put(out, format_args!("\\x{:02x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// An integer as it is, a float by its shortest digits, `special` being not a number and the infinities.
fn number(out: &mut String, value: &Value, special: [&str; 3]) {
    let float = match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float,
        _ => return put(out, format_args!("{value}")),
    };
    if float.is_nan() {
        return out.push_str(special[0]);
    }
    if float.is_infinite() {
        return out.push_str(special[if float > 0.0 { 1 } else { 2 }]);
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float == 0.0 || (-4..16).contains(&exponent) {
        put(out, format_args!("{float:?}"));
    } else {
        put(out, format_args!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()));
    }
}

/// How `json.dumps` lays JSON out.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, the parameters by name or in this order.
fn tojson(value: Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let mut given = [const { None }; NAMES.len()];
    for (index, value) in positional.iter().enumerate() {
        let slot = given.get_mut(index).ok_or_else(|| Error::from(ErrorKind::TooManyArguments))?;
        *slot = Some(value.clone());
    }
    for (slot, name) in given.iter_mut().zip(NAMES) {
        if let Some(value) = named.get::<Option<Value>>(name)? {
            *slot = Some(value);
        }
    }
    named.assert_all_used()?;
    let [ensure_ascii, indent, separators, sort_keys] = given.map(|value| value.filter(|v| !v.is_none()));
    let indent = match indent {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_string),
        Some(count) => Some(" ".repeat(i64::try_from(count)?.clamp(0, 64) as usize)),
    };
    let (item, key) = match separators {
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
        Some(pair) => {
            let part = |index: usize| {
                let part = pair.get_item_by_index(index)?;
                let text = part.as_str().map(str::to_string);
                text.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "separators must be two strings"))
            };
            (part(0)?, part(1)?)
        }
    };
    let truth = |value: Option<Value>| value.is_some_and(|v| v.is_true());
    let style = Style { ensure_ascii: truth(ensure_ascii), indent, item, key, sort_keys: truth(sort_keys) };
    let mut out = String::new();
    style.write(&mut out, &value, 0)?;
    Ok(Value::from(out))
}

impl Style {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        too_deep(depth)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => number(out, value, ["NaN", "Infinity", "-Infinity"]),
            ValueKind::String => self.string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(out, '[', ']', items.len(), depth, &mut |out, index| {
                    self.write(out, &items[index], depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys = Vec::new();
                for key in value.try_iter()? {
                    keys.push((self.key_text(&key)?, value.get_item(&key)?));
                }
                if self.sort_keys {
                    keys.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.list(out, '{', '}', keys.len(), depth, &mut |out, index| {
                    self.string(out, &keys[index].0);
                    out.push_str(&self.key);
                    self.write(out, &keys[index].1, depth + 1)
                })?;
            }
            kind => {
                let reason = format!("a value of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
        Ok(())
    }

    fn key_text(&self, key: &Value) -> Result<String, Error> {
        match key.as_str() {
            Some(text) => Ok(text.to_string()),
            None => {
                let mut out = String::new();
                self.write(&mut out, key, MAX_DEPTH - 1)?;
                Ok(out)
            }
        }
    }

    fn list(
        &self,
        out: &mut String,
        open: char,
        close: char,
        count: usize,
        depth: usize,
        each: &mut dyn FnMut(&mut String, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth: usize| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for index in 0..count {
            out.push_str(if index > 0 { &self.item } else { "" });
            line(out, depth + 1);
            each(out, index)?;
        }
        if count > 0 {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn string(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| put(out, format_args!("\\u{unit:04x}")));
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, json: Json) -> String {
        let mut env = Environment::new();
        install(&mut env);
        env.render_str(template, Value::from_iter([("x", value(&json))])).unwrap()
    }

    #[test]
    fn json_is_pythons() {
        let x = serde_json::json!({"b": [1, 2.0, 1e16, 1e-5, null, true], "a": {"é<\"\n": "\u{1}\u{7f}🙂"}, "e": [], "f": {}});
        assert_eq!(
            render("{{ x|tojson }}", x.clone()),
            "{\"b\": [1, 2.0, 1e+16, 1e-05, null, true], \"a\": {\"é<\\\"\\n\": \"\\u0001\u{7f}🙂\"}, \"e\": [], \"f\": {}}"
        );
        assert_eq!(
            render("{{ x|tojson(indent=2, sort_keys=true) }}", serde_json::json!({"b": [1, []], "a": {}})),
            "{\n  \"a\": {},\n  \"b\": [\n    1,\n    []\n  ]\n}"
        );
        assert_eq!(render("{{ x|tojson(separators=(',', ':')) }}", serde_json::json!({"a": [1, 2]})), "{\"a\":[1,2]}");
        assert_eq!(render("{{ x|tojson(true) }}", serde_json::json!("é🙂")), "\"\\u00e9\\ud83d\\ude42\"");
    }

    #[test]
    fn values_print_as_in_python() {
        let x = serde_json::json!({"a": [true, null, 1.5, "it's", "both '\""], "b": {}});
        assert_eq!(render("{{ x }}", x), r#"{'a': [True, None, 1.5, "it's", 'both \'"'], 'b': {}}"#);
        assert_eq!(render("{{ x }}|{{ true }}|{{ none }}|{{ nothing }}", serde_json::json!(1e22)), "1e+22|True|None|");
        assert_eq!(render("{{ x|string }}", serde_json::json!(false)), "False");
    }

    #[test]
    fn dictionaries_have_methods_before_keys() {
        let x = serde_json::json!({"items": 1, "get": 2, "z": 3});
        assert_eq!(render("{% for k, v in x.items() %}{{ k }}{{ v }}{% endfor %}", x.clone()), "items1get2z3");
        assert_eq!(render("{{ x.get('z') }}{{ x.get('y', 9) }}{{ x['items'] }}{{ 'z' in x }}", x), "391True");
        assert_eq!(
            render("{{ x is mapping }}{{ x is iterable }}{{ 'a' is sequence }}{{ 3 is iterable }}", Json::from(3)),
            "FalseFalseTrueFalse"
        );
    }
}
