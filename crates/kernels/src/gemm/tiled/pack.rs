//! Packing operands for the tile product: the two elements of a pair of the inner dimension side by side, then the lines
//! of a panel, `[pair][line][2]`; what AMX multiplies from the left, as tiles of 16 lines of 32 steps.
//!
//! A product of a layer is small enough for its packing to show: at 500 GFLOP/s a thread an element of `b` meets all rows
//! of `a` in a few nanoseconds. So both layouts move whole vectors: contiguous lines by transposing 8 x 8 or 16 x 16 pairs in
//! registers, lines of a transposed operand by interleaving two rows.

use std::ops::Range;

use half::bf16;

#[cfg(target_arch = "x86_64")]
mod avx512;

/// An operand, as its panels see it: the lines (rows of `a`, columns of `b`) and the inner dimension.
#[derive(Clone, Copy)]
pub(in crate::gemm) struct Operand<'a, T> {
    pub(super) values: &'a [T],
    /// Elements from one line to the next.
    pub(super) line: usize,
    /// Elements from one step of the inner dimension to the next; this or `line` is 1.
    pub(super) step: usize,
}

impl<T> Operand<'_, T> {
    /// Lines and steps, not none of either, are within the values.
    pub(super) fn check(&self, lines: &Range<usize>, steps: &Range<usize>) {
        let last = (lines.end - 1) * self.line + (steps.end - 1) * self.step;
        assert!((self.line == 1 || self.step == 1) && last < self.values.len(), "panels beyond their operand");
    }
}

/// Panels of interleaved lines that are packed side by side, so that each row of the operand is read in long pieces.
const ABREAST: usize = 8;

/// Packs the lines `lines` over the steps `steps` into panels of `W` lines, `[pair][line][2]`, with zeros where there is no
/// line and where steps are missing to a multiple of `unit`, which is even. What `packed` has behind the last panel stays.
pub(super) fn pack_pairs<const W: usize>(
    packed: &mut [bf16],
    from: Operand<bf16>,
    lines: Range<usize>,
    steps: Range<usize>,
    unit: usize,
) {
    if steps.is_empty() || lines.is_empty() {
        return;
    }
    from.check(&lines, &steps);
    let size = steps.len().next_multiple_of(unit) * W;
    let packed = &mut packed[..lines.len().div_ceil(W) * size];
    let abreast = if from.step == 1 { 1 } else { ABREAST };
    for (panels, first) in packed.chunks_mut(abreast * size).zip(lines.clone().step_by(abreast * W)) {
        let lines = first..lines.end.min(first + abreast * W);
        if lines.len() * size < panels.len() * W {
            panels.fill(bf16::ZERO);
        }
        let whole = steps.len() / 2 * 2 * W;
        panels.chunks_exact_mut(size).for_each(|panel| panel[whole..].fill(bf16::ZERO));
        if from.step == 1 {
            turn::<W>(panels, from, lines, &steps)
        } else {
            interleave::<W>(panels, from, lines, &steps, size)
        }
    }
}

/// Whether the CPU has vectors of 32 elements. scripts/emulate-avx512 lacks the instructions that move them.
#[cfg(target_arch = "x86_64")]
pub(super) fn wide() -> bool {
    crate::lanes::Avx512::new().is_some() && !cfg!(tallow_emulated)
}

/// Lines of a panel of tiles, and steps of one of its blocks.
pub(super) const BLOCK: usize = 32;

/// Packs the lines `lines` over the steps `steps` into panels of 32 lines, `[block of 32 steps][line][step]`: pairs of tiles
/// that are multiplied from the left. Zeros are where there is no line and where steps are missing to a whole block.
pub(super) fn pack_tiles(packed: &mut [bf16], from: Operand<bf16>, lines: Range<usize>, steps: Range<usize>) {
    if steps.is_empty() || lines.is_empty() {
        return;
    }
    from.check(&lines, &steps);
    let size = steps.len().next_multiple_of(BLOCK) * BLOCK;
    for (panel, first) in packed.chunks_exact_mut(size).zip(lines.clone().step_by(BLOCK)) {
        let lines = first..lines.end.min(first + BLOCK);
        if lines.len() < BLOCK {
            panel.fill(bf16::ZERO);
        } else if !steps.len().is_multiple_of(BLOCK) {
            panel[size - BLOCK * BLOCK..].fill(bf16::ZERO);
        }
        if from.step == 1 {
            for (place, line) in lines.enumerate() {
                let (blocks, rest) = from.values[line * from.line..][steps.clone()].as_chunks::<BLOCK>();
                let mut places = panel.as_chunks_mut::<BLOCK>().0[place..].iter_mut().step_by(BLOCK);
                blocks.iter().zip(&mut places).for_each(|(block, to)| *to = *block);
                if let Some(to) = places.next() {
                    to[..rest.len()].copy_from_slice(rest);
                }
            }
        } else {
            let whole = if lines.len() == BLOCK { turned_blocks(panel, from, lines.start, &steps) } else { 0 };
            for (at, step) in steps.clone().enumerate().skip(whole) {
                let row = &from.values[step * from.step..][lines.clone()];
                let places = &mut panel[at / BLOCK * BLOCK * BLOCK + at % BLOCK..];
                row.iter().zip(places.iter_mut().step_by(BLOCK)).for_each(|(x, to)| *to = *x);
            }
        }
    }
}

/// Packs the blocks of 32 steps of 32 neighbouring lines from `line` that are whole; returns how many steps they have.
fn turned_blocks(panel: &mut [bf16], from: Operand<bf16>, line: usize, steps: &Range<usize>) -> usize {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the CPU has AVX-512 F and BW.
        return unsafe { avx512::turned_blocks(panel, from, line, steps) };
    }
    let _ = (panel, from, line, steps);
    0
}

/// The steps of a line lie side by side: pairs are turned into columns, one panel.
fn turn<const W: usize>(panel: &mut [bf16], from: Operand<bf16>, lines: Range<usize>, steps: &Range<usize>) {
    let whole = transposed::<W>(panel, from, &lines, steps);
    // What does not fill the registers, and everything where there are none.
    for (place, line) in lines.enumerate() {
        let values = &from.values[line * from.line..][steps.clone()][whole..];
        for (pair, two) in values.chunks(2).enumerate() {
            let at = ((whole / 2 + pair) * W + place) * 2;
            panel[at] = two[0];
            if let Some(second) = two.get(1) {
                panel[at + 1] = *second;
            }
        }
    }
}

/// Neighbouring lines lie side by side: two steps make a row of pairs, in several panels of `size` elements.
fn interleave<const W: usize>(
    panels: &mut [bf16],
    from: Operand<bf16>,
    lines: Range<usize>,
    steps: &Range<usize>,
    size: usize,
) {
    let (whole_panels, whole_pairs) = interleaved::<W>(panels, from, &lines, steps, size);
    let pairs = steps.len().div_ceil(2);
    for (at, panel) in panels.chunks_exact_mut(size).enumerate() {
        let lines = lines.start + at * W..lines.end.min(lines.start + (at + 1) * W);
        let done = if at < whole_panels { whole_pairs } else { 0 };
        for (pair, out) in panel.as_chunks_mut::<2>().0.chunks_exact_mut(W).enumerate().take(pairs).skip(done) {
            for (second, step) in (steps.start + 2 * pair..steps.end).take(2).enumerate() {
                let row = &from.values[step * from.step..][lines.clone()];
                out.iter_mut().zip(row).for_each(|(two, x)| two[second] = *x);
            }
        }
    }
}

/// Packs the panels and pairs that are whole; returns how many they are.
#[cfg(target_arch = "x86_64")]
fn interleaved<const W: usize>(
    panels: &mut [bf16],
    from: Operand<bf16>,
    lines: &Range<usize>,
    steps: &Range<usize>,
    size: usize,
) -> (usize, usize) {
    use std::arch::x86_64::{
        __m128i, _mm_loadl_epi64, _mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi16, _mm_unpacklo_epi16,
    };
    const { assert!(W.is_multiple_of(4), "a row of a panel is of whole and half vectors") };
    let (count, pairs) = (lines.len() / W, steps.len() / 2);
    assert!(count * size <= panels.len() && pairs * 2 * W <= size);
    if count == 0 || pairs == 0 {
        return (count, pairs);
    }
    assert!((steps.end - 1) * from.step + lines.start + count * W <= from.values.len());
    if W == BLOCK && wide() {
        // SAFETY: the CPU has AVX-512 F and BW; what it reads and writes is asserted above.
        unsafe { avx512::interleaved(panels, from, lines.start, steps, (count, pairs, size)) };
        return (count, pairs);
    }
    for pair in 0..pairs {
        // SAFETY: both steps are before `steps.end`, and the lines `lines.start..lines.start + count * W` of that are
        // within the operand (asserted); the panels hold `count` times `pairs` rows of 2 W elements (asserted). SSE2 is
        // part of the architecture.
        unsafe {
            let even = from.values.as_ptr().add((steps.start + 2 * pair) * from.step + lines.start);
            let odd = even.add(from.step);
            for panel in 0..count {
                let (even, odd) = (even.add(panel * W), odd.add(panel * W));
                let out = panels.as_mut_ptr().add(panel * size + pair * 2 * W).cast::<__m128i>();
                for eight in 0..W / 8 {
                    let e = _mm_loadu_si128(even.add(8 * eight).cast());
                    let o = _mm_loadu_si128(odd.add(8 * eight).cast());
                    _mm_storeu_si128(out.add(2 * eight), _mm_unpacklo_epi16(e, o));
                    _mm_storeu_si128(out.add(2 * eight + 1), _mm_unpackhi_epi16(e, o));
                }
                if W % 8 == 4 {
                    let e = _mm_loadl_epi64(even.add(W - 4).cast());
                    let o = _mm_loadl_epi64(odd.add(W - 4).cast());
                    _mm_storeu_si128(out.add(W / 4 - 1), _mm_unpacklo_epi16(e, o));
                }
            }
        }
    }
    (count, pairs)
}

#[cfg(not(target_arch = "x86_64"))]
fn interleaved<const W: usize>(
    _: &mut [bf16],
    _: Operand<bf16>,
    _: &Range<usize>,
    _: &Range<usize>,
    _: usize,
) -> (usize, usize) {
    (0, 0)
}

/// Packs the steps that come in groups of 16 or 32, in pairs; returns how many they are.
fn transposed<const W: usize>(
    panel: &mut [bf16],
    from: Operand<bf16>,
    lines: &Range<usize>,
    steps: &Range<usize>,
) -> usize {
    #[cfg(target_arch = "x86_64")]
    if W.is_multiple_of(16) && wide() {
        // SAFETY: the CPU has AVX-512 F.
        return unsafe { avx512::transposed::<W>(panel, from, lines, steps) };
    }
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2.
        return unsafe { transposed_avx2::<W>(panel, from, lines, steps) };
    }
    let _ = (panel, from, lines, steps);
    0
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transposed_avx2<const W: usize>(
    panel: &mut [bf16],
    from: Operand<bf16>,
    lines: &Range<usize>,
    steps: &Range<usize>,
) -> usize {
    use std::arch::x86_64::{
        _mm_storeu_si128, _mm256_castsi256_si128, _mm256_loadu_si256, _mm256_setzero_si256, _mm256_storeu_si256,
    };
    /// Lines of a group, and pairs.
    const EIGHT: usize = 8;
    const { assert!(W.is_multiple_of(4), "a panel is of whole and half groups") };
    let groups = steps.len() / (2 * EIGHT);
    for first in (0..lines.len()).step_by(EIGHT) {
        let count = EIGHT.min(lines.len() - first);
        for group in 0..groups {
            let mut rows = [_mm256_setzero_si256(); EIGHT];
            for (i, row) in rows.iter_mut().enumerate().take(count) {
                let at = (lines.start + first + i) * from.line + steps.start + group * 2 * EIGHT;
                // SAFETY: `pack` asserted that the last line's last step is within the operand; this is before it.
                *row = unsafe { _mm256_loadu_si256(from.values[at..at + 2 * EIGHT].as_ptr().cast()) };
            }
            for (pair, row) in transpose(rows).into_iter().enumerate() {
                let at = ((group * EIGHT + pair) * W + first) * 2;
                // SAFETY: the slices bound what is written: eight pairs, or the four of the panel's last half group.
                unsafe {
                    if first + EIGHT <= W {
                        _mm256_storeu_si256(panel[at..at + 2 * EIGHT].as_mut_ptr().cast(), row);
                    } else {
                        _mm_storeu_si128(panel[at..at + EIGHT].as_mut_ptr().cast(), _mm256_castsi256_si128(row));
                    }
                }
            }
        }
    }
    groups * 2 * EIGHT
}

/// The transpose of 8 x 8 values of 32 bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose(r: [std::arch::x86_64::__m256i; 8]) -> [std::arch::x86_64::__m256i; 8] {
    use std::arch::x86_64::{
        _mm256_permute2x128_si256, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32,
        _mm256_unpacklo_epi64,
    };
    let mut two = r;
    for i in 0..4 {
        two[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        two[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    let mut four = two;
    for half in [0, 4] {
        four[half] = _mm256_unpacklo_epi64(two[half], two[half + 2]);
        four[half + 1] = _mm256_unpackhi_epi64(two[half], two[half + 2]);
        four[half + 2] = _mm256_unpacklo_epi64(two[half + 1], two[half + 3]);
        four[half + 3] = _mm256_unpackhi_epi64(two[half + 1], two[half + 3]);
    }
    let mut eight = four;
    for i in 0..4 {
        eight[i] = _mm256_permute2x128_si256::<0x20>(four[i], four[i + 4]);
        eight[i + 4] = _mm256_permute2x128_si256::<0x31>(four[i], four[i + 4]);
    }
    eight
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        what: &str,
        width: usize,
        unit: usize,
        pack: impl Fn(&mut [bf16], Operand<bf16>, Range<usize>, Range<usize>),
    ) {
        let (long, short) = (700, 60);
        let values: Vec<bf16> = (0..long * short).map(|i| bf16::from_bits(i as u16 % 30_000 + 1)).collect();
        for (line, step) in [(short, 1), (1, long)] {
            let from = Operand { values: &values, line, step };
            let w = width;
            for lines in [0..0, 0..w, 3..3 + w, 5..6, 7..w - 1, 1..5, 2..100, 9..9 + 8 * w, 1..2 + 16 * w, 690..700] {
                for steps in [0..0, 0..1, 2..4, 0..16, 1..18, 4..37, 3..35, 0..60, 59..60] {
                    let size = steps.len().next_multiple_of(unit) * width;
                    let mut packed = vec![bf16::NAN; lines.len().div_ceil(width) * size + 1];
                    pack(&mut packed, from, lines.clone(), steps.clone());
                    assert!(packed.pop().is_some_and(bf16::is_nan), "written beyond the panels");
                    for (at, got) in packed.iter().enumerate() {
                        let (panel, at) = (at / size, at % size);
                        let (place, of_panel) = match what {
                            "tiles" => (at / BLOCK % BLOCK, at / (BLOCK * BLOCK) * BLOCK + at % BLOCK),
                            _ => (at / 2 % width, at / (2 * width) * 2 + at % 2),
                        };
                        let (l, s) = (lines.start + panel * width + place, steps.start + of_panel);
                        let there = l < lines.end && s < steps.end;
                        let want = if there { values[l * line + s * step] } else { bf16::ZERO };
                        assert_eq!(
                            got.to_bits(),
                            want.to_bits(),
                            "{what} of {width} {line} {lines:?} {steps:?} at {at}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_element_comes_to_its_place() {
        for unit in [2, 32] {
            check("pairs", 12, unit, |packed, from, lines, steps| pack_pairs::<12>(packed, from, lines, steps, unit));
            check("pairs", 32, unit, |packed, from, lines, steps| pack_pairs::<32>(packed, from, lines, steps, unit));
        }
        check("tiles", BLOCK, BLOCK, pack_tiles);
    }
}
