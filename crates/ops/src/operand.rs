//! From candle tensors to the slices that the kernels take.

use std::cell::RefCell;
use std::marker::PhantomData;

use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, DType, Device, InplaceOp1, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, WithDType, bail,
};
use half::bf16;
use tallow_kernels::cross_entropy::LogitGradients;
use tallow_kernels::gemm::Gemm;
use tallow_kernels::lanes::Element;

use crate::Weight;

/// A dtype that the ops compute in.
pub(crate) trait Scalar: Element + WithDType + Gemm + LogitGradients {
    /// All values of a storage of this dtype, to write to.
    fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]>;

    /// A storage of these values.
    fn into_storage(values: Vec<Self>) -> CpuStorage;
}

macro_rules! scalar {
    ($ty:ty, $variant:ident) => {
        impl Scalar for $ty {
            fn values_mut(storage: &mut CpuStorage) -> Result<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(values) => Ok(values),
                    other => bail!("a tensor written in place is {:?}, expected {:?}", other.dtype(), Self::DTYPE),
                }
            }

            fn into_storage(values: Vec<Self>) -> CpuStorage {
                CpuStorage::$variant(values)
            }
        }
    };
}

scalar!(f32, F32);
scalar!(bf16, BF16);

/// Runs `$body` with `$T` bound to the Rust type of a dtype, f32 or bf16; any other is an error that names the op.
macro_rules! with_dtype {
    ($op:expr, $dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => candle_core::bail!("{}: dtype {other:?} is not supported, convert to F32 or BF16", $op),
        }
    };
}
pub(crate) use with_dtype;

/// The values of a contiguous operand of a custom op.
pub(crate) fn slice<'a, T: Scalar>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let data = T::cpu_storage_as_slice(storage)?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("an operand of a fused op must be contiguous, got strides {:?}", layout.stride()),
    }
}

/// The values of a contiguous CPU tensor, from what [`Tensor::storage_and_layout`] returned.
pub(crate) fn view<'a, T: Scalar>(storage: &'a Storage, layout: &Layout) -> Result<&'a [T]> {
    match storage {
        Storage::Cpu(storage) => slice(storage, layout),
        _ => bail!("a fused op was recorded on the CPU, but an operand lies elsewhere"),
    }
}

/// Both operands of a binary op must agree in shape, dtype and device.
pub(crate) fn check_same(op: &str, x: &Tensor, y: &Tensor) -> Result<()> {
    if x.shape() != y.shape() || x.dtype() != y.dtype() || !x.device().same_device(y.device()) {
        let (xs, ys) = (x.shape(), y.shape());
        bail!("{op}: operands differ: {xs:?} {:?} and {ys:?} {:?}", x.dtype(), y.dtype())
    }
    Ok(())
}

/// True if the kernels run on this device; elsewhere the composed reference does.
pub(crate) fn on_cpu(x: &Tensor) -> bool {
    matches!(x.device(), Device::Cpu)
}

/// F32 or BF16, or an error that names the op.
pub(crate) fn check_dtype(op: &str, dtype: DType) -> Result<()> {
    match dtype {
        DType::F32 | DType::BF16 => Ok(()),
        other => bail!("{op}: dtype {other:?} is not supported, convert to F32 or BF16"),
    }
}

/// Lets `f` write to a contiguous tensor on the CPU, in place, and returns what it returns. The tensor's storage is locked
/// meanwhile.
pub(crate) fn mutate<T: Scalar, R>(x: &Tensor, f: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    let (work, result) = (RefCell::new(Some(f)), RefCell::new(None));
    x.inplace_op1(&Mutate {
        f: |values: &mut [T]| {
            if let Some(f) = work.take() {
                result.replace(Some(f(values)));
            }
        },
        dtype: PhantomData,
    })?;
    result.into_inner().unwrap_or_else(|| bail!("an in-place op did not run"))
}

struct Mutate<T, F> {
    f: F,
    dtype: PhantomData<T>,
}

impl<T: Scalar, F: Fn(&mut [T])> InplaceOp1 for Mutate<T, F> {
    fn name(&self) -> &'static str {
        "mutate"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("a tensor written in place must be contiguous, got strides {:?}", layout.stride())
        };
        (self.f)(&mut T::values_mut(storage)?[start..end]);
        Ok(())
    }
}

/// A tensor of a result, on no tape.
pub(crate) fn tensor_of(storage: CpuStorage, shape: Shape) -> Result<Tensor> {
    match storage {
        CpuStorage::F32(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        CpuStorage::BF16(values) => Tensor::from_vec(values, shape, &Device::Cpu),
        other => bail!("a result is {:?}, expected F32 or BF16", other.dtype()),
    }
}

/// A weight as an operand of composed candle ops, on any device: its value, on the tape if it has a gradient slot, and
/// what arrives there in backward is added to the slot.
pub(crate) fn composed(weight: &Weight) -> Result<Tensor> {
    match (weight.anchor(), weight.grad()) {
        (Some(anchor), Some(slot)) => weight.value()?.contiguous()?.apply_op2(anchor, SlotTap { slot: slot.clone() }),
        _ => weight.value(),
    }
}

/// Identity on the first operand.
struct SlotTap {
    slot: Tensor,
}

impl CustomOp2 for SlotTap {
    fn name(&self) -> &'static str {
        "slot-tap"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let s = with_dtype!(self.name(), s.dtype(), T => T::into_storage(slice::<T>(s, l)?.to_vec()));
        Ok((s, l.shape().clone()))
    }

    fn cuda_fwd(&self, s: &CudaStorage, l: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        Ok((s.try_clone(l)?, l.shape().clone()))
    }

    fn metal_fwd(&self, s: &MetalStorage, l: &Layout, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        Ok((s.try_clone(l)?, l.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sum = (&self.slot + grad.to_dtype(DType::F32)?)?;
        self.slot.slice_set(&sum, 0, 0)?;
        Ok((None, None))
    }
}
