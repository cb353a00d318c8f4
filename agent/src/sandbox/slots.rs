//! Devices that are plugged into the machine's slots while it runs, and taken out.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

/// Where the kernel lists platform devices.
const DEVICES: &str = "/sys/bus/platform/devices";
const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
const UNBIND: &str = "/sys/bus/platform/drivers/virtio-mmio/unbind";

/// Why a slot's device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The driver does not take it.
    #[error("bind {device}")]
    Bind {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
    /// The driver does not let go of it.
    #[error("unbind {device}")]
    Unbind {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
    /// It cannot be looked at.
    #[error("look at {device}")]
    Look {
        /// The platform device.
        device: String,
        #[source]
        source: io::Error,
    },
}

/// Makes the kernel look again at a slot that was empty; gives major and minor of the disk in it, if it is one. Blocks.
pub fn rescan(slot: u32) -> Result<Option<(u32, u32)>, SlotError> {
    let device = husk_proto::slots::device_name(slot);
    match tell(BIND, &device) {
        // It is bound already: the guest found it without being told.
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
        Err(source) => return Err(SlotError::Bind { device, source }),
        Ok(()) => {}
    }
    disk(&Path::new(DEVICES).join(&device)).map_err(|source| SlotError::Look { device, source })
}

/// Makes the kernel give up the device of a slot, whoever uses it. Blocks.
pub fn release(slot: u32) -> Result<(), SlotError> {
    let device = husk_proto::slots::device_name(slot);
    match tell(UNBIND, &device) {
        // It has no driver.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        result => result.map_err(|source| SlotError::Unbind { device, source }),
    }
}

fn tell(file: &str, device: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(file)?.write_all(device.as_bytes())
}

/// The numbers of the disk below a platform device: `virtio<n>/block/vd<x>/dev`.
fn disk(device: &Path) -> io::Result<Option<(u32, u32)>> {
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
            return Ok(numbers(&text));
        }
    }
    Ok(None)
}

fn numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_of_a_slot() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(disk(dir.path()).unwrap(), None);
        fs::create_dir_all(dir.path().join("power")).unwrap();
        fs::create_dir_all(dir.path().join("virtio3/net/eth1")).unwrap();
        assert_eq!(disk(dir.path()).unwrap(), None);
        fs::create_dir_all(dir.path().join("virtio4/block/vdb")).unwrap();
        fs::write(dir.path().join("virtio4/block/vdb/dev"), "254:16\n").unwrap();
        assert_eq!(disk(dir.path()).unwrap(), Some((254, 16)));
        assert_eq!(numbers("x:1"), None);
        assert!(disk(&dir.path().join("none")).is_err());
    }
}
