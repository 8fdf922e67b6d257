//! bf16 products on AVX512-BF16: `vdpbf16ps` multiplies pairs of bf16 and adds both products to an f32 lane.
//!
//! Blocking after Goto and van de Geijn (2008). Rows of the result are dealt to the threads; each packs its rows of `a`
//! once, in panels of 12 rows with the two elements of a pair together, then takes the columns 32 at a time in blocks of
//! `NC`, whose part of `b` it packs likewise. The inner loop keeps a 12 x 32 tile in 24 registers; its loads (176 bytes for
//! 24 multiply-adds) come from L2 without stalling, so `KC` need not fit L1.

use half::bf16;
use rayon::prelude::*;

use super::{Out, Strides};

/// Rows and columns of a tile.
const MR: usize = 12;
const NR: usize = 32;
/// Elements of the inner dimension between two visits of the result; even.
const KC: usize = 1024;
/// Columns whose packed part of `b` is in use at once: 256 x 1024 x 2 bytes, half of a 1 MiB L2.
const NC: usize = 256;

type Tile = [[f32; NR]; MR];

/// `tile = a panel x b panel` with some instruction set.
///
/// # Safety
/// The CPU has that instruction set.
type Multiply = unsafe fn(&[bf16], &[bf16], &mut Tile);

/// How tiles are multiplied; to have one is the proof that this CPU can.
#[derive(Clone, Copy)]
pub(super) struct Kernel(Multiply);

impl Kernel {
    /// `Some` if this CPU has the instructions and `TALLOW_SIMD` does not forbid them.
    pub(super) fn native() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if crate::simd::level() >= crate::simd::Level::Avx512 && std::is_x86_feature_detected!("avx512bf16") {
            return Some(Self(multiply_avx512));
        }
        None
    }
}

/// Rows of the result that one task owns.
enum Rows<'a> {
    Bf16(&'a mut [bf16], bool),
    F32(&'a mut [f32], bool),
}

pub(super) fn product(
    kernel: Kernel,
    (m, n, k): (usize, usize, usize),
    a: (&[bf16], Strides),
    b: (&[bf16], Strides),
    out: Out,
) {
    assert!(a.0.len() >= m * k && b.0.len() >= k * n, "matrix product: a slice is too short");
    if m == 0 || n == 0 || k == 0 {
        match out {
            Out::Bf16(c, false) => c[..m * n].fill(bf16::ZERO),
            Out::F32(c, false) => c[..m * n].fill(0.0),
            Out::Bf16(_, true) | Out::F32(_, true) => {}
        }
        return;
    }
    let threads = if m * n * k <= super::SERIAL { 1 } else { rayon::current_num_threads() };
    let rows = m.div_ceil(threads).next_multiple_of(MR);
    let task =
        |index: usize, out: Rows| rows_product(kernel, index * rows, (m.min((index + 1) * rows), n, k), a, b, out);
    match out {
        Out::Bf16(c, add) => {
            c[..m * n].par_chunks_mut(rows * n).enumerate().for_each(|(i, c)| task(i, Rows::Bf16(c, add)));
        }
        Out::F32(c, add) => {
            c[..m * n].par_chunks_mut(rows * n).enumerate().for_each(|(i, c)| task(i, Rows::F32(c, add)));
        }
    }
}

/// Rows `start..end` of the result.
fn rows_product(
    kernel: Kernel,
    start: usize,
    (end, n, k): (usize, usize, usize),
    (a, sa): (&[bf16], Strides),
    (b, sb): (&[bf16], Strides),
    mut out: Rows,
) {
    let panels = (end - start).div_ceil(MR);
    let pairs = k.div_ceil(2);
    // Panel p holds rows start + 12 p.. as [pair][row][2].
    let mut packed_a = vec![bf16::ZERO; panels * pairs * 2 * MR];
    for (p, panel) in packed_a.chunks_exact_mut(pairs * 2 * MR).enumerate() {
        let first = start + p * MR;
        pack::<MR>(panel, a, (sa.rows, sa.cols), (first, end.min(first + MR)), (0, k));
    }
    let block = NC.min(n.next_multiple_of(NR));
    let mut packed_b = vec![bf16::ZERO; block * KC.min(2 * pairs)];
    let several = k > KC;
    let mut sums = vec![0f32; if several { panels * MR * block } else { 0 }];
    for col in (0..n).step_by(NC) {
        let cols = NC.min(n - col);
        sums.fill(0.0);
        let mut at = 0;
        loop {
            let depth = KC.min(k - at);
            let depth_pairs = depth.div_ceil(2);
            for (p, panel) in packed_b.chunks_exact_mut(depth_pairs * 2 * NR).enumerate().take(cols.div_ceil(NR)) {
                let first = col + p * NR;
                pack::<NR>(panel, b, (sb.cols, sb.rows), (first, (col + cols).min(first + NR)), (at, at + depth));
            }
            let last = at + depth == k;
            for pb in 0..cols.div_ceil(NR) {
                let b_panel = &packed_b[pb * depth_pairs * 2 * NR..][..depth_pairs * 2 * NR];
                for pa in 0..panels {
                    let a_panel = &packed_a[(pa * pairs + at / 2) * 2 * MR..][..depth_pairs * 2 * MR];
                    let mut tile = [[0f32; NR]; MR];
                    // SAFETY: there is a kernel only where the CPU has its instructions.
                    unsafe { (kernel.0)(a_panel, b_panel, &mut tile) };
                    let place = Place { row: pa * MR, col: pb * NR };
                    if several {
                        add_tile(&tile, place, block, &mut sums);
                    }
                    if last {
                        let height = MR.min(end - start - place.row);
                        let width = NR.min(cols - place.col);
                        let held = several.then_some((&sums[..], block));
                        store_tile(&tile, held, place, (height, width), (col, n), &mut out);
                    }
                }
            }
            at += depth;
            if last {
                break;
            }
        }
    }
}

/// First row and column of a tile within a task's rows and a block's columns.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    col: usize,
}

fn add_tile(tile: &Tile, place: Place, width: usize, sums: &mut [f32]) {
    for (r, row) in tile.iter().enumerate() {
        let sums = &mut sums[(place.row + r) * width + place.col..][..NR];
        sums.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
}

/// Writes a finished tile: its own values, or the sums held for it.
fn store_tile(
    tile: &Tile,
    held: Option<(&[f32], usize)>,
    place: Place,
    (height, width): (usize, usize),
    (col, n): (usize, usize),
    out: &mut Rows,
) {
    for r in 0..height {
        let values = match held {
            Some((sums, block)) => &sums[(place.row + r) * block + place.col..][..width],
            None => &tile[r][..width],
        };
        let at = (place.row + r) * n + col + place.col;
        match out {
            Rows::Bf16(c, true) => {
                c[at..at + width].iter_mut().zip(values).for_each(|(c, &x)| *c = bf16::from_f32(c.to_f32() + x));
            }
            Rows::Bf16(c, false) => {
                c[at..at + width].iter_mut().zip(values).for_each(|(c, &x)| *c = bf16::from_f32(x));
            }
            Rows::F32(c, true) => c[at..at + width].iter_mut().zip(values).for_each(|(c, x)| *c += x),
            Rows::F32(c, false) => c[at..at + width].copy_from_slice(values),
        }
    }
}

/// Packs `W` lines (rows of `a`, columns of `b`) `lines.0..lines.1` over the depth `from..to` as `[pair][line][2]`, with
/// zeros where there is no line or no second element.
fn pack<const W: usize>(
    panel: &mut [bf16],
    source: &[bf16],
    (line_stride, depth_stride): (usize, usize),
    lines: (usize, usize),
    (from, to): (usize, usize),
) {
    let count = lines.1 - lines.0;
    if count < W || (to - from) % 2 == 1 {
        panel.fill(bf16::ZERO);
    }
    if depth_stride == 1 {
        // Lines are contiguous: read each once, in order.
        for line in 0..count {
            let values = &source[(lines.0 + line) * line_stride + from..][..to - from];
            for (pair, two) in values.chunks(2).enumerate() {
                let to = &mut panel[(pair * W + line) * 2..][..two.len()];
                to.copy_from_slice(two);
            }
        }
    } else {
        for pair in 0..(to - from).div_ceil(2) {
            let at = from + 2 * pair;
            let even = &source[at * depth_stride + lines.0 * line_stride..][..count];
            let out = &mut panel[pair * 2 * W..][..2 * count];
            if at + 1 < to {
                let odd = &source[(at + 1) * depth_stride + lines.0 * line_stride..][..count];
                for ((two, &e), &o) in out.as_chunks_mut::<2>().0.iter_mut().zip(even).zip(odd) {
                    *two = [e, o];
                }
            } else {
                out.as_chunks_mut::<2>().0.iter_mut().zip(even).for_each(|(two, &e)| two[0] = e);
            }
        }
    }
}

/// `tile = a panel x b panel`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn multiply_avx512(a: &[bf16], b: &[bf16], tile: &mut Tile) {
    use std::arch::x86_64::{
        __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps,
        _mm512_storeu_ps,
    };
    let pairs = b.len() / (2 * NR);
    assert!(a.len() >= pairs * 2 * MR);
    let mut sums = [[_mm512_setzero_ps(); 2]; MR];
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
    for (row, values) in tile.iter_mut().zip(sums) {
        let [left, right]: [__m512; 2] = values;
        // SAFETY: a row of the tile holds two vectors.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), left);
            _mm512_storeu_ps(row.as_mut_ptr().add(16), right);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::super::{plain, tests::whole, turned};
    use super::*;

    /// The tile product without the instruction, so that packing and blocking are tested on every CPU.
    fn multiply_scalar(a: &[bf16], b: &[bf16], tile: &mut Tile) {
        let pairs = b.len() / (2 * NR);
        assert!(b.len() == pairs * 2 * NR && a.len() == pairs * 2 * MR);
        *tile = [[0.0; NR]; MR];
        for (a, b) in a.chunks_exact(2 * MR).zip(b.chunks_exact(2 * NR)) {
            for (row, a) in tile.iter_mut().zip(a.as_chunks::<2>().0) {
                for (sum, b) in row.iter_mut().zip(b.as_chunks::<2>().0) {
                    *sum += a[0].to_f32() * b[0].to_f32() + a[1].to_f32() * b[1].to_f32();
                }
            }
        }
    }

    fn kernels() -> Vec<(&'static str, Kernel)> {
        let native = Kernel::native().map(|kernel| ("native", kernel));
        [("emulated", Kernel(multiply_scalar))].into_iter().chain(native).collect()
    }

    /// `(m, n, k)` at, below and above a tile, a block of columns, a pair and `KC`.
    const SHAPES: [(usize, usize, usize); 22] = [
        (1, 1, 1),
        (1, 33, 2),
        (2, 1, 3),
        (1, 300, 7),
        (11, 31, 5),
        (12, 32, 4),
        (13, 33, 3),
        (25, 64, 1),
        (60, 255, 9),
        (61, 256, 8),
        (37, 257, 11),
        (24, 289, 17),
        (5, 513, 64),
        (150, 40, 33),
        (1, 1, 1023),
        (13, 33, 1023),
        (12, 32, 1024),
        (13, 33, 1025),
        (7, 290, 1026),
        (50, 31, 2047),
        (25, 288, 2049),
        (1, 1, 3073),
    ];

    /// `a b` in f64 by the definition of strides.
    fn exact((m, n, k): (usize, usize, usize), (a, sa): (&[bf16], Strides), (b, sb): (&[bf16], Strides)) -> Vec<f64> {
        let mut c = vec![0f64; m * n];
        for i in 0..m {
            for p in 0..k {
                let x = a[i * sa.rows + p * sa.cols].to_f64();
                c[i * n..][..n].iter_mut().enumerate().for_each(|(j, c)| {
                    *c += x * b[p * sb.rows + j * sb.cols].to_f64();
                });
            }
        }
        c
    }

    #[test]
    fn every_edge_matches_f64() {
        for dims @ (m, n, k) in SHAPES {
            let (a, b) = (whole(m * k, 1), whole(k * n, 2));
            for (layout, sa, sb) in
                [("nt", plain(k), turned(k)), ("nn", plain(k), plain(n)), ("tn", turned(m), plain(n))]
            {
                let (a, b) = ((&a[..], sa), (&b[..], sb));
                let want = exact(dims, a, b);
                for (name, kernel) in kernels() {
                    let what = format!("{name} {layout} {dims:?}");
                    let (mut rounded, mut set, mut added) =
                        (vec![bf16::NAN; m * n], vec![f32::NAN; m * n], vec![3f32; m * n]);
                    let mut rounded_sum = vec![bf16::from_f32(3.0); m * n];
                    product(kernel, dims, a, b, Out::Bf16(&mut rounded, false));
                    product(kernel, dims, a, b, Out::Bf16(&mut rounded_sum, true));
                    product(kernel, dims, a, b, Out::F32(&mut set, false));
                    product(kernel, dims, a, b, Out::F32(&mut added, true));
                    for (i, want) in want.iter().enumerate() {
                        assert_eq!(f64::from(set[i]), *want, "{what} at {i}");
                        assert_eq!(f64::from(added[i]), want + 3.0, "{what} added at {i}");
                        assert_eq!(rounded[i], bf16::from_f64(*want), "{what} rounded at {i}");
                        assert_eq!(rounded_sum[i], bf16::from_f64(want + 3.0), "{what} added and rounded at {i}");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let dims @ (m, n, k) = (100, 70, 1031);
        let values = |len: usize| -> Vec<bf16> { (0..len).map(|i| bf16::from_f32((i as f32).sin())).collect() };
        let (a, b) = (values(m * k), values(k * n));
        for (name, kernel) in kernels() {
            let on = |threads| {
                let mut c = vec![0f32; m * n];
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| product(kernel, dims, (&a, plain(k)), (&b, turned(k)), Out::F32(&mut c, false)));
                c
            };
            let one = on(1);
            assert!([2, 3, 7, 16].into_iter().all(|threads| on(threads) == one), "{name}");
        }
    }

    /// What is not finite stays in its row and column: the zeros that fill up tiles and pairs meet no operand.
    #[test]
    fn infinity_reaches_its_own_row_and_column_only() {
        let dims @ (m, n, k) = (13, 33, 5);
        let (mut a, mut b) = (whole(m * k, 1), whole(k * n, 2));
        a[12 * k + 4] = bf16::INFINITY;
        b[4 * n + 32] = bf16::NAN;
        for (name, kernel) in kernels() {
            let mut c = vec![0f32; m * n];
            product(kernel, dims, (&a, plain(k)), (&b, plain(n)), Out::F32(&mut c, false));
            for (at, x) in c.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                let (row, nan) = (i == 12, j == 32);
                assert!(if nan { x.is_nan() } else { row || x.is_finite() }, "{name} {i} {j} {x}");
            }
        }
    }

    #[test]
    fn an_empty_inner_dimension_gives_zeros() {
        for (_, kernel) in kernels() {
            let (mut set, mut added) = (vec![f32::NAN; 6], vec![3f32; 6]);
            product(kernel, (2, 3, 0), (&[], plain(0)), (&[], turned(0)), Out::F32(&mut set, false));
            product(kernel, (2, 3, 0), (&[], plain(0)), (&[], turned(0)), Out::F32(&mut added, true));
            assert!(set.iter().all(|x| *x == 0.0) && added.iter().all(|x| *x == 3.0));
        }
    }
}
