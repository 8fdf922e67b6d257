//! f32 products by the `gemm` crate, on the instruction set that `TALLOW_SIMD` allows.
//!
//! Left to itself the crate takes the best of the CPU. Where less is asked for, its kernels for less are called by name.

use gemm::Parallelism;

use super::{Strides, elements};
use crate::simd::Level;

/// What a product is of: `c [m, n] = a [m, k] b [k, n]`, or `c += a b` if `add`; `c` is row-major and contiguous.
pub(super) struct Product<'a> {
    pub(super) dims: (usize, usize, usize),
    pub(super) a: (&'a [f32], Strides),
    pub(super) b: (&'a [f32], Strides),
    pub(super) c: &'a mut [f32],
    pub(super) add: bool,
    pub(super) parallelism: Parallelism,
}

impl Product<'_> {
    /// Computes it at `level`.
    pub(super) fn compute(self, level: Level) {
        let (m, n, k) = self.dims;
        assert!(
            self.a.1.reach(m, k) <= self.a.0.len()
                && self.b.1.reach(k, n) <= self.b.0.len()
                && self.c.len() >= elements(m, n),
            "matrix product: a slice is too short"
        );
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            if !self.add {
                self.c[..m * n].fill(0.0);
            }
            return;
        }
        #[cfg(target_arch = "x86_64")]
        match level {
            Level::Scalar => self.scalar(),
            Level::Avx2 => self.avx2(),
            Level::Avx512 | Level::Amx => self.best(),
        }
        // There are no levels elsewhere.
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = level;
            self.best();
        }
    }

    /// On the best that the CPU has.
    fn best(self) {
        let ((m, n, k), (a, sa), (b, sb)) = (self.dims, self.a, self.b);
        let alpha = if self.add { 1.0 } else { 0.0 };
        // SAFETY: the strides address within the slices, and `c` has m * n elements (asserted); `c` is
        // borrowed for writing and does not overlap the others, and no operand is empty.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                self.c.as_mut_ptr(),
                1,
                n as isize,
                self.add,
                a.as_ptr(),
                sa.cols as isize,
                sa.rows as isize,
                b.as_ptr(),
                sb.cols as isize,
                sb.rows as isize,
                alpha,
                1.0,
                false,
                false,
                false,
                self.parallelism,
            );
        }
    }
}

/// A method that runs the product on one set of the crate's microkernels; on the scalar ones where the CPU lacks theirs.
#[cfg(target_arch = "x86_64")]
macro_rules! on_kernels {
    ($name:ident, $kernels:ident, $simd:ident, $lanes:literal) => {
        fn $name(self) {
            use gemm_common::gemm::gemm_basic_generic;
            use gemm_common::simd::{MixedSimd, $simd};
            use gemm_f32::microkernel::$kernels::f32::{H_M, H_N, H_UKR, MR_DIV_N, NR, UKR};

            let Some(simd) = <$simd as MixedSimd<f32, f32, f32, f32>>::try_new() else { return self.scalar() };
            let ((m, n, k), (a, sa), (b, sb)) = (self.dims, self.a, self.b);
            // The kernels want columns of the result to be contiguous: the transposed product is taken.
            let (rows, cols) = (n, m);
            let alpha = if self.add { 1.0 } else { 0.0 };
            // SAFETY: as in `best`, and the CPU has the kernels' instructions (`simd` is the proof).
            unsafe {
                gemm_basic_generic::<_, f32, $lanes, { MR_DIV_N * $lanes }, NR, MR_DIV_N, H_M, H_N>(
                    simd,
                    rows,
                    cols,
                    k,
                    self.c.as_mut_ptr(),
                    n as isize,
                    1,
                    self.add,
                    b.as_ptr(),
                    sb.rows as isize,
                    sb.cols as isize,
                    a.as_ptr(),
                    sa.rows as isize,
                    sa.cols as isize,
                    alpha,
                    1.0,
                    false,
                    false,
                    false,
                    |a, b, c| a * b + c,
                    &UKR,
                    &H_UKR,
                    false,
                    self.parallelism,
                );
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
impl Product<'_> {
    on_kernels!(avx2, fma, V3, 8);

    on_kernels!(scalar, scalar, Scalar, 1);
}
