//! The largest run that a given memory holds.

use serde::Serialize;
use tallow_adapters::AdapterPlan;
use tallow_models::ModelConfig;
use tallow_nn::{Pack, ParamSpec, plan_params};

use crate::plan::{Held, MemoryPlan, StepShape};

/// The most rows at once that are tried.
const MOST_ROWS: usize = 1 << 16;

/// What fits in a memory, each with all else as the run has it. `None` where not even one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Largest {
    /// Bytes.
    pub memory: u64,
    /// Whether the run fits as it is.
    pub fits: bool,
    /// Rows at once.
    pub micro_batch_size: Option<usize>,
    /// Tokens a row.
    pub context_length: Option<usize>,
    /// Rank of the adapter, in all modules that have no rank of their own; `None` without an adapter as well.
    pub rank: Option<usize>,
    /// Which of them are the most that there can be, whatever the memory.
    pub at_bound: AtBound,
}

/// Which sizes are as large as they can be: more memory would not make them larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AtBound {
    /// More rows are not tried.
    pub micro_batch_size: bool,
    /// The model has no more positions.
    pub context_length: bool,
    /// A matrix of its modules has no higher rank.
    pub rank: bool,
}

/// A run as the search sees it.
pub(crate) struct Fit<'a> {
    pub(crate) config: &'a dyn ModelConfig,
    /// Without an adapter.
    pub(crate) base: &'a [ParamSpec],
    pub(crate) adapter: Option<&'a AdapterPlan>,
    pub(crate) pack: Option<&'a dyn Pack>,
    pub(crate) step: StepShape,
}

impl Fit<'_> {
    /// Searches by halves: memory grows with each of the three.
    pub(crate) fn largest(&self, memory: u64) -> Largest {
        let fits = |held: Option<Held>, step: StepShape| {
            held.is_some_and(|held| MemoryPlan::new(self.config, held, step).total() <= memory)
        };
        let held = self.held(self.adapter);
        let highest = self.adapter.and_then(|plan| {
            let moved = plan.modules().filter(|(_, module)| module.rank == plan.config().rank);
            moved.map(|(_, module)| module.dims.0.min(module.dims.1)).min()
        });
        let rank = self.adapter.zip(highest).and_then(|(plan, most)| {
            largest(most, &|rank| {
                let mut settings = plan.config().clone();
                settings.rank = rank;
                let other = AdapterPlan::new(&settings, self.base).ok();
                fits(other.and_then(|plan| self.held(Some(&plan))), self.step)
            })
        });
        let shape = self.config.shape();
        // A prefix LM sees its whole prompt, so that no row may be longer than its window.
        let window = shape.sliding_window.filter(|_| shape.prefix_lm).unwrap_or(usize::MAX);
        let longest = shape.max_positions.min(window);
        let rows = |rows| fits(held, StepShape { micro_batch_size: rows, ..self.step });
        let context = |tokens| fits(held, StepShape { context_length: tokens, ..self.step });
        let (micro_batch_size, context_length) = (largest(MOST_ROWS, &rows), largest(longest, &context));
        Largest {
            memory,
            fits: fits(held, self.step),
            micro_batch_size,
            context_length,
            rank,
            at_bound: AtBound {
                micro_batch_size: micro_batch_size == Some(MOST_ROWS),
                context_length: context_length == Some(longest),
                rank: rank.is_some() && rank == highest,
            },
        }
    }

    fn held(&self, adapter: Option<&AdapterPlan>) -> Option<Held> {
        let Some(plan) = adapter else { return Some(Held::trained(self.base)) };
        let (_, specs) = plan_params(|b| plan.build(b, |b| self.config.build(b))).ok()?;
        Held::adapted(plan, &specs, self.config.shape().num_layers, self.pack).ok()
    }
}

/// The largest of `1..=most` that fits, where all below one that fits do.
fn largest(most: usize, fits: &dyn Fn(usize) -> bool) -> Option<usize> {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        match fits(middle) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    (low > 0).then_some(low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_is_found_by_halves() {
        for (most, limit) in [(1, 1), (10, 10), (10, 7), (1 << 16, 12_345), (3, 2)] {
            assert_eq!(largest(most, &|n| n <= limit), Some(limit), "{most} {limit}");
        }
        assert_eq!(largest(10, &|_| false), None);
        assert_eq!(largest(10, &|n| n <= 99), Some(10));
        assert_eq!(largest(0, &|_| true), None);
    }
}
