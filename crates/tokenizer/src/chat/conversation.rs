//! A conversation as a template sees it, rendered whole, in part, or with marks in it.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::SystemTime;

use minijinja::Value;
use serde_json::Value as Json;

use super::template::ChatTemplate;
use super::{ChatOptions, Message, marks, python, time};
use crate::error::{Error, Result};

/// The names that reasoning goes by; templates read the first, some the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// One conversation, one template, one moment.
pub(crate) struct Conversation<'a> {
    pub template: &'a ChatTemplate,
    pub messages: Cow<'a, [Message]>,
    values: Vec<Value>,
    variables: BTreeMap<String, Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    now: i64,
}

impl<'a> Conversation<'a> {
    pub(crate) fn new(
        template: &'a ChatTemplate,
        tokens: &BTreeMap<String, String>,
        messages: Cow<'a, [Message]>,
        options: &ChatOptions,
    ) -> Result<Self> {
        if messages.is_empty() {
            return Err(Error::EmptyConversation);
        }
        if options.add_generation_prompt && options.continue_final_message {
            let reason = "it leaves the last turn open, add_generation_prompt begins a new one; set one of them";
            return Err(Error::ChatOption { option: "continue_final_message", reason: reason.to_string() });
        }
        let list = |items: &Option<Vec<Json>>| match items {
            Some(items) => Value::from(items.iter().map(python::value).collect::<Vec<_>>()),
            None => Value::from(()),
        };
        let mut variables: BTreeMap<String, Value> =
            tokens.iter().map(|(name, token)| (name.clone(), Value::from(token.as_str()))).collect();
        variables.insert("tools".to_string(), list(&options.tools));
        variables.insert("documents".to_string(), list(&options.documents));
        variables.extend(options.extra.iter().map(|(name, json)| (name.clone(), python::value(json))));
        Ok(Self {
            template,
            values: messages.iter().map(message_value).collect(),
            messages,
            variables,
            add_generation_prompt: options.add_generation_prompt,
            continue_final_message: options.continue_final_message,
            now: time::seconds(options.now.unwrap_or_else(SystemTime::now)),
        })
    }

    fn render_values(&self, values: Vec<Value>, prompt: bool, generation: Option<[char; 2]>) -> Result<String> {
        let mut variables = self.variables.clone();
        variables.insert("messages".to_string(), Value::from(values));
        variables.insert("add_generation_prompt".to_string(), Value::from(prompt));
        self.template.render(variables, self.now, generation)
    }

    /// The text of the whole conversation.
    pub(crate) fn whole(&self) -> Result<String> {
        self.whole_of(self.values.clone(), None)
    }

    /// The same with what each generation block writes between these marks.
    pub(crate) fn generation_marked(&self, generation: [char; 2]) -> Result<String> {
        self.whole_of(self.values.clone(), Some(generation))
    }

    /// The same with `mark` in the content of message `index`, before its byte `at`.
    pub(crate) fn content_marked(
        &self,
        index: usize,
        at: usize,
        mark: char,
        generation: Option<[char; 2]>,
    ) -> Result<String> {
        let mut message = self.messages[index].clone();
        if let Some(content) = &mut message.content {
            content.insert(at, mark);
        }
        let mut values = self.values.clone();
        values[index] = message_value(&message);
        self.whole_of(values, generation)
    }

    /// The text of the first `count` messages alone, with or without a header for the next turn.
    pub(crate) fn prefix(&self, count: usize, prompt: bool) -> Result<String> {
        self.render_values(self.values[..count].to_vec(), prompt, None)
    }

    fn whole_of(&self, mut values: Vec<Value>, generation: Option<[char; 2]>) -> Result<String> {
        if !self.continue_final_message {
            return self.render_values(values, self.add_generation_prompt, generation);
        }
        let fail = |reason: &str| Error::ChatOption {
            option: "continue_final_message",
            reason: format!("{reason} (template {:?})", self.template.name()),
        };
        let last = values.last().and_then(|m| m.get_attr("content").ok());
        let content = last.as_ref().and_then(|content| content.as_str());
        let content = content.ok_or_else(|| fail("the last message has no content to go on with"))?;
        let [mark] =
            marks::unused([content].into_iter().chain(self.messages.iter().filter_map(|m| m.content.as_deref())))
                .ok_or_else(|| fail("the messages hold too many noncharacters"))?;
        let mut message = self.messages[self.messages.len() - 1].clone();
        // The space behind the mark tells whether the template trims.
        message.content = Some(format!("{content}{mark} "));
        let end = values.len() - 1;
        values[end] = message_value(&message);
        let text = self.render_values(values, false, generation)?;
        let at = text.rfind(mark).ok_or_else(|| fail("the template leaves out the end of the last message"))?;
        let (text, rest) = text.split_at(at);
        let kept = rest[mark.len_utf8()..].starts_with(' ');
        Ok(if kept { text } else { text.trim_end() }.to_string())
    }
}

/// A message without its null keys, its reasoning under the names that templates look for: what transformers passes.
fn message_value(message: &Message) -> Value {
    let reasoning = REASONING.iter().find_map(|name| message.extra.get(*name).filter(|json| !json.is_null()));
    let mut items = Vec::with_capacity(message.extra.len() + 4);
    if let Some(reasoning) = reasoning.filter(|_| message.extra.get("thinking").is_none_or(Json::is_null)) {
        items.push(("thinking", python::value(reasoning)));
    }
    items.push(("role", Value::from(message.role.as_str())));
    items.extend(message.content.as_deref().map(|content| ("content", Value::from(content))));
    for (name, json) in message.extra.iter().filter(|(_, json)| !json.is_null()) {
        let json = reasoning.filter(|_| name == REASONING[0]).unwrap_or(json);
        items.push((name.as_str(), python::value(json)));
    }
    if let Some(reasoning) = reasoning.filter(|_| message.extra.get(REASONING[0]).is_none_or(Json::is_null)) {
        items.push((REASONING[0], python::value(reasoning)));
    }
    python::dict(items.into_iter())
}

/// Copies of a conversation's input in which every special token that somebody wrote stands between two marks.
pub(crate) struct Marked {
    pub messages: Vec<Message>,
    pub options: ChatOptions,
    marks: [char; 2],
}

impl Marked {
    /// `written` finds special tokens in a text.
    pub(crate) fn new(
        messages: &[Message],
        options: &ChatOptions,
        written: &dyn Fn(&str) -> Result<Vec<Range<usize>>>,
    ) -> Result<Self> {
        let mut messages = messages.to_vec();
        let mut options = options.clone();
        let mut all = String::new();
        each_text(&mut messages, &mut options, &mut |text| {
            all.push_str(text);
            Ok(())
        })?;
        let Some(marks) = marks::unused([all.as_str()].into_iter()) else {
            let reason = "the messages hold too many noncharacters to keep track of their special tokens".to_string();
            return Err(Error::ChatOption { option: "special_in_content", reason });
        };
        each_text(&mut messages, &mut options, &mut |text| {
            for found in written(text)?.into_iter().rev() {
                text.insert(found.end, marks[1]);
                text.insert(found.start, marks[0]);
            }
            Ok(())
        })?;
        Ok(Self { messages, options, marks })
    }

    /// A rendering of these copies without its marks, and the ranges in it that are text whatever they look like. Where
    /// the template has parted a token, an empty range keeps its halves from joining others.
    pub(crate) fn unmark(&self, rendered: &str) -> (String, Vec<Range<usize>>) {
        let (text, places) = marks::take(rendered, &self.marks);
        let mut ranges = Vec::new();
        let mut places = places.into_iter().peekable();
        while let Some((mark, start)) = places.next() {
            let end = places.next_if(|(next, _)| mark == self.marks[0] && *next == self.marks[1]);
            ranges.push(start..end.map_or(start, |(_, end)| end));
        }
        (text, ranges)
    }
}

/// Calls `each` with every string that the caller of a template wrote, keys left out.
fn each_text(
    messages: &mut [Message],
    options: &mut ChatOptions,
    each: &mut dyn FnMut(&mut String) -> Result<()>,
) -> Result<()> {
    for message in messages {
        each(&mut message.role)?;
        message.content.as_mut().map_or(Ok(()), &mut *each)?;
        message.extra.values_mut().try_for_each(|json| each_in_json(json, each))?;
    }
    let lists = [&mut options.tools, &mut options.documents];
    lists.into_iter().flatten().flatten().try_for_each(|json| each_in_json(json, each))?;
    options.extra.values_mut().try_for_each(|json| each_in_json(json, each))
}

fn each_in_json(json: &mut Json, each: &mut dyn FnMut(&mut String) -> Result<()>) -> Result<()> {
    match json {
        Json::String(text) => each(text),
        Json::Array(items) => items.iter_mut().try_for_each(|item| each_in_json(item, each)),
        Json::Object(map) => map.values_mut().try_for_each(|value| each_in_json(value, each)),
        _ => Ok(()),
    }
}
