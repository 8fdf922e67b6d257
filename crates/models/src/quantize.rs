//! A frozen model in fewer bits: what QLoRA (Dettmers et al. 2023) trains an adapter beside.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tallow_formats::gguf::GgmlType;
use tallow_nn::{Fill, GgmlMatrix, Pack, ParamSpec, Role};
use tallow_ops::{FourBit, FourBitKind, PackedMatrix, quantize_four_bit};

use crate::{Checkpoint, Error, Result};

/// What becomes of a matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Quantization {
    /// Kept in the dtype of compute.
    #[default]
    None,
    /// 4 bits a value as bitsandbytes defines them, 4.127 with double quantization.
    FourBit(FourBitKind),
    /// 8 bits in blocks of 32 with one f16 scale (8.5 bits a value): kept where the file has it, made where not.
    Q8_0,
    /// The blocks of the GGUF file, whatever types they have; plain numbers are kept in the dtype of compute.
    Gguf,
    /// The same of a file that has blocks of this type.
    Stored(GgmlType),
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::FourBit(FourBitKind::Nf4) => f.write_str("nf4"),
            Self::FourBit(FourBitKind::Fp4) => f.write_str("fp4"),
            Self::Q8_0 => f.write_str("q8_0"),
            Self::Gguf => f.write_str("gguf"),
            Self::Stored(kind) => f.write_str(&kind.name()),
        }
    }
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name.to_lowercase().as_str() {
            "none" => Self::None,
            "nf4" => Self::FourBit(FourBitKind::Nf4),
            "fp4" => Self::FourBit(FourBitKind::Fp4),
            "q8_0" => Self::Q8_0,
            "gguf" => Self::Gguf,
            other => Self::Stored(GgmlType::from_name(other).ok_or_else(|| {
                format!(
                    "`{name}` is no quantization: nf4, fp4 and q8_0 are made here, gguf (or the name of its type, as \
                     q4_k) keeps the blocks of a GGUF file, none keeps plain numbers; the nearest is `{}`",
                    nearest(other)
                )
            })?),
        })
    }
}

/// What may have been meant: names by bits first, then those that are spelled alike.
fn nearest(name: &str) -> String {
    // Files are called after the mix of their types, as `q4_k_m`.
    let of_file = ["_s", "_m", "_l"].iter().find_map(|mix| GgmlType::from_name(name.strip_suffix(mix)?));
    if let Some(kind) = of_file {
        return kind.name();
    }
    let near = match name {
        _ if name.contains("16") || name.contains("32") => "none",
        _ if name.contains('8') => "q8_0",
        _ if name.contains("fp4") => "fp4",
        _ if name.contains('4') => "nf4",
        _ => {
            let known = ["none", "nf4", "fp4", "q8_0", "gguf"];
            known.into_iter().max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name))).unwrap_or("nf4")
        }
    };
    near.to_owned()
}

impl From<Quantization> for String {
    fn from(quantization: Quantization) -> Self {
        quantization.to_string()
    }
}

impl TryFrom<String> for Quantization {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

/// How a frozen model is quantized. Norms, biases and learned positions never are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizeConfig {
    /// The projections of the blocks.
    pub projections: Quantization,
    /// Embedding and head.
    pub embeddings: Quantization,
    /// Values that share a scale, in 4 bits: a power of two from 32 to 4096.
    pub block: usize,
    /// Quantize the scales of 4 bits too, to 8 bits.
    pub double: bool,
}

impl fmt::Display for QuantizeConfig {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { projections, embeddings, block, double } = self;
        write!(f, "{projections} (embeddings {embeddings}")?;
        match projections {
            Quantization::FourBit(_) if *double => write!(f, ", blocks of {block}, double quantization)"),
            Quantization::FourBit(_) => write!(f, ", blocks of {block})"),
            _ => f.write_str(")"),
        }
    }
}

impl QuantizeConfig {
    /// What a note of an adapter's files says, in words: `none` without one, as it is where it says something else.
    pub fn note_in_words(note: Option<&Value>) -> String {
        match note {
            None | Some(Value::Null) => "none".into(),
            Some(note) => {
                serde_json::from_value(note.clone()).map_or(note.to_string(), |config: Self| config.to_string())
            }
        }
    }

    fn of(&self, spec: &ParamSpec) -> Quantization {
        match spec.role {
            _ if spec.shape.len() != 2 => Quantization::None,
            Role::Qkv | Role::AttnOut | Role::MlpIn | Role::MlpOut => self.projections,
            Role::Embed | Role::Head => self.embeddings,
            _ => Quantization::None,
        }
    }
}

/// [`Pack`]s the matrices of a model as a [`QuantizeConfig`] says.
pub struct QuantizedBase<'a> {
    config: QuantizeConfig,
    checkpoint: &'a Checkpoint,
}

impl<'a> QuantizedBase<'a> {
    /// For the model of `checkpoint`, whose parameters are `specs`.
    ///
    /// # Errors
    /// Naming the setting: a block size that is none, types that the file does not have, rows that are no whole blocks.
    pub fn new(config: QuantizeConfig, checkpoint: &'a Checkpoint, specs: &[ParamSpec]) -> Result<Self> {
        let base = Self { config, checkpoint };
        if !(config.block.is_power_of_two() && (32..=4096).contains(&config.block)) {
            let reason = format!("{} is no power of two from 32 to 4096; 64 is usual", config.block);
            return Err(Error::config("quantize_block", reason));
        }
        base.check("quantize", false, specs)?;
        if config.embeddings == Quantization::Q8_0 {
            base.check("quantize_embeddings", true, specs)?;
        }
        Ok(base)
    }

    /// Checks that embedding and head are stored in blocks, where these are to be kept.
    ///
    /// # Errors
    /// If the file has them as plain numbers, or in other blocks than asked for.
    pub fn check_stored_embeddings(&self, specs: &[ParamSpec]) -> Result<()> {
        self.check("quantize_embeddings", true, specs)
    }

    /// What is packed of the model with parameters `specs`, for the user.
    ///
    /// # Errors
    /// If a matrix cannot be packed as asked.
    pub fn in_words(&self, specs: &[ParamSpec]) -> Result<String> {
        let (mut bytes, mut elements, mut matrices, mut plain) = (0, 0, 0, 0);
        for spec in specs {
            match self.planned_bytes(spec)? {
                Some(packed) => {
                    bytes += packed;
                    elements += spec.num_elements();
                    matrices += 1;
                }
                None if spec.shape.len() == 2 => plain += 1,
                None => {}
            }
        }
        let QuantizeConfig { projections, embeddings, .. } = self.config;
        let bits = 8.0 * bytes as f64 / (elements as f64).max(1.0);
        if projections == Quantization::None {
            return Ok(format!(
                "note: embedding and head, where they are frozen, are kept in {embeddings}, {bits:.2} bits a value; the \
                 other {plain} matrices as plain numbers, as `quantize` is none"
            ));
        }
        Ok(format!(
            "note: {matrices} frozen matrices are kept in {projections} (embedding and head: {embeddings}), {bits:.2} bits a \
             value, {plain} as plain numbers"
        ))
    }

    fn check(&self, key: &str, embeddings: bool, specs: &[ParamSpec]) -> Result<()> {
        let asked = if embeddings { self.config.embeddings } else { self.config.projections };
        let is_embedding = |spec: &ParamSpec| matches!(spec.role, Role::Embed | Role::Head);
        let is_projection =
            |spec: &ParamSpec| matches!(spec.role, Role::Qkv | Role::AttnOut | Role::MlpIn | Role::MlpOut);
        let specs = specs.iter().filter(|spec| spec.shape.len() == 2);
        let specs = specs.filter(|spec| if embeddings { is_embedding(spec) } else { is_projection(spec) });
        match asked {
            Quantization::None | Quantization::FourBit(_) => Ok(()),
            Quantization::Q8_0 => {
                let whole = GgmlType::Q8_0.block().0;
                let odd = |spec: &&ParamSpec| !spec.shape[1].is_multiple_of(whole);
                match specs.clone().find(odd) {
                    Some(spec) => Err(Error::config(
                        key,
                        format!(
                            "q8_0 has blocks of {whole} values, but a row of {} has {}; use nf4 or none",
                            spec.name, spec.shape[1]
                        ),
                    )),
                    None => Ok(()),
                }
            }
            Quantization::Gguf | Quantization::Stored(_) => {
                let mut kinds = vec![];
                for spec in specs {
                    if let Some((_, kind, _)) = self.checkpoint.stored_kind(spec)?
                        && !kinds.contains(&kind)
                    {
                        kinds.push(kind);
                    }
                }
                let has = match asked {
                    Quantization::Stored(kind) => kinds.contains(&kind),
                    _ => !kinds.is_empty(),
                };
                if has {
                    return Ok(());
                }
                let (path, whose) =
                    (self.checkpoint.path().display(), if embeddings { "embedding" } else { "projections" });
                let reason = match kinds.is_empty() {
                    true => format!(
                        "{path} has no quantized blocks of its {whose} to keep; nf4, fp4 and q8_0 are made of any model"
                    ),
                    false => {
                        let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
                        format!("{path} has blocks of {}, not of {asked}; use gguf to keep them", names.join(", "))
                    }
                };
                Err(Error::config(key, reason))
            }
        }
    }

    /// What it was made with.
    pub fn config(&self) -> QuantizeConfig {
        self.config
    }
}

impl Pack for QuantizedBase<'_> {
    fn pack(&self, spec: &ParamSpec, fill: &dyn Fill) -> tallow_nn::Result<Option<Arc<dyn PackedMatrix>>> {
        let QuantizeConfig { block, double, .. } = self.config;
        let kind = match self.config.of(spec) {
            Quantization::None => return Ok(None),
            Quantization::Gguf | Quantization::Stored(_) => {
                return Ok(self.checkpoint.stored_blocks(spec)?.map(|matrix| Arc::new(matrix) as _));
            }
            Quantization::Q8_0 if self.stored_as_q8_0(spec)? => {
                return Ok(self.checkpoint.stored_blocks(spec)?.map(|matrix| Arc::new(matrix) as _));
            }
            Quantization::Q8_0 => None,
            Quantization::FourBit(kind) => Some(kind),
        };
        let mut values = vec![0f32; spec.num_elements()];
        fill.fill(spec, &mut values)?;
        let failed = |reason: String| tallow_nn::Error::Param { name: spec.name.clone(), reason };
        let matrix: Arc<dyn PackedMatrix> = match kind {
            Some(kind) => {
                let four = quantize_four_bit(&values, &spec.shape, kind, block, double);
                Arc::new(four.map_err(|e| failed(e.to_string()))?)
            }
            None => Arc::new(GgmlMatrix::q8_0((spec.shape[0], spec.shape[1]), &values)?),
        };
        Ok(Some(matrix))
    }

    fn planned_bytes(&self, spec: &ParamSpec) -> tallow_nn::Result<Option<usize>> {
        let blocks = |kind: GgmlType| spec.num_elements() / kind.block().0 * kind.block().1;
        Ok(match self.config.of(spec) {
            Quantization::None => None,
            Quantization::Q8_0 => Some(blocks(GgmlType::Q8_0)),
            Quantization::FourBit(_) => {
                Some(FourBit::planned_bytes(spec.num_elements(), self.config.block, self.config.double))
            }
            Quantization::Gguf | Quantization::Stored(_) => {
                self.checkpoint.stored_kind(spec)?.map(|(_, kind, _)| blocks(kind))
            }
        })
    }
}

impl QuantizedBase<'_> {
    fn stored_as_q8_0(&self, spec: &ParamSpec) -> tallow_nn::Result<bool> {
        Ok(matches!(self.checkpoint.stored_kind(spec)?, Some((_, GgmlType::Q8_0, _))))
    }
}
