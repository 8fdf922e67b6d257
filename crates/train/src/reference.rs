//! The reference of the run file, made from the doc comments of the structs that read it.

use toml::Value;

use crate::RunConfig;

/// A section of the run file that knows its keys.
pub(crate) trait Documented {
    /// Key, type, and doc comment of each field.
    const KEYS: &'static [(&'static str, &'static str, &'static str)];
}

/// Defines a struct and keeps the doc comments of its fields for the reference: one text for both readers.
macro_rules! documented {
    (
        $(#[$($meta:tt)*])*
        pub struct $name:ident {
            $( $(#[$($field_meta:tt)*])* pub $field:ident : $kind:ty ),* $(,)?
        }
    ) => {
        $(#[$($meta)*])*
        pub struct $name { $( $(#[$($field_meta)*])* pub $field: $kind ),* }

        impl $crate::reference::Documented for $name {
            const KEYS: &'static [(&'static str, &'static str, &'static str)] = &[
                $( (
                    stringify!($field),
                    stringify!($kind),
                    concat!($( $crate::reference::doc_text!($($field_meta)*) ),*),
                ) ),*
            ];
        }
    };
}

/// The text of a doc attribute, nothing of any other.
macro_rules! doc_text {
    (doc = $text:literal) => {
        $text
    };
    ($($other:tt)*) => {
        ""
    };
}

pub(crate) use {doc_text, documented};

/// A key of the run file.
#[derive(Clone, Debug)]
struct Key {
    name: &'static str,
    kind: &'static str,
    default: String,
    doc: &'static str,
}

/// Sections in the order of the reference: name, what it is about, keys.
fn sections() -> Vec<(&'static str, &'static str, Vec<Key>)> {
    let defaults = Value::try_from(RunConfig::default()).unwrap_or(Value::Table(toml::Table::new()));
    let adapter = Value::try_from(crate::AdapterSection::default()).unwrap_or(Value::Table(toml::Table::new()));
    let section = |name: &'static str, about, keys: &[(&'static str, &'static str, &'static str)]| {
        let table = match name {
            "" => Some(&defaults),
            // Not there unless it is written.
            "adapter" => Some(&adapter),
            name => defaults.get(name),
        };
        let keys = keys.iter().map(|&(key, kind, doc)| {
            let default = table.and_then(|t| t.get(key)).map_or_else(|| "unset".into(), ToString::to_string);
            Key { name: key, kind: kind_name(kind), default, doc: doc.trim() }
        });
        (name, about, keys.collect())
    };
    let top: Vec<_> = RunConfig::KEYS.iter().copied().filter(|(_, kind, _)| !kind_name(kind).is_empty()).collect();
    let mut all = vec![section("", "Above every section.", &top)];
    let about = |name: &str| RunConfig::KEYS.iter().find(|(key, ..)| *key == name).map_or("", |(_, _, doc)| doc.trim());
    for (name, keys) in [
        ("model", crate::ModelSection::KEYS),
        ("tokenizer", crate::TokenizerSection::KEYS),
        ("data", crate::DataSection::KEYS),
        ("objective", crate::ObjectiveSection::KEYS),
        ("adapter", crate::AdapterSection::KEYS),
        ("train", crate::TrainSection::KEYS),
        ("optimizer", crate::OptimizerConfig::KEYS),
        ("schedule", crate::ScheduleConfig::KEYS),
        ("eval", crate::EvalSection::KEYS),
        ("checkpoint", crate::CheckpointSection::KEYS),
        ("anomaly", crate::AnomalyConfig::KEYS),
        ("parallel", crate::ParallelSection::KEYS),
    ] {
        all.push(section(name, about(name), keys));
    }
    all
}

/// What a reader calls a Rust type; empty for a section.
fn kind_name(kind: &str) -> &'static str {
    match kind.replace(' ', "").as_str() {
        "u64" | "usize" | "Option<u64>" | "Option<usize>" => "whole number",
        "f64" | "Option<f64>" => "number",
        "[f64;2]" => "two numbers",
        "bool" => "true or false",
        "String" | "Option<String>" => "text",
        "PathBuf" | "Option<PathBuf>" => "path",
        "Vec<PathBuf>" => "list of paths",
        "Vec<String>" => "list of texts",
        "BTreeMap<String,usize>" | "BTreeMap<String,f64>" => "table of numbers",
        "TargetsSetting" => "text or list of texts",
        "Option<AdapterSection>" => "",
        "serde_json::Map<String,Value>" => "any",
        other if other.ends_with("Section") => "",
        "OptimizerConfig" | "ScheduleConfig" | "AnomalyConfig" => "",
        _ => "one of",
    }
}

/// Every key of the run file, dotted.
pub fn key_names() -> Vec<String> {
    let named = |section: &str, key: &Key| match section {
        "" => key.name.to_owned(),
        section => format!("{section}.{}", key.name),
    };
    sections()
        .iter()
        .flat_map(|(section, _, keys)| keys.iter().map(|k| named(section, k)).collect::<Vec<_>>())
        .collect()
}

/// The reference of the run file, as Markdown.
pub fn markdown() -> String {
    let mut out = String::from(PREFACE);
    for (name, about, keys) in sections() {
        let title = if name.is_empty() { "Top".to_owned() } else { format!("`[{name}]`") };
        out.push_str(&format!("\n## {title}\n\n{about}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"));
        for key in keys {
            let (shown, default) = match key.name {
                "overrides" => ("any other".to_owned(), "-".to_owned()),
                name => (format!("`{name}`"), format!("`{}`", key.default)),
            };
            let default = if default == "`unset`" { "unset".into() } else { default };
            out.push_str(&format!("| {shown} | {} | {default} | {} |\n", key.kind, key.doc.replace('|', "\\|")));
        }
    }
    out
}

const PREFACE: &str = "\
# The run file

Generated by `tallow reference config`; a test compares this page with it.

What `tallow pretrain RUN.toml`, `tallow finetune RUN.toml` and `tallow plan RUN.toml` read. It is TOML and strict: an unknown key, a wrong type or a
value that cannot work stops the command with exit code 2 before anything is loaded, naming the file, the line, the key,
the value, the reason and the nearest valid key. `--set section.key=value` wins over the file and is as strict. A relative
path is relative to the run file. `tallow pretrain --example` and `tallow finetune --example` print commented files that run.
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_a_doc_comment_and_a_type() {
        for (section, _, keys) in sections() {
            assert!(!keys.is_empty(), "{section}");
            for key in keys {
                assert!(key.doc.len() > 10 && !key.kind.is_empty(), "{section}.{}: {:?}", key.name, key.doc);
            }
        }
    }

    #[test]
    fn defaults_are_those_of_the_structs() {
        let page = markdown();
        for line in
            ["| `batch_size` | whole number | `8` |", "| `steps` | whole number | unset |", "| `packing` | true or"]
        {
            assert!(page.contains(line), "no {line:?} in {page}");
        }
    }

    #[test]
    fn the_example_has_every_key() {
        let example = concat!(
            include_str!("../../../models/runs/example.toml"),
            include_str!("../../../models/runs/finetune.toml")
        );
        for key in key_names().iter().filter(|key| !key.ends_with(".overrides")) {
            let leaf = key.rsplit('.').next().unwrap_or(key);
            let written = example.lines().any(|l| l.trim_start_matches("# ").starts_with(&format!("{leaf} = ")));
            assert!(written, "{key} is not in models/runs/example.toml or finetune.toml");
        }
    }
}
