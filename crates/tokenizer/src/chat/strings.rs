//! Methods of Python strings that minijinja-contrib's compatibility layer lacks or counts in bytes.

use minijinja::value::{Kwargs, from_args};
use minijinja::{Error, ErrorKind, Value};

/// The result of `text.method(args)`, none where another layer has it right.
pub(crate) fn method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let test = |args: &[Value], each: fn(char) -> bool| -> Result<Value, Error> {
        let () = from_args(args)?;
        Ok(Value::from(!text.is_empty() && text.chars().all(each)))
    };
    let found = match method {
        "isalpha" => test(args, char::is_alphabetic)?,
        "isalnum" => test(args, char::is_alphanumeric)?,
        "isdigit" | "isnumeric" | "isdecimal" => test(args, char::is_numeric)?,
        "isspace" => test(args, char::is_whitespace)?,
        "islower" => cased(text, args, char::is_lowercase)?,
        "isupper" => cased(text, args, char::is_uppercase)?,
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase())
        }
        "find" | "index" => position(text, method, args, |text, what| text.find(what))?,
        "rfind" | "rindex" => position(text, method, args, |text, what| text.rfind(what))?,
        "count" => {
            let (what,): (&str,) = from_args(args)?;
            let count = if what.is_empty() { text.chars().count() + 1 } else { text.matches(what).count() };
            Value::from(count)
        }
        "removeprefix" => {
            let (what,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(what).unwrap_or(text))
        }
        "removesuffix" => {
            let (what,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(what).unwrap_or(text))
        }
        "partition" => {
            let what = separator(args)?;
            let (before, what, after) = match text.split_once(what) {
                Some((before, after)) => (before, what, after),
                None => (text, "", ""),
            };
            list(vec![before, what, after])
        }
        "rpartition" => {
            let what = separator(args)?;
            let (before, what, after) = match text.rsplit_once(what) {
                Some((before, after)) => (before, what, after),
                None => ("", "", text),
            };
            list(vec![before, what, after])
        }
        "split" => split(text, args, false)?,
        "rsplit" => split(text, args, true)?,
        "splitlines" => {
            let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = named.get::<Option<bool>>("keepends")?.or(keep).unwrap_or(false);
            named.assert_all_used()?;
            list(lines(text, keep))
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn list(parts: Vec<&str>) -> Value {
    parts.into_iter().map(Value::from).collect()
}

fn fail(reason: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.to_string())
}

fn separator(args: &[Value]) -> Result<&str, Error> {
    let (what,): (&str,) = from_args(args)?;
    if what.is_empty() { Err(fail("empty separator")) } else { Ok(what) }
}

/// At least one character with a case, and all of them in this one.
fn cased(text: &str, args: &[Value], case: fn(char) -> bool) -> Result<Value, Error> {
    let () = from_args(args)?;
    let mut all = text.chars().filter(|c| c.is_lowercase() || c.is_uppercase()).peekable();
    Ok(Value::from(all.peek().is_some() && all.all(case)))
}

/// Counted in characters, as Python's indices and slices are.
fn position(text: &str, method: &str, args: &[Value], find: fn(&str, &str) -> Option<usize>) -> Result<Value, Error> {
    let (what,): (&str,) = from_args(args)?;
    match find(text, what) {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(fail("substring not found")),
    }
}

fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (first, second, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let what = named.get::<Option<Value>>("sep")?.or(first).filter(|what| !what.is_none());
    let most = named.get::<Option<i64>>("maxsplit")?.or(second).unwrap_or(-1);
    named.assert_all_used()?;
    // As many parts as the text can have at most.
    let parts = usize::try_from(most).map_or(usize::MAX, |most| most.saturating_add(1));
    let split: Vec<&str> = match &what {
        Some(what) => {
            let what = what.as_str().filter(|what| !what.is_empty());
            let what = what.ok_or_else(|| fail("the separator of split must be a string that is not empty"))?;
            if from_right {
                let mut split: Vec<&str> = text.rsplitn(parts, what).collect();
                split.reverse();
                split
            } else {
                text.splitn(parts, what).collect()
            }
        }
        None if from_right => words_from_right(text, parts),
        None => words(text, parts),
    };
    Ok(list(split))
}

fn words(text: &str, parts: usize) -> Vec<&str> {
    let (mut out, mut rest) = (Vec::new(), text.trim_start());
    while !rest.is_empty() {
        let end = if out.len() + 1 == parts { None } else { rest.find(char::is_whitespace) };
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        out.push(word);
        rest = after.trim_start();
    }
    out
}

fn words_from_right(text: &str, parts: usize) -> Vec<&str> {
    let (mut out, mut rest) = (Vec::new(), text.trim_end());
    while !rest.is_empty() {
        let space = if out.len() + 1 == parts { None } else { rest.char_indices().rfind(|(_, c)| c.is_whitespace()) };
        let start = space.map_or(0, |(at, c)| at + c.len_utf8());
        out.push(&rest[start..]);
        rest = rest[..start].trim_end();
    }
    out.reverse();
    out
}

/// Python breaks lines at more characters than `\n`, and takes `\r\n` as one.
fn lines(text: &str, keep: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let (mut out, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(ends) {
        let length =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        out.push(&rest[..if keep { at + length } else { at }]);
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        out.push(rest);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(text: &str, name: &str, args: &[Value]) -> String {
        method(text, name, args).unwrap().unwrap().to_string()
    }

    #[test]
    fn methods_count_and_cut_as_python_does() {
        assert_eq!(call("né</t>x", "find", &["</t>".into()]), "2");
        assert_eq!(call("né", "find", &["x".into()]), "-1");
        assert!(method("né", "index", &["x".into()]).is_err());
        assert_eq!(call("aéa", "count", &["".into()]), "4");
        assert_eq!(call("", "isdigit", &[]), "False");
        assert_eq!(call("A1", "isupper", &[]), "True");
        assert_eq!(call("a--b--c", "rsplit", &["--".into(), 1.into()]), r#"["a--b", "c"]"#);
        assert_eq!(call("  a  b c ", "split", &[]), r#"["a", "b", "c"]"#);
        assert_eq!(call("  a  b c ", "split", &[().into(), 1.into()]), r#"["a", "b c "]"#);
        assert_eq!(call("  a  b c ", "rsplit", &[().into(), 1.into()]), r#"["  a  b", "c"]"#);
        assert_eq!(call("a\r\nb\n\nc", "splitlines", &[]), r#"["a", "b", "", "c"]"#);
        assert_eq!(call("a=b=c", "rpartition", &["=".into()]), r#"["a=b", "=", "c"]"#);
        assert!(method("a", "split", &["".into()]).is_err());
        assert!(method("a", "upper", &[]).unwrap().is_none());
    }
}
