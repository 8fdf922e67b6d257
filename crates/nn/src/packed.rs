//! Matrices in the block formats of GGUF, as they lie in a file.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;
use tallow_formats::gguf::{GgmlType, dequantize_blocks, quantize_q8_0};
use tallow_ops::PackedMatrix;

use crate::{Error, Result};

/// A matrix in one of GGUF's block types, row by row.
pub struct GgmlMatrix {
    kind: GgmlType,
    rows: usize,
    columns: usize,
    row_bytes: usize,
    bytes: Vec<u8>,
}

impl std::fmt::Debug for GgmlMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "GgmlMatrix({:?} {} x {})", self.kind, self.rows, self.columns)
    }
}

/// Rows that a task unpacks at once hold about this many elements.
const TASK: usize = 1 << 14;

impl GgmlMatrix {
    /// Over the blocks of `rows` rows of `columns` values.
    ///
    /// # Errors
    /// If a row is no whole number of blocks, or `bytes` are not as many as that takes.
    pub fn new(kind: GgmlType, (rows, columns): (usize, usize), bytes: Vec<u8>) -> Result<Self> {
        let (block, block_bytes) = kind.block();
        let row_bytes = columns / block * block_bytes;
        let fits = columns > 0 && columns.is_multiple_of(block) && rows.checked_mul(row_bytes) == Some(bytes.len());
        if !fits {
            let reason = format!("{} bytes are no {rows} rows of {columns} values in {kind:?}", bytes.len());
            return Err(Error::Param { name: "a packed matrix".into(), reason });
        }
        Ok(Self { kind, rows, columns, row_bytes, bytes })
    }

    /// `values [rows, columns]` in 8 bits (`Q8_0`: blocks of 32 with one f16 scale).
    ///
    /// # Errors
    /// If a row is no whole number of blocks.
    pub fn q8_0(dims @ (_, columns): (usize, usize), values: &[f32]) -> Result<Self> {
        let kind = GgmlType::Q8_0;
        let (block, block_bytes) = kind.block();
        let mut bytes = vec![0; values.len() / block * block_bytes];
        if columns.is_multiple_of(block) {
            bytes.par_chunks_mut(block_bytes).zip(values.par_chunks(block)).for_each(|(b, v)| quantize_q8_0(v, b));
        }
        Self::new(kind, dims, bytes)
    }
}

impl PackedMatrix for GgmlMatrix {
    fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    fn bytes(&self) -> usize {
        self.bytes.len()
    }

    fn unpack(&self, rows: Range<usize>, out: &mut [f32]) {
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        let task = (TASK / self.columns).max(1);
        let each = out.par_chunks_mut(task * self.columns).zip(bytes.par_chunks(task * self.row_bytes));
        each.for_each(|(out, bytes)| dequantize_blocks(self.kind, bytes, out));
    }

    fn unpack_bf16(&self, rows: Range<usize>, out: &mut [bf16]) {
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        let task = (TASK / self.columns).max(1);
        let each = out.par_chunks_mut(task * self.columns).zip(bytes.par_chunks(task * self.row_bytes));
        each.for_each_init(Vec::new, |wide: &mut Vec<f32>, (out, bytes)| {
            wide.resize(out.len(), 0.0);
            dequantize_blocks(self.kind, bytes, wide);
            out.iter_mut().zip(&*wide).for_each(|(out, x)| *out = bf16::from_f32(*x));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bits_are_within_half_a_step_and_rows_are_found() -> Result<()> {
        let (rows, columns) = (70, 64);
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect();
        let matrix = GgmlMatrix::q8_0((rows, columns), &values)?;
        assert_eq!((matrix.dims(), matrix.bytes()), ((rows, columns), rows * columns * 34 / 32));
        let mut out = vec![f32::NAN; values.len()];
        matrix.unpack(0..rows, &mut out);
        // Half a step of 1/127, and what the f16 scale is rounded by.
        assert!(out.iter().zip(&values).all(|(x, y)| (x - y).abs() <= 0.5 / 127.0 + 1e-3));
        let mut short = vec![bf16::NAN; values.len()];
        matrix.unpack_bf16(0..rows, &mut short);
        assert!(short.iter().zip(&out).all(|(x, y)| *x == bf16::from_f32(*y)));
        let mut some = vec![f32::NAN; 3 * columns];
        matrix.unpack(40..43, &mut some);
        assert_eq!(some, out[40 * columns..43 * columns]);
        assert!(GgmlMatrix::q8_0((2, 33), &[0.0; 66]).is_err());
        assert!(GgmlMatrix::new(GgmlType::Q4_0, (2, 32), vec![0; 35]).is_err());
        Ok(())
    }
}
