//! What the test makes outside of the jail: the share, a disk of the host, and the cgroup that stands for the pod's.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use husk_base::sys::loop_device;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The limit of pids in the cgroup. In a pod, the shim sets this limit (`shim/src/resources/cgroup/mod.rs`).
pub const MAX_PIDS: u64 = 64;

/// Mount point of cgroup v2, or parent directory of the cgroup v1 mounts.
const CGROUPS: &str = "/sys/fs/cgroup";

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
    let number = loop_device::free_number(&control).expect("get the number of a free loop device");
    let device = format!("/dev/loop{number}");
    let device = File::options().read(true).write(true).open(device).expect("open a free loop device");
    loop_device::configure(&device, file, false).is_ok().then_some(device)
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
