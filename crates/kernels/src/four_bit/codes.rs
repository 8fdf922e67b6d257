//! The tables of 4 and of 8 bits, and the borders between their codes.

use super::Kind;

/// Quantiles of the normal distribution, with an exact zero (QLoRA, Dettmers et al. 2023, appendix E).
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// A sign, two bits of exponent and one of mantissa, over the largest.
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    -0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// The codes of [`FP4`] by rising value, +0 before -0.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// What a value becomes: the codes by rising value, and the 15 borders between them; a value on a border goes down.
pub(super) struct Borders {
    pub(super) order: [u8; 16],
    pub(super) between: [f32; 15],
}

impl Borders {
    const fn new(table: &[f32; 16], order: [u8; 16]) -> Self {
        let mut between = [0.0; 15];
        let mut i = 0;
        while i < 15 {
            between[i] = (table[order[i] as usize] + table[order[i + 1] as usize]) / 2.0;
            i += 1;
        }
        Self { order, between }
    }
}

static NF4_BORDERS: Borders = Borders::new(&NF4, NF4_ORDER);
static FP4_BORDERS: Borders = Borders::new(&FP4, FP4_ORDER);

impl Kind {
    /// The value of each code, as a share of the block's largest magnitude.
    pub fn table(self) -> &'static [f32; 16] {
        match self {
            Kind::Nf4 => &NF4,
            Kind::Fp4 => &FP4,
        }
    }

    pub(super) fn borders(self) -> &'static Borders {
        match self {
            Kind::Nf4 => &NF4_BORDERS,
            Kind::Fp4 => &FP4_BORDERS,
        }
    }
}
