//! Kernel settings every guest has, whatever its pod asks for.

use std::fs;

/// Paths under `/proc/sys` and their values. A kernel without one goes on without it.
const SETTINGS: &[(&str, &str)] = &[
    // Tunnel fallback devices (tunl0, sit0 …) would otherwise appear in every new network namespace.
    ("net/core/fb_tunnels_only_for_init_net", "1"),
    // A guest's own panic is a reset, which the VMM reports.
    ("kernel/panic", "-1"),
    // What container hosts set: many small programs, few limits of the kernel's own.
    ("vm/overcommit_memory", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
];

/// Applies the settings and brings `lo` up.
pub fn kernel() {
    for (path, value) in SETTINGS {
        if let Err(error) = fs::write(format!("/proc/sys/{path}"), value) {
            tracing::debug!("sysctl {path}: {error}");
        }
    }
    if let Err(error) = crate::sandbox::link::loopback_up() {
        tracing::warn!("cannot bring lo up: {error}");
    }
    // SAFETY: umask only replaces the process's file mode mask.
    unsafe { libc::umask(0o022) };
}
