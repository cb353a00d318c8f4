//! What the test makes outside of the jail: the share, a disk of the host, and the cgroup that stands for the pod's.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The limit of pids in the cgroup. In a pod, the shim sets this limit (`shim/src/resources/cgroup/mod.rs`).
pub const MAX_PIDS: u64 = 64;

/// Mount point of cgroup v2, or parent directory of the cgroup v1 mounts.
const CGROUPS: &str = "/sys/fs/cgroup";

// linux/loop.h
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Length of `struct loop_config` in units of four bytes.
const LOOP_CONFIG_WORDS: usize = 76;
/// Position of `info.lo_flags` in `struct loop_config`, in units of four bytes.
const LOOP_CONFIG_FLAGS: usize = 15;

/// The pod's share, mounted as the shim mounts it.
pub struct Share(pub PathBuf);

impl Share {
    pub fn new(outside: &Path) -> Self {
        let path = outside.join("share");
        fs::create_dir(&path).expect("create the share");
        fs::write(path.join("inside"), "inside").expect("write a file in the share");
        fs::write(outside.join("secret"), "secret").expect("write a file beside the share");
        let none = None::<&str>;
        mount(Some(&path), &path, none, MsFlags::MS_BIND, none).expect("mount the share, which needs root");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(none, &path, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none).expect("set the share's flags");
        Self(path)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A disk of the host: a loop device. The kernel detaches the device when the test closes the device.
pub struct Disk(File);

impl Disk {
    pub fn new(outside: &Path) -> Self {
        let path = outside.join("disk");
        fs::write(&path, "content of a disk of the host").expect("write the disk's file");
        let file = File::options().read(true).write(true).open(path).expect("open the disk's file");
        file.set_len(1 << 20).expect("extend the disk's file");
        // Another process can attach the same free device first.
        (0..10).find_map(|_| attach(&file)).map(Self).expect("attach a loop device, which needs root and /dev/loop*")
    }

    /// Returns the device number.
    pub fn number(&self) -> u64 {
        self.0.metadata().expect("read the loop device's number").rdev()
    }
}

/// Attaches a file to a free loop device. Returns `None` if the device is no longer free.
fn attach(file: &File) -> Option<File> {
    let control = File::open("/dev/loop-control").expect("open /dev/loop-control, which needs root");
    // SAFETY: the request takes no argument.
    let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
    let device = format!("/dev/loop{number}");
    let device = File::options().read(true).write(true).open(device).expect("open a free loop device");
    let mut config = [0u32; LOOP_CONFIG_WORDS];
    config[0] = file.as_raw_fd().cast_unsigned();
    config[LOOP_CONFIG_FLAGS] = LO_FLAGS_AUTOCLEAR;
    // SAFETY: `config` has the length of `struct loop_config`, and outlives the call.
    (unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) } == 0).then_some(device)
}

/// A cgroup with a limit of pids.
pub struct Cgroup(PathBuf);

impl Cgroup {
    pub fn new() -> Self {
        let v2 = Path::new(CGROUPS).join("cgroup.subtree_control");
        let parent = if v2.exists() {
            fs::write(v2, "+pids").expect("enable the pids controller of cgroup v2, which needs root");
            PathBuf::from(CGROUPS)
        } else {
            Path::new(CGROUPS).join("pids")
        };
        let path = parent.join(format!("husk-escape-{}", std::process::id()));
        fs::create_dir(&path).expect("create a cgroup, which needs root and the pids controller");
        let cgroup = Self(path);
        fs::write(cgroup.0.join("pids.max"), MAX_PIDS.to_string()).expect("limit the pids of the cgroup");
        cgroup
    }

    /// Opens the file with which a process enters the cgroup.
    pub fn procs(&self) -> OwnedFd {
        let file = File::options().write(true).open(self.0.join("cgroup.procs"));
        file.expect("open cgroup.procs").into()
    }

    /// Returns how often the limit has refused a pid.
    pub fn refusals(&self) -> io::Result<u64> {
        let events = fs::read_to_string(self.0.join("pids.events"))?;
        let max = events.lines().find_map(|line| line.strip_prefix("max ")?.parse().ok());
        max.ok_or_else(|| io::Error::other(format!("pids.events has no count: {events:?}")))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
