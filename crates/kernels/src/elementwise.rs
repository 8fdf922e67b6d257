//! Elementwise passes: addition, and the drivers that the activations run on.

use rayon::prelude::*;

use crate::lanes::{Element, Simd, simd_fn};
use crate::simd::Level;

/// Elements that one task takes: large enough to hide the hand-over, small enough to stay in the L2 cache.
pub(crate) const CHUNK: usize = 16 * 1024;

/// A function of one value, of lanes at a time.
pub(crate) trait Map1: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V) -> S::V;
}

/// A function of two values.
pub(crate) trait Map2: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// A function of three values with two results.
pub(crate) trait Map3To2: Copy + Send + Sync {
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V, c: S::V) -> (S::V, S::V);
}

simd_fn! {
    fn map1_chunk[T: Element, F: Map1](s, f: F, a: &[T], out: &mut [T]) {
        let (mut a, mut out) = (&a[..out.len()], out);
        while out.len() >= S::LANES {
            T::store(s, f.apply(s, T::load(s, a)), out);
            a = &a[S::LANES..];
            out = &mut out[S::LANES..];
        }
        if !out.is_empty() {
            T::store_part(s, f.apply(s, T::load_part(s, a)), out);
        }
    }
}

simd_fn! {
    fn map2_chunk[T: Element, F: Map2](s, f: F, a: &[T], b: &[T], out: &mut [T]) {
        let (mut a, mut b, mut out) = (&a[..out.len()], &b[..out.len()], out);
        while out.len() >= S::LANES {
            T::store(s, f.apply(s, T::load(s, a), T::load(s, b)), out);
            (a, b) = (&a[S::LANES..], &b[S::LANES..]);
            out = &mut out[S::LANES..];
        }
        if !out.is_empty() {
            T::store_part(s, f.apply(s, T::load_part(s, a), T::load_part(s, b)), out);
        }
    }
}

simd_fn! {
    fn map3_to_2_chunk[T: Element, F: Map3To2](s, f: F, abc: [&[T]; 3], out0: &mut [T], out1: &mut [T]) {
        let [mut a, mut b, mut c] = abc.map(|x| &x[..out0.len()]);
        let (mut out0, mut out1) = (out0, out1);
        while out0.len() >= S::LANES {
            let (x, y) = f.apply(s, T::load(s, a), T::load(s, b), T::load(s, c));
            T::store(s, x, out0);
            T::store(s, y, out1);
            (a, b, c) = (&a[S::LANES..], &b[S::LANES..], &c[S::LANES..]);
            (out0, out1) = (&mut out0[S::LANES..], &mut out1[S::LANES..]);
        }
        if !out0.is_empty() {
            let (x, y) = f.apply(s, T::load_part(s, a), T::load_part(s, b), T::load_part(s, c));
            T::store_part(s, x, out0);
            T::store_part(s, y, out1);
        }
    }
}

pub(crate) fn map1<T: Element, F: Map1>(level: Level, f: F, a: &[T], out: &mut [T]) {
    assert_eq!(a.len(), out.len());
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).for_each(|(out, a)| map1_chunk(level, f, a, out));
}

pub(crate) fn map2<T: Element, F: Map2>(level: Level, f: F, a: &[T], b: &[T], out: &mut [T]) {
    assert!(a.len() == out.len() && b.len() == out.len());
    out.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(out, (a, b))| map2_chunk(level, f, a, b, out));
}

pub(crate) fn map3_to_2<T: Element, F: Map3To2>(
    level: Level,
    f: F,
    [a, b, c]: [&[T]; 3],
    out0: &mut [T],
    out1: &mut [T],
) {
    let n = out0.len();
    assert!(a.len() == n && b.len() == n && c.len() == n && out1.len() == n);
    let outs = out0.par_chunks_mut(CHUNK).zip(out1.par_chunks_mut(CHUNK));
    let ins = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).zip(c.par_chunks(CHUNK));
    outs.zip(ins).for_each(|((o0, o1), ((a, b), c))| map3_to_2_chunk(level, f, [a, b, c], o0, o1));
}

#[derive(Clone, Copy)]
struct Add;

impl Map2 for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

/// `out[i] = a[i] + b[i]`, added in f32 and rounded once.
///
/// # Panics
/// If the lengths differ.
pub fn add<T: Element>(level: Level, a: &[T], b: &[T], out: &mut [T]) {
    map2(level, Add, a, b, out);
}
