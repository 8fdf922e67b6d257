//! Looking into prepared folders, and checking them.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::hash::sha256_file;
use crate::prepare::{TRAIN, VALID};
use crate::shard::{INDEX_FILE, MappedShard, MappedSpans};
use crate::{Result, SplitIndex, TokenDataset};

/// What a split's folder holds, for people.
#[derive(Clone, Debug, Serialize)]
pub struct SplitInspection {
    /// The folder.
    pub path: PathBuf,
    /// Its index.
    pub index: SplitIndex,
    /// How many documents have which length.
    pub lengths: Vec<LengthBucket>,
    /// Shortest, middle and longest document in tokens.
    pub shortest_median_longest: [u64; 3],
    /// Tokens that are learnt: see [`TokenDataset::num_targets`].
    pub num_targets: u64,
    /// Bytes of text per predicted token, see [`TokenDataset::bytes_per_token`].
    pub bytes_per_token: f64,
    /// The first documents, each cut to the wanted length; for the caller to decode.
    pub first_documents: Vec<Vec<u32>>,
}

/// Documents of `from..=to` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LengthBucket {
    /// Fewest tokens.
    pub from: u64,
    /// Most tokens.
    pub to: u64,
    /// Documents of such a length.
    pub documents: u64,
}

/// Looks into a split's folder, or into the folder that holds the splits, with the first `tokens` tokens of the first
/// `documents` documents of each.
///
/// # Errors
/// If it is neither, or a shard is damaged.
pub fn inspect(dir: &Path, documents: usize, tokens: usize) -> Result<Vec<SplitInspection>> {
    split_dirs(dir).iter().map(|d| inspect_split(d, documents, tokens)).collect()
}

/// `dir`, or the splits in it. A folder that is neither is returned for its error.
fn split_dirs(dir: &Path) -> Vec<PathBuf> {
    if dir.join(INDEX_FILE).is_file() {
        return vec![dir.to_owned()];
    }
    let splits: Vec<_> = [TRAIN, VALID].iter().map(|s| dir.join(s)).filter(|d| d.join(INDEX_FILE).is_file()).collect();
    if splits.is_empty() { vec![dir.to_owned()] } else { splits }
}

fn inspect_split(dir: &Path, documents: usize, tokens: usize) -> Result<SplitInspection> {
    let dataset = TokenDataset::open(&[dir.to_owned()])?;
    let index = SplitIndex::read(dir)?;
    let n = dataset.num_documents();
    let mut lengths = (0..n).map(|i| dataset.document_len(i)).collect::<Result<Vec<_>>>()?;
    let mut buckets = [0u64; 64];
    for length in &lengths {
        buckets[length.max(&1).ilog2() as usize] += 1;
    }
    lengths.sort_unstable();
    let at = |i: usize| lengths.get(i).copied().unwrap_or(0);
    let shortest_median_longest = [at(0), at(lengths.len() / 2), at(lengths.len().saturating_sub(1))];
    let bucket = |(i, &documents): (usize, &u64)| LengthBucket { from: 1 << i, to: (2u64 << i) - 1, documents };
    let lengths = buckets.iter().enumerate().take(63).filter(|(_, d)| **d > 0).map(bucket).collect();
    let mut first_documents = vec![];
    for i in 0..n.min(documents as u64) {
        let document = dataset.document(i)?;
        first_documents.push(document.iter().take(tokens).collect());
    }
    let (num_targets, bytes_per_token) = (dataset.num_targets(), dataset.bytes_per_token());
    Ok(SplitInspection {
        path: dir.to_owned(),
        index,
        lengths,
        shortest_median_longest,
        num_targets,
        bytes_per_token,
        first_documents,
    })
}

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// Shards looked at.
    pub shards: usize,
    /// Their bytes, as their indices have them.
    pub bytes: u64,
    /// What is wrong, one entry a file; empty if all is well.
    pub damaged: Vec<Damage>,
}

/// A shard, or the spans of one, that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// What is wrong.
    pub reason: String,
}

/// Reads every shard of a split's folder (or of the splits in a folder) and compares it with its index: SHA-256,
/// structure, that every token is inside the vocabulary, and that spans are inside their documents.
///
/// # Errors
/// If an index cannot be read, or the system refuses. Damaged shards are no error but listed.
pub fn verify(dir: &Path) -> Result<Verification> {
    let mut result = Verification::default();
    for dir in split_dirs(dir) {
        let index = SplitIndex::read(&dir)?;
        for shard in &index.shards {
            result.shards += 1;
            result.bytes += shard.bytes;
            let path = dir.join(&shard.file);
            result.note(&path, &shard.sha256, || check(&path));
            if let Some(spans) = &shard.spans {
                result.bytes += spans.bytes;
                let spans_path = dir.join(&spans.file);
                result.note(&spans_path, &spans.sha256, || check_spans(&spans_path, &path));
            }
        }
    }
    Ok(result)
}

impl Verification {
    /// Looks at a file and notes what is wrong with it.
    fn note(&mut self, path: &Path, sha256: &str, check: impl Fn() -> Result<()>) {
        let reason = match sha256_file(path) {
            Err(e) => Some(e.to_string()),
            Ok(found) if found == sha256 => check().err().map(|e| e.to_string()),
            Ok(found) => {
                // The hash says that, the structure perhaps what.
                let detail = check().err().map(|e| format!("; {e}")).unwrap_or_default();
                Some(format!("sha256 is {found}, was {sha256} when it was written{detail}"))
            }
        };
        self.damaged.extend(reason.map(|reason| Damage { path: path.to_owned(), reason }));
    }
}

fn check(path: &Path) -> Result<()> {
    MappedShard::open(path)?.check_tokens()
}

/// Spans can only be judged by a shard that is whole; one that is not has an entry of its own.
fn check_spans(path: &Path, shard: &Path) -> Result<()> {
    match MappedShard::open(shard) {
        Ok(shard) => MappedSpans::open(path, &shard).map(drop),
        Err(_) => Ok(()),
    }
}
