//! Dropout (Srivastava et al. 2014) with a mask that is computed, never stored.

use rayon::prelude::*;

use crate::lanes::{Element, simd_fn};
use crate::rng::philox4x32;
use crate::simd::Level;

const CHUNK: usize = 8 * 1024;
/// Counters worked on side by side, so that the compiler makes vectors of them.
const WIDE: usize = 16;

/// Which mask: the key and the upper half of the counter of [`philox4x32`], and where in it the slice begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    /// Key of the generator.
    pub key: [u32; 2],
    /// Words 2 and 3 of the counter.
    pub counter: [u32; 2],
    /// Index of the first element of the slice within the whole tensor.
    pub offset: u64,
    /// An element is kept where its random word is at least this.
    pub threshold: u32,
    /// Factor on the kept elements.
    pub scale: f32,
}

impl Mask {
    /// Random words of the elements `4 * block ..`, `WIDE` blocks of 4.
    #[inline(always)]
    fn words(&self, block: u64, words: &mut [u32; 4 * WIDE]) {
        for i in 0..WIDE {
            let at = block.wrapping_add(i as u64);
            let counter = [at as u32, (at >> 32) as u32, self.counter[0], self.counter[1]];
            words[4 * i..4 * i + 4].copy_from_slice(&philox4x32(counter, self.key));
        }
    }
}

simd_fn! {
    fn dropout_chunk[T: Element](s, mask: Mask, x: &[T], y: &mut [T]) {
        let _ = s;
        let mut words = [0; 4 * WIDE];
        let mut i = 0;
        while i < y.len() {
            let index = mask.offset.wrapping_add(i as u64);
            let skip = (index % 4) as usize;
            mask.words(index / 4, &mut words);
            let n = (4 * WIDE - skip).min(y.len() - i);
            for ((y, x), w) in y[i..i + n].iter_mut().zip(&x[i..i + n]).zip(&words[skip..]) {
                // A product, so that NaN shows through a dropped element too.
                *y = T::from_f32(x.to_f32() * if *w >= mask.threshold { mask.scale } else { 0.0 });
            }
            i += n;
        }
    }
}

/// `y[i] = x[i] * scale` where kept, else 0. The backward pass is the same function of `dy`.
///
/// # Panics
/// If the lengths differ.
pub fn dropout<T: Element>(level: Level, mask: Mask, x: &[T], y: &mut [T]) {
    assert_eq!(x.len(), y.len());
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).enumerate().for_each(|(chunk, (y, x))| {
        let mask = Mask { offset: mask.offset.wrapping_add((chunk * CHUNK) as u64), ..mask };
        dropout_chunk(level, mask, x, y);
    });
}
