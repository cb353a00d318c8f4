//! Block devices of the host that containers of the pod are given: each is plugged into the machine once, and stays there
//! for the pod's life, whichever containers come and go.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use husk_proto::agent::RescanRequest;
use husk_vmm::config::{BlkConfig, FdIndex};
use husk_vmm::control::{Answer, Call};
use tokio::sync::OnceCell;

use super::Sandbox;
use super::agent::{Agent, timeouts, within};
use super::vmm::VmmError;
use crate::bundle::{Disk, Numbers};
use crate::lock;

/// The disks that are plugged in, or being so.
pub type Plugged = Mutex<HashMap<Disk, Arc<OnceCell<Numbers>>>>;

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
        let cell = Arc::clone(lock(&self.disks).entry(disk).or_default());
        cell.get_or_try_init(|| self.plug(agent, disk)).await.copied()
    }

    async fn plug(&self, agent: &Agent, disk: Disk) -> Result<Numbers, DiskError> {
        let Disk { major, minor, read_only } = disk;
        let file = tokio::task::spawn_blocking(move || open(disk)).await.unwrap_or_else(|e| Err(io::Error::other(e)));
        let file = file.map_err(|source| DiskError::Open { major, minor, source })?;
        let plug = |source| DiskError::Plug { major, minor, source };
        let vmm = self.vmm.get().ok_or_else(|| plug(VmmError::Gone))?;
        let config = BlkConfig { file: FdIndex(0), read_only, serial: format!("{major}:{minor}") };
        let slot = match vmm.call(Call::AttachBlk(config), &[file.as_fd()]).await.map_err(plug)? {
            (Answer::Attached { slot }, _) => slot,
            _ => return Err(plug(VmmError::Unexpected)),
        };
        let request = RescanRequest { slot, ..Default::default() };
        let found = agent.sandbox.rescan(within(timeouts::SLOW), &request).await.map_err(DiskError::Guest)?;
        match found.major {
            0 => Err(DiskError::Nothing),
            major => Ok(Numbers { major, minor: found.minor }),
        }
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
