//! Receives a container's terminal from the helper over a console socket, and sets the terminal's window size.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use husk_base::sys::{scm_rights, terminal};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};

use super::relay::{self, Endpoint};

/// Console socket of one process. The helper gets the socket's path.
pub struct Console {
    listener: UnixListener,
    path: PathBuf,
}

impl Console {
    /// Listens at a new, short path. A socket path has at most 108 bytes (unix(7)). The container id and the exec id
    /// have 64 bytes each in a pod, so a path with both ids would be too long.
    pub fn listen() -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = PathBuf::from(format!("/run/husk/tty-{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        let _ = std::fs::remove_file(&path);
        Ok(Self { listener: UnixListener::bind(&path)?, path })
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the helper sends the terminal's master. Fails if the connection ends before the master arrives.
    pub async fn receive(self) -> io::Result<Endpoint> {
        let (stream, _) = self.listener.accept().await?;
        let fd = loop {
            stream.readable().await?;
            match stream.try_io(Interest::READABLE, || receive_fd(&stream)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => break result?,
            }
        };
        relay::endpoint(fd)
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let packet = scm_rights::receive(socket, &mut [0; 64])?;
    packet.fds.into_iter().next().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Sets the terminal's window size. A size of 0 x 0 means that the size is unknown.
///
/// containerd's shim for runc also sets any size (`Init.Resize` in cmd/containerd-shim-runc-v2/process/init.go).
/// containerd's CRI does not pass a size that contains a zero to the shim (`handleResizing` of the CRI server).
pub fn resize(master: &Endpoint, width: u32, height: u32) -> io::Result<()> {
    let clamp = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    terminal::set_window_size(master.get_ref(), clamp(width), clamp(height))
}

/// Makes `uid` the owner of the terminal's slave, as runc does, so that this user can open the slave again.
pub fn chown_slave(master: &Endpoint, uid: u32) {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    if let Ok(slave) = terminal::open_slave(master.get_ref(), flags) {
        let _ = std::os::unix::fs::fchown(slave, Some(uid), None);
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[tokio::test]
    async fn resize_accepts_zero_and_clamps_large_sizes() {
        let master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let master = relay::endpoint(master.into()).unwrap();
        for (size, expected) in [((80, 24), (80, 24)), ((0, 0), (0, 0)), ((1 << 16, 1), (u16::MAX, 1))] {
            resize(&master, size.0, size.1).unwrap();
            assert_eq!(terminal::window_size(master.get_ref()).unwrap(), expected);
        }
    }
}
