//! Reads the mount list of a thread's mount namespace (proc_pid_mountinfo(5)).

use std::{ffi::OsString, fs, io, os::unix::ffi::OsStringExt, path::PathBuf};

use nix::sys::stat::makedev;

use crate::host_view::HostView;

/// An entry of the mount list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Mount id, as in statx(2). The kernel may reuse the id after the unmount.
    pub id: u64,
    /// Id of the parent mount.
    pub parent: u64,
    /// Device number of the file system.
    pub device: u64,
    /// Path of the mounted directory or file within its file system.
    pub root: PathBuf,
    /// Mount point.
    pub point: PathBuf,
    /// File system type, such as `ext4` or `fuse.sshfs`.
    pub kind: String,
    /// Whether the mount is id-mapped.
    pub id_mapped: bool,
}

/// Returns the mounts in the calling thread's namespace, in the kernel's order.
///
/// # Errors
/// If /proc cannot be read.
pub fn read() -> io::Result<Vec<Entry>> {
    Ok(parse(&fs::read("/proc/thread-self/mountinfo")?))
}

/// Returns the mounts of the host.
///
/// # Errors
/// If /proc cannot be read.
pub fn of_host(host: &HostView) -> io::Result<Vec<Entry>> {
    match host.thread() {
        Some(id) => Ok(parse(&fs::read(format!("/proc/self/task/{id}/mountinfo"))?)),
        None => read(),
    }
}

fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [id, parent, device, root, point, options, rest @ ..] = fields.as_slice() else { return None };
    let (major, minor) = text(device)?.split_once(':')?;
    // A hyphen ends the optional fields.
    let kind = rest.iter().skip_while(|field| **field != b"-").nth(1)?;
    Some(Entry {
        id: text(id)?.parse().ok()?,
        parent: text(parent)?.parse().ok()?,
        device: makedev(major.parse().ok()?, minor.parse().ok()?),
        root: unescape(root),
        point: unescape(point),
        kind: text(kind)?.to_owned(),
        id_mapped: text(options)?.split(',').any(|option| option == "idmapped"),
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Decodes a path in which spaces, tabs, newlines and backslashes are octal escapes (fs/proc_namespace.c, `mangle`).
fn unescape(field: &[u8]) -> PathBuf {
    let (mut bytes, mut rest) = (Vec::with_capacity(field.len()), field);
    while let Some((&first, next)) = rest.split_first() {
        let code = (first == b'\\').then(|| next.get(..3).and_then(octal)).flatten();
        bytes.push(code.unwrap_or(first));
        rest = next.get(if code.is_some() { 3 } else { 0 }..).unwrap_or_default();
    }
    OsString::from_vec(bytes).into()
}

fn octal(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(text(digits)?, 8).ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn parse_reads_entries_and_skips_malformed_lines() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n\
            37 36 0:5 / /a\\040b\\134c\\012 ro,idmapped - devtmpfs udev ro\n\
            cut 36 0:5\n\
            38 36 0:6 / /x rw shared:1\n";
        let entries = parse(text);
        assert_eq!(entries.len(), 2);
        let first = Entry {
            id: 36,
            parent: 35,
            device: makedev(98, 0),
            root: "/mnt1".into(),
            point: "/mnt2".into(),
            kind: "ext3".into(),
            id_mapped: false,
        };
        assert_eq!(entries[0], first);
        assert_eq!((entries[1].point.to_str(), &*entries[1].kind), (Some("/a b\\c\n"), "devtmpfs"));
        assert!(entries[1].id_mapped);
    }

    #[test]
    fn read_finds_proc() {
        let entries = read().unwrap();
        assert!(entries.iter().any(|entry| entry.point == Path::new("/proc") && entry.kind == "proc"), "{entries:?}");
    }

    proptest::proptest! {
        #[test]
        fn parse_never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = unescape(&bytes);
        }
    }
}
