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
/// Keys that decide which adapter is trained.
const OF_ADAPTERS: [&str; 1] = ["adapter."];
/// Keys that decide which tokens are trained on, the likeliest to be changed first.
const OF_DATA: [&str; 9] = [
    "tokenizer.add_tokens",
    "tokenizer.add_special_tokens",
    "tokenizer.chat_template",
    "data.train",
    "data.valid_fraction",
    "data.",
    "objective.",
    "tokenizer.path",
    "model.from",
];
/// Keys of those sections that may change at any time.
const FREE: [&str; 8] = [
    "adapter.dropout",
    "adapter.lr_ratio",
    "adapter.init",
    "data.valid",
    "data.on_malformed",
    "objective.z_loss",
    "objective.label_smoothing",
    "objective.neftune_alpha",
];
/// What makes a directory one of a model or an adapter; a `config.json` does if it is a model's.
const MODEL: [&str; 5] = [
    "adapter_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
];
/// An `adapter.init` that an adapter keeps; any other counts until the first step only.
const KEPT_INIT: &str = "\"olora\"";

/// A run directory that this process alone writes to, until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct OutputClaim {
    path: PathBuf,
    changes: Vec<Change>,
    /// The lock is on the directory itself, so that nothing has to be cleaned up after a kill.
    _lock: Option<File>,
}

impl OutputClaim {
    pub(crate) fn new(path: &Path, resume: bool, resolved: &Resolved) -> Result<Self> {
        match resume {
            true if path.exists() => check_resumable(path)?,
            _ => check_new(path)?,
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
    pub fn changes(&self) -> Vec<String> {
        self.changes.iter().filter(|change| !PLACES.contains(&change.key.as_str())).map(Change::in_words).collect()
    }

    /// The keys of [`changes`](Self::changes).
    pub fn changed_keys(&self) -> impl Iterator<Item = &str> {
        self.changes.iter().map(|change| change.key.as_str()).filter(|key| !PLACES.contains(key))
    }

    /// An error of [`Trainer::resume`](crate::Trainer::resume) with the keys that differ from the run that is continued, where it
    /// says only that data or modules do.
    pub fn explain(&self, error: Error) -> Error {
        let (kind, said) = match &error {
            Error::Config { key, .. } if key == "adapter" || key == "adapter.init" => (&OF_ADAPTERS[..], None),
            Error::Data(tallow_data::Error::State { .. }) => (&OF_DATA[..], Some(error.to_string())),
            Error::Config { key, .. } if key == "tokenizer.chat_template" => (&OF_DATA[..], None),
            _ => return error,
        };
        let mut found: Vec<&Change> = vec![];
        for pattern in kind {
            let of = |change: &&Change| {
                change.key == *pattern || (pattern.ends_with('.') && change.key.starts_with(pattern))
            };
            let new = self.changes.iter().filter(of).filter(|change| change.decides());
            found.extend(new.filter(|change| !found.iter().any(|other| other.key == change.key)).collect::<Vec<_>>());
        }
        // Where things are may have changed with nothing in them: the error itself says more.
        if found.iter().all(|change| PLACES.contains(&change.key.as_str())) {
            return also_changed(error, &found);
        }
        let Some((first, others)) = found.split_first() else { return error };
        let others: Vec<String> = others.iter().map(|c| format!("{} = {}, was {}", c.key, c.is, c.was)).collect();
        let others = if others.is_empty() { String::new() } else { format!(" (and {})", others.join("; ")) };
        let said = said.map(|said| format!("; {said}")).unwrap_or_default();
        let way_out = "set it back, or choose another `output`";
        let was = &first.was;
        Error::config(&first.key, &first.is, format!("the run was started with {was}{others}; {way_out}{said}"))
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

/// Refuses to begin a run in a directory that holds another or a model, or that is a part of another.
///
/// # Errors
/// If a run cannot begin there.
pub fn check_new(path: &Path) -> Result<()> {
    let elsewhere = "choose another `output`";
    check_apart(path, elsewhere)?;
    if let Some(mark) = MARKS.iter().find(|mark| path.join(mark).exists()) {
        let way_out = match can_go_on(path) {
            true => "continue it with --resume, or choose another `output`",
            false => elsewhere,
        };
        return Err(Error::output(path, format!("holds another run ({mark}); {way_out}")));
    }
    check_no_model(path, elsewhere)
}

/// Refuses to continue what is another's: a model, or a part of another run. Where there is no run yet, the run starts: a
/// process may have been killed before its first line.
///
/// # Errors
/// If `path` is not there, or holds something else.
pub fn check_resumable(path: &Path) -> Result<()> {
    if !path.exists() {
        return Err(Error::output(path, "there is no run to continue; leave out --resume to start one"));
    }
    if !path.is_dir() {
        return Err(Error::output(path, "is no folder; choose another `output`"));
    }
    if path.join(RESOLVED).is_file() {
        return Ok(());
    }
    let elsewhere = "choose another `output`, and leave out --resume to start a run there";
    check_apart(path, elsewhere)?;
    check_no_model(path, elsewhere)?;
    match MARKS.iter().find(|mark| path.join(mark).exists()) {
        Some(mark) if !can_go_on(path) => {
            let reason = format!("holds {mark} of a run, but neither {RESOLVED} nor checkpoints to continue from");
            Err(Error::output(path, format!("{reason}; {elsewhere}")))
        }
        _ => Ok(()),
    }
}

/// Whether there is anything that a run can be continued from.
fn can_go_on(path: &Path) -> bool {
    path.join(RESOLVED).is_file() || path.join("checkpoints").is_dir()
}

/// Refuses what is a part of another run, by whatever name it is called.
fn check_apart(path: &Path, way_out: &str) -> Result<()> {
    let whole = real(path)?;
    let part = |dir: &Path| dir.file_name().is_some_and(|name| name == "final" || name == "checkpoints");
    let of_run = |dir: &&Path| part(dir) && dir.parent().is_some_and(|run| run.join(RESOLVED).is_file());
    let Some(run) = whole.ancestors().find(of_run).and_then(Path::parent) else { return Ok(()) };
    // As it was written, as far as it was.
    let same = |dir: &&Path| *dir != Path::new("") && dir.canonicalize().is_ok_and(|dir| dir == run);
    let shown = path.ancestors().find(same).unwrap_or(run);
    Err(Error::output(path, format!("is a part of the run in {}; {way_out}", shown.display())))
}

/// Where `path` is, or would be, with every link followed.
fn real(path: &Path) -> Result<PathBuf> {
    let whole = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    let there = whole.ancestors().find_map(|dir| Some((dir, dir.canonicalize().ok()?)));
    Ok(match there.and_then(|(dir, real)| Some((real, whole.strip_prefix(dir).ok()?))) {
        Some((real, rest)) if rest == Path::new("") => real,
        Some((real, rest)) => real.join(rest),
        None => whole,
    })
}

fn check_no_model(path: &Path, way_out: &str) -> Result<()> {
    let config = of_model(&path.join("config.json")).then_some("config.json");
    match config.or_else(|| MODEL.into_iter().find(|mark| path.join(mark).exists())) {
        Some(mark) => Err(Error::output(path, format!("holds a model ({mark}); {way_out}"))),
        None => Ok(()),
    }
}

/// Whether a `config.json` is that of a model: many programs call theirs so.
fn of_model(config: &Path) -> bool {
    let keys = fs::read(config).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    keys.is_some_and(|keys| ["model_type", "architectures"].iter().any(|key| keys.get(key).is_some()))
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

/// A key that has another value than the run was started with.
#[derive(Clone, Debug)]
struct Change {
    key: String,
    was: String,
    is: String,
}

impl Change {
    fn in_words(&self) -> String {
        let Self { key, was, is } = self;
        match key.as_str() {
            "adapter.init" if !self.of_kept_init() => {
                format!("note: {key} was {was} and is {is}, which counts at the start of a run only")
            }
            _ => format!("note: {key} was {was} and is {is} from here on"),
        }
    }

    fn of_kept_init(&self) -> bool {
        self.key == "adapter.init" && [&self.was, &self.is].contains(&&KEPT_INIT.to_owned())
    }

    /// Whether another value can make it another adapter, or other data.
    fn decides(&self) -> bool {
        self.of_kept_init() || !FREE.contains(&self.key.as_str())
    }
}

/// The same error, which also names keys that have another value than the run was started with.
fn also_changed(error: Error, keys: &[&Change]) -> Error {
    if keys.is_empty() {
        return error;
    }
    let keys: Vec<String> = keys.iter().map(|c| format!("{} = {}, was {}", c.key, c.is, c.was)).collect();
    let also = format!(" (also changed: {})", keys.join("; "));
    match error {
        Error::Config { at, key, value, reason } => Error::Config { at, key, value, reason: reason + &also },
        Error::Data(tallow_data::Error::State { what, was, now, way_out }) => {
            Error::Data(tallow_data::Error::State { what, was, now, way_out: way_out + &also })
        }
        other => other,
    }
}

/// Compares with the run that is there: what may not change is an error.
fn changes(path: &Path, resolved: &Resolved) -> Result<Vec<Change>> {
    let Some(Value::Table(before)) = earlier(path).and_then(|mut table| table.remove("run")) else {
        return Ok(vec![]);
    };
    let Ok(Value::Table(now)) = Value::try_from(&resolved.run) else { return Ok(vec![]) };
    if before.contains_key("adapter") != now.contains_key("adapter") {
        let (is, was) = match now.contains_key("adapter") {
            true => ("(a section)", "without [adapter]: it trains all of the model"),
            false => ("(missing)", "with [adapter]: it trains one beside the model"),
        };
        let reason = format!("the run was started {was}; set it back, or choose another `output`");
        return Err(Error::config("adapter", is, reason));
    }
    let (before, now) = (flat(&before), flat(&now));
    let mut keys: Vec<&String> = before.iter().chain(&now).map(|(key, _)| key).collect();
    keys.sort();
    keys.dedup();
    let value_in = |list: &[(String, String)], key: &str| {
        list.iter().find(|(k, _)| k == key).map_or_else(|| "unset".to_owned(), |(_, value)| value.clone())
    };
    let mut changes = vec![];
    for key in keys.into_iter().filter(|key| *key != "output") {
        let (was, is) = (value_in(&before, key), value_in(&now, key));
        if was == is {
            continue;
        }
        let fixed = FIXED.iter().any(|fixed| key == fixed || (fixed.ends_with('.') && key.starts_with(fixed)));
        if fixed && !PLACES.contains(&key.as_str()) {
            let reason = format!("the run was started with {was}; set it back, or choose another `output`");
            return Err(Error::config(key, is, reason));
        }
        changes.push(Change { key: key.clone(), was, is });
    }
    Ok(changes)
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
        check_new(dir.path()).expect("empty");
        check_new(&dir.path().join("none")).expect("not there");
        fs::create_dir(dir.path().join("checkpoints")).expect("made");
        let message = check_new(dir.path()).expect_err("a run").to_string();
        assert!(message.contains("--resume") && message.contains("checkpoints"), "{message}");
        fs::write(dir.path().join(RESOLVED), "").expect("written");
        for part in ["final", "final/again", "checkpoints/step-4"] {
            let message = check_new(&dir.path().join(part)).expect_err("a part of a run").to_string();
            assert!(message.contains("a part of the run"), "{message}");
        }
        let model = tempfile::tempdir().expect("a folder");
        fs::write(model.path().join("config.json"), "{\"port\": 80}").expect("written");
        check_new(model.path()).expect("of another program");
        check_resumable(model.path()).expect("of another program");
        fs::write(model.path().join("config.json"), "{\"model_type\": \"llama\"}").expect("written");
        let message = check_resumable(model.path()).expect_err("a model").to_string();
        assert!(message.contains("holds a model (config.json)") && message.contains("leave out --resume"), "{message}");
        let message = check_new(model.path()).expect_err("a model").to_string();
        assert!(message.contains("holds a model (config.json)"), "{message}");
    }

    #[test]
    fn a_part_of_a_run_is_one_by_any_name() {
        let dir = tempfile::tempdir().expect("a folder");
        let (run, latest) = (dir.path().join("runs/a"), dir.path().join("latest"));
        fs::create_dir_all(run.join("final")).expect("made");
        fs::write(run.join(RESOLVED), "").expect("written");
        check_new(&run.join("final/../../../next")).expect("beside it");
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(run.join("final"), &latest).expect("linked");
            for name in ["", "next", "next/further"] {
                let message = check_new(&latest.join(name)).expect_err("within a run").to_string();
                assert!(message.contains("a part of the run"), "{message}");
            }
            let message = check_resumable(&latest).expect_err("within a run").to_string();
            assert!(message.contains("a part of the run") && message.contains("leave out --resume"), "{message}");
        }
    }

    #[test]
    fn what_is_nothing_of_another_is_continued() {
        let dir = tempfile::tempdir().expect("a folder");
        check_resumable(&dir.path().join("none")).expect_err("not there");
        check_resumable(dir.path()).expect("empty");
        fs::write(dir.path().join(".resolved.toml.tmp-9-4"), "").expect("written");
        check_resumable(dir.path()).expect("killed while it wrote its first file");
        for file in ["run.toml", "train.log"] {
            fs::write(dir.path().join(file), "").expect("written");
        }
        check_resumable(dir.path()).expect("killed before its first file");
        fs::create_dir(dir.path().join("final")).expect("made");
        for message in [check_resumable(dir.path()), check_new(dir.path())] {
            let message = message.expect_err("nothing to go on with").to_string();
            assert!(message.contains("choose another `output`") && !message.contains("with --resume"), "{message}");
        }
        fs::create_dir(dir.path().join("checkpoints")).expect("made");
        let message = check_new(dir.path()).expect_err("a run").to_string();
        assert!(message.contains("continue it with --resume"), "{message}");
        check_resumable(dir.path()).expect("checkpoints to go on from");
        fs::write(dir.path().join(RESOLVED), "").expect("written");
        check_resumable(dir.path()).expect("a run");
    }

    #[test]
    fn where_things_are_does_not_hide_what_differs() {
        let change = |key: &str| Change { key: key.into(), was: "\"a\"".into(), is: "\"b\"".into() };
        let claim = |keys: &[&str]| OutputClaim {
            path: PathBuf::new(),
            changes: keys.iter().map(|key| change(key)).collect(),
            _lock: None,
        };
        let error = || {
            Error::Data(tallow_data::Error::State {
                what: "the training data",
                was: "1".into(),
                now: "2".into(),
                way_out: "train on the same".into(),
            })
        };
        let said = claim(&["model.from"]).explain(error()).to_string();
        assert!(said.starts_with(&error().to_string()), "{said}");
        assert!(said.ends_with("(also changed: model.from = \"b\", was \"a\")"), "{said}");
        let said = claim(&["model.from", "data.train"]).explain(error()).to_string();
        assert!(said.contains("`data.train`") && said.contains("and model.from"), "{said}");
        assert_eq!(claim(&[]).explain(error()).to_string(), error().to_string());
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
