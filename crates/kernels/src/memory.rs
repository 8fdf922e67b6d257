//! How the process keeps memory.

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
