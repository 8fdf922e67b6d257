//! GPT-2: LayerNorm before each half, learned positions, fused query-key-value projection, GELU, tied head.
//!
//! Keys and names are those of `GPT2LMHeadModel` in Hugging Face's transformers. Its `Conv1D` stores `[in, out]`;
//! in memory ours is `[out, in]` like every other matrix.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tallow_nn::{
    Activation, Attention, AttentionConfig, Build, Embedding, ForwardContext, Head, LayerNorm, Linear, Mlp, Result,
    Role, site,
};
use tallow_ops::{narrow, reshape, residual_add};

use crate::config::{Size, check_fractions, check_sizes, is_false, most, typed};
use crate::decoder::check_positions;
use crate::{Decoder, EosTokenId, Error, ModelConfig, ParsedConfig, Shape};

pub(crate) const KEYS: &[&str] = &[
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "n_inner",
    "activation_function",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "layer_norm_epsilon",
    "initializer_range",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "reorder_and_upcast_attn",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "add_cross_attention",
    "prefix_lm",
];

/// Keys that are written as null too: without them transformers assumes an id (50256) that this model may not have.
const NULL_IS_SAID: &[&str] = &["n_inner", "bos_token_id", "eos_token_id", "pad_token_id"];

/// Configuration of a GPT-2, with Hugging Face's keys. Dropout is off unless the file asks for it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the keys of Hugging Face's GPT2Config, by their names")]
pub struct Gpt2Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    pub n_inner: Option<usize>,
    #[serde(default = "gelu_new")]
    pub activation_function: Activation,
    #[serde(default)]
    pub resid_pdrop: f64,
    #[serde(default)]
    pub embd_pdrop: f64,
    #[serde(default)]
    pub attn_pdrop: f64,
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "two_hundredths")]
    pub initializer_range: f64,
    #[serde(default = "yes")]
    pub scale_attn_weights: bool,
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
    #[serde(default)]
    pub reorder_and_upcast_attn: bool,
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    pub add_cross_attention: bool,
    /// See [`Shape::prefix_lm`] (no Hugging Face key).
    #[serde(default, skip_serializing_if = "is_false")]
    pub prefix_lm: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_id: Option<EosTokenId>,
    pub pad_token_id: Option<i64>,
}

fn gelu_new() -> Activation {
    Activation::GeluNew
}
fn epsilon() -> f64 {
    1e-5
}
fn two_hundredths() -> f64 {
    0.02
}
fn yes() -> bool {
    true
}

impl Gpt2Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// For a missing or mistyped key, or a value that is not supported, naming the key.
    pub fn parse(value: &Value) -> crate::Result<ParsedConfig> {
        let (config, unknown_keys): (Self, _) = typed(value, KEYS)?;
        config.validate()?;
        Ok(ParsedConfig { config: Box::new(config), unknown_keys })
    }

    fn validate(&self) -> crate::Result<()> {
        check_sizes(&[
            Size("vocab_size", self.vocab_size, most::VOCAB),
            Size("n_positions", self.n_positions, most::POSITIONS),
            Size("n_embd", self.n_embd, most::WIDTH),
            Size("n_layer", self.n_layer, most::LAYERS),
            Size("n_head", self.n_head, most::HEADS),
            Size("n_inner", self.n_inner.unwrap_or(1), most::WIDTH),
        ])?;
        if !self.n_embd.is_multiple_of(self.n_head) {
            let near = self.n_embd.div_ceil(self.n_head) * self.n_head;
            return Err(Error::config("n_embd", format!("{} is no multiple of n_head; e.g. {near}", self.n_embd)));
        }
        let dropouts =
            [("resid_pdrop", self.resid_pdrop), ("embd_pdrop", self.embd_pdrop), ("attn_pdrop", self.attn_pdrop)];
        check_fractions(&dropouts, 0.1)?;
        check_fractions(&[("layer_norm_epsilon", self.layer_norm_epsilon)], 1e-5)?;
        check_fractions(&[("initializer_range", self.initializer_range)], 0.02)?;
        if self.add_cross_attention {
            return Err(Error::config("add_cross_attention", "cross-attention is not supported; set false"));
        }
        Ok(())
    }

    fn scale(&self, layer: usize) -> f64 {
        let head_dim = (self.n_embd / self.n_head) as f64;
        let scale = if self.scale_attn_weights { head_dim.powf(-0.5) } else { 1.0 };
        if self.scale_attn_by_inverse_layer_idx { scale / (layer + 1) as f64 } else { scale }
    }
}

impl ModelConfig for Gpt2Config {
    fn shape(&self) -> Shape {
        Shape {
            vocab_size: self.vocab_size,
            hidden_size: self.n_embd,
            intermediate_size: self.n_inner.unwrap_or(4 * self.n_embd),
            num_layers: self.n_layer,
            num_heads: self.n_head,
            num_kv_heads: self.n_head,
            head_dim: self.n_embd / self.n_head,
            max_positions: self.n_positions,
            sliding_window: None,
            tied: self.tie_word_embeddings,
            prefix_lm: self.prefix_lm,
        }
    }

    fn build(&self, b: &Build) -> Result<Box<dyn Decoder>> {
        Ok(Box::new(Gpt2::new(self, b)?))
    }

    fn to_hf(&self) -> Value {
        let mut value = json!(self);
        value["architectures"] = json!(["GPT2LMHeadModel"]);
        value["model_type"] = json!("gpt2");
        value["torch_dtype"] = json!("float32");
        if let Some(map) = value.as_object_mut() {
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
        self.n_positions = max_positions;
    }

    fn set_prefix_lm(&mut self, prefix_lm: bool) {
        self.prefix_lm = prefix_lm;
    }

    /// Input, both norms' outputs and the first sum (4 c), the fused projection (3 c), the attended values (c), the
    /// feed-forward before and after its activation (2 f).
    fn block_activations(&self) -> usize {
        let shape = self.shape();
        8 * shape.hidden_size + 2 * shape.intermediate_size
    }

    fn check_training(&self) -> crate::Result<()> {
        if self.attn_pdrop != 0.0 {
            let reason = format!("{} cannot be trained with: attention dropout has no kernel; set 0", self.attn_pdrop);
            return Err(Error::config("attn_pdrop", reason));
        }
        Ok(())
    }
}

struct Gpt2 {
    shape: Shape,
    wte: Embedding,
    wpe: Embedding,
    layers: Vec<Block>,
    ln_f: LayerNorm,
    lm_head: Head,
    embd_pdrop: f64,
}

impl Gpt2 {
    fn new(config: &Gpt2Config, b: &Build) -> Result<Self> {
        let shape = config.shape();
        let b = b.init_std(config.initializer_range as f32).stored_transposed();
        let model = b.at("transformer");
        let wte = model.embedding("wte", Role::Embed, shape.vocab_size, shape.hidden_size)?;
        let wpe = model.embedding("wpe", Role::Position, shape.max_positions, shape.hidden_size)?;
        let layers = (0..shape.num_layers)
            .map(|i| Block::new(config, i, &model.at(&format!("h.{i}")).stage(1 + i)))
            .collect::<Result<_>>()?;
        let last = 1 + shape.num_layers;
        let ln_f = model.stage(last).layer_norm("ln_f", shape.hidden_size, config.layer_norm_epsilon)?;
        let lm_head = match config.tie_word_embeddings {
            true => wte.tied_head(),
            false => b.stage(last).head("lm_head", shape.vocab_size, shape.hidden_size)?,
        };
        Ok(Self { shape, wte, wpe, layers, ln_f, lm_head, embd_pdrop: config.embd_pdrop })
    }
}

impl Decoder for Gpt2 {
    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn embed(&self, ids: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        check_positions(cx, &self.shape)?;
        let positions = Tensor::from_slice(&cx.positions, ids.shape(), ids.device())?;
        let x = residual_add(&self.wte.forward(ids, cx)?, &self.wpe.forward(&positions, cx)?)?;
        cx.dropout(x, self.embd_pdrop, 0, site::EMBEDDING)
    }

    fn block(&self, index: usize, x: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        self.layers[index].forward(x, cx)
    }

    fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        self.ln_f.forward(x)
    }

    fn head(&self) -> &Head {
        &self.lm_head
    }
}

struct Block {
    ln_1: LayerNorm,
    c_attn: Linear,
    attention: Attention,
    c_proj: Linear,
    ln_2: LayerNorm,
    mlp: Mlp,
    resid_pdrop: f64,
}

impl Block {
    fn new(config: &Gpt2Config, layer: usize, b: &Build) -> Result<Self> {
        let Shape { hidden_size: c, intermediate_size, num_heads, num_kv_heads, head_dim, num_layers, .. } =
            config.shape();
        // Projections that end on the residual stream start smaller, so that its variance does not grow with depth.
        let onto_residual = config.initializer_range / (2.0 * num_layers as f64).sqrt();
        let (attn, mlp) = (b.at("attn"), b.at("mlp"));
        let (attn_out, mlp_out) = (attn.init_std(onto_residual as f32), mlp.init_std(onto_residual as f32));
        let attention = AttentionConfig { num_heads, num_kv_heads, head_dim, scale: config.scale(layer) };
        Ok(Self {
            ln_1: b.layer_norm("ln_1", c, config.layer_norm_epsilon)?,
            c_attn: attn.linear("c_attn", Role::Qkv, c, 3 * c, true)?,
            attention: Attention { config: attention, rope: None, layer },
            c_proj: attn_out.linear("c_proj", Role::AttnOut, c, c, true)?,
            ln_2: b.layer_norm("ln_2", c, config.layer_norm_epsilon)?,
            mlp: Mlp {
                up: mlp.linear("c_fc", Role::MlpIn, c, intermediate_size, true)?,
                down: mlp_out.linear("c_proj", Role::MlpOut, intermediate_size, c, true)?,
                activation: config.activation_function,
            },
            resid_pdrop: config.resid_pdrop,
        })
    }

    fn forward(&self, x: &Tensor, cx: &mut ForwardContext) -> Result<Tensor> {
        let (p, layer, (b, t, _)) = (self.resid_pdrop, self.attention.layer, x.dims3()?);
        let AttentionConfig { num_heads: h, head_dim: d, .. } = self.attention.config;
        let qkv = self.c_attn.forward(&self.ln_1.forward(x)?, cx)?;
        let qkv = reshape(&qkv, (b, t, 3 * h, d))?;
        let (q, k, v) = (narrow(&qkv, 2, 0, h)?, narrow(&qkv, 2, h, h)?, narrow(&qkv, 2, 2 * h, h)?);
        let y = self.attention.forward(&q, &k, &v, cx)?;
        let y = self.c_proj.forward(&y, cx)?;
        let x = residual_add(x, &cx.dropout(y, p, layer, site::ATTENTION)?)?;
        let y = self.mlp.forward(&self.ln_2.forward(&x)?, cx)?;
        Ok(residual_add(&x, &cx.dropout(y, p, layer, site::MLP)?)?)
    }
}
