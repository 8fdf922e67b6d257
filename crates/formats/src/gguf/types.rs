//! Tensor types of GGUF.

/// A block-quantized type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types, reason = "the names of GGUF")]
pub enum GgmlType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
}

impl GgmlType {
    /// All of them.
    pub const ALL: [GgmlType; 11] = [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::Q8_K,
    ];

    /// As run files write it: `q4_k`.
    pub fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    /// The type of a name, in capitals or not.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name.to_lowercase())
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            GgmlType::Q4_0 => (32, 18),
            GgmlType::Q4_1 => (32, 20),
            GgmlType::Q5_0 => (32, 22),
            GgmlType::Q5_1 => (32, 24),
            GgmlType::Q8_0 => (32, 34),
            GgmlType::Q2_K => (256, 84),
            GgmlType::Q3_K => (256, 110),
            GgmlType::Q4_K => (256, 144),
            GgmlType::Q5_K => (256, 176),
            GgmlType::Q6_K => (256, 210),
            GgmlType::Q8_K => (256, 292),
        }
    }
}

/// The dtype of a type number, or its name where it is not supported.
pub(crate) fn dtype_of(id: u32) -> Result<crate::DType, String> {
    use crate::DType;
    Ok(match id {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Ggml(GgmlType::Q4_0),
        3 => DType::Ggml(GgmlType::Q4_1),
        6 => DType::Ggml(GgmlType::Q5_0),
        7 => DType::Ggml(GgmlType::Q5_1),
        8 => DType::Ggml(GgmlType::Q8_0),
        10 => DType::Ggml(GgmlType::Q2_K),
        11 => DType::Ggml(GgmlType::Q3_K),
        12 => DType::Ggml(GgmlType::Q4_K),
        13 => DType::Ggml(GgmlType::Q5_K),
        14 => DType::Ggml(GgmlType::Q6_K),
        15 => DType::Ggml(GgmlType::Q8_K),
        24 => DType::I8,
        25 => DType::I16,
        26 => DType::I32,
        27 => DType::I64,
        28 => DType::F64,
        30 => DType::BF16,
        other => {
            let known = [
                (9, "Q8_1"),
                (16, "IQ2_XXS"),
                (17, "IQ2_XS"),
                (18, "IQ3_XXS"),
                (19, "IQ1_S"),
                (20, "IQ4_NL"),
                (21, "IQ3_S"),
                (22, "IQ2_S"),
                (23, "IQ4_XS"),
                (29, "IQ1_M"),
                (34, "TQ1_0"),
                (35, "TQ2_0"),
                (39, "MXFP4"),
            ];
            let name = known.iter().find(|(id, _)| *id == other).map(|(_, name)| *name);
            return Err(name.map_or_else(|| format!("number {other}"), ToOwned::to_owned));
        }
    })
}

/// The type number of a dtype; `None` if GGUF has none.
pub(crate) fn number_of(dtype: crate::DType) -> Option<u32> {
    (0..=30).find(|&id| dtype_of(id) == Ok(dtype))
}
