//! Weights of 4 bits in blocks, as bitsandbytes defines them: what QLoRA freezes.
//!
//! A tensor is cut into blocks of `block` consecutive values, across rows. A value is stored as the code of the nearest
//! entry of a table of 16, as a share of its block's largest magnitude `absmax`; two codes make a byte, the first in the
//! high half. `absmax` is kept in f32, or (double quantization) in codes of 8 bits: `map[code] * scale + offset` with
//! one scale for 256 blocks and the mean of all as offset, which brings 4.5 bits a weight to 4.127 at blocks of 64.
//!
//! Codes, scales and values equal those of bitsandbytes 0.50 on the CPU, bit for bit; only the offset may differ in its last
//! bits, since the order of PyTorch's sum depends on the machine. By its source its CUDA code differs in little: borders of
//! FP4 are rounded and ties there go towards zero (here down), a small positive value of FP4 is +0 (here -0), and codes of
//! 8 bits are the nearest ones, where the CPU first rounds to 65,536 steps.
//!
//! ```
//! use tallow_kernels::{four_bit::{FourBit, Kind}, simd};
//!
//! let weight: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
//! let four = FourBit::quantize(simd::level(), &weight, &[4, 64], Kind::Nf4, 64, true)?;
//! let mut row = [0f32; 64];
//! four.dequantize_rows(simd::level(), 2..3, &mut row);
//! assert!(row.iter().zip(&weight[128..]).all(|(a, b)| (a - b).abs() < 0.16));
//! # Ok::<(), tallow_kernels::four_bit::FourBitError>(())
//! ```

mod absmax;
mod codes;
mod passes;

use std::ops::Range;

use rayon::prelude::*;

pub use absmax::{Absmax, dynamic_map};

use crate::lanes::Element;
use crate::simd::Level;

/// Values that one task takes; a multiple of every block.
const CHUNK: usize = 16 * 1024;

/// Which table of 16 values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Quantiles of the normal distribution: the one for weights.
    Nf4,
    /// Floating point: sign, two bits of exponent, one of mantissa.
    Fp4,
}

/// Why a tensor has no 4-bit form.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FourBitError {
    /// Not a block size that bitsandbytes knows.
    #[error("blocks of {0} values: expected a power of two from 32 to 4096 (64 is usual)")]
    Block(usize),
    /// A part has another length than the shape and the block ask for.
    #[error("{part} has {found} entries, but shape {shape:?} asks for {expected}")]
    Length {
        /// Which part.
        part: &'static str,
        /// Of the tensor.
        shape: Vec<usize>,
        /// By shape and block.
        expected: usize,
        /// What there is.
        found: usize,
    },
    /// The shape has more elements than can be counted.
    #[error("shape {0:?} has too many elements")]
    Shape(Vec<usize>),
    /// A value is NaN or infinite.
    #[error("value {index} of shape {shape:?} is {value}: no block with it can be quantized")]
    NotFinite {
        /// Of the tensor.
        shape: Vec<usize>,
        /// Of the first such value, in the flat tensor.
        index: usize,
        /// Itself.
        value: f32,
    },
}

/// A tensor in 4 bits a value.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBit {
    kind: Kind,
    shape: Vec<usize>,
    block: usize,
    codes: Vec<u8>,
    absmax: Absmax,
}

fn elements(shape: &[usize]) -> Result<usize, FourBitError> {
    let product = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
    product.ok_or_else(|| FourBitError::Shape(shape.to_vec()))
}

fn check(part: &'static str, shape: &[usize], expected: usize, found: usize) -> Result<(), FourBitError> {
    let error = || FourBitError::Length { part, shape: shape.to_vec(), expected, found };
    if expected == found { Ok(()) } else { Err(error()) }
}

fn check_block(block: usize) -> Result<(), FourBitError> {
    let known = block.is_power_of_two() && (32..=4096).contains(&block);
    if known { Ok(()) } else { Err(FourBitError::Block(block)) }
}

impl FourBit {
    /// Quantizes `x`, of `shape`, in blocks of `block`; `double` quantizes the largest magnitudes too.
    ///
    /// # Errors
    /// If `block` is no power of two from 32 to 4096, `x` has another length than `shape`, or a value is not finite.
    pub fn quantize<T: Element>(
        level: Level,
        x: &[T],
        shape: &[usize],
        kind: Kind,
        block: usize,
        double: bool,
    ) -> Result<Self, FourBitError> {
        check_block(block)?;
        check("the tensor", shape, elements(shape)?, x.len())?;
        let bad = |(task, x): (usize, &[T])| Some(task * CHUNK + x.iter().position(|x| !x.to_f32().is_finite())?);
        if let Some(index) = x.par_chunks(CHUNK).enumerate().find_map_first(bad) {
            return Err(FourBitError::NotFinite { shape: shape.to_vec(), index, value: x[index].to_f32() });
        }
        let (mut codes, mut absmax) = (vec![0; x.len().div_ceil(2)], vec![0.0; x.len().div_ceil(block)]);
        let outs = codes.par_chunks_mut(CHUNK / 2).zip(absmax.par_chunks_mut(CHUNK / block));
        outs.zip(x.par_chunks(CHUNK))
            .for_each(|((codes, absmax), x)| passes::quantize(level, kind.borders(), block, x, codes, absmax));
        let absmax = if double { Absmax::double(&absmax) } else { Absmax::Plain(absmax) };
        Ok(Self { kind, shape: shape.to_vec(), block, codes, absmax })
    }

    /// A tensor from what a file holds.
    ///
    /// # Errors
    /// If `block` is no power of two from 32 to 4096, or the lengths do not fit `shape`.
    pub fn from_parts(
        kind: Kind,
        shape: &[usize],
        block: usize,
        codes: Vec<u8>,
        absmax: Absmax,
    ) -> Result<Self, FourBitError> {
        check_block(block)?;
        let len = elements(shape)?;
        check("codes", shape, len.div_ceil(2), codes.len())?;
        check("absmax", shape, len.div_ceil(block), absmax.len())?;
        if let Absmax::Double { codes, scales, .. } = &absmax {
            check("the scales of absmax", shape, codes.len().div_ceil(absmax::BLOCK), scales.len())?;
        }
        Ok(Self { kind, shape: shape.to_vec(), block, codes, absmax })
    }

    /// The table of values.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Of the tensor.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Values of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Two a byte, the first in the high half; the last byte of an odd number of values ends with the code of zero.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Largest magnitude of each block.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Number of values.
    #[allow(clippy::len_without_is_empty, reason = "as of a tensor, not of a list")]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Memory of codes and magnitudes.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.absmax.bytes()
    }

    /// What [`bytes`](Self::bytes) will be of `elements` values, before there are any.
    pub fn planned_bytes(elements: usize, block: usize, double: bool) -> usize {
        let blocks = elements.div_ceil(block.max(1));
        let absmax = if double { blocks + 4 * blocks.div_ceil(absmax::BLOCK) + 4 } else { 4 * blocks };
        elements.div_ceil(2) + absmax
    }

    /// Memory of a value, magnitudes included; NaN for an empty tensor.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes() as f64 / self.len() as f64
    }

    /// Values `range` of the flat tensor: `table[code] * absmax` in f32, rounded once.
    ///
    /// # Panics
    /// If `range` is not within the tensor, or `out` has another length.
    pub fn dequantize_into<T: Element>(&self, level: Level, range: Range<usize>, out: &mut [T]) {
        assert!(range.start <= range.end && range.end <= self.len(), "values {range:?} of {:?}", self.shape);
        assert_eq!(range.len(), out.len(), "dequantizing: slices of different lengths");
        let (table, block) = (self.kind.table(), self.block);
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(task, out)| {
            let start = range.start + task * CHUNK;
            passes::dequantize(level, table, block, &self.codes, self.absmax.view(), start, out);
        });
    }

    /// Rows `rows` along the first dimension, as [`dequantize_into`](Self::dequantize_into).
    ///
    /// # Panics
    /// If `rows` is not within the tensor, or `out` has another length.
    pub fn dequantize_rows<T: Element>(&self, level: Level, rows: Range<usize>, out: &mut [T]) {
        let row: usize = self.shape.iter().skip(1).product();
        self.dequantize_into(level, rows.start * row..rows.end * row, out);
    }
}
