//! Files and folders that appear whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Writes `bytes` to `path`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// If the system refuses; `path` is as it was then.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<()> {
    atomic_write_with(path, |file| file.write_all(bytes).map_err(|e| Error::io(path, e)))
}

/// As [`atomic_write`], the file being written by `write`.
pub(crate) fn atomic_write_with(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let temporary = sibling(path, "tmp")?;
    let io = |e| Error::io(path, e);
    let whole = || -> Result<()> {
        let mut file = File::create(&temporary).map_err(io)?;
        write(&mut file)?;
        file.sync_all().map_err(io)?;
        fs::rename(&temporary, path).map_err(io)
    };
    if let Err(error) = whole() {
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    sync_parent(path)
}

/// Writes a value as JSON, indented, atomically.
///
/// # Errors
/// As [`atomic_write`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::malformed(path, format!("no JSON: {e}")))?;
    text.push(b'\n');
    atomic_write(path, &text)
}

/// SHA-256 of a file, lower-case hexadecimal.
///
/// # Errors
/// If the file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(|e| Error::io(path, e))? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A folder that is filled under another name and appears by a rename when all of it is on the disk.
///
/// Dropped without [`commit_replacing`](Self::commit_replacing), it is removed.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: PathBuf,
    target: PathBuf,
    done: bool,
}

impl AtomicDir {
    /// Makes the temporary folder beside `target`, and missing parents.
    ///
    /// # Errors
    /// If the system refuses, or there is a file at `target`.
    pub fn create(target: &Path) -> Result<Self> {
        let temporary = sibling(target, "tmp")?;
        refuse_file(target)?;
        if let Some(parent) = target.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        }
        // No other writer of this process has this name: what is there was left by a killed process of the same number.
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
        }
        fs::create_dir(&temporary).map_err(|e| Error::io(&temporary, e))?;
        Ok(Self { temporary, target: target.to_path_buf(), done: false })
    }

    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// Makes the folder appear. An earlier one of the same name is moved aside first and removed last: a kill between
    /// the two renames leaves it beside, as `.NAME.old-PID-N`, and the new one complete under its temporary name.
    ///
    /// # Errors
    /// If the system refuses; an earlier folder is as it was then, and the new one is removed.
    pub fn commit_replacing(mut self) -> Result<()> {
        sync_tree(&self.temporary)?;
        refuse_file(&self.target)?;
        let aside = sibling(&self.target, "old")?;
        let replaces = self.target.exists();
        if replaces {
            // Left by a killed process of the same number, and replaced since: `target` is whole.
            if aside.exists() {
                fs::remove_dir_all(&aside).map_err(|e| Error::io(&aside, e))?;
            }
            fs::rename(&self.target, &aside).map_err(|e| Error::io(&self.target, e))?;
        }
        if let Err(error) = fs::rename(&self.temporary, &self.target) {
            if replaces {
                let _ = fs::rename(&aside, &self.target);
            }
            return Err(Error::io(&self.target, error));
        }
        self.done = true;
        sync_parent(&self.target)?;
        if replaces {
            fs::remove_dir_all(&aside).map_err(|e| Error::io(&aside, e))?;
        }
        Ok(())
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

fn refuse_file(target: &Path) -> Result<()> {
    match target.exists() && !target.is_dir() {
        true => Err(Error::malformed(target, "is a file where a folder is to be written; choose another name")),
        false => Ok(()),
    }
}

/// A name beside `path` that no other writer of this process or of one that runs now has.
fn sibling(path: &Path, kind: &str) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let Some(file_name) = path.file_name() else {
        return Err(Error::malformed(path, "names no file or folder that could be written"));
    };
    let mut name = OsString::from(".");
    name.push(file_name);
    name.push(format!(".{kind}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(name))
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_folder(parent),
        _ => sync_folder(Path::new(".")),
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(|e| Error::io(dir, e))?);
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|file| file.sync_all()).map_err(|e| Error::io(&path, e))?;
        }
    }
    sync_folder(dir)
}

/// Only Unix lets a folder be opened to sync its entries.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(dir, e))?;
    }
    Ok(())
}
