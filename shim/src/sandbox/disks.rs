//! Attaches block devices of the host to the VM.
//!
//! Each device is hot-plugged once, and stays attached until the pod ends.

use std::collections::HashMap;
use std::convert::identity;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use husk_config::BaseTimeout;
use husk_proto::agent::{BindDeviceRequest, SyncRequest};
use husk_vmm::config::{BlkConfig, FdIndex};
use husk_vmm::control::{Answer, Call};
use tokio::sync::OnceCell;

use crate::blocking;
use crate::lock;
use crate::oci::{DeviceNumbers, Disk};
use crate::sandbox::Sandbox;
use crate::vm::agent::{Agent, timeouts, within};
use crate::vm::vmm::{Vmm, VmmError};

/// How long the guest may take to write its dirty pages to its disks if a request ends the VM. The last writes to a
/// slower disk are lost.
pub const DISK_FLUSH_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(5);

/// Disks that are attached or being attached.
pub type AttachedDisks = Mutex<HashMap<Disk, Arc<AttachedDisk>>>;

/// A disk that is attached or being attached.
#[derive(Debug, Default)]
pub struct AttachedDisk {
    /// Slot of the disk. If the guest did not find the disk, a retry uses this slot again.
    slot: OnceCell<u32>,
    numbers: OnceCell<DeviceNumbers>,
}

impl AttachedDisk {
    /// Returns the disk's device numbers in the guest. `attach` hot-plugs the disk and returns the disk's slot. `find`
    /// asks the guest for the device numbers of the disk in this slot.
    async fn get_or_attach<E, F: Future<Output = Result<DeviceNumbers, E>>>(
        &self,
        attach: impl Future<Output = Result<u32, E>>,
        find: impl FnOnce(u32) -> F,
    ) -> Result<DeviceNumbers, E> {
        let found = self.numbers.get_or_try_init(|| async {
            let slot = *self.slot.get_or_try_init(|| attach).await?;
            find(slot).await
        });
        found.await.copied()
    }
}

/// A failure to attach a block device for a container.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The device cannot be opened on the host.
    #[error("failed to open block device {major}:{minor} of the host")]
    Open {
        /// Major number on the host.
        major: u32,
        /// Minor number on the host.
        minor: u32,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The VMM did not attach the device.
    #[error("failed to hot-plug the block device {major}:{minor} of the host into the VM")]
    Plug {
        /// Major number on the host.
        major: u32,
        /// Minor number on the host.
        minor: u32,
        /// Cause.
        #[source]
        source: VmmError,
    },
    /// The agent failed to find the device.
    #[error("failed to find the block device in the guest")]
    Guest(#[source] ttrpc::Error),
    /// The guest has no disk in the slot.
    #[error("failed to find the block device in the guest: its slot is empty")]
    Missing,
}

impl Sandbox {
    /// Returns the device numbers that `disk` has in the guest. Hot-plugs `disk` if it is not attached.
    ///
    /// # Errors
    /// Fails with a [`DiskError`] if the disk cannot be hot-plugged or found in the guest. The next call retries the
    /// step that failed.
    pub async fn disk(&self, agent: &Agent, disk: Disk) -> Result<DeviceNumbers, DiskError> {
        let attached = Arc::clone(lock(&self.disks).entry(disk).or_default());
        attached.get_or_attach(self.attach(disk), |slot| find_in_guest(agent, slot)).await
    }

    /// If the VM has disks, tells the guest to write its dirty pages to the disks. Waits at most for `limit`.
    ///
    /// Without the flush, killing the VM would lose data in the guest's page cache. Under runc, such data stays in the
    /// node's page cache after the pod has ended.
    pub async fn flush_disks_within(&self, limit: Duration) {
        let some = lock(&self.disks).values().any(|plug| plug.slot.initialized());
        // A VM that was killed answers nothing, even if its process does not exit.
        let ends = self.is_dead() || self.vmm().is_some_and(Vmm::is_killed);
        let agent = self.agent().filter(|_| some && !ends);
        let Some(agent) = agent else { return };
        match agent.sandbox.sync(within(limit), &SyncRequest::new()).await {
            Ok(_) => tracing::debug!("flushed the guest's disks"),
            Err(_) if self.is_dead() => {}
            Err(error) => {
                tracing::warn!(%error, "failed to flush the guest's disks; the last writes may be lost");
            }
        }
    }

    /// Lets a test pretend that the VM has a disk.
    #[cfg(test)]
    pub fn pretend_disk(&self) {
        let disk = Arc::new(AttachedDisk { slot: OnceCell::new_with(Some(9)), ..AttachedDisk::default() });
        lock(&self.disks).insert(Disk { major: 1, minor: 1, read_only: false }, disk);
    }

    /// Hot-plugs the disk. Returns its slot.
    async fn attach(&self, disk: Disk) -> Result<u32, DiskError> {
        let Disk { major, minor, read_only } = disk;
        let file = blocking::spawn(move || open(disk)).await.and_then(identity);
        let file = file.map_err(|source| DiskError::Open { major, minor, source })?;
        let plug = |source| DiskError::Plug { major, minor, source };
        let vmm = self.vmm().ok_or_else(|| plug(VmmError::Gone))?;
        let (serial, rate_limit) = (format!("{major}:{minor}"), self.disk_rate_limit());
        let config = BlkConfig { file: FdIndex(0), read_only, serial, rate_limit };
        match vmm.call(Call::AttachBlk(config), &[file.as_fd()]).await.map_err(plug)? {
            Answer::Attached { slot } => Ok(slot),
            _ => Err(plug(VmmError::Unexpected)),
        }
    }
}

/// Asks the guest for the device numbers of the disk in a slot.
async fn find_in_guest(agent: &Agent, slot: u32) -> Result<DeviceNumbers, DiskError> {
    let request = BindDeviceRequest { slot, ..Default::default() };
    let found = agent.sandbox.bind_device(within(timeouts::SLOW), &request).await.map_err(DiskError::Guest)?;
    match found.major {
        0 => Err(DiskError::Missing),
        major => Ok(DeviceNumbers { major, minor: found.minor }),
    }
}

/// Opens a block device by its device numbers. Blocks the calling thread.
fn open(disk: Disk) -> io::Result<File> {
    let Disk { major, minor, read_only } = disk;
    // `uevent` contains the name of the device's file in /dev (Linux, Documentation/ABI/testing/sysfs-dev).
    let uevent = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or(io::ErrorKind::NotFound)?;
    let path: PathBuf = ["/dev", name].iter().collect();
    let file = File::options().read(true).write(!read_only).open(path)?;
    let meta = file.metadata()?;
    let number = libc::makedev(major, minor);
    // The file in /dev may belong to another device, which the container must not get.
    if meta.file_type().is_block_device() && meta.rdev() == number {
        Ok(file)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn disk_keeps_its_slot_if_the_search_in_the_guest_is_retried() {
        let (plug, attached) = (AttachedDisk::default(), Cell::new(0));
        let attach = || async {
            attached.set(attached.get() + 1);
            Ok(attached.get())
        };
        let numbers = DeviceNumbers { major: 254, minor: 16 };
        let fails = |why: &'static str| move |_| std::future::ready(Err(why));
        assert_eq!(plug.get_or_attach(async { Err("no slot") }, fails("never asked")).await, Err("no slot"));
        assert_eq!(plug.get_or_attach(attach(), fails("not there")).await, Err("not there"));
        let in_first = |slot| std::future::ready(if slot == 1 { Ok(numbers) } else { Err("elsewhere") });
        assert_eq!((plug.get_or_attach(attach(), in_first).await, attached.get()), (Ok(numbers), 1));
        assert_eq!(plug.get_or_attach(attach(), fails("asked again")).await, Ok(numbers));
    }
}
