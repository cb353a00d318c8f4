//! Functions for the test node: containerd's log, images, Husk's configuration, and waiting for a condition.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use husk_base::sync::lock;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command::{Input, Running};
use crate::containerd;

pub use crate::containerd_log::log_tail;

/// Returns the directory of the image tars. `HUSK_IMAGES` overrides this directory.
pub fn image_dir() -> PathBuf {
    std::env::var_os("HUSK_IMAGES").map_or_else(|| PathBuf::from("/husk/images"), PathBuf::from)
}

/// Sends a signal to a process of the node.
#[track_caller]
pub fn send_signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap_or_else(|error| panic!("failed to send {signal} to pid {pid}: {error}"));
}

/// Imports an image unless containerd has it already.
pub fn need_image(reference: &str) {
    need_image_in(crate::NAMESPACE, reference);
}

/// Like [`need_image`], for another containerd namespace.
pub fn need_image_in(namespace: &str, reference: &str) {
    static KNOWN: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&KNOWN);
    let known = known.entry(namespace.to_owned()).or_insert_with(|| {
        containerd::images(namespace)
            .unwrap_or_else(|status| panic!("failed to list the images in the namespace {namespace}: {status}"))
    });
    if known.iter().any(|one| one == reference) {
        return;
    }
    let name = reference.trim_start_matches("husk.test/").trim_end_matches(":latest");
    let tar = image_dir().join(format!("{name}.tar"));
    let mut command = Command::new("ctr");
    command.args(["-n", namespace, "images", "import", &tar.to_string_lossy()]);
    Running::start(command, Input::Null).wait_within(Duration::from_secs(300)).expect_code(0);
    known.push(reference.to_owned());
}

/// Polls `probe` until it returns a value or the timeout expires. Use this function only for conditions that no event
/// reports.
pub fn eventually<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        let passed = begin.elapsed();
        if passed > limit {
            return None;
        }
        thread::sleep((passed / 10).clamp(Duration::from_millis(10), Duration::from_millis(100)));
    }
}

/// Returns the node's kernel release.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned()
}

/// Writes dirty pages back, and drops the node's caches.
pub fn drop_caches() {
    nix::unistd::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
}

/// Waits until the node's available memory is stable, because the memory of removed pods may be freed late. Drops the
/// node's caches meanwhile.
pub fn wait_for_stable_memory() {
    const TOLERANCE: f64 = 512.0 * 1024.0;
    let mut last = 0.0;
    eventually(Duration::from_secs(30), || {
        thread::sleep(Duration::from_secs(1));
        drop_caches();
        let now = meminfo("MemAvailable");
        let change: f64 = now - std::mem::replace(&mut last, now);
        (change.abs() < TOLERANCE).then_some(())
    });
}

/// Returns a value of /proc/meminfo, in bytes. Returns 0 if the node's kernel does not have the value.
pub fn meminfo(key: &str) -> f64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    1024.0 * found.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0.0)
}

/// Path of Husk's configuration.
const CONFIG: &str = "/etc/husk/config.toml";

/// A temporary configuration of Husk. Dropping it restores the node's configuration.
#[derive(Debug)]
pub struct Config {
    saved: Option<Vec<u8>>,
}

impl Config {
    /// Replaces the configuration by `content`. The factor for timeouts stays, because the node can be emulated. Whether
    /// guests are made from templates stays, too, unless `content` says otherwise.
    pub fn set(content: &str) -> Self {
        let saved = Self { saved: fs::read(CONFIG).ok() };
        let factor = if content.contains("timeout_factor") { "" } else { "\ntimeout_factor = 5\n" };
        let before = saved.saved.as_deref().unwrap_or_default();
        let of_node =
            String::from_utf8_lossy(before).lines().find(|line| line.starts_with("template =")).map(str::to_owned);
        let template = of_node.filter(|_| !content.contains("template =")).unwrap_or_default();
        fs::write(CONFIG, format!("{content}{factor}\n{template}\n")).unwrap();
        saved
    }

    /// Replaces the configuration file by a directory, which not even root can read as a file.
    pub fn directory() -> Self {
        let saved = Self { saved: fs::read(CONFIG).ok() };
        let _ = fs::remove_file(CONFIG);
        fs::create_dir_all(CONFIG).unwrap();
        saved
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        let _ = fs::remove_dir(CONFIG);
        let _ = match &self.saved {
            Some(content) => fs::write(CONFIG, content),
            None => fs::remove_file(CONFIG),
        };
    }
}
