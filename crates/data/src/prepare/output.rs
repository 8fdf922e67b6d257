//! The output folder: claimed by one process, written aside, published by a rename.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use super::{TRAIN, VALID};
use crate::shard::INDEX_FILE;
use crate::{Error, Result};

/// The right to prepare into a folder, held through a locked file beside it. The system frees it when the process ends,
/// however it ends.
#[derive(Debug)]
pub(crate) struct Claim {
    out_dir: PathBuf,
    lock_path: PathBuf,
    _lock: File,
}

impl Claim {
    /// Claims `out_dir`, or says that another process has.
    pub(crate) fn try_take(out_dir: &Path) -> Result<Self> {
        Self::take(out_dir, |lock, path| match lock.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(Error::OutputBusy { path: out_dir.to_owned() }),
            Err(TryLockError::Error(e)) => Err(Error::io(path, e)),
        })
    }

    /// Claims `out_dir`, after waiting for another process that has.
    pub(crate) fn wait(out_dir: &Path) -> Result<Self> {
        Self::take(out_dir, |lock, path| lock.lock().map_err(|e| Error::io(path, e)))
    }

    fn take(out_dir: &Path, lock_it: impl Fn(&File, &Path) -> Result<()>) -> Result<Self> {
        let lock_path = beside(out_dir, "lock")?;
        if let Some(parent) = lock_path.parent() {
            std::fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        }
        loop {
            let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
            let lock = lock.map_err(|e| Error::io(&lock_path, e))?;
            lock_it(&lock, &lock_path)?;
            // Who held it before removed the file in leaving: a lock on a removed file keeps nobody out.
            if is_at(&lock, &lock_path) {
                return Ok(Self { out_dir: out_dir.to_owned(), lock_path, _lock: lock });
            }
        }
    }

    pub(crate) fn out_dir(&self) -> &Path {
        &self.out_dir
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Still locked here. A lock file that stays behind does no harm.
        drop(std::fs::remove_file(&self.lock_path));
    }
}

/// Whether the open file is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// An open file cannot be removed here.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// `.NAME.suffix` in the folder of `path`.
fn beside(path: &Path, suffix: &str) -> Result<PathBuf> {
    let Some(name) = path.file_name() else {
        return Err(Error::option("out", path.display(), "must name a folder, e.g. \"data/mine\""));
    };
    Ok(path.with_file_name(format!(".{}.{suffix}", name.to_string_lossy())))
}

/// A folder that is being filled; removed again unless it is published.
pub(super) struct PartialDir {
    claim: Claim,
    partial: PathBuf,
    overwrite: bool,
    published: bool,
}

impl PartialDir {
    /// An empty folder beside the claimed one, what a killed preparation left there being removed.
    pub(super) fn create(claim: Claim, overwrite: bool) -> Result<Self> {
        let out_dir = claim.out_dir();
        if !overwrite && is_in_use(out_dir)? {
            return Err(Error::OutputExists { path: out_dir.to_owned() });
        }
        if out_dir.exists() && !out_dir.is_dir() {
            return Err(Error::OutputExists { path: out_dir.to_owned() });
        }
        if overwrite && !is_replaceable(out_dir)? {
            let way_out = "choose another folder, or move them away";
            let reason = format!("{}: holds other things than prepared tokens; {way_out}", out_dir.display());
            return Err(Error::option("overwrite", true, reason));
        }
        let partial = beside(out_dir, "partial")?;
        remove(&partial)?;
        std::fs::create_dir(&partial).map_err(|e| Error::io(&partial, e))?;
        Ok(Self { claim, partial, overwrite, published: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name. What was there is put aside first and removed last: a kill between the two renames
    /// leaves it whole under `.NAME.old`.
    pub(super) fn publish(mut self) -> Result<PathBuf> {
        let out_dir = self.claim.out_dir().to_owned();
        let old = beside(&out_dir, "old")?;
        sync_dir(&self.partial)?;
        if is_in_use(&out_dir)? {
            if !self.overwrite {
                return Err(Error::OutputExists { path: out_dir });
            }
            remove(&old)?;
            std::fs::rename(&out_dir, &old).map_err(|e| Error::io(&out_dir, e))?;
        } else if out_dir.exists() {
            std::fs::remove_dir(&out_dir).map_err(|e| Error::io(&out_dir, e))?;
        }
        std::fs::rename(&self.partial, &out_dir).map_err(|e| Error::io(&out_dir, e))?;
        self.published = true;
        if let Some(parent) = out_dir.parent() {
            sync_dir(parent)?;
        }
        remove(&old)?;
        Ok(out_dir)
    }
}

impl Drop for PartialDir {
    fn drop(&mut self) {
        if !self.published {
            // An error is on its way already; what stays is removed by the next preparation.
            drop(std::fs::remove_dir_all(&self.partial));
        }
    }
}

fn is_in_use(dir: &Path) -> Result<bool> {
    match std::fs::read_dir(dir) {
        Ok(mut entries) => Ok(entries.next().is_some()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(e) if e.kind() == std::io::ErrorKind::NotADirectory => Ok(true),
        Err(e) => Err(Error::io(dir, e)),
    }
}

/// Whether all that lies in a folder was prepared. Nothing else is ever replaced, least of all the text itself.
fn is_replaceable(dir: &Path) -> Result<bool> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(true),
        Err(e) => return Err(Error::io(dir, e)),
    };
    for entry in entries {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let split = path.file_name().is_some_and(|name| name == TRAIN || name == VALID);
        if !split || !path.join(INDEX_FILE).is_file() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    // An empty parent is the working directory.
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, e))
}
