//! An allocator for the process: large blocks are kept and used again.
//!
//! A training step allocates and frees the same large tensors again and again. The C library returns them to the system, above
//! 64 MiB always on any thread but the first, and the page faults then cost as much as the arithmetic; smaller ones it cuts
//! from one heap, where gaps remain between buffers of different sizes. Here a freed block waits for the next request of its
//! class of sizes (64 from a power of two to the next, of whole 64 KiB). What is mapped never exceeds what was mapped for blocks in use at
//! once, but does not sink below that again; pages are huge where the system allows.

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
// SAFETY: small blocks are the system's; large ones are mapped by `large` for whoever asked, on a cache line and at least as long,
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
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// The size from which on a block is large.
    const LARGE: usize = 1 << 20;
    /// Sizes are multiples of it: a multiple of every page size.
    const PAGE: usize = 1 << 16;
    /// The smallest page. Blocks begin on different lines of theirs: passes over several of them would otherwise meet in the same
    /// sets of the first cache.
    const SMALL_PAGE: usize = 4096;
    /// A cache line: the largest alignment that every block has.
    const LINE: usize = 64;
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
        layout.size() >= LARGE && layout.align() <= LINE
    }

    /// The size of the mapping that a request gets: that of its class, with room to begin anywhere on its first page.
    pub(super) fn rounded(size: usize) -> usize {
        let Some(size) = size.checked_add(SMALL_PAGE) else { return size };
        let step = ((1 << size.ilog2()) / 64).max(PAGE);
        size.checked_next_multiple_of(step).unwrap_or(size)
    }

    impl Kept {
        /// The waiting block of this size that was freed last.
        fn take(&mut self, size: usize) -> Option<Block> {
            let waiting = self.blocks[..self.len].iter().enumerate().filter(|(_, block)| block.size == size);
            let (index, _) = waiting.max_by_key(|(_, block)| block.freed)?;
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
            kept.lend(size);
            return Some((block.at as *mut u8, false));
        }
        while let Some(block) = kept.too_many(size) {
            unmap(block.at, block.size);
        }
        let at = map_block(size).or_else(|| {
            // The system has no more: what waits is given back.
            while kept.len > 0 {
                let last = kept.len - 1;
                let block = kept.remove(last);
                unmap(block.at, block.size);
            }
            map_block(size)
        })?;
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
        let offset = at as usize % SMALL_PAGE;
        // SAFETY: the block is in one mapping of its holder's, `from` bytes long, at the start of its first page.
        let moved = unsafe { libc::mremap(at.sub(offset).cast(), from, to, libc::MREMAP_MAYMOVE) };
        if moved == libc::MAP_FAILED {
            return None;
        }
        kept.used -= from;
        kept.lend(to);
        if to >= 2 * HUGE {
            advise(moved as usize, to);
        }
        Some(moved.cast::<u8>().wrapping_add(offset))
    }

    /// A mapping of `size` bytes; the place on its first page at which its block begins.
    fn map_block(size: usize) -> Option<usize> {
        static MAPPED: AtomicUsize = AtomicUsize::new(0);
        // Odd, so that all lines have their turn, and far from one to the next.
        const STRIDE: usize = 25;
        let line = MAPPED.fetch_add(1, Ordering::Relaxed) * STRIDE % (SMALL_PAGE / LINE);
        map(size).map(|at| at + line * LINE)
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
        advise(start, size);
        Some(start)
    }

    /// Asks for huge pages.
    fn advise(at: usize, size: usize) {
        // SAFETY: advice on a mapping of ours; where it is not taken, nothing is lost.
        unsafe { libc::madvise(at as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
    }

    /// Of a block or of part of a mapping.
    fn unmap(at: usize, size: usize) {
        let at = at / SMALL_PAGE * SMALL_PAGE;
        if size > 0 {
            // SAFETY: whole pages of a mapping of ours that nobody has.
            unsafe { libc::munmap(at as *mut libc::c_void, size) };
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
#[allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 64).unwrap_or(Layout::new::<u8>())
    }

    /// One test, in turn: the kept blocks are the process's.
    #[test]
    fn blocks_are_kept_resized_and_zeroed_and_never_shared() {
        classes();
        one_thread();
        many_threads();
    }

    fn classes() {
        for size in [MIB, MIB + 1, 3 * MIB - 1, 3 * MIB, 5 * MIB + 1, 102_926_336, usize::MAX / 4] {
            let block = large::rounded(size);
            let most = (size / 64).max(1 << 16) + 4096;
            assert!(block - size >= 4096 && block - size <= most, "{size} {block}");
            assert_eq!(block, large::rounded(block - 4096), "{size}");
            assert!(block.is_multiple_of(1 << 16), "{size} {block}");
        }
        assert_ne!(large::rounded(32 * MIB), large::rounded(31 * MIB));
    }

    fn one_thread() {
        let all = KeepLarge;
        // SAFETY: each block is used within its size and given back once, with its layout.
        unsafe {
            let first = all.alloc(layout(5 * MIB + 1));
            assert!(!first.is_null() && first.addr().is_multiple_of(64));
            first.write_bytes(7, 5 * MIB + 1);
            all.dealloc(first, layout(5 * MIB + 1));
            // The same class gets it again, and zeroed means zeroed.
            let again = all.alloc_zeroed(layout(5 * MIB + 9));
            assert_eq!(again, first);
            assert!((0..5 * MIB + 9).all(|i| *again.add(i) == 0));
            // Another size does not.
            let other = all.alloc(layout(9 * MIB));
            assert_ne!(other.addr() % 4096, first.addr() % 4096, "blocks begin on different lines of a page");
            other.write_bytes(1, 9 * MIB);
            again.write_bytes(3, 5 * MIB);
            let grown = all.realloc(again, layout(5 * MIB + 9), 20 * MIB);
            assert!((0..5 * MIB).all(|i| *grown.add(i) == 3) && (0..9 * MIB).all(|i| *other.add(i) == 1));
            grown.add(5 * MIB).write_bytes(4, 15 * MIB);
            let shrunk = all.realloc(grown, layout(20 * MIB), 10 * MIB);
            assert!((0..10 * MIB).all(|i| *shrunk.add(i) == if i < 5 * MIB { 3 } else { 4 }));
            // Across the border between large and small, both ways.
            let small = all.realloc(shrunk, layout(10 * MIB), 1000);
            assert!((0..1000).all(|i| *small.add(i) == 3));
            let large = all.realloc(small, layout(1000), 3 * MIB);
            assert!((0..1000).all(|i| *large.add(i) == 3));
            all.dealloc(large, layout(3 * MIB));
            all.dealloc(other, layout(9 * MIB));
            // Alignments beyond a line are the system's.
            let aligned = Layout::from_size_align(2 * MIB, 8192).unwrap();
            let at = all.alloc(aligned);
            assert!(at.addr().is_multiple_of(8192));
            all.dealloc(at, aligned);
        }
    }

    fn many_threads() {
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
