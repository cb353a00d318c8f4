//! Guest side of hot-plug and hot-unplug of virtio-mmio devices.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Directory in which the kernel lists platform devices.
const DEVICES: &str = "/sys/bus/platform/devices";
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
const UNBIND: &str = "/sys/bus/platform/drivers/virtio-mmio/unbind";

/// Failure to bind a slot's device, to unbind it, or to read its device numbers.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// Failed to bind the device to the driver.
    #[error("failed to bind {device} to the virtio-mmio driver")]
    Bind {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
    /// Failed to unbind the device from the driver.
    #[error("failed to unbind {device} from the virtio-mmio driver")]
    Unbind {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
    /// Failed to read the device numbers of a block device.
    #[error("failed to read the block device numbers of {device} from sysfs")]
    Inspect {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
}

/// Makes the kernel probe a slot that was empty. If the device in the slot is a block device, returns its major and
/// minor number. Blocks the calling thread.
pub fn bind_device(slot: u32) -> Result<Option<(u32, u32)>, SlotError> {
    let device = husk_proto::mmio_slots::device_name(slot);
    match write_driver_file(BIND, &device) {
        // The kernel has already probed and bound the device without this request.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
        Err(source) => return Err(SlotError::Bind { device, source }),
        Ok(()) => {}
    }
    find_disk(&Path::new(DEVICES).join(&device)).map_err(|source| SlotError::Inspect { device, source })
}

/// Unbinds a slot's device from its driver, even while the device is in use. Blocks the calling thread.
pub fn unbind_device(slot: u32) -> Result<(), SlotError> {
    let device = husk_proto::mmio_slots::device_name(slot);
    match write_driver_file(UNBIND, &device) {
        // The device has no driver.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        result => result.map_err(|source| SlotError::Unbind { device, source }),
    }
}

fn write_driver_file(file: &str, device: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(device.as_bytes())
}

/// Returns the major and minor number of a platform device's disk. Reads the numbers from
/// `virtio<n>/block/vd<x>/dev` below `device`.
fn find_disk(device: &Path) -> io::Result<Option<(u32, u32)>> {
    for entry in fs::read_dir(device)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with("virtio") {
            continue;
        }
        let disks = match fs::read_dir(entry.path().join("block")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if let Some(found) = disks.into_iter().next() {
            let text = fs::read_to_string(found?.path().join("dev"))?;
            return Ok(parse_numbers(&text));
        }
    }
    Ok(None)
}

fn parse_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_disk_reads_the_device_numbers() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find_disk(dir.path()).unwrap(), None);
        fs::create_dir_all(dir.path().join("power")).unwrap();
        fs::create_dir_all(dir.path().join("virtio3/net/eth1")).unwrap();
        assert_eq!(find_disk(dir.path()).unwrap(), None);
        fs::create_dir_all(dir.path().join("virtio4/block/vdb")).unwrap();
        fs::write(dir.path().join("virtio4/block/vdb/dev"), "254:16\n").unwrap();
        assert_eq!(find_disk(dir.path()).unwrap(), Some((254, 16)));
        assert_eq!(parse_numbers("x:1"), None);
        assert!(find_disk(&dir.path().join("none")).is_err());
    }
}
