//! Presets: architectures by name, as TOML files with Hugging Face's keys.

use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

const BUILT_IN: &[(&str, &str)] = &[
    ("llama-14m", include_str!("../../../models/llama-14m.toml")),
    ("llama-124m", include_str!("../../../models/llama-124m.toml")),
    ("gpt2-124m", include_str!("../../../models/gpt2-124m.toml")),
    ("quickstart", include_str!("../../../models/quickstart.toml")),
];

/// An architecture without a vocabulary: keys of a `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Preset {
    /// The name or path it was found by.
    pub name: String,
    /// Hugging Face keys and values.
    pub keys: serde_json::Map<String, Value>,
}

/// Names of the presets that come with the program.
pub fn preset_names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|(name, _)| *name)
}

impl Preset {
    /// Finds a preset: the TOML file at `name` if there is one (relative to `base`), else the built-in of that name.
    ///
    /// # Errors
    /// If there is neither, or the file is not TOML.
    pub fn find(name: &str, base: &Path) -> Result<Self> {
        let path = base.join(name);
        let text = match BUILT_IN.iter().find(|(known, _)| *known == name) {
            _ if path.is_file() => std::fs::read_to_string(&path)
                .map_err(|e| Error::config("preset", format!("{}: {e}", path.display())))?,
            Some((_, text)) => (*text).to_owned(),
            None => {
                let known = preset_names().collect::<Vec<_>>().join(", ");
                return Err(Error::Preset { name: name.into(), known });
            }
        };
        let keys = toml::from_str(&text).map_err(|e| Error::config("preset", format!("{name}: {e}")))?;
        Ok(Self { name: name.into(), keys })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_preset_is_a_model() -> Result<()> {
        for name in preset_names() {
            let mut keys = Preset::find(name, Path::new("."))?.keys;
            keys.entry("vocab_size").or_insert(Value::from(300));
            crate::parse_config_strict(&Value::Object(keys))?;
        }
        Ok(())
    }

    #[test]
    fn an_unknown_preset_lists_the_known() {
        let error = Preset::find("lama-14m", Path::new(".")).expect_err("no such preset");
        assert!(error.to_string().contains("llama-14m"), "{error}");
    }
}
