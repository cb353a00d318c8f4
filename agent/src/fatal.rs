//! Handles fatal errors of PID 1: writes the reason to the console, then resets the VM.

use std::io::Write;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::sys::reboot::{RebootMode, reboot};

/// How long the file systems may take to write their data before the VM is reset.
const SYNC_TIMEOUT: Duration = Duration::from_secs(5);

/// Installs a panic hook that writes the message to the console and resets the VM. Without the hook, PID 1 would exit,
/// and the kernel would panic.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| die(&format!("panic: {info}"))));
}

/// Writes `message` to the console, where the host reads it, and resets the VM.
pub fn die(message: &str) -> ! {
    write_console(message);
    sync();
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        nix::unistd::pause();
    }
}

/// Writes the data of all file systems, but does not wait for a file system of the host that hangs.
fn sync() {
    let (done, synced) = channel();
    let thread = std::thread::Builder::new().spawn(move || {
        nix::unistd::sync();
        done.send(())
    });
    if thread.is_ok() {
        let _ = synced.recv_timeout(SYNC_TIMEOUT);
    }
}

/// Writes one line to the kernel log, at a level that reaches the console. The fallback is standard error.
fn write_console(message: &str) {
    let line = format!("<2>husk-agent: {}\n", message.replace('\n', " "));
    let written =
        std::fs::OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut f| f.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
