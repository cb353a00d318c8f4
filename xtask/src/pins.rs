//! The Debian release and the source package that several steps share.

/// The Debian release of the test node, and of the images with Docker and buildah. It has containerd 1.7 and Linux
/// 6.12.
pub const RELEASE: &str = "trixie";
/// The Debian package with the source of the guest kernel.
pub const KERNEL_SOURCE: &str = "linux-source-6.12";
