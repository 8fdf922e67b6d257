//! The Llama family: RMSNorm before each half, rotary positions, grouped keys and values, SwiGLU.
//!
//! Configuration keys and tensor names are those of `LlamaForCausalLM` in Hugging Face's transformers, the numbers of
//! which the parity tests compare with. `MistralForCausalLM` is the same with a sliding window.

use std::borrow::Cow;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tallow_nn::{
    Attention, AttentionConfig, Build, Embedding, ForwardContext, GatedMlp, Head, Linear, Result, RmsNorm, Role,
    RopeConfig, RopeScaling, site,
};
use tallow_ops::{reshape, residual_add};

use crate::config::{Size, check_fractions, check_sizes, is_false, most, typed};
use crate::decoder::check_positions;
use crate::{Decoder, EosTokenId, Error, ModelConfig, ParsedConfig, Shape};

pub(crate) const KEYS: &[&str] = &[
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "residual_dropout",
    "prefix_lm",
];

/// Keys that are written as null too: without them transformers assumes ids (1 and 2) that this model does not have.
const NULL_IS_SAID: &[&str] = &["rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id"];

/// What `MistralForCausalLM` means by a key that its file does not have, where Llama means something else.
const MISTRAL_DEFAULTS: &[(&str, usize)] =
    &[("num_key_value_heads", 8), ("max_position_embeddings", 131_072), ("sliding_window", 4096)];

fn with_mistral_defaults(value: &Value) -> Cow<'_, Value> {
    let mut value = Cow::Borrowed(value);
    if value["architectures"][0] == "MistralForCausalLM" {
        for (key, default) in MISTRAL_DEFAULTS.iter().filter(|(key, _)| value.get(key).is_none()).collect::<Vec<_>>() {
            value.to_mut()[*key] = json!(default);
        }
    }
    value
}

/// Configuration of a Llama-like decoder, with Hugging Face's keys and defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the keys of Hugging Face's LlamaConfig, by their names")]
pub struct LlamaConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: Option<usize>,
    pub head_dim: Option<usize>,
    #[serde(default = "silu")]
    pub hidden_act: String,
    #[serde(default = "two_thousand")]
    pub max_position_embeddings: usize,
    #[serde(default = "two_hundredths")]
    pub initializer_range: f64,
    #[serde(default = "one_millionth")]
    pub rms_norm_eps: f64,
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<Value>,
    /// Where transformers 5 keeps `rope_theta` and the scaling.
    pub rope_parameters: Option<Value>,
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    #[serde(default)]
    pub attention_dropout: f64,
    /// Dropout on the output of each half of a block and on the embeddings (no Hugging Face key; training only).
    #[serde(default)]
    pub residual_dropout: f64,
    /// See [`Shape::prefix_lm`] (no Hugging Face key).
    #[serde(default, skip_serializing_if = "is_false")]
    pub prefix_lm: bool,
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<EosTokenId>,
    pub pad_token_id: Option<i64>,
    /// Theta and stretching, resolved from the keys above.
    #[serde(skip)]
    rope: Option<(f64, RopeScaling)>,
}

fn silu() -> String {
    "silu".into()
}
fn two_thousand() -> usize {
    2048
}
fn two_hundredths() -> f64 {
    0.02
}
fn one_millionth() -> f64 {
    1e-6
}

impl LlamaConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// For a missing or mistyped key, or a value that is not supported, naming the key.
    pub fn parse(value: &Value) -> crate::Result<ParsedConfig> {
        let (mut config, unknown_keys): (Self, _) = typed(&with_mistral_defaults(value), KEYS)?;
        config.rope = Some(config.resolve_rope()?);
        config.validate()?;
        Ok(ParsedConfig { config: Box::new(config), unknown_keys })
    }

    fn validate(&self) -> crate::Result<()> {
        check_sizes(&[
            Size("vocab_size", self.vocab_size, most::VOCAB),
            Size("hidden_size", self.hidden_size, most::WIDTH),
            Size("intermediate_size", self.intermediate_size, most::WIDTH),
            Size("num_hidden_layers", self.num_hidden_layers, most::LAYERS),
            Size("num_attention_heads", self.num_attention_heads, most::HEADS),
            Size("num_key_value_heads", self.num_kv_heads(), most::HEADS),
            Size("head_dim", self.head_dim.unwrap_or(1), most::WIDTH),
            Size("max_position_embeddings", self.max_position_embeddings, most::POSITIONS),
            Size("sliding_window", self.sliding_window.unwrap_or(1), usize::MAX),
        ])?;
        let (heads, kv_heads) = (self.num_attention_heads, self.num_kv_heads());
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("{kv_heads} does not divide num_attention_heads = {heads}; use a divisor, e.g. 1");
            return Err(Error::config("num_key_value_heads", reason));
        }
        // With head_dim the width could be anything, but transformers refuses it for Llama all the same.
        if (self.head_dim.is_none() || self.sliding_window.is_none()) && !self.hidden_size.is_multiple_of(heads) {
            let near = self.hidden_size.div_ceil(heads) * heads;
            let reason = format!("{} is no multiple of num_attention_heads = {heads}; e.g. {near}", self.hidden_size);
            return Err(Error::config("hidden_size", reason));
        }
        if !self.head_dim().is_multiple_of(2) {
            let reason = format!("{} is odd, but rotary embedding turns pairs; e.g. 64", self.head_dim());
            return Err(Error::config("head_dim", reason));
        }
        for (key, bias) in [("attention_bias", self.attention_bias), ("mlp_bias", self.mlp_bias)] {
            if bias && self.sliding_window.is_some() {
                let reason = "no architecture of transformers has it together with sliding_window; set one of them off";
                return Err(Error::config(key, reason));
            }
        }
        if self.hidden_act != "silu" {
            let reason = format!("`{}` is not supported for this family; `silu` is", self.hidden_act);
            return Err(Error::config("hidden_act", reason));
        }
        if self.max_position_embeddings * self.head_dim() > most::ROTARY {
            let reason = format!(
                "the rotary table of {} positions would take more than 1 GiB; set at most {}",
                self.max_position_embeddings,
                most::ROTARY / self.head_dim()
            );
            return Err(Error::config("max_position_embeddings", reason));
        }
        let dropouts = [("residual_dropout", self.residual_dropout), ("attention_dropout", self.attention_dropout)];
        check_fractions(&dropouts, 0.1)?;
        check_fractions(&[("rms_norm_eps", self.rms_norm_eps)], 1e-5)?;
        check_fractions(&[("initializer_range", self.initializer_range)], 0.02)
    }

    /// Theta and stretching; where a file says either twice, what transformers would take.
    fn resolve_rope(&self) -> crate::Result<(f64, RopeScaling)> {
        let dicts = [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)];
        let (key, given) = dicts
            .into_iter()
            .find_map(|(key, v)| Some((key, v.as_ref().filter(|v| !v.is_null())?)))
            .unwrap_or(("rope_parameters", &Value::Null));
        let theta = match given.get("rope_theta").filter(|theta| !theta.is_null()) {
            Some(theta) => theta.as_f64().ok_or_else(|| {
                Error::config(&format!("{key}.rope_theta"), format!("{theta} is not a number; e.g. 10000.0"))
            })?,
            None => self.rope_theta.unwrap_or(10_000.0),
        };
        if !(theta.is_finite() && theta > 0.0) {
            return Err(Error::config("rope_theta", format!("{theta} is not a positive number; e.g. 10000")));
        }
        if given.is_null() {
            return Ok((theta, RopeScaling::Default));
        }
        let mut scaling = given.clone();
        if let Some(map) = scaling.as_object_mut() {
            if map.get("partial_rotary_factor").is_some_and(|share| share.as_f64() != Some(1.0)) {
                return Err(Error::config(key, "partial_rotary_factor is not supported; leave it out (1.0)"));
            }
            // The key was called `type` until transformers 4.43.
            if let Some(kind) = map.remove("type") {
                map.entry("rope_type").or_insert(kind);
            }
            map.entry("rope_type").or_insert_with(|| "default".into());
        }
        let scaling = serde_json::from_value(scaling)
            .map_err(|e| Error::config(key, format!("{e}; supported types are default, linear and llama3")))?;
        check_scaling(key, &scaling)?;
        Ok((theta, scaling))
    }

    fn num_kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }
}

/// Refuses stretches that would make frequencies infinite, negative or not a number.
fn check_scaling(key: &str, scaling: &RopeScaling) -> crate::Result<()> {
    let positive = |name: &str, x: f64| match x.is_finite() && x > 0.0 {
        true => Ok(()),
        false => Err(Error::config(key, format!("{name} = {x} is not a positive number; e.g. 2.0"))),
    };
    match *scaling {
        RopeScaling::Default => Ok(()),
        RopeScaling::Linear { factor } => positive("factor", factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            positive("factor", factor)?;
            positive("low_freq_factor", low_freq_factor)?;
            positive("high_freq_factor - low_freq_factor", high_freq_factor - low_freq_factor)?;
            positive("original_max_position_embeddings", original_max_position_embeddings as f64)
        }
    }
}

impl ModelConfig for LlamaConfig {
    fn shape(&self) -> Shape {
        Shape {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_layers: self.num_hidden_layers,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_kv_heads(),
            head_dim: self.head_dim(),
            max_positions: self.max_position_embeddings,
            sliding_window: self.sliding_window,
            tied: self.tie_word_embeddings,
            prefix_lm: self.prefix_lm,
        }
    }

    fn build(&self, b: &Build) -> Result<Box<dyn Decoder>> {
        Ok(Box::new(Llama::new(self, b)?))
    }

    fn to_hf(&self) -> Value {
        let mistral = self.sliding_window.is_some();
        let mut value = json!(self);
        value["architectures"] = json!([if mistral { "MistralForCausalLM" } else { "LlamaForCausalLM" }]);
        value["model_type"] = json!(if mistral { "mistral" } else { "llama" });
        value["torch_dtype"] = json!("float32");
        value["head_dim"] = json!(self.head_dim());
        value["num_key_value_heads"] = json!(self.num_kv_heads());
        let (theta, scaling) = self.rope.clone().unwrap_or((10_000.0, RopeScaling::Default));
        value["rope_theta"] = json!(theta);
        value["rope_scaling"] = if scaling == RopeScaling::Default { Value::Null } else { json!(scaling) };
        if let Some(map) = value.as_object_mut() {
            map.remove("rope_parameters");
            map.retain(|key, value| !value.is_null() || NULL_IS_SAID.contains(&key.as_str()));
        }
        value
    }

    fn eos_token_ids(&self) -> Vec<u32> {
        self.eos_token_id.as_ref().map(EosTokenId::ids).unwrap_or_default()
    }

    fn set_vocabulary(&mut self, vocab_size: usize, bos: Option<u32>, eos: Option<u32>) {
        self.vocab_size = vocab_size;
        self.bos_token_id = bos;
        self.eos_token_id = eos.map(EosTokenId::One);
    }

    fn set_max_positions(&mut self, max_positions: usize) {
        self.max_position_embeddings = max_positions;
    }

    fn set_prefix_lm(&mut self, prefix_lm: bool) {
        self.prefix_lm = prefix_lm;
    }

    /// Input, both norms' outputs and the first sum (4 c); rotated q and the attended values (2 h d); rotated k, and v
    /// (2 g d); gate, up and their product (3 f).
    fn block_activations(&self) -> usize {
        let shape = self.shape();
        let heads = shape.num_heads + shape.num_kv_heads;
        4 * shape.hidden_size + 2 * heads * shape.head_dim + 3 * shape.intermediate_size
    }

    fn check_training(&self) -> crate::Result<()> {
        if self.attention_dropout != 0.0 {
            let reason =
                "cannot be trained with: dropout on attention weights has no kernel; set 0 and use residual_dropout";
            return Err(Error::config("attention_dropout", reason));
        }
        Ok(())
    }
}

/// A Llama-like decoder.
struct Llama {
    shape: Shape,
    embed_tokens: Embedding,
    layers: Vec<Block>,
    norm: RmsNorm,
    lm_head: Head,
    residual_dropout: f64,
}

impl Llama {
    fn new(config: &LlamaConfig, b: &Build) -> Result<Self> {
        let shape = config.shape();
        let (vocab, hidden) = (shape.vocab_size, shape.hidden_size);
        let b = b.init_std(config.initializer_range as f32);
        let model = b.at("model");
        let embed_tokens = model.embedding("embed_tokens", Role::Embed, vocab, hidden)?;
        let (theta, scaling) = config.rope.clone().unwrap_or((10_000.0, RopeScaling::Default));
        let rope = RopeConfig { rotary_dim: shape.head_dim, theta, max_positions: shape.max_positions, scaling };
        let rope = rope.table()?;
        let layers = (0..shape.num_layers)
            .map(|i| Block::new(config, i, &rope, &model.at(&format!("layers.{i}")).stage(1 + i)))
            .collect::<Result<_>>()?;
        let last = 1 + shape.num_layers;
        let norm = model.stage(last).rms_norm("norm", hidden, config.rms_norm_eps)?;
        let lm_head = match config.tie_word_embeddings {
            true => embed_tokens.tied_head(),
            false => b.stage(last).head("lm_head", vocab, hidden)?,
        };
        Ok(Self { shape, embed_tokens, layers, norm, lm_head, residual_dropout: config.residual_dropout })
    }
}

impl Decoder for Llama {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn embed(&self, ids: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        check_positions(cx, &self.shape)?;
        cx.dropout(self.embed_tokens.forward(ids, cx)?, self.residual_dropout, 0, site::EMBEDDING)
    }

    fn block(&self, index: usize, x: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        self.layers[index].forward(x, cx)
    }

    fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    fn head(&self) -> &Head {
        &self.lm_head
    }
}

struct Block {
    input_layernorm: RmsNorm,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    attention: Attention,
    o_proj: Linear,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
    residual_dropout: f64,
}

impl Block {
    fn new(
        config: &LlamaConfig,
        layer: usize,
        rope: &std::sync::Arc<tallow_ops::RopeTable>,
        b: &Build,
    ) -> Result<Self> {
        let Shape { hidden_size: c, intermediate_size, num_heads, num_kv_heads, head_dim, .. } = config.shape();
        let (attn, mlp, eps) = (b.at("self_attn"), b.at("mlp"), config.rms_norm_eps);
        let (bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        let attention = AttentionConfig { num_heads, num_kv_heads, head_dim, scale: (head_dim as f64).powf(-0.5) };
        Ok(Self {
            input_layernorm: b.rms_norm("input_layernorm", c, eps)?,
            q_proj: attn.linear("q_proj", Role::Qkv, c, num_heads * head_dim, bias)?,
            k_proj: attn.linear("k_proj", Role::Qkv, c, num_kv_heads * head_dim, bias)?,
            v_proj: attn.linear("v_proj", Role::Qkv, c, num_kv_heads * head_dim, bias)?,
            attention: Attention { config: attention, rope: Some(rope.clone()), layer },
            o_proj: attn.linear("o_proj", Role::AttnOut, num_heads * head_dim, c, bias)?,
            post_attention_layernorm: b.rms_norm("post_attention_layernorm", c, eps)?,
            mlp: GatedMlp {
                gate_proj: mlp.linear("gate_proj", Role::MlpIn, c, intermediate_size, mlp_bias)?,
                up_proj: mlp.linear("up_proj", Role::MlpIn, c, intermediate_size, mlp_bias)?,
                down_proj: mlp.linear("down_proj", Role::MlpOut, intermediate_size, c, mlp_bias)?,
            },
            residual_dropout: config.residual_dropout,
        })
    }

    fn forward(&self, x: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        let (p, layer) = (self.residual_dropout, self.attention.layer);
        let y = self.input_layernorm.forward(x)?;
        let heads = |projection: &Linear| -> Result<Tensor> {
            let (b, t, _) = y.dims3()?;
            Ok(reshape(&projection.forward(&y, cx)?, (b, t, (), self.attention.config.head_dim))?)
        };
        let (q, k, v) = (heads(&self.q_proj)?, heads(&self.k_proj)?, heads(&self.v_proj)?);
        let y = self.attention.forward(&q, &k, &v, cx)?;
        let y = self.o_proj.forward(&y, cx)?;
        let x = residual_add(x, &cx.dropout(y, p, layer, site::ATTENTION)?)?;
        let y = self.mlp.forward(&self.post_attention_layernorm.forward(&x)?, cx)?;
        Ok(residual_add(&x, &cx.dropout(y, p, layer, site::MLP)?)?)
    }
}
