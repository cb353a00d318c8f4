//! Validates a VM configuration. [`check`] checks the kind of each fd, and finds the fd for each [`FdIndex`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};

use crate::arch::layout;
use crate::config::{BlkConfig, BuildId, FdIndex, NetConfig, RateLimit, ShareConfig, Source, VmConfig};
use crate::virtio::net::{MAX_QUEUE_PAIRS, tap_flags};

/// Minimum and maximum guest memory in MiB. The maximum, 4 TiB, is far below 64 TiB, the limit of 46 physical address
/// bits.
const MEMORY_MIB: std::ops::RangeInclusive<u64> = 64..=4 << 20;
/// Minimum and maximum number of vCPUs. The guest kernel is built for the maximum.
const VCPUS: std::ops::RangeInclusive<u8> = 1..=64;
/// Maximum length of a virtio-fs tag in bytes (virtio 1.2, 5.11.4).
const TAG_MAX: usize = 36;
/// Maximum time for which the guest caches names and attributes of volumes, in ms.
const MAX_VOLUME_CACHE_MS: u32 = 60_000;
/// Maximum length of a disk's serial number in bytes (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;

/// Reason why a configuration is invalid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value is out of range.
    #[error("invalid {what}: {value}, must be {allowed}")]
    Range {
        /// Name of the value.
        what: &'static str,
        /// The value.
        value: String,
        /// The allowed values.
        allowed: &'static str,
    },
    /// An fd's position is beyond the end of the list, or another use has already taken the fd.
    #[error("invalid {what}: the fd at position {index} of the received list is missing or already used")]
    Missing {
        /// Name of the fd.
        what: &'static str,
        /// Position of the fd.
        index: usize,
    },
    /// The configuration does not use all fds.
    #[error("the configuration does not use {0} of the received fds")]
    Unused(usize),
    /// An fd has the wrong kind.
    #[error("invalid {what}: the fd is not {wanted}")]
    Kind {
        /// Name of the fd.
        what: &'static str,
        /// The required kind.
        wanted: &'static str,
    },
    /// An fd or path could not be examined.
    #[error("failed to examine {0}")]
    Examine(&'static str, #[source] io::Error),
}

/// A valid configuration, with its fds.
#[derive(Debug)]
pub struct CheckedConfig {
    /// The configuration as received.
    pub config: VmConfig,
    /// Guest memory at boot, in bytes.
    pub memory: u64,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// What the VM runs.
    pub source: CheckedSource,
    /// Write end of the console's pipe.
    pub console: OwnedFd,
    /// Network interfaces and their taps.
    pub net: Vec<(NetConfig, Vec<File>)>,
    /// Disks and their files.
    pub blk: Vec<(BlkConfig, File)>,
}

/// What the VM runs, with its files.
#[derive(Debug)]
pub enum CheckedSource {
    /// A kernel that boots.
    Kernel(KernelFiles),
    /// A saved VM that goes on.
    Saved {
        /// The file with the state.
        state: File,
        /// The file with the memory.
        memory: File,
        /// Identifies what the VM was booted from, and the build that has saved it.
        build: BuildId,
        /// What boots if the saved VM cannot go on.
        otherwise: KernelFiles,
    },
}

/// A kernel and its initrd.
#[derive(Debug)]
pub struct KernelFiles {
    /// The guest kernel.
    pub kernel: File,
    /// The initrd.
    pub initrd: File,
    /// Length of the initrd in bytes.
    pub initrd_len: u64,
}

impl CheckedConfig {
    /// Returns the configuration of the VM that boots if the saved VM cannot go on, with copies of the fds. Returns `None`
    /// if there is no saved VM.
    ///
    /// # Errors
    /// If an fd cannot be duplicated.
    pub fn otherwise(&self) -> io::Result<Option<Self>> {
        let CheckedSource::Saved { otherwise: KernelFiles { kernel, initrd, initrd_len }, .. } = &self.source else {
            return Ok(None);
        };
        let (kernel, initrd) = (kernel.try_clone()?, initrd.try_clone()?);
        Ok(Some(Self {
            config: self.config.clone(),
            memory: self.memory,
            kvm: self.kvm.try_clone()?,
            source: CheckedSource::Kernel(KernelFiles { kernel, initrd, initrd_len: *initrd_len }),
            console: self.console.try_clone()?,
            // A saved VM has neither.
            net: Vec::new(),
            blk: Vec::new(),
        }))
    }
}

/// Validates the whole configuration. Does not create anything.
///
/// # Errors
/// [`ConfigError`] for the first violation.
pub fn check(config: VmConfig, fds: Vec<OwnedFd>) -> Result<CheckedConfig, ConfigError> {
    check_range(VCPUS.contains(&config.vcpus), "vcpus", config.vcpus, "1 to 64")?;
    let in_range = (config.vcpus..=*VCPUS.end()).contains(&config.max_vcpus);
    check_range(in_range, "max_vcpus", config.max_vcpus, "between the value of vcpus and 64")?;
    check_range(
        config.max_memory_mib <= *MEMORY_MIB.end(),
        "max_memory_mib",
        config.max_memory_mib,
        "at most 4194304",
    )?;
    check_range(config.huge_mib <= *MEMORY_MIB.end(), "huge_mib", config.huge_mib, "at most 4194304")?;
    check_range(MEMORY_MIB.contains(&config.memory_mib), "memory_mib", config.memory_mib, "64 to 4194304")?;
    check_range((3..u32::MAX).contains(&config.vsock_cid), "vsock_cid", config.vsock_cid, "3 to 4294967294")?;
    rate_limit("vsock_rate_limit", config.vsock_rate_limit)?;
    let printable = config.kernel_params.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    check_range(printable, "kernel_params", &config.kernel_params, "printable ASCII")?;
    let devices = 2 + usize::from(config.share.is_some()) + usize::from(config.balloon);
    let memory_devices = usize::from(config.max_memory_mib > config.memory_mib) + usize::from(config.huge_mib > 0);
    let slots = devices + config.net.len() + config.blk.len() + memory_devices;
    check_range(slots <= layout::MAX_SLOTS, "number of virtio devices", slots, "at most 18")?;

    let mut fds = Fds::new(fds);
    let kvm = fds.take("kvm", config.kvm)?;
    check_kind(has_file_type(&kvm, "kvm", libc::S_IFCHR)?, "kvm", "/dev/kvm")?;
    let memory = config.memory_mib << 20;
    let source = source(config.source, memory, &mut fds)?;
    let has_devices = !config.net.is_empty() || !config.blk.is_empty();
    let without_devices = "without interfaces and disks, which are plugged in later";
    check_range(!has_devices || matches!(source, CheckedSource::Kernel(_)), "source", "a saved VM", without_devices)?;
    let console = fds.take("console", config.console)?;
    check_kind(
        has_file_type(&console, "console", libc::S_IFIFO)? && writable(&console, "console")?,
        "console",
        "a writable pipe",
    )?;
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
    fds.reject_unused()?;
    Ok(CheckedConfig { config, memory, kvm, source, console, net, blk })
}

fn source(source: Source, memory: u64, fds: &mut Fds) -> Result<CheckedSource, ConfigError> {
    let mut regular = |name, index| {
        let file = File::from(fds.take(name, index)?);
        check_kind(has_file_type(&file, name, libc::S_IFREG)?, name, "a regular file")?;
        Ok(file)
    };
    let (Source::Kernel { kernel, initrd } | Source::Saved { kernel, initrd, .. }) = source;
    let (kernel, initrd) = (regular("kernel", kernel)?, regular("initrd", initrd)?);
    let initrd_len = initrd.metadata().map_err(|error| ConfigError::Examine("initrd", error))?.len();
    check_range(
        initrd_len > 0 && initrd_len < memory / 2,
        "length of initrd",
        initrd_len,
        "at least 1 byte and less than half of guest memory",
    )?;
    let files = KernelFiles { kernel, initrd, initrd_len };
    match source {
        Source::Kernel { .. } => Ok(CheckedSource::Kernel(files)),
        Source::Saved { state, memory, build, .. } => {
            let (state, memory) = (regular("state", state)?, regular("memory", memory)?);
            Ok(CheckedSource::Saved { state, memory, build, otherwise: files })
        }
    }
}

/// Validates a network interface and returns its taps.
pub fn net(config: &NetConfig, fds: &mut Fds) -> Result<Vec<File>, ConfigError> {
    check_range((68..=u16::MAX).contains(&config.mtu), "net.mtu", config.mtu, "68 to 65535")?;
    let [first, ..] = config.mac;
    let unicast = first & 1 == 0 && config.mac != [0; 6];
    check_range(unicast, "net.mac", format!("{:02x?}", config.mac), "a unicast address")?;
    let pairs = config.taps.len();
    check_range((1..=MAX_QUEUE_PAIRS).contains(&pairs), "number of net.taps", pairs, "1 to 8")?;
    rate_limit("net.receive_rate_limit", config.receive_rate_limit)?;
    rate_limit("net.transmit_rate_limit", config.transmit_rate_limit)?;
    let limited = config.receive_rate_limit.is_limited() || config.transmit_rate_limit.is_limited();
    // vhost-net does not apply rate limits. Several queue pairs would not get equal shares of one token bucket.
    check_range(!limited || pairs == 1, "number of net.taps", pairs, "1, because the interface has a rate limit")?;
    check_range(
        !(limited && config.vhost),
        "net.vhost",
        config.vhost,
        "false, because the interface has a rate limit",
    )?;
    let several = if pairs > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let mut taps = Vec::with_capacity(pairs);
    for &tap in &config.taps {
        let tap = File::from(fds.take("net.taps", tap)?);
        let valid = tap_flags(&tap) & wanted == wanted;
        check_kind(
            valid,
            "net.taps",
            "a tap with IFF_NO_PI and IFF_VNET_HDR, and IFF_MULTI_QUEUE if the interface has more than one tap fd",
        )?;
        taps.push(tap);
    }
    Ok(taps)
}

/// Validates open fds of `/dev/vhost-net`.
pub fn vhost(fds: Vec<OwnedFd>) -> Result<Vec<File>, ConfigError> {
    for fd in &fds {
        check_kind(has_file_type(fd, "vhost-net", libc::S_IFCHR)?, "vhost-net", "/dev/vhost-net")?;
    }
    Ok(fds.into_iter().map(File::from).collect())
}

/// Validates the socket of a connection to the guest. Does not validate the type of the socket, because getsockopt(2)
/// would be one more call that a thread's filter has to allow.
pub fn connection(fd: OwnedFd) -> Result<OwnedFd, ConfigError> {
    check_kind(has_file_type(&fd, "connection", libc::S_IFSOCK)?, "connection", "a socket")?;
    Ok(fd)
}

/// Validates a disk and its file.
pub fn blk(config: &BlkConfig, file: OwnedFd) -> Result<File, ConfigError> {
    let serial = &config.serial;
    let plain = serial.len() <= SERIAL_MAX && serial.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    check_range(plain, "blk.serial", serial, "at most 20 printable ASCII characters")?;
    rate_limit("blk.rate_limit", config.rate_limit)?;
    let disk = has_file_type(&file, "blk.file", libc::S_IFREG)? || has_file_type(&file, "blk.file", libc::S_IFBLK)?;
    check_kind(disk, "blk.file", "a regular file or a block device")?;
    check_kind(config.read_only || writable(&file, "blk.file")?, "blk.file", "open for writing")?;
    Ok(File::from(file))
}

fn share(config: &ShareConfig) -> Result<(), ConfigError> {
    let tag = (1..=TAG_MAX).contains(&config.tag.len()) && !config.tag.contains('\0');
    check_range(tag, "share.tag", &config.tag, "1 to 36 bytes, without NUL")?;
    check_range((1..=64).contains(&config.workers), "share.workers", config.workers, "1 to 64")?;
    let cache = config.volume_cache_ms;
    check_range(cache <= MAX_VOLUME_CACHE_MS, "share.volume_cache_ms", cache, "0 to 60000")?;
    rate_limit("share.rate_limit", config.rate_limit)?;
    let root = Path::new(&config.root);
    let directory = root.is_absolute()
        && std::fs::metadata(root).map_err(|error| ConfigError::Examine("share.root", error))?.is_dir();
    check_range(directory, "share.root", &config.root, "the absolute path of a directory")
}

fn rate_limit(what: &'static str, limit: RateLimit) -> Result<(), ConfigError> {
    for rate in [limit.bytes, limit.operations].into_iter().flatten() {
        let valid = rate.per_second > 0 && rate.burst > 0;
        check_range(valid, what, format!("{rate:?}"), "a rate and a burst of at least 1")?;
    }
    Ok(())
}

/// Received fds that have not been taken yet.
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// Takes ownership of all fds that were received with a configuration.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Fails if the configuration has not used all fds.
    pub fn reject_unused(&self) -> Result<(), ConfigError> {
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

fn check_range(
    valid: bool,
    what: &'static str,
    value: impl ToString,
    allowed: &'static str,
) -> Result<(), ConfigError> {
    if valid { Ok(()) } else { Err(ConfigError::Range { what, value: value.to_string(), allowed }) }
}

fn check_kind(valid: bool, what: &'static str, wanted: &'static str) -> Result<(), ConfigError> {
    if valid { Ok(()) } else { Err(ConfigError::Kind { what, wanted }) }
}

fn has_file_type(fd: impl AsFd, what: &'static str, format: libc::mode_t) -> Result<bool, ConfigError> {
    // Use the standard library, which calls statx. The control thread's seccomp filter allows statx, but not
    // newfstatat, which `nix` calls.
    let metadata = fd.as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    Ok(metadata.map_err(|error| ConfigError::Examine(what, error))?.mode() & libc::S_IFMT == format)
}

fn writable(fd: impl AsFd, what: &'static str) -> Result<bool, ConfigError> {
    let flags = fcntl(fd, FcntlArg::F_GETFL).map_err(|errno| ConfigError::Examine(what, errno.into()))?;
    Ok(flags & libc::O_ACCMODE != libc::O_RDONLY)
}

#[cfg(test)]
#[path = "config_check_tests.rs"]
mod tests;
