//! Finding added tokens (special and user-defined) in text, as the `tokenizers` crate does: leftmost, then longest.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::error::{Error, Result};
use crate::spec::AddedToken;

/// A stretch of text, or a token found in it.
pub(crate) enum Segment<'t> {
    Text(&'t str),
    Token(u32),
}

/// Finds a set of added tokens.
#[derive(Debug, Clone)]
pub(crate) struct AddedMatcher {
    automaton: Option<AhoCorasick>,
    tokens: Vec<AddedToken>,
    all_special: bool,
}

impl AddedMatcher {
    pub(crate) fn new(tokens: Vec<AddedToken>) -> Result<Self> {
        let tokens: Vec<_> = tokens.into_iter().filter(|t| !t.content.is_empty()).collect();
        let automaton = if tokens.is_empty() {
            None
        } else {
            let contents = tokens.iter().map(|t| t.content.as_bytes());
            let built = AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(contents);
            Some(built.map_err(|e| Error::Encode(format!("added tokens: {e}")))?)
        };
        Ok(Self { automaton, all_special: tokens.iter().all(|t| t.special), tokens })
    }

    /// Calls `each` with the segments of `text` in order; special tokens stay text unless `parse_special`.
    pub(crate) fn segments<'t>(
        &self,
        text: &'t str,
        parse_special: bool,
        each: &mut dyn FnMut(Segment<'t>) -> Result<()>,
    ) -> Result<()> {
        self.ranges(text, parse_special, &mut |range, token| {
            each(token.map_or_else(|| Segment::Text(&text[range]), Segment::Token))
        })
    }

    /// [`segments`](Self::segments) by their places: the range of each and its token, none for text.
    pub(crate) fn ranges(
        &self,
        text: &str,
        parse_special: bool,
        each: &mut dyn FnMut(Range<usize>, Option<u32>) -> Result<()>,
    ) -> Result<()> {
        let automaton = self.automaton.as_ref().filter(|_| parse_special || !self.all_special);
        let Some(automaton) = automaton else {
            return if text.is_empty() { Ok(()) } else { each(0..text.len(), None) };
        };
        let mut done = 0;
        for found in automaton.find_iter(text) {
            let token = &self.tokens[found.pattern().as_usize()];
            if token.special && !parse_special {
                continue;
            }
            let mut start = found.start();
            let mut end = found.end();
            if token.lstrip {
                start = text[..start].trim_end().len().max(done);
            }
            if token.rstrip {
                end += text[end..].len() - text[end..].trim_start().len();
            }
            if done < start {
                each(done..start, None)?;
            }
            each(start..end, Some(token.id))?;
            done = end;
        }
        if done < text.len() { each(done..text.len(), None) } else { Ok(()) }
    }
}
