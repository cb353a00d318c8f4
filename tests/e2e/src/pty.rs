//! A pseudo-terminal for `ctr -t`.

use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use husk_base::sys::terminal;
use nix::pty::{Winsize, openpty};

use crate::command::Running;

/// A program on its own terminal.
pub struct Terminal {
    /// The program. Terminal output counts as its standard output.
    pub running: Running,
    master: OwnedFd,
}

impl Terminal {
    /// Starts `command` on a new terminal of this size.
    #[track_caller]
    pub fn start(mut command: Command, rows: u16, columns: u16) -> Self {
        let pty = openpty(&size(rows, columns), None).expect("failed to open a pseudo-terminal");
        let slave = || pty.slave.try_clone().expect("failed to duplicate the terminal's slave fd");
        command.stdin(slave()).stdout(slave()).stderr(slave());
        // SAFETY: setsid(2) and ioctl(2) are async-signal-safe, and the closure accesses no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                // A resize sends SIGWINCH only if the terminal is the session's controlling terminal.
                terminal::set_controlling(std::io::stdin())
            });
        }
        drop(pty.slave);
        let reader = pty.master.try_clone().expect("failed to duplicate the terminal's master fd");
        Self { running: Running::start_on_terminal(command, reader), master: pty.master }
    }

    /// Changes the terminal's size. The kernel sends SIGWINCH to the program.
    pub fn resize(&self, rows: u16, columns: u16) {
        terminal::set_window_size(&self.master, columns, rows).expect("failed to set the terminal's size");
    }

    /// Types `text` on the terminal.
    #[track_caller]
    pub fn type_text(&self, text: &str) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let written = nix::unistd::write(&self.master, rest).expect("failed to write to the terminal");
            rest = &rest[written..];
        }
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
