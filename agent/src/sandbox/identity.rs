//! Replaces what a guest has in common with the other guests of its template.
//!
//! The VMM gives each guest another VM Generation ID, from which the kernel's random number generator is seeded. Setup
//! also adds entropy of the host, sets the clock and the host name. The interfaces are plugged in later. Nothing has
//! read `boot_id` yet, which the kernel makes when it is first read (`proc_do_uuid()` in drivers/char/random.c).

use std::fs::File;
use std::io::{self, Read};

/// Number of random bytes from the hypervisor that the guest's kernel can hold: 64 in `rng_buffer` of
/// drivers/char/hw_random/core.c, and 64 in `struct virtrng_info` of virtio-rng.c. A few more are dropped, in case a
/// kernel has larger buffers.
const HELD: usize = 256;

/// Gives the guest random numbers of its own. Blocks until the hypervisor has sent some.
///
/// # Errors
/// If there is no entropy, or if the kernel does not accept it. The guest would have the random numbers of the template.
pub fn renew(entropy: &[u8]) -> io::Result<()> {
    if entropy.is_empty() {
        return Err(io::Error::other("the host has sent no entropy"));
    }
    husk_base::entropy::credit(entropy)?;
    drop_random_bytes()
}

/// Drops the hypervisor's random bytes that the kernel holds and that no reader has got. They are in the template, and
/// all its guests would read the same ones. Blocks until the hypervisor has sent others.
///
/// # Errors
/// If `/dev/hwrng` cannot be read.
pub fn drop_random_bytes() -> io::Result<()> {
    File::open("/dev/hwrng")?.read_exact(&mut [0; HELD])
}
