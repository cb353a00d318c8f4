//! The modules whose tests do not run under Miri.

/// Why tests that run a device on a device loop are left out. The crate event-manager uses level-triggered epoll. Miri
/// has it since rust-lang/miri#5071 (June 2026). With such a Miri, most of these entries can be removed. Tests of
/// virtio-fs also make other calls that Miri lacks, such as mknod.
const EPOLL: &str = "Miri before June 2026 has no level-triggered epoll";
/// Why tests of code that has no unsafe blocks and no data of a guest are left out.
const SAFE: &str = "the tests take minutes, and the code has no unsafe blocks";

/// The modules: the crate, a part of the names of the module's tests, and the reason. The entries of a crate are next
/// to each other.
pub const MODULES: [(&str, &str, &str); 19] = [
    ("husk-vmm", "config_check::tests::", SAFE),
    ("husk-vmm", "virtio::balloon::tests::", EPOLL),
    ("husk-vmm", "virtio::blk::", EPOLL),
    ("husk-vmm", "virtio::fs::landlock_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::names_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::race_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::rate_limit_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::requests_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::reserved_blocks_tests::", EPOLL),
    ("husk-vmm", "virtio::fs::tests::", EPOLL),
    ("husk-vmm", "virtio::mem::tests::", EPOLL),
    ("husk-vmm", "virtio::mmio::", EPOLL),
    ("husk-vmm", "virtio::net::rate_limit_tests::", EPOLL),
    ("husk-vmm", "virtio::net::tests::", EPOLL),
    ("husk-vmm", "virtio::rate_limit::tests::", SAFE),
    ("husk-vmm", "virtio::rng::tests::", EPOLL),
    ("husk-vmm", "virtio::vsock::tests::", EPOLL),
    ("husk-vmm", "virtio::workers::tests::", EPOLL),
    ("husk-vmm", "vm::devices::tests::", EPOLL),
];
