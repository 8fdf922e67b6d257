//! The curve of a run as it grows. Training losses are kept in memory that does not grow with it; of validations there
//! are few.

use super::Curve;
use crate::metrics::Record;

/// The most points of training loss that are kept: more than a drawing has pixels.
const KEPT: usize = 8192;

/// Collects records into a [`Curve`]. Past 8,192 points, each becomes the mean of twice as many steps.
#[derive(Clone, Debug)]
pub struct CurveHistory {
    curve: Curve,
    /// Steps a point.
    stride: usize,
    /// Sum and number of the losses that are not yet a point, and the last one's step.
    pending: (f64, usize, u64),
}

impl CurveHistory {
    /// Of a run of this title that has done nothing yet.
    pub fn new(title: &str) -> Self {
        Self { curve: Curve { title: title.into(), ..Curve::default() }, stride: 1, pending: (0.0, 0, 0) }
    }

    /// Takes the next record. Steps that were skipped and losses that are not finite are left out.
    pub fn push(&mut self, record: &Record) {
        match record {
            Record::Step(r) if !r.skipped && r.loss.is_finite() => {
                self.pending = (self.pending.0 + r.loss, self.pending.1 + 1, r.step);
                if self.pending.1 == self.stride {
                    self.curve.train.extend(self.pending_point());
                    self.pending = (0.0, 0, 0);
                    self.thin();
                }
            }
            Record::Step(_) => {}
            Record::Eval(r) if !r.valid_loss.is_finite() => {}
            Record::Eval(r) => {
                self.curve.valid.push((r.step, r.valid_loss));
                self.curve.bits_per_byte_per_nat = Some(r.bits_per_byte / r.valid_loss);
            }
        }
    }

    /// Forgets what was recorded past `step`.
    pub fn back_to(&mut self, step: u64) {
        self.curve.train.retain(|p| p.0 <= step);
        self.curve.valid.retain(|p| p.0 <= step);
        if self.pending.2 > step {
            self.pending = (0.0, 0, 0);
        }
    }

    /// The curve of what there is.
    pub fn curve(&self) -> Curve {
        let mut curve = self.curve.clone();
        curve.train.extend(self.pending_point());
        curve
    }

    fn pending_point(&self) -> Option<(u64, f64)> {
        let (sum, count, step) = self.pending;
        (count > 0).then(|| (step, sum / count as f64))
    }

    fn thin(&mut self) {
        if self.curve.train.len() < KEPT {
            return;
        }
        self.curve.train = self.curve.train.chunks(2).map(|p| (p[p.len() - 1].0, mean(p))).collect();
        self.stride *= 2;
    }
}

fn mean(points: &[(u64, f64)]) -> f64 {
    points.iter().map(|p| p.1).sum::<f64>() / points.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalRecord, StepRecord};

    fn step(step: u64, loss: f64) -> Record {
        let (tokens, lr, grad_norm, tokens_per_s, data_wait_s) = (step * 10, 1e-3, 1.0, 100.0, 0.0);
        let (mfu, memory, elapsed_s, skipped) = (None, 0, 0.0, false);
        Record::Step(StepRecord {
            step,
            tokens,
            loss,
            lr,
            grad_norm,
            tokens_per_s,
            data_wait_s,
            mfu,
            memory,
            elapsed_s,
            skipped,
        })
    }

    #[test]
    fn a_short_run_is_kept_step_by_step() {
        let mut history = CurveHistory::new("t");
        for s in 1..=100 {
            history.push(&step(s, s as f64));
        }
        history.push(&step(101, f64::NAN));
        let eval = EvalRecord { step: 100, valid_loss: 2.0, bits_per_byte: 0.8, perplexity: 7.4, tokens: 5 };
        history.push(&Record::Eval(eval));
        let curve = history.curve();
        assert_eq!(curve.train, (1..=100).map(|s| (s, s as f64)).collect::<Vec<_>>());
        assert_eq!((curve.valid.as_slice(), curve.bits_per_byte_per_nat), ([(100, 2.0)].as_slice(), Some(0.4)));
        history.back_to(60);
        assert_eq!((history.curve().train.len(), history.curve().valid.len()), (60, 0));
    }

    #[test]
    fn a_long_run_keeps_its_shape_in_bounded_memory() {
        let mut history = CurveHistory::new("t");
        let steps = 5 * KEPT as u64 + 3;
        for s in 1..=steps {
            history.push(&step(s, s as f64));
        }
        let curve = history.curve();
        assert!(curve.train.len() < KEPT && curve.train.len() > KEPT / 2, "{}", curve.train.len());
        assert_eq!(curve.train.last().map(|p| p.0), Some(steps), "the last step is drawn");
        // Loss = step here, so a point of n steps that ends at s has the mean s - (n - 1) / 2.
        assert!(curve.train.iter().all(|p| (p.0 as f64 - p.1).abs() <= 3.5));
        assert!(curve.train.windows(2).all(|p| p[0].0 < p[1].0));
    }
}
