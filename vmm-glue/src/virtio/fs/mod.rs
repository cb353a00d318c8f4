//! The virtio-fs device (virtio 1.2, 5.11): serves a directory of the host with virtiofsd's file system.
//!
//! Worker threads take requests from the request queue themselves ([`super::workers`]). Therefore, each request wakes
//! only one thread. The device loop serves only the high-priority queue. Therefore, FORGET never waits for a request
//! that blocks.
//!
//! If a file system of the host hangs, only the requests for this file system wait. Each mount has a limited number of
//! worker threads, and threads are added when all threads hang ([`super::workers`]).

mod cache;
#[cfg(test)]
mod cache_tests;
mod checked_fs;
mod closing;
mod descriptor_table;
mod fd_budget;
mod fd_limit;
mod fuse_server;
#[cfg(test)]
mod hang_tests;
#[cfg(test)]
mod hanging_fs;
mod ids;
mod joined_fs;
mod joins;
#[cfg(test)]
mod joins_tests;
#[cfg(test)]
mod landlock_tests;
mod locks;
#[cfg(test)]
mod names_tests;
mod nodes;
#[cfg(test)]
mod race_tests;
#[cfg(test)]
mod rate_limit_tests;
mod request_checks;
#[cfg(test)]
mod requests_tests;
#[cfg(test)]
mod reserved_blocks_tests;
mod share_fs;
#[cfg(test)]
mod test_guest;
#[cfg(test)]
mod test_tree;
#[cfg(test)]
mod tests;
mod tmpfile;
#[cfg(test)]
mod tmpfile_tests;
mod writer;
mod xattr_names;
#[cfg(test)]
mod xattr_names_tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};

use self::cache::Cache;
use self::checked_fs::CheckedFs;
use self::fd_budget::FdBudget;
use self::fd_limit::FdLimit;
use self::fuse_server::{FuseServer, HIGH_PRIORITY_QUEUE};
use self::joined_fs::JoinedFs;
use self::locks::Locks;
use self::nodes::Nodes;
use self::share_fs::ShareFs;
use self::tmpfile::TemporaryFiles;
use super::activation::{self, OpenedActivation};
use super::device::{ActivateError, Activation, Interrupt, OnIdle, VirtioDevice};
use super::queue::{Chain, QueueFault, Virtqueue, WAKE_TOKEN, WakeEvent, read_config_bytes};
use super::rate_limit::SharedLimiter;
use super::saved::{ActiveState, DeviceValues, SaveError};
use super::workers::{Growth, Handler, Later, Workers};
use crate::config::ShareConfig;
use crate::guest_memory::GuestMemory;
use crate::jail::{Belongings, Kind};

/// Size of the tag in the configuration space, in bytes.
pub const TAG_LEN: usize = 36;
/// Number of descriptors of the high-priority queue and of the request queue. In Linux, a request can have as many
/// pages as the queue has descriptors, minus a few descriptors for the headers. A request of 1 MiB has 256 pages.
const QUEUE_SIZES: [u16; 2] = [64, 512];
/// Event token of the high-priority queue.
const HIGH_PRIORITY: u32 = HIGH_PRIORITY_QUEUE as u32;
/// Number of fds that are reserved for the VMM itself.
const RESERVED_FDS: u64 = 512;
/// virtiofsd cannot use 1/`TEMPORARY_FRACTION` of the fds for guest files. They are for files without a name.
const TEMPORARY_FRACTION: u64 = 8;
/// The VMM asks the shim to make the guest forget files when less than 1/`SPARE_FRACTION` of the fds for guest files is
/// free. These are the fds for files without a name, and as many others.
const SPARE_FRACTION: u64 = 4;
/// Maximum number of worker threads that are added while others hang. A thread needs about 50 KiB.
const ADDED_WORKERS: usize = 64;
/// Maximum number of worker threads of one mount, unless the device has more from its start.
const WORKERS_PER_MOUNT: usize = 8;

/// Error from creating a virtio-fs device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tag is empty or too long.
    #[error("invalid virtio-fs tag {0:?}: a tag must have 1 to {TAG_LEN} bytes")]
    Tag(String),
    /// The fd limit is too low.
    #[error("the fd limit (RLIMIT_NOFILE) is {0}, but must be at least {min}", min = 2 * RESERVED_FDS)]
    Limit(u64),
    /// The directory cannot be served.
    #[error("failed to share directory {root}")]
    Root {
        /// The directory.
        root: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The device cannot create its eventfd, or cannot duplicate the fd of `/proc/self/fd`.
    #[error("failed to create an fd for the virtio-fs device")]
    Event(#[source] io::Error),
    /// The worker threads cannot be started or confined.
    #[error("failed to start the virtio-fs threads")]
    Threads(#[source] io::Error),
}

/// A virtio-fs device.
pub struct Fs {
    config: [u8; TAG_LEN + 4],
    server: Arc<FuseServer>,
    workers: Workers<FuseServer>,
    wake: WakeEvent,
    active: Option<Active>,
}

impl Handler for FuseServer {
    const KIND: Kind = Kind::FileServer;
    const NAME: &'static str = "virtio-fs";
    const POLLS: bool = true;
    const GROWTH: Option<Growth> =
        Some(Growth { workers: ADDED_WORKERS, per_group: WORKERS_PER_MOUNT, supervisor: Kind::FileSupervisor });

    fn limiter(&self) -> &SharedLimiter {
        FuseServer::limiter(self)
    }

    fn bytes(&self, request: &Chain<'_>) -> usize {
        fuse_server::data_len(request)
    }

    fn serve(&self, memory: &GuestMemory, chain: Chain<'_>, later: Later<'_>) -> Option<u32> {
        FuseServer::serve(self, memory, chain, later)
    }

    fn group(&self, request: &Chain<'_>) -> u64 {
        FuseServer::group(self, request)
    }

    fn refuse(&self, request: &Chain<'_>) -> u32 {
        FuseServer::refuse(self, request)
    }

    fn run_job(&self, job: u64) {
        FuseServer::run_job(self, job);
    }
}

struct Active {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    high_priority: Virtqueue,
}

impl Fs {
    /// Creates the device and its worker threads. The share's directory must exist. When few fds are left, a worker
    /// thread calls `request_forget` at most twice a second. `request_forget` should make the guest forget files.
    pub fn new(
        share: &ShareConfig,
        belongings: Belongings,
        request_forget: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, FsError> {
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
        let Belongings { fd_directory, dev_null, max_fds } = belongings;
        let guest_fd_limit = max_fds
            .checked_sub(RESERVED_FDS)
            .filter(|&guest_fds| guest_fds >= RESERVED_FDS)
            .ok_or(FsError::Limit(max_fds))?;
        let threshold = guest_fd_limit - guest_fd_limit / SPARE_FRACTION;
        let temporary_fds = guest_fd_limit / TEMPORARY_FRACTION;
        let budget = FdBudget::new(temporary_fds);
        let [fd_limit, paths_directory, temporary] =
            [fd_directory.try_clone(), fd_directory.try_clone(), fd_directory.try_clone()];
        let (fd_limit, paths_directory) = (fd_limit.map_err(FsError::Event)?, paths_directory.map_err(FsError::Event)?);
        let fd_limit = FdLimit::new(fd_limit, threshold, Arc::clone(&budget), Box::new(request_forget));
        let xattrmap = xattr_names::map().map_err(|error| root_error(io::Error::other(error)))?;
        let temporary = temporary.map_err(FsError::Event)?;
        let temporary = TemporaryFiles::new(budget, temporary, xattrmap.clone());
        let virtiofsd_fds = guest_fd_limit - temporary_fds;
        let fs = PassthroughFs::new(passthrough_config(share.root.clone(), fd_directory, virtiofsd_fds, xattrmap));
        let limiter = SharedLimiter::new(share.rate_limit);
        let nodes = Arc::new(Nodes::new(guest_fd_limit, Cache::new(share.volume_cache_ms)));
        let fs = ShareFs::new(fs.map_err(root_error)?, temporary);
        let fs = Arc::new(JoinedFs::new(fs, Arc::clone(&nodes), paths_directory));
        let locks = Locks::new(Arc::clone(&fs)).map_err(FsError::Threads)?;
        let server = FuseServer::new(CheckedFs::new(fs, locks, fd_limit, nodes, dev_null, limiter));
        let server = server.map_err(root_error)?;
        let server = Arc::new(server);
        Ok(Self {
            config,
            workers: Workers::start(share.workers.max(1), Arc::clone(&server)).map_err(FsError::Threads)?,
            server,
            wake: WakeEvent::new().map_err(FsError::Event)?,
            active: None,
        })
    }

    fn serve_high_priority(&mut self) -> Result<(), QueueFault> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let memory = Arc::clone(&active.memory);
        let queue = &mut active.high_priority;
        queue.disable_notification(&memory)?;
        let (mut more, mut jobs) = (true, Vec::new());
        for _ in 0..queue.size() {
            if let Some(chain) = queue.pop(&memory)? {
                let head = chain.head;
                let used = self.server.serve_high_priority(chain, &mut jobs);
                queue.push(&memory, head, used)?;
            } else if !queue.enable_notification(&memory)? {
                more = false;
                break;
            }
        }
        if more {
            self.wake.wake();
        }
        if !jobs.is_empty() {
            self.workers.submit(jobs);
        }
        queue.flush(&memory, &*active.interrupt)
    }
}

/// Returns the configuration of virtiofsd's file system.
fn passthrough_config(root_dir: String, fd_directory: File, guest_fd_limit: u64, xattrmap: XattrMap) -> Config {
    Config {
        root_dir,
        proc_sfd_rawfd: Some(fd_directory),
        guest_fd_limit,
        // `Cache` sets the timeouts of names and attributes. With `Always`, file data stays in the guest's page cache
        // until the file's size or mtime changes (FUSE_AUTO_INVAL_DATA). With `Auto`, each open would drop the file's
        // pages. Therefore, every execve(2) in the guest would read the binary from the host again.
        cache_policy: CachePolicy::Always,
        // Writeback is off, because the host changes files that the guest has cached. Moreover, when the VM is killed,
        // no data that the guest has reported as written may be lost.
        writeback: false,
        xattr: true,
        xattrmap: Some(xattrmap),
        posix_acl: NegotiationMode::Auto,
        // With this option, the guest need not send a GETXATTR of security.capability before each write.
        killpriv_v2: true,
        // The shim attaches mounts to the share while the guest runs. With this option, each mount gets its own st_dev
        // in the guest, unless it is joined with another mount.
        announce_submounts: true,
        readdirplus: true,
        // virtiofsd keeps an open fd, and no file handle, for each inode that the guest has looked up and not
        // forgotten. File handles would need CAP_DAC_READ_SEARCH, and with this capability a process can open any inode
        // of the host, even from a jail. Moreover, every rootfs is on overlayfs, which supports file handles only with
        // the mount option nfs_export.
        inode_file_handles: InodeFileHandlesMode::Never,
        // Ignore O_DIRECT on the host, so that this flag bypasses only the guest's cache. The file systems in a share
        // (tmpfs, overlayfs, network file systems) may reject the flag or the alignment of a buffer.
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
        self.server.forget_jobs();
        self.server.allow_lock_waits(true);
        self.workers
            .activate(Arc::clone(&memory), requests, Arc::clone(&interrupt))
            .map_err(|error| ActivateError::Host("the virtio-fs threads", error))?;
        self.active = Some(Active { memory, interrupt, high_priority });
        self.wake.wake();
        Ok(())
    }

    fn reset(&mut self) {
        self.workers.deactivate();
        // The answers of these requests are not sent, because the activation has ended. A worker may be about to start
        // a wait.
        self.server.allow_lock_waits(false);
        if let Some(active) = self.active.take() {
            self.wake.retire(active.high_priority);
        }
    }

    fn when_idle(&mut self, idle: OnIdle) {
        self.workers.when_idle(idle);
    }

    /// Only a device whose file system is not mounted can be saved, because the guest's nodes and handles are not saved.
    fn save(&self) -> Result<ActiveState, SaveError> {
        let high_priority = self.active.as_ref().and_then(|active| active.high_priority.state());
        let states = [high_priority, self.workers.queue_state()].into_iter().collect::<Option<Vec<_>>>();
        let queues = states.filter(|_| !self.server.is_mounted()).ok_or(SaveError::Busy(VIRTIO_ID_FS))?;
        Ok(ActiveState { queues, values: DeviceValues::None })
    }

    fn pause(&mut self) {
        self.workers.pause();
    }

    fn resume(&mut self) {
        self.workers.resume();
    }
}
