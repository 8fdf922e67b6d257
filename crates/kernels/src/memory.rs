//! How the process keeps memory.

use std::cell::RefCell;

use half::bf16;

use crate::lanes::Element;

/// Tells the allocator to keep big buffers instead of returning them to the system at each free.
///
/// A training step allocates and frees the same large tensors again and again; glibc maps each anew by default, and the
/// page faults then cost more than the arithmetic. Call it first thing in `main`. Elsewhere than glibc it does nothing. Under
/// [`KeepLarge`](crate::allocator::KeepLarge) it is for blocks below 1 MiB.
pub fn keep_large_allocations() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const ONE_GIB: libc::c_int = 1 << 30;
        // SAFETY: mallopt only sets parameters of the allocator.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, ONE_GIB);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        }
    }
}

/// `n` values of no particular content, for a kernel that writes every one of them: zeroing them first would be one more
/// pass over memory, on one thread. In debug builds they are NaN, so that tests see one that was not written.
pub fn unspecified<T: Element>(n: usize) -> Vec<T> {
    let mut values: Vec<T> = Vec::with_capacity(n);
    let at = values.as_mut_ptr();
    // SAFETY: `n` elements are allocated at `at`. For the compiler the empty assembly block, which gets their address and
    // may write to memory, is what initialises them; any bits are a value of `Element`, which is sealed to f32 and bf16.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) at, options(nostack, preserves_flags));
        values.set_len(n);
    }
    if cfg!(debug_assertions) {
        values.fill(T::from_f32(f32::NAN));
    }
    values
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with scratch of `N` parts of the given lengths, each starting on a cache line, contents unspecified. The
/// memory stays with the thread.
pub(crate) fn with_scratch<const N: usize, R>(lens: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    let lines = lens.map(|len| len.div_ceil(16));
    // Taken out rather than borrowed: a task stolen while this one waits would find none, and make its own.
    let mut held = SCRATCH.take();
    let total = lines.iter().sum();
    if held.len() < total {
        held.resize(total, Line([0.0; 16]));
    }
    let mut rest = &mut held[..total];
    let parts = std::array::from_fn(|i| {
        let (part, after) = std::mem::take(&mut rest).split_at_mut(lines[i]);
        rest = after;
        // SAFETY: a line is 16 floats without padding.
        unsafe { std::slice::from_raw_parts_mut(part.as_mut_ptr().cast(), lens[i]) }
    });
    let result = f(parts);
    SCRATCH.set(held);
    result
}

/// The same memory as bf16, two to a float.
pub(crate) fn halves(words: &mut [f32]) -> &mut [bf16] {
    // SAFETY: a float is two bf16 without padding, and any bits are a value of either.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), 2 * words.len()) }
}

/// As [`halves`]; NaN in debug builds, so that tests see what was not written.
pub(crate) fn as_bf16(part: &mut [f32]) -> &mut [bf16] {
    if cfg!(debug_assertions) {
        part.fill(f32::NAN);
    }
    halves(part)
}
