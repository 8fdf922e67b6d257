//! What multiplies packed panels: instructions for bf16.

use std::ops::Range;

use half::bf16;

use super::pack::{Operand, pack_pairs, pack_tiles};
use super::{Blocking, NR};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::amx::{Amx, Tiles};
use crate::simd::{self, Bf16};

/// How operands are packed and tiles multiplied; to have one is the proof that this CPU can.
pub(in crate::gemm) trait Kernel: Copy + Send + Sync {
    /// Of operands.
    type Item: Copy + Send + Sync;
    /// The kernel on a thread that is ready for it.
    type Ready;

    /// Rows of a tile.
    fn rows(self) -> usize;

    /// A panel has a multiple of this many steps, of which the last may be zeros.
    fn unit(self) -> usize;

    /// Packed elements of an element.
    fn parts(self) -> usize {
        1
    }

    fn blocking(self) -> Blocking;

    /// Lines that are packed in the time of a tile of as many steps.
    fn lines_per_tile(self) -> usize;

    /// Packs rows of `a` over some steps.
    fn pack_a(self, packed: &mut [bf16], from: Operand<Self::Item>, lines: Range<usize>, steps: Range<usize>);

    /// Packs columns of `b` over some steps.
    fn pack_b(self, packed: &mut [bf16], from: Operand<Self::Item>, lines: Range<usize>, steps: Range<usize>);

    /// Calls `f` on a thread that is ready to multiply.
    fn ready<R>(self, f: impl FnOnce(Self::Ready) -> R) -> R;

    /// `tile = a panel x b panel` if `fresh`, else `+=`. `tile` is `[rows, 32]` and lies on a cache line.
    fn multiply(ready: &Self::Ready, a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool);
}

/// Operands in bf16.
#[derive(Clone, Copy)]
pub(in crate::gemm) enum InBf16 {
    /// `vdpbf16ps`: 12 x 32 sums in 24 registers. The loads (176 bytes for 24 multiply-adds) come from L2 without stalling, so
    /// panels need not fit L1.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// `tdpbf16ps`: 32 x 32 sums in four tiles. The panel of `b` stays in L1, that of `a` comes from L2.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Tiles(Amx),
    /// The same panels without the instructions: for tests.
    #[cfg(test)]
    Scalar { tiles: bool },
}

impl InBf16 {
    /// `Some` if this CPU has instructions that are worth it and `TALLOW_SIMD` does not forbid them.
    pub(in crate::gemm) fn native() -> Option<Self> {
        match simd::bf16(simd::level())? {
            #[cfg(target_arch = "x86_64")]
            Bf16::Pairs => Some(Self::Pairs),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Bf16::Tiles => Amx::new().map(Self::Tiles),
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            _ => None,
        }
    }

    fn tiles(self) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Tiles(_) => true,
            #[cfg(test)]
            Self::Scalar { tiles } => tiles,
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => false,
        }
    }
}

impl Kernel for InBf16 {
    type Item = bf16;
    type Ready = Ready;

    fn rows(self) -> usize {
        if self.tiles() { 32 } else { 12 }
    }

    fn unit(self) -> usize {
        if self.tiles() { 32 } else { 2 }
    }

    fn blocking(self) -> Blocking {
        if self.tiles() { super::TILES } else { super::PAIRS }
    }

    fn lines_per_tile(self) -> usize {
        if self.tiles() { 4 } else { 15 }
    }

    fn pack_a(self, packed: &mut [bf16], from: Operand<bf16>, lines: Range<usize>, steps: Range<usize>) {
        match self.tiles() {
            true => pack_tiles(packed, from, lines, steps),
            false => pack_pairs::<12>(packed, from, lines, steps, self.unit()),
        }
    }

    fn pack_b(self, packed: &mut [bf16], from: Operand<bf16>, lines: Range<usize>, steps: Range<usize>) {
        pack_pairs::<NR>(packed, from, lines, steps, self.unit());
    }

    fn ready<R>(self, f: impl FnOnce(Ready) -> R) -> R {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => f(Ready::Pairs),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Tiles(amx) => f(Ready::Tiles(Tiles::configure(amx))),
            #[cfg(test)]
            Self::Scalar { tiles } => f(Ready::Scalar { tiles }),
        }
    }

    fn multiply(ready: &Ready, a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool) {
        // Where there are no such instructions there is no kernel.
        #[cfg(not(any(test, target_arch = "x86_64")))]
        let _ = (a, b, tile, fresh);
        match *ready {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: there is such a kernel only where the CPU has the instructions.
            Ready::Pairs => unsafe { pairs(a, b, tile, fresh) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Ready::Tiles(ref tiles) => {
                let blocks = b.len() / (32 * NR);
                assert!(a.len() >= blocks * 32 * 32 && tile.len() >= 32 * NR);
                // SAFETY: both panels have `blocks` times 32 steps of 32 lines, and the tile is 32 x 32.
                unsafe { tiles.square(a.as_ptr().cast(), b.as_ptr().cast(), tile.as_mut_ptr(), blocks, fresh) }
            }
            #[cfg(test)]
            Ready::Scalar { tiles } => scalar(tiles, a, b, tile, fresh),
        }
    }
}

/// [`InBf16`] on a thread that is ready for it.
pub(in crate::gemm) enum Ready {
    #[cfg(target_arch = "x86_64")]
    Pairs,
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Tiles(Tiles),
    #[cfg(test)]
    Scalar { tiles: bool },
}

/// See [`Kernel::multiply`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs(a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool) {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    const MR: usize = 12;
    let pairs = b.len() / (2 * NR);
    assert!(a.len() >= pairs * 2 * MR && tile.len() >= MR * NR);
    let mut sums = [[_mm512_setzero_ps(); 2]; MR];
    if !fresh {
        for (sums, row) in sums.iter_mut().zip(tile.chunks_exact(NR)) {
            // SAFETY: a row of the tile holds two vectors.
            *sums = unsafe { [_mm512_loadu_ps(row.as_ptr()), _mm512_loadu_ps(row.as_ptr().add(16))] };
        }
    }
    let (mut pa, mut pb) = (a.as_ptr().cast::<i32>(), b.as_ptr().cast::<__m512i>());
    for _ in 0..pairs {
        // SAFETY: both panels hold `pairs` steps of 12 and 32 pairs (asserted above for `a`, by its length for `b`), and
        // every bit pattern is a valid bf16 pair.
        unsafe {
            let b0: __m512bh = std::mem::transmute(_mm512_loadu_si512(pb));
            let b1: __m512bh = std::mem::transmute(_mm512_loadu_si512(pb.add(1)));
            for (r, row) in sums.iter_mut().enumerate() {
                let x: __m512bh = std::mem::transmute(_mm512_set1_epi32(pa.add(r).read_unaligned()));
                row[0] = _mm512_dpbf16_ps(row[0], x, b0);
                row[1] = _mm512_dpbf16_ps(row[1], x, b1);
            }
            pa = pa.add(MR);
            pb = pb.add(2);
        }
    }
    for (row, [left, right]) in tile.chunks_exact_mut(NR).zip(sums) {
        // SAFETY: a row of the tile holds two vectors.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), left);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), right);
        }
    }
}

#[cfg(test)]
fn scalar(tiles: bool, a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool) {
    let rows = if tiles { 32 } else { 12 };
    let steps = b.len() / NR;
    assert!(b.len() == steps * NR && a.len() == steps * rows && steps.is_multiple_of(if tiles { 32 } else { 2 }));
    for (i, row) in tile.chunks_exact_mut(NR).enumerate().take(rows) {
        for (j, sum) in row.iter_mut().enumerate() {
            *sum = if fresh { 0.0 } else { *sum };
            for p in 0..steps {
                let x = if tiles { a[p / 32 * 1024 + i * 32 + p % 32] } else { a[p / 2 * 2 * rows + 2 * i + p % 2] };
                *sum += x.to_f32() * b[p / 2 * 2 * NR + 2 * j + p % 2].to_f32();
            }
        }
    }
}

#[cfg(test)]
pub(super) fn all() -> Vec<(&'static str, InBf16)> {
    let mut all =
        vec![("scalar pairs", InBf16::Scalar { tiles: false }), ("scalar tiles", InBf16::Scalar { tiles: true })];
    #[cfg(target_arch = "x86_64")]
    if simd::has_pairs() {
        all.push(("pairs", InBf16::Pairs));
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    all.extend(Amx::new().map(|amx| ("tiles", InBf16::Tiles(amx))));
    all
}
