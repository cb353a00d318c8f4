//! Tells the guest to drop its file caches if the pod's memory on the host is nearly exhausted, or if the VMM has
//! nearly reached its fd limit.
//!
//! For every inode in the guest's cache, the VMM holds an open file. The open file pins an inode of the host. The pod's
//! cgroup is charged for the pinned inodes' memory. The host's kernel cannot reclaim pinned inodes, and the guest's
//! kernel does not know about these inodes. Without this module, a guest that reads many files would exhaust the pod's
//! memory, and the host's kernel would kill the VMM.
//!
//! In cgroup v2, this module polls `memory.events`. The kernel changes this file when the kernel throttles processes at
//! `memory.high`, and then wakes processes that poll the file (Documentation/admin-guide/cgroup-v2.rst). An inotify
//! instance would do the same, but the number of instances is limited for all shims of a node. In cgroup v1, this
//! module watches `memory.pressure_level`, which reports that the kernel reclaims memory
//! (Documentation/admin-guide/cgroup-v1/memory.rst).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use husk_base::async_fd::register;
use husk_proto::agent::DropCachesRequest;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::blocking;
use crate::lock;
use crate::resources::cgroup::CgroupLocation;
use crate::resources::limits;
use crate::vm::agent::{Agent, timeouts, within};
use crate::vm::vmm::Vmm;

/// Pause after a report from the kernel or the VMM. Without the pause, a burst of reports would cause many checks.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// If the guest must drop caches twice within this time, the second drop includes the page cache.
///
/// The first drop includes only unused inodes. The first drop may free too little memory, because an inode with cached
/// pages stays in the guest's memory.
const PAGE_CACHE_WINDOW: Duration = Duration::from_secs(15);
/// Memory counts as nearly exhausted if the unreclaimable memory is at most this many bytes below the limit.
const MARGIN: u64 = 2 << 20;

/// Starts to watch the pod's memory and the VMM's open files. The watch stops when the VM ends.
pub fn start(location: Option<CgroupLocation>, agent: Agent, vmm: Vmm) {
    let guest = Guest { agent, last: Mutex::new(None) };
    tokio::spawn(async move {
        let memory = async {
            let Some(location) = &location else { return };
            match async { Watch::new(location)?.run(location, &guest).await }.await {
                // The sandbox's cgroup has no memory controller.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%error, "failed to watch the pod's memory on the host"),
                Ok(()) => {}
            }
        };
        tokio::select! {
            () = async { tokio::join!(memory, guest.free_fds(&vmm)).1 } => {}
            _ = vmm.wait() => {}
        }
    });
}

/// The guest's agent, and the time when the guest last dropped caches.
struct Guest {
    agent: Agent,
    last: Mutex<Option<Instant>>,
}

impl Guest {
    /// Makes the guest drop caches whenever the VMM has nearly reached its fd limit. A VMM that reports this without
    /// end makes the guest drop caches at most once per [`MIN_INTERVAL`].
    async fn free_fds(&self, vmm: &Vmm) {
        loop {
            vmm.wait_for_fd_shortage().await;
            self.drop_caches("the VMM has nearly reached its fd limit").await;
            tokio::time::sleep(MIN_INTERVAL).await;
        }
    }

    /// Tells the guest to drop unused inodes. If the last drop was less than [`PAGE_CACHE_WINDOW`] ago, the guest drops
    /// the page cache, too.
    async fn drop_caches(&self, reason: &str) {
        let page_cache = lock(&self.last).is_some_and(|last| last.elapsed() < PAGE_CACHE_WINDOW);
        tracing::info!(pages = page_cache, reason, "dropping the guest's file caches");
        let request = DropCachesRequest { page_cache, ..Default::default() };
        if let Err(error) = self.agent.sandbox.drop_caches(within(timeouts::SLOW), &request).await {
            tracing::warn!(%error, "failed to drop the guest's file caches");
        }
        *lock(&self.last) = Some(Instant::now());
    }
}

/// Receives a notification when the kernel reclaims the cgroup's memory.
enum Watch {
    /// `memory.events` of cgroup v2.
    Events(AsyncFd<OwnedFd>),
    /// The eventfd of cgroup v1, and the `memory.pressure_level` files for which it is registered.
    Pressure { event: AsyncFd<OwnedFd>, _levels: Vec<File> },
}

impl Watch {
    fn new(location: &CgroupLocation) -> io::Result<Self> {
        let dir = location.controller_dir("memory").ok_or(io::ErrorKind::NotFound)?;
        match location {
            CgroupLocation::V2(_) => {
                let events = OwnedFd::from(File::open(dir.join("memory.events"))?);
                Ok(Self::Events(register(events, Interest::PRIORITY)?))
            }
            CgroupLocation::V1(_) => {
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
                let mut levels = Vec::new();
                // Watch two cgroups: the sandbox's cgroup and its parent, the pod's cgroup. The kernel reports a
                // reclaim in the cgroup whose limit caused the reclaim.
                for dir in dir.ancestors().take(2) {
                    let level = match File::open(dir.join("memory.pressure_level")) {
                        // If the sandbox has no pod, the parent cgroup may not have this file.
                        Err(error) if error.kind() == io::ErrorKind::NotFound && !levels.is_empty() => break,
                        level => level?,
                    };
                    let control = format!("{} {} low", event.as_raw_fd(), level.as_raw_fd());
                    fs::write(dir.join("cgroup.event_control"), control)?;
                    levels.push(level);
                }
                Ok(Self::Pressure { event: register(OwnedFd::from(event), Interest::READABLE)?, _levels: levels })
            }
        }
    }

    async fn run(&self, location: &CgroupLocation, guest: &Guest) -> io::Result<()> {
        loop {
            self.next().await?;
            let location = location.clone();
            if blocking::spawn(move || is_nearly_exhausted(&location)).await.unwrap_or(false) {
                guest.drop_caches("the pod's memory on the host is nearly exhausted").await;
            }
            tokio::time::sleep(MIN_INTERVAL).await;
        }
    }

    /// Waits for a notification, and consumes all pending notifications. The first call can return at once.
    async fn next(&self) -> io::Result<()> {
        let mut bytes = [0u8; 4096];
        match self {
            Self::Events(events) => {
                let mut ready = events.ready(Interest::PRIORITY).await?;
                ready.clear_ready();
                // The kernel reports a change until the file is read again (Linux, fs/kernfs/file.c,
                // kernfs_generic_poll).
                nix::sys::uio::pread(events, &mut bytes, 0)?;
            }
            Self::Pressure { event, .. } => {
                let read = |event: &OwnedFd| Ok(nix::unistd::read(event, &mut bytes)?);
                event.async_io(Interest::READABLE, read).await?;
            }
        }
        Ok(())
    }
}

/// Returns whether the memory that the kernel cannot reclaim is within [`MARGIN`] of the limit.
fn is_nearly_exhausted(location: &CgroupLocation) -> bool {
    match (limits::reclaim_threshold(location), unreclaimable(location)) {
        (Some(limit), Some(unreclaimable)) => unreclaimable.saturating_add(MARGIN) >= limit,
        _ => false,
    }
}

/// Returns the cgroup's memory usage without the page cache, in bytes. Returns `None` if a file cannot be read.
fn unreclaimable(location: &CgroupLocation) -> Option<u64> {
    let dir = location.controller_dir("memory")?;
    let (usage, prefix) = match location {
        CgroupLocation::V2(_) => ("memory.current", ""),
        CgroupLocation::V1(_) => ("memory.usage_in_bytes", "total_"),
    };
    let usage: u64 = read(dir, usage)?.trim().parse().ok()?;
    let stat = read(dir, "memory.stat")?;
    let cache: u64 = ["active_file", "inactive_file"].iter().map(|name| field(&stat, &format!("{prefix}{name}"))).sum();
    Some(usage.saturating_sub(cache))
}

fn read(dir: &Path, file: &str) -> Option<String> {
    fs::read_to_string::<PathBuf>(dir.join(file)).ok()
}

fn field(stat: &str, name: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use husk_vmm::control::{Notice, Reply, wire};
    use tokio::sync::mpsc;
    use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

    use super::*;

    /// Starts an agent that answers each request with an empty message. Returns the shim's client of this agent, and
    /// the number of requests.
    fn agent() -> (Agent, Arc<AtomicUsize>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let count = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&count);
        std::thread::spawn(move || {
            let mut header = [0; MESSAGE_HEADER_LENGTH];
            while theirs.read_exact(&mut header).is_ok() {
                let request = MessageHeader::from(header);
                theirs.read_exact(&mut vec![0; request.length as usize]).unwrap();
                counted.fetch_add(1, Ordering::Relaxed);
                let answer = MessageHeader { length: 0, type_: MESSAGE_TYPE_RESPONSE, ..request };
                theirs.write_all(&Vec::from(answer)).unwrap();
            }
        });
        (Agent::new(ours).unwrap(), count)
    }

    #[tokio::test]
    async fn vmm_that_reports_scarce_fds_without_end_makes_the_guest_drop_caches_once_per_interval() {
        let (ours, theirs) = wire::pair().unwrap();
        husk_base::sys::fd::set_nonblocking(&ours).unwrap();
        let (notify, _notices) = mpsc::channel(1);
        let vmm = Vmm::over(ours, notify).unwrap();
        std::thread::spawn(move || while wire::send(&theirs, &Reply::Notice(Notice::FdShortage), &[]).is_ok() {});
        let (agent, drops) = agent();
        let guest = Guest { agent, last: Mutex::new(None) };
        let begin = Instant::now();
        let end = tokio::time::timeout(3 * MIN_INTERVAL, guest.free_fds(&vmm)).await;
        let most = 1 + begin.elapsed().div_duration_f64(MIN_INTERVAL) as usize;
        let drops = drops.load(Ordering::Relaxed);
        assert!(end.is_err() && (1..=most).contains(&drops), "{drops} drops, expected 1 to {most}");
    }

    #[test]
    fn is_nearly_exhausted_ignores_the_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        fs::create_dir(&pod).unwrap();
        let write = |file: &str, text: String| fs::write(pod.join(file), text).unwrap();
        let location = CgroupLocation::V2(pod.clone());
        assert!(!is_nearly_exhausted(&location));
        write("memory.current", (100u64 << 20).to_string());
        write("memory.stat", format!("anon 1\nfile 9\ninactive_file {}\nactive_file 0\nslab 3\n", 10 << 20));
        assert!(!is_nearly_exhausted(&location));
        write("memory.high", "max\n".into());
        assert!(!is_nearly_exhausted(&location));
        write("memory.high", format!("{}\n", 101u64 << 20));
        assert!(!is_nearly_exhausted(&location));
        write("memory.high", format!("{}\n", 91u64 << 20));
        assert!(is_nearly_exhausted(&location));
    }
}
