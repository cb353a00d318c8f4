//! The node the suites run in: containerd's log, the images, waiting for a condition.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::command::{Input, Running};

/// The last lines of containerd's log, which `HUSK_E2E_CONTAINERD_LOG` names.
pub fn log_tail(lines: usize) -> String {
    let path = std::env::var("HUSK_E2E_CONTAINERD_LOG").unwrap_or_else(|_| "/var/log/containerd.log".to_owned());
    let Ok(log) = fs::read(&path) else {
        return format!("(cannot read {path})");
    };
    let log = String::from_utf8_lossy(&log);
    let all: Vec<&str> = log.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Directory of the image tars, which `HUSK_IMAGES` names.
pub fn image_dir() -> PathBuf {
    std::env::var_os("HUSK_IMAGES").map_or_else(|| PathBuf::from("/husk/images"), PathBuf::from)
}

/// Imports the image unless this boot has it already.
pub fn need_image(reference: &str) {
    need_image_in(crate::NAMESPACE, reference);
}

/// The same for one of containerd's namespaces.
pub fn need_image_in(namespace: &str, reference: &str) {
    static KNOWN: Mutex<BTreeMap<String, Vec<String>>> = Mutex::new(BTreeMap::new());
    let ctr = |args: &[&str]| {
        let mut command = Command::new("ctr");
        command.args(["-n", namespace, "images"]).args(args);
        Running::start(command, Input::Null)
    };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let known = known
        .entry(namespace.to_owned())
        .or_insert_with(|| ctr(&["ls", "-q"]).wait().expect_code(0).out().lines().map(str::to_owned).collect());
    if known.iter().any(|one| one == reference) {
        return;
    }
    let name = reference.trim_start_matches("husk.test/").trim_end_matches(":latest");
    let tar = image_dir().join(format!("{name}.tar"));
    ctr(&["import", &tar.to_string_lossy()]).wait_within(Duration::from_secs(300)).expect_code(0);
    known.push(reference.to_owned());
}

/// Waits until `probe` gives something. For what sends no event that a test could wait for.
pub fn eventually<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// The kernel release of the node itself.
pub fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned()
}

/// Where Husk's configuration is.
const CONFIG: &str = "/etc/husk/config.toml";

/// Another configuration of Husk's for the time of a test; the node's own comes back when this is dropped.
#[derive(Debug)]
pub struct Config {
    saved: Option<Vec<u8>>,
}

impl Config {
    /// Makes `content` the configuration.
    pub fn set(content: &str) -> Self {
        let saved = Self { saved: fs::read(CONFIG).ok() };
        fs::write(CONFIG, content).unwrap();
        saved
    }

    /// Puts a directory where the configuration should be: something that not even root can read.
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
