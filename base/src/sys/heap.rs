//! Settings of the C library's malloc, which serves all allocations of shim and VMM.

/// Minimum size, in bytes, of an allocation for which malloc creates a separate mapping. Freeing such an allocation
/// unmaps its memory.
const MMAP_THRESHOLD: libc::c_int = 64 << 10;
/// Maximum free memory, in bytes, that malloc keeps at the end of the heap.
const TRIM_THRESHOLD: libc::c_int = 128 << 10;

/// Keeps the heap of an idle process small. All threads use one arena, and malloc returns freed memory to the kernel
/// early. Must be called before the process starts threads, because malloc never removes an existing arena.
pub fn keep_small() {
    // SAFETY: mallopt takes no pointers and acquires malloc's lock, so it may be called at any time (glibc,
    // malloc/malloc.c).
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD);
    }
}
