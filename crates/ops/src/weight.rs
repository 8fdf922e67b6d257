//! [`Weight`]: how a parameter enters an op.

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};

use crate::autograd::grad_enabled;
use crate::tape::is_tracked;

/// A parameter as the ops see it: a value and, if it is trained, the place where its gradient is summed.
///
/// Candle's own way (a `Var` for each parameter, a gradient tensor for each contribution) costs a zeroed buffer and an
/// addition for every gradient, keeps gradients in the dtype of the compute, and computes them for frozen weights too.
/// Here a trainable weight carries a view into a flat `f32` gradient bucket, and the backward of an op adds to it in
/// place. Several uses (tied weights, accumulation over micro-batches) simply add up.
///
/// A gradient slot needs to be on candle's tape even where the op's input is not (the ids of an embedding, say).
/// That is what `anchor` is for: a one-element variable that keeps the op recorded and never receives a gradient.
#[derive(Clone, Debug)]
pub struct Weight {
    value: Tensor,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Frozen,
    Trained(Slot),
    /// Made of a tensor, which may be on a tape.
    OfTensor,
}

#[derive(Clone, Debug)]
struct Slot {
    grad: Tensor,
    anchor: Var,
}

impl Weight {
    /// A weight that is never trained: no op computes a gradient for it.
    pub fn frozen(value: Tensor) -> Self {
        Self { value: value.detach(), kind: Kind::Frozen }
    }

    /// A trained weight. `value` is f32 or bf16, any device; `grad` is f32, contiguous, of the same shape and device
    /// (normally a view into a flat bucket) and is added to, never overwritten, by every backward.
    ///
    /// # Errors
    /// If `grad` is not f32, not contiguous, on another device or of another shape.
    pub fn trainable(value: Tensor, grad: Tensor) -> Result<Self> {
        if grad.dtype() != DType::F32 || !grad.is_contiguous() || grad.track_op() {
            bail!("a gradient slot must be an untracked contiguous f32 tensor, got {:?}", grad.dtype())
        }
        if grad.shape() != value.shape() || !grad.device().same_device(value.device()) {
            bail!("gradient slot {:?} does not match its weight {:?}", grad.shape(), value.shape())
        }
        let anchor = Var::zeros(1, DType::F32, value.device())?;
        Ok(Self { value: value.detach(), kind: Kind::Trained(Slot { grad, anchor }) })
    }

    /// The value, detached from any slot.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The f32 gradient slot of a trainable weight, of the value's shape.
    pub fn grad(&self) -> Option<&Tensor> {
        self.slot().map(|s| &s.grad)
    }

    /// True if an op recorded now must compute a gradient for this weight (by slot or by candle's tape).
    pub fn needs_grad(&self) -> bool {
        match &self.kind {
            Kind::Frozen => false,
            Kind::Trained(_) => grad_enabled(),
            Kind::OfTensor => is_tracked(&self.value),
        }
    }

    /// What an op records for this weight on candle's tape: the anchor, or the value itself, which may be tracked.
    pub(crate) fn operand(&self) -> &Tensor {
        self.anchor().unwrap_or(&self.value)
    }

    /// The variable that keeps an op over this weight on the tape; `None` if the weight has no slot or within
    /// [`no_grad`](crate::no_grad).
    pub(crate) fn anchor(&self) -> Option<&Tensor> {
        self.slot().filter(|_| grad_enabled()).map(|s| s.anchor.as_tensor())
    }

    fn slot(&self) -> Option<&Slot> {
        if let Kind::Trained(slot) = &self.kind { Some(slot) } else { None }
    }

    /// True if it was made of a tensor that may itself be on a tape.
    pub(crate) fn is_of_tensor(&self) -> bool {
        matches!(self.kind, Kind::OfTensor)
    }

    /// Shape of the value.
    pub fn shape(&self) -> &Shape {
        self.value.shape()
    }

    /// Dtype of the value (the compute dtype).
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// Device of the value.
    pub fn device(&self) -> &Device {
        self.value.device()
    }
}

/// A tensor on a tape gets its gradient there (candle's `GradStore`, or [`Tape::backward`](crate::Tape::backward)); outside
/// of a recording one that is on none is frozen, within it is an error.
impl From<Tensor> for Weight {
    fn from(value: Tensor) -> Self {
        Self { value, kind: Kind::OfTensor }
    }
}

impl From<&Var> for Weight {
    fn from(var: &Var) -> Self {
        Self { value: var.as_tensor().clone(), kind: Kind::OfTensor }
    }
}
