//! `index.json`: what a folder of shards holds and where it came from.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::chat::TrainOn;
use crate::prepare::TooLong;
use crate::read::UnreadField;
use crate::{Error, Result};

/// Name of the index in a split's folder.
pub(crate) const INDEX_FILE: &str = "index.json";

const FORMAT: &str = "tallow-tokens";
/// Millions of sources fit; an absurd file does not.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// What a split's folder holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SplitIndex {
    /// Always `tallow-tokens`.
    pub format: String,
    /// Version of the format.
    pub version: u32,
    /// `train` or `valid`.
    pub split: String,
    /// Tokens in all shards.
    pub num_tokens: u64,
    /// Documents in all shards.
    pub num_documents: u64,
    /// Bytes of UTF-8 text that the tokens stand for.
    pub text_bytes: u64,
    /// Bytes a token takes in the shards: 2 or 4.
    pub token_bytes: usize,
    /// Size of the vocabulary; every id is below it.
    pub vocab_size: usize,
    /// The id behind every document, if `append_eos`.
    pub eos_id: Option<u32>,
    /// The id before every document, if `prepend_bos`.
    pub bos_id: Option<u32>,
    /// Whether documents end with `eos_id`.
    pub append_eos: bool,
    /// Whether documents begin with `bos_id`.
    pub prepend_bos: bool,
    /// Fingerprint of the tokenizer.
    pub tokenizer_fingerprint: String,
    /// How documents were divided between `train` and `valid`, for people.
    pub split_rule: String,
    /// The shards in order.
    pub shards: Vec<ShardEntry>,
    /// The files that the text is from (both splits).
    pub sources: Vec<SourceEntry>,
    /// What else there is to say where the documents are examples, of which only spans are learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub examples: Option<ExampleIndex>,
}

/// How examples were made, and what was left out of them (in both splits).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExampleIndex {
    /// Fingerprint of the template with its tokenizer.
    pub encoder_fingerprint: String,
    /// What is learnt of a conversation.
    pub train_on: TrainOn,
    /// Most tokens of an example, if that was limited.
    pub max_tokens: Option<usize>,
    /// What was done with longer ones.
    pub too_long: TooLong,
    /// Examples left out because they were too long.
    pub dropped: u64,
    /// Examples cut short because they were too long.
    pub truncated: u64,
    /// Tokens in the examples left out, and behind the cuts.
    pub lost_tokens: u64,
    /// Examples left out because nothing of them would be learnt.
    pub nothing_learnt: u64,
    /// Examples left out because the template refused them.
    pub refused: u64,
    /// Examples that are text without a prompt.
    #[serde(default)]
    pub texts: u64,
    /// Fields that nothing was read from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unread_fields: Vec<UnreadField>,
}

/// One shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// File name in the split's folder.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of the whole file.
    pub sha256: String,
    /// Its tokens.
    pub num_tokens: u64,
    /// Its documents.
    pub num_documents: u64,
    /// Bytes of text of its documents.
    pub text_bytes: u64,
    /// The file of its spans, where documents are examples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spans: Option<SpansEntry>,
}

/// The spans of one shard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpansEntry {
    /// File name in the split's folder.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// SHA-256 of the whole file.
    pub sha256: String,
    /// Its spans.
    pub num_spans: u64,
    /// Tokens that are learnt.
    pub num_targets: u64,
}

/// One file that text was read from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceEntry {
    /// The file, as it was named.
    pub path: PathBuf,
    /// Its size on disk.
    pub bytes: u64,
    /// SHA-256 of the file as it is on disk.
    pub sha256: String,
    /// Documents read from it.
    pub documents: u64,
    /// Records that could not be read.
    pub malformed: u64,
}

impl SplitIndex {
    pub(crate) fn format_name() -> String {
        FORMAT.to_owned()
    }

    /// Reads the index of a split's folder.
    ///
    /// # Errors
    /// If there is none, it is not one, or its totals are not the sums of its shards.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(INDEX_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(not_prepared(dir)),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let mut text = Vec::new();
        file.take(MAX_INDEX_BYTES).read_to_end(&mut text).map_err(|e| Error::io(&path, e))?;
        let index: Self = serde_json::from_slice(&text).map_err(|e| Error::corrupt(&path, 0, e.to_string()))?;
        index.check(&path)?;
        Ok(index)
    }

    fn check(&self, path: &Path) -> Result<()> {
        if self.format != FORMAT || self.version != super::VERSION {
            let reason = format!(
                "`{}` version {}; this program reads `{FORMAT}` version {}",
                self.format,
                self.version,
                super::VERSION
            );
            return Err(Error::corrupt(path, 0, reason));
        }
        let sum = |f: fn(&ShardEntry) -> u64| self.shards.iter().try_fold(0u64, |a, s| a.checked_add(f(s)));
        let sums = [sum(|s| s.num_tokens), sum(|s| s.num_documents), sum(|s| s.text_bytes)];
        if sums != [Some(self.num_tokens), Some(self.num_documents), Some(self.text_bytes)] {
            return Err(Error::corrupt(path, 0, "the totals are not the sums of the shards"));
        }
        if self.vocab_size == 0 || self.vocab_size > u32::MAX as usize {
            return Err(Error::corrupt(path, 0, format!("a vocabulary of {}", self.vocab_size)));
        }
        if let Some(shard) = self.shards.iter().find(|s| s.spans.is_some() != self.examples.is_some()) {
            let reason = format!("shard `{}` has spans without `examples`, or the other way round", shard.file);
            return Err(Error::corrupt(path, 0, reason));
        }
        let outside = |file: &&String| Path::new(file).file_name() != Some(std::ffi::OsStr::new(file));
        let files = self.shards.iter().flat_map(|s| [Some(&s.file), s.spans.as_ref().map(|s| &s.file)]).flatten();
        match { files }.find(outside) {
            Some(file) => Err(Error::corrupt(path, 0, format!("shard `{file}` is not a file of this folder"))),
            None => Ok(()),
        }
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(INDEX_FILE);
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&path)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.write_all(b"\n")?;
            file.sync_all()
        };
        write().map_err(|e| Error::io(&path, e))
    }
}

/// What to say about a folder without an index.
fn not_prepared(dir: &Path) -> Error {
    let reason = if !dir.exists() {
        "no such folder".to_owned()
    } else if dir.join("train").join(INDEX_FILE).is_file() {
        format!("holds the splits; name one of them, e.g. {}", dir.join("train").display())
    } else {
        format!("has no {INDEX_FILE}, so it is not a folder of prepared tokens; make one with `tallow data prepare`")
    };
    Error::NotPrepared { path: dir.to_owned(), reason }
}
