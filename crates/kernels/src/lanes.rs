//! Vectors of f32 lanes behind one small trait, so that a kernel is written once and compiled for each instruction set.
//!
//! A value of [`Avx2`] or [`Avx512`] is the proof that this CPU has those instructions: it is made only after asking
//! the CPU. So arithmetic is safe, and `unsafe` is left to raw pointers. Functions written with `simd_fn!` take a
//! [`Level`](crate::simd::Level) and are compiled once for each instruction set.

use half::bf16;

/// Values that a look-up gives.
pub(crate) const LOOKED_UP: usize = 32;

/// f32 lanes of one instruction set.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector of [`LANES`](Self::LANES) values.
    type V: Copy;
    /// Lanes of a vector; divides 16.
    const LANES: usize;
    /// Vectors across a register tile of the matrix kernels, next to 6 rows.
    const TILE: usize;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// The first `LANES` values of `src`; panics if there are fewer.
    fn load(self, src: &[f32]) -> Self::V;
    /// Writes to the first `LANES` places of `dst`; panics if there are fewer.
    fn store(self, v: Self::V, dst: &mut [f32]);
    /// The first `LANES` values of `src` widened.
    fn load_bf16(self, src: &[bf16]) -> Self::V;
    /// Rounded to nearest even, NaN kept.
    fn store_bf16(self, v: Self::V, dst: &mut [bf16]);
    /// # Safety
    /// `src` is readable for `LANES` values.
    unsafe fn load_ptr(self, src: *const f32) -> Self::V;
    /// # Safety
    /// `dst` is writable for `LANES` values.
    unsafe fn store_ptr(self, v: Self::V, dst: *mut f32);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the instruction set can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `c - a * b`.
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// Lane by lane `a < b ? x : y` (`y` where either is NaN).
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `2^n` for integral `n` in -127..=127; 0 at -127; unspecified but harmless for NaN.
    fn pow2(self, n: Self::V) -> Self::V;
    /// The lanes as an array, filled up with zeros.
    fn to_array(self, v: Self::V) -> [f32; 16];
    /// `dst[i] = table[code i]` for 32 codes of 4 bits in 16 bytes, the high half of a byte first; panics if there are fewer.
    fn lookup(self, table: &[f32; 16], codes: &[u8], dst: &mut [f32]);
    /// As [`lookup`](Self::lookup).
    fn lookup_bf16(self, table: &[bf16; 16], codes: &[u8], dst: &mut [bf16]);

    /// The first lane.
    #[inline(always)]
    fn first(self, v: Self::V) -> f32 {
        self.to_array(v)[0]
    }

    /// Sum of the lanes, always in the same order.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut a = self.to_array(v);
        let mut width = Self::LANES / 2;
        while width > 0 {
            for i in 0..width {
                a[i] += a[i + width];
            }
            width /= 2;
        }
        a[0]
    }

    /// Largest lane; NaN lanes may be passed over.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        let a = self.to_array(v);
        a[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// `2^x` for `x <= 127`, NaN kept; results below the normal range may be flushed to 0. Relative error below 2e-7.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        let n = self.round(self.max(self.splat(-127.0), x));
        let r = self.sub(self.max(self.splat(-127.0), x), n);
        self.mul(self.exp2_within(r), self.pow2(n))
    }

    /// `2^r` for `-0.5 <= r <= 0.5`.
    #[inline(always)]
    fn exp2_within(self, r: Self::V) -> Self::V {
        let mut p = self.splat(1.546_144_5e-4);
        for c in [0.001_340_042_8, 0.009_618_057, 0.055_503_27, 0.240_226_5, 6.931_472e-1, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        p
    }

    /// `p 2^n` for integral `n` in -151..=129, where `0.5 < p < 2`.
    #[inline(always)]
    fn scale_by_pow2(self, p: Self::V, n: Self::V) -> Self::V {
        // Two factors, since 2^n alone overflows or is denormal at the ends of the range.
        let half = self.round(self.mul(n, self.splat(0.5)));
        self.mul(self.mul(p, self.pow2(half)), self.pow2(self.sub(n, half)))
    }

    /// `e^x` over the whole range: 0 from -104 down, infinity past 88.7, NaN kept. Relative error below 2e-7.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        let x = self.min(self.splat(89.0), self.max(self.splat(-104.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fnma(n, self.splat(0.693_359_4), x);
        let r = self.fnma(n, self.splat(-2.121_944_4e-4), r);
        let mut p = self.splat(1.394_110_9e-3);
        for c in [0.008_375_126, 0.041_666_35, 0.166_664_15, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        self.scale_by_pow2(p, n)
    }

    /// `1 / (1 + e^-x)`.
    #[inline(always)]
    fn sigmoid(self, x: Self::V) -> Self::V {
        let one = self.splat(1.0);
        self.div(one, self.add(one, self.exp(self.sub(self.splat(0.0), x))))
    }
}

mod sealed {
    /// Types of which any bits are a value.
    pub trait Sealed {}

    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
}

/// A storage type of tensors: f32 or bf16, computed with in f32.
pub trait Element: sealed::Sealed + Copy + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// Zero.
    const ZERO: Self;
    /// Widened (exact).
    fn to_f32(self) -> f32;
    /// Rounded to nearest even.
    fn from_f32(x: f32) -> Self;
    /// The first `LANES` values, widened.
    fn load<S: Simd>(s: S, src: &[Self]) -> S::V;
    /// Rounds to the first `LANES` places.
    fn store<S: Simd>(s: S, v: S::V, dst: &mut [Self]);
    /// [`Simd::lookup`] of this type.
    fn lookup<S: Simd>(s: S, table: &[Self; 16], codes: &[u8], dst: &mut [Self]);

    /// The same values, where the type is bf16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;

    /// Like [`load`](Self::load) with zeros where `src` is too short.
    #[inline(always)]
    fn load_part<S: Simd>(s: S, src: &[Self]) -> S::V {
        if src.len() >= S::LANES {
            return Self::load(s, src);
        }
        let mut full = [Self::ZERO; 16];
        full[..src.len()].copy_from_slice(src);
        Self::load(s, &full)
    }

    /// Like [`store`](Self::store), only as many lanes as `dst` has.
    #[inline(always)]
    fn store_part<S: Simd>(s: S, v: S::V, dst: &mut [Self]) {
        if dst.len() >= S::LANES {
            return Self::store(s, v, dst);
        }
        let mut full = [Self::ZERO; 16];
        Self::store(s, v, &mut full);
        dst.copy_from_slice(&full[..dst.len()]);
    }
}

impl Element for f32 {
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> S::V {
        s.load(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::V, dst: &mut [Self]) {
        s.store(v, dst);
    }
    #[inline(always)]
    fn lookup<S: Simd>(s: S, table: &[Self; 16], codes: &[u8], dst: &mut [Self]) {
        s.lookup(table, codes, dst);
    }
    #[inline(always)]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        bf16::from_bits(round_bf16(x))
    }
    #[inline(always)]
    fn load<S: Simd>(s: S, src: &[Self]) -> S::V {
        s.load_bf16(src)
    }
    #[inline(always)]
    fn store<S: Simd>(s: S, v: S::V, dst: &mut [Self]) {
        s.store_bf16(v, dst);
    }
    #[inline(always)]
    fn lookup<S: Simd>(s: S, table: &[Self; 16], codes: &[u8], dst: &mut [Self]) {
        s.lookup_bf16(table, codes, dst);
    }
    #[inline(always)]
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
}

#[inline(always)]
fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let quiet = (bits >> 16) | 0x40;
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// Portable lanes, left to the compiler to vectorise.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

const PORTABLE: usize = 8;

#[inline(always)]
fn each(f: impl Fn(usize) -> f32) -> [f32; PORTABLE] {
    std::array::from_fn(f)
}

#[inline(always)]
fn lookup_each<T: Copy>(table: &[T; 16], codes: &[u8], dst: &mut [T]) {
    for (pair, byte) in dst[..LOOKED_UP].chunks_exact_mut(2).zip(&codes[..LOOKED_UP / 2]) {
        pair[0] = table[usize::from(byte >> 4)];
        pair[1] = table[usize::from(byte & 15)];
    }
}

#[inline(always)]
fn scalar_fma(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a slow call into the C library.
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

impl Simd for Portable {
    type V = [f32; PORTABLE];
    const LANES: usize = PORTABLE;
    const TILE: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; PORTABLE]
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> Self::V {
        let src = &src[..PORTABLE];
        each(|i| src[i])
    }
    #[inline(always)]
    fn store(self, v: Self::V, dst: &mut [f32]) {
        dst[..PORTABLE].copy_from_slice(&v);
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> Self::V {
        let src = &src[..PORTABLE];
        each(|i| src[i].to_f32())
    }
    #[inline(always)]
    fn store_bf16(self, v: Self::V, dst: &mut [bf16]) {
        let dst = &mut dst[..PORTABLE];
        for i in 0..PORTABLE {
            dst[i] = bf16::from_bits(round_bf16(v[i]));
        }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, src: *const f32) -> Self::V {
        // SAFETY: the caller vouches for LANES readable values; the read is unaligned.
        unsafe { src.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: Self::V, dst: *mut f32) {
        // SAFETY: the caller vouches for LANES writable values; the write is unaligned.
        unsafe { dst.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| scalar_fma(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn fnma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        each(|i| scalar_fma(-a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        // Adding and taking away 1.5 * 2^23 rounds to nearest even below 2^22; NaN and larger values stay.
        const BIG: f32 = 12_582_912.0;
        each(|i| if a[i].abs() < 4_194_304.0 { (a[i] + BIG) - BIG } else { a[i] })
    }
    #[inline(always)]
    fn select_lt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        each(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        each(|i| f32::from_bits(((n[i] as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn to_array(self, v: Self::V) -> [f32; 16] {
        let mut out = [0.0; 16];
        out[..PORTABLE].copy_from_slice(&v);
        out
    }
    #[inline(always)]
    fn lookup(self, table: &[f32; 16], codes: &[u8], dst: &mut [f32]) {
        lookup_each(table, codes, dst);
    }
    #[inline(always)]
    fn lookup_bf16(self, table: &[bf16; 16], codes: &[u8], dst: &mut [bf16]) {
        lookup_each(table, codes, dst);
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LOOKED_UP, Simd, bf16};
    use std::arch::x86_64::*;
    use std::sync::atomic::{AtomicU8, Ordering};

    /// Proof of AVX2 and FMA; 8 lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx2(());

    /// Proof of AVX-512 F, BW, DQ and VL; 16 lanes.
    #[derive(Clone, Copy, Debug)]
    pub struct Avx512(());

    /// 1: asked and nothing, 2: AVX2 and FMA, 3: AVX-512 as well. One load, since it is asked for every row.
    static FOUND: AtomicU8 = AtomicU8::new(0);

    #[inline(always)]
    fn found() -> u8 {
        match FOUND.load(Ordering::Relaxed) {
            0 => ask(),
            found => found,
        }
    }

    #[cold]
    fn ask() -> u8 {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        // scripts/emulate-avx512 carries out what the CPU does not.
        let avx512 = cfg!(tallow_emulated)
            || is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
        let found = 1 + u8::from(avx2) + u8::from(avx2 && avx512);
        FOUND.store(found, Ordering::Relaxed);
        found
    }

    impl Avx2 {
        /// `Some` if this CPU has AVX2 and FMA.
        #[inline(always)]
        pub fn new() -> Option<Self> {
            (found() >= 2).then_some(Self(()))
        }
    }

    impl Avx512 {
        /// `Some` if this CPU has AVX-512 F, BW, DQ and VL, besides AVX2 and FMA.
        #[inline(always)]
        pub fn new() -> Option<Self> {
            (found() >= 3).then_some(Self(()))
        }
    }

    /// A method that is one expression over intrinsics.
    macro_rules! lanes {
        ($(fn $name:ident($($arg:ident),*) = $value:expr;)*) => {
            $(
                #[inline(always)]
                fn $name(self, $($arg: Self::V),*) -> Self::V {
                    // SAFETY: a value of this type exists only where the CPU has the instructions.
                    unsafe { $value }
                }
            )*
        };
    }

    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        const TILE: usize = 2;

        lanes! {
            fn add(a, b) = _mm256_add_ps(a, b);
            fn sub(a, b) = _mm256_sub_ps(a, b);
            fn mul(a, b) = _mm256_mul_ps(a, b);
            fn div(a, b) = _mm256_div_ps(a, b);
            fn fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
            fn fnma(a, b, c) = _mm256_fnmadd_ps(a, b, c);
            fn max(a, b) = _mm256_max_ps(a, b);
            fn min(a, b) = _mm256_min_ps(a, b);
            fn round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            fn select_lt(a, b, x, y) = _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b));
            fn pow2(n) = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(
                _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127))));
        }

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            // SAFETY: as above.
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, src: &[f32]) -> __m256 {
            let src = &src[..8];
            // SAFETY: 8 values are there.
            unsafe { _mm256_loadu_ps(src.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, v: __m256, dst: &mut [f32]) {
            let dst = &mut dst[..8];
            // SAFETY: 8 places are there.
            unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn load_bf16(self, src: &[bf16]) -> __m256 {
            let src = &src[..8];
            // SAFETY: 8 values of 16 bits are there.
            unsafe {
                let half = _mm_loadu_si128(src.as_ptr().cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            }
        }
        #[inline(always)]
        fn store_bf16(self, v: __m256, dst: &mut [bf16]) {
            let dst = &mut dst[..8];
            // SAFETY: 8 places of 16 bits are there.
            unsafe {
                let bits = _mm256_castps_si256(v);
                let high = _mm256_srli_epi32::<16>(bits);
                let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
                let biased = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
                let rounded = _mm256_srli_epi32::<16>(biased);
                let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
                let words = _mm256_blendv_epi8(rounded, quiet, nan);
                let packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
                _mm_storeu_si128(dst.as_mut_ptr().cast(), packed);
            }
        }
        #[inline(always)]
        unsafe fn load_ptr(self, src: *const f32) -> __m256 {
            // SAFETY: the caller vouches for the pointer.
            unsafe { _mm256_loadu_ps(src) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, v: __m256, dst: *mut f32) {
            // SAFETY: the caller vouches for the pointer.
            unsafe { _mm256_storeu_ps(dst, v) }
        }
        #[inline(always)]
        fn first(self, v: __m256) -> f32 {
            // SAFETY: a value of this type exists only where the CPU has the instructions.
            unsafe { _mm256_cvtss_f32(v) }
        }
        #[inline(always)]
        fn sum(self, v: __m256) -> f32 {
            // SAFETY: as above.
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        fn max_lane(self, v: __m256) -> f32 {
            // SAFETY: as above.
            unsafe {
                let four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        fn to_array(self, v: __m256) -> [f32; 16] {
            let mut out = [0.0; 16];
            self.store(v, &mut out);
            out
        }
        #[inline(always)]
        fn lookup(self, table: &[f32; 16], codes: &[u8], dst: &mut [f32]) {
            let (codes, dst) = (&codes[..LOOKED_UP / 2], &mut dst[..LOOKED_UP]);
            // SAFETY: the table has 16 values; each of the 4 turns reads 4 of 16 bytes and writes 8 of 32 places.
            unsafe {
                let (low, high) = (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8)));
                let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
                for i in 0..4 {
                    let word = codes.as_ptr().add(4 * i).cast::<i32>().read_unaligned();
                    // A code is the low 4 bits of its lane: 3 of them choose from each half, the last between the halves.
                    let code = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
                    let (a, b) = (_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code));
                    let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code));
                    _mm256_storeu_ps(dst.as_mut_ptr().add(8 * i), _mm256_blendv_ps(a, b, upper));
                }
            }
        }
        #[inline(always)]
        fn lookup_bf16(self, table: &[bf16; 16], codes: &[u8], dst: &mut [bf16]) {
            let (codes, dst) = (&codes[..LOOKED_UP / 2], &mut dst[..LOOKED_UP]);
            // SAFETY: the table has 16 values of 16 bits, `codes` 16 bytes, and `dst` 32 places of 16 bits.
            unsafe {
                let table = table.as_ptr().cast::<__m128i>();
                let (first, last) = (_mm_loadu_si128(table), _mm_loadu_si128(table.add(1)));
                // The low and the high byte of each entry.
                let byte = _mm_set1_epi16(0xff);
                let low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(last, byte));
                let high = _mm_packus_epi16(_mm_srli_epi16::<8>(first), _mm_srli_epi16::<8>(last));
                let (low, high) = (_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high));

                let pairs = _mm_loadu_si128(codes.as_ptr().cast());
                let half = _mm_set1_epi8(15);
                let even = _mm_and_si128(_mm_srli_epi16::<4>(pairs), half);
                let odd = _mm_and_si128(pairs, half);
                let code = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
                let (low, high) = (_mm256_shuffle_epi8(low, code), _mm256_shuffle_epi8(high, code));
                // Values 0..8 and 16..24, then 8..16 and 24..32.
                let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
                let dst = dst.as_mut_ptr().cast::<__m256i>();
                _mm256_storeu_si256(dst, _mm256_permute2x128_si256::<0x20>(a, b));
                _mm256_storeu_si256(dst.add(1), _mm256_permute2x128_si256::<0x31>(a, b));
            }
        }
    }

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const TILE: usize = 4;

        lanes! {
            fn add(a, b) = _mm512_add_ps(a, b);
            fn sub(a, b) = _mm512_sub_ps(a, b);
            fn mul(a, b) = _mm512_mul_ps(a, b);
            fn div(a, b) = _mm512_div_ps(a, b);
            fn fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
            fn fnma(a, b, c) = _mm512_fnmadd_ps(a, b, c);
            fn max(a, b) = _mm512_max_ps(a, b);
            fn min(a, b) = _mm512_min_ps(a, b);
            fn round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            fn select_lt(a, b, x, y) = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x);
            fn pow2(n) = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(
                _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127))));
        }

        #[inline(always)]
        fn exp2(self, x: __m512) -> __m512 {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            // SAFETY: a value of this type exists only where the CPU has the instructions.
            unsafe {
                // What is left of minus infinity is 0, and scaling by it gives 0.
                let rest = _mm512_reduce_ps::<NEAREST>(x);
                _mm512_scalef_ps(self.exp2_within(rest), self.round(x))
            }
        }
        #[inline(always)]
        fn scale_by_pow2(self, p: __m512, n: __m512) -> __m512 {
            // SAFETY: as above.
            unsafe { _mm512_scalef_ps(p, n) }
        }
        #[inline(always)]
        fn splat(self, x: f32) -> __m512 {
            // SAFETY: a value of this type exists only where the CPU has the instructions.
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        fn load(self, src: &[f32]) -> __m512 {
            let src = &src[..16];
            // SAFETY: 16 values are there.
            unsafe { _mm512_loadu_ps(src.as_ptr()) }
        }
        #[inline(always)]
        fn store(self, v: __m512, dst: &mut [f32]) {
            let dst = &mut dst[..16];
            // SAFETY: 16 places are there.
            unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), v) }
        }
        #[inline(always)]
        fn load_bf16(self, src: &[bf16]) -> __m512 {
            let src = &src[..16];
            // SAFETY: 16 values of 16 bits are there.
            unsafe {
                let half = _mm256_loadu_si256(src.as_ptr().cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }
        #[inline(always)]
        fn store_bf16(self, v: __m512, dst: &mut [bf16]) {
            let dst = &mut dst[..16];
            // SAFETY: 16 places of 16 bits are there.
            unsafe {
                let bits = _mm512_castps_si512(v);
                let high = _mm512_srli_epi32::<16>(bits);
                let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
                let biased = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let rounded = _mm512_srli_epi32::<16>(biased);
                let quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
                let words = _mm512_mask_blend_epi32(nan, rounded, quiet);
                _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(words));
            }
        }
        #[inline(always)]
        unsafe fn load_ptr(self, src: *const f32) -> __m512 {
            // SAFETY: the caller vouches for the pointer.
            unsafe { _mm512_loadu_ps(src) }
        }
        #[inline(always)]
        unsafe fn store_ptr(self, v: __m512, dst: *mut f32) {
            // SAFETY: the caller vouches for the pointer.
            unsafe { _mm512_storeu_ps(dst, v) }
        }
        #[inline(always)]
        fn first(self, v: __m512) -> f32 {
            // SAFETY: a value of this type exists only where the CPU has the instructions.
            unsafe { _mm512_cvtss_f32(v) }
        }
        #[inline(always)]
        fn sum(self, v: __m512) -> f32 {
            // SAFETY: as above.
            unsafe {
                let eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        fn max_lane(self, v: __m512) -> f32 {
            // SAFETY: as above.
            unsafe {
                let eight = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
                let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
                let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
            }
        }
        #[inline(always)]
        fn to_array(self, v: __m512) -> [f32; 16] {
            let mut out = [0.0; 16];
            self.store(v, &mut out);
            out
        }
        // By AVX2, which is there too.
        #[inline(always)]
        fn lookup(self, table: &[f32; 16], codes: &[u8], dst: &mut [f32]) {
            Avx2(()).lookup(table, codes, dst);
        }
        #[inline(always)]
        fn lookup_bf16(self, table: &[bf16; 16], codes: &[u8], dst: &mut [bf16]) {
            Avx2(()).lookup_bf16(table, codes, dst);
        }
    }
}

/// Defines a function written over `S: Simd` and compiled for each instruction set. The public function takes the
/// [`Level`](crate::simd::Level) in place of `s`; a level that the CPU lacks falls back to the next lower one.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $([$($T:ident : $B:path),+])? ($s:ident $(, $arg:ident : $ty:ty)* $(,)?)
     $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($T: $B),+>)? (level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body<S: $crate::lanes::Simd $($(, $T: $B)+)?>($s: S, $($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($T: $B),+>)? (s: $crate::lanes::Avx512, $($arg: $ty),*) $(-> $ret)? {
                    body(s, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($T: $B),+>)? (s: $crate::lanes::Avx2, $($arg: $ty),*) $(-> $ret)? {
                    body(s, $($arg),*)
                }
                if level >= $crate::simd::Level::Avx512
                    && let Some(s) = $crate::lanes::Avx512::new()
                {
                    // SAFETY: `s` is the proof that the CPU has the features.
                    return unsafe { avx512(s, $($arg),*) };
                }
                if level >= $crate::simd::Level::Avx2
                    && let Some(s) = $crate::lanes::Avx2::new()
                {
                    // SAFETY: `s` is the proof that the CPU has the features.
                    return unsafe { avx2(s, $($arg),*) };
                }
            }
            let _ = level;
            body($crate::lanes::Portable, $($arg),*)
        }
    };
}
pub(crate) use simd_fn;

#[cfg(test)]
mod tests {
    simd_fn! {
        fn exponentials(s, x: &[f32], two: &mut [f32], e: &mut [f32]) {
            for ((x, two), e) in x.chunks(16).zip(two.chunks_mut(16)).zip(e.chunks_mut(16)) {
                for at in (0..16).step_by(S::LANES) {
                    s.store(s.exp2(s.load(&x[at..])), &mut two[at..]);
                    s.store(s.exp(s.load(&x[at..])), &mut e[at..]);
                }
            }
        }
    }

    #[test]
    fn exponentials_match_f64_over_their_range() {
        let mut x: Vec<f32> = (0..16 * 400).map(|i| i as f32 * 0.0337 - 126.0).filter(|x| *x <= 88.0).collect();
        x.extend([f32::NEG_INFINITY, -1e30, -200.0, -127.5, -103.9, 0.0, -0.0, 0.5, -0.5, 1.5, f32::NAN]);
        x.resize(x.len().next_multiple_of(16), 1.0);
        for level in [crate::simd::Level::Scalar, crate::simd::Level::Avx2, crate::simd::Level::Avx512] {
            let (mut two, mut e) = (vec![9.0; x.len()], vec![9.0; x.len()]);
            exponentials(level, &x, &mut two, &mut e);
            for (what, got, exact) in [("2^x", &two, f64::exp2 as fn(f64) -> f64), ("e^x", &e, f64::exp)] {
                for (x, got) in x.iter().zip(got) {
                    let want = exact(f64::from(*x));
                    // Below the normal range some are flushed to zero, some lose digits.
                    let error = (f64::from(*got) - want).abs();
                    let fits = error <= 2e-7 * want + 1.2e-38 && (*got == 0.0 || *x > -160.0);
                    assert!(if x.is_nan() { got.is_nan() } else { fits }, "{level:?} {what} {x}: {got} {want}");
                }
            }
        }
    }
}
