//! Reading a run file: TOML and `--set`, and errors that name file, line, key, value, reason and nearest key.

use std::path::{Path, PathBuf};

use serde_path_to_error::Segment;
use toml::de::DeTable;

use super::RunConfig;
use crate::reference::key_names;
use crate::{Error, Result};

/// The longest part of a value that a message shows.
const SHOWN: usize = 60;

/// Keys of which a run has one: with `--set` of one, those of the file are replaced.
const EXCLUSIVE: [&[&str]; 3] = [
    &["train.steps", "train.tokens", "train.epochs"],
    &["model.preset", "model.from"],
    &["data.valid", "data.valid_fraction"],
];

/// Values that switch a key off, so that nothing is excluded by it.
const NOTHING: [&str; 4] = ["0", "0.0", "[]", ""];

/// What a user wrote: the run file and what is set on top of it.
#[derive(Clone, Debug)]
pub struct Source {
    path: PathBuf,
    text: String,
    set: Vec<String>,
    /// Assignments below those of the file.
    defaults: Vec<(String, String)>,
}

impl Source {
    /// Reads the run file at `path`.
    ///
    /// # Errors
    /// If it cannot be read as text.
    pub fn read(path: &Path, set: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => {
                Error::Parse { path: path.into(), line: 1, message: "is not a text file in UTF-8".into() }
            }
            _ => Error::io(path, e),
        })?;
        Ok(Self::new(&text, path, set))
    }

    /// The text of a run file; `path` is for messages.
    pub fn new(text: &str, path: &Path, set: &[String]) -> Self {
        Self { path: path.into(), text: text.into(), set: set.to_vec(), defaults: vec![] }
    }

    /// The same, with a key that has another default than usual.
    #[must_use]
    pub fn with_default(mut self, key: &str, value: &str) -> Self {
        self.defaults.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Whether the file or `--set` gives `key` a value.
    pub fn says(&self, key: &str) -> bool {
        let said = Self { defaults: vec![], ..self.clone() };
        said.table().is_ok_and(|table| written(&table, key).is_some())
    }

    /// The configuration that it amounts to.
    ///
    /// # Errors
    /// If it is not TOML, or a key is unknown or of the wrong type.
    pub fn config(&self) -> Result<RunConfig> {
        let table = self.table()?;
        // Serde forgets where it is inside a flattened section.
        for key in ["preset", "from"] {
            let value = table.get("model").and_then(|model| model.get(key));
            if value.is_some_and(|value| !value.is_str()) {
                let reason = "must be text, e.g. preset = \"llama-14m\"";
                return Err(self.locate(Error::config(&format!("model.{key}"), "", reason)));
            }
        }
        serde_path_to_error::deserialize(table.clone()).map_err(|error| {
            let keys = error.path().iter().filter_map(|segment| match segment {
                Segment::Map { key } => Some(key.as_str()),
                _ => None,
            });
            let key = keys.collect::<Vec<_>>().join(".");
            let reason = reason(error.inner().message(), &key, written(&table, &key).as_deref());
            self.locate(Error::config(&key, "", reason))
        })
    }

    /// What `--set` did beyond its own keys, a line each.
    pub fn notes(&self) -> Vec<String> {
        let Ok(mut table) = toml::from_str::<toml::Table>(&self.text) else { return vec![] };
        let mut notes = self.replace(&mut table);
        let adapts = self.set.iter().find(|s| s.trim_start().starts_with("adapter."));
        if let (Some(set), None) = (adapts, table.get("adapter")) {
            let path = self.path.display();
            notes.push(format!("note: {path} has no [adapter]: --set {set} makes it a run of an adapter"));
        }
        notes
    }

    /// Takes keys of the file out that exclude the one of `--set`, and says which.
    fn replace(&self, table: &mut toml::Table) -> Vec<String> {
        let set = self.set.iter().filter_map(|s| s.split_once('=')).map(|(key, value)| (key.trim(), value.trim()));
        let set: Vec<(&str, &str)> = set.filter(|(_, value)| !NOTHING.contains(value)).collect();
        let mut notes = vec![];
        for group in EXCLUSIVE {
            let mut of_group = set.iter().filter(|(key, _)| group.contains(key));
            let Some((key, value)) = of_group.next() else { continue };
            if of_group.any(|(other, _)| other != key) {
                continue;
            }
            for other in group.iter().filter(|other| *other != key) {
                let Some(was) = written(table, other) else { continue };
                let Some((section, name)) = other.split_once('.') else { continue };
                table.get_mut(section).and_then(toml::Value::as_table_mut).and_then(|section| section.remove(name));
                let path = self.path.display();
                notes.push(format!("note: --set {key}={} replaces {other} = {was} of {path}", cut(value)));
            }
        }
        notes
    }

    /// The file's table with `--set` applied.
    fn table(&self) -> Result<toml::Table> {
        let mut table: toml::Table = toml::from_str(&self.text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = line_of(&self.text, start);
            let shown = self.text.lines().nth(line - 1).map(str::trim).filter(|l| !l.is_empty());
            let message = error.message().to_owned();
            let message = shown.map_or(message.clone(), |shown| format!("{message} (in `{}`)", cut(shown)));
            Error::Parse { path: self.path.clone(), line, message }
        })?;
        self.replace(&mut table);
        for assignment in &self.set {
            apply(&mut table, assignment)?;
        }
        for (key, value) in self.defaults.iter().filter(|(key, _)| written(&table, key).is_none()).collect::<Vec<_>>() {
            apply(&mut table, &format!("{key}={value}"))?;
        }
        Ok(table)
    }

    /// The same error, saying where its key was written and what was written there.
    pub fn locate(&self, error: Error) -> Error {
        match named(error) {
            Error::Config { at, key, value, reason } if at.is_empty() => {
                let written = self.table().ok().and_then(|table| written(&table, &key));
                let value = if value.is_empty() { written.unwrap_or_else(|| "(unset)".into()) } else { value };
                Error::Config { at: self.place(&key), key, value, reason }
            }
            other => other,
        }
    }

    fn place(&self, key: &str) -> String {
        let set: Vec<&str> = self.set.iter().filter_map(|s| Some(s.split_once('=')?.0.trim())).collect();
        if set.contains(&key) {
            return "--set ".into();
        }
        match offset(&self.text, key) {
            Some(at) => format!("{}:{}: ", self.path.display(), line_of(&self.text, at)),
            // A whole section may be there by --set alone.
            None if set.iter().any(|s| s.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'))) => {
                "--set ".into()
            }
            None => format!("{}: ", self.path.display()),
        }
    }
}

/// A model's complaint about one of its keys, as one about `[model]` of the run file.
fn named(error: Error) -> Error {
    use tallow_models::Error as Model;
    match error {
        Error::Model(Model::Config { at, key, reason }) if at.is_empty() => {
            Error::Config { at, key: format!("model.{key}"), value: String::new(), reason }
        }
        Error::Model(Model::Layer(tallow_nn::Error::Config { key, value, reason }))
        | Error::Layer(tallow_nn::Error::Config { key, value, reason }) => {
            Error::Config { at: String::new(), key: format!("model.{key}"), value, reason }
        }
        Error::Model(Model::Preset { name, known }) => {
            let near = nearest(&name, known.split(", "));
            let reason = format!("is neither a file nor one of {known}; the nearest is `{near}`");
            Error::Config { at: String::new(), key: "model.preset".into(), value: format!("{name:?}"), reason }
        }
        Error::Model(Model::Architecture { at, name, nearest, supported }) if at.is_empty() => {
            let reason = format!("is not supported; the nearest is `{nearest}`; supported are: {supported}");
            Error::Config { at: String::new(), key: "model.architectures".into(), value: format!("{name:?}"), reason }
        }
        other => other,
    }
}

/// What is known by the name of a kind but is set by another key: key, value, and the way to it.
const MEANT: [(&str, &str, &str); 10] = [
    ("adapter.kind", "qlora", "QLoRA is lora beside a quantized base: set adapter.quantize = \"nf4\""),
    ("adapter.kind", "olora", "OLoRA is a way for lora to start: set adapter.init = \"olora\""),
    ("adapter.kind", "pissa", "PiSSA is not there; adapter.init = \"olora\" starts within the matrix as well"),
    ("adapter.kind", "rslora", "rsLoRA is lora with another scale: set adapter.rslora = true"),
    ("adapter.kind", "lora+", "LoRA+ is lora with two learning rates: set adapter.lr_ratio = 16"),
    ("adapter.kind", "qdora", "it is dora beside a quantized base: set adapter.quantize = \"nf4\""),
    ("adapter.kind", "full", "without the section [adapter] all of the model is trained"),
    ("adapter.kind", "none", "without the section [adapter] all of the model is trained"),
    ("adapter.init", "pissa", "PiSSA is not there; the nearest is `olora`, which starts within the matrix as well"),
    ("adapter.init", "default", "PEFT's default is `kaiming`"),
];

/// What a person calls it, with the nearest of the keys that serde says it expected. `written` is what stands at `key`, as TOML.
fn reason(message: &str, key: &str, written: Option<&str>) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    match (message.split(' ').next(), quoted.next()) {
        (Some("unknown"), Some(unknown)) if message.starts_with("unknown field") => match elsewhere(unknown) {
            Some(key) => format!("there is no such key; the nearest is `{key}`"),
            None => format!("there is no such key; the nearest is `{}`", nearest(unknown, quoted)),
        },
        (Some("unknown"), Some(unknown)) => {
            let known: Vec<&str> = quoted.collect();
            let meant = MEANT.iter().find(|(k, value, _)| *k == key && value.eq_ignore_ascii_case(unknown));
            let near = match meant {
                Some((.., way)) => (*way).to_owned(),
                None => format!("the nearest is `{}`", nearest(unknown, known.iter().copied())),
            };
            format!("must be one of {}; {near}", known.join(", "))
        }
        (Some("invalid"), _) if message.ends_with("expected a sequence") => {
            // A line to copy holds all of the value, or none.
            let whole = written.filter(|value| value.chars().count() <= SHOWN && *value != "(a section)");
            let (leaf, value) = (key.rsplit('.').next().unwrap_or(key), whole.unwrap_or("\"..\""));
            format!("must be a list, e.g. {leaf} = [{value}]")
        }
        (Some("invalid"), _) if message.ends_with("expected an array of length 2") => {
            "must be a list of two numbers, e.g. [0.9, 0.95]".into()
        }
        (Some("invalid"), _) if message.ends_with("expected a map") => {
            let leaf = key.rsplit('.').next().unwrap_or(key);
            format!("must be a table, e.g. {leaf} = {{ q_proj = 8 }}")
        }
        _ if message.contains("TargetsSetting") => "must be text or a list of texts, e.g. \"all-linear\"".into(),
        _ => {
            let expected = [("usize", "a whole number"), ("u64", "a whole number"), ("f64", "a number")];
            let found = expected.iter().find_map(|(rust, said)| Some((message.strip_suffix(rust)?, said)));
            found.map_or_else(|| message.trim().to_owned(), |(start, said)| format!("{start}{said}"))
        }
    }
}

/// The one key of the run file that has this name, in whatever section.
fn elsewhere(name: &str) -> Option<String> {
    let mut found = key_names().into_iter().filter(|key| key.rsplit('.').next() == Some(name));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn nearest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    known.max_by(|a, b| strsim::jaro(a, word).total_cmp(&strsim::jaro(b, word))).unwrap_or_default().to_owned()
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset.min(text.len())].iter().filter(|&&b| b == b'\n').count() + 1
}

/// Where the last part of a dotted key stands in the file, or the nearest part above it that is there.
fn offset(text: &str, key: &str) -> Option<usize> {
    let root = DeTable::parse(text).ok()?;
    let mut table = root.get_ref();
    let mut found = None;
    for part in key.split('.') {
        let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref() == part) else { break };
        found = Some(name.span().start);
        match value.get_ref().as_table() {
            Some(inner) => table = inner,
            None => break,
        }
    }
    found
}

/// The value of a dotted key, as TOML, in a length for a message.
fn written(table: &toml::Table, key: &str) -> Option<String> {
    let mut parts = key.split('.');
    let first = table.get(parts.next()?)?;
    let value = parts.try_fold(first, |value, part| value.get(part))?;
    Some(if value.is_table() { "(a section)".into() } else { cut(&value.to_string()) })
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text.to_owned(),
    }
}

/// Sets `a.b=value` in a table; the value is TOML, or text where it is not.
fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let (key, value) = assignment.split_once('=').unwrap_or((assignment, "(nothing)"));
    let wrong =
        |reason: &str| Error::Config { at: "--set ".into(), key: cut(key), value: cut(value), reason: reason.into() };
    if !assignment.contains('=') {
        return Err(wrong("must be key=value, e.g. train.steps=100"));
    }
    let value = value.trim();
    let value = match toml::from_str::<toml::Table>(&format!("v = {value}")) {
        Ok(mut parsed) if parsed.len() == 1 => parsed.remove("v").ok_or_else(|| wrong("has no value"))?,
        _ => toml::Value::String(value.to_owned()),
    };
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let leaf = parts.pop().filter(|leaf| !leaf.is_empty()).ok_or_else(|| wrong("has no key"))?;
    let mut at = table;
    for part in parts {
        let entry = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().ok_or_else(|| wrong("goes through a key that is not a section"))?;
    }
    at.insert(leaf.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, set: &[&str]) -> String {
        let set: Vec<String> = set.iter().map(ToString::to_string).collect();
        let source = Source::new(text, Path::new("run.toml"), &set);
        let result = source.config().and_then(|config| config.validate().map_err(|e| source.locate(e)));
        result.err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_typo_names_file_line_key_value_and_nearest_key() {
        let message = error("seed = 1\n[train]\nstep = 5\n", &[]);
        assert_eq!(message, "run.toml:3: `train.step` = 5: there is no such key; the nearest is `steps`");
        let message = error("[trian]\nsteps = 5\n", &[]);
        assert_eq!(message, "run.toml:1: `trian` = (a section): there is no such key; the nearest is `train`");
        let message = error("\ntrain.step = 5\n", &[]);
        assert!(message.starts_with("run.toml:2: `train.step` = 5"), "{message}");
    }

    #[test]
    fn a_wrong_type_or_choice_names_line_and_value() {
        let message = error("[train]\n\nbatch_size = \"many\"\n", &[]);
        let expected =
            "run.toml:3: `train.batch_size` = \"many\": invalid type: string \"many\", expected a whole number";
        assert_eq!(message, expected);
        let message = error("[schedule]\nkind = \"cosin\"\n", &[]);
        let choices = "must be one of cosine, linear, wsd, constant; the nearest is `cosine`";
        assert_eq!(message, format!("run.toml:2: `schedule.kind` = \"cosin\": {choices}"));
        let message = error("[model]\nhidden_size = 8\npreset = 5\n", &[]);
        assert!(message.starts_with("run.toml:3: `model.preset` = 5: must be text"), "{message}");
        assert!(error("[data]\ntrain = [1]\n", &[]).starts_with("run.toml:2: `data.train` = [1]: "));
        let message = error("", &["data.train=chat.jsonl"]);
        assert_eq!(message, "--set `data.train` = \"chat.jsonl\": must be a list, e.g. train = [\"chat.jsonl\"]");
        assert!(error("[adapter]\nranks = 4\n", &[]).contains("must be a table, e.g. ranks = {"));
        assert!(error("[optimizer]\nbetas = 0.9\n", &[]).contains("must be a list of two numbers"));
        assert!(error("[adapter]\ntargets = 4\n", &[]).contains("must be text or a list of texts"));
    }

    #[test]
    fn what_is_set_by_another_key_is_told_where() {
        for (set, told) in [
            ("rank=4", "--set `rank` = 4: there is no such key; the nearest is `adapter.rank`"),
            ("train.lr=4", "--set `train.lr` = 4: there is no such key; the nearest is `optimizer.lr`"),
            (
                "adapter.kind=qlora",
                "must be one of lora, dora; QLoRA is lora beside a quantized base: set adapter.quantize",
            ),
            ("adapter.kind=OLoRA", "set adapter.init = \"olora\""),
            ("adapter.kind=pissa", "adapter.init = \"olora\" starts within the matrix"),
            ("adapter.init=pissa", "the nearest is `olora`"),
            ("adapter.quantize=int8", "the nearest is `q8_0`"),
            ("adapter.quantize=4bit", "the nearest is `nf4`"),
            ("adapter.quantize=fp16", "the nearest is `none`"),
            ("adapter.quantize=q4_k_m", "the nearest is `q4_k`"),
        ] {
            let message = error("", &[set]);
            assert!(message.contains(told), "{set}: {message}");
        }
        // Of several sections: only the nearest of where it stands can be meant.
        assert!(error("", &["train.every=4"]).contains("the nearest is `"));
    }

    #[test]
    fn what_is_not_toml_names_the_line() {
        let message = error("seed = 1\n[train\nsteps = 5\n", &[]);
        assert!(message.starts_with("run.toml:2: ") && message.contains("[train"), "{message}");
        assert!(error("seed = 1\nseed = 2\n", &[]).starts_with("run.toml:2: "));
    }

    const GOOD: &str = "output = 'o'\nmodel.preset = 'llama-14m'\ndata.train = ['t']\n";

    #[test]
    fn set_wins_over_the_file_and_is_as_strict() -> Result<()> {
        let set = ["train.steps=7".to_owned(), "model.hidden_size=12".into(), "output=some/where".into()];
        let config = RunConfig::parse("[train]\nsteps = 5\n", Path::new("run.toml"), &set)?;
        assert_eq!(config.train.steps, Some(7));
        assert_eq!(config.model.overrides["hidden_size"], serde_json::json!(12));
        assert_eq!(config.output.as_deref(), Some(Path::new("some/where")));
        let message = error("", &["train.stepz=1"]);
        assert_eq!(message, "--set `train.stepz` = 1: there is no such key; the nearest is `steps`");
        assert!(error("", &["train.steps"]).starts_with("--set `train.steps` = (nothing): must be key=value"));
        let message = error("", &["trian.steps=1"]);
        assert_eq!(message, "--set `trian` = (a section): there is no such key; the nearest is `train`");
        assert!(error("seed = 1", &["seed.x=2"]).contains("not a section"));
        let message = error(GOOD, &["train.steps=5", "train.batch_size=0"]);
        assert!(message.starts_with("--set `train.batch_size` = 0: "), "{message}");
        Ok(())
    }

    #[test]
    fn a_set_key_replaces_what_excludes_it() -> Result<()> {
        let file = "[train]\nepochs = 3\n[data]\nvalid = ['v']\n";
        let of = |set: &[&str]| {
            let set: Vec<String> = set.iter().map(ToString::to_string).collect();
            Source::new(file, Path::new("run.toml"), &set)
        };
        let source = of(&["train.steps = 7", "data.valid_fraction=0.1"]);
        let config = source.config()?;
        assert_eq!((config.train.steps, config.train.epochs, config.data.valid.len()), (Some(7), None, 0));
        let notes = source.notes();
        assert_eq!(notes[0], "note: --set train.steps=7 replaces train.epochs = 3 of run.toml");
        assert_eq!(notes.len(), 2);
        let adapted = of(&["adapter.rank=8"]).notes();
        assert!(adapted[0].contains("no [adapter]") && adapted[0].contains("adapter.rank=8"), "{adapted:?}");
        let both = of(&["train.steps=7", "train.tokens=9", "data.valid_fraction=0"]);
        assert!(both.notes().is_empty() && both.config()?.train.epochs.is_some(), "no choice to make");
        Ok(())
    }

    #[test]
    fn values_that_cannot_work_name_the_line() {
        assert_eq!(error(GOOD, &["train.steps=5"]), "");
        for (added, start) in [
            ("", "run.toml: `train.steps` = (missing): exactly one of"),
            (
                "train.steps = 5\ntrain.tokens = 5",
                "run.toml:4: `train.steps` = set together with train.tokens: exactly",
            ),
            ("train.steps = 0", "run.toml:4: `train.steps` = 0: must be at least 1"),
            ("train.epochs = -1.0", "run.toml:4: `train.epochs` = -1: must be"),
            (
                "train.steps = 5\ntrain.micro_batch_size = 3",
                "run.toml:5: `train.micro_batch_size` = 3: does not divide",
            ),
            ("train.steps = 5\ntrain.batch_size = 4000000000", "run.toml:5: `train.batch_size` = 4000000000: with"),
            ("train.steps = 5\ndata.context_length = 0", "run.toml:5: `data.context_length` = 0: must be"),
            ("train.steps = 5\noptimizer.lr = nan", "run.toml:5: `optimizer.lr` = NaN: must be a positive"),
            ("train.steps = 5\nanomaly.window = 1", "run.toml:5: `anomaly.window` = 1: must be from 8"),
            ("train.steps = 5\nobjective.z_loss = -1.0", "run.toml:5: `objective.z_loss` = -1: must be"),
            ("train.steps = 5\nparallel.tp = 2", "run.toml:5: `parallel.tp` = 2: parallel training is not available"),
            ("train.steps = 5\nmodel.from = 'm'", "run.toml:2: `model.preset` = llama-14m: and model.from exclude"),
            ("train.steps = 5\n[adapter]\nkind = 'lora'", "run.toml:2: `model.from` = (missing): an adapter stands"),
            ("train.steps = 5\n[adapter]\nkind = 'lora2'", "run.toml:6: `adapter.kind` = \"lora2\": must be one of"),
            ("train.steps = 5\ndata.valid_fraction = 0.9", "run.toml:5: `data.valid_fraction` = 0.9: must be from 0"),
            ("train.steps = 5\ndata.valid_fraction = 0.1", "run.toml:5: `data.valid_fraction` = (set): has a meaning"),
            ("train.steps = 5\nobjective.label_smoothing = 1.0", "run.toml:5: `objective.label_smoothing` = 1: must"),
        ] {
            let message = error(&format!("{GOOD}{added}\n"), &[]);
            assert!(message.starts_with(start), "{message}");
        }
    }

    #[test]
    fn a_line_to_copy_holds_all_of_a_value_or_none() {
        let message = "invalid type: string, expected a sequence";
        let of = |text: &str| reason(message, "data.train", Some(&cut(text)));
        assert_eq!(of("\"a.txt\""), "must be a list, e.g. train = [\"a.txt\"]");
        assert_eq!(of(&format!("\"{}\"", "a/".repeat(40))), "must be a list, e.g. train = [\"..\"]");
    }

    #[test]
    fn every_value_survives_being_written_and_read() -> Result<()> {
        let config = RunConfig { seed: 3, ..RunConfig::default() };
        let text = toml::to_string(&config).expect("serialises");
        assert_eq!(RunConfig::parse(&text, Path::new("resolved.toml"), &[])?, config);
        Ok(())
    }
}
