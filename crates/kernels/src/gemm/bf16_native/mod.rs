//! bf16 products on AVX512-BF16: `vdpbf16ps` multiplies pairs of bf16 and adds both products to an f32 lane.
//!
//! Blocking after Goto and van de Geijn (2008). The result is dealt to the threads as a grid of rows and columns. A part
//! packs the columns of `b` that it needs next, all of them where they are few, and takes its rows of `a` in blocks that
//! stay in L2; where the inner dimension is long, it goes over it in segments and holds sums. The inner loop keeps a 12 x 32
//! tile in 24 registers; its loads (176 bytes for 24 multiply-adds) come from L2 without stalling, so panels need not fit L1.

mod pack;
mod store;

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use self::pack::{Operand, pack};
use self::store::{Target, add_tile};
use super::{Out, Strides, elements};
use crate::memory::{as_bf16, with_scratch};

/// Rows and columns of a tile.
const MR: usize = 12;
const NR: usize = 32;
/// How much is packed at once.
#[derive(Clone, Copy, Debug)]
struct Blocking {
    /// Elements of the inner dimension between two visits of the result; even.
    depth: usize,
    /// Elements of `a`: they are read again for every panel of `b`, from L2.
    a: usize,
    /// Elements of `b`, if several blocks of `a` meet them.
    b: usize,
    /// Elements of `b` that a single block of `a` meets: the first are still in L2 when the last are packed.
    b_once: usize,
    /// Rows whose sums are held over the segments of a long inner dimension.
    rows: usize,
}

/// 256 KiB of `a`, 2 MiB of `b` (512 KiB if it is used once), sums of at most 2 MiB.
const BLOCKING: Blocking = Blocking { depth: 2048, a: 1 << 17, b: 1 << 20, b_once: 1 << 18, rows: 1020 };

type Tile = [[f32; NR]; MR];

/// `tile = a panel x b panel` with some instruction set; overwrites all of the tile.
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
        if crate::simd::level() >= crate::simd::Level::Avx512
            && (cfg!(tallow_emulated) || std::is_x86_feature_detected!("avx512bf16"))
        {
            return Some(Self(multiply_avx512));
        }
        None
    }
}

pub(super) fn product(
    kernel: Kernel,
    dims: (usize, usize, usize),
    a: (&[bf16], Strides),
    b: (&[bf16], Strides),
    out: Out,
) {
    blocked_product(kernel, BLOCKING, dims, a, b, out);
}

fn blocked_product(
    kernel: Kernel,
    blocking: Blocking,
    (m, n, k): (usize, usize, usize),
    (a, sa): (&[bf16], Strides),
    (b, sb): (&[bf16], Strides),
    out: Out,
) {
    let room = match &out {
        Out::Bf16(c, _) => c.len(),
        Out::F32(c, _) => c.len(),
    };
    assert!(
        a.len() >= sa.reach(m, k) && b.len() >= sb.reach(k, n) && room >= elements(m, n),
        "matrix product: a slice is too short"
    );
    if m == 0 || n == 0 || k == 0 {
        match out {
            Out::Bf16(c, false) => c[..m * n].fill(bf16::ZERO),
            Out::F32(c, false) => c[..m * n].fill(0.0),
            Out::Bf16(_, true) | Out::F32(_, true) => {}
        }
        return;
    }
    let threads = if m.saturating_mul(n).saturating_mul(k) <= super::SERIAL { 1 } else { rayon::current_num_threads() };
    let grid = Grid::new(m, n, threads);
    let task = Task {
        kernel,
        blocking,
        k,
        a: Operand { values: a, line: sa.rows, step: sa.cols },
        b: Operand { values: b, line: sb.cols, step: sb.rows },
        target: Target::new(out, m, n),
    };
    match grid.parts() {
        1 => task.part(0..m, 0..n),
        parts => (0..parts).into_par_iter().for_each(|part| {
            let (rows, cols) = grid.part(part);
            task.part(rows, cols);
        }),
    }
}

/// How a result is dealt: `down` ranges of rows times `across` ranges of columns.
#[derive(Clone, Copy)]
struct Grid {
    m: usize,
    n: usize,
    down: usize,
    across: usize,
}

impl Grid {
    /// The grid whose largest part takes the least time: its tiles, and packing its rows of `a` and columns of `b`, of which
    /// a line is about a fifteenth of a tile.
    fn new(m: usize, n: usize, threads: usize) -> Self {
        let cost = |down: usize| {
            let (tall, wide) = (m.div_ceil(MR).div_ceil(down), n.div_ceil(NR).div_ceil(threads / down));
            15 * tall * wide + tall * MR + wide * NR
        };
        let downs = (1..=threads).filter(|down| threads.is_multiple_of(*down));
        let down = downs.min_by_key(|down| cost(*down)).unwrap_or(1);
        Self { m, n, down, across: threads / down }
    }

    fn parts(self) -> usize {
        self.down * self.across
    }

    /// Part `index`; its ranges may be empty, where there are fewer tiles than threads.
    fn part(self, index: usize) -> (Range<usize>, Range<usize>) {
        let cut = |len: usize, parts: usize, tile: usize, at: usize| {
            let width = len.div_ceil(parts).next_multiple_of(tile);
            len.min(at * width)..len.min((at + 1) * width)
        };
        (cut(self.m, self.down, MR, index / self.across), cut(self.n, self.across, NR, index % self.across))
    }
}

/// `range` in ranges of `step`.
fn blocks(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |at| at..range.end.min(at + step))
}

/// The size of blocks of at most `most` lines (but a tile) that cut `lines` evenly, in whole tiles.
fn even(lines: usize, most: usize, tile: usize) -> usize {
    let most = (most / tile * tile).max(tile);
    lines.div_ceil(lines.div_ceil(most)).next_multiple_of(tile)
}

struct Task<'a> {
    kernel: Kernel,
    blocking: Blocking,
    k: usize,
    a: Operand<'a>,
    b: Operand<'a>,
    target: Target<'a>,
}

impl Task<'_> {
    /// Rows `rows` and columns `cols` of the result.
    fn part(&self, rows: Range<usize>, cols: Range<usize>) {
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        let Blocking { depth, a, b, b_once, rows: most_rows } = self.blocking;
        let several = self.k > depth;
        let depth = depth.min(self.k.next_multiple_of(2));
        let held = if several { even(rows.len(), most_rows, MR) } else { rows.len().next_multiple_of(MR) };
        let height = even(rows.len().min(held), a / depth, MR);
        let width = even(cols.len(), if height >= rows.len() { b_once } else { b } / depth, NR);
        let sums = if several { held * width } else { 0 };
        with_scratch([height * depth / 2, width * depth / 2, sums], |[packed_a, packed_b, sums]| {
            let (packed_a, packed_b) = (as_bf16(packed_a), as_bf16(packed_b));
            for cols in blocks(cols, width) {
                for rows in blocks(rows.clone(), held) {
                    sums.fill(0.0);
                    for steps in blocks(0..self.k, depth) {
                        pack::<NR>(packed_b, self.b, cols.clone(), steps.clone());
                        for block in blocks(rows.clone(), height) {
                            pack::<MR>(packed_a, self.a, block.clone(), steps.clone());
                            let stride = cols.len().next_multiple_of(NR);
                            let sums = sums.get_mut((block.start - rows.start) * stride..).unwrap_or_default();
                            self.block(packed_a, packed_b, sums, (block, cols.clone(), steps.clone()));
                        }
                    }
                }
            }
        });
    }

    /// Everything that a packed block of `a` and one of `b` give.
    fn block(
        &self,
        packed_a: &[bf16],
        packed_b: &[bf16],
        sums: &mut [f32],
        (rows, cols, steps): (Range<usize>, Range<usize>, Range<usize>),
    ) {
        let depth = steps.len().next_multiple_of(2);
        let stride = cols.len().next_multiple_of(NR);
        let level = crate::simd::level();
        let mut tile = [[0f32; NR]; MR];
        for (col, panel_b) in blocks(cols.clone(), NR).zip(packed_b.chunks_exact(depth * NR)) {
            for (row, panel_a) in blocks(rows.clone(), MR).zip(packed_a.chunks_exact(depth * MR)) {
                // SAFETY: there is a kernel only where the CPU has its instructions.
                unsafe { (self.kernel.0)(panel_a, panel_b, &mut tile) };
                let (values, stride) = if sums.is_empty() {
                    (tile.as_flattened(), NR)
                } else {
                    let held = &mut sums[(row.start - rows.start) * stride + (col.start - cols.start)..];
                    add_tile(level, &tile, held, stride);
                    (&*held, stride)
                };
                if steps.end == self.k {
                    // SAFETY: the parts of a grid are disjoint, and so are the tiles of a part.
                    unsafe { self.target.store(values, stride, row, col.clone()) };
                }
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

    /// Blocks so small that most shapes have several of each kind, one that is uneven among them.
    const SMALL: [Blocking; 3] = [
        Blocking { depth: 8, a: 200, b: 600, b_once: 300, rows: 24 },
        Blocking { depth: 64, a: 24 * 64, b: 64 * 64, b_once: 32 * 64, rows: 36 },
        Blocking { depth: 2, a: 1, b: 1, b_once: 1, rows: 1 },
    ];

    /// `(m, n, k)` at, below and above a tile, a pair and a segment.
    const SHAPES: [(usize, usize, usize); 23] = [
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
        (13, 33, 2047),
        (12, 32, 2048),
        (13, 33, 2049),
        (7, 290, 2050),
        (50, 31, 2047),
        (25, 288, 2049),
        (1, 1, 3073),
        (13, 129, 4097),
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
                let blockings = [BLOCKING].into_iter().chain(SMALL);
                for ((name, kernel), blocking) in
                    kernels().into_iter().flat_map(|k| blockings.clone().map(move |b| (k, b)))
                {
                    let what = format!("{name} {layout} {dims:?} {blocking:?}");
                    let (mut rounded, mut set, mut added) =
                        (vec![bf16::NAN; m * n], vec![f32::NAN; m * n], vec![3f32; m * n]);
                    let mut rounded_sum = vec![bf16::from_f32(3.0); m * n];
                    blocked_product(kernel, blocking, dims, a, b, Out::Bf16(&mut rounded, false));
                    blocked_product(kernel, blocking, dims, a, b, Out::Bf16(&mut rounded_sum, true));
                    blocked_product(kernel, blocking, dims, a, b, Out::F32(&mut set, false));
                    blocked_product(kernel, blocking, dims, a, b, Out::F32(&mut added, true));
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
        let dims @ (m, n, k) = (100, 70, 2057);
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

    /// Every element is in one part.
    #[test]
    fn a_grid_deals_every_element_once() {
        for (m, n) in [(1, 1), (1, 50_257), (16, 128), (384, 1024), (2048, 384), (13, 33), (5000, 7)] {
            for threads in [1, 2, 3, 4, 7, 12, 16] {
                let grid = Grid::new(m, n, threads);
                assert_eq!(grid.parts(), threads);
                let (mut rows, mut area) = (vec![0; m], 0);
                for (r, c) in (0..threads).map(|part| grid.part(part)) {
                    area += r.len() * c.len();
                    r.for_each(|row| rows[row] += c.len());
                }
                assert!(area == m * n && rows.iter().all(|cols| *cols == n), "{m} {n} {threads}");
            }
        }
        assert_eq!(Grid::new(1, 50_257, 4).across, 4, "one row is dealt by columns");
        assert_eq!(Grid::new(2048, 32, 4).down, 4);
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
