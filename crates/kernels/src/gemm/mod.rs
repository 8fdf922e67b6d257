//! Matrix products: the three that a linear layer needs, in f32 and bf16, threaded.
//!
//! f32 goes through the `gemm` crate (`library`), which reaches the machine's AVX-512 or AVX2 rate, but with AMX in three parts of
//! bf16 (`tiled`). bf16 has no library to go to: with AMX or AVX512-BF16 it runs on the instructions that multiply pairs and add
//! in f32 (`tiled`), elsewhere operands are widened and go the f32 way. Sums are f32 always.

mod library;
mod tiled;
mod widened;

use half::bf16;

use crate::lanes::Element;
use crate::simd;

/// Products of up to this many multiply-adds are not worth a second thread.
const SERIAL: usize = 1 << 16;

/// A dtype with matrix products. All matrices are row-major and contiguous; the slices have exactly their sizes.
pub trait Gemm: Element {
    /// `c [m, n] = a [m, k] b^T`, `b [n, k]`: the forward of a linear layer.
    fn nt(m: usize, n: usize, k: usize, a: &[Self], b: &[Self], c: &mut [Self]);

    /// `c [m, n] += a [m, k] b^T`, `b [n, k]`: what an adapter adds to a layer's output.
    fn nt_add(m: usize, n: usize, k: usize, a: &[Self], b: &[Self], c: &mut [Self]);

    /// As [`nt`](Self::nt) with an f32 result: logits.
    fn nt_f32(m: usize, n: usize, k: usize, a: &[Self], b: &[Self], c: &mut [f32]);

    /// `c [m, n] = a [m, k] b [k, n]`, or `c += a b` if `add`: the gradient of a linear layer's input.
    fn nn(m: usize, n: usize, k: usize, a: &[Self], b: &[Self], c: &mut [Self], add: bool) {
        Self::nn_pitched(m, n, k, (a, k), b, c, add);
    }

    /// As [`nn`](Self::nn), the rows of `a` the given number of elements apart.
    fn nn_pitched(m: usize, n: usize, k: usize, a: (&[Self], usize), b: &[Self], c: &mut [Self], add: bool);

    /// `c [m, n] += a^T b`, `a [k, m]`, `b [k, n]`, `c` f32: the gradient of a linear layer's weight.
    fn tn_add(m: usize, n: usize, k: usize, a: &[Self], b: &[Self], c: &mut [f32]) {
        Self::tn_add_pitched(m, n, k, (a, m), b, c);
    }

    /// As [`tn_add`](Self::tn_add), the rows of `a` the given number of elements apart.
    fn tn_add_pitched(m: usize, n: usize, k: usize, a: (&[Self], usize), b: &[Self], c: &mut [f32]);
}

/// A strided view of an operand: element `(i, j)` at `i * rows + j * cols`.
#[derive(Clone, Copy)]
pub(crate) struct Strides {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Strides {
    /// Elements that a `rows x cols` operand reaches over; where that overflows, more than any slice has.
    pub(crate) fn reach(self, rows: usize, cols: usize) -> usize {
        if rows == 0 || cols == 0 {
            return 0;
        }
        let last = (rows - 1).saturating_mul(self.rows).saturating_add((cols - 1).saturating_mul(self.cols));
        last.saturating_add(1)
    }
}

/// Elements of a matrix; where that overflows, more than any slice has.
fn elements(rows: usize, cols: usize) -> usize {
    rows.saturating_mul(cols)
}

/// `c = a b`, or `c += a b` if `add`, over strided f32 operands.
fn f32_gemm(
    dims @ (m, n, k): (usize, usize, usize),
    a: (&[f32], Strides),
    b: (&[f32], Strides),
    c: &mut [f32],
    add: bool,
) {
    if let Some(kernel) = tiled::InParts::worth(dims) {
        return tiled::product(kernel, dims, a, b, Out::F32(c, add));
    }
    let parallelism = if m.saturating_mul(n).saturating_mul(k) <= SERIAL {
        gemm::Parallelism::None
    } else {
        gemm::Parallelism::Rayon(0)
    };
    library::Product { dims, a, b, c, add, parallelism }.compute(simd::level());
}

/// Strides of a row-major matrix with `cols` columns, as it is.
pub(crate) fn plain(cols: usize) -> Strides {
    Strides { rows: cols, cols: 1 }
}

/// Strides that read a row-major matrix with `cols` columns transposed.
pub(crate) fn turned(cols: usize) -> Strides {
    Strides { rows: 1, cols }
}

impl Gemm for f32 {
    fn nt(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        f32_gemm((m, n, k), (a, plain(k)), (b, turned(k)), c, false);
    }

    fn nt_add(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        f32_gemm((m, n, k), (a, plain(k)), (b, turned(k)), c, true);
    }

    fn nt_f32(m: usize, n: usize, k: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        Self::nt(m, n, k, a, b, c);
    }

    fn nn_pitched(m: usize, n: usize, k: usize, (a, pitch): (&[f32], usize), b: &[f32], c: &mut [f32], add: bool) {
        f32_gemm((m, n, k), (a, plain(pitch)), (b, plain(n)), c, add);
    }

    fn tn_add_pitched(m: usize, n: usize, k: usize, (a, pitch): (&[f32], usize), b: &[f32], c: &mut [f32]) {
        f32_gemm((m, n, k), (a, turned(pitch)), (b, plain(n)), c, true);
    }
}

impl Gemm for bf16 {
    fn nt(m: usize, n: usize, k: usize, a: &[bf16], b: &[bf16], c: &mut [bf16]) {
        product((m, n, k), (a, plain(k)), (b, turned(k)), Out::Bf16(c, false));
    }

    fn nt_add(m: usize, n: usize, k: usize, a: &[bf16], b: &[bf16], c: &mut [bf16]) {
        product((m, n, k), (a, plain(k)), (b, turned(k)), Out::Bf16(c, true));
    }

    fn nt_f32(m: usize, n: usize, k: usize, a: &[bf16], b: &[bf16], c: &mut [f32]) {
        product((m, n, k), (a, plain(k)), (b, turned(k)), Out::F32(c, false));
    }

    fn nn_pitched(m: usize, n: usize, k: usize, (a, pitch): (&[bf16], usize), b: &[bf16], c: &mut [bf16], add: bool) {
        product((m, n, k), (a, plain(pitch)), (b, plain(n)), Out::Bf16(c, add));
    }

    fn tn_add_pitched(m: usize, n: usize, k: usize, (a, pitch): (&[bf16], usize), b: &[bf16], c: &mut [f32]) {
        product((m, n, k), (a, turned(pitch)), (b, plain(n)), Out::F32(c, true));
    }
}

/// Where a bf16 product goes.
pub(crate) enum Out<'a> {
    /// Rounded; added to what is there, in f32, if `true`.
    Bf16(&'a mut [bf16], bool),
    /// f32; added to what is there if `true`.
    F32(&'a mut [f32], bool),
}

fn product(dims: (usize, usize, usize), a: (&[bf16], Strides), b: (&[bf16], Strides), out: Out) {
    match tiled::InBf16::native() {
        Some(kernel) => tiled::product(kernel, dims, a, b, out),
        None => widened::product(dims, a, b, out),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    /// Whole numbers from -8 to 8: every sum here is exact in f32 whatever its order.
    pub(super) fn whole<T: Element>(len: usize, seed: usize) -> Vec<T> {
        (0..len).map(|i| T::from_f32(((i * 7919 + seed * 31) % 17) as f32 - 8.0)).collect()
    }

    /// `c[i, j] = sum over p of a(i, p) b(p, j)` in f64.
    fn exact(
        (m, n, k): (usize, usize, usize),
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Vec<f64> {
        let sum = |i, j| (0..k).map(|p| f64::from(a(i, p)) * f64::from(b(p, j))).sum();
        (0..m * n).map(|at| sum(at / n, at % n)).collect()
    }

    fn check<T: Gemm>() {
        for dims @ (m, n, k) in [(1, 1, 1), (1, 40, 3), (3, 1, 5), (13, 33, 17), (70, 90, 65), (515, 9, 31), (2, 3, 0)]
        {
            let (a, b) = (whole::<T>(m * k, 1), whole::<T>(k * n, 2));
            let (at, bt) = (|i: usize, p: usize| a[i * k + p].to_f32(), |p: usize, j: usize| b[p * n + j].to_f32());
            let nt = exact(dims, at, |p, j| b[j * k + p].to_f32());
            let nn = exact(dims, at, bt);
            let tn = exact(dims, |i, p| a[p * m + i].to_f32(), bt);
            let rounded = |want: &[f64]| want.iter().map(|x| T::from_f32(*x as f32)).collect::<Vec<_>>();
            let nan = T::from_f32(f32::NAN);
            let mut c = vec![nan; m * n];
            T::nt(m, n, k, &a, &b, &mut c);
            assert_eq!(c, rounded(&nt), "nt {dims:?}");
            c.fill(T::from_f32(-2.0));
            T::nt_add(m, n, k, &a, &b, &mut c);
            let on_top: Vec<f64> = nt.iter().map(|x| x - 2.0).collect();
            assert_eq!(c, rounded(&on_top), "nt added {dims:?}");
            c.fill(nan);
            T::nn(m, n, k, &a, &b, &mut c, false);
            assert_eq!(c, rounded(&nn), "nn {dims:?}");
            let start = T::from_f32(-2.0);
            c.fill(start);
            T::nn(m, n, k, &a, &b, &mut c, true);
            let on_top: Vec<f64> = nn.iter().map(|x| x - 2.0).collect();
            assert_eq!(c, rounded(&on_top), "nn added {dims:?}");
            let apart = |x: &[T], width: usize| -> Vec<T> {
                x.chunks(width.max(1)).flat_map(|row| row.iter().copied().chain([nan; 3])).collect()
            };
            c.fill(nan);
            T::nn_pitched(m, n, k, (&apart(&a, k), k + 3), &b, &mut c, false);
            assert_eq!(c, rounded(&nn), "nn pitched {dims:?}");
            let mut c = vec![-2.0; m * n];
            T::tn_add_pitched(m, n, k, (&apart(&a, m), m + 3), &b, &mut c);
            assert!(c.iter().zip(&tn).all(|(c, want)| f64::from(*c) == want - 2.0), "tn_add pitched {dims:?}");
            let mut c = vec![f32::NAN; m * n];
            T::nt_f32(m, n, k, &a, &b, &mut c);
            assert!(c.iter().zip(&nt).all(|(c, want)| f64::from(*c) == *want), "nt_f32 {dims:?}");
            c.fill(-2.0);
            T::tn_add(m, n, k, &a, &b, &mut c);
            assert!(c.iter().zip(&tn).all(|(c, want)| f64::from(*c) == want - 2.0), "tn_add {dims:?}");
        }
    }

    #[test]
    fn all_products_match_f64() {
        check::<f32>();
        check::<bf16>();
    }

    /// Whatever `TALLOW_SIMD` may ask for on this CPU.
    #[test]
    fn every_level_gives_the_exact_product() {
        let edges = [(1, 1, 1), (1, 40, 3), (13, 33, 17), (70, 90, 65), (515, 9, 31), (4, 0, 2), (2, 3, 0)];
        for dims @ (m, n, k) in edges.into_iter().chain([(200, 150, 1100)]) {
            let (a, b) = (whole::<f32>(m * k, 1), whole::<f32>(k * n, 2));
            for (sa, sb) in [(plain(k), turned(k)), (plain(k), plain(n)), (turned(m), plain(n))] {
                let at = |i: usize, p: usize| a[i * sa.rows + p * sa.cols];
                let want = exact(dims, at, |p, j| b[p * sb.rows + j * sb.cols]);
                for level in [simd::Level::Scalar, simd::Level::Avx2, simd::Level::Avx512] {
                    for add in [false, true] {
                        let mut c = vec![if add { 3.0 } else { f32::NAN }; m * n];
                        let parallelism = gemm::Parallelism::Rayon(0);
                        let (a, b) = ((&a[..], sa), (&b[..], sb));
                        library::Product { dims, a, b, c: &mut c, add, parallelism }.compute(level);
                        let on_top = if add { 3.0 } else { 0.0 };
                        assert!(c.iter().zip(&want).all(|(c, w)| f64::from(*c) == w + on_top), "{level:?} {dims:?}");
                    }
                }
            }
        }
    }

    /// The scalar kernels round after multiplying, those of AVX2 only once: so it shows which ran.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn a_level_takes_its_own_kernels() {
        let (m, n, k) = (20, 30, 200);
        let values = |len: usize| -> Vec<f32> { (0..len).map(|i| (i as f32).sin()).collect() };
        let (a, b) = (values(m * k), values(k * n));
        let at = |level| {
            let mut c = vec![0f32; m * n];
            let parallelism = gemm::Parallelism::None;
            let (a, b) = ((&a[..], plain(k)), (&b[..], plain(n)));
            library::Product { dims: (m, n, k), a, b, c: &mut c, add: false, parallelism }.compute(level);
            c
        };
        let scalar = at(simd::Level::Scalar);
        let by_hand: f32 = (0..k).map(|p| a[p] * b[p * n]).fold(0.0, |sum, x| sum + x);
        assert!((scalar[0] - by_hand).abs() < 1e-4);
        assert_eq!(scalar == at(simd::Level::Avx2), simd::best() < simd::Level::Avx2);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for (m, n, k) in [(1, 700, 300), (33, 65, 2100), (200, 150, 129), (700, 1, 300)] {
            let values = |len: usize| -> Vec<f32> { (0..len).map(|i| (i as f32).sin()).collect() };
            let (a, b) = (values(m * k), values(k * n));
            let on = |threads| {
                let mut c = vec![vec![0f32; m * n]; 3];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    f32::nt(m, n, k, &a, &b, &mut c[0]);
                    f32::nn(m, n, k, &a, &b, &mut c[1], false);
                    f32::nn(m, n, k, &a, &b, &mut c[1], true);
                    f32::tn_add(m, n, k, &a, &b, &mut c[2]);
                });
                c
            };
            let one = on(1);
            assert!([2, 3, 7].into_iter().all(|threads| on(threads) == one), "{m} {n} {k}");
        }
    }
}
