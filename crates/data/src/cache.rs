//! Raw files as prepared folders, prepared on first use.

use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::encode::Encode;
use crate::hash::sha256_parts;
use crate::prepare::{Claim, PrepareOptions, Progress, TRAIN, prepare_claimed};
use crate::read;
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
    let key = key(inputs, encoder, &options)?;
    let out_dir = cache.root.join(&key[..32]);
    let train = out_dir.join(TRAIN);
    if SplitIndex::read(&train).is_ok() {
        return Ok(train);
    }
    let claim = Claim::wait(&out_dir)?;
    if SplitIndex::read(&train).is_ok() {
        return Ok(train);
    }
    prepare_claimed(inputs, encoder, claim, &options, progress)?;
    Ok(train)
}

fn key(inputs: &[PathBuf], encoder: &dyn Encode, options: &PrepareOptions) -> Result<String> {
    let described =
        format!("{VERSION} {options:?} {} {:?}", encoder.vocab_size(), (encoder.eos_id(), encoder.bos_id()));
    let mut parts = vec![described.into_bytes(), encoder.fingerprint().into_bytes()];
    for path in read::input_paths(inputs)? {
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
