//! Reading from paths: telling the kind of file, and the Hugging Face folder layout.

use std::fs;
use std::path::Path;

use serde_json::Value;

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
    let mut chat_template = None;
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let file = folder.join(name);
        if file.is_file() {
            let config: Value = serde_json::from_slice(&read(&file)?)
                .map_err(|e| Error::malformed(&file, format!("not valid JSON: {e}")))?;
            roles = roles.or(Roles::from_config(&config, token_to_id));
            chat_template = chat_template.or_else(|| chat_template_of(&config));
        }
    }
    let separate = folder.join("chat_template.jinja");
    if separate.is_file() {
        let text = String::from_utf8(read(&separate)?);
        chat_template = Some(text.map_err(|_| Error::malformed(&separate, "not valid UTF-8"))?);
    }
    Tokenizer::build(spec, roles, chat_template).map_err(|e| match e {
        Error::Malformed { reason, .. } => Error::malformed(path, reason),
        other => other,
    })
}

/// A string, or a list of named templates of which `default` (else the first) counts.
fn chat_template_of(config: &Value) -> Option<String> {
    match config.get("chat_template")? {
        Value::String(text) => Some(text.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default").or(named.first())?;
            default["template"].as_str().map(str::to_string)
        }
        _ => None,
    }
}
