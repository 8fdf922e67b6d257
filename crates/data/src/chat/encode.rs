//! What this crate asks of a template and its tokenizer.

use serde_json::Value;
use tallow_tokenizer::{EncodedChat, Message};

use crate::{Error, Result, Utf8Bytes};

/// Conversations to token ids, as [`prepare_chat`](crate::prepare_chat) needs it.
///
/// Implementations are called from several threads at once, and must give the same ids for the same conversation.
pub trait EncodeChat: Send + Sync {
    /// Ids of the whole conversation and the spans of the turns for which `wanted` (by index) holds, one span for each.
    ///
    /// # Errors
    /// If the template refuses the conversation, or a turn that is wanted cannot be told apart.
    fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<EncodedChat>;

    /// `prompt` and what must follow it, without a template: BOS once if the tokenizer has one by its own rule, EOS behind
    /// the completion. Span 1 is the completion and EOS.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    fn encode_completion(&self, prompt: &str, completion: &str) -> Result<EncodedChat>;

    /// Number of ids; every id is below it.
    fn vocab_size(&self) -> usize;

    /// A hash of everything that decides ids and spans: tokenizer, template, and how spans are found.
    fn fingerprint(&self) -> String;

    /// Fingerprint of the tokenizer alone, which a model must share; the whole one where there is nothing else to it.
    fn tokenizer_fingerprint(&self) -> String {
        self.fingerprint()
    }
}

/// A template without a tokenizer: one id a byte of UTF-8, and three special ones. What tests and examples prepare
/// conversations with.
///
/// A conversation is [`BOS`](Self::BOS), then for each turn [`TURN`](Self::TURN), its role, a line end, its content and
/// [`END`](Self::END); tools are a turn of `tools` before the first, tool calls stand behind the content, both as JSON.
/// A turn's span is its content with what is behind it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Utf8Chat;

impl Utf8Chat {
    /// The id behind every turn and completion.
    pub const END: u32 = Utf8Bytes::EOS;
    /// The id that everything begins with.
    pub const BOS: u32 = 257;
    /// The id before every turn.
    pub const TURN: u32 = 258;

    fn push(ids: &mut Vec<u32>, text: &str) {
        ids.extend(text.bytes().map(u32::from));
    }
}

impl EncodeChat for Utf8Chat {
    fn encode_chat(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<EncodedChat> {
        let mut chat = EncodedChat { ids: vec![Self::BOS], spans: vec![] };
        if let Some(tools) = tools {
            chat.ids.push(Self::TURN);
            Self::push(&mut chat.ids, &format!("tools\n{tools}"));
            chat.ids.push(Self::END);
        }
        for (i, message) in messages.iter().enumerate() {
            chat.ids.push(Self::TURN);
            Self::push(&mut chat.ids, &format!("{}\n", message.role));
            let begin = chat.ids.len();
            Self::push(&mut chat.ids, message.content.as_deref().unwrap_or_default());
            if let Some(calls) = message.extra.get("tool_calls") {
                Self::push(&mut chat.ids, &calls.to_string());
            }
            chat.ids.push(Self::END);
            if wanted(i) {
                chat.spans.push((i, begin..chat.ids.len()));
            }
        }
        Ok(chat)
    }

    fn encode_completion(&self, prompt: &str, completion: &str) -> Result<EncodedChat> {
        let mut ids = vec![Self::BOS];
        Self::push(&mut ids, prompt);
        let begin = ids.len();
        Self::push(&mut ids, completion);
        ids.push(Self::END);
        let end = ids.len();
        Ok(EncodedChat { ids, spans: vec![(1, begin..end)] })
    }

    fn vocab_size(&self) -> usize {
        259
    }

    fn fingerprint(&self) -> String {
        "utf8-chat-v1".to_owned()
    }
}

/// Checks against what [`EncodeChat`] promises: ids in the vocabulary, and one span for each of `wanted`, in order.
pub(super) fn checked(chat: EncodedChat, encoder: &dyn EncodeChat, wanted: &[usize]) -> Result<EncodedChat> {
    let broken = |what| Err(Error::EncoderContract { what });
    let vocab = encoder.vocab_size();
    if let Some(id) = chat.ids.iter().find(|&&id| id as usize >= vocab) {
        return broken(format!("id {id} with a vocabulary of {vocab}"));
    }
    if chat.ids.len() > u32::MAX as usize {
        return broken(format!("{} ids for one example", chat.ids.len()));
    }
    let turns: Vec<_> = chat.spans.iter().map(|s| s.0).collect();
    if turns != wanted {
        return broken(format!("spans of the turns {turns:?} where {wanted:?} were asked for"));
    }
    let mut before = 0;
    for (turn, span) in &chat.spans {
        if span.start < before || span.end < span.start || span.end > chat.ids.len() {
            return broken(format!("the span {span:?} for turn {turn}, behind {before}, of {} ids", chat.ids.len()));
        }
        before = span.end;
    }
    Ok(chat)
}
