//! From ids back to text, one token at a time, so that streaming and whole decoding are the same code.

use serde_json::Value;

use crate::byte_alphabet;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// How the written form of a token becomes bytes of text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum DecodeRule {
    /// GPT-2's byte alphabet.
    ByteLevel,
    /// SentencePiece: a space marker, perhaps `<0xHH>` byte tokens, and a leading space that encoding added.
    Space { marker: String, bytes: bool, strip: Strip },
    /// `##`-prefixed continuations joined, other tokens after a space, English spacing tidied if `cleanup`.
    WordPiece { prefix: String, cleanup: bool },
    /// Tokens joined as they are written.
    Plain,
    /// Tokens joined by spaces: what Hugging Face does when a file names no decoder.
    Spaced,
    /// Anything else: decoded by the `tokenizers` crate, as a whole.
    Whole,
}

/// What becomes of the space that encoding put in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strip {
    Never,
    /// One space at the very front.
    One,
    /// Every marker of the first token (Hugging Face's `Metaspace`).
    FirstToken,
}

impl DecodeRule {
    /// Recognises the `decoder` of a `tokenizer.json`.
    pub(crate) fn from_json(decoder: Option<&Value>) -> Self {
        let Some(decoder) = decoder.filter(|d| !d.is_null()) else { return Self::Spaced };
        match decoder["type"].as_str() {
            Some("ByteLevel") => Self::ByteLevel,
            Some("Fuse") => Self::Plain,
            Some("WordPiece") => Self::WordPiece {
                prefix: decoder["prefix"].as_str().unwrap_or("##").to_string(),
                cleanup: decoder["cleanup"].as_bool().unwrap_or(true),
            },
            Some("Metaspace") => metaspace(decoder, false),
            Some("Sequence") => decoder["decoders"].as_array().map_or(Self::Whole, |steps| sequence(steps)),
            _ => Self::Whole,
        }
    }

    /// The bytes token `written` adds to a text in which it is the first token or not.
    pub(crate) fn bytes(&self, written: &str, first: bool) -> Vec<u8> {
        match self {
            Self::ByteLevel => byte_alphabet::decode(written).unwrap_or_else(|| written.as_bytes().to_vec()),
            Self::Space { marker, bytes, strip } => {
                if *bytes && let Some(byte) = byte_token(written) {
                    return vec![byte];
                }
                if first && *strip == Strip::FirstToken {
                    return written.replace(marker.as_str(), "").into_bytes();
                }
                let text = written.replace(marker.as_str(), " ");
                let text = if first && *strip == Strip::One { text.strip_prefix(' ').unwrap_or(&text) } else { &text };
                text.as_bytes().to_vec()
            }
            Self::WordPiece { prefix, cleanup } => {
                let text = match written.strip_prefix(prefix.as_str()) {
                    _ if first => written.to_string(),
                    Some(rest) => rest.to_string(),
                    None => format!(" {written}"),
                };
                if *cleanup { tidy_english(&text).into_bytes() } else { text.into_bytes() }
            }
            Self::Spaced if !first => format!(" {written}").into_bytes(),
            Self::Spaced | Self::Plain | Self::Whole => written.as_bytes().to_vec(),
        }
    }
}

fn metaspace(step: &Value, bytes: bool) -> DecodeRule {
    let never = step["prepend_scheme"].as_str() == Some("never") || step["add_prefix_space"].as_bool() == Some(false);
    DecodeRule::Space {
        marker: step["replacement"].as_str().unwrap_or("▁").to_string(),
        bytes,
        strip: if never { Strip::Never } else { Strip::FirstToken },
    }
}

/// `[Replace marker, ByteFallback, Fuse, Strip]` and `[ByteFallback, Metaspace]`, with optional parts left out.
fn sequence(steps: &[Value]) -> DecodeRule {
    let mut marker = None;
    let (mut bytes, mut strip) = (false, Strip::Never);
    for step in steps {
        match step["type"].as_str() {
            Some("Replace") if step["content"] == " " && marker.is_none() => {
                let Some(pattern) = step["pattern"]["String"].as_str() else { return DecodeRule::Whole };
                marker = Some(pattern.to_string());
            }
            Some("ByteFallback") => bytes = true,
            Some("Fuse") => {}
            Some("Strip") if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strip = Strip::One,
            Some("Metaspace") if marker.is_none() && steps.last() == Some(step) => return metaspace(step, bytes),
            Some("ByteLevel") if steps.len() == 1 => return DecodeRule::ByteLevel,
            _ => return DecodeRule::Whole,
        }
    }
    match marker {
        Some(marker) => DecodeRule::Space { marker, bytes, strip },
        None => DecodeRule::Whole,
    }
}

/// The byte of a `<0xHH>` token.
pub(crate) fn byte_token(written: &str) -> Option<u8> {
    let hex = written.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// BERT's tidying of English spacing, token by token as Hugging Face does it.
fn tidy_english(text: &str) -> String {
    const RULES: [(&str, &str); 11] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" do not", " don't"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    RULES.iter().fold(text.to_string(), |text, (from, to)| text.replace(from, to))
}

/// Incremental decoding: text comes out as soon as it is certain, never half a character.
///
/// Concatenating everything [`push`](Self::push) and [`flush`](Self::flush) return gives exactly
/// [`Tokenizer::decode`] of the same ids.
///
/// ```
/// # let dir = tempfile::tempdir()?;
/// # let tokenizer = tallow_tokenizer::train(["héé"], &tallow_tokenizer::TrainOptions {
/// #     vocab_size: 257, ..Default::default() }, |_| {})?;
/// let ids = tokenizer.encode("é", false)?;       // two bytes, two tokens: no merge was learnt
/// let mut stream = tokenizer.decode_stream(false);
/// assert_eq!(stream.push(ids[0])?, None);        // half a character
/// assert_eq!(stream.push(ids[1])?.as_deref(), Some("é"));
/// assert_eq!(stream.flush()?, None);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    first: bool,
    /// Bytes not yet sent: less than one character, except for `DecodeRule::Whole`.
    pending: Vec<u8>,
    /// Only for `DecodeRule::Whole`: all ids so far, and how much of their text was sent.
    ids: Vec<u32>,
    sent: usize,
}

impl DecodeStream {
    pub(crate) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, first: true, pending: Vec::new(), ids: Vec::new(), sent: 0 }
    }

    /// Adds one token; returns the text that became certain, if any.
    ///
    /// Fails on an id outside the vocabulary; the stream stays usable.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        let token = self.tokenizer.token(id)?;
        if self.skip_special && token.special {
            return Ok(None);
        }
        if *self.tokenizer.decode_rule() == DecodeRule::Whole {
            self.ids.push(id);
            return self.step_whole(false);
        }
        let first = std::mem::replace(&mut self.first, false);
        self.pending.extend_from_slice(&self.tokenizer.decode_rule().bytes(&token.written, first));
        Ok(take_text(&mut self.pending, false))
    }

    /// Bytes held back: the beginning of a character that the next tokens may finish. Always 0 for tokenizers that are
    /// decoded only as a whole.
    pub fn held_back(&self) -> usize {
        self.pending.len()
    }

    /// Ends the text: what is left of an unfinished character comes out as U+FFFD. The stream can be used anew.
    pub fn flush(&mut self) -> Result<Option<String>> {
        let rest = if *self.tokenizer.decode_rule() == DecodeRule::Whole {
            self.step_whole(true)?
        } else {
            take_text(&mut self.pending, true)
        };
        self.first = true;
        self.ids.clear();
        self.sent = 0;
        Ok(rest)
    }

    fn step_whole(&mut self, end: bool) -> Result<Option<String>> {
        let text = self.tokenizer.decode_whole(&self.ids)?;
        // A trailing replacement character may still become a real one.
        let certain = if end { text.as_str() } else { text.trim_end_matches('\u{FFFD}') };
        let fresh = certain.get(self.sent..).unwrap_or("").to_string();
        self.sent = self.sent.max(certain.len());
        Ok(if fresh.is_empty() { None } else { Some(fresh) })
    }
}

/// Takes the certain text out of `pending`: valid characters, U+FFFD for bytes that no later byte can complete, and,
/// at the `end`, U+FFFD for a cut character. The same replacements as `String::from_utf8_lossy`.
fn take_text(pending: &mut Vec<u8>, end: bool) -> Option<String> {
    let mut out = String::new();
    loop {
        match std::str::from_utf8(pending) {
            Ok(text) => {
                out.push_str(text);
                pending.clear();
                break;
            }
            Err(error) => {
                let (valid, rest) = pending.split_at(error.valid_up_to());
                out.push_str(&String::from_utf8_lossy(valid));
                let Some(bad) = error.error_len().or(end.then_some(rest.len())) else {
                    *pending = rest.to_vec();
                    break;
                };
                out.push('\u{FFFD}');
                *pending = rest[bad..].to_vec();
            }
        }
    }
    if out.is_empty() { None } else { Some(out) }
}

/// Decodes all of `ids`.
pub(crate) fn decode_all(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Result<String> {
    let rule = tokenizer.decode_rule();
    let mut kept = Vec::new();
    let mut bytes = Vec::with_capacity(ids.len() * 4);
    let mut first = true;
    for &id in ids {
        let token = tokenizer.token(id)?;
        if skip_special && token.special {
            continue;
        }
        if *rule == DecodeRule::Whole {
            kept.push(id);
        } else {
            bytes.extend_from_slice(&rule.bytes(&token.written, first));
        }
        first = false;
    }
    if *rule == DecodeRule::Whole {
        return tokenizer.decode_whole(&kept);
    }
    Ok(String::from_utf8(bytes).unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned()))
}

impl From<tokenizers::Error> for Error {
    fn from(error: tokenizers::Error) -> Self {
        Self::Encode(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn taking_text_bit_by_bit_is_lossy_decoding(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let mut pending = Vec::new();
            let mut out = String::new();
            for byte in &bytes {
                pending.push(*byte);
                out.push_str(&take_text(&mut pending, false).unwrap_or_default());
            }
            out.push_str(&take_text(&mut pending, true).unwrap_or_default());
            prop_assert_eq!(out, String::from_utf8_lossy(&bytes));
        }
    }
}
