//! Writing a tokenizer for Hugging Face, and hashing it.

use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::chat::NamedTemplates;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

pub(crate) fn save(tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    let is_file = path.extension().is_some_and(|e| e == "json") && !path.is_dir();
    let folder = if is_file { path.parent().filter(|p| !p.as_os_str().is_empty()) } else { Some(path) };
    let folder = folder.unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let main = if is_file { path.to_path_buf() } else { path.join("tokenizer.json") };
    let mut json = tokenizer.to_json()?;
    // The crate's own fields stay as they came; only what would shorten or pad ids silently is left out.
    if let Some(object) = json.as_object_mut() {
        object.insert("truncation".to_string(), Value::Null);
        object.insert("padding".to_string(), Value::Null);
    }
    let roles = role_map(tokenizer);
    write_json(&folder.join("tokenizer_config.json"), &config(tokenizer, &roles))?;
    write_json(&folder.join("special_tokens_map.json"), &Value::Object(roles))?;
    write_json(&main, &json)
}

fn role_map(tokenizer: &Tokenizer) -> Map<String, Value> {
    let roles = tokenizer.roles();
    let all = [("bos_token", roles.bos), ("eos_token", roles.eos), ("unk_token", roles.unk), ("pad_token", roles.pad)];
    let named = |(key, id): (&str, Option<u32>)| Some((key.to_string(), tokenizer.id_to_token(id?)?.into()));
    all.into_iter().filter_map(named).collect()
}

fn config(tokenizer: &Tokenizer, roles: &Map<String, Value>) -> Value {
    let mut config = Map::new();
    // The generic class takes tokenizer.json as it is; family classes rebuild parts of it.
    config.insert("tokenizer_class".to_string(), json!("PreTrainedTokenizerFast"));
    config.extend(roles.clone());
    config.insert("clean_up_tokenization_spaces".to_string(), json!(false));
    config.insert("model_max_length".to_string(), json!(1_000_000_000_000_000_019_884_624_838_656u128 as f64));
    let named: Vec<(&str, &str)> = tokenizer.chat_templates().iter().collect();
    match named.as_slice() {
        [] => {}
        [(NamedTemplates::DEFAULT, template)] => drop(config.insert("chat_template".to_string(), json!(template))),
        named => {
            let list: Vec<Value> = named.iter().map(|(n, t)| json!({ "name": n, "template": t })).collect();
            config.insert("chat_template".to_string(), Value::Array(list));
        }
    }
    Value::Object(config)
}

/// Writes beside the target and renames over it, so that a reader never sees half a file.
fn write_json(path: &Path, value: &Value) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::Encode(e.to_string()))?;
    text.push(b'\n');
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = fs::File::create(&temporary)
        .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    written.map_err(|e| {
        // Best effort: the write's own error is the one to report.
        let _ = fs::remove_file(&temporary);
        Error::io(path, e)
    })
}

/// The parts of a `tokenizer.json` that change ids, in one fixed order, and the roles that data preparation uses.
pub(crate) fn fingerprint(tokenizer: &Tokenizer) -> String {
    let mut hash = Sha256::new();
    hash.update(b"tallow tokenizer 1\n");
    let json: Value = serde_json::from_slice(tokenizer.json_bytes()).unwrap_or_default();
    for key in ["normalizer", "pre_tokenizer", "model", "added_tokens", "post_processor"] {
        hash.update(key.as_bytes());
        hash_value(&mut hash, &json[key]);
    }
    let roles = tokenizer.roles();
    hash.update(format!("{:?} {:?}", roles.bos, roles.eos).as_bytes());
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes JSON independently of the order of keys: the same tokenizer read from two files is one tokenizer.
fn hash_value(hash: &mut Sha256, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut keys: Vec<_> = map.keys().collect();
            keys.sort_unstable();
            hash.update(b"{");
            for key in keys {
                hash_value(hash, &Value::String(key.clone()));
                hash_value(hash, &map[key]);
            }
            hash.update(b"}");
        }
        Value::Array(items) => {
            hash.update(b"[");
            items.iter().for_each(|item| hash_value(hash, item));
            hash.update(b"]");
        }
        Value::String(text) => {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
        other => {
            hash.update(other.to_string().as_bytes());
            hash.update(b";");
        }
    }
}
