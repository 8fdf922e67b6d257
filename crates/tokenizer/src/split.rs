//! Cutting text into the pieces that merges never cross: a sequence of splitting rules, each applied to the pieces of
//! the one before. Matches and the gaps between them both become pieces.

use fancy_regex::Regex;

use crate::scan::{self, Contractions};
use crate::unicode::{Classes, NUMBER};

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";
const ASCII_CONTRACTIONS: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])";
const FOLDED_CONTRACTIONS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const TIKTOKEN_CONTRACTIONS: &str = r"'(?i:[sdmt]|ll|ve|re)";

/// One splitting rule.
#[derive(Debug, Clone)]
pub(crate) enum Rule {
    /// GPT-2's regex, scanned by hand.
    Gpt2,
    /// The llama-3 family, scanned by hand.
    Llama3(Contractions, usize),
    /// `\p{N}`: every digit alone.
    EachDigit,
    /// Any other regex.
    Regex(Box<Regex>),
}

impl Rule {
    /// The rule for a regex: a scanner when one is known to match exactly the same text.
    ///
    /// The error is the regex engine's message.
    pub(crate) fn from_regex(pattern: &str) -> Result<Self, String> {
        // A trailing `|\s+` only takes what would otherwise be a gap: the same pieces.
        let core = pattern.strip_suffix(r"|\s+").unwrap_or(pattern);
        if core == GPT2 || pattern == r"\p{N}" {
            return Ok(if core == GPT2 { Self::Gpt2 } else { Self::EachDigit });
        }
        if let Some(rule) = llama3_family(core) {
            return Ok(rule);
        }
        Regex::new(pattern).map(|regex| Self::Regex(Box::new(regex))).map_err(|e| e.to_string())
    }

    /// Calls `piece` with each piece of `text`, in order. `Err` carries the regex engine's message.
    #[inline]
    fn split<'t>(&self, text: &'t str, piece: &mut dyn FnMut(&'t str) -> Result<(), String>) -> Result<(), String> {
        let bytes = text.as_bytes();
        let classes = Classes::get();
        let mut at = 0;
        match self {
            Self::Gpt2 => {
                while at < bytes.len() {
                    let end = scan::gpt2(classes, bytes, at);
                    piece(&text[at..end])?;
                    at = end;
                }
            }
            Self::Llama3(kind, max_digits) => {
                while at < bytes.len() {
                    let end = scan::llama3(classes, bytes, at, *kind, *max_digits);
                    piece(&text[at..end])?;
                    at = end;
                }
            }
            Self::EachDigit => return each_digit(classes, text, piece),
            Self::Regex(regex) => return regex_pieces(regex, text, piece),
        }
        Ok(())
    }
}

fn llama3_family(core: &str) -> Option<Rule> {
    let (kind, rest) = if let Some(rest) = core.strip_prefix(ASCII_CONTRACTIONS) {
        (Contractions::AsciiCase, rest)
    } else if let Some(rest) = core.strip_prefix(FOLDED_CONTRACTIONS) {
        (Contractions::Folded, rest)
    } else {
        (Contractions::Folded, core.strip_prefix(TIKTOKEN_CONTRACTIONS)?)
    };
    let rest = rest.strip_prefix(r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}")?;
    let (max_digits, rest) = match rest.strip_prefix("{1,3}") {
        Some(rest) => (3, rest),
        None => (1, rest),
    };
    (rest == r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)").then_some(Rule::Llama3(kind, max_digits))
}

fn each_digit<'t>(
    classes: Classes,
    text: &'t str,
    piece: &mut dyn FnMut(&'t str) -> Result<(), String>,
) -> Result<(), String> {
    let (mut start, mut at) = (0, 0);
    loop {
        let (flags, length) = classes.at(text.as_bytes(), at);
        if length == 0 {
            break;
        }
        if flags & NUMBER != 0 {
            if start < at {
                piece(&text[start..at])?;
            }
            piece(&text[at..at + length])?;
            start = at + length;
        }
        at += length;
    }
    if start < at { piece(&text[start..at]) } else { Ok(()) }
}

fn regex_pieces<'t>(
    regex: &Regex,
    text: &'t str,
    piece: &mut dyn FnMut(&'t str) -> Result<(), String>,
) -> Result<(), String> {
    let mut previous = 0;
    for found in regex.find_iter(text) {
        let found = found.map_err(|e| e.to_string())?;
        if previous < found.start() {
            piece(&text[previous..found.start()])?;
        }
        if found.start() < found.end() {
            piece(found.as_str())?;
        }
        previous = found.end();
    }
    if previous < text.len() { piece(&text[previous..]) } else { Ok(()) }
}

/// A sequence of rules. An empty one leaves the text whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Splitter {
    rules: Vec<Rule>,
}

impl Splitter {
    pub(crate) fn new(rules: Vec<Rule>) -> Self {
        Self { rules }
    }

    pub(crate) fn from_patterns(patterns: &[&str]) -> Result<Self, String> {
        patterns.iter().map(|p| Rule::from_regex(p)).collect::<Result<_, _>>().map(Self::new)
    }

    /// Calls `piece` with each piece of `text`, in order.
    pub(crate) fn split<'t>(
        &self,
        text: &'t str,
        piece: &mut dyn FnMut(&'t str) -> Result<(), String>,
    ) -> Result<(), String> {
        apply(&self.rules, text, piece)
    }
}

fn apply<'t>(
    rules: &[Rule],
    text: &'t str,
    piece: &mut dyn FnMut(&'t str) -> Result<(), String>,
) -> Result<(), String> {
    match rules {
        [] if text.is_empty() => Ok(()),
        [] => piece(text),
        [only] => only.split(text, piece),
        [first, rest @ ..] => first.split(text, &mut |part| apply(rest, part, piece)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(rule: &Rule, text: &str) -> Vec<String> {
        let mut out = Vec::new();
        Splitter::new(vec![rule.clone()])
            .split(text, &mut |p| {
                out.push(p.to_string());
                Ok(())
            })
            .unwrap();
        out
    }

    fn scanned() -> Vec<String> {
        let tail = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let mut patterns = vec![GPT2.to_string(), format!(r"{GPT2}|\s+"), r"\p{N}".to_string()];
        for contractions in [ASCII_CONTRACTIONS, FOLDED_CONTRACTIONS, TIKTOKEN_CONTRACTIONS] {
            for digits in ["", "{1,3}"] {
                patterns.push(format!(r"{contractions}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}{tail}"));
            }
        }
        patterns
    }

    fn check(text: &str) {
        for pattern in scanned() {
            let fast = Rule::from_regex(&pattern).unwrap();
            assert!(!matches!(fast, Rule::Regex(_)), "{pattern} must be scanned");
            let slow = Rule::Regex(Box::new(Regex::new(&pattern).unwrap()));
            assert_eq!(pieces(&fast, text), pieces(&slow, text), "{pattern} on {text:?}");
            assert_eq!(pieces(&fast, text).concat(), text);
        }
    }

    #[test]
    fn scanners_agree_with_their_regexes_on_corners() {
        for text in [
            "",
            " ",
            "  ",
            "\n",
            " \n",
            "\n ",
            " \n \n a",
            "a  b",
            "a \u{a0} b",
            "'s 'S 'ſ 'll'LL 'r 've",
            "''s",
            " 's",
            "1234567",
            " 12a",
            "x\r\n\r\ny",
            "!?\n\n.",
            " !\r\n a",
            "\t\tfoo",
            "日本語 です。",
            "é́ \u{3000}x",
            "½²Ⅷ",
            "\u{1F600}\u{200D}'t",
            "a\u{0}b",
            "'",
            " '",
            "   '",
            "\u{85}\u{2028}x",
        ] {
            check(text);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn scanners_agree_with_their_regexes(text in "[ a-cA-C'sStTlLrReEvV0-9\\r\\n\\t.,!é日ſ\u{a0}½😀]{0,40}") {
            check(&text);
        }

        #[test]
        fn scanners_agree_with_their_regexes_on_any_text(text in any::<String>()) {
            check(&text);
        }
    }
}
