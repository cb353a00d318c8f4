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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{exit_immediately, wait};

    /// Returns the number of bytes in mappings that malloc has made for single allocations.
    fn mapped_bytes() -> usize {
        // SAFETY: mallinfo2 takes no arguments. It acquires the locks of the arenas.
        unsafe { libc::mallinfo2() }.hblkhd
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no fork")]
    fn large_allocation_is_unmapped_when_it_is_freed() {
        const LEN: usize = 96 << 10;
        const ATTEMPTS: usize = 1000;
        // The test runs in a child process, so the settings of malloc do not affect other tests. The child has one
        // thread, so no other test allocates memory in it.
        // SAFETY: glibc's fork(2) takes the locks of malloc, so that the child process can use malloc.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                // When a mapped allocation is freed, malloc raises its threshold from the default (128 KiB) to the size
                // of this allocation. Afterwards, an allocation of LEN bytes is certainly in the heap.
                drop(std::hint::black_box(vec![1_u8; 1 << 20]));
                let before = mapped_bytes();
                let unmapped = std::hint::black_box(vec![1_u8; LEN]);
                let is_in_heap = mapped_bytes() == before;
                keep_small();
                // The heap may have free memory of other tests, which malloc uses first.
                let mut fillers = Vec::with_capacity(ATTEMPTS);
                let mut mapped = std::hint::black_box(vec![1_u8; LEN]);
                while mapped_bytes() == before && fillers.len() < ATTEMPTS {
                    fillers.push(std::mem::replace(&mut mapped, std::hint::black_box(vec![1_u8; LEN])));
                }
                let is_mapped = mapped_bytes() >= before + LEN;
                drop(mapped);
                let is_freed = mapped_bytes() == before;
                drop((unmapped, fillers));
                exit_immediately(i32::from(!(is_in_heap && is_mapped && is_freed)));
            }
            nix::unistd::ForkResult::Parent { child } => {
                assert_eq!(wait(child.as_raw(), 0), Ok(Some((child.as_raw(), 0))));
            }
        }
    }
}
