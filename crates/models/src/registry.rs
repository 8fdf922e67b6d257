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
        Some(Value::Array(names)) if names.first().is_some_and(Value::is_string) => names[0].as_str(),
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
    found.ok_or_else(|| match name {
        Some(name) => {
            Error::architecture(name, &FAMILIES.iter().flat_map(|f| f.architectures).copied().collect::<Vec<_>>())
        }
        None => Error::architecture(by_type.unwrap_or_default(), &FAMILIES.iter().map(|f| f.name).collect::<Vec<_>>()),
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
    fn keys_that_are_absent_mean_what_they_mean_to_transformers() -> Result<()> {
        let mut value = base();
        assert_eq!(parse_config(&value)?.config.shape().sliding_window, None);
        value["num_attention_heads"] = json!(8);
        value["head_dim"] = json!(2);
        value["architectures"] = json!(["MistralForCausalLM"]);
        let shape = parse_config(&value)?.config.shape();
        assert_eq!((shape.num_kv_heads, shape.max_positions, shape.sliding_window), (8, 131_072, Some(4096)));
        value["sliding_window"] = Value::Null;
        assert_eq!(parse_config(&value)?.config.shape().sliding_window, None);
        // And what we leave out would be read as an id: null is said.
        assert_eq!(parse_config(&value)?.config.to_hf().get("eos_token_id"), Some(&Value::Null));
        Ok(())
    }

    #[test]
    fn theta_beside_the_stretching_comes_first() -> Result<()> {
        let mut value = base();
        value["rope_theta"] = json!(1e4);
        value["rope_scaling"] = json!({"type": "linear", "factor": 2.0, "rope_theta": 7e5});
        let written = parse_config(&value)?.config.to_hf();
        assert_eq!(written["rope_theta"], json!(7e5));
        assert_eq!(written["rope_scaling"], json!({"rope_type": "linear", "factor": 2.0}));
        Ok(())
    }

    #[test]
    fn what_transformers_has_no_architecture_for_is_refused() {
        let mut biased = base();
        biased["sliding_window"] = json!(4);
        biased["attention_bias"] = json!(true);
        assert!(message(&biased).contains("attention_bias"), "{}", message(&biased));
        let mut ragged = base();
        ragged["hidden_size"] = json!(9);
        ragged["head_dim"] = json!(4);
        assert!(message(&ragged).contains("hidden_size"), "{}", message(&ragged));
        let mut partial = base();
        partial["rope_parameters"] = json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5});
        assert!(message(&partial).contains("partial_rotary_factor"), "{}", message(&partial));
        let mut words = base();
        words["rope_parameters"] = json!({"rope_theta": "1e4"});
        assert!(message(&words).contains("rope_theta"), "{}", message(&words));
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
