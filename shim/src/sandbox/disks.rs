//! Block devices of the host that containers of the pod are given: each is plugged into the machine once, and stays there
//! for the pod's life, whichever containers come and go.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use husk_proto::agent::{RescanRequest, SyncRequest};
use husk_vmm::config::{BlkConfig, FdIndex};
use husk_vmm::control::{Answer, Call};
use tokio::sync::OnceCell;

use super::Sandbox;
use super::agent::{Agent, timeouts, within};
use super::vmm::VmmError;
use crate::bundle::{Disk, Numbers};
use crate::lock;

/// The disks that are plugged in, or being so.
pub type Plugged = Mutex<HashMap<Disk, Arc<Plug>>>;

/// How far one disk has come.
#[derive(Debug, Default)]
pub struct Plug {
    /// The slot it is in: taken once, however often the guest has to be asked for what it found there.
    slot: OnceCell<u32>,
    numbers: OnceCell<Numbers>,
}

impl Plug {
    /// The guest's numbers: the disk is plugged in by `attach`, then `find` asks the guest.
    async fn get<E, F: Future<Output = Result<Numbers, E>>>(
        &self,
        attach: impl Future<Output = Result<u32, E>>,
        find: impl FnOnce(u32) -> F,
    ) -> Result<Numbers, E> {
        let found = self.numbers.get_or_try_init(|| async {
            let slot = *self.slot.get_or_try_init(|| attach).await?;
            find(slot).await
        });
        found.await.copied()
    }
}

/// Why a container does not get a block device.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host does not let it be opened.
    #[error("opening the block device {major}:{minor} of the host")]
    Open {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine does not take it.
    #[error("plugging the block device {major}:{minor} of the host into the virtual machine")]
    Plug {
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
        /// Why.
        #[source]
        source: VmmError,
    },
    /// The guest does not find it.
    #[error("finding the block device in the guest")]
    Guest(#[source] ttrpc::Error),
    /// The guest has something else there.
    #[error("the guest has no disk where it was plugged in")]
    Nothing,
}

impl Sandbox {
    /// The guest's numbers of a block device of the host, which is plugged in if it is not there yet.
    ///
    /// # Errors
    /// [`DiskError`]; the next call tries again.
    pub async fn disk(&self, agent: &Agent, disk: Disk) -> Result<Numbers, DiskError> {
        let plug = Arc::clone(lock(&self.disks).entry(disk).or_default());
        plug.get(self.plug(disk), |slot| find(agent, slot)).await
    }

    /// Has the guest write what it still holds of its disks, if it has any: under runc that would be in the node's page
    /// cache, whatever becomes of the pod. A guest that does not is waited for ten seconds.
    pub async fn flush_disks(&self) {
        let some = lock(&self.disks).values().any(|plug| plug.slot.initialized());
        let agent = self.agent().filter(|_| some && !self.is_dead());
        let Some(agent) = agent else { return };
        match agent.sandbox.sync(within(timeouts::QUICK), &SyncRequest::new()).await {
            Ok(_) => tracing::debug!("the guest has written to its disks what it held of them"),
            Err(_) if self.is_dead() => {}
            Err(error) => tracing::warn!(%error, "what was written last to the pod's disks may be lost"),
        }
    }

    /// Plugs it in; gives its slot.
    async fn plug(&self, disk: Disk) -> Result<u32, DiskError> {
        let Disk { major, minor, read_only } = disk;
        let file = tokio::task::spawn_blocking(move || open(disk)).await.unwrap_or_else(|e| Err(io::Error::other(e)));
        let file = file.map_err(|source| DiskError::Open { major, minor, source })?;
        let plug = |source| DiskError::Plug { major, minor, source };
        let vmm = self.vmm.get().ok_or_else(|| plug(VmmError::Gone))?;
        let config = BlkConfig { file: FdIndex(0), read_only, serial: format!("{major}:{minor}") };
        match vmm.call(Call::AttachBlk(config), &[file.as_fd()]).await.map_err(plug)? {
            (Answer::Attached { slot }, _) => Ok(slot),
            _ => Err(plug(VmmError::Unexpected)),
        }
    }
}

/// What the guest has in a slot.
async fn find(agent: &Agent, slot: u32) -> Result<Numbers, DiskError> {
    let request = RescanRequest { slot, ..Default::default() };
    let found = agent.sandbox.rescan(within(timeouts::SLOW), &request).await.map_err(DiskError::Guest)?;
    match found.major {
        0 => Err(DiskError::Nothing),
        major => Ok(Numbers { major, minor: found.minor }),
    }
}

/// Opens a block device by its number; blocks.
fn open(disk: Disk) -> io::Result<File> {
    let Disk { major, minor, read_only } = disk;
    // Where the kernel says how its node in /dev is called (Linux, Documentation/ABI/testing/sysfs-dev).
    let about = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = about.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or(io::ErrorKind::NotFound)?;
    let path: PathBuf = ["/dev", name].iter().collect();
    let file = File::options().read(true).write(!read_only).open(path)?;
    let meta = file.metadata()?;
    let number = libc::makedev(major, minor);
    // A node of the same name that is something else is none of the container's.
    if meta.file_type().is_block_device() && meta.rdev() == number {
        Ok(file)
    } else {
        Err(io::ErrorKind::InvalidInput.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test]
    async fn a_disk_that_the_guest_did_not_find_at_once_keeps_its_slot() {
        let (plug, attached) = (Plug::default(), Cell::new(0));
        let attach = || async {
            attached.set(attached.get() + 1);
            Ok(attached.get())
        };
        let numbers = Numbers { major: 254, minor: 16 };
        let fails = |why: &'static str| move |_| std::future::ready(Err(why));
        assert_eq!(plug.get(async { Err("no slot") }, fails("never asked")).await, Err("no slot"));
        assert_eq!(plug.get(attach(), fails("not there")).await, Err("not there"));
        let in_first = |slot| std::future::ready(if slot == 1 { Ok(numbers) } else { Err("elsewhere") });
        assert_eq!((plug.get(attach(), in_first).await, attached.get()), (Ok(numbers), 1));
        assert_eq!(plug.get(attach(), fails("asked again")).await, Ok(numbers));
    }
}
