//! Settings of the C library's malloc, which serves all allocations of shim and VMM.

/// Minimum size, in bytes, of allocations that malloc maps separately and unmaps when they are freed.
const MMAP_THRESHOLD: libc::c_int = 64 << 10;
/// Maximum free memory, in bytes, that malloc keeps at the end of the heap.
const TRIM_THRESHOLD: libc::c_int = 128 << 10;

/// Keeps the heap of an idle process small: one arena for all threads, and freed memory goes back to the kernel early.
/// To be called before the process starts threads, because arenas that exist stay.
pub fn keep_small() {
    // SAFETY: mallopt takes numbers and takes malloc's lock, so it may be called at any time (glibc, malloc/malloc.c).
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_THRESHOLD);
    }
}
