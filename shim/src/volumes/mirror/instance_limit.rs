//! Limits the number of inotify instances that all shims of a node have together.
//!
//! The node's limit counts the instances of root. Other programs of root need some, too: systemd, containerd and the
//! kubelet. Therefore the shims together take at most a quarter of the limit. Each instance of a shim holds a permit,
//! which is an abstract Unix socket. The kernel frees the socket's name whatever happens to the shim. If another
//! program of the node takes the names, the shims poll.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, bind, socket};

/// The node's limit of the instances of a user.
const LIMIT: &str = "/proc/sys/fs/inotify/max_user_instances";
/// The kernel's default of [`LIMIT`].
const DEFAULT: u32 = 128;
/// The shims take at most this part of the limit.
const PART: u32 = 4;
/// Maximum number of permits.
const MAX_PERMITS: u32 = 1024;
/// The sockets of this thread's network namespace (proc_pid_net(5)).
const SOCKETS: &str = "/proc/thread-self/net/unix";
/// Names of the permits, without their numbers.
const NAME: &str = "husk/inotify/";

/// The right to have an inotify instance. Dropping it frees it for another shim.
#[derive(Debug)]
pub struct Permit {
    _socket: OwnedFd,
}

impl Permit {
    /// Takes a permit. Blocks the calling thread, because the list of the node's sockets can be long.
    ///
    /// # Errors
    /// EMFILE, like inotify_init1(2) at the node's limit, if the shims have all permits. Another error if no socket can
    /// be created.
    pub fn take() -> io::Result<Self> {
        let limit = fs::read_to_string(LIMIT).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT);
        Self::take_of(NAME, (limit / PART).clamp(1, MAX_PERMITS))
    }

    fn take_of(name: &str, count: u32) -> io::Result<Self> {
        // The socket does not listen. Therefore nobody can connect to it or send to it.
        let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let taken = numbers_in(&fs::read(SOCKETS).unwrap_or_default(), name);
        // Shims begin with different names. Another shim can take a name after this shim has read the list.
        let first = std::process::id() % count;
        for number in (first..count).chain(0..first).filter(|number| !taken.contains(number)) {
            let address = UnixAddr::new_abstract(format!("{name}{number}").as_bytes())?;
            match bind(socket.as_raw_fd(), &address) {
                Ok(()) => return Ok(Self { _socket: socket }),
                Err(Errno::EADDRINUSE) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(Errno::EMFILE.into())
    }
}

/// Returns the numbers of the abstract sockets with the prefix `name` in a list of sockets. The list shows the NUL at
/// the beginning of such a name as `@`.
fn numbers_in(sockets: &[u8], name: &str) -> HashSet<u32> {
    let prefix = format!(" @{name}");
    let lines = sockets.split(|byte| *byte == b'\n').filter_map(|line| std::str::from_utf8(line).ok());
    lines.filter_map(|line| line.split_once(&prefix)?.1.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_finds_the_names_that_exist() {
        let name = format!("husk/inotify-list-test-{}/", std::process::id());
        let numbers = || numbers_in(&fs::read(SOCKETS).unwrap(), &name);
        assert_eq!(numbers(), HashSet::new());
        let permits: Vec<Permit> = (0..3).map(|_| Permit::take_of(&name, 3).unwrap()).collect();
        assert_eq!(numbers(), HashSet::from([0, 1, 2]));
        drop(permits);
        assert_eq!(numbers(), HashSet::new());
    }

    #[test]
    fn dropped_permit_can_be_taken_again() {
        let name = format!("husk/inotify-test-{}/", std::process::id());
        let take = || Permit::take_of(&name, 3);
        let mut permits: Vec<Permit> = (0..3).map(|_| take().unwrap()).collect();
        assert_eq!(take().unwrap_err().raw_os_error(), Some(libc::EMFILE));
        permits.pop();
        permits.push(take().unwrap());
        assert!(take().is_err());
    }
}
