//! Kernel settings that every guest gets, independent of its pod.

use std::fs;

use nix::sys::stat::{Mode, umask};

/// Paths under `/proc/sys` and their values. A setting that the kernel does not have is skipped.
const SETTINGS: &[(&str, &str)] = &[
    // Without this setting, tunnel fallback devices (tunl0, sit0 …) appear in every new network namespace.
    ("net/core/fb_tunnels_only_for_init_net", "1"),
    // A panic of the guest kernel resets the VM at once. The VMM reports the reset.
    ("kernel/panic", "-1"),
    // Usual settings of container hosts. The kernel's defaults are too strict for many containers.
    ("vm/overcommit_memory", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
    ("fs/inotify/max_user_instances", "8192"),
    ("fs/inotify/max_user_watches", "524288"),
];

/// Applies the settings, brings `lo` up and sets the umask.
pub fn apply() {
    for (path, value) in SETTINGS {
        if let Err(error) = fs::write(format!("/proc/sys/{path}"), value) {
            tracing::debug!("failed to set sysctl {path} to {value}: {error}");
        }
    }
    if let Err(error) = crate::sandbox::loopback::bring_up() {
        tracing::warn!("failed to bring up lo: {error}");
    }
    umask(Mode::S_IWGRP | Mode::S_IWOTH);
}
