//! Character devices that every guest has.
//!
//! If a specification names one of these devices, the container gets the guest's device. The shim rejects a
//! specification that names another character device. Before this check, the shim removes the host devices that a
//! client lists for a privileged container (host_devices.rs).

/// A character device that every guest has.
struct Standard {
    path: &'static str,
    major: u64,
    minor: u64,
}

const fn standard(path: &'static str, major: u64, minor: u64) -> Standard {
    Standard { path, major, minor }
}

/// Device numbers from the kernel's `Documentation/admin-guide/devices.txt`. These numbers are the same on every Linux
/// kernel.
const STANDARD: [Standard; 10] = [
    standard("/dev/null", 1, 3),
    standard("/dev/zero", 1, 5),
    standard("/dev/full", 1, 7),
    standard("/dev/random", 1, 8),
    standard("/dev/urandom", 1, 9),
    standard("/dev/tty", 5, 0),
    standard("/dev/console", 5, 1),
    standard("/dev/ptmx", 5, 2),
    standard("/dev/net/tun", 10, 200),
    standard("/dev/fuse", 10, 229),
];

/// Device numbers of `/dev/kvm`.
const KVM: (u64, u64) = (10, 232);

/// Returns the path that the device with these numbers has in the guest. If `character` is false, the device is a block
/// device.
///
/// # Errors
/// The reason why the guest does not have the device.
pub fn guest_path(character: bool, major: u64, minor: u64) -> Result<&'static str, String> {
    if character && (major, minor) == KVM {
        return Err("a container cannot run nested VMs, because the guest has no KVM".into());
    }
    match STANDARD.iter().find(|d| character && (d.major, d.minor) == (major, minor)) {
        Some(device) => Ok(device.path),
        None => Err(format!(
            "{} device {major}:{minor} belongs to the host and is not available in the VM; remove the device from the \
             container, or run the container with another runtime",
            if character { "character" } else { "block" }
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_path_accepts_only_standard_devices() {
        assert_eq!(guest_path(true, 1, 3), Ok("/dev/null"));
        assert_eq!(guest_path(true, 10, 229), Ok("/dev/fuse"));
        assert!(guest_path(true, 10, 232).unwrap_err().contains("no KVM"));
        assert!(guest_path(false, 1, 3).unwrap_err().contains("block device 1:3"));
        assert!(guest_path(true, 195, 0).unwrap_err().contains("character device 195:0"));
    }
}
