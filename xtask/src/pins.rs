//! The Debian release and the packages that several steps have to agree on.

/// The Debian release of the test node and the images: the one with containerd 1.7 and a 6.12 kernel.
pub const RELEASE: &str = "trixie";
/// The Debian package with the source of the guest kernel.
pub const KERNEL_SOURCE: &str = "linux-source-6.12";
