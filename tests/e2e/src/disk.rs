//! A temporary disk of the node: a file behind a loop device.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use husk_base::sys::loop_device;
use nix::mount::{MntFlags, umount2};

// Requests to loop devices (linux/loop.h). `loop_device::configure` is not usable here, because the kernel would detach
// the file as soon as the device is closed.
nix::ioctl_write_int_bad! {
    /// Attaches a file to a loop device.
    loop_set_fd, 0x4c00
}
nix::ioctl_none_bad! {
    /// Detaches the file of a loop device.
    loop_clr_fd, 0x4c01
}

// Requests to file systems (linux/fs.h).
nix::ioctl_write_int_bad! {
    /// Suspends the writes to a file system.
    fifreeze, nix::request_code_readwrite!(b'X', 119, size_of::<libc::c_int>())
}
nix::ioctl_write_int_bad! {
    /// Continues the writes to a file system.
    fithaw, nix::request_code_readwrite!(b'X', 120, size_of::<libc::c_int>())
}

/// Python program that writes "changed" to `/dev/xvda` without fsync(2), and keeps the device open.
pub const WRITER_PROGRAM: &str = r#"
import os, time
fd = os.open("/dev/xvda", os.O_RDWR)
os.pwrite(fd, b"changed", 1 << 20)
print("written", flush=True)
time.sleep(100000)
"#;

/// Python program that, after SIGTERM, writes "changed" to `/dev/xvda` without fsync(2), and exits with status 7.
pub const TERM_WRITER_PROGRAM: &str = r#"
import os, signal, time
fd = os.open("/dev/xvda", os.O_RDWR)
def stop(*_):
    os.pwrite(fd, b"changed", 1 << 20)
    print("stopped", flush=True)
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(1000)
"#;

/// Runs a command on the node, and returns its standard output. Fails if the command fails.
#[track_caller]
pub fn run_on_node(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(output.status.success(), "{command:?} failed: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A disk. Dropping it detaches the loop device and removes the file.
pub struct Disk {
    /// Path of the loop device.
    pub device: String,
    file: PathBuf,
}

impl Disk {
    /// Creates an empty disk of `mib` MiB, backed by `file`.
    #[track_caller]
    pub fn new(file: &Path, mib: u64) -> Self {
        let backing = File::options().read(true).write(true).create(true).truncate(true).open(file).unwrap();
        backing.set_len(mib << 20).unwrap();
        let control = File::open("/dev/loop-control").unwrap();
        let number = loop_device::free_number(&control).unwrap();
        let device = format!("/dev/loop{number}");
        let opened = File::options().read(true).write(true).open(&device).unwrap();
        // SAFETY: the request takes an fd as its argument, and both fds are open during the call.
        unsafe { loop_set_fd(opened.as_raw_fd(), backing.as_raw_fd()) }.unwrap();
        Self { device, file: file.to_owned() }
    }

    /// Reads the bytes at the position to which [`WRITER_PROGRAM`] writes.
    #[track_caller]
    pub fn read_written(&self) -> String {
        let mut seen = [0; 7];
        let mut file = File::open(&self.device).unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.read_exact(&mut seen).unwrap();
        String::from_utf8_lossy(&seen).into_owned()
    }

    /// Creates an ext4 file system on the disk.
    #[track_caller]
    pub fn format(&self) -> &Self {
        run_on_node(&["mkfs.ext4", "-q", &self.device]);
        self
    }

    /// Mounts the disk.
    #[track_caller]
    pub fn mount(&self, point: &Path, options: &str) -> Mounted {
        fs::create_dir_all(point).unwrap();
        run_on_node(&["mount", "-t", "ext4", "-o", options, &self.device, &point.to_string_lossy()]);
        Mounted(point.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Ok(device) = File::open(&self.device) {
            // SAFETY: the request has no argument.
            let _ = unsafe { loop_clr_fd(device.as_raw_fd()) };
        }
        let _ = fs::remove_file(&self.file);
    }
}

/// A mount. Dropping it unmounts the disk.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Suspends all writes to the file system.
    #[track_caller]
    pub fn freeze(&self) -> Frozen {
        freeze(&self.0).unwrap()
    }
}

/// Suspends all writes to the file system that is mounted at `point`. A process that writes waits in the kernel, and
/// cannot be killed.
///
/// # Errors
/// The errors of open(2) and of the request FIFREEZE.
pub fn freeze(point: &Path) -> io::Result<Frozen> {
    let directory = File::open(point)?;
    // SAFETY: the request ignores its argument, and `directory` is open during the call.
    unsafe { fifreeze(directory.as_raw_fd(), 0) }?;
    Ok(Frozen(directory))
}

/// A file system whose writes are suspended until this value is dropped.
pub struct Frozen(File);

impl Frozen {
    /// Continues the writes.
    ///
    /// # Errors
    /// The errors of the request FITHAW.
    pub fn thaw(&self) -> io::Result<()> {
        // SAFETY: the request ignores its argument, and the directory is open during the call.
        unsafe { fithaw(self.0.as_raw_fd(), 0) }?;
        Ok(())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // The request fails if `thaw` has already succeeded.
        let _ = self.thaw();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
