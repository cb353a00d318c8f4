//! A disk of the node's: a file behind a loop device, for the time of a test.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, umount2};

/// Writes "changed" to `/dev/xvda` without anything that would make it last, and keeps the device open.
pub const WRITES: &str = r#"
import os, time
fd = os.open("/dev/xvda", os.O_RDWR)
os.pwrite(fd, b"changed", 1 << 20)
print("written", flush=True)
time.sleep(100000)
"#;

/// Runs a command on the node that has to succeed; gives what it prints.
#[track_caller]
pub fn on_node(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// The disk. It goes when this is dropped, and the file with it.
pub struct Disk {
    /// Its node in /dev.
    pub device: String,
    file: PathBuf,
}

impl Disk {
    /// An empty one of so many MiB, in a file of this name.
    #[track_caller]
    pub fn new(file: &Path, mib: u64) -> Self {
        File::create(file).unwrap().set_len(mib << 20).unwrap();
        let device = on_node(&["losetup", "--find", "--show", &file.to_string_lossy()]);
        Self { device, file: file.to_owned() }
    }

    /// What is on it where [`WRITES`] writes.
    #[track_caller]
    pub fn changed(&self) -> String {
        let mut seen = [0; 7];
        let mut file = File::open(&self.device).unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.read_exact(&mut seen).unwrap();
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Makes an ext4 file system on it.
    #[track_caller]
    pub fn format(&self) -> &Self {
        on_node(&["mkfs.ext4", "-q", &self.device]);
        self
    }

    /// Mounts it.
    #[track_caller]
    pub fn mount(&self, point: &Path, options: &str) -> Mounted {
        fs::create_dir_all(point).unwrap();
        on_node(&["mount", "-t", "ext4", "-o", options, &self.device, &point.to_string_lossy()]);
        Mounted(point.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
        let _ = fs::remove_file(&self.file);
    }
}

/// A mount that ends when this is dropped.
pub struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
