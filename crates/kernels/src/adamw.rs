//! One fused pass of AdamW over flat f32 slices.

use half::bf16;
use rayon::prelude::*;

use crate::lanes::simd_fn;
use crate::simd::Level;

/// Elements a task takes.
const CHUNK: usize = 16 * 1024;

/// Hyper-parameters of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWParams {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u64,
    /// Multiplies the gradient (clipping).
    pub grad_scale: f64,
}

/// What a step does to one element, in f32.
#[derive(Clone, Copy)]
struct Factors {
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    /// `lr / (1 - beta1^t)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    correction: f32,
    eps: f32,
    /// `1 - lr * weight_decay`.
    keep: f32,
    scale: f32,
}

impl Factors {
    fn new(p: &AdamWParams) -> Self {
        let t = p.step.max(1) as f64;
        Self {
            beta1: p.beta1 as f32,
            rest1: (1.0 - p.beta1) as f32,
            beta2: p.beta2 as f32,
            rest2: (1.0 - p.beta2) as f32,
            rate: (p.lr / (1.0 - p.beta1.powf(t))) as f32,
            correction: (1.0 / (1.0 - p.beta2.powf(t)).sqrt()) as f32,
            eps: p.eps as f32,
            keep: (1.0 - p.lr * p.weight_decay) as f32,
            scale: p.grad_scale as f32,
        }
    }
}

simd_fn! {
    fn chunk(s, f: Factors, w: &mut [f32], g: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        // `s` only chooses the instruction set here: the loop is elementwise and is vectorised by the compiler.
        let _ = s;
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let grad = *g * f.scale;
            *m = f.beta1 * *m + f.rest1 * grad;
            *v = f.beta2 * *v + f.rest2 * grad * grad;
            *w = f.keep * *w - f.rate * *m / (v.sqrt() * f.correction + f.eps);
            *g = 0.0;
        }
    }
}

/// One step, as PyTorch's `AdamW` defines it, over slices of one length:
///
/// `w *= 1 - lr wd; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)`
///
/// with `g` the gradient times `grad_scale`; the gradient is set to zero, and `compute`, where given, to `w` rounded to
/// bf16.
pub fn adamw(
    level: Level,
    params: &AdamWParams,
    w: &mut [f32],
    g: &mut [f32],
    m: &mut [f32],
    v: &mut [f32],
    compute: Option<&mut [bf16]>,
) {
    let (f, len) = (Factors::new(params), w.len());
    assert!(g.len() == w.len() && m.len() == w.len() && v.len() == w.len(), "adamw: slices of different lengths");
    let chunks = w.par_chunks_mut(CHUNK).zip(g.par_chunks_mut(CHUNK));
    let chunks = chunks.zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)));
    match compute {
        None => chunks.for_each(|((w, g), (m, v))| chunk(level, f, w, g, m, v)),
        Some(compute) => {
            assert_eq!(compute.len(), len, "adamw: the compute copy has another length");
            chunks.zip(compute.par_chunks_mut(CHUNK)).for_each(|(((w, g), (m, v)), c)| {
                chunk(level, f, w, g, m, v);
                crate::reduce::round_chunk(level, w, c);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_steps_match_the_formula_in_f64() {
        for level in [Level::Scalar, Level::Avx2, Level::Avx512] {
            let n = 37;
            let start: Vec<f32> = (0..n).map(|i| (i as f32 - 18.0) / 7.0).collect();
            let (mut w, mut m, mut v) = (start.clone(), vec![0f32; n], vec![0f32; n]);
            let mut compute = vec![bf16::ZERO; n];
            let mut exact: Vec<(f64, f64, f64)> = start.iter().map(|&w| (f64::from(w), 0.0, 0.0)).collect();
            for step in 1..=3u64 {
                let params = AdamWParams {
                    lr: 0.01,
                    beta1: 0.9,
                    beta2: 0.95,
                    eps: 1e-8,
                    weight_decay: 0.1,
                    step,
                    grad_scale: 0.5,
                };
                let grad: Vec<f32> = (0..n).map(|i| ((i * 13 + step as usize * 7) % 11) as f32 - 5.0).collect();
                let mut g = grad.clone();
                adamw(level, &params, &mut w, &mut g, &mut m, &mut v, Some(&mut compute));
                assert!(g.iter().all(|g| *g == 0.0));
                for (e, g) in exact.iter_mut().zip(&grad) {
                    let g = f64::from(*g) * 0.5;
                    *e = (e.0 * (1.0 - 0.001), 0.9 * e.1 + 0.1 * g, 0.95 * e.2 + 0.05 * g * g);
                    let t = step as i32;
                    let (m, v) = (e.1 / (1.0 - 0.9f64.powi(t)), e.2 / (1.0 - 0.95f64.powi(t)));
                    e.0 -= 0.01 * m / (v.sqrt() + 1e-8);
                }
            }
            for ((w, e), c) in w.iter().zip(&exact).zip(&compute) {
                assert!((f64::from(*w) - e.0).abs() < 1e-6, "{level:?}: {w} {}", e.0);
                assert_eq!(*c, bf16::from_f32(*w));
            }
        }
    }
}
