//! OLoRA (Büyükakyüz 2024): an adapter that starts within its matrix instead of at zero.
//!
//! The paper, and PEFT, take the start away from the base: `W - s B0 A0` is kept and `W` is lost to whoever has only the
//! adapter. Here the base stays as it is, packed or not, and the start stands beside it as a second, frozen pair with the
//! factor `-s`: the same sum, and the model begins as it was. Files hold both pairs as one adapter of twice the rank.

use half::bf16;
use rayon::prelude::*;

/// Columns of a matrix that one task takes.
const TASK: usize = 128;

/// Where the two matrices of a module start.
pub(crate) struct Start {
    /// `A [r, in]`.
    pub(crate) a: Vec<f32>,
    /// `B [out, r]`.
    pub(crate) b: Vec<f32>,
}

impl Start {
    /// Of `weight [out, in] = Q R`: `B`, the first `rank` columns of `Q`, and `A = B^T W`, the first rows of `R`, in f64. The
    /// result does not depend on the number of threads. `rank` is at most the smaller side.
    pub(crate) fn olora(weight: &[f32], (d_out, d_in): (usize, usize), rank: usize) -> Self {
        let q = orthonormal(weight, (d_out, d_in), rank);
        let mut a = vec![0f32; rank * d_in];
        let tasks: Vec<(usize, Vec<f64>)> = (0..d_in)
            .into_par_iter()
            .step_by(TASK)
            .map(|first| {
                let len = TASK.min(d_in - first);
                let mut sums = vec![0f64; rank * len];
                for (row, q) in weight.chunks_exact(d_in).zip(q.chunks_exact(rank)) {
                    for (sums, q) in sums.chunks_exact_mut(len).zip(q) {
                        sums.iter_mut().zip(&row[first..first + len]).for_each(|(sum, w)| *sum += q * f64::from(*w));
                    }
                }
                (first, sums)
            })
            .collect();
        for (first, sums) in tasks {
            let len = sums.len() / rank;
            for (a, sums) in a.chunks_exact_mut(d_in).zip(sums.chunks_exact(len)) {
                a[first..first + len].iter_mut().zip(sums).for_each(|(a, sum)| *a = *sum as f32);
            }
        }
        Self { a, b: q.into_iter().map(|x| x as f32).collect() }
    }

    /// Rounded to what bf16 holds: what is trained and what is taken away must start as the same numbers.
    pub(crate) fn in_bf16(mut self) -> Self {
        let round = |x: &mut f32| *x = bf16::from_f32(*x).to_f32();
        self.a.iter_mut().for_each(round);
        self.b.iter_mut().for_each(round);
        self
    }
}

/// The first `rank` columns of the `Q` of `weight [out, in]`, `[out, rank]`, by reflections (Householder), which stay orthonormal
/// where columns depend on each other.
fn orthonormal(weight: &[f32], (d_out, d_in): (usize, usize), rank: usize) -> Vec<f64> {
    let mut columns: Vec<Vec<f64>> =
        (0..rank).map(|k| (0..d_out).map(|o| f64::from(weight[o * d_in + k])).collect()).collect();
    // Of each reflection `1 - v v^T`, `|v|^2 = 2`, what lies at and below the diagonal.
    let mut reflections: Vec<Vec<f64>> = vec![];
    for k in 0..rank {
        let mut v = columns[k][k..].to_vec();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        v[0] += norm.copysign(v[0]);
        let length = v.iter().map(|x| x * x).sum::<f64>();
        let factor = if length > 0.0 { (2.0 / length).sqrt() } else { 0.0 };
        v.iter_mut().for_each(|x| *x *= factor);
        columns[k + 1..].iter_mut().for_each(|column| reflect(&v, &mut column[k..]));
        reflections.push(v);
    }
    let mut q = vec![0f64; d_out * rank];
    for j in 0..rank {
        let mut column = vec![0f64; d_out];
        column[j] = 1.0;
        for (k, v) in reflections.iter().enumerate().rev() {
            reflect(v, &mut column[k..]);
        }
        column.into_iter().enumerate().for_each(|(o, x)| q[o * rank + j] = x);
    }
    q
}

fn reflect(v: &[f64], x: &mut [f64]) {
    let along: f64 = v.iter().zip(&*x).map(|(v, x)| v * x).sum();
    x.iter_mut().zip(v).for_each(|(x, v)| *x -= along * v);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize) -> Vec<f32> {
        let mut values = vec![0f32; rows * columns];
        tallow_ops::fill_normal(&mut values, 5, 7, 1.0);
        values
    }

    #[test]
    fn columns_are_orthonormal_and_span_those_of_the_matrix() {
        for (d_out, d_in, rank) in [(9, 300, 4), (40, 7, 7), (3, 5, 3), (1, 4, 1)] {
            let w = matrix(d_out, d_in);
            let Start { a, b } = Start::olora(&w, (d_out, d_in), rank);
            let at = |o: usize, j: usize| f64::from(b[o * rank + j]);
            for i in 0..rank {
                for j in 0..rank {
                    let dot: f64 = (0..d_out).map(|o| at(o, i) * at(o, j)).sum();
                    assert!((dot - f64::from(u8::from(i == j))).abs() < 1e-6, "{i} {j}: {dot}");
                }
            }
            // B A leaves the first `rank` columns as they are: they lie within the span.
            for o in 0..d_out {
                for i in 0..rank.min(d_in) {
                    let product: f64 = (0..rank).map(|j| at(o, j) * f64::from(a[j * d_in + i])).sum();
                    assert!((product - f64::from(w[o * d_in + i])).abs() < 1e-5, "{o} {i}");
                }
            }
        }
    }

    #[test]
    fn columns_that_depend_on_each_other_are_no_trouble() {
        let mut w = matrix(6, 8);
        w.chunks_exact_mut(8).for_each(|row| (row[1], row[2]) = (row[0], 0.0));
        for w in [w, vec![0.0; 48]] {
            let Start { a, b } = Start::olora(&w, (6, 8), 4);
            assert!(a.iter().chain(&b).all(|x| x.is_finite()));
            let norms: Vec<f32> = (0..4).map(|j| b.iter().skip(j).step_by(4).map(|x| x * x).sum()).collect();
            assert!(norms.iter().all(|norm| (norm - 1.0).abs() < 1e-5), "{norms:?}");
        }
    }
}
