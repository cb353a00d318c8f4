//! virtio-fs (virtio 1.2, 5.11): a directory of the host, served in this process by virtiofsd's file system.
//!
//! Requests are taken by the worker threads themselves ([`super::workers`]), so that a request costs one wake-up; the device
//! loop only serves the high-priority queue, where FORGET never waits for a request that blocks.

mod capabilities;
mod checked;
mod checks;
mod descriptor_table;
mod fd_limit;
#[cfg(test)]
mod names_tests;
#[cfg(test)]
mod race_tests;
mod request;
#[cfg(test)]
mod requests_tests;
#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod test_tree;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtiofsd::limits::setup_rlimit_nofile;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};

use self::checked::CheckedFs;
use self::fd_limit::FdLimit;
use self::request::{FuseServer, HIGH_PRIORITY_QUEUE};
use super::activation::{self, Opened};
use super::device::{ActivateError, Activation, GuestMemory, Interrupt, VirtioDevice};
use super::queue::{QueueFault, Taken, Vq, WAKE, Wake, read_config_bytes};
use super::workers::{Handler, Workers};
use crate::config::ShareConfig;

/// Bytes of the tag in the configuration space.
pub const TAG_LEN: usize = 36;
/// High priority, requests. Linux limits a request to the queue's size in pages, less its headers: 1 MiB needs 256.
const QUEUE_SIZES: [u16; 2] = [64, 512];
const HIGH_PRIORITY: u32 = HIGH_PRIORITY_QUEUE as u32;
/// Descriptors that stay for the process itself.
const OWN_DESCRIPTORS: u64 = 512;
/// This part of the others is left when the guest is to forget files.
const SPARE: u64 = 8;
/// include/uapi/linux/securebits.h.
const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;
/// How long the guest believes names and attributes. What the host changes in a volume is seen after at most that.
const TIMEOUT: Duration = Duration::from_secs(1);

/// Why a share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("virtio-fs tag {0:?} is not 1 to {TAG_LEN} bytes long")]
    Tag(String),
    /// The limit on descriptors is unknown or too low.
    #[error("limit of open files: {0}")]
    Limit(String),
    /// The directory cannot be served.
    #[error("cannot share {root}")]
    Root {
        /// The directory.
        root: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No eventfd.
    #[error("cannot make an eventfd")]
    Event(#[source] io::Error),
}

/// The device.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    worker_count: u8,
    server: Arc<FuseServer>,
    wake: Wake,
    active: Option<Active>,
    paused: bool,
}

impl Handler for FuseServer {
    const NAME: &'static str = "virtio-fs";

    fn prepare_thread(&self) -> io::Result<()> {
        keep_capabilities()?;
        capabilities::limit()?;
        // SAFETY: takes flags; this thread gets a working directory of its own, which the file system changes for
        // operations on extended attributes.
        match unsafe { libc::unshare(libc::CLONE_FS) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn serve(&self, memory: &GuestMemory, (chain, _): Taken<'_>) -> u32 {
        FuseServer::serve(self, memory, chain)
    }
}

/// Has this thread keep its capabilities while it acts as one of the guest's users (capabilities(7)).
///
/// What it creates for a user it creates as that user, so that owners are right. Whether the user may has been decided by
/// the guest's kernel, which knows capabilities that a request does not tell of: root in a user namespace of the guest,
/// an ordinary user to the host, may well write to a directory whose mode forbids it.
fn keep_capabilities() -> io::Result<()> {
    // SAFETY: prctl without pointers.
    let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
    // SAFETY: as above.
    match unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits | SECBIT_NO_SETUID_FIXUP) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // A process without that privilege cannot act as another user in the first place.
            error if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
            error => Err(error),
        },
    }
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    high_priority: Vq,
    workers: Workers<FuseServer>,
}

impl Fs {
    /// Opens the directory, which must exist, and raises the process's limit of open files. When these are nearly used up,
    /// `forget` is called now and then, on a thread that serves requests: to have the guest forget files.
    ///
    /// # Errors
    /// [`FsError`].
    pub fn new(share: &ShareConfig, forget: impl Fn() + Send + Sync + 'static) -> Result<Self, FsError> {
        if share.tag.is_empty() || share.tag.len() > TAG_LEN {
            return Err(FsError::Tag(share.tag.clone()));
        }
        let mut config = [0; TAG_LEN + 4];
        for (to, from) in config.iter_mut().zip(share.tag.as_bytes()) {
            *to = *from;
        }
        // num_request_queues
        if let Some(queues) = config.get_mut(TAG_LEN) {
            *queues = 1;
        }
        let root_error = |source| FsError::Root { root: share.root.clone(), source };
        if !std::fs::metadata(&share.root).map_err(root_error)?.is_dir() {
            return Err(root_error(io::ErrorKind::NotADirectory.into()));
        }
        let limit = setup_rlimit_nofile(None).map_err(FsError::Limit)?;
        let guest_fd_limit = limit
            .checked_sub(OWN_DESCRIPTORS)
            .filter(|&left| left >= OWN_DESCRIPTORS)
            .ok_or_else(|| FsError::Limit(format!("{limit} is too low")))?;
        let room = FdLimit::new(guest_fd_limit - guest_fd_limit / SPARE, Box::new(forget)).map_err(root_error)?;
        let fs = PassthroughFs::new(settings(share.root.clone(), guest_fd_limit));
        let server = fs.and_then(|fs| FuseServer::new(CheckedFs::new(fs, room)?)).map_err(root_error)?;
        Ok(Self {
            config,
            worker_count: share.workers.max(1),
            server: Arc::new(server),
            wake: Wake::new().map_err(FsError::Event)?,
            active: None,
            paused: false,
        })
    }

    fn serve_high_priority(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let queue = &mut active.high_priority;
        queue.ignore(&memory)?;
        let mut more = true;
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop(&memory)? {
                let head = chain.head;
                let used = self.server.serve_high_priority(chain);
                queue.push(&memory, head, used)?;
            } else if !queue.listen(&memory)? {
                more = false;
                break;
            }
        }
        if more {
            self.wake.wake();
        }
        queue.flush(&memory, &*active.interrupt)
    }
}

/// How virtiofsd's file system is to behave.
fn settings(root_dir: String, guest_fd_limit: u64) -> Config {
    Config {
        root_dir,
        guest_fd_limit,
        // Names and attributes are asked for again after a second. File data stays in the guest's page cache beyond
        // that as long as size and mtime are what they were (FUSE_AUTO_INVAL_DATA), which `Always` permits and `Auto`
        // does not: that one drops a file's pages whenever it is opened, so every exec would read its binary again.
        entry_timeout: TIMEOUT,
        attr_timeout: TIMEOUT,
        cache_policy: CachePolicy::Always,
        // The host changes files behind the guest's back, and a killed guest loses nothing that it was told is written.
        writeback: false,
        xattr: true,
        posix_acl: NegotiationMode::Auto,
        // Saves a GETXATTR of security.capability before each write.
        killpriv_v2: true,
        // Mounts appear under the root while the guest runs; they get st_dev values of their own.
        announce_submounts: true,
        readdirplus: true,
        // A descriptor per inode the guest knows. Handles instead need CAP_DAC_READ_SEARCH, with which a process opens
        // any inode of the host, jail or not; and overlayfs, under every rootfs, has none without nfs_export.
        inode_file_handles: InodeFileHandlesMode::Never,
        // The guest bypasses its own cache for O_DIRECT; what is under a share (tmpfs, overlay, network file systems)
        // might refuse the flag or its alignment.
        allow_direct_io: false,
        ..Config::default()
    }
}

impl MutEventSubscriber for Fs {
    fn init(&mut self, ops: &mut EventOps) {
        self.wake.init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            WAKE => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    Wake::register(ops, &mut active.high_priority);
                }
            }
            HIGH_PRIORITY => {
                if let Some(active) = &self.active {
                    active.high_priority.notified();
                }
            }
            _ => {}
        }
        if let Err(fault) = self.serve_high_priority() {
            let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
            activation::stop(self, "virtio-fs", &fault, interrupt);
        }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Opened { memory, interrupt, queues: [high_priority, requests], .. } = activation::open(activation)?;
        let workers = Workers::start(
            self.worker_count,
            self.paused,
            Arc::clone(&self.server),
            Arc::clone(&memory),
            requests,
            Arc::clone(&interrupt),
        )
        .map_err(|error| ActivateError::Host("virtio-fs threads", error))?;
        self.active = Some(Active { memory, interrupt, high_priority, workers });
        self.wake.wake();
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            active.workers.stop();
            self.wake.retire(active.high_priority);
        }
    }

    fn quiesce(&mut self) {
        self.paused = true;
        if let Some(active) = &self.active {
            active.workers.quiesce();
        }
    }

    fn resume(&mut self) {
        self.paused = false;
        if let Some(active) = &self.active {
            active.workers.resume();
        }
    }
}
