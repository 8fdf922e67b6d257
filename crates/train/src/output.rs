//! The run directory: whose it is, and what a killed process left in it.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use toml::Value;

use crate::resolve::Resolved;
use crate::{Error, Result};

const RESOLVED: &str = "resolved.toml";
/// What makes a directory one of a run.
const MARKS: [&str; 4] = [RESOLVED, "metrics.jsonl", "checkpoints", "final"];

/// Keys that a continued run must have as it was started: with others it would be another run.
const FIXED: [&str; 5] = ["seed", "model.", "data.context_length", "data.packing", "objective.kind"];
/// Keys that say where things are, not what is trained.
const PLACES: [&str; 3] = ["output", "model.from", "tokenizer.path"];

/// A run directory that this process alone writes to, until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct OutputClaim {
    path: PathBuf,
    changes: Vec<String>,
    /// The lock is on the directory itself, so that nothing has to be cleaned up after a kill.
    _lock: Option<File>,
}

impl OutputClaim {
    pub(crate) fn new(path: &Path, resume: bool, resolved: &Resolved) -> Result<Self> {
        if !resume {
            refuse_other_run(path)?;
        }
        fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let lock = lock(path)?;
        let changes = match resume {
            true => changes(path, resolved)?,
            false => vec![],
        };
        remove_leftovers(path)?;
        remove_leftovers(&path.join("checkpoints"))?;
        Ok(Self { path: path.into(), changes, _lock: lock })
    }

    /// What differs from the run that is continued, a line each.
    pub fn changes(&self) -> &[String] {
        &self.changes
    }

    /// Writes `resolved.toml`.
    ///
    /// # Errors
    /// If it cannot be written; an earlier one is as it was.
    pub fn write_resolved(&self, resolved: &Resolved) -> Result<()> {
        let path = self.path.join(RESOLVED);
        let text =
            toml::to_string(resolved).map_err(|e| Error::output(&path, format!("cannot be written as TOML: {e}")))?;
        Ok(tallow_formats::atomic_write(&path, text.as_bytes())?)
    }
}

/// Refuses a directory that holds a run.
pub(crate) fn refuse_other_run(path: &Path) -> Result<()> {
    match MARKS.iter().find(|mark| path.join(mark).exists()) {
        Some(mark) => {
            let way_out = "continue it with --resume, or choose another `output`";
            Err(Error::output(path, format!("holds another run ({mark}); {way_out}")))
        }
        None => Ok(()),
    }
}

/// Rows at once of the run in `path`, if there is one.
pub(crate) fn earlier_micro_batch(path: &Path) -> Option<usize> {
    let rows = earlier(path)?.get("micro_batch_size")?.as_integer()?;
    usize::try_from(rows).ok()
}

fn earlier(path: &Path) -> Option<toml::Table> {
    toml::from_str(&fs::read_to_string(path.join(RESOLVED)).ok()?).ok()
}

fn lock(path: &Path) -> Result<Option<File>> {
    let Ok(dir) = File::open(path) else { return Ok(None) };
    match dir.try_lock() {
        Ok(()) => Ok(Some(dir)),
        Err(TryLockError::WouldBlock) => {
            Err(Error::output(path, "another process is writing to this run; wait for it, or stop it"))
        }
        // Not every file system has locks, and not every system locks directories.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Compares with the run that is there: what may not change is an error, what may is told.
fn changes(path: &Path, resolved: &Resolved) -> Result<Vec<String>> {
    let Some(Value::Table(before)) = earlier(path).and_then(|mut table| table.remove("run")) else {
        return Ok(vec![]);
    };
    let Ok(Value::Table(now)) = Value::try_from(&resolved.run) else { return Ok(vec![]) };
    let (before, now) = (flat(&before), flat(&now));
    let mut keys: Vec<&String> = before.iter().chain(&now).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    let value_in = |list: &[(String, String)], key: &str| {
        list.iter().find(|(k, _)| k == key).map_or_else(|| "unset".to_owned(), |(_, value)| value.clone())
    };
    let mut told = vec![];
    for key in keys.into_iter().filter(|key| !PLACES.contains(&key.as_str())) {
        let (was, is) = (value_in(&before, key), value_in(&now, key));
        if was == is {
            continue;
        }
        if FIXED.iter().any(|fixed| key == fixed || (fixed.ends_with('.') && key.starts_with(fixed))) {
            let reason = format!("the run was started with {was}; set it back, or choose another `output`");
            return Err(Error::config(key, is, reason));
        }
        told.push(format!("note: {key} was {was} and is {is} from here on"));
    }
    Ok(told)
}

/// Every value by its dotted key.
fn flat(table: &toml::Table) -> Vec<(String, String)> {
    let mut all = vec![];
    for (key, value) in table {
        match value {
            Value::Table(inner) => all.extend(flat(inner).into_iter().map(|(k, v)| (format!("{key}.{k}"), v))),
            value => all.push((key.clone(), value.to_string())),
        }
    }
    all
}

/// Removes what a process that was killed had not finished: `.NAME.tmp-PID-N` and `.NAME.old-PID-N` of atomic writes,
/// `removing-N` of pruning, `NAME.PID.tmp`. What had been moved aside for something that never took its place gets its
/// name back: it may be the only good checkpoint. Only the holder of the lock may.
fn remove_leftovers(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let (name, path) = (entry.file_name(), entry.path());
        let Some(name) = name.to_str().filter(|name| is_leftover(name)) else { continue };
        let done = match unfinished(name) {
            Some((target, "old")) if !dir.join(target).exists() => fs::rename(&path, dir.join(target)),
            _ if path.is_dir() => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        done.map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}

fn is_leftover(name: &str) -> bool {
    if let Some(rest) = name.strip_prefix("removing-") {
        return number(rest);
    }
    if let Some((before, pid)) = name.strip_suffix(".tmp").and_then(|n| n.rsplit_once('.')) {
        return number(pid) && ["metrics.jsonl", "curve.svg"].contains(&before);
    }
    unfinished(name).is_some()
}

/// `NAME`, and `tmp` or `old`, of the `.NAME.tmp-PID-N` and `.NAME.old-PID-N` of an atomic write of ours.
fn unfinished(name: &str) -> Option<(&str, &str)> {
    let (rest, count) = name.strip_prefix('.')?.rsplit_once('-')?;
    let (rest, pid) = rest.rsplit_once('-')?;
    let (target, kind) = rest.rsplit_once('.')?;
    let ours = MARKS.contains(&target) || target.strip_prefix("step-").is_some_and(number);
    (ours && number(pid) && number(count) && ["tmp", "old"].contains(&kind)).then_some((target, kind))
}

fn number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_kill_leaves_is_a_leftover() {
        for name in [
            ".final.tmp-17-0",
            ".step-20.old-3-12",
            ".resolved.toml.tmp-9-4",
            "removing-40",
            "metrics.jsonl.8.tmp",
            "curve.svg.8.tmp",
        ] {
            assert!(is_leftover(name), "{name}");
        }
        for name in [
            "final",
            "step-20",
            ".notes.tmp-17-0",
            "removing-me",
            ".final.tmp-x-0",
            "notes.8.tmp",
            ".tmp-1-0",
            "step-2.tmp",
        ] {
            assert!(!is_leftover(name), "{name}");
        }
    }

    /// The names are those that `AtomicDir` gives, whatever they are.
    #[test]
    fn what_a_killed_write_leaves_is_removed_and_what_it_moved_aside_comes_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let unfinished = tallow_formats::AtomicDir::create(&dir.path().join("step-4")).expect("made");
        std::mem::forget(unfinished);
        for aside in [".step-8.old-17-3", ".step-6.old-17-1", "step-6"] {
            fs::create_dir(dir.path().join(aside)).expect("made");
        }
        remove_leftovers(dir.path()).expect("removed");
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).expect("read").map(|entry| entry.expect("an entry").file_name()).collect();
        left.sort();
        assert_eq!(left, ["step-6", "step-8"]);
    }

    #[test]
    fn a_directory_with_any_part_of_a_run_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        refuse_other_run(dir.path()).expect("empty");
        refuse_other_run(&dir.path().join("none")).expect("not there");
        fs::create_dir(dir.path().join("checkpoints")).expect("made");
        let message = refuse_other_run(dir.path()).expect_err("a run").to_string();
        assert!(message.contains("--resume") && message.contains("checkpoints"), "{message}");
    }

    #[test]
    fn two_processes_never_write_to_one_directory() {
        let dir = tempfile::tempdir().expect("a folder");
        let first = lock(dir.path()).expect("free");
        if first.is_some() {
            assert!(lock(dir.path()).expect_err("taken").to_string().contains("another process"));
        }
        drop(first);
        lock(dir.path()).expect("free again");
    }
}
