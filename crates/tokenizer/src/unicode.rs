//! Unicode classes by table: one byte a code point, filled from the same Unicode data the regex engine uses, so that
//! the hand-written scanners and the regexes agree on every character.

use std::sync::LazyLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`: letters.
pub(crate) const LETTER: u8 = 1;
/// `\p{N}`: numbers.
pub(crate) const NUMBER: u8 = 2;
/// `\s`: white space.
pub(crate) const SPACE: u8 = 4;
/// `\r` or `\n`.
pub(crate) const NEWLINE: u8 = 8;

static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut table = vec![0u8; 0x11_0000];
    mark(&mut table, r"\p{L}", LETTER);
    mark(&mut table, r"\p{N}", NUMBER);
    mark(&mut table, r"\s", SPACE);
    table['\r' as usize] |= NEWLINE;
    table['\n' as usize] |= NEWLINE;
    table
});

fn mark(table: &mut [u8], class: &str, flag: u8) {
    let parsed = regex_syntax::parse(class).map(|hir| hir.into_kind());
    // The three classes above are valid regex syntax: a broken table is a broken build, not a user's mistake.
    let Ok(HirKind::Class(Class::Unicode(ranges))) = parsed else { unreachable!("{class} is a Unicode class") };
    for range in ranges.iter() {
        for entry in &mut table[range.start() as usize..=range.end() as usize] {
            *entry |= flag;
        }
    }
}

/// A handle on the table, taken once a text so that the lazy check is not paid per character.
#[derive(Clone, Copy)]
pub(crate) struct Classes(&'static [u8]);

impl Classes {
    pub(crate) fn get() -> Self {
        Self(&TABLE)
    }

    /// The flags of the character that starts at byte `at` of `text`, and its length; `(0, 0)` at the end.
    #[inline]
    pub(crate) fn at(self, text: &[u8], at: usize) -> (u8, usize) {
        let Some(&first) = text.get(at) else { return (0, 0) };
        if first < 0x80 {
            return (self.0[first as usize], 1);
        }
        let tail = |offset: usize| (text.get(at + offset).copied().unwrap_or(0x80) & 0x3F) as usize;
        let (code, length) = match first {
            0xF0.. => ((first as usize & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
            0xE0.. => ((first as usize & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
            _ => ((first as usize & 0x1F) << 6 | tail(1), 2),
        };
        (self.0.get(code).copied().unwrap_or(0), length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_agrees_with_the_regex_engine() {
        let engine = [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE)]
            .map(|(class, flag)| (fancy_regex::Regex::new(class).unwrap(), flag));
        let classes = Classes::get();
        for c in (0..0x3_0000u32).filter_map(char::from_u32) {
            let mut buffer = [0; 4];
            let text = &*c.encode_utf8(&mut buffer);
            let (flags, length) = classes.at(text.as_bytes(), 0);
            assert_eq!(length, text.len());
            for (regex, flag) in &engine {
                assert_eq!(regex.is_match(text).unwrap(), flags & flag != 0, "{c:?}");
            }
        }
    }
}
