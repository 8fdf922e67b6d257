//! GPT-2's printable stand-ins for bytes: how byte-level vocabularies write arbitrary bytes inside JSON strings.
//!
//! Printable Latin-1 bytes stand for themselves; the 68 others are numbered upwards from U+0100 in byte order.

use std::sync::LazyLock;

/// `BYTE_TO_CHAR[b]` is the stand-in of byte `b`.
pub(crate) static BYTE_TO_CHAR: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut table = ['\0'; 256];
    let mut next = 0x100u32;
    for byte in 0..=255u8 {
        let stands_for_itself = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        table[byte as usize] = if stands_for_itself {
            byte as char
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or('\u{FFFD}')
        };
    }
    table
});

static CHAR_TO_BYTE: LazyLock<[Option<u8>; 0x144]> = LazyLock::new(|| {
    let mut table = [None; 0x144];
    for (byte, &c) in BYTE_TO_CHAR.iter().enumerate() {
        table[c as usize] = Some(byte as u8);
    }
    table
});

/// The byte that `c` stands for, if it is one of the 256 stand-ins.
pub(crate) fn char_to_byte(c: char) -> Option<u8> {
    CHAR_TO_BYTE.get(c as usize).copied().flatten()
}

/// Bytes to their printable form.
pub(crate) fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|&b| BYTE_TO_CHAR[b as usize]).collect()
}

/// The bytes a printable form stands for, or none when some character is no stand-in.
pub(crate) fn decode(text: &str) -> Option<Vec<u8>> {
    text.chars().map(char_to_byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives_the_round_trip() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&encode(&all)), Some(all));
        assert_eq!(encode(b" \n"), "\u{120}\u{10A}");
        assert_eq!(decode("日"), None);
    }
}
