//! SentencePiece's compiled normalization rules: checked here, applied by the `tokenizers` crate, which trusts them.
//!
//! The blob is a little-endian length, a double-array trie of that many bytes, and the replacement texts, each ended
//! by a zero byte. Every step the trie can take from any of its nodes must stay inside it.

use serde_json::Value;

const LEAF: u32 = 1 << 31;

/// Checks a blob; the error is a reason.
pub(crate) fn check(blob: &[u8]) -> Result<(), String> {
    let fail = |what: &str| Err(format!("precompiled_charsmap: {what}"));
    let Some((length, rest)) = blob.split_first_chunk::<4>() else { return fail("shorter than its header") };
    let length = u32::from_le_bytes(*length) as usize;
    if length == 0 || !length.is_multiple_of(4) || length > rest.len() {
        return fail("its trie does not fit in it");
    }
    let (trie, texts) = rest.split_at(length);
    let Ok(texts) = std::str::from_utf8(texts) else { return fail("its replacements are not UTF-8") };
    let units: Vec<u32> = trie.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().unwrap_or([0; 4]))).collect();
    for (place, &unit) in units.iter().enumerate() {
        if unit & LEAF != 0 {
            let at = (unit & !LEAF) as usize;
            if at >= texts.len() || !texts.is_char_boundary(at) {
                return fail("a rule points outside the replacements");
            }
        } else {
            let offset = ((unit >> 10) as usize) << ((unit & (1 << 9)) >> 6);
            if (place ^ offset) | 0xFF >= units.len() {
                return fail("a branch leads outside the trie");
            }
        }
    }
    Ok(())
}

/// Checks every blob inside a normalizer of a `tokenizer.json`.
pub(crate) fn check_json(normalizer: &Value) -> Result<(), String> {
    if let Some(table) = normalizer.get("precompiled_charsmap").filter(|t| !t.is_null()) {
        let blob = table.as_str().and_then(crate::base64::decode);
        check(&blob.ok_or("precompiled_charsmap is not base64")?)?;
    }
    let steps = normalizer.get("normalizers").and_then(Value::as_array);
    steps.into_iter().flatten().try_for_each(check_json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokenizers::{NormalizedString, Normalizer, normalizers::Precompiled};

    proptest! {
        #[test]
        fn what_passes_the_check_never_panics(
            units in proptest::collection::vec(prop_oneof![0u32..2048, any::<u32>()], 256..=256),
            text in "[ -~é日]{0,20}",
        ) {
            let mut blob = 1024u32.to_le_bytes().to_vec();
            units.iter().for_each(|u| blob.extend(u.to_le_bytes()));
            blob.extend(b"abc\0def\0");
            if check(&blob).is_ok() && let Ok(rules) = Precompiled::from(&blob) {
                let _ = rules.normalize(&mut NormalizedString::from(text));
            }
        }
    }

    #[test]
    fn hostile_blobs_are_refused() {
        for blob in [&b""[..], b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x04\0\0\0\0\0\0\x80", b"\x04\0\0\0\0\xff\xff\x7fx"]
        {
            assert!(check(blob).is_err(), "{blob:?}");
        }
    }
}
