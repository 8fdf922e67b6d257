//! The words of a conversation's records: who may speak, and which fields are read.

use serde::{Deserialize, Serialize};

/// What is known of roles and fields beside what every conversation has: what the template names, and what the caller adds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KnownWords {
    /// Roles beside `system`, `user`, `assistant`, `tool`, `developer` and `function`.
    pub roles: Vec<String>,
    /// Fields of a message that the template reads, beside those that most read.
    pub message_fields: Vec<String>,
}

/// Who speaks in conversations.
const ROLES: [&str; 6] = ["system", "user", "assistant", "tool", "developer", "function"];

/// What a message may hold, whatever the template.
const MESSAGE_FIELDS: [&str; 13] = [
    "role",
    "from",
    "content",
    "value",
    "weight",
    "train",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "thinking",
    "reasoning",
];

impl KnownWords {
    /// Refuses a role that nobody knows: misspelt, it would be a speaker of its own, whose turns are never learnt.
    pub(super) fn check_role(&self, role: &str) -> Result<(), String> {
        let known = || ROLES.into_iter().chain(self.roles.iter().map(String::as_str));
        if known().any(|name| name == role) {
            return Ok(());
        }
        let near = known().max_by(|a, b| alike(a, role).total_cmp(&alike(b, role))).unwrap_or("user");
        Err(format!(
            "the role {role:?} is not known; the nearest is \"{near}\" (data.roles takes roles that the template \
             knows without naming them)"
        ))
    }

    pub(super) fn knows_message_field(&self, field: &str) -> bool {
        MESSAGE_FIELDS.contains(&field) || self.message_fields.iter().any(|name| name == field)
    }

    /// The field of a message that was meant, if one is near.
    pub(super) fn near_message_field(&self, field: &str) -> Option<String> {
        near(field, MESSAGE_FIELDS.into_iter().chain(self.message_fields.iter().map(String::as_str)))
    }
}

/// The one of `known` that `word` is likely to be a slip for.
pub(super) fn near<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let likeness = known.map(|name| (alike(name, word), name));
    let (likeness, name) = likeness.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness > 0.85).then(|| name.to_owned())
}

fn alike(a: &str, b: &str) -> f64 {
    strsim::jaro(a, &b.to_lowercase())
}
