//! Opens a file as a stream of its uncompressed bytes, counting what is read of the disk.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use super::files::{Compression, InputFile};

const BUFFER: usize = 1 << 17;

pub(super) enum OpenError {
    Io(io::Error),
    Damaged(String),
}

/// A stream of uncompressed bytes.
pub(super) type Stream = Box<dyn BufRead + Send>;

struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buf)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

pub(super) fn stream(file: &InputFile, read: &Arc<AtomicU64>) -> Result<Stream, OpenError> {
    let raw = Counted { file: File::open(&file.path).map_err(OpenError::Io)?, read: read.clone() };
    let raw = BufReader::with_capacity(BUFFER, raw);
    Ok(match file.compression {
        Compression::Plain => Box::new(raw),
        Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(raw))),
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(raw).map_err(OpenError::Io)?;
            Box::new(BufReader::with_capacity(BUFFER, decoder))
        }
    })
}

/// The file itself, or what is in it in a nameless temporary file (for formats that must be read from their end).
pub(super) fn seekable(file: &InputFile, read: &Arc<AtomicU64>) -> Result<File, OpenError> {
    if file.compression == Compression::Plain {
        let opened = File::open(&file.path).map_err(OpenError::Io)?;
        read.fetch_add(file.bytes, Ordering::Relaxed);
        return Ok(opened);
    }
    let mut stream = stream(file, read)?;
    let mut plain = tempfile::tempfile().map_err(OpenError::Io)?;
    loop {
        let chunk = stream.fill_buf().map_err(|e| OpenError::Damaged(e.to_string()))?;
        if chunk.is_empty() {
            break;
        }
        io::Write::write_all(&mut plain, chunk).map_err(OpenError::Io)?;
        let n = chunk.len();
        stream.consume(n);
    }
    plain.rewind().map_err(OpenError::Io)?;
    Ok(plain)
}
