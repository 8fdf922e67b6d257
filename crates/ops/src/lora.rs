//! [`lora_linear`]: a frozen projection and the low-rank product beside it, in one op; [`scale_outputs`] for DoRA.

use std::sync::Arc;

use candle_core::{CpuStorage, Result, Tensor, bail};
use tallow_kernels::lanes::Element;
use tallow_kernels::memory::unspecified;
use tallow_kernels::{elementwise, simd};

use crate::gradients::{Backward, Gradients, Saved, Saves};
use crate::linear::{Dims, Linear, linear};
use crate::operand::{Scalar, on_cpu, tensor_of, view, with_dtype};
use crate::tape::{dense, finish, is_tracked, recording};
use crate::trace::{self, Cost};
use crate::{Weight, composed_of, reference};

/// The two matrices of an adapter and their factor.
#[derive(Clone, Debug)]
pub struct LoraWeights {
    /// `lora_A [r, c]`.
    pub a: Weight,
    /// `lora_B [o, r]`.
    pub b: Weight,
    /// `s`: alpha over rank, or over its root (rsLoRA).
    pub scale: f64,
}

impl LoraWeights {
    /// Dropout is for what is trained: a frozen pair sees the input itself.
    fn sees<'a, X>(&self, x: &'a X, dropped: Option<&'a X>) -> &'a X {
        dropped.filter(|_| !(self.a.is_frozen() && self.b.is_frozen())).unwrap_or(x)
    }
}

/// `y = x W^T + bias + s (x' A^T) B^T` (Hu et al. 2021). `x [.., c]`, `weight [o, c]` of one dtype, f32 or bf16; `x'`, what
/// the adapter sees, is `dropped` where given, of `x`'s shape, else `x` itself. Returns `[.., o]`.
///
/// Gradients: `dB = s dy^T (x' A^T)`, `dA = s (dy B)^T x'`, `dx = dy W`, and `dx' = s (dy B) A`, added to `dx` where the two
/// are one. None for what is frozen.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn lora_linear(
    x: &Tensor,
    dropped: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Weight>,
    lora: &LoraWeights,
) -> Result<Tensor> {
    lora_linear_sum(x, dropped, weight, bias, std::slice::from_ref(lora))
}

/// [`lora_linear`] with several adapters: `y = x W^T + bias + sum_i s_i (x' A_i^T) B_i^T`, added in their order. With one it
/// is that op, with none [`linear`], to the bit. A pair that is frozen sees `x` itself, not `dropped`.
///
/// # Errors
/// As [`lora_linear`].
pub fn lora_linear_sum(
    x: &Tensor,
    dropped: Option<&Tensor>,
    weight: &Weight,
    bias: Option<&Weight>,
    loras: &[LoraWeights],
) -> Result<Tensor> {
    if loras.is_empty() {
        return linear(x, weight, bias);
    }
    let dropped = dropped.filter(|_| loras.iter().any(|lora| !(lora.a.is_frozen() && lora.b.is_frozen())));
    let dims = crate::linear::check(x, weight, bias)?;
    for lora in loras {
        check(x, dropped.unwrap_or(x), weight, lora, dims)?;
    }
    let adapters = loras.iter().flat_map(|lora| [&lora.a, &lora.b]);
    let tracked = std::iter::once(weight).chain(adapters).chain(bias).any(Weight::needs_grad);
    let tracked = tracked || is_tracked(x) || dropped.is_some_and(is_tracked);
    if !on_cpu(x) || (tracked && !recording()) {
        // On candle's tape an op has three operands at most.
        let mut y = linear(x, weight, bias)?;
        for lora in loras {
            let z = linear(&linear(lora.sees(x, dropped), &lora.a, None)?, &lora.b, None)?;
            y = composed_of("lora", &[&y, &z], |x| &x[0] + (&x[1] * lora.scale)?)?;
        }
        return Ok(y);
    }
    let x = dense(x)?;
    let dropped = dropped.map(dense).transpose()?;
    let linear = Linear::new(weight, bias, dims, x.shape().clone());
    let mut op = LoraLinear { linear, loras: loras.to_vec(), downs: vec![] };
    let _span = trace::op("lora-linear", || op.forward_cost());
    let y = with_dtype!("lora_linear", x.dtype(), T => op.forward::<T>(&x, dropped.as_ref())?);
    let mut shape = x.dims().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = dims.o;
    }
    match &dropped {
        Some(dropped) => finish(op, &[&x, dropped], y, shape),
        None => finish(op, &[&x], y, shape),
    }
}

fn check(x: &Tensor, dropped: &Tensor, weight: &Weight, lora: &LoraWeights, dims: Dims) -> Result<()> {
    let down = crate::linear::check(dropped, &lora.a, None)?;
    let (r, bs) = (down.o, lora.b.shape());
    if bs.dims() != [dims.o, r] || down.n != dims.n {
        bail!(
            "lora_linear: x {:?}, weight {:?}, A {:?} and B {bs:?}: expected A [r, {}] and B [{}, r]",
            x.shape(),
            weight.shape(),
            lora.a.shape(),
            dims.c,
            dims.o
        )
    }
    if lora.b.dtype() != x.dtype() || !lora.b.device().same_device(x.device()) {
        bail!("lora_linear: x is {:?} and B {:?}: they must share dtype and device", x.dtype(), lora.b.dtype())
    }
    Ok(())
}

struct LoraLinear {
    linear: Linear,
    loras: Vec<LoraWeights>,
    /// `s_i x' A_i^T [n, r_i]`.
    downs: Vec<Tensor>,
}

impl LoraLinear {
    /// Sum of the ranks.
    fn ranks(&self) -> usize {
        self.loras.iter().map(|lora| lora.a.shape().dims()[0]).sum()
    }

    fn forward_cost(&self) -> Cost {
        let (size, Dims { n, c, o }, r) = (self.loras[0].a.dtype().size_in_bytes(), self.linear.dims, self.ranks());
        let Cost { flops, bytes } = self.linear.dims.forward_cost(size);
        Cost { flops: flops + (2 * n * r * (c + o)) as f64, bytes: bytes + (size * r * (c + o)) as f64 }
    }

    fn forward<T: Scalar>(&mut self, x: &Tensor, dropped: Option<&Tensor>) -> Result<CpuStorage> {
        let Dims { n, c, o } = self.linear.dims;
        let mut y = self.linear.forward::<T>(x)?;
        for lora in &self.loras {
            let r = lora.a.shape().dims()[0];
            let (a, b) = (lora.a.value()?.detach().contiguous()?, lora.b.value()?.detach().contiguous()?);
            let ((xs, xl), (als, all), (bs, bl)) =
                (lora.sees(x, dropped).storage_and_layout(), a.storage_and_layout(), b.storage_and_layout());
            let mut down = unspecified::<T>(n * r);
            T::nt(n, r, c, view::<T>(&xs, xl)?, view::<T>(&als, all)?, &mut down);
            elementwise::scale(simd::level(), lora.scale as f32, &mut down);
            T::nt_add(n, o, r, &down, view::<T>(&bs, bl)?, T::values_mut(&mut y)?);
            self.downs.push(tensor_of(T::into_storage(down), (n, r).into())?);
        }
        Ok(y)
    }

    fn gradients<T: Scalar>(&self, inputs: &[Tensor], dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let Dims { n, c, o } = self.linear.dims;
        if inputs.is_empty() {
            bail!("lora-linear: its input was not kept")
        }
        // That of W first: where both inputs are one, the adapter's is then added as its product goes.
        self.linear.gradients::<T>(inputs.first(), dy, grads)?;
        let mut first = self.linear.weights().len();
        for (lora, down) in self.loras.iter().zip(&self.downs) {
            let r = lora.a.shape().dims()[0];
            let seen = *lora.sees(&0, Some(&(inputs.len() - 1)));
            let (a, b) = (lora.a.value()?.detach().contiguous()?, lora.b.value()?.detach().contiguous()?);
            let ((ds, dl), (hs, hl), (xs, xl)) =
                (dy.storage_and_layout(), down.storage_and_layout(), inputs[seen].storage_and_layout());
            let ((als, all), (bs, bl)) = (a.storage_and_layout(), b.storage_and_layout());
            let (dy, x_values) = (view::<T>(&ds, dl)?, view::<T>(&xs, xl)?);
            let mut ddown = unspecified::<T>(n * r);
            T::nn(n, r, o, dy, view::<T>(&bs, bl)?, &mut ddown, false);
            elementwise::scale(simd::level(), lora.scale as f32, &mut ddown);
            grads.write(seen, inputs[seen].shape(), |dx: &mut [T], add| {
                T::nn(n, c, r, &ddown, view::<T>(&als, all)?, dx, add);
                Ok(())
            })?;
            grads.weight(first, |sum| T::tn_add(r, c, n, &ddown, x_values, sum))?;
            let down = view::<T>(&hs, hl)?;
            grads.weight(first + 1, |sum| T::tn_add(o, r, n, dy, down, sum))?;
            first += 2;
        }
        Ok(())
    }
}

impl Backward for LoraLinear {
    fn name(&self) -> &'static str {
        "lora-linear"
    }

    fn weights(&self) -> Vec<&Weight> {
        let mut weights = self.linear.weights();
        weights.extend(self.loras.iter().flat_map(|lora| [&lora.a, &lora.b]));
        weights
    }

    fn cost(&self) -> Cost {
        let (Dims { n, c, o }, r) = (self.linear.dims, self.ranks());
        let size = self.loras[0].a.dtype().size_in_bytes();
        let trained = if self.linear.trained { 4 } else { 2 };
        let flops = (trained * n * c * o + 4 * n * r * (c + o)) as f64;
        Cost { flops, bytes: (size * (2 * n * o + 2 * n * c + o * c)) as f64 }
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => self.gradients::<T>(saved.inputs, dy, grads))
    }
}

/// `y = x * (m / norm) + bias` for each output: what DoRA (Liu et al. 2024) puts behind the sum of a projection and its
/// adapter. `x [.., o]`, magnitude `m [o]` and `bias [o]` of one dtype; `norm`, `o` values, is a constant.
///
/// Gradients: `dx = dy m / norm`, `dm = sum of dy x / norm`, `dbias = sum of dy`.
///
/// # Errors
/// If shapes, dtypes or devices do not fit.
pub fn scale_outputs(x: &Tensor, magnitude: &Weight, norm: &Arc<Vec<f32>>, bias: Option<&Weight>) -> Result<Tensor> {
    let o = norm.len();
    let fits = |w: &Weight| w.shape().dims() == [o] && w.dtype() == x.dtype() && w.device().same_device(x.device());
    if x.dims().last() != Some(&o) || !fits(magnitude) || !bias.is_none_or(fits) {
        let (xs, ms) = (x.shape(), magnitude.shape());
        bail!(
            "scale_outputs: x {xs:?} {:?} and magnitude {ms:?} {:?}: expected [.., {o}] and [{o}] of one dtype",
            x.dtype(),
            magnitude.dtype()
        )
    }
    if !on_cpu(x) {
        return composed_of("scale-outputs", &[x], |x| {
            let bias = bias.map(crate::operand::composed).transpose()?;
            reference::scale_outputs(&x[0], &crate::operand::composed(magnitude)?, norm, bias.as_ref())
        });
    }
    let x = dense(x)?;
    let size = crate::gradients::size(&x);
    let _span = trace::op("scale-outputs", || Cost::bytes(2 * size));
    let op = ScaleOutputs { magnitude: magnitude.clone(), bias: bias.cloned(), norm: norm.clone(), size };
    let y = with_dtype!("scale_outputs", x.dtype(), T => op.forward::<T>(&x)?);
    finish(op, &[&x], y, x.shape().clone())
}

struct ScaleOutputs {
    magnitude: Weight,
    bias: Option<Weight>,
    norm: Arc<Vec<f32>>,
    size: usize,
}

impl ScaleOutputs {
    /// `m / norm`.
    fn factors<T: Scalar>(&self) -> Result<Vec<f32>> {
        let m = self.magnitude.value()?.detach().contiguous()?;
        let (ms, ml) = m.storage_and_layout();
        Ok(view::<T>(&ms, ml)?.iter().zip(self.norm.iter()).map(|(m, norm)| m.to_f32() / norm).collect())
    }

    fn forward<T: Scalar>(&self, x: &Tensor) -> Result<CpuStorage> {
        let bias = match &self.bias {
            Some(bias) => {
                let bias = bias.value()?.detach().contiguous()?;
                let (bs, bl) = bias.storage_and_layout();
                view::<T>(&bs, bl)?.iter().map(|b| b.to_f32()).collect()
            }
            None => vec![0.0; self.norm.len()],
        };
        let (xs, xl) = x.storage_and_layout();
        let mut y = unspecified::<T>(x.elem_count());
        elementwise::affine_rows(view::<T>(&xs, xl)?, &self.factors::<T>()?, &bias, &mut y);
        Ok(T::into_storage(y))
    }

    fn gradients<T: Scalar>(&self, x: &Tensor, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let ((xs, xl), (ds, dl)) = (x.storage_and_layout(), dy.storage_and_layout());
        let (x_values, dy_values) = (view::<T>(&xs, xl)?, view::<T>(&ds, dl)?);
        if grads.wants(0) {
            let mut dx = unspecified::<T>(dy_values.len());
            let zeros = vec![0.0; self.norm.len()];
            elementwise::affine_rows(dy_values, &self.factors::<T>()?, &zeros, &mut dx);
            grads.give(0, dx, x.shape())?;
        }
        grads.weight(0, |sum| elementwise::add_row_products(dy_values, x_values, &self.norm, sum))?;
        if self.bias.is_some() {
            grads.weight(1, |sum| tallow_kernels::reduce::add_rows(dy_values, sum))?;
        }
        Ok(())
    }
}

impl Backward for ScaleOutputs {
    fn name(&self) -> &'static str {
        "scale-outputs"
    }

    fn weights(&self) -> Vec<&Weight> {
        [Some(&self.magnitude), self.bias.as_ref()].into_iter().flatten().collect()
    }

    fn cost(&self) -> Cost {
        Cost::bytes(3 * self.size)
    }

    fn backward(&self, saved: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => self.gradients::<T>(&saved.inputs[0], dy, grads))
    }
}

/// `W + s B A`, f32 `[o, c]`, some rows at a time: calls `f` with the first row's index and the rows. Nothing is recorded.
///
/// # Errors
/// If shapes do not fit, or those of `f`.
pub fn merged_rows(weight: &Weight, lora: &LoraWeights, f: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
    let (ws, rs) = (weight.shape().dims(), lora.a.shape().dims());
    let (&[o, c], &[r, width]) = (ws, rs) else { bail!("merged_rows: weight {ws:?} and A {rs:?} are not matrices") };
    if width != c || lora.b.shape().dims() != [o, r] {
        bail!("merged_rows: weight {ws:?}, A {rs:?} and B {:?} do not fit", lora.b.shape())
    }
    let wide = |x: Tensor| x.to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (a, mut b) = (wide(lora.a.value()?)?, wide(lora.b.value()?)?);
    elementwise::scale(simd::level(), lora.scale as f32, &mut b);
    let chunk = (MERGED_AT_ONCE / c.max(1)).max(1);
    for start in (0..o).step_by(chunk) {
        let rows = chunk.min(o - start);
        let mut merged = wide(weight.rows(start..start + rows)?)?;
        <f32 as tallow_kernels::gemm::Gemm>::nn(rows, c, r, &b[start * r..][..rows * r], &a, &mut merged, true);
        f(start, &merged)?;
    }
    Ok(())
}

/// Elements that [`merged_rows`] holds at once.
const MERGED_AT_ONCE: usize = 1 << 20;

/// L2 norm of each row of `W + s B A`, `o` values: DoRA's divisor.
///
/// # Errors
/// As [`merged_rows`].
pub fn merged_norms(weight: &Weight, lora: &LoraWeights) -> Result<Vec<f32>> {
    let o = weight.shape().dims().first().copied().unwrap_or(0);
    let _span = trace::op("dora-norm", || {
        let (c, r) = (weight.shape().elem_count() / o.max(1), lora.a.shape().dims()[0]);
        Cost { flops: (2 * o * c * (r + 1)) as f64, bytes: (4 * o * c) as f64 }
    });
    let mut norms = Vec::with_capacity(o);
    merged_rows(weight, lora, &mut |_, rows| {
        let c = weight.shape().dims()[1];
        let from = norms.len();
        norms.resize(from + rows.len() / c, 0.0);
        tallow_kernels::reduce::row_norms(simd::level(), rows, c, &mut norms[from..]);
        Ok(())
    })?;
    Ok(norms)
}

/// `W + s B A [o, c]` as a tensor, with gradients for `A` and `B`: where a whole matrix is needed, as for a head's loss. It
/// and its gradient take as much memory as `W` in full.
///
/// # Errors
/// If shapes do not fit, or `W` is trained.
pub fn merge_lora(weight: &Weight, lora: &LoraWeights) -> Result<Tensor> {
    let (&[o, c], &[r, _]) = (weight.shape().dims(), lora.a.shape().dims()) else {
        bail!("merge_lora: weight {:?} and A {:?} are not matrices", weight.shape(), lora.a.shape())
    };
    if weight.needs_grad() {
        bail!("merge_lora: the matrix that an adapter is added to is trained as well")
    }
    if !on_cpu(&lora.a.value()?) {
        return composed_of("merge-lora", &[], |_| {
            let (a, b) = (crate::operand::composed(&lora.a)?, crate::operand::composed(&lora.b)?);
            weight.value()? + (b.matmul(&a)? * lora.scale)?
        });
    }
    let _span = trace::op("merge-lora", || Cost { flops: (2 * o * c * r) as f64, bytes: (12 * o * c) as f64 });
    let y = with_dtype!("merge_lora", weight.dtype(), T => {
        let mut y = Vec::<T>::with_capacity(o * c);
        merged_rows(weight, lora, &mut |_, rows| {
            y.extend(rows.iter().map(|&x| T::from_f32(x)));
            Ok(())
        })?;
        T::into_storage(y)
    });
    finish(MergeLora { lora: lora.clone(), o, c, r }, &[], y, (o, c))
}

struct MergeLora {
    lora: LoraWeights,
    o: usize,
    c: usize,
    r: usize,
}

impl MergeLora {
    fn gradients<T: Scalar>(&self, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        let &Self { ref lora, o, c, r } = self;
        let (a, mut b) = (
            lora.a.value()?.detach().contiguous()?,
            lora.b.value()?.detach().to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?,
        );
        elementwise::scale(simd::level(), lora.scale as f32, &mut b);
        let b: Vec<T> = b.into_iter().map(T::from_f32).collect();
        let ((ds, dl), (als, all)) = (dy.storage_and_layout(), a.storage_and_layout());
        let (dy, a) = (view::<T>(&ds, dl)?, view::<T>(&als, all)?);
        grads.weight(0, |sum| T::tn_add(r, c, o, &b, dy, sum))?;
        if grads.wants_weight(1) {
            let mut db = unspecified::<f32>(o * r);
            T::nt_f32(o, r, c, dy, a, &mut db);
            elementwise::scale(simd::level(), lora.scale as f32, &mut db);
            grads.weight(1, |sum| elementwise::add_assign(simd::level(), sum, &db))?;
        }
        Ok(())
    }
}

impl Backward for MergeLora {
    fn name(&self) -> &'static str {
        "merge-lora"
    }

    fn weights(&self) -> Vec<&Weight> {
        vec![&self.lora.a, &self.lora.b]
    }

    fn saves(&self) -> Saves {
        Saves::Nothing
    }

    fn cost(&self) -> Cost {
        Cost { flops: (4 * self.o * self.c * self.r) as f64, bytes: (8 * self.o * self.c) as f64 }
    }

    fn backward(&self, _: Saved<'_>, dy: &Tensor, grads: &mut Gradients<'_>) -> Result<()> {
        with_dtype!(self.name(), dy.dtype(), T => self.gradients::<T>(dy, grads))
    }
}
