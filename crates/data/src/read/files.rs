//! Which files there are to read, and of which kind.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Error, Result};

/// A file or folder that was left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SkippedFile {
    /// The file or folder.
    pub path: PathBuf,
    /// Why.
    pub reason: &'static str,
}

impl fmt::Display for SkippedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Jsonl,
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    Plain,
    Gzip,
    Zstd,
}

#[derive(Clone, Debug)]
pub(super) struct InputFile {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) compression: Compression,
    pub(super) bytes: u64,
}

/// Which kinds of files are of use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All.
    Anything,
    /// Those of records: plain text has no fields.
    Records,
}

pub(super) struct Found {
    pub(super) files: Vec<InputFile>,
    pub(super) skipped: Vec<SkippedFile>,
    pub(super) num_skipped: u64,
    wanted: Wanted,
    keep: usize,
    seen: HashSet<PathBuf>,
}

/// Files of `inputs`, in reading order.
pub(super) fn find(inputs: &[PathBuf], wanted: Wanted, keep: usize) -> Result<Found> {
    let mut found = Found { files: vec![], skipped: vec![], num_skipped: 0, wanted, keep, seen: HashSet::new() };
    for input in inputs {
        match std::fs::metadata(input) {
            Ok(meta) if meta.is_dir() => found.folder(input)?,
            Ok(meta) => match classify(input) {
                Some((Kind::Text, _)) if wanted == Wanted::Records => {
                    return Err(Error::NotRecords { path: input.clone() });
                }
                Some(_) => found.file(input, meta.len())?,
                None => return Err(Error::UnknownExtension { path: input.clone() }),
            },
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::MissingInput { path: input.clone() });
            }
            Err(e) => return Err(Error::io(input, e)),
        }
    }
    if found.files.is_empty() {
        let listed: Vec<_> = found.skipped.iter().take(5).map(ToString::to_string).collect();
        let skipped = match listed.is_empty() {
            true => String::new(),
            false => format!("; {} skipped: {}", found.num_skipped, listed.join("; ")),
        };
        return Err(Error::NothingReadable { inputs: join(inputs), skipped });
    }
    Ok(found)
}

/// Paths in one line, the first few of them.
pub(crate) fn join(paths: &[PathBuf]) -> String {
    let mut text: Vec<_> = paths.iter().take(4).map(|p| p.display().to_string()).collect();
    if paths.len() > 4 {
        text.push(format!("and {} more", paths.len() - 4));
    }
    if text.is_empty() { "(no input was given)".to_owned() } else { text.join(", ") }
}

impl Found {
    fn folder(&mut self, dir: &Path) -> Result<()> {
        let real = dir.canonicalize().map_err(|e| Error::io(dir, e))?;
        if !self.seen.insert(real) {
            self.skip(dir, "reached before (a link back, or given twice)");
            return Ok(());
        }
        let entries = std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
        let mut paths = entries.map(|e| e.map(|e| e.path())).collect::<std::io::Result<Vec<_>>>();
        let paths = paths.as_mut().map_err(|e| Error::io(dir, std::io::Error::new(e.kind(), e.to_string())))?;
        paths.sort();
        for path in paths.iter() {
            let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
            if hidden {
                self.skip(path, "hidden");
                continue;
            }
            match std::fs::metadata(path) {
                Ok(meta) if meta.is_dir() => self.folder(path)?,
                Ok(meta) if meta.is_file() => self.file(path, meta.len())?,
                Ok(_) => self.skip(path, "not a regular file"),
                Err(_) => self.skip(path, "cannot be reached (a broken link, or no permission)"),
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, bytes: u64) -> Result<()> {
        let Some((kind, compression)) = classify(path) else {
            self.skip(path, "unknown extension");
            return Ok(());
        };
        if kind == Kind::Text && self.wanted == Wanted::Records {
            self.skip(path, "plain text, not records");
            return Ok(());
        }
        if bytes == 0 {
            self.skip(path, "empty");
            return Ok(());
        }
        let real = path.canonicalize().map_err(|e| Error::io(path, e))?;
        if !self.seen.insert(real) {
            self.skip(path, "reached before (a link back, or given twice)");
            return Ok(());
        }
        self.files.push(InputFile { path: path.to_owned(), kind, compression, bytes });
        Ok(())
    }

    fn skip(&mut self, path: &Path, reason: &'static str) {
        self.num_skipped += 1;
        if self.skipped.len() < self.keep {
            self.skipped.push(SkippedFile { path: path.to_owned(), reason });
        }
    }
}

fn classify(path: &Path) -> Option<(Kind, Compression)> {
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    let (stem, compression) = match name.rsplit_once('.')? {
        (stem, "gz") => (stem, Compression::Gzip),
        (stem, "zst") => (stem, Compression::Zstd),
        _ => (name.as_str(), Compression::Plain),
    };
    let kind = match stem.rsplit_once('.')?.1 {
        "txt" | "md" | "text" => Kind::Text,
        "jsonl" | "ndjson" => Kind::Jsonl,
        "parquet" => Kind::Parquet,
        _ => return None,
    };
    Some((kind, compression))
}
