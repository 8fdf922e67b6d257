//! Writes the shards of one split.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::spans::SpansWriter;
use super::{HEADER, Header, ShardEntry, Span, token_width};
use crate::hash::sha256_file;
use crate::{Error, Result};

/// Documents in, `shard-NNNNN.tok` out. A shard ends behind the document that fills it.
pub(crate) struct SplitWriter {
    dir: PathBuf,
    vocab_size: u32,
    width: usize,
    shard_tokens: u64,
    /// Whether documents have spans.
    examples: bool,
    open: Option<OpenShard>,
    done: Vec<ShardEntry>,
}

struct OpenShard {
    path: PathBuf,
    name: String,
    file: BufWriter<File>,
    offsets: Vec<u64>,
    lengths: Vec<u64>,
    tokens: u64,
    spans: Option<SpansWriter>,
}

impl SplitWriter {
    pub(crate) fn create(dir: &Path, vocab_size: usize, shard_tokens: u64, examples: bool) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let width = token_width(vocab_size);
        let vocab_size = u32::try_from(vocab_size)
            .map_err(|_| Error::option("vocab_size", vocab_size, "must be below 4294967296"))?;
        Ok(Self { dir: dir.to_owned(), vocab_size, width, shard_tokens, examples, open: None, done: vec![] })
    }

    /// Appends a document of `tokens` that stand for `text_bytes` bytes of text; `spans` of it are learnt, where
    /// documents have spans.
    pub(crate) fn push(&mut self, tokens: &[u32], spans: &[Span], text_bytes: u64) -> Result<()> {
        let shard = match &mut self.open {
            Some(shard) => shard,
            None => self.open.insert(OpenShard::create(&self.dir, self.done.len(), self.examples)?),
        };
        if let Some(writer) = &mut shard.spans {
            writer.push(spans);
        }
        shard.push(tokens, text_bytes, self.width).map_err(|e| Error::io(&shard.path, e))?;
        if shard.tokens >= self.shard_tokens { self.close() } else { Ok(()) }
    }

    fn close(&mut self) -> Result<()> {
        let Some(mut shard) = self.open.take() else { return Ok(()) };
        let header = Header {
            width: self.width,
            num_tokens: shard.tokens,
            num_documents: shard.lengths.len() as u64,
            vocab_size: self.vocab_size,
        };
        let spans = shard.spans.take().map(|s| s.finish(&shard.path, header.num_tokens)).transpose()?;
        self.done.push(ShardEntry { spans, ..shard.finish(header)? });
        Ok(())
    }

    /// Ends the last shard; all shards are on the disk then.
    pub(crate) fn finish(mut self) -> Result<Vec<ShardEntry>> {
        self.close()?;
        let sync = File::open(&self.dir).and_then(|d| d.sync_all());
        sync.map_err(|e| Error::io(&self.dir, e))?;
        Ok(self.done)
    }
}

impl OpenShard {
    fn create(dir: &Path, number: usize, examples: bool) -> Result<Self> {
        let name = format!("shard-{number:05}.tok");
        let path = dir.join(&name);
        let create = || {
            let mut file = BufWriter::with_capacity(1 << 18, File::create_new(&path)?);
            file.write_all(&[0; HEADER])?;
            Ok(file)
        };
        let file = create().map_err(|e| Error::io(&path, e))?;
        let spans = examples.then(SpansWriter::default);
        Ok(Self { path, name, file, offsets: vec![0], lengths: vec![], tokens: 0, spans })
    }

    fn push(&mut self, tokens: &[u32], text_bytes: u64, width: usize) -> std::io::Result<()> {
        for token in tokens {
            self.file.write_all(&token.to_le_bytes()[..width])?;
        }
        self.tokens += tokens.len() as u64;
        self.offsets.push(self.tokens);
        self.lengths.push(text_bytes);
        Ok(())
    }

    /// Writes the tables and, last of all, the header.
    fn finish(mut self, header: Header) -> Result<ShardEntry> {
        let mut finish = || -> std::io::Result<u64> {
            let file = &mut self.file;
            let padding = (8 - (self.tokens * header.width as u64) % 8) % 8;
            file.write_all(&[0; 8][..padding as usize])?;
            for number in self.offsets.iter().chain(&self.lengths) {
                file.write_all(&number.to_le_bytes())?;
            }
            let bytes = file.stream_position()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&header.to_bytes())?;
            file.flush()?;
            file.get_ref().sync_all()?;
            Ok(bytes)
        };
        let bytes = finish().map_err(|e| Error::io(&self.path, e))?;
        Ok(ShardEntry {
            file: self.name,
            bytes,
            sha256: sha256_file(&self.path)?,
            num_tokens: header.num_tokens,
            num_documents: header.num_documents,
            text_bytes: self.lengths.iter().sum(),
            spans: None,
        })
    }
}
