//! Matrices of 4 bits as packed weights.

use std::ops::Range;

use half::bf16;
use tallow_kernels::four_bit::{FourBit, FourBitError, Kind};
use tallow_kernels::simd;

use crate::PackedMatrix;

/// [`FourBit::quantize`] with the instructions of this machine.
///
/// # Errors
/// As it.
pub fn quantize_four_bit(
    x: &[f32],
    shape: &[usize],
    kind: Kind,
    block: usize,
    double: bool,
) -> Result<FourBit, FourBitError> {
    FourBit::quantize(simd::level(), x, shape, kind, block, double)
}

/// Rows are the first dimension, all others together are the columns.
impl PackedMatrix for FourBit {
    fn dims(&self) -> (usize, usize) {
        let rows = self.shape().first().copied().unwrap_or(0);
        (rows, self.len().checked_div(rows).unwrap_or(0))
    }

    fn bytes(&self) -> usize {
        FourBit::bytes(self)
    }

    fn unpack(&self, rows: Range<usize>, out: &mut [f32]) {
        self.dequantize_rows(simd::level(), rows, out);
    }

    fn unpack_bf16(&self, rows: Range<usize>, out: &mut [bf16]) {
        self.dequantize_rows(simd::level(), rows, out);
    }
}
