//! Where `unsafe` stands: all of it in `kernels`, one kind of it, the mapping of a file, in three rooms that read large
//! files, and a counting allocator in one room's tests.

use anyhow::{Context, Result};

use crate::edges::room_of;
use crate::files::files_below;
use crate::metadata::Metadata;

/// May hold any unsafe code.
const ANY: [&str; 1] = ["kernels"];

/// May map files: each `unsafe` is followed at once by a call of memmap2.
const MAPPING: [&str; 3] = ["formats", "data", "tokenizer"];

/// Tests that count what a parser allocates: a global allocator cannot be written without `unsafe`.
const COUNTING_ALLOCATOR: (&str, &str) = ("formats", "tests/support/alloc.rs");

/// How many characters after the keyword the call must come within.
const REACH: usize = 120;

/// Every `unsafe` outside the rooms that may hold it, one readable line each.
pub fn check(metadata: &Metadata) -> Result<Vec<String>> {
    let mut violations = Vec::new();
    for package in &metadata.packages {
        let room = room_of(&package.name);
        if ANY.contains(&room) {
            continue;
        }
        let folder = package.manifest_path.parent().context("a manifest without a folder")?;
        for file in files_below(folder, "rs", &["target"])? {
            let source = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let name = file.strip_prefix(folder).unwrap_or(&file).display().to_string();
            if (room, name.as_str()) == COUNTING_ALLOCATOR {
                continue;
            }
            for (line, mapping) in unsafe_lines(&source) {
                if !MAPPING.contains(&room) {
                    violations.push(format!(
                        "{room}: unsafe code at {name}:{line}; it belongs in kernels, behind a safe function"
                    ));
                } else if !mapping {
                    violations.push(format!(
                        "{room}: unsafe code at {name}:{line} is no mapping of a file; it belongs in kernels"
                    ));
                }
            }
        }
    }
    Ok(violations)
}

/// `(line, is it the mapping of a file)` of each keyword `unsafe`, outside comments and literals.
fn unsafe_lines(source: &str) -> Vec<(usize, bool)> {
    let code = blank_comments_and_literals(source);
    let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let mut found = Vec::new();
    for (start, word) in code.match_indices("unsafe") {
        let rest = &code[start + word.len()..];
        if is_word(code[..start].chars().next_back()) || is_word(rest.chars().next()) {
            continue;
        }
        let next: String = rest.chars().take(REACH).collect();
        let line = code[..start].matches('\n').count() + 1;
        found.push((line, next.trim_start().starts_with('{') && next.contains("Mmap")));
    }
    found
}

/// The source with comments, strings and characters replaced by spaces, line breaks kept.
fn blank_comments_and_literals(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code = String::with_capacity(source.len());
    let mut i = 0;
    while i < chars.len() {
        let end = literal_or_comment_end(&chars, i);
        if end > i {
            code.extend(chars[i..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            i = end;
        } else {
            code.push(chars[i]);
            i += 1;
        }
    }
    code
}

/// Where the comment or literal that begins at `i` ends; `i` if none begins there.
fn literal_or_comment_end(chars: &[char], i: usize) -> usize {
    let at = |offset: usize| chars.get(i + offset).copied().unwrap_or('\0');
    match chars[i] {
        '/' if at(1) == '/' => chars[i..].iter().position(|c| *c == '\n').map_or(chars.len(), |n| i + n),
        '/' if at(1) == '*' => block_comment_end(chars, i),
        '"' => quoted_end(chars, i + 1, '"'),
        'r' if at(1) == '"' || (at(1) == '#' && (at(2) == '#' || at(2) == '"')) => {
            let before = i.checked_sub(1).map(|before| chars[before]);
            // `br"..."` begins a raw string, an identifier that ends in r does not.
            if before.is_some_and(|c| c != 'b' && (c.is_alphanumeric() || c == '_')) {
                i
            } else {
                raw_end(chars, i + 1)
            }
        }
        // A character, not a lifetime: an escape, or a quote two further on.
        '\'' if at(1) == '\\' || (at(2) == '\'' && at(1) != '\'') => quoted_end(chars, i + 1, '\''),
        _ => i,
    }
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut depth, mut i) = (0usize, start);
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                i += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    chars.len()
}

fn quoted_end(chars: &[char], mut i: usize, quote: char) -> usize {
    while i < chars.len() {
        match chars[i] {
            '\\' => i += 2,
            c if c == quote => return i + 1,
            _ => i += 1,
        }
    }
    chars.len()
}

/// `i` is at the first `#` or `"` of a raw string.
fn raw_end(chars: &[char], mut i: usize) -> usize {
    let mut hashes = 0;
    while chars.get(i) == Some(&'#') {
        hashes += 1;
        i += 1;
    }
    if chars.get(i) != Some(&'"') {
        return i;
    }
    i += 1;
    while i < chars.len() {
        let closing =
            chars[i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').take(hashes).count() == hashes;
        i += 1;
        if closing {
            return i + hashes;
        }
    }
    chars.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keyword_is_found_with_its_line() {
        assert_eq!(unsafe_lines("fn f() {}\nunsafe fn g() {}\n"), [(2, false)]);
        assert_eq!(unsafe_lines("let x = unsafe{ y };"), [(1, false)]);
        assert_eq!(unsafe_lines("#![forbid(unsafe_code)]\nlet not_unsafe = 1;"), []);
    }

    #[test]
    fn comments_and_literals_do_not_count() {
        for source in [
            "// unsafe",
            "/* a /* unsafe */ unsafe */",
            "\"unsafe\"",
            "\"a\\\"unsafe\"",
            "r#\"\" unsafe \"#",
            "br\"unsafe\"",
            "let c = '\"'; // unsafe",
            "let c = '\\''; // unsafe",
        ] {
            assert_eq!(unsafe_lines(source), [], "{source}");
        }
    }

    #[test]
    fn code_after_a_literal_or_a_lifetime_still_counts() {
        for source in [
            "'\"'; unsafe {}",
            "fn f<'a>(x: &'a str) { unsafe {} }",
            "r\"\\\"; unsafe {}",
            "\"\\\\\"; unsafe {}",
            "b'\\'' ; unsafe {}",
        ] {
            assert_eq!(unsafe_lines(source).len(), 1, "{source}");
        }
    }

    #[test]
    fn mapping_a_file_is_told_from_the_rest() {
        assert_eq!(unsafe_lines("let map = unsafe { memmap2::Mmap::map(&file) };"), [(1, true)]);
        assert_eq!(unsafe_lines("let map = unsafe { MmapOptions::new().map(&file) };"), [(1, true)]);
        assert_eq!(unsafe_lines("unsafe fn f(m: Mmap) {}"), [(1, false)]);
    }

    #[test]
    fn each_room_is_held_to_its_own_rule() {
        let folder = tempfile::tempdir().unwrap();
        let mut packages = Vec::new();
        for (name, source) in [
            ("tallow-kernels", "unsafe fn f() {}"),
            ("tallow-formats", "fn f() { unsafe { Mmap::map(&file) }; }"),
            ("tallow-data", "fn f() { unsafe { transmute(x) } }"),
            ("tallow-nn", "fn f() { unsafe { Mmap::map(&file) }; }"),
        ] {
            let src = folder.path().join(name).join("src");
            std::fs::create_dir_all(&src).unwrap();
            std::fs::write(src.join("lib.rs"), source).unwrap();
            let manifest = folder.path().join(name).join("Cargo.toml");
            packages.push(serde_json::json!({"name": name, "manifest_path": manifest, "dependencies": []}));
        }
        let metadata = serde_json::from_value(serde_json::json!({ "packages": packages })).unwrap();
        let found = check(&metadata).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("data: unsafe code at src/lib.rs:1 is no mapping"), "{}", found[0]);
        assert!(found[1].starts_with("nn: unsafe code at src/lib.rs:1; it belongs in kernels"), "{}", found[1]);
    }
}
