//! Raw compute on slices, forward and backward as plain functions.
//!
//! For: the arithmetic of every op of Tallow on the CPU, chosen at run time for the machine, threaded by rayon.
//! Not for: tensors, autograd or models (see `tallow-ops`). Nothing here allocates a result unless its name says so:
//! callers pass output slices.
//!
//! Almost all `unsafe` of the project lives in this crate. Each function is tested against a scalar `f64` reference over
//! odd sizes and unaligned slices.
//!
//! ```
//! use tallow_kernels::{activation, simd};
//!
//! let (gate, up) = ([1.0f32, -2.0, 0.0], [3.0f32, 1.0, 5.0]);
//! let mut out = [0.0; 3];
//! activation::swiglu(simd::level(), &gate, &up, &mut out);
//! assert!((out[0] - 3.0 / (1.0 + (-1f32).exp())).abs() < 1e-6);
//! assert_eq!(out[2], 0.0);
//! ```

pub mod activation;
pub mod adamw;
pub mod allocator;
mod amx;
pub mod attention;
pub mod cross_entropy;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod four_bit;
pub mod gemm;
pub mod lanes;
pub mod memory;
pub mod norm;
pub mod peak;
pub mod reduce;
pub mod rng;
pub mod rope;
pub mod simd;
mod turn;
