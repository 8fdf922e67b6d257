//! Files and folders that appear whole or not at all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Writes `bytes` to `path`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// If the system refuses; `path` is as it was then.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = sibling(path, "tmp");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    if let Err(error) = write() {
        let _ = fs::remove_file(&temporary);
        return Err(Error::io(path, error));
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
/// Dropped without [`commit`](Self::commit), it is removed.
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
    /// If the system refuses.
    pub fn create(target: &Path) -> Result<Self> {
        if let Some(parent) = target.parent().filter(|p| !p.as_os_str().is_empty()) {
            fs::create_dir_all(parent).map_err(|e| Error::io(parent, e))?;
        }
        let temporary = sibling(target, "tmp");
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
    /// the two renames leaves it beside, as `.NAME.old-PID`, and the new one complete under its temporary name.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn commit_replacing(mut self) -> Result<()> {
        sync_tree(&self.temporary)?;
        let aside = sibling(&self.target, "old");
        let replaces = self.target.exists();
        if replaces {
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

fn sibling(path: &Path, kind: &str) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{kind}-{}", std::process::id()))
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(parent, e))
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).and_then(|file| file.sync_all()).map_err(|e| Error::io(&path, e))?;
        }
    }
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(dir, e))
}
