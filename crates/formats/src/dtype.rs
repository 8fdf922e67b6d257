//! Dtypes of tensors in files.

use std::fmt;

use crate::gguf::GgmlType;

/// Dtype of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names say it")]
#[non_exhaustive]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U32,
    U8,
    Bool,
    /// A block-quantized type of GGUF.
    Ggml(GgmlType),
}

impl DType {
    /// The dtypes of safetensors that are read, by their names there.
    pub(crate) const SAFETENSORS: [(&'static str, DType); 11] = [
        ("F64", DType::F64),
        ("F32", DType::F32),
        ("F16", DType::F16),
        ("BF16", DType::BF16),
        ("I64", DType::I64),
        ("I32", DType::I32),
        ("I16", DType::I16),
        ("I8", DType::I8),
        ("U32", DType::U32),
        ("U8", DType::U8),
        ("BOOL", DType::Bool),
    ];

    pub(crate) fn from_safetensors(name: &str) -> Option<Self> {
        Self::SAFETENSORS.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
    }

    /// Elements that are stored together: 1, or those of a quantized block.
    pub(crate) fn block_elements(self) -> usize {
        match self {
            DType::Ggml(kind) => kind.block().0,
            _ => 1,
        }
    }

    /// Bytes of `elements` elements; `None` if that is not a whole number of blocks, or overflows.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let size = match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 | DType::BF16 | DType::I16 => 2,
            DType::I8 | DType::U8 | DType::Bool => 1,
            DType::Ggml(kind) => {
                let (elements_a_block, bytes) = kind.block();
                return elements
                    .is_multiple_of(elements_a_block)
                    .then(|| (elements / elements_a_block).checked_mul(bytes))?;
            }
        };
        elements.checked_mul(size)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            DType::Ggml(kind) => write!(f, "{kind:?}"),
            other => write!(f, "{other:?}"),
        }
    }
}
