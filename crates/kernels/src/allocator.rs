//! An allocator for the process: large blocks are kept and used again.
//!
//! A training step allocates and frees the same large tensors again and again. The C library returns them to the system (above
//! 64 MiB always, on any thread but the first), and the page faults then cost as much as the arithmetic, or cuts them from
//! one heap, where gaps remain between buffers of different sizes. Here a freed block waits for the next request of its
//! size; what is mapped never exceeds what was in use at once, and pages are huge where the system allows.

use std::alloc::{GlobalAlloc, Layout, System};

/// The allocator of a binary: `#[global_allocator] static ALLOCATOR: KeepLarge = KeepLarge;`. Elsewhere than on Linux it is
/// the system's own.
pub struct KeepLarge;

#[cfg(not(target_os = "linux"))]
// SAFETY: the system's own.
unsafe impl GlobalAlloc for KeepLarge {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[cfg(target_os = "linux")]
// SAFETY: small blocks are the system's; large ones are mapped by `large` for whoever asked, page-aligned and at least as long,
// and the size in their layout tells which is which when they come back.
unsafe impl GlobalAlloc for KeepLarge {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match large::is(layout) {
            true => large::allocate(layout.size()).map_or(std::ptr::null_mut(), |(at, _)| at),
            // SAFETY: the caller's promise.
            false => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !large::is(layout) {
            // SAFETY: the caller's promise.
            return unsafe { System.alloc_zeroed(layout) };
        }
        let Some((at, fresh)) = large::allocate(layout.size()) else { return std::ptr::null_mut() };
        if !fresh {
            // SAFETY: the block is at least this long, and nobody else has it.
            unsafe { at.write_bytes(0, layout.size()) };
        }
        at
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        match large::is(layout) {
            true => large::free(at, layout.size()),
            // SAFETY: the caller's promise: it came from there.
            false => unsafe { System.dealloc(at, layout) },
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller vouches for the layout; only its size changes.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (large::is(layout), large::is(new)) {
            // SAFETY: the caller's promise: it came from there.
            (false, false) => unsafe { System.realloc(at, layout, size) },
            (true, true) if large::rounded(layout.size()) == large::rounded(size) => at,
            (true, true) if let Some(moved) = large::resize(at, layout.size(), size) => moved,
            // SAFETY: both blocks are as long as the shorter of the two, and are different ones.
            _ => unsafe {
                let moved = self.alloc(new);
                if !moved.is_null() {
                    std::ptr::copy_nonoverlapping(at, moved, layout.size().min(size));
                    self.dealloc(at, layout);
                }
                moved
            },
        }
    }
}

#[cfg(target_os = "linux")]
mod large {
    use std::alloc::Layout;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// The size from which on a block is large.
    const LARGE: usize = 1 << 20;
    /// Sizes are multiples of it.
    const PAGE: usize = 4096;
    /// A huge page.
    const HUGE: usize = 2 << 20;
    /// Blocks that can wait at once.
    const SLOTS: usize = 1024;

    /// Blocks that nobody has now, and sums of bytes.
    struct Kept {
        blocks: [Block; SLOTS],
        len: usize,
        /// In use now, and at most so far.
        used: usize,
        peak: usize,
        waiting: usize,
        /// Counts what is freed: the oldest goes first.
        clock: u64,
    }

    #[derive(Clone, Copy)]
    struct Block {
        at: usize,
        size: usize,
        freed: u64,
    }

    static KEPT: Mutex<Kept> = Mutex::new(Kept {
        blocks: [Block { at: 0, size: 0, freed: 0 }; SLOTS],
        len: 0,
        used: 0,
        peak: 0,
        waiting: 0,
        clock: 0,
    });

    fn kept() -> MutexGuard<'static, Kept> {
        KEPT.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is(layout: Layout) -> bool {
        layout.size() >= LARGE && layout.align() <= PAGE
    }

    /// The size of the block that a request gets.
    pub(super) fn rounded(size: usize) -> usize {
        size.next_multiple_of(PAGE)
    }

    impl Kept {
        /// A waiting block of this size, or one that is hardly larger.
        fn take(&mut self, size: usize) -> Option<Block> {
            let fits = |block: &Block| block.size >= size && block.size - size <= size / 16;
            let waiting = self.blocks[..self.len].iter().enumerate().filter(|(_, block)| fits(block));
            let (index, _) = waiting.min_by_key(|(_, block)| (block.size, u64::MAX - block.freed))?;
            Some(self.remove(index))
        }

        fn remove(&mut self, index: usize) -> Block {
            let block = self.blocks[index];
            self.len -= 1;
            self.blocks[index] = self.blocks[self.len];
            self.waiting -= block.size;
            block
        }

        /// Takes the block that has waited longest out, if with `more` bytes in use more than ever would be mapped.
        fn too_many(&mut self, more: usize) -> Option<Block> {
            if self.len == 0 || self.used + self.waiting + more <= self.peak.max(self.used + more) {
                return None;
            }
            let (index, _) = self.blocks[..self.len].iter().enumerate().min_by_key(|(_, block)| block.freed)?;
            Some(self.remove(index))
        }

        fn lend(&mut self, size: usize) {
            self.used += size;
            self.peak = self.peak.max(self.used);
        }
    }

    /// A block of at least `size` bytes, and whether it is new, and so zero.
    pub(super) fn allocate(size: usize) -> Option<(*mut u8, bool)> {
        let size = rounded(size);
        let mut kept = kept();
        if let Some(block) = kept.take(size) {
            // What it is longer goes back, so that the size in a layout is the size of the block.
            if block.size > size {
                unmap(block.at + size, block.size - size);
            }
            kept.lend(size);
            return Some((block.at as *mut u8, false));
        }
        while let Some(block) = kept.too_many(size) {
            unmap(block.at, block.size);
        }
        let at = map(size)?;
        kept.lend(size);
        Some((at as *mut u8, true))
    }

    pub(super) fn free(at: *mut u8, size: usize) {
        let block = Block { at: at as usize, size: rounded(size), freed: 0 };
        let mut kept = kept();
        kept.used -= block.size;
        if kept.len == SLOTS {
            unmap(block.at, block.size);
            return;
        }
        kept.clock += 1;
        let index = kept.len;
        kept.blocks[index] = Block { freed: kept.clock, ..block };
        kept.len += 1;
        kept.waiting += block.size;
    }

    /// Moves pages instead of bytes.
    pub(super) fn resize(at: *mut u8, from: usize, to: usize) -> Option<*mut u8> {
        let (from, to) = (rounded(from), rounded(to));
        let mut kept = kept();
        while let Some(block) = kept.too_many(to.saturating_sub(from)) {
            unmap(block.at, block.size);
        }
        // SAFETY: the block is one mapping of its holder's, `from` bytes long.
        let moved = unsafe { libc::mremap(at.cast(), from, to, libc::MREMAP_MAYMOVE) };
        if moved == libc::MAP_FAILED {
            return None;
        }
        kept.used -= from;
        kept.lend(to);
        Some(moved.cast())
    }

    fn map(size: usize) -> Option<usize> {
        // Room to begin on a huge page.
        let room = if size >= 2 * HUGE { size.checked_add(HUGE)? } else { size };
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping touches nothing else.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), room, access, kind, -1, 0) };
        if at == libc::MAP_FAILED {
            return None;
        }
        let at = at as usize;
        if room == size {
            return Some(at);
        }
        let start = at.next_multiple_of(HUGE);
        unmap(at, start - at);
        unmap(start + size, at + room - start - size);
        // SAFETY: advice on a mapping that was just made; where it is not taken, nothing is lost.
        unsafe { libc::madvise(start as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
        Some(start)
    }

    fn unmap(at: usize, size: usize) {
        if size > 0 {
            // SAFETY: whole pages of a mapping of ours that nobody has.
            unsafe { libc::munmap(at as *mut libc::c_void, size) };
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 64).unwrap_or(Layout::new::<u8>())
    }

    /// One test: the kept blocks are the process's.
    #[test]
    fn blocks_are_kept_resized_and_zeroed() {
        let all = KeepLarge;
        // SAFETY: each block is used within its size and given back once, with its layout.
        unsafe {
            let first = all.alloc(layout(5 * MIB + 1));
            assert!(!first.is_null() && first.addr().is_multiple_of(4096));
            first.write_bytes(7, 5 * MIB + 1);
            all.dealloc(first, layout(5 * MIB + 1));
            // The same size gets it again, and zeroed means zeroed.
            let again = all.alloc_zeroed(layout(5 * MIB + 9));
            assert_eq!(again, first);
            assert!((0..5 * MIB + 9).all(|i| *again.add(i) == 0));
            // Another size does not.
            let other = all.alloc(layout(9 * MIB));
            other.write_bytes(1, 9 * MIB);
            again.write_bytes(3, 5 * MIB);
            let grown = all.realloc(again, layout(5 * MIB + 9), 20 * MIB);
            assert!((0..5 * MIB).all(|i| *grown.add(i) == 3) && (0..9 * MIB).all(|i| *other.add(i) == 1));
            grown.add(5 * MIB).write_bytes(4, 15 * MIB);
            // Across the border between large and small, both ways.
            let small = all.realloc(grown, layout(20 * MIB), 1000);
            assert!((0..1000).all(|i| *small.add(i) == 3));
            let large = all.realloc(small, layout(1000), 3 * MIB);
            assert!((0..1000).all(|i| *large.add(i) == 3));
            all.dealloc(large, layout(3 * MIB));
            all.dealloc(other, layout(9 * MIB));
        }
    }

    #[test]
    fn threads_never_share_a_block() {
        std::thread::scope(|scope| {
            for id in 0..8u8 {
                scope.spawn(move || {
                    for round in 0..200usize {
                        let size = MIB + (round * 37 + usize::from(id) * 11) % 5 * 300_000;
                        // SAFETY: as above.
                        unsafe {
                            let block = KeepLarge.alloc(layout(size));
                            block.write_bytes(id, size);
                            std::thread::yield_now();
                            assert!((0..size).step_by(511).all(|i| *block.add(i) == id));
                            KeepLarge.dealloc(block, layout(size));
                        }
                    }
                });
            }
        });
    }
}
