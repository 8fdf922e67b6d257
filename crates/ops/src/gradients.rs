//! How an op hands over its gradients, whichever tape it was recorded on.

use candle_core::{Device, Result, Shape, Tensor, bail};
use tallow_kernels::memory::unspecified;
use tallow_kernels::{elementwise, simd};

use crate::Weight;
use crate::operand::{Scalar, mutate, view, with_dtype};
use crate::trace::{self, Cost};

/// A backward that does not depend on the tape which calls it.
pub(crate) trait Backward: Send + Sync + 'static {
    /// Name for errors.
    fn name(&self) -> &'static str;

    /// The weights that get gradients, by the index that [`Gradients::weight`] takes.
    fn weights(&self) -> Vec<&Weight> {
        vec![]
    }

    /// What the tape must keep for the backward.
    fn saves(&self) -> Saves {
        Saves::Inputs
    }

    /// The least that the backward could cost, all gradients wanted.
    fn cost(&self) -> Cost;

    /// Whether the forward gave weights their gradients, so that the backward must run.
    fn has_given_already(&self) -> bool {
        false
    }

    /// Gives every gradient that is wanted. `dy` is contiguous, of the output's shape and dtype.
    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()>;
}

/// See [`Backward::saves`].
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Saves {
    Nothing,
    Inputs,
    InputsAndOutput,
}

/// What [`Backward::saves`] asked for; a tape may hold more.
#[derive(Clone, Copy)]
pub(crate) struct Saved<'a> {
    pub(crate) inputs: &'a [Tensor],
    pub(crate) output: Option<&'a Tensor>,
}

/// The gradient of one tensor while backward runs.
#[derive(Default)]
pub(crate) enum Slot {
    /// Nobody asks for it.
    #[default]
    Unwanted,
    /// Nothing has arrived yet.
    Empty,
    /// A tensor that something else may hold too: never written to.
    Shared(Tensor),
    /// A contiguous tensor that only this slot holds.
    Owned(Tensor),
}

impl Slot {
    pub(crate) fn wanted(&self) -> bool {
        !matches!(self, Slot::Unwanted)
    }

    pub(crate) fn take(&mut self) -> Self {
        std::mem::replace(self, Slot::Empty)
    }

    pub(crate) fn into_tensor(self) -> Option<Tensor> {
        match self {
            Slot::Unwanted | Slot::Empty => None,
            Slot::Shared(x) | Slot::Owned(x) => Some(x),
        }
    }

    /// Adds a contribution: moved where it is the first, added in place where one of the two may be written to.
    pub(crate) fn add(&mut self, other: Slot) -> Result<()> {
        *self = match (std::mem::take(self), other) {
            (Slot::Unwanted, _) => Slot::Unwanted,
            (held, Slot::Unwanted | Slot::Empty) => held,
            (Slot::Empty, other) => other,
            (Slot::Owned(sum), Slot::Shared(x) | Slot::Owned(x)) | (Slot::Shared(x), Slot::Owned(sum)) => {
                add_into(&sum, &x)?;
                Slot::Owned(sum)
            }
            (Slot::Shared(x), Slot::Shared(y)) => {
                let _span = trace::op_backward("gradient-add", || Cost::bytes(3 * size(&x)));
                with_dtype!("gradient", x.dtype(), T => {
                    let mut sum = unspecified::<T>(x.elem_count());
                    let ((xs, xl), (ys, yl)) = (x.storage_and_layout(), y.storage_and_layout());
                    elementwise::add(simd::level(), view::<T>(&xs, xl)?, view(&ys, yl)?, &mut sum);
                    Slot::Owned(Tensor::from_vec(sum, x.shape(), x.device())?)
                })
            }
        };
        Ok(())
    }
}

/// Bytes of a tensor's values.
pub(crate) fn size(x: &Tensor) -> usize {
    x.elem_count() * x.dtype().size_in_bytes()
}

/// `sum += x` of two contiguous tensors of as many elements.
fn add_into(sum: &Tensor, x: &Tensor) -> Result<()> {
    let _span = trace::op_backward("gradient-add", || Cost::bytes(3 * size(sum)));
    with_dtype!("gradient", sum.dtype(), T => {
        let (xs, xl) = x.storage_and_layout();
        let x = view::<T>(&xs, xl)?;
        mutate(sum, |sum: &mut [T]| {
            elementwise::add_assign(simd::level(), sum, x);
            Ok(())
        })
    })
}

/// The gradient of one weight.
pub(crate) enum WeightSlot<'a> {
    Unwanted,
    /// Added to this f32 tensor.
    Slot(&'a Tensor),
    /// For a tape, which takes it as a tensor: f32, of the weight's size.
    Tape(&'a Weight, Option<Vec<f32>>),
}

impl WeightSlot<'_> {
    /// The gradient for a tape, in the weight's shape and dtype.
    pub(crate) fn into_tensor(self) -> Result<Option<Tensor>> {
        match self {
            WeightSlot::Tape(weight, Some(sum)) => {
                Tensor::from_vec(sum, weight.shape(), weight.device())?.to_dtype(weight.dtype()).map(Some)
            }
            _ => Ok(None),
        }
    }
}

/// Where an op's gradients go.
pub(crate) struct Gradients<'a> {
    inputs: Vec<Slot>,
    given: Vec<bool>,
    weights: Vec<WeightSlot<'a>>,
}

impl<'a> Gradients<'a> {
    /// What is wanted, with what has arrived for it already.
    pub(crate) fn new(inputs: Vec<Slot>, weights: Vec<WeightSlot<'a>>) -> Self {
        Self { given: vec![false; inputs.len()], inputs, weights }
    }

    /// Whether anybody asks for the gradient of input `i`.
    pub(crate) fn wants(&self, i: usize) -> bool {
        self.inputs[i].wanted()
    }

    /// The gradient of input `i`, newly computed.
    pub(crate) fn give<T: Scalar>(&mut self, i: usize, dx: Vec<T>, shape: &Shape) -> Result<()> {
        self.given[i] = true;
        self.inputs[i].add(Slot::Owned(Tensor::from_vec(dx, shape, &Device::Cpu)?))
    }

    /// The gradient of input `i` is a tensor that is held elsewhere too, `dy` itself as a rule.
    pub(crate) fn pass(&mut self, i: usize, dy: &Tensor) -> Result<()> {
        self.given[i] = true;
        self.inputs[i].add(Slot::Shared(dy.clone()))
    }

    /// Lets `f` compute the gradient of input `i` if it is wanted: into values of no particular content (`false`), or on
    /// top of what has arrived already (`true`), which saves a pass.
    pub(crate) fn write<T: Scalar>(
        &mut self,
        i: usize,
        shape: &Shape,
        f: impl FnOnce(&mut [T], bool) -> Result<()>,
    ) -> Result<()> {
        self.given[i] = true;
        match &self.inputs[i] {
            Slot::Unwanted => Ok(()),
            Slot::Owned(sum) => mutate(sum, |sum: &mut [T]| f(sum, true)),
            Slot::Empty | Slot::Shared(_) => {
                let mut dx = unspecified::<T>(shape.elem_count());
                f(&mut dx, false)?;
                self.give(i, dx, shape)
            }
        }
    }

    /// Whether weight `i` is trained.
    pub(crate) fn wants_weight(&self, i: usize) -> bool {
        !matches!(self.weights[i], WeightSlot::Unwanted)
    }

    /// Lets `add` add the gradient of weight `i`, if it is trained, to a f32 sum of its size.
    pub(crate) fn weight(&mut self, i: usize, add: impl FnOnce(&mut [f32])) -> Result<()> {
        match &mut self.weights[i] {
            WeightSlot::Unwanted => Ok(()),
            WeightSlot::Slot(sum) => mutate(sum, |sum: &mut [f32]| {
                add(sum);
                Ok(())
            }),
            WeightSlot::Tape(weight, sum) => {
                add(sum.get_or_insert_with(|| vec![0.0; weight.shape().elem_count()]));
                Ok(())
            }
        }
    }

    /// The sums of inputs and weights. Fails if an input that is wanted got nothing from this op.
    pub(crate) fn finish(self, name: &str) -> Result<(Vec<Slot>, Vec<WeightSlot<'a>>)> {
        match (0..self.inputs.len()).find(|&i| self.inputs[i].wanted() && !self.given[i]) {
            Some(i) => bail!("{name}: its backward gave no gradient to input {i}"),
            None => Ok((self.inputs, self.weights)),
        }
    }
}
