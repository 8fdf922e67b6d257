//! The head as the loss needs it: whole, or, where it is packed, some rows of the vocabulary at a time.

use candle_core::{Result, Tensor};
use rayon::prelude::*;
use tallow_kernels::memory::unspecified;

use crate::Weight;
use crate::operand::{Scalar, view};

/// Elements of a packed head that are unpacked at once.
const UNPACKED: usize = 1 << 21;

/// Rows of a packed head of `c` columns that are unpacked at once.
pub(crate) fn unpacked_rows(v: usize, c: usize) -> usize {
    (UNPACKED / c.max(1)).next_multiple_of(64).min(v)
}

/// A head `[v, c]`.
pub(crate) enum HeadRows<'a, T> {
    Whole(&'a [T]),
    Packed(&'a Weight),
}

impl<T: Scalar> HeadRows<'_, T> {
    /// Calls `f` with `weight`, whose value is read or, if it is packed, left as it is.
    pub(crate) fn with<R>(weight: &Weight, f: impl FnOnce(&HeadRows<T>) -> Result<R>) -> Result<R> {
        if weight.packed_matrix().is_some() {
            return f(&HeadRows::Packed(weight));
        }
        let value = weight.value()?.detach().contiguous()?;
        let (storage, layout) = value.storage_and_layout();
        f(&HeadRows::Whole(view::<T>(&storage, layout)?))
    }

    /// Logits `[rows, v]` of `x [rows, c]`, f32.
    pub(crate) fn logits(&self, (rows, c, v): (usize, usize, usize), x: &[T], logits: &mut [f32]) -> Result<()> {
        let weight = match self {
            HeadRows::Whole(w) => {
                T::nt_f32(rows, v, c, x, w, logits);
                return Ok(());
            }
            HeadRows::Packed(weight) => weight,
        };
        let most = unpacked_rows(v, c);
        let mut some = unspecified::<f32>(rows * most);
        each_part(weight, v, most, &mut |start, len, w| {
            let some = &mut some[..rows * len];
            T::nt_f32(rows, len, c, x, w, some);
            logits.par_chunks_mut(v).zip(some.par_chunks(len)).for_each(|(row, some)| {
                row[start..start + len].copy_from_slice(some);
            });
            Ok(())
        })
    }

    /// `dx [rows, c] = g w` for the gradient `g [rows, v]` of the logits; summed in f32 and rounded once.
    pub(crate) fn input_gradient(&self, (rows, c, v): (usize, usize, usize), g: &[T], dx: &mut [T]) -> Result<()> {
        let weight = match self {
            HeadRows::Whole(w) => {
                T::nn(rows, c, v, g, w, dx, false);
                return Ok(());
            }
            HeadRows::Packed(weight) => weight,
        };
        let most = unpacked_rows(v, c);
        let mut sum = vec![0f32; rows * c];
        let mut turned = unspecified::<T>(rows * most);
        each_part(weight, v, most, &mut |start, len, w| {
            let turned = &mut turned[..rows * len];
            turned.par_chunks_mut(rows).enumerate().for_each(|(j, column)| {
                for (i, x) in column.iter_mut().enumerate() {
                    *x = g[i * v + start + j];
                }
            });
            T::tn_add(rows, c, len, turned, w, &mut sum);
            Ok(())
        })?;
        dx.par_iter_mut().zip(sum.par_iter()).for_each(|(x, sum)| *x = T::from_f32(*sum));
        Ok(())
    }
}

/// First row, number of rows, and their values.
type Part<'a, T> = &'a mut dyn FnMut(usize, usize, &[T]) -> Result<()>;

fn each_part<T: Scalar>(weight: &Weight, v: usize, most: usize, f: Part<T>) -> Result<()> {
    for start in (0..v).step_by(most.max(1)) {
        let len = most.min(v - start);
        let rows: Tensor = weight.rows(start..start + len)?;
        let (storage, layout) = rows.storage_and_layout();
        f(start, len, view::<T>(&storage, layout)?)?;
    }
    Ok(())
}
