//! Chat templates by name, for tokenizers that carry none: the public formats of well-known models, and one for
//! vocabularies without any token for turns.

use super::template::ChatTemplate;
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

struct Builtin {
    name: &'static str,
    source: &'static str,
    /// Tokens that must be in the vocabulary: as text they would be many tokens, and turns would not end.
    tokens: &'static [&'static str],
    needs_eos: bool,
}

const BUILTINS: &[Builtin] = &[
    Builtin {
        name: "alpaca",
        source: concat!(
            "{{ bos_token }}{% if messages[0]['role'] != 'system' %}",
            "{{ 'Below is an instruction that describes a task. ",
            "Write a response that appropriately completes the request.\\n\\n' }}{% endif %}",
            "{% for message in messages %}",
            "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}",
            "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}",
            "{% elif message['role'] == 'assistant' %}",
            "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}",
            "{% else %}{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user or assistant') }}{% endif %}",
            "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}",
        ),
        tokens: &[],
        needs_eos: true,
    },
    Builtin {
        name: "chatml",
        source: concat!(
            "{% for message in messages %}",
            "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}",
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ),
        tokens: &["<|im_start|>", "<|im_end|>"],
        needs_eos: false,
    },
    Builtin {
        name: "gemma",
        source: concat!(
            "{{ bos_token }}{% set start = '' %}{% if messages[0]['role'] == 'system' %}",
            "{% set start = messages[0]['content'] | trim + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}",
            "{% for message in messages %}",
            "{% if message['role'] not in ['user', 'assistant'] %}",
            "{{ raise_exception('role ' ~ message['role'] ~ ' is not user, assistant, or system at the start') }}",
            "{% endif %}",
            "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' ",
            "+ (start if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}",
            "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        ),
        tokens: &["<start_of_turn>", "<end_of_turn>"],
        needs_eos: false,
    },
    Builtin {
        name: "llama3",
        source: concat!(
            "{{ bos_token }}{% for message in messages %}",
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim ",
            "+ '<|eot_id|>' }}",
            "{% endfor %}{% if add_generation_prompt %}",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ),
        tokens: &["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        needs_eos: false,
    },
    Builtin {
        name: "mistral",
        source: concat!(
            "{{ bos_token }}{% set start = '' %}{% if messages[0]['role'] == 'system' %}",
            "{% set start = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}",
            "{% for message in messages %}",
            "{% if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}",
            "{{ raise_exception('after the system turn, roles must alternate: user, assistant, user...') }}{% endif %}",
            "{% if message['role'] == 'user' %}",
            "{{ '[INST] ' + (start if loop.first else '') + message['content'] + ' [/INST]' }}",
            "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}",
            "{% endfor %}",
        ),
        tokens: &[],
        needs_eos: true,
    },
    Builtin {
        name: "zephyr",
        source: concat!(
            "{{ bos_token }}{% for message in messages %}",
            "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}",
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        ),
        tokens: &[],
        needs_eos: true,
    },
];

/// All names, comma separated.
pub(crate) fn names() -> String {
    BUILTINS.iter().map(|b| b.name).collect::<Vec<_>>().join(", ")
}

/// The built-in template of that name, if there is one. Fails where the tokenizer lacks a token that it writes.
pub(crate) fn find(name: &str, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
    let Some(builtin) = BUILTINS.iter().find(|b| b.name == name) else { return Ok(None) };
    let lacks = |token: &str| tokenizer.token_to_id(token).is_none();
    let missing = builtin.tokens.iter().copied().find(|token| lacks(token));
    let missing = missing.or((builtin.needs_eos && tokenizer.eos_id().is_none()).then_some("eos_token"));
    if let Some(token) = missing {
        return Err(Error::TemplateToken { template: name.to_string(), token: token.to_string(), known: names() });
    }
    ChatTemplate::new(name, builtin.source).map(Some)
}
