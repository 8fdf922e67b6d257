//! Special tokens: which token plays which role, and what a template puts around a text.

use std::collections::HashMap;

use serde_json::Value;

use crate::spec::Spec;

type Ids = HashMap<Box<str>, u32>;

/// The tokens with a role, by id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Roles {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    pub unk: Option<u32>,
    pub pad: Option<u32>,
    /// The roles come from the tokenizer's own configuration: guess none.
    pub stated: bool,
}

const BOS: &[&str] = &["<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>", "[CLS]"];
const EOS: &[&str] = &["</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "[SEP]"];
const UNK: &[&str] = &["<unk>", "[UNK]", "<|unk|>"];
const PAD: &[&str] = &["<pad>", "[PAD]", "<|pad|>", "<|endofpad|>"];

impl Roles {
    /// Reads `tokenizer_config.json` or `special_tokens_map.json`: each role a string, or an object with `content`.
    pub(crate) fn from_config(config: &Value, token_to_id: impl Fn(&str) -> Option<u32>) -> Self {
        let role = |key: &str| {
            let value = config.get(key)?;
            token_to_id(value.as_str().or_else(|| value.get("content")?.as_str())?)
        };
        let (bos, eos, unk, pad) = (role("bos_token"), role("eos_token"), role("unk_token"), role("pad_token"));
        Self { bos, eos, unk, pad, stated: true }
    }

    /// Fills every role that is open from `other`.
    pub(crate) fn or(self, other: Self) -> Self {
        Self {
            bos: self.bos.or(other.bos),
            eos: self.eos.or(other.eos),
            unk: self.unk.or(other.unk),
            pad: self.pad.or(other.pad),
            stated: self.stated || other.stated,
        }
    }

    /// Where no configuration stated the roles: the usual names among the special tokens, and the model's own unknown.
    pub(crate) fn or_guess(self, spec: &Spec, ids: &Ids) -> Self {
        let model = spec.model_json();
        let unk = model["unk_token"].as_str().and_then(|t| ids.get(t).copied());
        let unk = unk.or(model["unk_id"].as_u64().map(|id| id as u32));
        let mut roles = Self { unk: self.unk.or(unk), ..self };
        if roles.stated {
            return roles;
        }
        let find = |names: &[&str]| {
            let special = |name: &&&str| spec.added.iter().any(|t| t.special && t.content == **name);
            names.iter().find(special).and_then(|name| ids.get(*name).copied())
        };
        roles.bos = roles.bos.or(find(BOS));
        roles.eos = roles.eos.or(find(EOS));
        roles.unk = roles.unk.or(find(UNK));
        roles.pad = roles.pad.or(find(PAD));
        roles
    }
}

/// What goes before and behind a single text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Template {
    pub prefix: Vec<u32>,
    pub suffix: Vec<u32>,
}

impl Template {
    /// Reads a `post_processor`. Steps of a sequence wrap one another in order.
    pub(crate) fn from_json(json: Option<&Value>, ids: &Ids) -> Result<Self, String> {
        let mut template = Self::default();
        if let Some(json) = json.filter(|j| !j.is_null()) {
            template.wrap(json, ids)?;
        }
        Ok(template)
    }

    fn wrap(&mut self, json: &Value, ids: &Ids) -> Result<(), String> {
        match json["type"].as_str() {
            Some("ByteLevel") => Ok(()),
            Some("Sequence") => {
                let steps = json["processors"].as_array().ok_or("post_processor.processors is not a list")?;
                steps.iter().try_for_each(|step| self.wrap(step, ids))
            }
            Some(kind @ ("BertProcessing" | "RobertaProcessing")) => {
                let id = |key: &str| {
                    let id = json[key][1].as_u64().filter(|&id| id < u64::from(u32::MAX));
                    id.map(|id| id as u32).ok_or_else(|| format!("{kind}.{key} is not [token, id]"))
                };
                self.prefix.insert(0, id("cls")?);
                self.suffix.push(id("sep")?);
                Ok(())
            }
            Some("TemplateProcessing") => self.wrap_template(json, ids),
            other => Err(format!("post_processor type {other:?} is not known")),
        }
    }

    fn wrap_template(&mut self, json: &Value, known: &Ids) -> Result<(), String> {
        let single = json["single"].as_array().ok_or("post_processor.single is not a list")?;
        let (mut before, mut after, mut seen) = (Vec::new(), Vec::new(), false);
        for piece in single {
            if piece.get("Sequence").is_some() {
                if std::mem::replace(&mut seen, true) {
                    return Err("post_processor.single holds the text twice".to_string());
                }
                continue;
            }
            let name = piece["SpecialToken"]["id"].as_str().ok_or("post_processor.single holds an unknown piece")?;
            let stated = json["special_tokens"][name]["ids"].as_array();
            let ids = match stated {
                Some(ids) => ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect(),
                None => known.get(name).map(|&id| vec![id]),
            };
            let ids: Vec<u32> = ids.ok_or_else(|| format!("post_processor: special token {name:?} has no ids"))?;
            if let Some(id) = ids.iter().find(|id| !known.values().any(|k| k == *id)) {
                return Err(format!("post_processor: special token {name:?} has id {id}, which is no token's"));
            }
            if seen { after.extend(ids) } else { before.extend(ids) }
        }
        if !seen {
            return Err("post_processor.single leaves the text out".to_string());
        }
        self.prefix.splice(0..0, before);
        self.suffix.extend(after);
        Ok(())
    }
}
