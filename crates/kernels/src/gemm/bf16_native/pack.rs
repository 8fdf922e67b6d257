//! Packing operands for the tile product: the two elements of a pair of the inner dimension side by side, then the lines
//! of a panel, `[pair][line][2]`.
//!
//! A product of a layer is small enough for its packing to show: at 500 GFLOP/s a thread an element of `b` meets all rows
//! of `a` in a few nanoseconds. So both layouts move whole vectors: contiguous lines by transposing 8 x 8 pairs in
//! registers, lines of a transposed operand by interleaving two rows.

use std::ops::Range;

use half::bf16;

/// An operand, as its panels see it: the lines (rows of `a`, columns of `b`) and the inner dimension.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub(super) values: &'a [bf16],
    /// Elements from one line to the next.
    pub(super) line: usize,
    /// Elements from one step of the inner dimension to the next; this or `line` is 1.
    pub(super) step: usize,
}

/// Panels of interleaved lines that are packed side by side, so that each row of the operand is read in long pieces.
const ABREAST: usize = 8;

/// Packs the lines `lines` over the steps `steps` into panels of `W` lines, with zeros where there is no line, or no second
/// step of the last pair. A panel has `2 W` elements a pair; what `packed` has behind the last panel stays.
pub(super) fn pack<const W: usize>(packed: &mut [bf16], from: Operand, lines: Range<usize>, steps: Range<usize>) {
    if steps.is_empty() || lines.is_empty() {
        return;
    }
    let last = (lines.end - 1) * from.line + (steps.end - 1) * from.step;
    assert!((from.line == 1 || from.step == 1) && last < from.values.len(), "panels beyond their operand");
    let size = steps.len().div_ceil(2) * 2 * W;
    let packed = &mut packed[..lines.len().div_ceil(W) * size];
    let abreast = if from.step == 1 { 1 } else { ABREAST };
    for (panels, first) in packed.chunks_mut(abreast * size).zip(lines.clone().step_by(abreast * W)) {
        let lines = first..lines.end.min(first + abreast * W);
        if lines.len() * size < panels.len() * W {
            panels.fill(bf16::ZERO);
        }
        if steps.len() % 2 == 1 {
            panels.chunks_exact_mut(size).for_each(|panel| panel[size - 2 * W..].fill(bf16::ZERO));
        }
        if from.step == 1 {
            turn::<W>(panels, from, lines, &steps)
        } else {
            interleave::<W>(panels, from, lines, &steps)
        }
    }
}

/// The steps of a line lie side by side: pairs are turned into columns, one panel.
fn turn<const W: usize>(panel: &mut [bf16], from: Operand, lines: Range<usize>, steps: &Range<usize>) {
    let whole = transposed::<W>(panel, from, &lines, steps);
    // What does not fill eight pairs, and everything where there are no such registers.
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

/// Neighbouring lines lie side by side: two steps make a row of pairs, in several panels.
fn interleave<const W: usize>(panels: &mut [bf16], from: Operand, lines: Range<usize>, steps: &Range<usize>) {
    let (whole_panels, whole_pairs) = interleaved::<W>(panels, from, &lines, steps);
    let pairs = steps.len().div_ceil(2);
    for (at, panel) in panels.chunks_exact_mut(pairs * 2 * W).enumerate() {
        let lines = lines.start + at * W..lines.end.min(lines.start + (at + 1) * W);
        let done = if at < whole_panels { whole_pairs } else { 0 };
        for (pair, out) in panel.as_chunks_mut::<2>().0.chunks_exact_mut(W).enumerate().skip(done) {
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
    from: Operand,
    lines: &Range<usize>,
    steps: &Range<usize>,
) -> (usize, usize) {
    use std::arch::x86_64::{
        __m128i, _mm_loadl_epi64, _mm_loadu_si128, _mm_storeu_si128, _mm_unpackhi_epi16, _mm_unpacklo_epi16,
    };
    const { assert!(W.is_multiple_of(4), "a row of a panel is of whole and half vectors") };
    let (count, pairs) = (lines.len() / W, steps.len() / 2);
    let size = steps.len().div_ceil(2) * 2 * W;
    assert!(count * size <= panels.len());
    if count == 0 || pairs == 0 {
        return (count, pairs);
    }
    assert!((steps.end - 1) * from.step + lines.start + count * W <= from.values.len());
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
fn interleaved<const W: usize>(_: &mut [bf16], _: Operand, _: &Range<usize>, _: &Range<usize>) -> (usize, usize) {
    (0, 0)
}

/// Packs the steps that come in groups of 16, eight pairs; returns how many they are.
fn transposed<const W: usize>(panel: &mut [bf16], from: Operand, lines: &Range<usize>, steps: &Range<usize>) -> usize {
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
    from: Operand,
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

    fn check<const W: usize>() {
        let (long, short) = (700, 60);
        let values: Vec<bf16> = (0..long * short).map(|i| bf16::from_bits(i as u16 % 30_000 + 1)).collect();
        for (line, step) in [(short, 1), (1, long)] {
            let from = Operand { values: &values, line, step };
            for lines in [0..0, 0..W, 3..3 + W, 5..6, 7..W - 1, 1..5, 2..100, 9..9 + 8 * W, 1..2 + 16 * W, 690..700] {
                for steps in [0..0, 0..1, 2..4, 0..16, 1..18, 4..37, 0..60, 59..60] {
                    let size = steps.len().div_ceil(2) * 2 * W;
                    let mut packed = vec![bf16::NAN; lines.len().div_ceil(W) * size + 1];
                    pack::<W>(&mut packed, from, lines.clone(), steps.clone());
                    assert!(packed.pop().is_some_and(bf16::is_nan), "written beyond the panels");
                    for (at, got) in packed.iter().enumerate() {
                        let (panel, pair, place, second) = (at / size, at % size / (2 * W), at / 2 % W, at % 2);
                        let (l, s) = (lines.start + panel * W + place, steps.start + 2 * pair + second);
                        let there = l < lines.end && s < steps.end;
                        let want = if there { values[l * line + s * step] } else { bf16::ZERO };
                        assert_eq!(got.to_bits(), want.to_bits(), "{W} {line} {lines:?} {steps:?} at {at}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_element_comes_to_its_place() {
        check::<12>();
        check::<32>();
    }
}
