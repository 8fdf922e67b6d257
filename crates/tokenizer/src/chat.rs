//! Conversations: their turns, and what they become when a template has rendered and a tokenizer has encoded them.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation, as chat templates see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever else the template knows.
    pub role: String,
    /// Its text; `None` where the turn has none (`null` for the template), as one that only calls tools.
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
