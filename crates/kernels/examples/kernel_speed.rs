//! Times attention, norms and SwiGLU.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test stops at the first surprise")]
use tallow_kernels::four_bit::{FourBit, Kind};
use tallow_kernels::lanes::Element;
use tallow_kernels::{activation, attention::*, norm, rng, simd};
fn now() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `t` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}
fn best(mut f: impl FnMut()) -> f64 {
    f();
    let mut b = f64::MAX;
    for _ in 0..9 {
        let t = now();
        f();
        b = b.min(now() - t);
    }
    b
}
fn random<T: Element>(n: usize, s: u64) -> Vec<T> {
    let mut v = vec![0.0; n];
    rng::fill_normal(&mut v, 1, s, 1.0);
    v.into_iter().map(T::from_f32).collect()
}
fn attn<T: Element>(level: simd::Level, b: usize, t: usize, h: usize, g: usize, d: usize) {
    let sizes = Sizes { b, tq: t, tk: t, h, g, d };
    let n = b * t * h * d;
    let m = b * t * g * d;
    let (q, k, v, dout) = (random::<T>(n, 1), random::<T>(m, 2), random::<T>(m, 3), random::<T>(n, 4));
    let lo = vec![0; b * t];
    let hi: Vec<u32> = (0..b).flat_map(|_| 1..=t as u32).collect();
    let inputs = Inputs {
        sizes,
        q: Heads::contiguous(&q, [b, t, h, d]).unwrap(),
        k: Heads::contiguous(&k, [b, t, g, d]).unwrap(),
        v: Heads::contiguous(&v, [b, t, g, d]).unwrap(),
        lo: &lo,
        hi: &hi,
        scale: 0.125,
    };
    let (mut out, mut lse) = (vec![T::ZERO; n], vec![0.0; b * h * t]);
    let (mut dq, mut dk, mut dv) = (vec![T::ZERO; n], vec![T::ZERO; m], vec![T::ZERO; m]);
    let pairs = (b * h) as f64 * (t as f64 * (t + 1) as f64 / 2.0);
    let flop = 4.0 * pairs * d as f64;
    let fwd = best(|| attention_forward(level, &inputs, &mut out, &mut lse));
    let bwd = best(|| {
        let saved = Saved {
            out: Heads::contiguous(&out, [b, t, h, d]).unwrap(),
            dout: Heads::contiguous(&dout, [b, t, h, d]).unwrap(),
            lse: &lse,
        };
        attention_backward(level, &inputs, &saved, &mut dq, &mut dk, &mut dv)
    });
    println!(
        "{level:?} {} b{b} t{t} h{h} g{g} d{d}: fwd {:.2} ms {:.0} GF/s, bwd {:.2} ms {:.0} GF/s, both {:.0}",
        std::any::type_name::<T>(),
        fwd * 1e3,
        flop / fwd / 1e9,
        bwd * 1e3,
        2.5 * flop / bwd / 1e9,
        3.5 * flop / (fwd + bwd) / 1e9
    );
}
fn four_bit<T: Element>() {
    let (rows, c) = (1024, 4096);
    let x = random::<T>(rows * c, 1);
    // Once into the cache, a tile of rows at a time, and once into memory.
    for (l, tile) in [simd::Level::Avx512, simd::Level::Avx2, simd::Level::Scalar].map(|l| [(l, 8), (l, rows)]).concat()
    {
        let mut four = None;
        let t = best(|| four = FourBit::quantize(l, &x, &[rows, c], Kind::Nf4, 64, true).ok());
        let four = four.unwrap();
        let mut out = vec![T::ZERO; tile * c];
        let back = best(|| (0..rows / tile).for_each(|i| four.dequantize_rows(l, i * tile..(i + 1) * tile, &mut out)));
        let gb = (rows * c * size_of::<T>()) as f64 / 1e9;
        println!(
            "nf4 {} {l:?}, tiles of {tile} rows: quantize {:.2} GB/s, dequantize {:.2} GB/s of output a thread",
            std::any::type_name::<T>(),
            gb / t,
            gb / back
        );
    }
}
fn main() {
    let level = simd::level();
    if let Some(w) = std::env::args().nth(1) {
        for _ in 0..12 {
            match w.as_str() {
                "a" => attn::<f32>(level, 8, 256, 6, 6, 64),
                _ => attn::<f32>(level, 1, 2048, 6, 6, 64),
            }
        }
        return;
    }
    // peak: fma loop through a product tile is what the attention uses; the machine's f32 ceiling is measured by doctor.
    for l in [simd::Level::Avx512, simd::Level::Avx2, simd::Level::Scalar] {
        attn::<f32>(l, 8, 256, 6, 6, 64);
    }
    attn::<half::bf16>(level, 8, 256, 6, 6, 64);
    for (t, h, g, d) in [(2048, 6, 6, 64), (2048, 6, 2, 128), (1024, 4, 4, 80)] {
        attn::<f32>(level, 1, t, h, g, d);
        attn::<half::bf16>(level, 1, t, h, g, d);
    }
    attn::<f32>(simd::Level::Avx2, 1, 2048, 6, 6, 64);
    attn::<f32>(level, 1, 8192, 2, 2, 128);
    let (rows, c) = (2048, 384);
    let x = random::<f32>(rows * c, 1);
    let w = vec![1.0; c];
    let mut y = vec![0.0; rows * c];
    let mut dx = y.clone();
    let mut r = vec![0.0; rows];
    let mut dw = vec![0.0; c];
    let t = best(|| norm::rms_norm(level, &x, &w, 1e-5, &mut y, &mut r));
    println!("rms_norm fwd {:.0} us {:.1} GB/s", t * 1e6, 8.0 * (rows * c) as f64 / t / 1e9);
    let t = best(|| norm::norm_backward(level, &x, &w, &y, norm::Stats::Rms(&r), Some(&mut dx), Some(&mut dw), None));
    println!("rms_norm bwd {:.0} us {:.1} GB/s", t * 1e6, 12.0 * (rows * c) as f64 / t / 1e9);
    let n = 2048 * 1024;
    let (g, u) = (random::<f32>(n, 1), random::<f32>(n, 2));
    let (mut y, mut dg, mut du) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
    let t = best(|| activation::swiglu(level, &g, &u, &mut y));
    println!("swiglu fwd {:.0} us {:.1} GB/s", t * 1e6, 12.0 * n as f64 / t / 1e9);
    let t = best(|| activation::swiglu_backward(level, &g, &u, &y, &mut dg, &mut du));
    println!("swiglu bwd {:.0} us {:.1} GB/s", t * 1e6, 20.0 * n as f64 / t / 1e9);
    let t = best(|| activation::activation(level, activation::Activation::GeluExact, &g, &mut y));
    println!("gelu fwd {:.0} us {:.1} GB/s", t * 1e6, 8.0 * n as f64 / t / 1e9);
    let mask =
        tallow_kernels::dropout::Mask { key: [1, 2], counter: [0, 0], offset: 0, threshold: 1 << 29, scale: 1.1 };
    let t = best(|| tallow_kernels::dropout::dropout(level, mask, &g, &mut y));
    println!("dropout fwd {:.0} us {:.1} GB/s", t * 1e6, 8.0 * n as f64 / t / 1e9);
    let t = best(|| rng::fill_normal(&mut y, 1, 2, 1.0));
    println!("fill_normal {:.0} us {:.1} M/s", t * 1e6, n as f64 / t / 1e6);
    four_bit::<f32>();
    four_bit::<half::bf16>();
    let (b, tk, h, g, d) = (1, 4096, 6, 2, 64);
    let (q, k, v) = (random::<f32>(h * d, 1), random::<f32>(tk * g * d, 2), random::<f32>(tk * g * d, 3));
    let inputs = Inputs {
        sizes: Sizes { b, tq: 1, tk, h, g, d },
        q: Heads::contiguous(&q, [b, 1, h, d]).unwrap(),
        k: Heads::contiguous(&k, [b, tk, g, d]).unwrap(),
        v: Heads::contiguous(&v, [b, tk, g, d]).unwrap(),
        lo: &[0],
        hi: &[tk as u32],
        scale: 0.125,
    };
    let (mut out, mut lse) = (vec![0.0f32; h * d], vec![0.0; h]);
    let t = best(|| attention_forward(level, &inputs, &mut out, &mut lse));
    println!(
        "decode tk4096 h6 g2 d64: {:.0} us {:.1} GB/s of keys and values",
        t * 1e6,
        (8 * tk * g * d) as f64 / t / 1e9
    );
}
