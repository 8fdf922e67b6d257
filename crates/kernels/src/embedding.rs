//! Looking up rows, and summing gradients into them.

use rayon::prelude::*;

use crate::lanes::Element;

/// Rows a task copies.
const CHUNK: usize = 256;

/// `out[i] = table[ids[i]]` for rows of `c`; every id is below the number of rows.
pub fn gather<T: Element>(table: &[T], c: usize, ids: &[u32], out: &mut [T]) {
    out.par_chunks_mut(CHUNK * c).zip(ids.par_chunks(CHUNK)).for_each(|(out, ids)| {
        for (row, &id) in out.chunks_exact_mut(c).zip(ids) {
            row.copy_from_slice(&table[id as usize * c..][..c]);
        }
    });
}

/// `grad[ids[i]] += dy[i]` for rows of `c`, in the order of `i` whatever the threads: each takes a range of the table's rows.
pub fn scatter_add<T: Element>(grad: &mut [f32], c: usize, ids: &[u32], dy: &[T]) {
    let rows = grad.len() / c;
    let span = rows.div_ceil(rayon::current_num_threads() * 2).max(1);
    grad.par_chunks_mut(span * c).enumerate().for_each(|(part, grad)| {
        let first = part * span;
        for (&id, dy) in ids.iter().zip(dy.chunks_exact(c)) {
            let Some(row) = (id as usize).checked_sub(first).filter(|&row| row < span) else { continue };
            if let Some(grad) = grad.get_mut(row * c..(row + 1) * c) {
                grad.iter_mut().zip(dy).for_each(|(g, d)| *g += d.to_f32());
            }
        }
    });
}
