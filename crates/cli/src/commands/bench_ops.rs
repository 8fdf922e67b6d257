//! `tallow bench ops`: single ops at the shapes of the default training step, forward and backward.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use serde::Serialize;
use tallow_kernels::peak;
use tallow_ops::{
    CrossEntropyOptions, Gelu, KeyRanges, RopeLayout, RopeTable, Weight, attention, backward_from, gelu, layer_norm,
    linear, linear_cross_entropy, rms_norm, rope, swiglu,
};

use crate::exit;

const B: usize = 8;
const T: usize = 256;
const C: usize = 384;
const H: usize = 6;
const D: usize = 64;
const F: usize = 1024;
const V: usize = 4096;

type OpFn = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor>>;

/// An op over one tracked input: its name, the input's shape, FLOPs of a forward, and bytes per element-pass.
struct Case {
    name: &'static str,
    shape: Vec<usize>,
    forward_flops: f64,
    /// Elements read and written by a forward.
    elements: f64,
    op: OpFn,
}

/// Times every case whose name contains `filter`.
pub fn run(filter: Option<&str>, json: bool) -> anyhow::Result<()> {
    let wanted = |case: &Case| filter.is_none_or(|f| case.name.contains(f));
    if let Some(filter) = filter
        && !cases(DType::F32)?.iter().any(wanted)
    {
        let names: Vec<&str> = cases(DType::F32)?.iter().map(|case| case.name).collect();
        return Err(exit::usage(format!(
            "--filter {filter}: no op has that in its name; there are {}",
            names.join(", ")
        )));
    }
    let bandwidth = peak::bandwidth().copy;
    for dtype in [DType::F32, DType::BF16] {
        let flops = if dtype == DType::BF16 { peak::bf16_flops() } else { peak::f32_flops() };
        for case in cases(dtype)?.iter().filter(|case| wanted(case)) {
            let line = measure(case, dtype, flops, bandwidth)?;
            let mut out = std::io::stdout().lock();
            if json {
                writeln!(out, "{}", serde_json::to_string(&line)?)?;
            } else {
                let gflops = line.gflops.map_or_else(|| "      -".into(), |g| format!("{g:7.1}"));
                writeln!(
                    out,
                    "{:24} {:>4}  forward {:8.3} ms {gflops} GFLOP/s {:7.1} GB/s {:5.1}% of peak   with backward {:8.3} ms",
                    line.op,
                    line.dtype,
                    line.forward_ms,
                    line.gbytes_per_s,
                    100.0 * line.peak_fraction,
                    line.forward_backward_ms
                )?;
            }
        }
    }
    Ok(())
}

/// What one op measured.
#[derive(Serialize)]
struct Line {
    op: &'static str,
    dtype: &'static str,
    forward_ms: f64,
    forward_backward_ms: f64,
    gflops: Option<f64>,
    gbytes_per_s: f64,
    /// Of the forward: of the measured FLOP/s where the op is arithmetic, else of the measured memory bandwidth.
    peak_fraction: f64,
}

fn measure(case: &Case, dtype: DType, peak_flops: f64, peak_bytes: f64) -> anyhow::Result<Line> {
    let x = random(&case.shape, dtype)?;
    let forward = time(|| tallow_ops::no_grad(|| (case.op)(&x)).map(drop))?;
    let both = time(|| {
        let x = Var::from_tensor(&x)?;
        let y = (case.op)(&x)?;
        if y.rank() == 0 { y.backward() } else { backward_from(&y, &y.detach()) }.map(drop)
    })?;
    let flops = (case.forward_flops > 0.0).then(|| case.forward_flops / forward);
    let bytes = case.elements * dtype.size_in_bytes() as f64 / forward;
    Ok(Line {
        op: case.name,
        dtype: dtype.as_str(),
        forward_ms: forward * 1e3,
        forward_backward_ms: both * 1e3,
        gflops: flops.map(|flops| flops / 1e9),
        gbytes_per_s: bytes / 1e9,
        peak_fraction: flops.map_or(bytes / peak_bytes, |flops| flops / peak_flops),
    })
}

fn cases(dtype: DType) -> anyhow::Result<Vec<Case>> {
    let n = (B * T) as f64;
    let matmul = |d_in: usize, d_out: usize| 2.0 * n * (d_in * d_out) as f64;
    let weight = |shape: &[usize]| -> candle_core::Result<Weight> {
        Weight::trainable(random(shape, dtype)?, Tensor::zeros(shape, DType::F32, &Device::Cpu)?)
    };
    let (square, wide, back) = (weight(&[C, C])?, weight(&[F, C])?, weight(&[C, F])?);
    let (head, gain, bias) = (weight(&[V, C])?, weight(&[C])?, weight(&[C])?);
    let gain2 = gain.clone();
    let targets = Tensor::from_vec((0..B * T).map(|i| (i * 7 % V) as u32).collect(), B * T, &Device::Cpu)?;
    let inv_freq: Vec<f32> = (0..D / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / D as f32)).collect();
    let table = Arc::new(RopeTable::new(&inv_freq, T, 1.0));
    let positions: Arc<Vec<u32>> = Arc::new((0..B).flat_map(|_| 0..T as u32).collect());
    let ranges = Arc::new(KeyRanges::causal(B, T, T)?);
    let (k, v) = (random(&[B, T, H, D], dtype)?, random(&[B, T, H, D], dtype)?);
    let up = random(&[B * T, F], dtype)?;
    let case = |name, shape: &[usize], forward_flops, elements, op: OpFn| Case {
        name,
        shape: shape.to_vec(),
        forward_flops,
        elements,
        op,
    };
    let (nc, nf) = (n * C as f64, n * F as f64);
    let options = CrossEntropyOptions { scale: 1.0 / n, ..Default::default() };
    Ok(vec![
        case("linear 384x384", &[B * T, C], matmul(C, C), 2.0 * nc, Box::new(move |x| linear(x, &square, None))),
        case("linear 384x1024", &[B * T, C], matmul(C, F), nc + nf, Box::new(move |x| linear(x, &wide, None))),
        case("linear 1024x384", &[B * T, F], matmul(C, F), nc + nf, Box::new(move |x| linear(x, &back, None))),
        case(
            "linear_cross_entropy",
            &[B * T, C],
            matmul(C, V),
            nc,
            Box::new(move |x| Ok(linear_cross_entropy(x, &head, &targets, &options)?.loss)),
        ),
        case(
            "attention causal",
            &[B, T, H, D],
            2.0 * n * (T * H * D) as f64,
            4.0 * nc,
            Box::new(move |q| attention(q, &k, &v, &ranges, 0.125)),
        ),
        case("rope", &[B, T, H, D], 0.0, 2.0 * nc, Box::new(move |x| rope(x, &table, &positions, RopeLayout::Half))),
        case("rms_norm", &[B * T, C], 0.0, 2.0 * nc, Box::new(move |x| rms_norm(x, &gain, 1e-5))),
        case("layer_norm", &[B * T, C], 0.0, 2.0 * nc, Box::new(move |x| layer_norm(x, &gain2, Some(&bias), 1e-5))),
        case("swiglu", &[B * T, F], 0.0, 3.0 * nf, Box::new(move |x| swiglu(x, &up))),
        case("gelu tanh", &[B * T, F], 0.0, 2.0 * nf, Box::new(|x| gelu(x, Gelu::Tanh))),
    ])
}

/// Values in about [-1, 1], the same at each call.
fn random(shape: &[usize], dtype: DType) -> candle_core::Result<Tensor> {
    let mut values = vec![0f32; shape.iter().product()];
    tallow_ops::fill_normal(&mut values, 1, shape.len() as u64, 0.5);
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Median seconds of at least five calls and a fifth of a second, after one that does not count.
fn time(mut call: impl FnMut() -> candle_core::Result<()>) -> candle_core::Result<f64> {
    call()?;
    let begin = Instant::now();
    let mut times = vec![];
    while times.len() < 5 || begin.elapsed().as_secs_f64() < 0.2 {
        let start = Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
