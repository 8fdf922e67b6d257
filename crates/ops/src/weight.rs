//! [`Weight`]: how a parameter enters an op.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, Result, Shape, Tensor, Var, bail};
use half::bf16;
use tallow_kernels::memory::unspecified;

use crate::autograd::grad_enabled;
use crate::operand::{Scalar, tensor_of};
use crate::tape::is_tracked;
use crate::trace::{self, Cost};

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
    value: Value,
    kind: Kind,
}

/// A matrix that is kept in fewer bits than the ops compute in, and never trained: rows are unpacked when they are needed.
pub trait PackedMatrix: Debug + Send + Sync {
    /// Rows and columns.
    fn dims(&self) -> (usize, usize);

    /// Bytes that it takes.
    fn bytes(&self) -> usize;

    /// Writes rows `rows` into `out`, which is as long as they are; threaded if they are many.
    fn unpack(&self, rows: Range<usize>, out: &mut [f32]);

    /// As [`unpack`](Self::unpack), rounded to bf16.
    fn unpack_bf16(&self, rows: Range<usize>, out: &mut [bf16]) {
        let mut wide = unspecified::<f32>(out.len());
        self.unpack(rows, &mut wide);
        tallow_kernels::reduce::round_to_bf16(tallow_kernels::simd::level(), &wide, out);
    }
}

#[derive(Clone, Debug)]
enum Value {
    Dense(Tensor),
    Packed(Packed),
}

/// A packed matrix and what the ops see of it.
#[derive(Clone, Debug)]
struct Packed {
    matrix: Arc<dyn PackedMatrix>,
    shape: Shape,
    dtype: DType,
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
        Self { value: Value::Dense(value.detach()), kind: Kind::Frozen }
    }

    /// A weight `[rows, columns]` that is never trained and is kept packed, on the CPU. Ops see it in `dtype`.
    ///
    /// # Errors
    /// If `dtype` is neither f32 nor bf16.
    pub fn packed(matrix: Arc<dyn PackedMatrix>, dtype: DType) -> Result<Self> {
        crate::operand::check_dtype("a packed weight", dtype)?;
        let shape = matrix.dims().into();
        Ok(Self { value: Value::Packed(Packed { matrix, shape, dtype }), kind: Kind::Frozen })
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
        Ok(Self { value: Value::Dense(value.detach()), kind: Kind::Trained(Slot { grad, anchor }) })
    }

    /// The value, detached from any slot; that of a packed weight is unpacked for the caller, all of it.
    ///
    /// # Errors
    /// None that can be met on the CPU.
    pub fn value(&self) -> Result<Tensor> {
        match &self.value {
            Value::Dense(value) => Ok(value.clone()),
            Value::Packed(packed) => packed.rows(0..packed.matrix.dims().0),
        }
    }

    /// Rows `rows` of a matrix, contiguous and on no tape.
    ///
    /// # Errors
    /// If they are not within the matrix.
    pub fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        match &self.value {
            Value::Dense(value) => value.detach().narrow(0, rows.start, rows.len())?.contiguous(),
            Value::Packed(packed) if rows.start <= rows.end && rows.end <= packed.matrix.dims().0 => packed.rows(rows),
            Value::Packed(_) => bail!("rows {rows:?} of a packed weight {:?}", self.shape()),
        }
    }

    /// The matrix of a packed weight.
    pub fn packed_matrix(&self) -> Option<&dyn PackedMatrix> {
        if let Value::Packed(packed) = &self.value { Some(packed.matrix.as_ref()) } else { None }
    }

    /// Whether it can never get a gradient, whatever is recorded.
    pub(crate) fn is_frozen(&self) -> bool {
        matches!(self.kind, Kind::Frozen)
    }

    /// The tensor that it was made of, if that may be on a tape.
    pub(crate) fn tensor(&self) -> Option<&Tensor> {
        match (&self.kind, &self.value) {
            (Kind::OfTensor, Value::Dense(value)) => Some(value),
            _ => None,
        }
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
            Kind::OfTensor => self.tensor().is_some_and(is_tracked),
        }
    }

    /// What an op records for this weight on candle's tape: the anchor, or the value itself, which may be tracked; `None`
    /// for a packed one.
    pub(crate) fn operand(&self) -> Option<&Tensor> {
        self.anchor().or(if let Value::Dense(value) = &self.value { Some(value) } else { None })
    }

    /// The variable that keeps an op over this weight on the tape; `None` if the weight has no slot or within
    /// [`no_grad`](crate::no_grad).
    pub(crate) fn anchor(&self) -> Option<&Tensor> {
        self.slot().filter(|_| grad_enabled()).map(|s| s.anchor.as_tensor())
    }

    fn slot(&self) -> Option<&Slot> {
        if let Kind::Trained(slot) = &self.kind { Some(slot) } else { None }
    }

    /// Shape of the value.
    pub fn shape(&self) -> &Shape {
        match &self.value {
            Value::Dense(value) => value.shape(),
            Value::Packed(packed) => &packed.shape,
        }
    }

    /// Dtype of the value (the compute dtype).
    pub fn dtype(&self) -> DType {
        match &self.value {
            Value::Dense(value) => value.dtype(),
            Value::Packed(packed) => packed.dtype,
        }
    }

    /// Device of the value.
    pub fn device(&self) -> &Device {
        match &self.value {
            Value::Dense(value) => value.device(),
            Value::Packed(_) => &Device::Cpu,
        }
    }
}

impl Packed {
    fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        let (len, shape) = (rows.len() * self.matrix.dims().1, (rows.len(), self.matrix.dims().1));
        let size = self.dtype.size_in_bytes();
        let _span = trace::op("unpack", || {
            Cost::bytes(len * size + self.matrix.bytes() / self.matrix.dims().0.max(1) * shape.0)
        });
        let storage: CpuStorage = match self.dtype {
            DType::BF16 => {
                let mut out = unspecified::<bf16>(len);
                self.matrix.unpack_bf16(rows, &mut out);
                bf16::into_storage(out)
            }
            _ => {
                let mut out = unspecified::<f32>(len);
                self.matrix.unpack(rows, &mut out);
                f32::into_storage(out)
            }
        };
        tensor_of(storage, shape.into())
    }
}

/// A tensor on a tape gets its gradient there (candle's `GradStore`, or [`Tape::backward`](crate::Tape::backward)); outside
/// of a recording one that is on none is frozen, within it is an error.
impl From<Tensor> for Weight {
    fn from(value: Tensor) -> Self {
        Self { value: Value::Dense(value), kind: Kind::OfTensor }
    }
}

impl From<&Var> for Weight {
    fn from(var: &Var) -> Self {
        Self { value: Value::Dense(var.as_tensor().clone()), kind: Kind::OfTensor }
    }
}
