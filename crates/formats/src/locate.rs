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
    let hub = if looks_like_hub_id(name) {
        "; it looks like a hub id, and this build cannot download: fetch the model and give its folder or .gguf file"
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

fn looks_like_hub_id(name: &str) -> bool {
    let mut parts = name.split('/');
    let plain = |part: Option<&str>| part.is_some_and(|p| !p.is_empty() && !p.starts_with('.'));
    plain(parts.next()) && plain(parts.next()) && parts.next().is_none()
}
