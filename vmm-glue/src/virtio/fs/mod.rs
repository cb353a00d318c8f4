//! The virtio-fs device (virtio 1.2, 5.11): serves a directory of the host with virtiofsd's file system.
//!
//! Worker threads take requests from the request queue themselves ([`super::workers`]), so each request costs one
//! wake-up. The device loop serves only the high-priority queue, so FORGET never waits for a request that blocks.

mod capabilities;
mod checked_fs;
mod descriptor_table;
mod fd_limit;
mod fuse_server;
#[cfg(test)]
mod names_tests;
#[cfg(test)]
mod race_tests;
mod request_checks;
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
use husk_base::sys::process::{secure_bits, set_secure_bits};
use nix::sched::{CloneFlags, unshare};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtiofsd::limits::setup_rlimit_nofile;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};

use self::checked_fs::CheckedFs;
use self::fd_limit::FdLimit;
use self::fuse_server::{FuseServer, HIGH_PRIORITY_QUEUE};
use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, VirtioDevice};
use super::queue::{Chain, QueueFault, Virtqueue, WAKE_TOKEN, WakeEvent, read_config_bytes};
use super::workers::{Handler, Workers};
use crate::config::ShareConfig;
use crate::guest_memory::GuestMemory;

/// Size of the tag in the configuration space, in bytes.
pub const TAG_LEN: usize = 36;
/// Sizes of the high-priority queue and the request queue. Linux limits a request to as many pages as the queue has
/// descriptors, less those of its headers: 1 MiB needs 256.
const QUEUE_SIZES: [u16; 2] = [64, 512];
/// Event token of the high-priority queue.
const HIGH_PRIORITY: u32 = HIGH_PRIORITY_QUEUE as u32;
/// Number of fds reserved for the process itself.
const RESERVED_FDS: u64 = 512;
/// The guest is asked to forget files once less than one part in this many of its fds is free.
const SPARE_FRACTION: u64 = 8;
/// include/uapi/linux/securebits.h.
const SECBIT_NO_SETUID_FIXUP: libc::c_int = 1 << 2;
/// How long the guest caches names and attributes. It sees changes that the host makes in a volume after this time at
/// most.
const CACHE_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a virtio-fs device could not be created.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("virtio-fs tag {0:?} is not 1 to {TAG_LEN} bytes long")]
    Tag(String),
    /// The fd limit could not be raised, or is too low.
    #[error("failed to raise the fd limit (RLIMIT_NOFILE): {0}")]
    Limit(String),
    /// The directory cannot be served.
    #[error("failed to share directory {root}")]
    Root {
        /// The directory.
        root: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The device's eventfd could not be created.
    #[error("failed to create an eventfd")]
    Event(#[source] io::Error),
}

/// A virtio-fs device.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    worker_count: u8,
    server: Arc<FuseServer>,
    wake: WakeEvent,
    active: Option<Active>,
    paused: bool,
}

impl Handler for FuseServer {
    const NAME: &'static str = "virtio-fs";

    fn prepare_thread(&self) -> io::Result<()> {
        keep_capabilities()?;
        capabilities::limit()?;
        // virtiofsd changes the working directory for operations on extended attributes.
        unshare(CloneFlags::CLONE_FS)?;
        Ok(())
    }

    fn serve(&self, memory: &GuestMemory, chain: Chain<'_>) -> u32 {
        FuseServer::serve(self, memory, chain)
    }
}

/// Makes this thread keep its capabilities when it switches to a user of the guest (capabilities(7)).
///
/// The thread creates files as the requesting user, so that they have the right owner. The guest's kernel has already
/// decided whether that user has permission. It knows capabilities that a request does not carry: root in a user
/// namespace of the guest is an ordinary user on the host, yet can write to a directory whose mode forbids it.
fn keep_capabilities() -> io::Result<()> {
    match secure_bits().and_then(|bits| set_secure_bits(bits | SECBIT_NO_SETUID_FIXUP)) {
        // Without the privilege (CAP_SETPCAP), the process cannot switch to another user either.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
        result => result,
    }
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    high_priority: Virtqueue,
    workers: Workers<FuseServer>,
}

impl Fs {
    /// Creates the device for an existing directory, and raises the process's fd limit. When few fds are left, a worker
    /// thread calls `request_forget`, at most once a second: it should make the guest forget files.
    pub fn new(share: &ShareConfig, request_forget: impl Fn() + Send + Sync + 'static) -> Result<Self, FsError> {
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
            .checked_sub(RESERVED_FDS)
            .filter(|&guest_fds| guest_fds >= RESERVED_FDS)
            .ok_or_else(|| FsError::Limit(format!("{limit} is too low, at least {} are needed", 2 * RESERVED_FDS)))?;
        let threshold = guest_fd_limit - guest_fd_limit / SPARE_FRACTION;
        let fd_limit = FdLimit::new(threshold, Box::new(request_forget)).map_err(root_error)?;
        let fs = PassthroughFs::new(passthrough_config(share.root.clone(), guest_fd_limit));
        let server = fs.and_then(|fs| FuseServer::new(CheckedFs::new(fs, fd_limit)?)).map_err(root_error)?;
        Ok(Self {
            config,
            worker_count: share.workers.max(1),
            server: Arc::new(server),
            wake: WakeEvent::new().map_err(FsError::Event)?,
            active: None,
            paused: false,
        })
    }

    fn serve_high_priority(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let queue = &mut active.high_priority;
        queue.disable_notification(&memory)?;
        let mut more = true;
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop(&memory)? {
                let head = chain.head;
                let used = self.server.serve_high_priority(chain);
                queue.push(&memory, head, used)?;
            } else if !queue.enable_notification(&memory)? {
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

/// The configuration of virtiofsd's file system.
fn passthrough_config(root_dir: String, guest_fd_limit: u64) -> Config {
    Config {
        root_dir,
        guest_fd_limit,
        // The guest looks names and attributes up again after the timeout. File data stays in its page cache for
        // longer, while size and mtime do not change (FUSE_AUTO_INVAL_DATA). That needs `Always`: with `Auto`, each
        // open drops the file's pages, so every exec would read its binary again.
        entry_timeout: CACHE_TIMEOUT,
        attr_timeout: CACHE_TIMEOUT,
        cache_policy: CachePolicy::Always,
        // The host changes files that the guest has cached. And a killed guest must not lose data that was reported as
        // written.
        writeback: false,
        xattr: true,
        posix_acl: NegotiationMode::Auto,
        // Saves a GETXATTR of security.capability before each write.
        killpriv_v2: true,
        // Mounts appear under the root while the guest runs; each gets its own st_dev.
        announce_submounts: true,
        readdirplus: true,
        // Keeps one fd per inode that the guest knows. File handles would need CAP_DAC_READ_SEARCH, which opens any
        // inode of the host, even from a jail. And overlayfs, under every rootfs, has no file handles without
        // nfs_export.
        inode_file_handles: InodeFileHandlesMode::Never,
        // O_DIRECT bypasses only the guest's cache. The file systems under a share (tmpfs, overlayfs, network file
        // systems) may reject the flag or the alignment of a buffer.
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
            WAKE_TOKEN => {
                self.wake.serve(ops);
                if let Some(active) = &mut self.active {
                    WakeEvent::register(ops, &mut active.high_priority);
                }
            }
            HIGH_PRIORITY => {
                if let Some(active) = &self.active {
                    active.high_priority.clear_notification();
                }
            }
            _ => {}
        }
        if let Err(fault) = self.serve_high_priority() {
            let interrupt = self.active.as_ref().map(|active| Arc::clone(&active.interrupt));
            activation::stop_broken_device(self, "virtio-fs", &fault, interrupt);
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
        let OpenedActivation { memory, interrupt, queues: [high_priority, requests], .. } =
            activation::open_queues(activation)?;
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

    fn pause(&mut self) {
        self.paused = true;
        if let Some(active) = &self.active {
            active.workers.pause();
        }
    }

    fn resume(&mut self) {
        self.paused = false;
        if let Some(active) = &self.active {
            active.workers.resume();
        }
    }
}
