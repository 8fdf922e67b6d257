//! Which tokens of an example are learnt, and how much each counts.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use tallow_tokenizer::{EncodedChat, Message};

use super::encode::{EncodeChat, checked};
use super::example::{Content, Turn};
use crate::Result;
use crate::shard::Span;

/// Which tokens of a conversation or completion are learnt.
///
/// The weight of a turn (1 where its message has none) is multiplied in. The first token of an example is never learnt:
/// nothing stands before it that could predict it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// What the assistant says, in all of its turns; of a prompt with a completion, the completion.
    #[default]
    Assistant,
    /// The assistant's last turn.
    Last,
    /// Every token, those of the template too.
    All,
}

/// An example as ids, and what of it is learnt.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Masked {
    pub(crate) ids: Vec<u32>,
    /// Runs of learnt tokens, in order, weights above 0.
    pub(crate) spans: Vec<Span>,
    /// Bytes of text of the turns that are learnt.
    pub(crate) text_bytes: u64,
    /// Whether there is something that should not be learnt.
    has_prompt: bool,
}

impl Masked {
    /// Tokens that are targets: learnt, and not the first.
    pub(crate) fn num_targets(&self) -> u64 {
        self.spans.iter().map(Span::num_targets).sum()
    }

    /// Whether every token that could be a target is one, although there is a prompt.
    pub(crate) fn learns_its_prompt(&self, train_on: TrainOn) -> bool {
        train_on != TrainOn::All && self.has_prompt && self.num_targets() + 1 == self.ids.len() as u64
    }

    /// Cuts off what is behind the first `len` tokens.
    pub(crate) fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.spans.retain_mut(|span| {
            span.tokens.end = span.tokens.end.min(len as u32);
            span.tokens.start < span.tokens.end
        });
    }
}

/// Encodes an example and masks it.
pub(crate) fn learnt(content: &Content, encoder: &dyn EncodeChat, train_on: TrainOn) -> Result<Masked> {
    let all = train_on == TrainOn::All;
    match content {
        Content::Chat { turns, tools } => {
            let weights = weights(turns, train_on);
            let wanted: Vec<_> = (0..turns.len()).filter(|&i| weights[i] != f32::from(u8::from(all))).collect();
            let messages: Vec<Message> = turns.iter().map(|t| t.message.clone()).collect();
            let is_wanted = |i: usize| wanted.binary_search(&i).is_ok();
            let chat = encoder.encode_chat(&messages, tools.as_ref(), &is_wanted)?;
            let chat = checked(chat, encoder, &wanted)?;
            let bytes = |i: usize| turns[i].message.content.as_ref().map_or(0, String::len) as u64;
            let text_bytes = (0..turns.len()).filter(|&i| weights[i] > 0.0).map(bytes).sum();
            let has_prompt = weights.contains(&0.0);
            Ok(masked(chat, |turn| weights[turn], all, text_bytes, has_prompt))
        }
        Content::Completion { prompt, completion } => {
            let chat = checked(encoder.encode_completion(prompt, completion)?, encoder, &[1])?;
            let text_bytes = completion.len() + if all { prompt.len() } else { 0 };
            Ok(masked(chat, |_| 1.0, all, text_bytes as u64, !prompt.is_empty()))
        }
        Content::Text(text) => {
            let chat = checked(encoder.encode_completion("", text)?, encoder, &[1])?;
            Ok(masked(chat, |_| 1.0, true, text.len() as u64, false))
        }
    }
}

/// How much each turn counts.
fn weights(turns: &[Turn], train_on: TrainOn) -> Vec<f32> {
    let assistant = |t: &Turn| t.message.role == "assistant";
    let last = turns.iter().rposition(assistant);
    let weight = |(i, turn): (usize, &Turn)| {
        let learnt = match train_on {
            TrainOn::Assistant => assistant(turn) && (!turn.prompt || turn.weight.is_some()),
            TrainOn::Last => Some(i) == last,
            TrainOn::All => true,
        };
        if learnt { turn.weight.unwrap_or(1.0) } else { 0.0 }
    };
    turns.iter().enumerate().map(weight).collect()
}

/// Lays the spans over what is learnt without them: everything, or nothing.
fn masked(chat: EncodedChat, weight: impl Fn(usize) -> f32, all: bool, text_bytes: u64, has_prompt: bool) -> Masked {
    let mut spans: Vec<Span> = vec![];
    let mut push = |tokens: Range<usize>, weight: f32| {
        let tokens = tokens.start as u32..tokens.end as u32;
        if tokens.is_empty() || weight == 0.0 {
            return;
        }
        match spans.last_mut() {
            Some(last) if last.tokens.end == tokens.start && last.weight == weight => last.tokens.end = tokens.end,
            _ => spans.push(Span { tokens, weight }),
        }
    };
    // Nothing predicts the first token.
    let mut at = chat.ids.len().min(1);
    let between = if all { 1.0 } else { 0.0 };
    for (turn, span) in &chat.spans {
        let span = span.start.max(at)..span.end.max(at);
        push(at..span.start, between);
        push(span.clone(), weight(*turn));
        at = span.end;
    }
    push(at..chat.ids.len(), between);
    Masked { ids: chat.ids, spans, text_bytes, has_prompt }
}
