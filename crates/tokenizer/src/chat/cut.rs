//! Encoding a rendered conversation so that its turns can be told apart in the ids.
//!
//! A loss span must begin with the first token that the model is to write. At generation the prompt is encoded on its
//! own, so it ends where a token ends. Where the tokenizer, given the whole text, would make one token of the end of a
//! prompt and the beginning of the answer (`\n` and a newline that the answer starts with), such a token is one that
//! never occurs at generation: the two parts are encoded one by one instead. Everywhere else the ids are those of the
//! whole text.

use std::ops::Range;

use crate::added::AddedMatcher;
use crate::error::{Error, Result};
use crate::spec::AddedToken;
use crate::tokenizer::Tokenizer;

/// Finds the special tokens of a tokenizer in text, and encodes text in parts.
pub(crate) struct Cutter {
    tokenizer: Tokenizer,
    /// What the tokenizer finds in text before anything else.
    raw: AddedMatcher,
    /// That and all special tokens.
    special: AddedMatcher,
    /// Special tokens as they are written, without the spaces that some take in.
    written: AddedMatcher,
}

/// A token found in the text as it is written, or text between such tokens.
struct Unit {
    range: Range<usize>,
    token: Option<u32>,
}

/// What stands before a text, which for some tokenizers changes how it is encoded.
#[derive(Clone, Copy)]
enum Before {
    /// Nothing, or nothing that matters.
    Nothing,
    /// A special token.
    Token(u32),
    /// Text that was encoded by itself.
    Text,
}

impl Cutter {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let added = tokenizer.added_tokens()?;
        let raw = |t: &&AddedToken| !t.normalized && !t.single_word;
        let written = added.iter().filter(|t| t.special).cloned().map(|mut token| {
            (token.lstrip, token.rstrip) = (false, false);
            token
        });
        Ok(Self {
            raw: AddedMatcher::new(added.iter().filter(raw).cloned().collect())?,
            special: AddedMatcher::new(added.iter().filter(|t| t.special || raw(t)).cloned().collect())?,
            written: AddedMatcher::new(written.collect())?,
            tokenizer: tokenizer.clone(),
        })
    }

    /// Where special tokens are written in `text`.
    pub(crate) fn written(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let mut found = Vec::new();
        self.written.ranges(text, true, &mut |range, token| {
            found.extend(token.map(|_| range));
            Ok(())
        })?;
        Ok(found)
    }

    /// The ids of `text`, cut at `borders` (ascending): one part more than borders, no token on both sides of one.
    ///
    /// With `as_text`, special tokens in those ranges (ascending) are text; an empty range only keeps what stands before
    /// and behind it from forming a token.
    pub(crate) fn parts(
        &self,
        text: &str,
        borders: &[usize],
        as_text: Option<&[Range<usize>]>,
    ) -> Result<Vec<Vec<u32>>> {
        let units = self.encoded_units(text, as_text)?;
        let mut parts = vec![Vec::new(); borders.len() + 1];
        let mut part = 0;
        let mut before = Before::Nothing;
        for (unit, ids) in units {
            while part < borders.len() && borders[part] <= unit.range.start {
                part += 1;
            }
            // A border within a token (spaces that it takes in) moves behind it.
            let inside = borders[part..].iter().take_while(|&&b| b < unit.range.end).count();
            if unit.token.is_some() || inside == 0 {
                parts[part].extend(ids);
            } else {
                let borders = &borders[part..part + inside];
                self.cut(text, unit.range, borders, before, as_text.is_none(), ids, &mut parts[part..])?;
                part += inside;
            }
            before = unit.token.map_or(Before::Text, Before::Token);
        }
        Ok(parts)
    }

    /// Spreads `ids`, those of `text[range]`, over one part more than `borders`, all of which are inside.
    #[expect(clippy::too_many_arguments, reason = "one caller, and every one is needed")]
    fn cut(
        &self,
        text: &str,
        range: Range<usize>,
        borders: &[usize],
        before: Before,
        parse: bool,
        mut ids: Vec<u32>,
        parts: &mut [Vec<u32>],
    ) -> Result<()> {
        // `ids` are those of the text from `anchor` on; `done` of them are given out, up to `at`.
        let (mut anchor, mut before, mut done, mut at) = (range.start, before, 0, range.start);
        for (part, &border) in borders.iter().enumerate() {
            if border == at {
                continue;
            }
            let left = self.encode(&text[anchor..border], before, parse)?;
            if ids.starts_with(&left) && done < left.len() && left.len() < ids.len() {
                parts[part].extend_from_slice(&ids[done..left.len()]);
                done = left.len();
            } else {
                match left.strip_prefix(&ids[..done]).filter(|rest| !rest.is_empty()) {
                    Some(rest) => parts[part].extend_from_slice(rest),
                    None => parts[part].extend(self.encode(&text[at..border], Before::Text, parse)?),
                }
                (anchor, before, done) = (border, Before::Text, 0);
                ids = self.encode(&text[border..range.end], before, parse)?;
            }
            at = border;
        }
        parts[borders.len()].extend_from_slice(&ids[done..]);
        Ok(())
    }

    fn encoded_units(&self, text: &str, as_text: Option<&[Range<usize>]>) -> Result<Vec<(Unit, Vec<u32>)>> {
        let matcher = if as_text.is_some() { &self.special } else { &self.raw };
        let mut units = Vec::new();
        let mut before = Before::Nothing;
        for unit in units_of(matcher, text, as_text.unwrap_or(&[]))? {
            let ids = match unit.token {
                Some(id) => vec![id],
                None => self.encode(&text[unit.range.clone()], before, as_text.is_none())?,
            };
            if as_text.is_some() && unit.token.is_none() {
                self.check_text(&ids)?;
            }
            before = unit.token.map_or(Before::Text, Before::Token);
            units.push((unit, ids));
        }
        if as_text.is_none() && !self.tokenizer.is_context_free() {
            let mut whole = Vec::new();
            self.tokenizer.encode_into(text, true, &mut whole)?;
            if !whole.iter().eq(units.iter().flat_map(|(_, ids)| ids)) {
                return Ok(vec![(Unit { range: 0..text.len(), token: None }, whole)]);
            }
        }
        Ok(units)
    }

    /// Some vocabularies reach a special token from plain text: such a text cannot be told from a forged turn.
    fn check_text(&self, ids: &[u32]) -> Result<()> {
        let special = |id: &&u32| self.tokenizer.is_special(**id) && self.tokenizer.unk_id() != Some(**id);
        match ids.iter().find(special) {
            None => Ok(()),
            Some(&id) => {
                let token = self.tokenizer.id_to_token(id).unwrap_or_default();
                Err(Error::Encode(format!(
                    "this tokenizer cannot write {token:?} as text; take it out of the messages"
                )))
            }
        }
    }

    fn encode(&self, text: &str, before: Before, parse: bool) -> Result<Vec<u32>> {
        let plain = |text: &str, parse: bool| -> Result<Vec<u32>> {
            let mut ids = Vec::with_capacity(text.len() / 3 + 2);
            self.tokenizer.encode_into(text, parse, &mut ids)?;
            Ok(ids)
        };
        let alone = plain(text, parse)?;
        if self.tokenizer.is_context_free() || text.is_empty() {
            return Ok(alone);
        }
        match before {
            Before::Nothing => Ok(alone),
            Before::Token(id) => {
                let token = self.tokenizer.id_to_token(id).unwrap_or_default();
                let with = plain(&format!("{token}{text}"), true)?;
                let same_words = parse || plain(text, true)? == alone;
                Ok(if same_words && with.first() == Some(&id) { with[1..].to_vec() } else { alone })
            }
            Before::Text => {
                if self.leading_spaces(&alone) <= spaces(text.as_bytes()) {
                    return Ok(alone);
                }
                // Encoding put a space in front: encode behind something else, and take that off again.
                for lead in ["\n", ".", "a"] {
                    let (with, lead) = (plain(&format!("{lead}{text}"), parse)?, plain(lead, parse)?);
                    if let Some(rest) = with.strip_prefix(lead.as_slice())
                        && self.leading_spaces(rest) == spaces(text.as_bytes())
                    {
                        return Ok(rest.to_vec());
                    }
                }
                Ok(alone)
            }
        }
    }

    /// The spaces that the text of these ids begins with, inside a text.
    fn leading_spaces(&self, ids: &[u32]) -> usize {
        let mut count = 0;
        for bytes in ids.iter().filter_map(|&id| self.tokenizer.token_bytes(id)) {
            let here = spaces(&bytes);
            count += here;
            if here < bytes.len() {
                break;
            }
        }
        count
    }
}

fn spaces(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|&&b| b == b' ').count()
}

/// The tokens that `matcher` finds outside `as_text`, and the texts between them.
fn units_of(matcher: &AddedMatcher, text: &str, as_text: &[Range<usize>]) -> Result<Vec<Unit>> {
    let mut units: Vec<Unit> = Vec::new();
    let mut push = |range: Range<usize>, token: Option<u32>| match units.last_mut() {
        Some(last) if token.is_none() && last.token.is_none() => last.range.end = range.end,
        _ => units.push(Unit { range, token }),
    };
    let mut at = 0;
    for fake in as_text.iter().cloned().chain(std::iter::once(text.len()..text.len())) {
        matcher.ranges(&text[at..fake.start], true, &mut |range, token| {
            push(at + range.start..at + range.end, token);
            Ok(())
        })?;
        if !fake.is_empty() {
            push(fake.clone(), None);
        }
        at = fake.end;
    }
    Ok(units)
}
