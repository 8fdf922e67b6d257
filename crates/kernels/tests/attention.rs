//! Attention kernels of every instruction set against a scalar f64 reference, forward and all gradients.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]

use half::bf16;
use tallow_kernels::attention::{Heads, Inputs, Saved, Sizes, attention_backward, attention_forward};
use tallow_kernels::lanes::Element;
use tallow_kernels::rng::fill_normal;
use tallow_kernels::simd::Level;

const LEVELS: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];

/// One problem: inputs rounded to `T`, the gradient of the result, ranges.
struct Problem<T> {
    sizes: Sizes,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    dout: Vec<T>,
    lo: Vec<u32>,
    hi: Vec<u32>,
    scale: f32,
}

#[derive(Clone)]
struct Gradients<T> {
    out: Vec<T>,
    lse: Vec<f32>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
}

fn random<T: Element>(len: usize, stream: u64, std: f32) -> Vec<T> {
    let mut values = vec![0.0; len];
    fill_normal(&mut values, 7, stream, std);
    values.into_iter().map(T::from_f32).collect()
}

impl<T: Element> Problem<T> {
    fn new(sizes: Sizes, lo: Vec<u32>, hi: Vec<u32>) -> Self {
        let Sizes { b, tq, tk, h, g, d } = sizes;
        let (queries, keys) = (b * tq * h * d, b * tk * g * d);
        Self {
            sizes,
            q: random(queries, 1, 1.0),
            k: random(keys, 2, 1.0),
            v: random(keys, 3, 1.0),
            dout: random(queries, 4, 1.0),
            lo,
            hi,
            scale: 1.0 / (d as f32).sqrt(),
        }
    }

    fn causal(sizes: Sizes) -> Self {
        let Sizes { b, tq, tk, .. } = sizes;
        let hi = (0..b).flat_map(|_| (tk - tq + 1..=tk).map(|hi| hi as u32)).collect();
        Self::new(sizes, vec![0; b * tq], hi)
    }

    fn query_dims(&self) -> [usize; 4] {
        [self.sizes.b, self.sizes.tq, self.sizes.h, self.sizes.d]
    }

    fn inputs(&self) -> Inputs<'_, T> {
        let key_dims = [self.sizes.b, self.sizes.tk, self.sizes.g, self.sizes.d];
        Inputs {
            sizes: self.sizes,
            q: Heads::contiguous(&self.q, self.query_dims()).unwrap(),
            k: Heads::contiguous(&self.k, key_dims).unwrap(),
            v: Heads::contiguous(&self.v, key_dims).unwrap(),
            lo: &self.lo,
            hi: &self.hi,
            scale: self.scale,
        }
    }

    fn run(&self, level: Level) -> Gradients<T> {
        let Sizes { b, tq, h, .. } = self.sizes;
        let (mut out, mut lse) = (vec![T::ZERO; self.q.len()], vec![0.0; b * h * tq]);
        attention_forward(level, &self.inputs(), &mut out, &mut lse);
        // Gradients start as garbage: they must be overwritten.
        let garbage = T::from_f32(f32::NAN);
        let (mut dq, mut dk, mut dv) =
            (vec![garbage; self.q.len()], vec![garbage; self.k.len()], vec![garbage; self.v.len()]);
        let saved = Saved {
            out: Heads::contiguous(&out, self.query_dims()).unwrap(),
            dout: Heads::contiguous(&self.dout, self.query_dims()).unwrap(),
            lse: &lse,
        };
        attention_backward(level, &self.inputs(), &saved, &mut dq, &mut dk, &mut dv);
        Gradients { out, lse, dq, dk, dv }
    }

    /// The definition, in f64, with `out` rounded to `T` where the backward pass reads it.
    fn reference(&self) -> Gradients<f64> {
        let Sizes { b, tq, tk, h, g, d } = self.sizes;
        let wide = |x: &[T]| -> Vec<f64> { x.iter().map(|v| f64::from(v.to_f32())).collect() };
        let (q, k, v, dout) = (wide(&self.q), wide(&self.k), wide(&self.v), wide(&self.dout));
        let scale = f64::from(self.scale);
        let mut r = Gradients {
            out: vec![0.0; q.len()],
            lse: vec![f32::NEG_INFINITY; b * h * tq],
            dq: vec![0.0; q.len()],
            dk: vec![0.0; k.len()],
            dv: vec![0.0; v.len()],
        };
        for (ib, ih, t) in (0..b).flat_map(|ib| (0..h).flat_map(move |ih| (0..tq).map(move |t| (ib, ih, t)))) {
            let keys = self.lo[ib * tq + t] as usize..self.hi[ib * tq + t] as usize;
            if keys.is_empty() {
                continue;
            }
            let qa = ((ib * tq + t) * h + ih) * d;
            let ka = |j: usize| ((ib * tk + j) * g + ih / (h / g)) * d;
            let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(a, b)| a * b).sum() };
            let s: Vec<f64> = keys.clone().map(|j| scale * dot(&q[qa..qa + d], &k[ka(j)..ka(j) + d])).collect();
            let m = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = s.iter().map(|s| (s - m).exp()).sum();
            r.lse[(ib * h + ih) * tq + t] = (m + total.ln()) as f32;
            let p: Vec<f64> = s.iter().map(|s| (s - m).exp() / total).collect();
            for (p, j) in p.iter().zip(keys.clone()) {
                (0..d).for_each(|i| r.out[qa + i] += p * v[ka(j) + i]);
            }
            let delta = dot(&r.out[qa..qa + d], &dout[qa..qa + d]);
            for (p, j) in p.iter().zip(keys) {
                let ds = p * (dot(&dout[qa..qa + d], &v[ka(j)..ka(j) + d]) - delta);
                for i in 0..d {
                    r.dv[ka(j) + i] += p * dout[qa + i];
                    r.dk[ka(j) + i] += scale * ds * q[qa + i];
                    r.dq[qa + i] += scale * ds * k[ka(j) + i];
                }
            }
        }
        r
    }

    fn check(&self, tolerance: f64) {
        let want = self.reference();
        for level in LEVELS {
            let got = self.run(level);
            let what = format!("{:?} {level:?}", self.sizes);
            close(&format!("{what} out"), &got.out, &want.out, tolerance);
            // The backward pass reads the result as it was rounded to `T`.
            close(&format!("{what} dq"), &got.dq, &want.dq, 3.0 * tolerance);
            close(&format!("{what} dk"), &got.dk, &want.dk, 3.0 * tolerance);
            close(&format!("{what} dv"), &got.dv, &want.dv, 3.0 * tolerance);
            for (i, (got, want)) in got.lse.iter().zip(&want.lse).enumerate() {
                assert!(got == want || (got - want).abs() <= 1e-5 * (1.0 + want.abs()), "{what} lse {i}: {got} {want}");
            }
        }
    }
}

/// Within `tolerance` of the largest wanted value, or of 1.
fn close<T: Element>(what: &str, got: &[T], want: &[f64], tolerance: f64) {
    let bound = tolerance * want.iter().fold(1.0, |m: f64, v| m.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let got = f64::from(got.to_f32());
        assert!((got - want).abs() <= bound, "{what} [{i}]: got {got}, want {want}, bound {bound}");
    }
}

fn sizes(b: usize, tq: usize, tk: usize, (h, g): (usize, usize), d: usize) -> Sizes {
    Sizes { b, tq, tk, h, g, d }
}

#[test]
fn causal_over_odd_sizes() {
    for (t, heads, d) in [
        (1, (1, 1), 8),
        (3, (4, 2), 20),
        (17, (6, 1), 64),
        (33, (4, 2), 80),
        (65, (1, 1), 20),
        (129, (4, 2), 64),
        (129, (2, 2), 128),
        (257, (6, 1), 8),
        (257, (1, 1), 64),
    ] {
        Problem::<f32>::causal(sizes(2, t, t, heads, d)).check(3e-6);
        Problem::<bf16>::causal(sizes(2, t, t, heads, d)).check(6e-3);
    }
}

#[test]
fn decode_shapes() {
    for (tq, tk, heads, d) in [
        (1, 1, (1, 1), 64),
        (1, 700, (4, 2), 64),
        (1, 1300, (6, 1), 80),
        (3, 1025, (2, 1), 20),
        (5, 130, (6, 1), 64),
        (9, 200, (1, 1), 8),
    ] {
        Problem::<f32>::causal(sizes(2, tq, tk, heads, d)).check(3e-6);
        Problem::<bf16>::causal(sizes(1, tq, tk, heads, d)).check(6e-3);
    }
}

/// Documents of random lengths, some queries with a window, some with no keys at all.
fn ragged(b: usize, t: usize, seed: u64) -> (Vec<u32>, Vec<u32>) {
    let mut draws = vec![0.0; b * t];
    tallow_kernels::rng::fill_uniform(&mut draws, seed, 0, 0.0, 1.0);
    let (mut lo, mut hi) = (Vec::new(), Vec::new());
    for row in draws.chunks(t) {
        let mut start = 0;
        for (i, draw) in row.iter().enumerate() {
            if *draw < 0.03 {
                start = i as u32;
            }
            let end = if *draw > 0.97 { start } else { i as u32 + 1 };
            lo.push(if *draw > 0.5 { start.max(end.saturating_sub(40)) } else { start });
            hi.push(end);
        }
    }
    (lo, hi)
}

#[test]
fn documents_windows_and_empty_ranges() {
    for (seed, t, heads, d) in [(1, 50, (2, 1), 20), (2, 200, (4, 2), 64), (3, 333, (2, 2), 80)] {
        let (lo, hi) = ragged(2, t, seed);
        Problem::<f32>::new(sizes(2, t, t, heads, d), lo.clone(), hi.clone()).check(3e-6);
        Problem::<bf16>::new(sizes(2, t, t, heads, d), lo, hi).check(6e-3);
    }
}

/// Packed examples: `lo` their starts, `hi` causal but for a prefix of each that sees itself both ways.
fn prefixes(b: usize, t: usize, examples: &[(usize, usize)]) -> (Vec<u32>, Vec<u32>) {
    let (mut lo, mut hi) = (Vec::new(), Vec::new());
    for _ in 0..b {
        let mut start = 0;
        for &(len, prefix) in examples.iter().cycle() {
            let end = t.min(start + len);
            lo.extend((start..end).map(|_| start as u32));
            hi.extend((start..end).map(|i| (i + 1).max((start + prefix).min(end)) as u32));
            start = end;
            if start == t {
                break;
            }
        }
    }
    (lo, hi)
}

#[test]
fn prefixes_that_see_themselves_both_ways() {
    for (t, heads, d, examples) in [
        (50, (2, 1), 20, &[(20, 7), (9, 0), (13, 13)][..]),
        (200, (4, 2), 64, &[(200, 150)]),
        (333, (2, 2), 80, &[(90, 64), (130, 1), (77, 65)]),
        (257, (6, 1), 8, &[(257, 257)]),
    ] {
        let (lo, hi) = prefixes(2, t, examples);
        Problem::<f32>::new(sizes(2, t, t, heads, d), lo.clone(), hi.clone()).check(3e-6);
        Problem::<bf16>::new(sizes(2, t, t, heads, d), lo, hi).check(6e-3);
    }
}

#[test]
fn arbitrary_ranges_that_are_not_monotone() {
    let (b, tq, tk) = (2, 70, 150);
    let mut draws = vec![0.0; 2 * b * tq];
    tallow_kernels::rng::fill_uniform(&mut draws, 5, 0, 0.0, tk as f32 + 1.0);
    let ends: Vec<_> = draws.chunks(2).map(|c| (c[0].min(c[1]) as u32, c[0].max(c[1]) as u32)).collect();
    let (lo, hi) = ends.into_iter().unzip();
    Problem::<f32>::new(sizes(b, tq, tk, (4, 2), 20), lo, hi).check(3e-6);
}

#[test]
fn large_logits() {
    let mut problem = Problem::<f32>::causal(sizes(1, 70, 70, (2, 1), 64));
    problem.q.iter_mut().for_each(|q| *q *= 300.0);
    problem.k.iter_mut().for_each(|k| *k *= 30.0);
    // Logits near 1e4 carry errors near 1e-3 in f32; nearly every row is one-hot.
    let want = problem.reference();
    for level in LEVELS {
        let got = problem.run(level);
        close("out", &got.out, &want.out, 5e-3);
        assert!([&got.dq, &got.dk, &got.dv].into_iter().flatten().all(|v| v.is_finite()));
        close("dv", &got.dv, &want.dv, 5e-3);
    }
}

#[test]
fn equal_keys_give_the_mean() {
    let mut problem = Problem::<f32>::causal(sizes(1, 40, 40, (1, 1), 16));
    problem.k.fill(3.0);
    problem.check(3e-6);
}

#[test]
fn what_a_query_does_not_see_changes_nothing() {
    for t in [20, 130] {
        let first = t as u32 / 3;
        let lo: Vec<u32> = (0..t as u32).map(|i| if i < first { 0 } else { first }).collect();
        let hi: Vec<u32> = (1..=t as u32).collect();
        let problem = Problem::<f32>::new(sizes(1, t, t, (4, 2), 20), lo.clone(), hi.clone());
        for edit in [2.5, f32::INFINITY, f32::NAN] {
            let mut edited = Problem::<f32>::new(problem.sizes, lo.clone(), hi.clone());
            let (keys, queries) = (first as usize * 2 * 20, first as usize * 4 * 20);
            edited.k[..keys].fill(edit);
            edited.v[..keys].fill(edit);
            edited.q[..queries].fill(edit);
            edited.dout[..queries].fill(edit);
            for level in LEVELS {
                let (a, b) = (problem.run(level), edited.run(level));
                let same = |x: &[f32], y: &[f32]| x.iter().zip(y).all(|(x, y)| x.to_bits() == y.to_bits());
                assert!(same(&a.out[queries..], &b.out[queries..]), "out, t {t}, edit {edit}, {level:?}");
                assert!(same(&a.dq[queries..], &b.dq[queries..]), "dq, t {t}, edit {edit}, {level:?}");
                assert!(same(&a.dk[keys..], &b.dk[keys..]), "dk, t {t}, edit {edit}, {level:?}");
                assert!(same(&a.dv[keys..], &b.dv[keys..]), "dv, t {t}, edit {edit}, {level:?}");
            }
        }
    }
}

fn nan_reaches_its_row<T: Element>() {
    for (tq, tk) in [(30, 30), (1, 30)] {
        for which in 0..3 {
            let mut problem = Problem::<T>::causal(sizes(1, tq, tk, (1, 1), 16));
            let nan = T::from_f32(f32::NAN);
            match which {
                0 => problem.q[(tq - 1) * 16] = nan,
                1 => problem.k[7 * 16] = nan,
                _ => problem.v[7 * 16] = nan,
            }
            for level in LEVELS {
                let got = problem.run(level);
                assert!(got.out[(tq - 1) * 16].to_f32().is_nan(), "{which} {level:?} tq {tq}");
                // Queries before the seventh do not see it.
                let hidden = tq == 1 || got.out[..7 * 16].iter().all(|x| x.to_f32().is_finite());
                assert!(hidden || which == 0, "{which} {level:?}: it reached rows that do not see it");
            }
        }
    }
}

#[test]
fn nan_is_not_hidden() {
    nan_reaches_its_row::<f32>();
    nan_reaches_its_row::<bf16>();
}

/// Whether a value is NaN or not: the same bits.
fn bits<T: Element>(x: &[T]) -> Vec<u32> {
    x.iter().map(|x| x.to_f32().to_bits()).collect()
}

fn threads_agree<T: Element>(with_nan: bool) {
    let (lo, hi) = ragged(2, 300, 9);
    let mut problem = Problem::<T>::new(sizes(2, 300, 300, (4, 2), 64), lo, hi);
    if with_nan {
        problem.v[250 * 2 * 64] = T::from_f32(f32::NAN);
    }
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| problem.run(Level::Avx512))
    };
    let one = run(1);
    // 3 and 16 threads take the path that cuts up keys and queries.
    for threads in [2, 3, 16] {
        let many = run(threads);
        assert_eq!(bits(&one.out), bits(&many.out), "{threads} threads");
        assert_eq!(bits(&one.lse), bits(&many.lse), "{threads} threads");
        for (one, many) in [(&one.dq, &many.dq), (&one.dk, &many.dk), (&one.dv, &many.dv)] {
            assert_eq!(bits(one), bits(many), "{threads} threads");
        }
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    for with_nan in [false, true] {
        threads_agree::<f32>(with_nan);
        threads_agree::<bf16>(with_nan);
    }
}

#[test]
fn no_queries_give_no_gradients() {
    let (dq, dk, dv) = {
        let problem = Problem::<bf16>::new(sizes(1, 0, 5, (2, 1), 8), vec![], vec![]);
        let got = problem.run(Level::Avx512);
        (got.dq, got.dk, got.dv)
    };
    assert!(dq.is_empty() && dk.iter().chain(&dv).all(|x| *x == bf16::ZERO) && dk.len() == 40);
}

#[test]
fn strided_and_unaligned_inputs() {
    let (b, t, h, d) = (2, 37, 2, 20);
    let sizes = sizes(b, t, t, (h, h), d);
    let problem = Problem::<f32>::causal(sizes);
    // One buffer [b, t, 3, h, d] as a fused projection leaves it, behind one element that breaks alignment.
    let mut fused = vec![0.0; 1 + 3 * problem.q.len()];
    for (which, x) in [&problem.q, &problem.k, &problem.v].into_iter().enumerate() {
        for (token, row) in x.chunks_exact(h * d).enumerate() {
            let at = 1 + (token * 3 + which) * h * d;
            fused[at..at + h * d].copy_from_slice(row);
        }
    }
    let heads =
        |which: usize| Heads::new(&fused[1 + which * h * d..], [b, t, h, d], [t * 3 * h * d, 3 * h * d, d]).unwrap();
    let inputs = Inputs { q: heads(0), k: heads(1), v: heads(2), ..problem.inputs() };
    for level in LEVELS {
        let (mut out, mut lse) = (vec![0.0; problem.q.len()], vec![0.0; b * h * t]);
        attention_forward(level, &inputs, &mut out, &mut lse);
        assert_eq!(out, problem.run(level).out);
    }
    assert!(Heads::new(&fused[1..], [b, t, h, d], [usize::MAX, 3, d]).is_none());
    assert!(Heads::contiguous(&fused[..100], [b, t, h, d]).is_none());
}
