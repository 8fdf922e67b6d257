//! f32 operands in three parts of bf16, for CPUs whose tiles of bf16 are more than six times as fast as f32.
//!
//! `x = h + m + l` exactly: `h` the upper 8 bits of the significand of `x`, `m` the rest rounded to 8 bits, `l` what is left, at
//! most 8 bits. Of the nine products of parts the three smallest, `m l`, `l m` and `l l`, are left out: below 2^-22 of a product, and
//! on average as much as f32 itself rounds a product by. The sums are f32. Parts below 2^-126 count as zero; an operand that
//! is infinite gives NaN in its row or column.

use std::ops::Range;

use half::bf16;

use super::kernel::Kernel;
use super::pack::{BLOCK, Operand};
use super::{Blocking, NR};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::amx::{Amx, Tiles};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::simd::Level;

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Parts of a value.
const PARTS: usize = 3;
/// Elements of a block of one part: 32 lines of 32 steps.
const SQUARE: usize = BLOCK * BLOCK;

/// Panels of 24 KiB (96 where all of a product's steps fit at once), 384 KiB of `a`, 768 KiB of `b`, sums of at most 1 MiB.
const BLOCKING: Blocking = Blocking { depth: 128, depth_once: 512, a: 1 << 16, b: 1 << 17, b_once: 1 << 17, rows: 512 };

/// Operands in f32; to have one is the proof that this CPU has AMX.
#[derive(Clone, Copy)]
pub(in crate::gemm) enum InParts {
    /// `tdpbf16ps`, six times for each pair of blocks.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Tiles(Amx),
    /// The same panels without the instructions: for tests.
    #[cfg(test)]
    Scalar,
}

impl InParts {
    /// `Some` if this CPU has AMX, `TALLOW_SIMD` does not forbid it, and the product fills tiles.
    pub(in crate::gemm) fn worth((m, n, k): (usize, usize, usize)) -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if m.min(n).min(k) >= BLOCK && crate::simd::level() >= Level::Amx {
            return Amx::new().map(Self::Tiles);
        }
        let _ = (m, n, k);
        None
    }
}

impl Kernel for InParts {
    type Item = f32;
    type Ready = Ready;

    fn rows(self) -> usize {
        BLOCK
    }

    fn unit(self) -> usize {
        BLOCK
    }

    fn parts(self) -> usize {
        PARTS
    }

    fn blocking(self) -> Blocking {
        BLOCKING
    }

    fn lines_per_tile(self) -> usize {
        12
    }

    fn pack_a(self, packed: &mut [bf16], from: Operand<f32>, lines: Range<usize>, steps: Range<usize>) {
        pack(packed, from, lines, steps, |line, step| line * BLOCK + step, by_vectors().map(|by| by.0));
    }

    fn pack_b(self, packed: &mut [bf16], from: Operand<f32>, lines: Range<usize>, steps: Range<usize>) {
        pack(
            packed,
            from,
            lines,
            steps,
            |line, step| step / 2 * 2 * NR + 2 * line + step % 2,
            by_vectors().map(|by| by.1),
        );
    }

    fn ready<R>(self, f: impl FnOnce(Ready) -> R) -> R {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Tiles(amx) => f(Ready::Tiles(Tiles::configure(amx))),
            #[cfg(test)]
            Self::Scalar => f(Ready::Scalar),
        }
    }

    fn multiply(ready: &Ready, a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool) {
        // Where there are no such instructions there is no kernel.
        #[cfg(not(any(test, all(target_arch = "x86_64", target_os = "linux"))))]
        let _ = (a, b, tile, fresh);
        match *ready {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Ready::Tiles(ref tiles) => {
                let blocks = b.len() / (PARTS * SQUARE);
                assert!(a.len() >= blocks * PARTS * SQUARE && tile.len() >= SQUARE);
                // SAFETY: both panels have `blocks` times three squares, and the tile is 32 x 32.
                unsafe { tiles.square_of_parts(a.as_ptr().cast(), b.as_ptr().cast(), tile.as_mut_ptr(), blocks, fresh) }
            }
            #[cfg(test)]
            Ready::Scalar => scalar(a, b, tile, fresh),
        }
    }
}

/// [`InParts`] on a thread that is ready for it.
pub(in crate::gemm) enum Ready {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Tiles(Tiles),
    #[cfg(test)]
    Scalar,
}

/// The three parts of a value.
fn parts(x: f32) -> [bf16; PARTS] {
    let upper = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
    let h = upper(x);
    let rest = x - h;
    let m = upper(f32::from_bits(rest.to_bits().wrapping_add(0x8000)));
    [h, m, rest - m].map(|part| bf16::from_bits((part.to_bits() >> 16) as u16))
}

/// Whole blocks of 32 lines of 32 steps, from a line and a step, by vectors.
type PackVectors = fn(&mut [bf16], Operand<f32>, usize, usize);

/// For `a` and for `b`; `None` if the CPU has no such vectors.
fn by_vectors() -> Option<(PackVectors, PackVectors)> {
    #[cfg(target_arch = "x86_64")]
    if super::pack::wide() {
        // SAFETY: the CPU has AVX-512 F and BW.
        let a: PackVectors = |block, from, line, step| unsafe { avx512::pack_a(block, from, line, step) };
        // SAFETY: as above.
        let b: PackVectors = |block, from, line, step| unsafe { avx512::pack_b(block, from, line, step) };
        return Some((a, b));
    }
    None
}

/// Packs into panels of 32 lines, `[block of 32 steps][part][32 x 32]`, where an element of a block is at `place(line, step)`. Zeros
/// are where there is no line and where steps are missing to a whole block.
fn pack(
    packed: &mut [bf16],
    from: Operand<f32>,
    lines: Range<usize>,
    steps: Range<usize>,
    place: impl Fn(usize, usize) -> usize,
    by_vectors: Option<PackVectors>,
) {
    if steps.is_empty() || lines.is_empty() {
        return;
    }
    from.check(&lines, &steps);
    let size = steps.len().next_multiple_of(BLOCK) * BLOCK * PARTS;
    for (panel, first) in packed.chunks_exact_mut(size).zip(lines.clone().step_by(BLOCK)) {
        for (block, start) in panel.chunks_exact_mut(PARTS * SQUARE).zip(steps.clone().step_by(BLOCK)) {
            let (lines, steps) = (first..lines.end.min(first + BLOCK), start..steps.end.min(start + BLOCK));
            if let (Some(pack), BLOCK, BLOCK) = (by_vectors, lines.len(), steps.len()) {
                pack(block, from, first, start);
                continue;
            }
            block.fill(bf16::ZERO);
            for line in lines {
                for step in steps.clone() {
                    let at = place(line - first, step - start);
                    for (part, x) in parts(from.values[line * from.line + step * from.step]).into_iter().enumerate() {
                        block[part * SQUARE + at] = x;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
fn scalar(a: &[bf16], b: &[bf16], tile: &mut [f32], fresh: bool) {
    if fresh {
        tile.fill(0.0);
    }
    for (a, b) in a.chunks_exact(PARTS * SQUARE).zip(b.chunks_exact(PARTS * SQUARE)) {
        for (of_a, of_b) in [(0, 2), (2, 0), (1, 1), (0, 1), (1, 0), (0, 0)] {
            for (i, row) in tile.chunks_exact_mut(NR).enumerate() {
                for (j, sum) in row.iter_mut().enumerate() {
                    for p in 0..BLOCK {
                        let (x, y) =
                            (a[of_a * SQUARE + i * BLOCK + p], b[of_b * SQUARE + p / 2 * 2 * NR + 2 * j + p % 2]);
                        *sum += x.to_f32() * y.to_f32();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::{Out, Strides, plain, turned};
    use super::super::{blocked_product, product};
    use super::*;

    fn kernels() -> Vec<InParts> {
        let mut all = vec![InParts::Scalar];
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        all.extend(Amx::new().map(InParts::Tiles));
        all
    }

    fn normal(len: usize, stream: u64) -> Vec<f32> {
        let mut values = vec![0.0; len];
        crate::rng::fill_normal(&mut values, 5, stream, 1.0);
        values
    }

    #[test]
    fn parts_add_up_exactly() {
        let some = [0.0, 1.0, -1.0, 1.0 + f32::EPSILON, 0.1, -3.3e-5, 1e30, f32::MAX, -f32::MAX, 1e-30, 16_777_215.0];
        for x in some.into_iter().chain(normal(20_000, 1)).chain((0..4096).map(|i| f32::from_bits(0x3f80_7f00 + i))) {
            let [h, m, l] = parts(x).map(|part| part.to_f64());
            assert_eq!(h + m + l, f64::from(x), "{x:e}");
            assert!(m.abs() <= h.abs() / 64.0 && l.abs() <= h.abs() / 16_384.0, "{x:e}");
        }
    }

    /// Vectors pack what the definition says.
    #[test]
    fn vectors_pack_the_same() {
        let (long, short) = (130, 70);
        let values = normal(long * short, 2);
        let Some((a, b)) = by_vectors() else { return };
        for (line, step) in [(short, 1), (1, long)] {
            let from = Operand { values: &values, line, step };
            let most = if step == 1 { (long, short) } else { (short.max(long), short) };
            for (lines, steps) in [(0..most.0, 0..most.1), (3..80, 5..70), (1..33, 2..34)] {
                for (place, vectors) in [
                    ((|line, step| line * BLOCK + step) as fn(usize, usize) -> usize, a),
                    (|line, step| step / 2 * 2 * NR + 2 * line + step % 2, b),
                ] {
                    let size = lines.len().div_ceil(BLOCK) * steps.len().div_ceil(BLOCK) * PARTS * SQUARE;
                    let [by_definition, got] = [None, Some(vectors)].map(|by| {
                        let mut packed = vec![bf16::NAN; size];
                        pack(&mut packed, from, lines.clone(), steps.clone(), place, by);
                        packed.into_iter().map(bf16::to_bits).collect::<Vec<_>>()
                    });
                    assert_eq!(by_definition, got, "{line} {lines:?} {steps:?}");
                }
            }
        }
    }

    /// Against f64, at edges and over several segments: the error is that of f32.
    #[test]
    fn as_exact_as_f32() {
        let small = Blocking { depth: 32, depth_once: 32, a: 1, b: 1, b_once: 1, rows: 1 };
        for (m, n, k) in [(32, 32, 32), (33, 65, 100), (70, 40, 300), (5, 3, 1), (64, 96, 1000)] {
            let (a, b) = (normal(m * k, 3), normal(k * n, 4));
            for (sa, sb) in [(plain(k), turned(k)), (plain(k), plain(n)), (turned(m), plain(n))] {
                let at = |s: Strides, i: usize, j: usize| i * s.rows + j * s.cols;
                let exact = |size: fn(f64) -> f64| -> Vec<f64> {
                    let term = |i, j, p| size(f64::from(a[at(sa, i, p)]) * f64::from(b[at(sb, p, j)]));
                    (0..m * n).map(|c| (0..k).map(|p| term(c / n, c % n, p)).sum()).collect()
                };
                let (want, sizes) = (exact(|x| x), exact(f64::abs));
                for kernel in kernels() {
                    for blocking in [BLOCKING, small] {
                        let (mut set, mut added) = (vec![f32::NAN; m * n], vec![1f32; m * n]);
                        blocked_product(kernel, blocking, (m, n, k), (&a, sa), (&b, sb), Out::F32(&mut set, false));
                        blocked_product(kernel, blocking, (m, n, k), (&a, sa), (&b, sb), Out::F32(&mut added, true));
                        for ((set, added), (want, size)) in set.iter().zip(&added).zip(want.iter().zip(&sizes)) {
                            // Rounding errors of sums of k terms, of the sum of their sizes.
                            let most = size * f64::from(f32::EPSILON) * (k as f64).sqrt().max(2.0);
                            assert!((f64::from(*set) - want).abs() <= most, "{m} {n} {k}: {set} {want}");
                            assert!((f64::from(*added) - want - 1.0).abs() <= most + 2e-7 * (1.0 + want.abs()));
                        }
                    }
                }
            }
        }
    }

    /// Where parts fall below 2^-126 no more than these is lost, in vectors as by the definition.
    #[test]
    fn tiny_and_huge_values() {
        let (m, n, k) = (64, 64, 64);
        for exponent in [-149, -140, -126, -118, -110, -100, -60, 60, 110] {
            let scale = 2f64.powi(exponent) as f32;
            let a: Vec<f32> = normal(m * k, 7).iter().map(|x| x * scale).collect();
            let b = normal(k * n, 8);
            for (sa, sb) in [(plain(k), turned(k)), (turned(m), plain(n))] {
                for kernel in kernels() {
                    let mut c = vec![f32::NAN; m * n];
                    product(kernel, (m, n, k), (&a, sa), (&b, sb), Out::F32(&mut c, false));
                    for (at, got) in c.iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let term = |p: usize| {
                            f64::from(a[i * sa.rows + p * sa.cols]) * f64::from(b[p * sb.rows + j * sb.cols])
                        };
                        let (want, size) = (0..k).map(term).fold((0.0, 0.0), |(x, s), t| (x + t, s + f64::abs(t)));
                        let lost = 8.0 * k as f64 * f64::from(f32::MIN_POSITIVE);
                        let most = size * 8.0 * f64::from(f32::EPSILON) + lost;
                        assert!((f64::from(*got) - want).abs() <= most, "2^{exponent}: {got:e} {want:e}");
                    }
                }
            }
        }
    }

    /// What is not finite stays in its row and column.
    #[test]
    fn infinity_is_nan_in_its_own_row_and_column() {
        let (m, n, k) = (40, 50, 33);
        let (mut a, mut b) = (normal(m * k, 5), normal(k * n, 6));
        a[7 * k + 32] = f32::INFINITY;
        b[3 * n + 49] = f32::NAN;
        for kernel in kernels() {
            let mut c = vec![0f32; m * n];
            product(kernel, (m, n, k), (&a, plain(k)), (&b, plain(n)), Out::F32(&mut c, false));
            for (at, x) in c.iter().enumerate() {
                assert_eq!(x.is_nan(), at / n == 7 || at % n == 49, "{at} {x}");
            }
        }
    }
}
