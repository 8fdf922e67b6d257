//! The gradient audit of the first step: a parameter that gets no gradient never learns, and nobody notices.

use candle_core::Tensor;
use tallow_nn::{ParamSpec, ParamStore, Role};

use crate::{Error, Result};

/// Checks that every trainable parameter of `store` for which `expected` holds has a finite, non-zero gradient, and that
/// the gradients of the others are finite.
///
/// Single rows of an embedding may have none (not every id is in a batch); the table as a whole must.
///
/// # Errors
/// [`Error::Audit`] naming the first parameter that fails.
pub fn audit_gradients(store: &ParamStore, expected: &dyn Fn(&ParamSpec) -> bool) -> Result<()> {
    for param in store.params() {
        let Some(grad) = store.grad(param)? else { continue };
        let fail = |reason: &str| Error::Audit { parameter: param.spec.name.clone(), reason: reason.into() };
        let largest = max_abs(&grad)?;
        if !largest.is_finite() {
            return Err(fail("has a gradient that is not finite"));
        }
        if largest == 0.0 && expected(&param.spec) {
            let what = match param.spec.role {
                Role::Position => "has no gradient: no position of the first batch reaches it",
                _ => "has no gradient: the graph is cut before it, or the model is degenerate",
            };
            return Err(fail(what));
        }
    }
    Ok(())
}

/// Largest magnitude of what is trained, NaN if any element is not finite.
pub(crate) fn largest_weight(store: &ParamStore) -> Result<f32> {
    let mut largest = 0.0f32;
    for param in store.trained() {
        let here = max_abs(&store.value(param)?)?;
        // `max` would lose a NaN.
        largest = if here > largest || here.is_nan() { here } else { largest };
        if largest.is_nan() {
            break;
        }
    }
    Ok(largest)
}

/// Largest magnitude, NaN if any element is not finite.
fn max_abs(t: &Tensor) -> Result<f32> {
    let values = t.flatten_all()?.to_vec1::<f32>()?;
    if values.iter().any(|x| !x.is_finite()) {
        return Ok(f32::NAN);
    }
    Ok(values.iter().fold(0.0, |largest, x| largest.max(x.abs())))
}
