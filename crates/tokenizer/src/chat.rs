//! Conversations: their turns, and what they become when a template has rendered and a tokenizer has encoded them.

mod builtin;
mod conversation;
mod cut;
mod encoder;
mod marks;
mod python;
mod spans;
mod strings;
mod template;
mod time;

use std::ops::Range;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use encoder::ChatEncoder;
pub(crate) use template::NamedTemplates;

/// One turn of a conversation, as chat templates see it: a dictionary with its role first, then its content, then the
/// further keys in their order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever else the template knows.
    pub role: String,
    /// Its text; `None` where the turn has none, as one that only calls tools. The template then finds no such key, as
    /// in transformers, which leaves out every key of a message that is null.
    pub content: Option<String>,
    /// Further keys for the template: `name`, `tool_calls`, `reasoning_content`...
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Message {
    /// A turn of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }
}

/// A conversation as token ids, and which of them its turns are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedChat {
    /// All token ids, BOS exactly once where the template or the tokenizer puts one.
    pub ids: Vec<u32>,
    /// For each turn asked for, by its index: the ids that whoever speaks in it must produce, its end-of-turn token
    /// included and the header of the turn not. In order, without overlap.
    pub spans: Vec<(usize, Range<usize>)>,
}

/// How a conversation is rendered and encoded. The default renders the messages alone, as training data has them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ChatOptions {
    /// End with the header of the turn to generate, where the template has one.
    pub add_generation_prompt: bool,
    /// Leave the last turn open, for the model to write on: the text ends with its content. Not together with
    /// `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Tools that the model may call, as JSON schemas. With `Some`, the template named `tool_use` is taken if there is
    /// one.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from, for templates that know them.
    pub documents: Option<Vec<Value>>,
    /// Further variables for the template (`enable_thinking`...); they go before all others of that name.
    pub extra: Map<String, Value>,
    /// What special tokens written in messages, tools, documents and extra variables are.
    pub special_in_content: SpecialInContent,
    /// The time that `strftime_now` tells, always in UTC; `None` is the time of the call. Set it where the same
    /// conversation must give the same ids tomorrow.
    pub now: Option<SystemTime>,
}

/// What a special token is that somebody wrote in the content of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialInContent {
    /// That token, as in transformers: for data that is trusted.
    #[default]
    Parse,
    /// Text. Content from outside can then neither end its turn nor forge another. Only whole tokens are found: a
    /// template that joins two strings of the input without anything between could still make one of their halves.
    Text,
}
