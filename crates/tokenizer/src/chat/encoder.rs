//! From conversations to text and ids: one renderer for training and for generation.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::conversation::{Conversation, Marked};
use super::cut::Cutter;
use super::template::{ChatTemplate, NamedTemplates};
use super::{ChatOptions, EncodedChat, Message, SpecialInContent, builtin, spans};
use crate::error::{Error, Result};
use crate::tokenizer::{EncodeOptions, Tokenizer};

/// A tokenizer with a compiled chat template. Cheap to clone and safe to share between threads.
///
/// Text is what transformers' `apply_chat_template` makes of the same messages, and ids are those of that text with
/// special tokens recognised and nothing added: a template that wants BOS writes it, and where it writes none there is
/// none, even if the tokenizer would put one before ordinary text.
///
/// Templates come from outside. One that loops forever, recurses without end or takes part in no known version of Jinja
/// is an error; what is not bounded is the memory that one claims on purpose, by doubling a string again and again.
#[derive(Clone)]
pub struct ChatEncoder {
    tokenizer: Tokenizer,
    main: ChatTemplate,
    tool_use: Option<ChatTemplate>,
    /// `bos_token`, `eos_token`... as templates know them.
    tokens: Arc<BTreeMap<String, String>>,
    cutter: Arc<Cutter>,
}

impl Tokenizer {
    /// The encoder for conversations, with the tokenizer's own chat template, and its template `tool_use` for
    /// conversations with tools if it has one.
    ///
    /// Fails where the tokenizer has no template, and where the template is not Jinja.
    pub fn chat_encoder(&self) -> Result<ChatEncoder> {
        let own = self.chat_templates();
        let source = own.main().ok_or_else(|| Error::NoChatTemplate { known: builtin::names() })?;
        let tool_use = own.get(NamedTemplates::TOOL_USE).filter(|tool_use| *tool_use != source);
        let tool_use = tool_use.map(|source| ChatTemplate::new(NamedTemplates::TOOL_USE, source)).transpose()?;
        ChatEncoder::new(self, ChatTemplate::new(NamedTemplates::DEFAULT, source)?, tool_use)
    }

    /// The encoder with another template: a Jinja text (anything that holds `{{` or `{%`), the name of one of the
    /// tokenizer's own, or the name of a built-in one: `alpaca`, `chatml`, `gemma`, `llama3`, `mistral`, `zephyr`.
    ///
    /// A built-in template fails on a tokenizer without the tokens that it writes, naming the token.
    pub fn chat_encoder_with(&self, template: &str) -> Result<ChatEncoder> {
        let found = if template.contains("{{") || template.contains("{%") {
            Some(ChatTemplate::new("given", template)?)
        } else if let Some(source) = self.chat_templates().get(template) {
            Some(ChatTemplate::new(template, source)?)
        } else {
            builtin::find(template, self)?
        };
        let unknown = || {
            let own: String = self.chat_templates().iter().map(|(name, _)| format!("{name}, ")).collect();
            Error::UnknownChatTemplate { name: template.to_string(), known: own + &builtin::names() }
        };
        ChatEncoder::new(self, found.ok_or_else(unknown)?, None)
    }
}

impl ChatEncoder {
    fn new(tokenizer: &Tokenizer, main: ChatTemplate, tool_use: Option<ChatTemplate>) -> Result<Self> {
        let roles = [
            ("bos_token", tokenizer.bos_id()),
            ("eos_token", tokenizer.eos_id()),
            ("unk_token", tokenizer.unk_id()),
            ("pad_token", tokenizer.pad_id()),
        ];
        let named = |(name, id): (&str, Option<u32>)| Some((name.to_string(), tokenizer.id_to_token(id?)?.to_string()));
        Ok(Self {
            tokens: Arc::new(roles.into_iter().filter_map(named).collect()),
            cutter: Arc::new(Cutter::new(tokenizer)?),
            tokenizer: tokenizer.clone(),
            main,
            tool_use,
        })
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The Jinja text of the template for conversations without tools: what
    /// [`with_chat_template`](Tokenizer::with_chat_template) takes to save it with a model.
    pub fn template(&self) -> &str {
        self.main.source()
    }

    fn conversation<'a>(&'a self, messages: Cow<'a, [Message]>, options: &ChatOptions) -> Result<Conversation<'a>> {
        let template = self.tool_use.as_ref().filter(|_| options.tools.is_some()).unwrap_or(&self.main);
        Conversation::new(template, &self.tokens, messages, options)
    }

    /// The text of a conversation.
    ///
    /// Fails where the template refuses the conversation ([`Error::TemplateRefused`] with the template's own words), and
    /// on an empty conversation.
    pub fn render(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        self.conversation(Cow::Borrowed(messages), options)?.whole()
    }

    /// The ids of a conversation: a prompt, with `add_generation_prompt`.
    pub fn encode(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        match options.special_in_content {
            SpecialInContent::Parse => {
                let text = self.render(messages, options)?;
                self.tokenizer.encode_with(&text, EncodeOptions { parse_special: true, ..Default::default() })
            }
            SpecialInContent::Text => {
                let (text, as_text) = self.render_marked(messages, options)?;
                Ok(self.cutter.parts(&text, &[], Some(&as_text))?.concat())
            }
        }
    }

    /// The text of a conversation, and the ranges in it where the messages hold what looks like a special token.
    fn render_marked(&self, messages: &[Message], options: &ChatOptions) -> Result<(String, Vec<Range<usize>>)> {
        let marked = Marked::new(messages, options, &|text| self.cutter.written(text))?;
        let rendered = self.conversation(Cow::Borrowed(&marked.messages), &marked.options)?.whole()?;
        Ok(marked.unmark(&rendered))
    }

    /// The ids of a conversation, and for each turn that is `wanted` (by its index) the ids that its speaker must
    /// produce: what it says and the token that ends the turn, neither its header nor a newline behind the end. Where
    /// the template has `{% generation %}` blocks, the spans are what these hold, a turn with several blocks having
    /// several spans.
    ///
    /// Ids are those of [`encode`](Self::encode), except where a token would lie across the border of a span: its two
    /// sides are then encoded by themselves, because at generation the prompt is.
    ///
    /// Fails on a turn with nothing to learn ([`Error::EmptyTurn`]), and on one whose text cannot be told from the rest
    /// ([`Error::NoSpan`]).
    pub fn encode_spans(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        wanted: &dyn Fn(usize) -> bool,
    ) -> Result<EncodedChat> {
        // All renderings of one conversation tell the same time.
        let options = ChatOptions { now: Some(options.now.unwrap_or_else(SystemTime::now)), ..options.clone() };
        let conversation = self.conversation(Cow::Borrowed(messages), &options)?;
        let (text, spans) = spans::find(&conversation, &self.cutter, wanted)?;
        let as_text = match options.special_in_content {
            SpecialInContent::Parse => None,
            SpecialInContent::Text => {
                let (marked, as_text) = self.render_marked(messages, &options)?;
                if marked != text {
                    let reason =
                        "the template changes special tokens that messages hold; take them out of the messages";
                    return Err(Error::ChatOption { option: "special_in_content", reason: reason.to_string() });
                }
                Some(as_text)
            }
        };
        let borders: Vec<usize> = spans.iter().flat_map(|(_, span)| [span.start, span.end]).collect();
        let parts = self.cutter.parts(&text, &borders, as_text.as_deref())?;
        let mut chat = EncodedChat::default();
        for (place, part) in parts.into_iter().enumerate() {
            let start = chat.ids.len();
            chat.ids.extend(part);
            if place % 2 == 1 {
                let index = spans[place / 2].0;
                if chat.ids.len() == start {
                    return Err(Error::EmptyTurn { index, role: messages[index].role.clone() });
                }
                chat.spans.push((index, start..chat.ids.len()));
            }
        }
        Ok(chat)
    }

    /// SHA-256 (hex) over everything that changes ids: the tokenizer, its templates, and the tokens that they know. The
    /// key for adapters and prepared data.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        let mut add = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        add("tallow chat 1");
        add(&self.tokenizer.fingerprint());
        add(self.main.source());
        add(self.tool_use.as_ref().map_or("", ChatTemplate::source));
        self.tokens.iter().for_each(|(name, token)| {
            add(name);
            add(token);
        });
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl std::fmt::Debug for ChatEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ChatEncoder({:?}, template {:?})", self.tokenizer, self.main.name())
    }
}
