//! Opens a terminal inside a container, makes it this process's controlling terminal and sends its master to the agent.

use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, fchown};
use std::os::unix::net::UnixStream;

use libcontainer::oci_spec::runtime::Process;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS: libc::c_long = 0x1cd1;

/// Opens a new terminal and makes it this process's standard streams and controlling terminal.
///
/// # Errors
/// Fails with EINVAL if the container's `/dev/pts` is not a devpts file system.
pub fn attach(console: &UnixStream, process: &Process) -> io::Result<()> {
    let flags = libc::O_NOCTTY | libc::O_NOFOLLOW;
    let master: OwnedFd = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/pts/ptmx")?.into();
    check_devpts(&master)?;
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one integer, which outlives the call.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // TIOCGPTPEER needs no path, so files that the image put into /dev/pts cannot redirect it.
    // SAFETY: TIOCGPTPEER takes flags, no pointer.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY) };
    if slave < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this fd; nothing else owns it.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    if let Some(size) = process.console_size() {
        let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
        let size =
            libc::winsize { ws_row: clamp(size.height()), ws_col: clamp(size.width()), ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the size outlives the call, which only reads it.
        unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }
    let _ = fchown(&slave, Some(process.user().uid()), None);
    let fds = [master.as_raw_fd()];
    sendmsg::<()>(
        console.as_raw_fd(),
        &[IoSlice::new(b"/dev/ptmx")],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )?;
    // SAFETY: TIOCSCTTY takes a number, no pointer.
    if unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for target in 0..3 {
        // SAFETY: dup2 takes no pointers and replaces only fds 0 to 2, which no Rust object of this process owns.
        if unsafe { libc::dup2(slave.as_raw_fd(), target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn check_devpts(master: &OwnedFd) -> io::Result<()> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the buffer has the type that fstatfs fills in.
    if unsafe { libc::fstatfs(master.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the buffer is initialised.
    match unsafe { stat.assume_init() }.f_type == DEVPTS {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}
