//! Training straight from text files.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use super::{TrainEvent, TrainOptions, check, count, finish};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Lines are gathered to about this many bytes, so that no file need fit in memory.
const CHUNK_BYTES: usize = 1 << 20;

/// Trains on UTF-8 text files. [`train`](super::train) says the rest.
///
/// Fails on the first file that cannot be read or is not UTF-8, naming it and the line.
pub fn train_files<P: AsRef<Path>>(
    paths: &[P],
    options: &TrainOptions,
    mut progress: impl FnMut(TrainEvent),
) -> Result<Tokenizer> {
    let specials = check(options)?;
    let counter = count::PieceCounter::new(options)?;
    let chunks = paths.iter().flat_map(|path| match Chunks::open(path.as_ref()) {
        Ok(chunks) => Box::new(chunks) as Box<dyn Iterator<Item = Result<String>>>,
        Err(error) => Box::new(std::iter::once(Err(error))),
    });
    let pieces = counter.count(chunks, &mut progress)?;
    finish(&pieces, options, &specials, &mut progress)
}

/// A file in chunks that end where a line does and the next begins with visible text, so that no piece is cut.
struct Chunks {
    path: PathBuf,
    reader: BufReader<File>,
    /// A line read too far: it begins the next chunk.
    carry: Vec<u8>,
    lines: u64,
    done: bool,
}

impl Chunks {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.into(), reader: BufReader::new(file), carry: Vec::new(), lines: 0, done: false })
    }

    fn chunk(&mut self) -> Result<Option<String>> {
        let mut chunk = std::mem::take(&mut self.carry);
        loop {
            let start = chunk.len();
            let read = self.reader.read_until(b'\n', &mut chunk).map_err(|e| Error::io(&self.path, e))?;
            if read == 0 {
                self.done = true;
                break;
            }
            let fresh = chunk[start..].first().is_some_and(|b| !b.is_ascii_whitespace());
            if start >= CHUNK_BYTES && fresh {
                self.carry = chunk.split_off(start);
                break;
            }
        }
        let first_line = self.lines + 1;
        self.lines += chunk.iter().filter(|&&b| b == b'\n').count() as u64;
        let text = String::from_utf8(chunk).map_err(|e| {
            let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let line = first_line + before.iter().filter(|&&b| b == b'\n').count() as u64;
            Error::NotUtf8 { path: self.path.clone(), line }
        })?;
        Ok(if text.is_empty() { None } else { Some(text) })
    }
}

impl Iterator for Chunks {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            match self.chunk() {
                Ok(Some(text)) => return Some(Ok(text)),
                Ok(None) => {}
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}
