//! Interim: composed versions until the kernels land. Deleted then.
#![allow(missing_docs, clippy::all)]
use crate::Weight;
use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor};

fn add_to(slot: &Tensor, g: &Tensor) -> Result<()> {
    let sum = (slot + g.to_dtype(DType::F32)?.reshape(slot.shape())?)?.flatten_all()?;
    let s = slot.flatten_all()?;
    s.slice_set(&sum, 0, 0)
}
struct Op {
    y: Tensor,
    bwd: Box<dyn Fn(&Tensor) -> Result<Option<Tensor>> + Send + Sync>,
}
impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "interim"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let v = self.y.flatten_all()?;
        let s = match self.y.dtype() {
            DType::F32 => CpuStorage::F32(v.to_vec1()?),
            _ => CpuStorage::BF16(v.to_vec1()?),
        };
        Ok((s, self.y.shape().clone()))
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = (self.bwd)(&g.detach())?;
        Ok((if x.track_op() { dx } else { None }, None))
    }
}
fn record(
    x: &Tensor,
    w: &Weight,
    y: Tensor,
    bwd: Box<dyn Fn(&Tensor) -> Result<Option<Tensor>> + Send + Sync>,
) -> Result<Tensor> {
    match w.anchor() {
        Some(a) => x.apply_op2(a, Op { y, bwd }),
        None if x.track_op() => x.apply_op2(&Tensor::zeros(1, DType::F32, x.device())?, Op { y, bwd }),
        None => Ok(y),
    }
}
pub fn linear(x: &Tensor, w: &Weight, b: Option<&Weight>) -> Result<Tensor> {
    let (xd, wd) = (x.detach(), w.value().detach());
    let c = x.dim(D::Minus1)?;
    let n = x.elem_count() / c;
    let x2 = xd.reshape((n, c))?;
    let mut y = x2.matmul(&wd.t()?)?;
    if let Some(b) = b {
        y = y.broadcast_add(&b.value().detach())?;
    }
    let mut dims = x.dims().to_vec();
    *dims.last_mut().unwrap() = wd.dim(0)?;
    let y = y.reshape(dims)?;
    let o = wd.dim(0)?;
    let (w2, b2) = (w.clone(), b.cloned());
    let shape = x.shape().clone();
    record(
        x,
        w,
        y,
        Box::new(move |g| {
            let g = g.reshape((n, o))?;
            if let Some(s) = w2.grad() {
                add_to(s, &g.t()?.matmul(&x2)?)?;
            }
            if let Some(s) = b2.as_ref().and_then(|b| b.grad()) {
                add_to(s, &g.to_dtype(DType::F32)?.sum(0)?)?;
            }
            Ok(Some(g.matmul(&wd)?.reshape(&shape)?))
        }),
    )
}
pub fn embedding(ids: &Tensor, w: &Weight) -> Result<Tensor> {
    let flat = ids.flatten_all()?;
    let y = w.value().detach().index_select(&flat, 0)?;
    let mut dims = ids.dims().to_vec();
    dims.push(w.value().dim(1)?);
    let (w2, c) = (w.clone(), w.value().dim(1)?);
    record(
        ids,
        w,
        y.reshape(dims)?,
        Box::new(move |g| {
            if let Some(s) = w2.grad() {
                let g = g.reshape(((), c))?.to_dtype(DType::F32)?;
                add_to(s, &s.zeros_like()?.index_add(&flat, &g, 0)?)?;
            }
            Ok(None)
        }),
    )
}
pub const IGNORE_INDEX: u32 = u32::MAX;
#[derive(Clone, Debug)]
pub struct CrossEntropyOptions {
    pub scale: f64,
    pub z_loss: f64,
    pub ignore_index: u32,
    pub chunk: Option<usize>,
}
impl Default for CrossEntropyOptions {
    fn default() -> Self {
        Self { scale: 1.0, z_loss: 0.0, ignore_index: IGNORE_INDEX, chunk: None }
    }
}
pub struct CrossEntropy {
    pub loss: Tensor,
    pub nll_sum: f64,
    pub num_targets: usize,
}
pub fn linear_cross_entropy(x: &Tensor, w: &Weight, targets: &Tensor, o: &CrossEntropyOptions) -> Result<CrossEntropy> {
    let xd = x.detach();
    let wd = w.value().detach();
    let logits = xd.matmul(&wd.t()?)?.to_dtype(DType::F32)?;
    let (n, v) = logits.dims2()?;
    let t = targets.to_vec1::<u32>()?;
    let l = logits.to_vec2::<f32>()?;
    let mut d = vec![0f32; n * v];
    let (mut nll, mut num) = (0f64, 0);
    for i in 0..n {
        if t[i] == o.ignore_index {
            continue;
        }
        let m = l[i].iter().cloned().fold(f32::MIN, f32::max);
        let s: f64 = l[i].iter().map(|&a| ((a - m) as f64).exp()).sum();
        let lse = m as f64 + s.ln();
        nll += lse - l[i][t[i] as usize] as f64;
        num += 1;
        for j in 0..v {
            d[i * v + j] = ((((l[i][j] as f64) - lse).exp() - (j == t[i] as usize) as u8 as f64) * o.scale) as f32;
        }
    }
    let d = Tensor::from_vec(d, (n, v), x.device())?.to_dtype(x.dtype())?;
    if w.anchor().is_some() {
        if let Some(s) = w.grad() {
            add_to(s, &d.t()?.matmul(&xd)?)?;
        }
    }
    let dx = d.matmul(&wd)?;
    let y = Tensor::new((nll * o.scale) as f32, x.device())?;
    let loss = record(x, w, y, Box::new(move |_| Ok(Some(dx.clone()))))?;
    Ok(CrossEntropy { loss, nll_sum: nll, num_targets: num })
}
pub fn cross_entropy_workspace(tokens: usize, vocab: usize) -> usize {
    tokens * vocab * 8
}
pub struct TopLogprobs {
    pub target: f32,
    pub top: Vec<(u32, f32)>,
}
pub fn logprobs_top(x: &Tensor, w: &Weight, targets: &[u32], k: usize) -> Result<Vec<TopLogprobs>> {
    let l = x.detach().matmul(&w.value().detach().t()?)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    Ok(l.iter()
        .zip(targets)
        .map(|(r, &t)| {
            let m = r.iter().cloned().fold(f32::MIN, f32::max);
            let lse = m as f64 + r.iter().map(|&a| ((a - m) as f64).exp()).sum::<f64>().ln();
            let mut ix: Vec<usize> = (0..r.len()).collect();
            ix.sort_by(|&a, &b| r[b].total_cmp(&r[a]));
            TopLogprobs {
                target: (r[t as usize] as f64 - lse) as f32,
                top: ix[..k.min(r.len())].iter().map(|&i| (i as u32, (r[i] as f64 - lse) as f32)).collect(),
            }
        })
        .collect())
}
pub struct AdamWBuckets<'a> {
    pub master: &'a Tensor,
    pub grad: &'a Tensor,
    pub m: &'a Tensor,
    pub v: &'a Tensor,
    pub compute: Option<&'a Tensor>,
}
#[derive(Clone, Debug)]
pub struct AdamWParams {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub step: u64,
    pub grad_scale: f64,
}
pub fn adamw_step(s: AdamWBuckets, r: std::ops::Range<usize>, p: &AdamWParams) -> Result<()> {
    let cut = |t: &Tensor| t.narrow(0, r.start, r.len());
    let g = (cut(s.grad)? * p.grad_scale)?;
    let m = ((cut(s.m)? * p.beta1)? + (&g * (1. - p.beta1))?)?;
    let v = ((cut(s.v)? * p.beta2)? + (g.sqr()? * (1. - p.beta2))?)?;
    let (c1, c2) = (1. - p.beta1.powi(p.step as i32), 1. - p.beta2.powi(p.step as i32));
    let den = ((v.sqrt()? / c2.sqrt())? + p.eps)?;
    let w = ((cut(s.master)? * (1. - p.lr * p.weight_decay))? - ((&m / den)? * (p.lr / c1))?)?;
    s.m.slice_set(&m, 0, r.start)?;
    s.v.slice_set(&v, 0, r.start)?;
    s.master.slice_set(&w, 0, r.start)?;
    s.grad.slice_set(&g.zeros_like()?, 0, r.start)?;
    if let Some(c) = s.compute {
        c.slice_set(&w.to_dtype(DType::BF16)?, 0, r.start)?;
    }
    Ok(())
}
pub fn global_sq_norm(t: &Tensor) -> Result<f64> {
    Ok(t.to_vec1::<f32>()?.iter().map(|&x| (x as f64).powi(2)).sum())
}
pub fn fill_zero(t: &Tensor) -> Result<()> {
    t.slice_set(&t.zeros_like()?, 0, 0)
}
pub fn cast_to_bf16(src: &Tensor, dst: &Tensor) -> Result<()> {
    dst.slice_set(&src.to_dtype(DType::BF16)?, 0, 0)
}
