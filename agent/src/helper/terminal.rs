//! Opens a terminal inside a container, makes it this process's controlling terminal and sends its master to the agent.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::os::unix::net::UnixStream;

use husk_base::sys::{scm_rights, terminal};
use libcontainer::oci_spec::runtime::Process;
use nix::sys::statfs::{DEVPTS_SUPER_MAGIC, fstatfs};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Opens a new terminal and makes it this process's standard streams and controlling terminal.
///
/// # Errors
/// Fails with EINVAL if the container's `/dev/pts` is not a devpts file system.
pub fn attach(console: &UnixStream, process: &Process) -> io::Result<()> {
    let flags = libc::O_NOCTTY | libc::O_NOFOLLOW;
    let master: OwnedFd = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/pts/ptmx")?.into();
    check_devpts(&master)?;
    terminal::unlock(&master)?;
    // `open_slave` uses the master's fd and no path. Therefore files that the image has put into /dev/pts cannot
    // redirect the call.
    let slave = terminal::open_slave(&master, libc::O_RDWR | libc::O_NOCTTY)?;
    if let Some(size) = process.console_size() {
        let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        let _ = terminal::set_window_size(&slave, clamp(size.width()), clamp(size.height()));
    }
    let _ = fchown(&slave, Some(process.user().uid()), None);
    scm_rights::send(console, b"/dev/ptmx", &[master.as_fd()])?;
    terminal::set_controlling(&slave)?;
    dup2_stdin(&slave)?;
    dup2_stdout(&slave)?;
    dup2_stderr(&slave)?;
    Ok(())
}

fn check_devpts(master: &OwnedFd) -> io::Result<()> {
    match fstatfs(master)?.filesystem_type() {
        DEVPTS_SUPER_MAGIC => Ok(()),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}
