//! A pseudo-terminal to run `ctr -t` under.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::pty::{Winsize, openpty};

use crate::command::Running;

/// A program on a terminal of its own.
pub struct Terminal {
    /// What runs on it; what it prints is its standard output.
    pub running: Running,
    master: OwnedFd,
}

impl Terminal {
    /// Starts `command` on a new terminal of this size.
    #[track_caller]
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let pty = openpty(&size(rows, columns), None).expect("a pseudo-terminal");
        let slave = || pty.slave.try_clone().expect("a duplicate of the terminal");
        command.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: setsid and the ioctl are async-signal-safe and touch nothing of the parent's.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // The terminal becomes the session's controlling one, so that a resize sends SIGWINCH.
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        drop(pty.slave);
        let reader = pty.master.try_clone().expect("a duplicate of the terminal");
        Self { running: Running::start_on_terminal(command, reader), master: pty.master }
    }

    /// Changes the terminal's size; the kernel tells the program by SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) {
        // SAFETY: the descriptor is an open terminal and the structure lives through the call.
        let result = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &size(rows, columns)) };
        assert_eq!(result, 0, "TIOCSWINSZ: {}", std::io::Error::last_os_error());
    }

    /// Types text.
    #[track_caller]
    pub fn type_in(&self, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written = nix::unistd::write(&self.master, rest).expect("writing to the terminal");
            rest = &rest[written..];
        }
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
