//! Steps of the Setup request: mounting file systems and writing sysctls.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use husk_proto::agent::Mount;
use nix::mount::MsFlags;

/// Performs one requested mount. Creates the mount point if it does not exist.
pub fn mount(request: &Mount) -> io::Result<()> {
    let (flags, data) = options(&request.options);
    let target = Path::new(&request.target);
    if flags.contains(MsFlags::MS_BIND) && Path::new(&request.source).is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        OpenOptions::new().create(true).append(true).open(target)?;
    } else {
        fs::create_dir_all(target)?;
    }
    let data = Some(data.as_str()).filter(|data| !data.is_empty());
    nix::mount::mount(Some(request.source.as_str()), target, Some(request.fs_type.as_str()), flags, data)?;
    if flags.contains(MsFlags::MS_BIND) && flags.contains(MsFlags::MS_RDONLY) {
        // When mount(2) creates a bind mount, it ignores flags such as MS_RDONLY. Only a remount applies these flags.
        nix::mount::mount(None::<&str>, target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)?;
    }
    Ok(())
}

/// Splits mount options into flags and the data argument of mount(2).
pub fn options(options: &[String]) -> (MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut data: Vec<&str> = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "sync" => flags |= MsFlags::MS_SYNCHRONOUS,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "" | "defaults" => {}
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}

/// Writes a sysctl. The separators in `name` may be dots or slashes.
pub fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    fs::write(sysctl_path(name)?, value)
}

/// Returns the path of a sysctl's file.
pub fn sysctl_path(name: &str) -> io::Result<PathBuf> {
    // If the separators are slashes, a dot is part of a component, as in net/ipv4/conf/eth0.5/forwarding.
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part.is_empty() || part == "..") {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(Path::new("/proc/sys").join(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_splits_flags_and_data() {
        let (flags, data) = options(&["ro", "nosuid", "size=1m", "mode=755"].map(str::to_owned));
        assert_eq!(flags, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID);
        assert_eq!(data, "size=1m,mode=755");
    }

    #[test]
    fn set_sysctl_rejects_names_outside_proc_sys() {
        assert!(set_sysctl("net/../../../etc/passwd", "x").is_err());
        assert!(set_sysctl("", "x").is_err());
    }
}
