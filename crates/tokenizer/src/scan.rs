//! Hand-written scanners for the two families of splitting regexes that almost every byte-level vocabulary uses. Each
//! returns exactly the matches of its regex, several times faster; `split.rs` decides when one applies.

use crate::unicode::{Classes, LETTER, NEWLINE, NUMBER, SPACE};

/// How contractions such as `'ll` are told from other text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contractions {
    /// `'s|'t|'re|'ve|'m|'ll|'d`, lower case only.
    Lower,
    /// `'[sS]|'[tT]|...`: ASCII in either case.
    AsciiCase,
    /// `(?i:'s|...)`: Unicode case folding, which also takes the long s (U+017F).
    Folded,
}

/// The length of a contraction that starts at byte `at`, 0 when there is none.
#[inline]
fn contraction(text: &[u8], at: usize, kind: Contractions) -> usize {
    if text.get(at) != Some(&b'\'') {
        return 0;
    }
    let fold = |b: Option<&u8>| match (b, kind) {
        (Some(b), Contractions::Lower) => *b,
        (Some(b), _) => b.to_ascii_lowercase(),
        (None, _) => 0,
    };
    match (fold(text.get(at + 1)), fold(text.get(at + 2))) {
        (b's' | b't' | b'm' | b'd', _) => 2,
        (b'r' | b'v', b'e') | (b'l', b'l') => 3,
        (0xC5, 0xBF) if kind == Contractions::Folded => 3,
        _ => 0,
    }
}

/// The end of the run of characters at `at` whose flags satisfy `keep`.
#[inline]
fn run(classes: Classes, text: &[u8], mut at: usize, keep: impl Fn(u8) -> bool) -> usize {
    loop {
        let (flags, length) = classes.at(text, at);
        if length == 0 || !keep(flags) {
            return at;
        }
        at += length;
    }
}

fn is_other(flags: u8) -> bool {
    flags & (LETTER | NUMBER | SPACE) == 0
}

/// The end of a white-space match at `at`: `\s+(?!\S)|\s+`. A run before visible text leaves its last character to it.
fn spaces(classes: Classes, text: &[u8], at: usize) -> usize {
    let mut end = at;
    let mut last = at;
    loop {
        let (flags, length) = classes.at(text, end);
        if length == 0 {
            return end;
        }
        if flags & SPACE == 0 {
            return if last > at { last } else { end };
        }
        last = end;
        end += length;
    }
}

/// GPT-2: `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`. Returns the end of the piece
/// that starts at `at` (`at` must be below the length).
#[inline]
pub(crate) fn gpt2(classes: Classes, text: &[u8], at: usize) -> usize {
    let taken = contraction(text, at, Contractions::Lower);
    if taken > 0 {
        return at + taken;
    }
    let (mut flags, mut length) = classes.at(text, at);
    let mut body = at;
    if text[at] == b' ' {
        (flags, length) = classes.at(text, at + 1);
        body = at + 1;
        if length == 0 || flags & SPACE != 0 {
            return spaces(classes, text, at);
        }
    }
    body += length;
    if flags & LETTER != 0 {
        run(classes, text, body, |f| f & LETTER != 0)
    } else if flags & NUMBER != 0 {
        run(classes, text, body, |f| f & NUMBER != 0)
    } else if flags & SPACE != 0 {
        spaces(classes, text, at)
    } else {
        run(classes, text, body, is_other)
    }
}

/// The llama-3 family: contractions, then `[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,k}| ?[^\s\p{L}\p{N}]+[\r\n]*|
/// \s*[\r\n]+|\s+(?!\S)|\s+` with `k = max_digits`. Returns the end of the piece that starts at `at`.
#[inline]
pub(crate) fn llama3(classes: Classes, text: &[u8], at: usize, kind: Contractions, max_digits: usize) -> usize {
    let taken = contraction(text, at, kind);
    if taken > 0 {
        return at + taken;
    }
    let (flags, length) = classes.at(text, at);
    if flags & LETTER != 0 {
        return run(classes, text, at + length, |f| f & LETTER != 0);
    }
    if flags & NUMBER != 0 {
        return digits(classes, text, at + length, max_digits - 1);
    }
    let (next, next_length) = classes.at(text, at + length);
    if flags & NEWLINE == 0 && next & LETTER != 0 {
        return run(classes, text, at + length + next_length, |f| f & LETTER != 0);
    }
    if flags & SPACE == 0 || (text[at] == b' ' && next_length > 0 && is_other(next)) {
        let end = run(classes, text, at + length, is_other);
        return run(classes, text, end, |f| f & NEWLINE != 0);
    }
    let end = run(classes, text, at, |f| f & SPACE != 0);
    match text[at..end].iter().rposition(|b| matches!(b, b'\r' | b'\n')) {
        Some(last) => at + last + 1,
        None => spaces(classes, text, at),
    }
}

fn digits(classes: Classes, text: &[u8], mut at: usize, mut left: usize) -> usize {
    while left > 0 {
        let (flags, length) = classes.at(text, at);
        if flags & NUMBER == 0 {
            break;
        }
        at += length;
        left -= 1;
    }
    at
}
