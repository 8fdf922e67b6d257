//! Jinja templates, compiled once and rendered as transformers renders them.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use minijinja::{AutoEscape, Environment, ErrorKind, State, UndefinedBehavior, Value};

use super::{python, time};
use crate::error::{Error, Result};

/// No chat template is larger by far; anything above is not compiled.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Steps that one rendering may take: a thousand turns take about a hundredth, and an endless loop ends within seconds.
const FUEL: u64 = 20_000_000;

const NAME: &str = "chat";

/// Variables that only this crate sets, as globals: functions called within macros see no others.
const OPEN: &str = "__generation_open";
const CLOSE: &str = "__generation_close";
const NOW: &str = "__now";

/// The chat templates of a tokenizer by name; `default` is the one without a name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct NamedTemplates(Vec<(String, String)>);

impl NamedTemplates {
    pub(crate) const DEFAULT: &str = "default";
    pub(crate) const TOOL_USE: &str = "tool_use";

    /// Adds a template or replaces the one of that name.
    pub(crate) fn set(&mut self, name: &str, source: String) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = source,
            None => self.0.push((name.to_string(), source)),
        }
    }

    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, source)| source.as_str())
    }

    /// The one named `default`, else the first.
    pub(crate) fn main(&self) -> Option<&str> {
        self.get(Self::DEFAULT).or_else(|| self.0.first().map(|(_, source)| source.as_str()))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, source)| (name.as_str(), source.as_str()))
    }
}

impl From<Option<String>> for NamedTemplates {
    fn from(source: Option<String>) -> Self {
        Self(source.into_iter().map(|source| (Self::DEFAULT.to_string(), source)).collect())
    }
}

/// A compiled template. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ChatTemplate {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    source: String,
    env: Environment<'static>,
    marks_generation: bool,
    /// Whether values may be put into one another more often than a common stack can drop them: in a loop only a
    /// namespace keeps them, otherwise each step is there in the source.
    may_nest: bool,
}

/// What `raise_exception` was called with, to be told from errors of the template itself.
#[derive(Debug)]
struct Refusal(String);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

impl ChatTemplate {
    /// Compiles `source`; `name` only names it in errors.
    pub(crate) fn new(name: &str, source: &str) -> Result<Self> {
        let fail = |line: usize, reason: String| Error::TemplateSyntax { template: name.to_string(), line, reason };
        if source.len() > MAX_TEMPLATE_BYTES {
            let reason = format!("{} bytes; a chat template has at most {MAX_TEMPLATE_BYTES}", source.len());
            return Err(fail(1, reason));
        }
        let (jinja, marks_generation) = generation_tags(source);
        let mut env = environment();
        let compiled = deep(|| guarded(|| env.add_template_owned(NAME, jinja)));
        compiled
            .map_err(|reason| fail(1, reason))?
            .map_err(|e| fail(e.line().unwrap_or(1), e.detail().map_or_else(|| e.to_string(), str::to_string)))?;
        let may_nest = source.contains("namespace") || source.len() > 1 << 16;
        let (name, source) = (name.to_string(), source.to_string());
        Ok(Self { inner: Arc::new(Inner { name, source, env, marks_generation, may_nest }) })
    }

    pub(crate) fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn source(&self) -> &str {
        &self.inner.source
    }

    /// Whether the template has `{% generation %}` blocks.
    pub(crate) fn marks_generation(&self) -> bool {
        self.inner.marks_generation
    }

    /// Renders with these variables, at the time `now` in seconds since 1970. With `marks`, what each generation block
    /// writes stands between these two characters.
    pub(crate) fn render(
        &self,
        variables: BTreeMap<String, Value>,
        now: i64,
        marks: Option<[char; 2]>,
    ) -> Result<String> {
        let mut env = self.inner.env.clone();
        env.add_global(NOW, now);
        if let Some([open, close]) = marks {
            env.add_global(OPEN, open.to_string());
            env.add_global(CLOSE, close.to_string());
        }
        let step = || guarded(|| env.get_template(NAME).and_then(|t| t.render(Value::from_iter(variables))));
        let rendered = if self.inner.may_nest { deep(step) } else { step() };
        match rendered {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(reason) => Err(Error::TemplateFailed { template: self.name().to_string(), line: 1, reason }),
        }
    }

    fn explain(&self, error: &minijinja::Error) -> Error {
        let template = self.name().to_string();
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(current) = cause {
            if let Some(Refusal(message)) = current.downcast_ref() {
                return Error::TemplateRefused { template, message: message.clone() };
            }
            cause = current.source();
        }
        let reason = match error.kind() {
            ErrorKind::OutOfFuel => format!("it takes more than {FUEL} steps; a loop does not end"),
            kind => error.detail().map_or_else(|| kind.to_string(), |detail| format!("{kind}: {detail}")),
        };
        Error::TemplateFailed { template, line: error.line().unwrap_or(1), reason }
    }
}

/// Runs `step` on a thread whose stack a template of the largest size cannot overflow: the engine parses, and drops values
/// that hold one another, by recursion.
fn deep<T: Send>(step: impl FnOnce() -> std::result::Result<T, String> + Send) -> std::result::Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, step);
        let thread = thread.map_err(|e| format!("cannot start a thread: {e}"))?;
        thread.join().unwrap_or_else(|_| Err("the template engine cannot handle it".to_string()))
    })
}

/// Only what is used of it takes memory.
const STACK: usize = 1 << 30;

/// A template engine that a hostile template brings to panic has failed as for any other reason.
fn guarded<T>(step: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(step)).map_err(|_| "the template engine cannot handle it".to_string())
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_fuel(Some(FUEL));
    python::install(&mut env);
    env.add_function("raise_exception", |message: String| -> std::result::Result<Value, minijinja::Error> {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
        Err(error.with_source(Refusal(message)))
    });
    env.add_function("strftime_now", |state: &State, format: String| {
        let now = state.lookup(NOW).and_then(|now| i64::try_from(now).ok());
        time::strftime(now.unwrap_or(0), &format)
    });
    env.add_filter(FILTER, |state: &State, body: String| match (state.lookup(OPEN), state.lookup(CLOSE)) {
        (Some(open), Some(close)) => format!("{open}{body}{close}"),
        _ => body,
    });
    env
}

const FILTER: &str = "__generation";

/// Jinja as minijinja knows it: line ends as jinja2 reads them, and generation blocks as filter blocks. Lines keep their
/// numbers, white space around tags keeps its meaning. The second part says whether there are generation blocks.
fn generation_tags(source: &str) -> (String, bool) {
    let source = if source.contains('\r') {
        Cow::Owned(source.replace("\r\n", "\n").replace('\r', "\n"))
    } else {
        Cow::Borrowed(source)
    };
    let mut out = String::with_capacity(source.len() + 64);
    let (mut rest, mut found) = (&*source, false);
    while let Some(at) = rest.find("{%") {
        let word_at = at + 2 + tag_lead(&rest[at + 2..]);
        let word_end =
            word_at + rest[word_at..].find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len() - word_at);
        out.push_str(&rest[..word_at]);
        let closes = rest[word_end..].trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        match &rest[word_at..word_end] {
            "generation" if closes => {
                out.push_str("filter ");
                out.push_str(FILTER);
                found = true;
            }
            "endgeneration" if closes => out.push_str("endfilter"),
            other => out.push_str(other),
        }
        rest = &rest[word_end..];
    }
    out.push_str(rest);
    (out, found)
}

/// The length of the sign and white space before the name of a tag.
fn tag_lead(tag: &str) -> usize {
    let signed = tag.strip_prefix(['-', '+']).unwrap_or(tag);
    tag.len() - signed.trim_start().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> Result<String> {
        ChatTemplate::new("test", source)?.render(BTreeMap::new(), 0, Some(['<', '>']))
    }

    #[test]
    fn generation_tags_become_filter_blocks() {
        let (jinja, found) =
            generation_tags("a{%- generation -%}\r\n{{ generation }}{%+\nendgeneration %}{% set generation = 1 %}");
        assert!(found);
        assert_eq!(jinja, "a{%- filter __generation -%}\n{{ generation }}{%+\nendfilter %}{% set generation = 1 %}");
        let loops = "{% for x in 'ab' %}\n  {% generation %}\n{{ x }}!{% endgeneration %}\n\n{% endfor %}";
        assert_eq!(render(loops).unwrap(), "<a!>\n<b!>\n");
    }

    #[test]
    fn errors_say_where_and_what() {
        assert!(matches!(render("a\n{% if %}"), Err(Error::TemplateSyntax { line: 2, .. })));
        assert!(matches!(render("\n\n{{ x.y }}"), Err(Error::TemplateFailed { line: 3, .. })));
        let refusal = "{% macro f() %}{{ raise_exception('no ' ~ 'way') }}{% endmacro %}{{ f() }}";
        let Err(Error::TemplateRefused { message, .. }) = render(refusal) else { panic!() };
        assert_eq!(message, "no way");
        assert_eq!(render("{{ strftime_now('%Y') }}{{ x }}{% for y in x %}{% endfor %}").unwrap(), "1970");
        assert!(render(&"x".repeat(MAX_TEMPLATE_BYTES + 1)).is_err());
    }
}
