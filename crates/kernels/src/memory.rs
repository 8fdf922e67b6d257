//! How the process keeps memory.

use crate::lanes::Element;

/// Tells the allocator to keep big buffers instead of returning them to the system at each free.
///
/// A training step allocates and frees the same large tensors again and again; glibc maps each anew by default, and the
/// page faults then cost more than the arithmetic. Call it first thing in `main`. Elsewhere than glibc it does nothing.
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
