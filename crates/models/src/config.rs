//! What every family's configuration can say about itself.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tallow_nn::{Build, ParamSpec, Role};

use crate::{Decoder, Result};

/// The sizes of a decoder that do not depend on its family.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shape {
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Channels of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// The most positions the model was configured for.
    pub max_positions: usize,
    /// Tokens that a query sees back, itself included; `None` for all.
    pub sliding_window: Option<usize>,
    /// Head and embedding share their weights.
    pub tied: bool,
    /// Tokens of a prompt see each other both ways, those behind it only what is in front of them (a prefix LM).
    pub prefix_lm: bool,
}

impl Shape {
    /// Parameters that take part in a matrix product for every token: all but an untied embedding and learned positions.
    pub fn matmul_params(&self, specs: &[ParamSpec]) -> usize {
        let looked_up = |s: &&ParamSpec| (s.role == Role::Embed && !self.tied) || s.role == Role::Position;
        let all: usize = specs.iter().map(ParamSpec::num_elements).sum();
        all - specs.iter().filter(looked_up).map(ParamSpec::num_elements).sum::<usize>()
    }

    /// FLOPs to train on one token in rows of `context`: `6 N + 12 L C T` (two for each multiply-add, forward and twice
    /// that backward; the attention counted in full, not halved for causality: PaLM, appendix B).
    pub fn train_flops_per_token(&self, specs: &[ParamSpec], context: usize) -> f64 {
        let attention = 12 * self.num_layers * self.num_heads * self.head_dim * context;
        6.0 * self.matmul_params(specs) as f64 + attention as f64
    }
}

/// A configuration of some family.
pub trait ModelConfig: Debug + Send + Sync {
    /// Its sizes.
    fn shape(&self) -> Shape;

    /// Asks for the model's layers.
    ///
    /// # Errors
    /// As the factory behind `b`, and for sizes that make no model.
    fn build(&self, b: &Build) -> tallow_nn::Result<Box<dyn Decoder>>;

    /// The `config.json` that Hugging Face's transformers reads.
    fn to_hf(&self) -> Value;

    /// Ids that end a text.
    fn eos_token_ids(&self) -> Vec<u32>;

    /// Sets what a tokenizer decides: vocabulary size and special ids.
    fn set_vocabulary(&mut self, vocab_size: usize, bos: Option<u32>, eos: Option<u32>);

    /// Sets the context that the model is trained for.
    fn set_max_positions(&mut self, max_positions: usize);

    /// Sets whether prompts are seen both ways, see [`Shape::prefix_lm`].
    fn set_prefix_lm(&mut self, prefix_lm: bool);

    /// Elements that one token leaves behind in one block for the backward, in the compute dtype.
    fn block_activations(&self) -> usize;

    /// What only training needs and this program cannot do.
    ///
    /// # Errors
    /// Naming the key.
    fn check_training(&self) -> Result<()> {
        Ok(())
    }
}

/// A configuration and what was said in its file that has no effect on the model.
pub struct ParsedConfig {
    /// The configuration.
    pub config: Box<dyn ModelConfig>,
    /// Keys of the file that this program does not know. The caller tells the user.
    pub unknown_keys: Vec<String>,
}

/// `eos_token_id` of a configuration: one id or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EosTokenId {
    /// One id.
    One(u32),
    /// Several ids.
    Many(Vec<u32>),
}

impl EosTokenId {
    /// All of them.
    pub fn ids(&self) -> Vec<u32> {
        match self {
            EosTokenId::One(id) => vec![*id],
            EosTokenId::Many(ids) => ids.clone(),
        }
    }
}

/// Keys of `config.json` that say nothing about the computation of a decoder.
const WITHOUT_EFFECT: &[&str] = &[
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pretraining_tp",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "gradient_checkpointing",
    "is_encoder_decoder",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "finetuning_task",
    "task_specific_params",
    "n_ctx",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "_attn_implementation_autoset",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "cross_attention_hidden_size",
    "prefix",
    "is_llama_config",
    "rope_interleaved",
    "transformers.js_config",
];

/// For keys of our own that are written only where they say something.
pub(crate) fn is_false(value: &bool) -> bool {
    !value
}

/// A size that a configuration states, and the most that any model could mean by it.
pub(crate) struct Size(pub &'static str, pub usize, pub usize);

/// Limits of [`Size`]: an order of magnitude past the largest models, and small enough that no product of two or three of
/// them overflows and that planning a model that does not exist takes no memory to speak of.
pub(crate) mod most {
    pub const VOCAB: usize = 1 << 24;
    pub const WIDTH: usize = 1 << 20;
    pub const LAYERS: usize = 1 << 12;
    pub const HEADS: usize = 1 << 14;
    pub const POSITIONS: usize = 1 << 26;
    /// Positions times channels of a head: a rotary table of 1 GiB.
    pub const ROTARY: usize = 1 << 28;
}

/// Checks that every size is at least 1 and below its limit, before anything is made of it.
///
/// # Errors
/// Naming the key.
pub(crate) fn check_sizes(sizes: &[Size]) -> Result<()> {
    for &Size(key, size, most) in sizes {
        if size == 0 {
            return Err(crate::Error::config(key, "is 0; it must be at least 1"));
        }
        if size > most {
            return Err(crate::Error::config(
                key,
                format!("{size} is more than any model has; at most {most} is read"),
            ));
        }
    }
    Ok(())
}

/// Checks that a number is at least 0 and below 1, as dropouts and the epsilons of norms are.
///
/// # Errors
/// Naming the key.
pub(crate) fn check_fractions(fractions: &[(&'static str, f64)], example: f64) -> Result<()> {
    match fractions.iter().find(|(_, x)| !(0.0..1.0).contains(x)) {
        Some((key, x)) => Err(crate::Error::config(key, format!("{x} is not at least 0 and below 1; e.g. {example}"))),
        None => Ok(()),
    }
}

/// Reads a family's typed configuration, and lists the keys that neither it nor anything else knows.
///
/// # Errors
/// For a key of the wrong type or a required key that is missing, naming it.
pub(crate) fn typed<C>(value: &Value, known: &[&str]) -> Result<(C, Vec<String>)>
where
    C: for<'de> Deserialize<'de>,
{
    let config = serde_path_to_error::deserialize(value).map_err(|error| {
        let (key, message) = (error.path().to_string(), error.inner().to_string());
        match message.strip_prefix("missing field `").and_then(|rest| rest.split('`').next()) {
            Some(missing) => crate::Error::config(missing, "is missing"),
            None => crate::Error::config(if key == "." { "config" } else { &key }, message),
        }
    })?;
    Ok((config, unknown_keys(value, known)))
}

/// Keys of a configuration that neither a family's `known` ones nor anything else knows.
pub(crate) fn unknown_keys(value: &Value, known: &[&str]) -> Vec<String> {
    let given = value.as_object().into_iter().flat_map(|map| map.keys());
    let unknown = given.filter(|k| !known.contains(&k.as_str()) && !WITHOUT_EFFECT.contains(&k.as_str()));
    unknown.cloned().collect()
}
