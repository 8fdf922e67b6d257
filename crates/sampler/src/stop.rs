//! Stop strings over streamed text, and stop ids.

use std::collections::BTreeSet;

use crate::Result;
use crate::options::invalid;

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StopOutput {
    /// Text that is certain not to belong to a stop string: show it.
    pub text: String,
    /// The stop string that was completed, if any: generation ends, and nothing after `text` is shown.
    pub stopped: Option<String>,
}

/// Watches streamed text for stop strings, and ids for stop ids.
///
/// Text that may be the beginning of a stop string is held back until it is certain, so no part of a stop string is
/// ever shown. The stop string that is complete first ends the text; of two that end at the same character, the longer.
/// The result does not depend on how the text was cut into pieces. Each stop string costs one automaton step a byte
/// (Knuth, Morris and Pratt 1977, <https://doi.org/10.1137/0206024>).
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    ids: BTreeSet<u32>,
    held: String,
    stopped: bool,
}

/// One stop string, and how much of it the end of the text matches.
#[derive(Debug, Clone)]
struct Pattern {
    text: String,
    /// `failure[i]`: the length of the longest proper prefix that is also a suffix of the first `i + 1` bytes.
    failure: Vec<usize>,
    matched: usize,
}

impl StopMatcher {
    /// The most stop strings accepted.
    pub const MAX_STRINGS: usize = 256;
    /// The longest stop string accepted, in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// Watches for these strings and ids. Errors: an empty string, one over [`MAX_BYTES`](Self::MAX_BYTES), or more than
    /// [`MAX_STRINGS`](Self::MAX_STRINGS).
    pub fn new(strings: &[String], ids: &[u32]) -> Result<Self> {
        if strings.len() > Self::MAX_STRINGS {
            let shown = format!("({} strings)", strings.len());
            let reason = format!("at most {} stop strings", Self::MAX_STRINGS);
            return Err(invalid("stop", shown, reason, "[\"\\n\\n\"]"));
        }
        for string in strings {
            if string.is_empty() {
                return Err(invalid(
                    "stop",
                    "\"\"",
                    "an empty stop string would end every text at once",
                    "[\"\\n\\n\"]",
                ));
            }
            if string.len() > Self::MAX_BYTES {
                let shown = format!("({} bytes)", string.len());
                return Err(invalid("stop", shown, format!("at most {} bytes", Self::MAX_BYTES), "[\"\\n\\n\"]"));
            }
        }
        let patterns = strings.iter().map(|string| Pattern::new(string)).collect();
        Ok(Self { patterns, ids: ids.iter().copied().collect(), held: String::new(), stopped: false })
    }

    /// Whether this token ends generation.
    pub fn is_stop_id(&self, id: u32) -> bool {
        self.ids.contains(&id)
    }

    /// Whether a stop string was completed.
    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Takes the next piece of text and gives what can be shown. After a stop it gives nothing more.
    pub fn push(&mut self, piece: &str) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        let start = self.held.len();
        self.held.push_str(piece);
        for (offset, byte) in piece.bytes().enumerate() {
            let mut complete: Option<&Pattern> = None;
            for pattern in &mut self.patterns {
                if pattern.step(byte) && complete.is_none_or(|best| best.text.len() < pattern.text.len()) {
                    complete = Some(pattern);
                }
            }
            if let Some(pattern) = complete {
                // A stop string is whole characters, so both its ends are boundaries of the text.
                let end = start + offset + 1;
                let stopped = Some(pattern.text.clone());
                self.held.truncate(end - pattern.text.len());
                self.stopped = true;
                return StopOutput { text: std::mem::take(&mut self.held), stopped };
            }
        }
        let uncertain = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let kept = self.held.split_off(self.held.len() - uncertain);
        StopOutput { text: std::mem::replace(&mut self.held, kept), stopped: None }
    }

    /// The text that was held back, once generation has ended for another reason (a stop id, the length). Nothing after
    /// a stop string.
    pub fn finish(&mut self) -> String {
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut failure = vec![0; bytes.len()];
        let mut length = 0;
        for i in 1..bytes.len() {
            while length > 0 && bytes[i] != bytes[length] {
                length = failure[length - 1];
            }
            if bytes[i] == bytes[length] {
                length += 1;
            }
            failure[i] = length;
        }
        Self { text: text.to_string(), failure, matched: 0 }
    }

    /// Takes one byte; whether the pattern is now complete.
    fn step(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && (self.matched == bytes.len() || bytes[self.matched] != byte) {
            self.matched = self.failure[self.matched - 1];
        }
        if bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(&stops.iter().map(|s| s.to_string()).collect::<Vec<_>>(), &[2, 7]).unwrap()
    }

    /// Everything shown, and what stopped it.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = matcher(stops);
        let (mut shown, mut stopped) = (String::new(), None);
        for piece in pieces {
            let output = matcher.push(piece);
            shown.push_str(&output.text);
            stopped = stopped.or(output.stopped);
        }
        shown.push_str(&matcher.finish());
        (shown, stopped)
    }

    #[test]
    fn holds_back_the_beginning_and_lets_go_when_it_is_not_one() {
        let mut m = matcher(&["STOP"]);
        assert_eq!(m.push("a ST").text, "a ");
        assert_eq!(m.push("ART").text, "START");
        assert_eq!(m.push(" ST").text, " ");
        assert_eq!(m.finish(), "ST");
    }

    #[test]
    fn overlaps_restart_inside_the_held_text() {
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "x"]), ("a".into(), Some("aab".into())));
        assert_eq!(run(&["abab!"], &["ab", "abab", "!"]), ("ab".into(), Some("abab!".into())));
        // "ab" ends first, though "abc" starts at the same place.
        assert_eq!(run(&["abc", "ab"], &["zabc"]), ("z".into(), Some("ab".into())));
        // Both end at the same character: the longer wins.
        assert_eq!(run(&["c", "abc"], &["zabc"]), ("z".into(), Some("abc".into())));
    }

    #[test]
    fn characters_of_several_bytes_are_never_split() {
        // U+00E9 and U+00E8 share their first byte.
        assert_eq!(run(&["é!"], &["caf", "è!", "é", "?", "é!"]), ("cafè!é?".into(), Some("é!".into())));
        assert_eq!(run(&["🙂"], &["a🙃b", "🙂c"]), ("a🙃b".into(), Some("🙂".into())));
    }

    #[test]
    fn nothing_comes_after_a_stop() {
        let mut m = matcher(&["\n"]);
        assert_eq!(m.push("one\ntwo").text, "one");
        assert!(m.is_stopped());
        assert_eq!(m.push("three"), StopOutput::default());
        assert_eq!(m.finish(), "");
    }

    #[test]
    fn no_stop_strings_let_everything_through_and_ids_are_known() {
        let mut m = matcher(&[]);
        assert_eq!(m.push("abc").text, "abc");
        assert!(m.is_stop_id(7) && !m.is_stop_id(3));
    }

    #[test]
    fn hostile_lists_are_refused() {
        assert!(StopMatcher::new(&[String::new()], &[]).is_err());
        assert!(StopMatcher::new(&["x".repeat(StopMatcher::MAX_BYTES + 1)], &[]).is_err());
        assert!(StopMatcher::new(&vec!["x".to_string(); StopMatcher::MAX_STRINGS + 1], &[]).is_err());
    }
}
