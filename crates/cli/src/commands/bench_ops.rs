//! `tallow bench ops`: single ops at the shapes of the default training step, forward and backward.

use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor, Var};
use serde_json::json;
use tallow_ops::{
    CrossEntropyOptions, Gelu, KeyRanges, RopeLayout, RopeTable, Weight, attention, backward_from, gelu, layer_norm,
    linear, linear_cross_entropy, rms_norm, rope, swiglu,
};

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
    for dtype in [DType::F32, DType::BF16] {
        for case in cases(dtype)? {
            if filter.is_some_and(|f| !case.name.contains(f)) {
                continue;
            }
            let x = random(&case.shape, dtype)?;
            let forward = time(|| tallow_ops::no_grad(|| (case.op)(&x)).map(drop))?;
            let both = time(|| {
                let x = Var::from_tensor(&x)?;
                let y = (case.op)(&x)?;
                if y.rank() == 0 { y.backward() } else { backward_from(&y, &y.detach()) }.map(drop)
            })?;
            let gflops = (case.forward_flops > 0.0).then(|| case.forward_flops / forward / 1e9);
            let gbytes = case.elements * dtype.size_in_bytes() as f64 / forward / 1e9;
            if json {
                let line = json!({
                    "op": case.name, "dtype": dtype.as_str(), "forward_ms": forward * 1e3,
                    "forward_backward_ms": both * 1e3, "gflops": gflops, "gbytes_per_s": gbytes,
                });
                println!("{line}");
            } else {
                let gflops = gflops.map_or_else(|| "      -".into(), |g| format!("{g:7.1}"));
                println!(
                    "{:24} {:>4}  forward {:8.3} ms {gflops} GFLOP/s {gbytes:7.1} GB/s   with backward {:8.3} ms",
                    case.name,
                    dtype.as_str(),
                    forward * 1e3,
                    both * 1e3
                );
            }
        }
    }
    Ok(())
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
