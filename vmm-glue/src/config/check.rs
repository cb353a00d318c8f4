//! Checks a configuration as a whole, and turns descriptor positions into descriptors of the right kind.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use super::{BlkConfig, FdIndex, NetConfig, ShareConfig, VmConfig};
use crate::arch::layout;
use crate::virtio::net::{Backend, MOST_PAIRS, tap_flags};

/// Least and most guest memory. The most is what one page-table level below 46 bits of address allows everywhere.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 64..=4 << 20;
/// As many processors as the guest kernel is built for.
const VCPUS: std::ops::RangeInclusive<u8> = 1..=64;
/// Longest virtio-fs tag (virtio 1.2, 5.11.4).
const TAG_MAX: usize = 36;
/// Longest serial number of a disk (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value is out of its range.
    #[error("{what} is {value}, allowed is {allowed}")]
    Range {
        /// Which value.
        what: &'static str,
        /// What it is.
        value: String,
        /// What it may be.
        allowed: &'static str,
    },
    /// A descriptor's position is beyond the list, or taken twice.
    #[error("{what}: no descriptor {index} for it came with the configuration")]
    Missing {
        /// What it is for.
        what: &'static str,
        /// Its position.
        index: usize,
    },
    /// Descriptors came that nothing uses.
    #[error("{0} descriptors came that the configuration does not use")]
    Unused(usize),
    /// A descriptor is something else.
    #[error("{what}: the descriptor is not {wanted}")]
    Kind {
        /// What it is for.
        what: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// A descriptor cannot be examined.
    #[error("{0}: cannot examine the descriptor")]
    Examine(&'static str, #[source] io::Error),
}

/// A configuration that has passed, with its descriptors.
#[derive(Debug)]
pub struct Checked {
    /// The plain values.
    pub config: VmConfig,
    /// Guest memory in bytes.
    pub memory: u64,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM file system.
    pub initrd: File,
    /// Its length.
    pub initrd_len: u64,
    /// The console's pipe.
    pub console: OwnedFd,
    /// Network interfaces and what they are connected to.
    pub net: Vec<(NetConfig, Backend)>,
    /// Disks and their files.
    pub blk: Vec<(BlkConfig, File)>,
}

/// Checks everything, creates nothing.
///
/// # Errors
/// [`ConfigError`], for the first thing found wrong.
pub fn check(config: VmConfig, fds: Vec<OwnedFd>) -> Result<Checked, ConfigError> {
    range(VCPUS.contains(&config.vcpus), "vcpus", config.vcpus, "1 to 64")?;
    let most = (config.vcpus..=*VCPUS.end()).contains(&config.max_vcpus);
    range(most, "max_vcpus", config.max_vcpus, "vcpus to 64")?;
    range(config.max_memory_mib <= *MEMORY_MIB.end(), "max_memory_mib", config.max_memory_mib, "4194304 at most")?;
    range(config.huge_mib <= *MEMORY_MIB.end(), "huge_mib", config.huge_mib, "4194304 at most")?;
    range(MEMORY_MIB.contains(&config.memory_mib), "memory_mib", config.memory_mib, "64 to 4194304")?;
    range((3..u32::MAX).contains(&config.vsock_cid), "vsock_cid", config.vsock_cid, "3 to 4294967294")?;
    let printable = config.kernel_params.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    range(printable, "kernel_params", &config.kernel_params, "printable ASCII")?;
    let devices = 2 + usize::from(config.share.is_some()) + usize::from(config.balloon);
    let growth = usize::from(config.max_memory_mib > config.memory_mib) + usize::from(config.huge_mib > 0);
    let slots = devices + config.net.len() + config.blk.len() + growth;
    range(slots <= layout::MAX_SLOTS, "number of virtio devices", slots, "18 at most")?;

    let mut fds = Fds::new(fds);
    let kvm = fds.take("kvm", config.kvm)?;
    kind(is(&kvm, "kvm", libc::S_IFCHR)?, "kvm", "/dev/kvm")?;
    let kernel = File::from(fds.take("kernel", config.kernel)?);
    kind(is(&kernel, "kernel", libc::S_IFREG)?, "kernel", "a regular file")?;
    let initrd = File::from(fds.take("initrd", config.initrd)?);
    kind(is(&initrd, "initrd", libc::S_IFREG)?, "initrd", "a regular file")?;
    let initrd_len = initrd.metadata().map_err(|error| ConfigError::Examine("initrd", error))?.len();
    let memory = config.memory_mib << 20;
    range(initrd_len > 0 && initrd_len < memory / 2, "length of initrd", initrd_len, "1 to half of guest memory")?;
    let console = fds.take("console", config.console)?;
    kind(is(&console, "console", libc::S_IFIFO)? && writable(&console, "console")?, "console", "a writable pipe")?;
    config.share.as_ref().map_or(Ok(()), share)?;
    let mut net = Vec::with_capacity(config.net.len());
    for interface in &config.net {
        net.push((interface.clone(), self::net(interface, &mut fds)?));
    }
    let mut blk = Vec::with_capacity(config.blk.len());
    for disk in &config.blk {
        let file = fds.take("blk.file", disk.file)?;
        blk.push((disk.clone(), self::blk(disk, file)?));
    }
    fds.used_up()?;
    Ok(Checked { config, memory, kvm, kernel, initrd, initrd_len, console, net, blk })
}

/// Checks a network interface with its taps.
///
/// # Errors
/// [`ConfigError`].
pub fn net(config: &NetConfig, fds: &mut Fds) -> Result<Backend, ConfigError> {
    range((68..=u16::MAX).contains(&config.mtu), "net.mtu", config.mtu, "68 to 65535")?;
    let [first, ..] = config.mac;
    let unicast = first & 1 == 0 && config.mac != [0; 6];
    range(unicast, "net.mac", format!("{:02x?}", config.mac), "a unicast address")?;
    let pairs = config.taps.len();
    range((1..=MOST_PAIRS).contains(&pairs), "number of net.taps", pairs, "1 to 8")?;
    let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let mut taps = Vec::with_capacity(pairs);
    for &tap in &config.taps {
        let tap = File::from(fds.take("net.taps", tap)?);
        let good = tap_flags(&tap) & wanted == wanted;
        kind(good, "net.taps", "a tap with IFF_NO_PI and IFF_VNET_HDR, and IFF_MULTI_QUEUE where there are several")?;
        taps.push(tap);
    }
    let vhost = config.vhost.map(|vhost| fds.take("net.vhost", vhost)).transpose()?;
    if let Some(vhost) = &vhost {
        kind(is(vhost, "net.vhost", libc::S_IFCHR)?, "net.vhost", "/dev/vhost-net")?;
    }
    Ok(Backend { taps, vhost: vhost.map(File::from) })
}

/// Checks a disk with its file.
///
/// # Errors
/// [`ConfigError`].
pub fn blk(config: &BlkConfig, file: OwnedFd) -> Result<File, ConfigError> {
    let serial = &config.serial;
    let plain = serial.len() <= SERIAL_MAX && serial.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    range(plain, "blk.serial", serial, "20 printable ASCII characters at most")?;
    let disk = is(&file, "blk.file", libc::S_IFREG)? || is(&file, "blk.file", libc::S_IFBLK)?;
    kind(disk, "blk.file", "a regular file or a block device")?;
    kind(config.read_only || writable(&file, "blk.file")?, "blk.file", "open for writing")?;
    Ok(File::from(file))
}

fn share(config: &ShareConfig) -> Result<(), ConfigError> {
    let tag = (1..=TAG_MAX).contains(&config.tag.len()) && !config.tag.contains('\0');
    range(tag, "share.tag", &config.tag, "1 to 36 bytes")?;
    range((1..=64).contains(&config.workers), "share.workers", config.workers, "1 to 64")?;
    let root = Path::new(&config.root);
    let directory = root.is_absolute()
        && std::fs::metadata(root).map_err(|error| ConfigError::Examine("share.root", error))?.is_dir();
    range(directory, "share.root", &config.root, "the absolute path of a directory")
}

/// Descriptors not yet taken.
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// All that came with a configuration.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// That nothing is left.
    ///
    /// # Errors
    /// [`ConfigError::Unused`].
    pub fn used_up(&self) -> Result<(), ConfigError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            unused => Err(ConfigError::Unused(unused)),
        }
    }

    fn take(&mut self, what: &'static str, index: FdIndex) -> Result<OwnedFd, ConfigError> {
        let fd = self.0.get_mut(index.0).and_then(Option::take);
        fd.ok_or(ConfigError::Missing { what, index: index.0 })
    }
}

fn range(good: bool, what: &'static str, value: impl ToString, allowed: &'static str) -> Result<(), ConfigError> {
    if good { Ok(()) } else { Err(ConfigError::Range { what, value: value.to_string(), allowed }) }
}

fn kind(good: bool, what: &'static str, wanted: &'static str) -> Result<(), ConfigError> {
    if good { Ok(()) } else { Err(ConfigError::Kind { what, wanted }) }
}

fn is(fd: &impl AsRawFd, what: &'static str, format: libc::mode_t) -> Result<bool, ConfigError> {
    // SAFETY: an all-zero stat is valid.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives until the call returns.
    if unsafe { libc::fstat(fd.as_raw_fd(), &raw mut stat) } != 0 {
        return Err(ConfigError::Examine(what, io::Error::last_os_error()));
    }
    Ok(stat.st_mode & libc::S_IFMT == format)
}

fn writable(fd: &impl AsRawFd, what: &'static str) -> Result<bool, ConfigError> {
    // SAFETY: fcntl without pointers.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) } {
        -1 => Err(ConfigError::Examine(what, io::Error::last_os_error())),
        flags => Ok(flags & libc::O_ACCMODE != libc::O_RDONLY),
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
