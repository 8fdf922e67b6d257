//! Reading from paths: telling the kind of file, and the Hugging Face folder layout.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::chat::NamedTemplates;
use crate::error::{Error, Result};
use crate::spec::Spec;
use crate::special::Roles;
use crate::tokenizer::Tokenizer;

/// No tokenizer file is larger; anything above is not read into memory.
pub(crate) const MAX_FILE_BYTES: u64 = 1 << 30;

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let length = fs::metadata(path).map_err(|e| Error::io(path, e))?.len();
    if length > MAX_FILE_BYTES {
        return Err(Error::malformed(path, format!("{length} bytes; a tokenizer file has at most {MAX_FILE_BYTES}")));
    }
    fs::read(path).map_err(|e| Error::io(path, e))
}

pub(crate) fn from_path(path: &Path) -> Result<Tokenizer> {
    if path.is_dir() {
        let json = path.join("tokenizer.json");
        if json.is_file() {
            return from_json_file(&json);
        }
        let model = path.join("tokenizer.model");
        if model.is_file() {
            return Tokenizer::from_sentencepiece(model);
        }
        return Err(Error::UnknownFormat { path: path.to_path_buf() });
    }
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("");
    match extension {
        "json" => from_json_file(path),
        "model" => Tokenizer::from_sentencepiece(path),
        "tiktoken" => {
            let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("");
            Tokenizer::from_tiktoken(path, name)
        }
        _ => Err(Error::UnknownFormat { path: path.to_path_buf() }),
    }
}

fn from_json_file(path: &Path) -> Result<Tokenizer> {
    let spec = Spec::from_bytes(&read(path)?, path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let token_to_id = |token: &str| {
        let added = spec.added.iter().find(|t| t.content == token).map(|t| t.id);
        added.or_else(|| spec.vocab.get(token).copied())
    };
    let mut roles = Roles::default();
    let mut chat_templates = NamedTemplates::default();
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let file = folder.join(name);
        if file.is_file() {
            let config: Value = serde_json::from_slice(&read(&file)?)
                .map_err(|e| Error::malformed(&file, format!("not valid JSON: {e}")))?;
            roles = roles.or(Roles::from_config(&config, token_to_id));
            if chat_templates.main().is_none() {
                chat_templates = chat_templates_of(&config);
            }
        }
    }
    // Files of their own replace all that the configuration has, as in transformers.
    if let Some(separate) = chat_template_files(folder)? {
        chat_templates = separate;
    }
    Tokenizer::build(spec, roles, chat_templates).map_err(|e| match e {
        Error::Malformed { reason, .. } => Error::malformed(path, reason),
        other => other,
    })
}

/// A string, or a list of named templates.
fn chat_templates_of(config: &Value) -> NamedTemplates {
    let mut templates = NamedTemplates::default();
    match config.get("chat_template") {
        Some(Value::String(text)) => templates.set(NamedTemplates::DEFAULT, text.clone()),
        Some(Value::Array(named)) => {
            for (name, text) in named.iter().filter_map(|t| Some((t["name"].as_str()?, t["template"].as_str()?))) {
                templates.set(name, text.to_string());
            }
        }
        _ => {}
    }
    templates
}

/// `chat_template.jinja`, and `additional_chat_templates/<name>.jinja`.
fn chat_template_files(folder: &Path) -> Result<Option<NamedTemplates>> {
    let text = |path: &Path| String::from_utf8(read(path)?).map_err(|_| Error::malformed(path, "not valid UTF-8"));
    let mut templates = NamedTemplates::default();
    let main = folder.join("chat_template.jinja");
    if main.is_file() {
        templates.set(NamedTemplates::DEFAULT, text(&main)?);
    }
    let more = folder.join("additional_chat_templates");
    if more.is_dir() {
        let entries = fs::read_dir(&more).map_err(|e| Error::io(&more, e))?;
        let paths: std::io::Result<Vec<_>> = entries.map(|entry| entry.map(|entry| entry.path())).collect();
        let mut paths = paths.map_err(|e| Error::io(&more, e))?;
        paths.sort();
        for path in paths.iter().filter(|path| path.extension().is_some_and(|e| e == "jinja")) {
            if let Some(name) = path.file_stem().and_then(|name| name.to_str()) {
                templates.set(name, text(path)?);
            }
        }
    }
    Ok(templates.main().is_some().then_some(templates))
}
