//! What an example is, whatever the shape of its record.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tallow_tokenizer::Message;

use crate::hash::content_hash;

/// The shape of a record: which fields hold what.
///
/// A field that is `null` is as if it were not there. Where a record has the fields of several shapes it is an error,
/// unless the other one is [`Text`](Self::Text) (published sets carry the rendered text beside the fields).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// `messages`: a list of `{role, content}`, with `tools` beside it if there are any.
    Messages,
    /// `conversations`: a list of `{from, value}`, where `from` is `human` or `user`, `gpt`, `assistant` or `model`,
    /// `system`, and `tool`, `observation` or `function_response`.
    Conversations,
    /// `prompt` and `completion`: two texts, or two lists of messages. Only the completion is learnt.
    Completion,
    /// `instruction`, `output` and perhaps `input`. See [`AlpacaAs`].
    Alpaca,
    /// `text`, of which every token is learnt: continued pretraining.
    Text,
}

impl Shape {
    pub(crate) const ALL: [Self; 5] = [Self::Messages, Self::Conversations, Self::Completion, Self::Alpaca, Self::Text];

    /// The fields without which a record is not of this shape.
    pub(crate) fn fields(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Conversations => &["conversations"],
            Self::Completion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "output"],
            Self::Text => &["text"],
        }
    }

    /// How options spell it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::Completion => "completion",
            Self::Alpaca => "alpaca",
            Self::Text => "text",
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`", self.fields().join("` + `"))
    }
}

/// What records of [`Shape::Alpaca`] become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlpacaAs {
    /// A turn of the user (the input behind the instruction, one blank line between them) and one of the assistant.
    #[default]
    Messages,
    /// The text that the Alpaca set was published with, and the output as its completion: for models without a template.
    Prompt,
}

/// One turn of a conversation, and how much it counts.
#[derive(Clone, Debug, PartialEq)]
pub struct Turn {
    /// Who says what.
    pub message: Message,
    /// The `weight` (or `train`) that the record gives it; `None` if it says nothing.
    pub weight: Option<f32>,
    /// Whether it is of a prompt: then it is not learnt unless it has a weight.
    pub prompt: bool,
}

/// What an example holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A conversation; at least one of its turns is the assistant's.
    Chat {
        /// Its turns.
        turns: Vec<Turn>,
        /// The tools that the template is told of.
        tools: Option<Value>,
    },
    /// Text that is continued, without a template.
    Completion {
        /// What is given.
        prompt: String,
        /// What is learnt.
        completion: String,
    },
    /// Text that is learnt, all of it.
    Text(String),
}

impl Content {
    /// The parts of text, in order.
    fn texts(&self) -> Vec<&str> {
        match self {
            Self::Chat { turns, .. } => turns.iter().filter_map(|t| t.message.content.as_deref()).collect(),
            Self::Completion { prompt, completion } => vec![prompt, completion],
            Self::Text(text) => vec![text],
        }
    }

    /// The same for the same content, wherever and in whatever shape it stands.
    pub(crate) fn hash(&self) -> u64 {
        let text = match self {
            Self::Chat { turns, tools } => {
                let messages: Vec<_> = turns.iter().map(|t| &t.message).collect();
                serde_json::json!([messages, tools]).to_string()
            }
            Self::Completion { prompt, completion } => serde_json::json!([prompt, completion]).to_string(),
            Self::Text(text) => text.clone(),
        };
        content_hash(&text)
    }
}

impl crate::read::Item for Content {
    fn text_bytes(&self) -> usize {
        self.texts().iter().map(|t| t.len()).sum()
    }
}

/// One example and where it is from.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// What it holds.
    pub content: Content,
    /// The file that it is from.
    pub path: Arc<PathBuf>,
    /// 1-based line, or row of a table.
    pub line: u64,
}
