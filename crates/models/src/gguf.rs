//! GGUF files: their header as a `config.json`, their tensor names, and the order of their query and key rows.

use serde_json::{Value, json};
use tallow_formats::gguf::GgufFile;

use crate::{Error, ModelConfig, Result, families};

/// The `config.json` that the header of a GGUF file amounts to.
///
/// # Errors
/// For an architecture that is not supported, or a missing or mistyped key.
pub(crate) fn config_of(file: &GgufFile) -> Result<Value> {
    let arch = file.get_str("general.architecture")?;
    match arch {
        "llama" => llama(file),
        "gpt2" => gpt2(file),
        other => Err(Error::architecture(other, &["llama", "gpt2"])),
    }
}

/// Keys of a `config.json` and where GGUF keeps them, behind the architecture.
const KEYS: &[(&str, &str)] = &[
    ("hidden_size", "embedding_length"),
    ("n_embd", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("n_inner", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("n_layer", "block_count"),
    ("num_attention_heads", "attention.head_count"),
    ("n_head", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("max_position_embeddings", "context_length"),
    ("n_positions", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("rope_scaling", "rope.scaling.factor"),
];

/// An error over the configuration that a header amounts to, naming the key that is in the file.
pub(crate) fn error_of(error: Error, file: &GgufFile) -> Error {
    let arch = file.get_str("general.architecture").unwrap_or_default();
    match error {
        Error::Config { at, key, reason } => {
            let stored = KEYS.iter().find(|(hf, _)| *hf == key).map(|(_, stored)| format!("{arch}.{stored}"));
            Error::Config { at, key: stored.unwrap_or(key), reason }
        }
        other => other,
    }
}

fn llama(file: &GgufFile) -> Result<Value> {
    let int = |key: &str| file.get_u64(&format!("llama.{key}"));
    let opt_int = |key: &str| file.opt_u64(&format!("llama.{key}"));
    let heads = int("attention.head_count")?;
    let mut value = json!({
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab_size(file)?,
        "hidden_size": int("embedding_length")?,
        "intermediate_size": int("feed_forward_length")?,
        "num_hidden_layers": int("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": opt_int("attention.head_count_kv")?.unwrap_or(heads),
        "max_position_embeddings": int("context_length")?,
        "rms_norm_eps": widen(file.get_f32("llama.attention.layer_norm_rms_epsilon")?),
        "rope_theta": file.opt_f32("llama.rope.freq_base")?.map_or(10_000.0, widen),
        "tie_word_embeddings": !has(file, "output.weight"),
        "attention_bias": has(file, "blk.0.attn_q.bias"),
    });
    // Absent or misread keys would build another model: only what is absent has a default.
    let (key_length, rotated) = (opt_int("attention.key_length")?, opt_int("rope.dimension_count")?);
    if let Some(head_dim) = key_length.or(rotated) {
        value["head_dim"] = json!(head_dim);
        if let Some(rotated) = rotated.filter(|&rotated| rotated != head_dim) {
            let reason = format!("is {rotated} but heads have {head_dim} channels: partial rotation is not supported");
            return Err(Error::config("llama.rope.dimension_count", reason));
        }
    }
    if has(file, "rope_freqs.weight") {
        return Err(Error::config("rope_freqs.weight", "rotary frequency factors in a GGUF file are not supported"));
    }
    if opt_int("expert_count")?.is_some_and(|n| n > 0) {
        return Err(Error::config("llama.expert_count", "mixtures of experts are not supported"));
    }
    match file.opt_str("llama.rope.scaling.type")? {
        None | Some("none") => {}
        Some("linear") => {
            let factor = widen(file.get_f32("llama.rope.scaling.factor")?);
            value["rope_scaling"] = json!({"rope_type": "linear", "factor": factor});
        }
        Some(other) => {
            let reason = format!("`{other}` is not supported; none and linear are");
            return Err(Error::config("llama.rope.scaling.type", reason));
        }
    }
    special_ids(file, &mut value)?;
    Ok(value)
}

fn gpt2(file: &GgufFile) -> Result<Value> {
    let int = |key: &str| file.get_u64(&format!("gpt2.{key}"));
    let mut value = json!({
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab_size(file)?,
        "n_embd": int("embedding_length")?,
        "n_inner": int("feed_forward_length")?,
        "n_layer": int("block_count")?,
        "n_head": int("attention.head_count")?,
        "n_positions": int("context_length")?,
        "layer_norm_epsilon": widen(file.get_f32("gpt2.attention.layer_norm_epsilon")?),
        // The head is always written, tied or not, so it is read as one of its own.
        "tie_word_embeddings": !has(file, "output.weight"),
    });
    special_ids(file, &mut value)?;
    Ok(value)
}

/// Rows of the embedding, which is what the model has whatever the tokenizer says.
fn vocab_size(file: &GgufFile) -> Result<usize> {
    use tallow_formats::TensorSource;
    match file.info("token_embd.weight").map(|info| info.shape.as_slice()) {
        Some(&[rows, _]) => Ok(rows),
        Some(shape) => Err(Error::config("token_embd.weight", format!("is {shape:?}, not a matrix"))),
        None => Err(Error::config("token_embd.weight", "the file has no embedding matrix of this name")),
    }
}

fn has(file: &GgufFile, tensor: &str) -> bool {
    use tallow_formats::TensorSource;
    file.info(tensor).is_some()
}

fn special_ids(file: &GgufFile, value: &mut Value) -> Result<()> {
    for (key, hf) in [("bos", "bos_token_id"), ("eos", "eos_token_id")] {
        if let Some(id) = file.opt_u64(&format!("tokenizer.ggml.{key}_token_id"))? {
            value[hf] = json!(id);
        }
    }
    Ok(())
}

/// The f64 that a person would have written for this f32 (1e-5, not 9.999999747378752e-6).
fn widen(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// GGUF's name for a Hugging Face tensor name of any family here; `None` if it has none.
pub fn tensor_name(hf: &str) -> Option<String> {
    let top = match hf {
        "model.embed_tokens.weight" | "transformer.wte.weight" => Some("token_embd.weight"),
        "transformer.wpe.weight" => Some("position_embd.weight"),
        "model.norm.weight" | "transformer.ln_f.weight" => Some("output_norm.weight"),
        "transformer.ln_f.bias" => Some("output_norm.bias"),
        "lm_head.weight" => Some("output.weight"),
        _ => None,
    };
    if let Some(name) = top {
        return Some(name.to_owned());
    }
    let rest = hf.strip_prefix("model.layers.").or_else(|| hf.strip_prefix("transformer.h."))?;
    let (block, rest) = rest.split_once('.')?;
    let (module, leaf) = rest.rsplit_once('.')?;
    let module = match module {
        "input_layernorm" | "ln_1" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "attn.c_attn" => "attn_qkv",
        "self_attn.o_proj" | "attn.c_proj" => "attn_output",
        "post_attention_layernorm" | "ln_2" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.c_fc" => "ffn_up",
        "mlp.down_proj" | "mlp.c_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{block}.{module}.{leaf}"))
}

/// Undoes llama.cpp's reordering of query and key rows: it stores rotary pairs next to each other, `(h, i, half)`;
/// Hugging Face keeps the halves apart, `(h, half, i)`. `rows` holds `num_heads * head_dim` rows of `cols` values, or of as
/// many bytes of blocks.
pub fn unpermute<T: Copy + Default>(rows: &mut [T], num_heads: usize, cols: usize) {
    reorder(rows, num_heads, cols, |stored, ours| (stored, ours));
}

/// What llama.cpp makes of query and key rows: the inverse of [`unpermute`].
pub fn permute<T: Copy + Default>(rows: &mut [T], num_heads: usize, cols: usize) {
    reorder(rows, num_heads, cols, |stored, ours| (ours, stored));
}

/// Moves rows within each head, `which` choosing from and to of a row's place in GGUF and in Hugging Face's order.
fn reorder<T: Copy + Default>(
    rows: &mut [T],
    num_heads: usize,
    cols: usize,
    which: fn(usize, usize) -> (usize, usize),
) {
    let head = rows.len() / num_heads;
    let pairs = head / cols / 2;
    let mut scratch = vec![T::default(); head];
    for rows in rows.chunks_exact_mut(head) {
        for i in 0..pairs {
            for half in 0..2 {
                let (from, to) = which((2 * i + half) * cols, (half * pairs + i) * cols);
                scratch[to..to + cols].copy_from_slice(&rows[from..from + cols]);
            }
        }
        rows.copy_from_slice(&scratch);
    }
}

/// Heads of a parameter whose rows GGUF has in its own order: rotated queries and keys.
pub fn permuted_heads(config: &dyn ModelConfig, hf: &str) -> Option<usize> {
    let shape = config.shape();
    if hf.contains(".q_proj.") {
        Some(shape.num_heads)
    } else if hf.contains(".k_proj.") {
        Some(shape.num_kv_heads)
    } else {
        None
    }
}

/// `general.architecture` of a model.
///
/// # Errors
/// If GGUF has none for its architecture.
pub fn architecture(config: &dyn ModelConfig) -> Result<&'static str> {
    let hf = config.to_hf();
    let name = hf["architectures"][0].as_str().unwrap_or_default();
    let family = families().iter().find(|family| family.architectures.contains(&name));
    family.map(|family| family.name).ok_or_else(|| Error::architecture(name, &["llama", "gpt2"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpermute_separates_the_halves_of_each_head() {
        let mut rows: Vec<f32> = [0, 2, 1, 3, 10, 12, 11, 13].iter().map(|&x| x as f32).collect();
        unpermute(&mut rows, 2, 1);
        assert_eq!(rows, [0., 1., 2., 3., 10., 11., 12., 13.]);
        permute(&mut rows, 2, 1);
        assert_eq!(rows, [0., 2., 1., 3., 10., 12., 11., 13.]);
        // Heads of three pairs: the two orders are no inverses of themselves.
        let mut rows: Vec<f32> = (0..24).map(|x| x as f32).collect();
        permute(&mut rows, 2, 2);
        assert_eq!(rows[..12], [0., 1., 6., 7., 2., 3., 8., 9., 4., 5., 10., 11.]);
        unpermute(&mut rows, 2, 2);
        assert_eq!(rows, (0..24).map(|x| x as f32).collect::<Vec<_>>());
    }

    #[test]
    fn every_llama_name_has_a_gguf_name() {
        assert_eq!(tensor_name("model.layers.12.mlp.down_proj.weight").as_deref(), Some("blk.12.ffn_down.weight"));
        assert_eq!(tensor_name("transformer.h.0.attn.c_attn.bias").as_deref(), Some("blk.0.attn_qkv.bias"));
        assert_eq!(tensor_name("model.layers.0.other.weight"), None);
    }
}
