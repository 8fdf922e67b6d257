//! What `--model` names.

use std::path::{Component, Path, PathBuf};

use crate::{Error, Result};

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelLocation {
    /// A Hugging Face directory.
    HfDir(PathBuf),
    /// A GGUF file.
    Gguf(PathBuf),
}

/// Finds a model: a Hugging Face directory, a `.gguf` file, or a name in the local store (`$TALLOW_HOME/models`, else
/// `~/.local/share/tallow/models`).
///
/// # Errors
/// If there is none, saying where it was looked for.
pub fn resolve_model(name: &str) -> Result<ModelLocation> {
    let path = Path::new(name);
    if name.is_empty() {
        let reason = "the name is empty; give a Hugging Face folder or a .gguf file".into();
        return Err(Error::NoModel { name: name.into(), reason });
    }
    if let Some(found) = at(path) {
        return Ok(found);
    }
    if path.exists() {
        let reason = "it is neither a folder nor a .gguf file".into();
        return Err(Error::NoModel { name: name.into(), reason });
    }
    // A name is looked for in the store, never outside it.
    let inside = path.components().all(|part| matches!(part, Component::Normal(_)));
    let store = store().filter(|_| inside);
    if let Some(found) = store.as_ref().and_then(|store| at(&store.join(name))) {
        return Ok(found);
    }
    let looked = store.map_or_else(String::new, |store| format!(" and not in the local store {}", store.display()));
    let hub = if is_hub_id(name) {
        "; it looks like a hub id, and hub ids need a build with `--features hub`; a local folder or .gguf file works"
    } else {
        "; give a Hugging Face folder or a .gguf file"
    };
    Err(Error::NoModel { name: name.into(), reason: format!("no such file or folder{looked}{hub}") })
}

fn at(path: &Path) -> Option<ModelLocation> {
    if path.is_dir() {
        return Some(ModelLocation::HfDir(path.to_path_buf()));
    }
    let gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    (gguf && path.is_file()).then(|| ModelLocation::Gguf(path.to_path_buf()))
}

fn store() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(home) = set("TALLOW_HOME") {
        return Some(PathBuf::from(home).join("models"));
    }
    set("HOME").map(|home| PathBuf::from(home).join(".local/share/tallow/models"))
}

/// Whether `name` has the shape of an id at the Hugging Face hub, `org/name`: two parts of letters, digits, `-`, `_` and
/// `.`, of which neither begins or ends with `-` or `.`, or has `--` or `..`. A name that ends in `.gguf` is a file's.
pub fn is_hub_id(name: &str) -> bool {
    let part = |part: &str| {
        let plain = part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        plain && !part.is_empty() && !part.starts_with(['-', '.']) && !part.ends_with(['-', '.'])
    };
    let gguf = Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    let joined = name.contains("--") || name.contains("..");
    name.len() <= 96 && !gguf && !joined && name.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}
