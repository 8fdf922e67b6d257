//! `[adapter]` of the run file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tallow_adapters::{LoraConfig, LoraInit, Targets};
use tallow_models::{Quantization, QuantizeConfig};

use crate::reference::documented;
use crate::{Error, Result};

documented! {
    /// `[adapter]`: train a few small matrices beside the model instead of all of it.
    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    pub struct AdapterSection {
        /// `lora` (Hu et al. 2021), or `dora`, which learns the length of each output's weights apart (Liu et al. 2024).
        pub kind: AdapterKind,
        /// Inner width of the two matrices.
        pub rank: usize,
        /// The product of the two is scaled by `alpha / rank`.
        pub alpha: f64,
        /// Dropout on what the adapter sees.
        pub dropout: f64,
        /// `"all-linear"` (every projection of every block), or a list of modules: ends of names (`"q_proj"`), whole names, or
        /// patterns (`"*.layers.1?.mlp.*"`).
        pub targets: TargetsSetting,
        /// Modules that get no adapter though `targets` names them.
        pub exclude: Vec<String>,
        /// Other ranks for some modules, e.g. `{ down_proj = 32 }`.
        pub ranks: BTreeMap<String, usize>,
        /// Other alphas for some modules.
        pub alphas: BTreeMap<String, f64>,
        /// Scale by `alpha / sqrt(rank)` instead (rsLoRA, Kalajdzievski 2023).
        pub rslora: bool,
        /// How the matrices start: `kaiming` (PEFT's default) or `gaussian`, where the second is zero, or `olora`: within the matrix
        /// that they stand beside (Büyükakyüz 2024), which takes a smaller learning rate, as both have a size from the start; its files have twice the
        /// rank. In each the model begins as it was.
        pub init: InitSetting,
        /// Modules that are trained whole and saved with the adapter, e.g. `["lm_head"]`.
        pub modules_to_save: Vec<String>,
        /// Tokens whose rows of the embedding (and of the head) are trained and saved with the adapter, e.g. `["<|im_start|>"]`;
        /// those of `tokenizer.add_tokens` are in any case.
        pub train_tokens: Vec<String>,
        /// Learning rate of the second matrix over that of the first (LoRA+, Hayou et al. 2024); 1 for plain LoRA.
        pub lr_ratio: f64,
        /// How the frozen projections are kept: `none`, `nf4` or `fp4` (QLoRA, Dettmers et al. 2023; 4 bits as bitsandbytes
        /// defines them), `q8_0`, or `gguf` (or the name of a type, as `q4_k`): the blocks that the GGUF file has.
        pub quantize: Quantization,
        /// How embedding and head are kept where they are frozen; as `quantize`. Without it: `q8_0` where `quantize` is 4 or 8
        /// bits, the file's blocks where it is `gguf` and so on, `none` where it is `none`. QLoRA as published, and bitsandbytes,
        /// leave both in 16 bits: `none` is their base.
        pub quantize_embeddings: Option<Quantization>,
        /// Values that share a scale, in 4 bits: a power of two from 32 to 4096.
        pub quantize_block: usize,
        /// Quantize the scales of 4 bits too: 4.127 bits a value instead of 4.5 at blocks of 64.
        pub double_quant: bool,
    }
}

impl Default for AdapterSection {
    fn default() -> Self {
        Self {
            kind: AdapterKind::Lora,
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: TargetsSetting::default(),
            exclude: vec![],
            ranks: BTreeMap::new(),
            alphas: BTreeMap::new(),
            rslora: false,
            init: InitSetting::Kaiming,
            modules_to_save: vec![],
            train_tokens: vec![],
            lr_ratio: 1.0,
            quantize: Quantization::None,
            quantize_embeddings: None,
            quantize_block: 64,
            double_quant: true,
        }
    }
}

/// Which adapter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Two small matrices.
    #[default]
    Lora,
    /// The same and magnitudes.
    Dora,
}

/// How an adapter starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitSetting {
    /// Uniform in one over the root of the inputs.
    #[default]
    Kaiming,
    /// Normal with a deviation of one over the rank.
    Gaussian,
    /// Within the matrix.
    Olora,
}

/// Which modules.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetsSetting {
    /// `"all-linear"`, or one name.
    One(String),
    /// Names.
    Many(Vec<String>),
}

impl Default for TargetsSetting {
    fn default() -> Self {
        Self::One(ALL_LINEAR.into())
    }
}

const ALL_LINEAR: &str = "all-linear";

impl AdapterSection {
    /// The settings of the adapter itself.
    ///
    /// # Errors
    /// For a value that cannot work, naming the key.
    pub fn lora(&self) -> Result<LoraConfig> {
        if !(self.lr_ratio.is_finite() && self.lr_ratio > 0.0) {
            return Err(Error::config("adapter.lr_ratio", self.lr_ratio, "must be a positive number, e.g. 16"));
        }
        let config = LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: match &self.targets {
                TargetsSetting::One(name) if name == ALL_LINEAR => Targets::AllLinear,
                TargetsSetting::One(name) => Targets::Names(vec![name.clone()]),
                TargetsSetting::Many(names) => Targets::Names(names.clone()),
            },
            exclude: self.exclude.clone(),
            ranks: self.ranks.clone(),
            alphas: self.alphas.clone(),
            rslora: self.rslora,
            dora: self.kind == AdapterKind::Dora,
            modules_to_save: self.modules_to_save.clone(),
            // Their ids are the tokenizer's to say.
            tokens: vec![],
            init: match self.init {
                InitSetting::Kaiming => LoraInit::Kaiming,
                InitSetting::Gaussian => LoraInit::Gaussian,
                InitSetting::Olora => LoraInit::Olora,
            },
        };
        config.validate().map_err(adapter_error)?;
        let four_bit = |q: Quantization| matches!(q, Quantization::FourBit(_));
        if !four_bit(self.quantize) && !self.quantize_embeddings.is_some_and(four_bit) {
            let default = Self::default();
            let reason = "has a meaning only in 4 bits: set adapter.quantize = \"nf4\", or remove it";
            if self.quantize_block != default.quantize_block {
                return Err(Error::config("adapter.quantize_block", self.quantize_block, reason));
            }
            if self.double_quant != default.double_quant {
                return Err(Error::config("adapter.double_quant", self.double_quant, reason));
            }
        }
        Ok(config)
    }

    /// How the frozen model is kept; `None` if it is not quantized.
    pub fn quantization(&self) -> Option<QuantizeConfig> {
        let embeddings = self.quantize_embeddings.unwrap_or(match self.quantize {
            Quantization::FourBit(_) => Quantization::Q8_0,
            // The embedding may have another type than the rest of the file.
            Quantization::Stored(_) => Quantization::Gguf,
            other => other,
        });
        let config = QuantizeConfig {
            projections: self.quantize,
            embeddings,
            block: self.quantize_block,
            double: self.double_quant,
        };
        (config.projections != Quantization::None || config.embeddings != Quantization::None).then_some(config)
    }
}

/// An adapter's complaint about one of its settings, as one about `[adapter]` of the run file.
pub(crate) fn adapter_error(error: tallow_adapters::Error) -> Error {
    match error {
        tallow_adapters::Error::Config { key, value, reason } => {
            Error::config(&format!("adapter.{key}"), value, reason)
        }
        other => other.into(),
    }
}
