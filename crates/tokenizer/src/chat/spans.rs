//! Which part of a rendered conversation a turn's speaker must produce, found from the messages, never from token ids.
//!
//! Three ways, the first that works for a message: `{% generation %}` blocks, which are taken as they are; the text of
//! the messages before it, with a header for the next turn, against the text with it; a mark in its content. Each is
//! checked against the text of the whole conversation: without the marks it must be the same, character by character.

use std::ops::Range;

use super::conversation::Conversation;
use super::cut::Cutter;
use super::marks;
use crate::error::{Error, Result};

/// A turn by its index, and where it stands.
type Span = (usize, Range<usize>);

/// The text of a conversation and the spans in it of the messages that are `wanted`, by index, in order.
pub(crate) fn find(
    conversation: &Conversation<'_>,
    cutter: &Cutter,
    wanted: &dyn Fn(usize) -> bool,
) -> Result<(String, Vec<Span>)> {
    let text = conversation.whole()?;
    let mut finder = Finder { conversation, specials: cutter.written(&text)?, blocks: Vec::new(), text };
    if conversation.template.marks_generation() {
        finder.blocks = finder.generation_blocks();
    }
    let mut spans: Vec<(usize, Range<usize>)> = Vec::new();
    for index in (0..conversation.messages.len()).filter(|&index| wanted(index)) {
        for span in finder.spans_of(index)? {
            if spans.last().is_some_and(|(_, last)| last.end > span.start) {
                return Err(finder.fail(index, "its text overlaps that of the turn before"));
            }
            spans.push((index, span));
        }
    }
    Ok((finder.text, spans))
}

struct Finder<'c, 'a> {
    conversation: &'c Conversation<'a>,
    text: String,
    /// Where special tokens are written in the text.
    specials: Vec<Range<usize>>,
    /// What `{% generation %}` blocks wrote.
    blocks: Vec<Range<usize>>,
}

impl Finder<'_, '_> {
    fn fail(&self, index: usize, reason: &str) -> Error {
        Error::NoSpan {
            index,
            role: self.conversation.messages[index].role.clone(),
            template: self.conversation.template.name().to_string(),
            reason: reason.to_string(),
        }
    }

    fn content(&self, index: usize) -> &str {
        self.conversation.messages[index].content.as_deref().unwrap_or_default()
    }

    fn spans_of(&self, index: usize) -> Result<Vec<Range<usize>>> {
        let message = &self.conversation.messages[index];
        let empty = || Error::EmptyTurn { index, role: message.role.clone() };
        let says_more = message.extra.iter().any(|(name, json)| {
            let nothing = json.is_null() || json == "" || json.as_array().is_some_and(Vec::is_empty);
            name != "name" && !nothing
        });
        if self.content(index).trim().is_empty() && !says_more {
            return Err(empty());
        }
        let mut spans = self.by_blocks(index);
        if spans.is_empty() {
            spans.extend(self.by_prefix(index));
        }
        if spans.is_empty() {
            spans.extend(self.by_mark(index));
        }
        if spans.is_empty() {
            let reason = "the template neither marks it with a generation block, nor lets its text be found: it leaves \
                          the content out, or changes it";
            return Err(self.fail(index, reason));
        }
        if !says_more && self.leaves_out(index, &spans) {
            return Err(
                self.fail(index, "the template leaves its content out: nothing but what is around it would be learnt")
            );
        }
        let said = spans.iter().any(|span| {
            let special = self.specials.iter().find(|s| s.start >= span.start && s.end == span.end);
            !self.text[span.start..special.map_or(span.end, |s| s.start)].trim().is_empty()
        });
        if said { Ok(spans) } else { Err(empty()) }
    }

    /// Whether the text would be the same whatever the message said.
    fn leaves_out(&self, index: usize, spans: &[Range<usize>]) -> bool {
        let content = self.content(index);
        let (lead, trimmed) = (content.len() - content.trim_start().len(), content.trim());
        if spans.iter().any(|span| self.text[span.clone()].contains(trimmed)) {
            return false;
        }
        let Some([mark]) = marks::unused([self.text.as_str()].into_iter()) else { return false };
        let same = |at: usize| {
            let marked = self.conversation.content_marked(index, at, mark, None);
            marked.is_ok_and(|marked| marked == self.text)
        };
        same(lead) && same(lead + trimmed.len())
    }

    fn generation_blocks(&self) -> Vec<Range<usize>> {
        let Some(pair) = marks::unused::<2>([self.text.as_str()].into_iter()) else { return Vec::new() };
        let Ok(marked) = self.conversation.generation_marked(pair) else { return Vec::new() };
        let (plain, places) = marks::take(&marked, &pair);
        let paired = places.chunks(2).all(|p| matches!(p, [(open, _), (close, _)] if [*open, *close] == pair));
        if plain != self.text || !paired {
            return Vec::new();
        }
        places.chunks(2).map(|pair| pair[0].1..pair[1].1).filter(|block| !block.is_empty()).collect()
    }

    /// The generation blocks of a message. As many blocks as turns of the assistant are theirs in order, as long as each
    /// holds what its message says; otherwise a mark in the content tells which block is meant.
    fn by_blocks(&self, index: usize) -> Vec<Range<usize>> {
        if self.blocks.is_empty() {
            return Vec::new();
        }
        let messages = &self.conversation.messages;
        let assistants: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].role == "assistant").collect();
        let fits = |(&i, block): (&usize, &Range<usize>)| {
            let content = self.content(i).trim();
            !self.text.contains(content) || self.text[block.clone()].contains(content)
        };
        if assistants.len() == self.blocks.len() && assistants.iter().zip(&self.blocks).all(fits) {
            let place = assistants.iter().position(|&i| i == index);
            return place.map(|place| self.blocks[place].clone()).into_iter().collect();
        }
        let block = self.place_of(index, self.content(index).trim_end().len());
        let block = block.and_then(|at| self.blocks.iter().find(|b| b.start <= at && at <= b.end));
        block.cloned().into_iter().collect()
    }

    /// The header that comes before what message `index` says, if the messages before it are rendered alone as they are
    /// in the whole.
    fn header(&self, index: usize) -> Option<usize> {
        if index == 0 {
            return None;
        }
        let header = self.conversation.prefix(index, true).ok()?;
        // Without a header of its own, a turn is told from its neighbours by its role alone.
        let bare = || self.conversation.prefix(index, false).is_ok_and(|bare| bare == header);
        let role = self.conversation.messages[index].role.as_str();
        let ours = self.text.starts_with(&header) && (matches!(role, "assistant" | "model") || !bare());
        ours.then_some(header.len())
    }

    fn by_prefix(&self, index: usize) -> Option<Range<usize>> {
        let start = self.header(index)?;
        let turn = self.conversation.prefix(index + 1, false).ok()?;
        if turn.len() <= start || !self.text.starts_with(&turn) {
            return None;
        }
        // The first token behind the content: a template may write more at the end of all, as EOS.
        let content = self.content(index).trim();
        let behind = |from: usize| {
            let next = self.specials.iter().find(|s| s.start >= from && s.end <= turn.len())?;
            self.text[from..next.start].trim().is_empty().then_some(next.end)
        };
        let places = self.text[start..turn.len()].rmatch_indices(content).filter(|_| !content.is_empty());
        if let Some(end) = places.map(|(at, _)| start + at + content.len()).find_map(behind) {
            return Some(start..end);
        }
        let visible = start + self.text[start..turn.len()].trim_end().len();
        // The last token of the turn, if nothing but white space follows, ends it.
        let last = self.specials.iter().rfind(|s| start <= s.start && s.end <= turn.len());
        if let Some(last) = last.filter(|last| last.end >= visible) {
            return Some(start..last.end);
        }
        let content = self.content(index);
        let said = self.text[start..turn.len()].find(content).map_or(0, |at| start + at + content.len());
        Some(start..visible.max(said))
    }

    /// Where byte `at` of a message's content comes to be in the text.
    fn place_of(&self, index: usize, at: usize) -> Option<usize> {
        let [mark] = marks::unused([self.text.as_str()].into_iter())?;
        self.conversation.messages[index].content.as_ref()?;
        let marked = self.conversation.content_marked(index, at, mark, None).ok()?;
        let (plain, places) = marks::take(&marked, &[mark]);
        match places.as_slice() {
            [(_, place)] if plain == self.text => Some(*place),
            _ => None,
        }
    }

    fn by_mark(&self, index: usize) -> Option<Range<usize>> {
        let content = self.content(index);
        let trimmed = content.trim();
        if trimmed.is_empty() {
            return None;
        }
        // A template that trims leaves no mark alone outside the visible text.
        let lead = content.len() - content.trim_start().len();
        let start = self.place_of(index, 0).or_else(|| self.place_of(index, lead));
        let end = self.place_of(index, content.len()).or_else(|| self.place_of(index, lead + trimmed.len()))?;
        let header = self.header(index).filter(|&header| header <= start.unwrap_or(end));
        let start = header.or(start).filter(|&start| start < end)?;
        Some(start..self.end_of_turn(index, end))
    }

    /// The end of the first special token behind the content: only white space may come between, or, in a turn that
    /// calls tools, anything but the next turn.
    fn end_of_turn(&self, index: usize, end: usize) -> usize {
        let Some(special) = self.specials.iter().find(|s| s.start >= end) else { return end };
        let between = &self.text[end..special.start];
        let calls = self.conversation.messages[index].extra.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let next = self.conversation.messages.get(index + 1).and_then(|m| m.content.as_deref()).unwrap_or_default();
        let within = calls && (next.trim().is_empty() || !between.contains(next.trim()));
        if between.trim().is_empty() || within { special.end } else { end }
    }
}
