//! Terminals: pseudoterminal pairs, window sizes and the controlling terminal (ioctl_tty(2)).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::new_fd;

/// Unlocks the slave of a pseudoterminal, so that the slave can be opened.
///
/// # Errors
/// The errors of the ioctl TIOCSPTLCK.
pub fn unlock(master: impl AsFd) -> io::Result<()> {
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one integer, which outlives the call.
    match unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens the slave of a pseudoterminal (Linux 4.13). Uses no path. Therefore files that an image has put into
/// `/dev/pts` cannot make the call open something else. `flags` are the flags of open(2).
///
/// # Errors
/// The errors of the ioctl TIOCGPTPEER.
pub fn open_slave(master: impl AsFd, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: TIOCGPTPEER takes flags, no pointer, and returns a new fd or -1.
    unsafe { new_fd(libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCGPTPEER, flags)) }
}

/// Sets the window size, in characters.
///
/// # Errors
/// The errors of the ioctl TIOCSWINSZ.
pub fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize, which outlives the call.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns the window size in characters, columns first.
///
/// # Errors
/// The errors of the ioctl TIOCGWINSZ.
pub fn window_size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes a winsize, which outlives the call.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } {
        0 => Ok((size.ws_col, size.ws_row)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes the terminal the controlling terminal of this session. The caller must be the session leader.
///
/// # Errors
/// The errors of the ioctl TIOCSCTTY.
pub fn set_controlling(terminal: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes a number, no pointer.
    match unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no ioctl for files")]
    fn slave_opens_after_unlock() {
        let mut master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        assert!(open_slave(&master, flags).is_err());
        unlock(&master).unwrap();
        let mut slave = File::from(open_slave(&master, flags).unwrap());
        set_window_size(&master, 80, 24).unwrap();
        assert_eq!(window_size(&slave).unwrap(), (80, 24));
        slave.write_all(b"x").unwrap();
        let mut byte = [0];
        master.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        assert!(set_window_size(io::pipe().unwrap().0, 80, 24).is_err());
        assert!(window_size(io::pipe().unwrap().0).is_err());
        assert!(set_controlling(io::pipe().unwrap().0).is_err());
    }
}
