//! Which family an architecture belongs to.

use serde_json::Value;

use crate::config::unknown_keys;
use crate::families::{gpt2, llama};
use crate::{Error, ParsedConfig, Result};

/// A family of models.
pub struct Family {
    /// `model_type` of Hugging Face and `general.architecture` of GGUF.
    pub name: &'static str,
    /// Entries of `architectures` in `config.json` that it covers.
    pub architectures: &'static [&'static str],
    /// Reads its `config.json`.
    pub parse: fn(&Value) -> Result<ParsedConfig>,
    /// Every key that has an effect.
    pub keys: &'static [&'static str],
}

const FAMILIES: &[Family] = &[
    Family {
        name: "llama",
        architectures: &["LlamaForCausalLM", "MistralForCausalLM"],
        parse: llama::LlamaConfig::parse,
        keys: llama::KEYS,
    },
    Family { name: "gpt2", architectures: &["GPT2LMHeadModel"], parse: gpt2::Gpt2Config::parse, keys: gpt2::KEYS },
];

/// All families.
pub fn families() -> &'static [Family] {
    FAMILIES
}

fn family_of(value: &Value) -> Result<&'static Family> {
    let Some(map) = value.as_object() else {
        return Err(Error::config("config", "is not a JSON object"));
    };
    let name = match map.get("architectures") {
        Some(Value::Array(names)) if !names.is_empty() => names[0].as_str(),
        Some(Value::Null) | None => None,
        _ => return Err(Error::config("architectures", "must be a list of names, e.g. [\"LlamaForCausalLM\"]")),
    };
    let by_type = map.get("model_type").and_then(Value::as_str);
    let found = match (name, by_type) {
        (Some(name), _) => FAMILIES.iter().find(|f| f.architectures.contains(&name)),
        (None, Some(kind)) => FAMILIES.iter().find(|f| f.name == kind),
        (None, None) => {
            return Err(Error::config("architectures", "is missing, e.g. architectures = [\"LlamaForCausalLM\"]"));
        }
    };
    found.ok_or_else(|| Error::Architecture {
        name: name.or(by_type).unwrap_or_default().into(),
        supported: FAMILIES.iter().flat_map(|f| f.architectures).copied().collect::<Vec<_>>().join(", "),
    })
}

/// Reads a `config.json` of any family. Unknown keys are returned, not refused: other programs' files carry many.
///
/// # Errors
/// For an unsupported architecture, a missing or mistyped key, or an unsupported value.
pub fn parse_config(value: &Value) -> Result<ParsedConfig> {
    if let Some(quantization) = value.get("quantization_config").filter(|v| !v.is_null()) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
        let reason = format!("weights quantized by `{method}` are not supported; use a GGUF file of this model");
        return Err(Error::config("quantization_config", reason));
    }
    (family_of(value)?.parse)(value)
}

/// Reads a configuration that a user wrote: an unknown key is an error that names the nearest known one.
///
/// # Errors
/// As [`parse_config`], and for an unknown key.
pub fn parse_config_strict(value: &Value) -> Result<ParsedConfig> {
    let family = family_of(value)?;
    // Before anything is parsed: a typo in a required key is a typo, not a missing key.
    if let Some(key) = unknown_keys(value, family.keys).first() {
        let known = family.keys;
        let near = known.iter().max_by(|a, b| strsim::jaro(a, key).total_cmp(&strsim::jaro(b, key)));
        let reason = format!("is no key of `{}` models; the nearest is `{}`", family.name, near.unwrap_or(&""));
        return Err(Error::config(key, reason));
    }
    (family.parse)(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 8, "intermediate_size": 16,
               "num_hidden_layers": 2, "num_attention_heads": 2})
    }

    fn message(value: &Value) -> String {
        parse_config_strict(value).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_typo_names_the_nearest_key() {
        let mut value = base();
        value["num_key_value_head"] = json!(1);
        assert!(message(&value).contains("`num_key_value_heads`"), "{}", message(&value));
    }

    #[test]
    fn a_wrong_type_names_its_key() {
        let mut value = base();
        value["hidden_size"] = json!("wide");
        assert!(message(&value).contains("`hidden_size`"), "{}", message(&value));
    }

    #[test]
    fn values_that_make_no_model_are_refused() {
        let cases = [
            ("num_key_value_heads", json!(3)),
            ("num_hidden_layers", json!(0)),
            ("hidden_size", json!(9)),
            ("hidden_act", json!("tanh")),
            ("rope_scaling", json!({"type": "longrope"})),
            ("residual_dropout", json!(1.5)),
        ];
        for (key, bad) in cases {
            let mut value = base();
            value[key] = bad;
            assert!(message(&value).contains(key), "{key}: {}", message(&value));
        }
    }

    #[test]
    fn unsupported_architectures_and_quantization_say_so() {
        let mut value = base();
        value["architectures"] = json!(["MambaForCausalLM"]);
        assert!(message(&value).contains("LlamaForCausalLM"));
        let mut value = base();
        value["quantization_config"] = json!({"quant_method": "gptq"});
        assert!(parse_config(&value).err().is_some_and(|e| e.to_string().contains("gptq")));
    }

    #[test]
    fn what_we_write_we_read() -> Result<()> {
        let mut value = base();
        value["rope_parameters"] = json!({"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0});
        let first = parse_config(&value)?.config.to_hf();
        assert_eq!(first["rope_theta"], json!(5e5));
        let again = parse_config(&first)?;
        assert_eq!(again.unknown_keys, Vec::<String>::new());
        assert_eq!(again.config.to_hf(), first);
        Ok(())
    }
}
