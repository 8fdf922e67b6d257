//! Raw compute on slices, forward and backward: SIMD by run-time dispatch, threads by rayon.
