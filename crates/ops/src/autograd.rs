//! What candle's tape lacks: a scope without gradients, and a backward seeded with a given gradient.

use std::cell::Cell;

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

thread_local! {
    static GRAD_ENABLED: Cell<bool> = const { Cell::new(true) };
}

/// True unless the current thread is within [`no_grad`].
pub fn grad_enabled() -> bool {
    GRAD_ENABLED.get()
}

/// Runs `f` with gradients off on this thread: ops over trainable [`Weight`](crate::Weight)s record nothing, so
/// evaluation keeps no graph. Operands that are candle `Var`s themselves are recorded as ever.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            GRAD_ENABLED.set(self.0);
        }
    }
    let _restore = Restore(GRAD_ENABLED.replace(false));
    f()
}

/// Vector-Jacobian product: runs backward from `y` with `dy` as its gradient, both of the same shape, dtype and device.
///
/// Candle's `backward` always starts from ones; the usual way round, `(y * dy).sum().backward()`, makes three more
/// passes over `y`. Here the seed is an op whose backward hands over `dy` itself.
///
/// # Errors
/// If the shapes or dtypes differ, or if `y` is not on the tape (nothing would receive a gradient).
pub fn backward_from(y: &Tensor, dy: &Tensor) -> Result<GradStore> {
    if y.shape() != dy.shape() || y.dtype() != dy.dtype() {
        bail!("backward_from: y is {:?} {:?} but dy is {:?} {:?}", y.shape(), y.dtype(), dy.shape(), dy.dtype())
    }
    if !y.track_op() {
        bail!("backward_from: y {:?} depends on no variable or trainable weight", y.shape())
    }
    y.apply_op1(Seed { dy: dy.detach() })?.backward()
}

struct Seed {
    dy: Tensor,
}

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "backward-seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.dy.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn seeded_backward_is_the_vjp() -> Result<()> {
        let x = Var::new(&[1f32, 2., 3.], &Device::Cpu)?;
        let dy = Tensor::new(&[0.5f32, -1., 2.], &Device::Cpu)?;
        let y = x.as_tensor().sqr()?;
        let grads = backward_from(&y, &dy)?;
        let dx = grads.get(x.as_tensor()).map(|g| g.to_vec1::<f32>()).transpose()?;
        assert_eq!(dx, Some(vec![1., -4., 12.]));
        Ok(())
    }

    #[test]
    fn a_detached_result_is_an_error() -> Result<()> {
        let y = Tensor::new(&[1f32], &Device::Cpu)?;
        assert!(backward_from(&y, &y).is_err());
        Ok(())
    }

    #[test]
    fn no_grad_is_scoped() {
        assert!(grad_enabled());
        no_grad(|| assert!(!grad_enabled()));
        assert!(grad_enabled());
    }
}
