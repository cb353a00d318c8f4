//! What PID 1 does when it cannot go on: say why on the console, then reset the machine.

use std::io::Write;

use nix::sys::reboot::{RebootMode, reboot};

/// Makes every panic a message on the console and a reset: a PID 1 that just ends would panic the kernel.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| die(&format!("panic: {info}"))));
}

/// Prints `message` where the host sees it and resets the machine.
pub fn die(message: &str) -> ! {
    emergency(message);
    // SAFETY: sync takes nothing and cannot fail.
    unsafe { libc::sync() };
    let _ = reboot(RebootMode::RB_AUTOBOOT);
    loop {
        // SAFETY: pause only sleeps.
        unsafe { libc::pause() };
    }
}

/// One line to the kernel log at a level that reaches the console, or to standard error where there is no kernel log.
fn emergency(message: &str) {
    let line = format!("<2>husk-agent: {}\n", message.replace('\n', " "));
    let written =
        std::fs::OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut f| f.write_all(line.as_bytes()));
    if written.is_err() {
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}
