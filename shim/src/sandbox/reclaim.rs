//! Gives back what the guest remembers of files when the pod's memory on the host, or what the VMM may have open, comes to
//! its end.
//!
//! Every file that the guest's kernel remembers is open in the VMM, which pins the host's inode: memory of the pod's that
//! the host's kernel cannot take back, and that the guest's does not know of. A guest that walks through many files would
//! so have its VMM killed. Version 2 of control groups throttles at `memory.high` and tells of it (`memory.events`,
//! Documentation/admin-guide/cgroup-v2.rst); version 1 tells when it looks for memory to take back
//! (`memory.pressure_level`, Documentation/admin-guide/cgroup-v1/memory.rst).

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use husk_proto::agent::ForgetRequest;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::agent::{Agent, timeouts, within};
use super::cgroup::Place;
use super::limits;
use super::vmm::Vmm;
use crate::lock;

/// The kernel tells of every time it takes something back; one look is enough for those that come together.
const PAUSE: Duration = Duration::from_secs(1);
/// Files that the guest has read of stay in its memory as long as what it read. Where it was not enough to forget the
/// others, and that shows within this time, it is to forget that too.
const TWICE: Duration = Duration::from_secs(15);
/// How close to its limit the memory that cannot be taken back may come.
const MARGIN: u64 = 2 << 20;

/// Begins to watch, until the virtual machine ends.
pub fn start(place: Option<Place>, agent: Agent, vmm: Vmm) {
    let guest = Guest { agent, last: Mutex::new(None) };
    tokio::spawn(async move {
        let memory = async {
            let Some(place) = &place else { return };
            match async { Watch::of(place)?.run(place, &guest).await }.await {
                // The host does not count memory, or the cgroup is not where it would.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%error, "nobody watches the pod's memory on the host"),
                Ok(()) => {}
            }
        };
        let files = async {
            loop {
                vmm.many_files().await;
                guest.forget("it knows of as many as can be open on the host").await;
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = async { tokio::join!(memory, files).1 } => {}
            _ = vmm.wait() => {}
        }
    });
}

/// The guest, and when it last forgot.
struct Guest {
    agent: Agent,
    last: Mutex<Option<Instant>>,
}

impl Guest {
    /// Has it forget files that nobody uses.
    async fn forget(&self, reason: &str) {
        let pages = lock(&self.last).is_some_and(|last| last.elapsed() < TWICE);
        tracing::info!(pages, reason, "the guest is to forget files");
        let request = ForgetRequest { pages, ..Default::default() };
        if let Err(error) = self.agent.sandbox.forget(within(timeouts::SLOW), &request).await {
            tracing::warn!(%error, "the guest forgets no files");
        }
        *lock(&self.last) = Some(Instant::now());
    }
}

/// What has something to read when the kernel looked for memory.
struct Watch {
    notices: AsyncFd<OwnedFd>,
    /// Version 1 tells as long as these are open.
    _levels: Vec<File>,
}

impl Watch {
    fn of(place: &Place) -> io::Result<Self> {
        let dir = place.of("memory").ok_or(io::ErrorKind::NotFound)?;
        let (notices, levels) = match place {
            Place::Unified(_) => {
                let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
                inotify.add_watch(&dir.join("memory.events"), AddWatchFlags::IN_MODIFY)?;
                (OwnedFd::from(inotify), Vec::new())
            }
            Place::Legacy(_) => {
                let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
                let mut levels = Vec::new();
                // The pod's is told of what its own limit makes the kernel look for.
                for dir in dir.ancestors().take(2) {
                    let level = match File::open(dir.join("memory.pressure_level")) {
                        // Above a sandbox' that no pod's is around there may be none.
                        Err(error) if error.kind() == io::ErrorKind::NotFound && !levels.is_empty() => break,
                        level => level?,
                    };
                    let control = format!("{} {} low", event.as_raw_fd(), level.as_raw_fd());
                    fs::write(dir.join("cgroup.event_control"), control)?;
                    levels.push(level);
                }
                (OwnedFd::from(event), levels)
            }
        };
        // SAFETY: the descriptor is moved into the registration and closed with it, not before.
        let notices = unsafe { AsyncFd::register(notices) }?;
        Ok(Self { notices, _levels: levels })
    }

    async fn run(&self, place: &Place, guest: &Guest) -> io::Result<()> {
        loop {
            self.next().await?;
            let place = place.clone();
            if tokio::task::spawn_blocking(move || is_short(&place)).await.unwrap_or(false) {
                guest.forget("the pod's memory on the host is used up").await;
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits for a notice, and takes all there are.
    async fn next(&self) -> io::Result<()> {
        let mut ready = self.notices.readable().await?;
        let mut bytes = [0u8; 4096];
        loop {
            // SAFETY: the buffer lives through the call and the length is its own.
            let read = unsafe { libc::read(self.notices.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
            match (read, io::Error::last_os_error()) {
                (1.., _) => {}
                (0, _) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (_, error) if error.kind() == io::ErrorKind::WouldBlock => break,
                (_, error) if error.kind() == io::ErrorKind::Interrupted => {}
                (_, error) => return Err(error),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}

/// Whether there is hardly more than what the host's kernel cannot take back.
fn is_short(place: &Place) -> bool {
    match (limits::memory(place), held(place)) {
        (Some(limit), Some(held)) => held.saturating_add(MARGIN) >= limit,
        _ => false,
    }
}

/// Bytes of the cgroup's that are no cache of files.
fn held(place: &Place) -> Option<u64> {
    let dir = place.of("memory")?;
    let (usage, prefix) = match place {
        Place::Unified(_) => ("memory.current", ""),
        Place::Legacy(_) => ("memory.usage_in_bytes", "total_"),
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
    use super::*;

    #[test]
    fn cache_of_files_is_no_shortage() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("pod");
        fs::create_dir(&pod).unwrap();
        let write = |file: &str, text: String| fs::write(pod.join(file), text).unwrap();
        let place = Place::Unified(pod.clone());
        assert!(!is_short(&place));
        write("memory.current", (100u64 << 20).to_string());
        write("memory.stat", format!("anon 1\nfile 9\ninactive_file {}\nactive_file 0\nslab 3\n", 10 << 20));
        assert!(!is_short(&place));
        write("memory.high", "max\n".into());
        assert!(!is_short(&place));
        write("memory.high", format!("{}\n", 101u64 << 20));
        assert!(!is_short(&place));
        write("memory.high", format!("{}\n", 91u64 << 20));
        assert!(is_short(&place));
    }
}
