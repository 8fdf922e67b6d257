//! Raw files as prepared folders, prepared on first use.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::chat::EncodeChat;
use crate::encode::Encode;
use crate::hash::sha256_parts;
use crate::prepare::{
    ChatOptions, Claim, PrepareOptions, Progress, TRAIN, VALID, prepare_chat_claimed, prepare_claimed,
};
use crate::read::{self, Wanted};
use crate::shard::{SplitIndex, VERSION};
use crate::{Error, Result};

/// Where prepared folders are kept, and how they are made.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheOptions {
    /// The folder of all of them.
    pub root: PathBuf,
    /// How text is prepared. `valid_fraction` and `overwrite` play no part: all text goes to one folder.
    pub prepare: PrepareOptions,
}

/// The folder of tokens of `inputs`, prepared now unless it has been before. Open it with
/// [`TokenDataset::open`](crate::TokenDataset::open).
///
/// A folder is found again by a hash over the options, the encoder's fingerprint, and the full path, size and time of
/// change of every file: contents are not read for it, so a file that was changed without a new time or size is not
/// noticed (remove the cache then). Processes that want the same folder at once wait for the first.
///
/// # Errors
/// As [`prepare`](crate::prepare).
pub fn cached_prepare(
    inputs: &[PathBuf],
    encoder: &dyn Encode,
    cache: &CacheOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<PathBuf> {
    let options = PrepareOptions { valid_fraction: 0.0, overwrite: true, ..cache.prepare.clone() };
    let described =
        format!("{VERSION} {options:?} {} {:?}", encoder.vocab_size(), (encoder.eos_id(), encoder.bos_id()));
    let key = key(inputs, Wanted::Anything, described, encoder.fingerprint())?;
    let make = |claim| prepare_claimed(inputs, encoder, claim, &options, progress).map(drop);
    Ok(find_or_make(&cache.root, &key, make)?.join(TRAIN))
}

/// Goes up when the same examples come to be read or encoded otherwise: what was prepared before is prepared anew.
const READING: u32 = 2;

/// Where prepared folders of examples are kept, and how they are made.
#[derive(Clone, Debug, PartialEq)]
pub struct ChatCacheOptions {
    /// The folder of all of them; text may lie in the same one.
    pub root: PathBuf,
    /// How examples are prepared. `overwrite` plays no part.
    pub prepare: ChatOptions,
}

/// The folders of [`cached_prepare_chat`]. What was left out of them is said by
/// [`TokenDataset::examples`](crate::TokenDataset::examples), also where they were prepared long ago.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedChat {
    /// The training split.
    pub train: PathBuf,
    /// The held-out split, with a `valid_fraction`.
    pub valid: Option<PathBuf>,
}

/// As [`cached_prepare`], of examples.
///
/// # Errors
/// As [`prepare_chat`](crate::prepare_chat).
pub fn cached_prepare_chat(
    inputs: &[PathBuf],
    encoder: &dyn EncodeChat,
    cache: &ChatCacheOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<CachedChat> {
    let options = ChatOptions { overwrite: true, ..cache.prepare.clone() };
    let described =
        format!("{VERSION}.{READING} {options:?} {} {}", encoder.vocab_size(), encoder.tokenizer_fingerprint());
    let key = key(inputs, Wanted::Records, described, encoder.fingerprint())?;
    let make = |claim| prepare_chat_claimed(inputs, encoder, claim, &options, progress).map(drop);
    let dir = find_or_make(&cache.root, &key, make)?;
    let valid = Some(dir.join(VALID)).filter(|_| options.valid_fraction > 0.0);
    Ok(CachedChat { train: dir.join(TRAIN), valid })
}

/// The folder of a key, made now if it is not there.
fn find_or_make(root: &Path, key: &str, make: impl FnOnce(Claim) -> Result<()>) -> Result<PathBuf> {
    let out_dir = root.join(&key[..32]);
    let train = out_dir.join(TRAIN);
    if SplitIndex::read(&train).is_ok() {
        return Ok(out_dir);
    }
    let claim = Claim::wait(&out_dir)?;
    if SplitIndex::read(&train).is_err() {
        make(claim)?;
    }
    Ok(out_dir)
}

fn key(inputs: &[PathBuf], wanted: Wanted, described: String, fingerprint: String) -> Result<String> {
    let mut parts = vec![described.into_bytes(), fingerprint.into_bytes()];
    for path in read::input_paths(inputs, wanted)? {
        parts.push(file_key(&path).map_err(|e| Error::io(&path, e))?);
    }
    Ok(sha256_parts(parts.iter().map(Vec::as_slice)))
}

fn file_key(path: &Path) -> std::io::Result<Vec<u8>> {
    let meta = path.metadata()?;
    let changed = meta.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let full = path.canonicalize()?;
    let mut key = full.as_os_str().as_encoded_bytes().to_vec();
    key.extend(format!("\0{} {changed}", meta.len()).into_bytes());
    Ok(key)
}
