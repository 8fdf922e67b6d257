//! Products on instructions for bf16: `vdpbf16ps` of AVX512-BF16 multiplies pairs of bf16 and adds both products to an f32
//! lane, `tdpbf16ps` of AMX does so for tiles of 16 x 16 sums (`kernel`), and these are so fast that f32 gains by it as well, in
//! three parts (`parts`).
//!
//! Blocking after Goto and van de Geijn (2008). The result is dealt to the threads as a grid of rows and columns. A part
//! packs the columns of `b` that it needs next, all of them where they are few, and takes its rows of `a` in blocks that
//! stay in L2; where the inner dimension is long, it goes over it in segments and holds sums.

mod kernel;
mod pack;
mod parts;
mod store;

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use self::kernel::Kernel;
use self::pack::Operand;
use self::store::Target;
use super::{Out, Strides, elements};
use crate::memory::{as_bf16, with_scratch};

pub(super) use self::kernel::InBf16;
pub(super) use self::parts::InParts;

/// Columns of a tile.
const NR: usize = 32;
/// How much is packed at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocking {
    /// Elements of the inner dimension between two visits of the result; a multiple of a panel's unit.
    depth: usize,
    /// The same where the steps of a row of `a` lie side by side, and all of them are no more than that.
    depth_once: usize,
    /// Elements of `a`: they are read again for every panel of `b`, from L2.
    a: usize,
    /// Elements of `b`, if several blocks of `a` meet them.
    b: usize,
    /// Elements of `b` that a single block of `a` meets: the first are still in L2 when the last are packed.
    b_once: usize,
    /// Rows whose sums are held over the segments of a long inner dimension.
    rows: usize,
}

/// For pairs: 256 KiB of `a`, 2 MiB of `b` (512 KiB if it is used once), sums of at most 2 MiB.
const PAIRS: Blocking = Blocking { depth: 2048, depth_once: 2048, a: 1 << 17, b: 1 << 20, b_once: 1 << 18, rows: 1020 };

/// For tiles: a panel of `b` of at most 32 KiB, 256 KiB of `a`, 512 KiB of `b`, sums of at most 1 MiB.
const TILES: Blocking = Blocking { depth: 512, depth_once: 1024, a: 1 << 17, b: 1 << 18, b_once: 1 << 18, rows: 512 };

pub(super) fn product<K: Kernel>(
    kernel: K,
    dims: (usize, usize, usize),
    a: (&[K::Item], Strides),
    b: (&[K::Item], Strides),
    out: Out,
) {
    blocked_product(kernel, kernel.blocking(), dims, a, b, out);
}

fn blocked_product<K: Kernel>(
    kernel: K,
    blocking: Blocking,
    (m, n, k): (usize, usize, usize),
    (a, sa): (&[K::Item], Strides),
    (b, sb): (&[K::Item], Strides),
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
    let grid = Grid::new(kernel, (m, n), threads);
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
    /// Rows of a tile.
    tile: usize,
}

impl Grid {
    /// The grid whose largest part takes the least time: its tiles, and packing its rows of `a` and columns of `b`.
    fn new(kernel: impl Kernel, (m, n): (usize, usize), threads: usize) -> Self {
        let tile = kernel.rows();
        let cost = |down: usize| {
            let (tall, wide) = (m.div_ceil(tile).div_ceil(down), n.div_ceil(NR).div_ceil(threads / down));
            kernel.lines_per_tile() * tall * wide + tall * tile + wide * NR
        };
        let downs = (1..=threads).filter(|down| threads.is_multiple_of(*down));
        let down = downs.min_by_key(|down| cost(*down)).unwrap_or(1);
        Self { m, n, down, across: threads / down, tile }
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
        (cut(self.m, self.down, self.tile, index / self.across), cut(self.n, self.across, NR, index % self.across))
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

struct Task<'a, K: Kernel> {
    kernel: K,
    blocking: Blocking,
    k: usize,
    a: Operand<'a, K::Item>,
    b: Operand<'a, K::Item>,
    target: Target<'a>,
}

impl<K: Kernel> Task<'_, K> {
    /// Rows `rows` and columns `cols` of the result.
    fn part(&self, rows: Range<usize>, cols: Range<usize>) {
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        let (kernel, tile_rows) = (self.kernel, self.kernel.rows());
        let Blocking { depth, depth_once, a, b, b_once, rows: most_rows } = self.blocking;
        let depth = if self.a.step == 1 && self.k <= depth_once { self.k } else { depth };
        let depth = even(self.k, depth, kernel.unit());
        let several = self.k > depth;
        let held =
            if several { even(rows.len(), most_rows, tile_rows) } else { rows.len().next_multiple_of(tile_rows) };
        let height = even(rows.len().min(held), a / depth, tile_rows);
        let width = even(cols.len(), if height >= rows.len() { b_once } else { b } / depth, NR);
        // A tile is written and read again at once, or held until the last segment.
        let sums = if several { held * width } else { tile_rows * NR };
        let packed = depth * kernel.parts();
        with_scratch(
            [(height * packed).div_ceil(2), (width * packed).div_ceil(2), sums],
            |[packed_a, packed_b, sums]| {
                let (packed_a, packed_b) = (as_bf16(packed_a), as_bf16(packed_b));
                kernel.ready(|ready| {
                    for cols in blocks(cols, width) {
                        for rows in blocks(rows.clone(), held) {
                            for steps in blocks(0..self.k, depth) {
                                kernel.pack_b(packed_b, self.b, cols.clone(), steps.clone());
                                for block in blocks(rows.clone(), height) {
                                    kernel.pack_a(packed_a, self.a, block.clone(), steps.clone());
                                    let first = if several { (block.start - rows.start) * width } else { 0 };
                                    let place = (block, cols.clone(), steps.clone());
                                    self.block(&ready, packed_a, packed_b, &mut sums[first..], place);
                                }
                            }
                        }
                    }
                });
            },
        );
    }

    /// Everything that a packed block of `a` and one of `b` give. `sums`: a tile, or as many as there are.
    fn block(
        &self,
        ready: &K::Ready,
        packed_a: &[bf16],
        packed_b: &[bf16],
        sums: &mut [f32],
        (rows, cols, steps): (Range<usize>, Range<usize>, Range<usize>),
    ) {
        let depth = steps.len().next_multiple_of(self.kernel.unit()) * self.kernel.parts();
        let tile_rows = self.kernel.rows();
        let tile_len = tile_rows * NR;
        let across = if steps.len() < self.k { cols.len().div_ceil(NR) } else { 0 };
        for (j, col) in blocks(cols, NR).enumerate() {
            let panel_b = &packed_b[j * depth * NR..(j + 1) * depth * NR];
            for (i, row) in blocks(rows.clone(), tile_rows).enumerate() {
                let panel_a = &packed_a[i * depth * tile_rows..(i + 1) * depth * tile_rows];
                let at = if across == 0 { 0 } else { (i * across + j) * tile_len };
                let tile = &mut sums[at..at + tile_len];
                K::multiply(ready, panel_a, panel_b, tile, steps.start == 0);
                if steps.end == self.k {
                    // SAFETY: the parts of a grid are disjoint, and so are the tiles of a part.
                    unsafe { self.target.store(tile, row, col.clone()) };
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::super::{plain, tests::whole, turned};
    use super::kernel::all as kernels;
    use super::*;

    /// Blocks so small that most shapes have several of each kind, one that is uneven among them.
    const SMALL: [Blocking; 3] = [
        Blocking { depth: 8, depth_once: 8, a: 200, b: 600, b_once: 300, rows: 24 },
        Blocking { depth: 64, depth_once: 96, a: 24 * 64, b: 64 * 64, b_once: 32 * 64, rows: 36 },
        Blocking { depth: 2, depth_once: 0, a: 1, b: 1, b_once: 1, rows: 1 },
    ];

    impl Blocking {
        /// With a depth that panels can have.
        fn in_units_of(self, unit: usize) -> Self {
            Self { depth: self.depth.next_multiple_of(unit), ..self }
        }
    }

    /// `(m, n, k)` at, below and above a tile, a pair and a segment.
    const SHAPES: [(usize, usize, usize); 26] = [
        (32, 32, 32),
        (33, 65, 31),
        (47, 95, 545),
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
                let blockings = [PAIRS, TILES].into_iter().chain(SMALL);
                for ((name, kernel), blocking) in
                    kernels().into_iter().flat_map(|k| blockings.clone().map(move |b| (k, b.in_units_of(k.1.unit()))))
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
        for (_, kernel) in kernels() {
            for (m, n) in [(1, 1), (1, 50_257), (16, 128), (384, 1024), (2048, 384), (13, 33), (5000, 7)] {
                for threads in [1, 2, 3, 4, 7, 12, 16] {
                    let grid = Grid::new(kernel, (m, n), threads);
                    assert_eq!(grid.parts(), threads);
                    let (mut rows, mut area) = (vec![0; m], 0);
                    for (r, c) in (0..threads).map(|part| grid.part(part)) {
                        area += r.len() * c.len();
                        r.for_each(|row| rows[row] += c.len());
                    }
                    assert!(area == m * n && rows.iter().all(|cols| *cols == n), "{m} {n} {threads}");
                }
            }
            assert_eq!(Grid::new(kernel, (1, 50_257), 4).across, 4, "one row is dealt by columns");
            assert_eq!(Grid::new(kernel, (2048, 32), 4).down, 4);
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
