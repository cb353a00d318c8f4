//! The configuration, and the guest's kernel and image that it names.

use super::Finding;
use crate::chain;
use husk_config::Config;
use std::{fs::File, io, io::Read, path::Path};

/// The configuration to go on with, and what is to be said of it.
pub fn configuration(path: &Path) -> (Config, Vec<Finding>) {
    let name = "configuration";
    match Config::load(path) {
        Ok(config) if path.exists() => (config, vec![Finding::ok(name, path.display().to_string())]),
        Ok(config) => (config, vec![Finding::ok(name, format!("defaults: there is no {}", path.display()))]),
        Err(error) => {
            let remedy = format!("correct {}; no pod starts with it", path.display());
            (Config::default(), vec![Finding::fail(name, chain(&error), remedy)])
        }
    }
}

/// The kernel and the image.
pub fn images(config: &Config) -> [Finding; 2] {
    [image("guest kernel", "kernel", &config.kernel, kernel), image("guest image", "initrd", &config.initrd, initrd)]
}

fn image(name: &'static str, key: &str, path: &Path, kind: fn(&[u8]) -> Result<&'static str, &'static str>) -> Finding {
    let remedy = format!("install dist/root of Husk over /, or set {key} in the configuration");
    match head(path) {
        Err(error) => Finding::fail(name, format!("cannot read {}: {error}", path.display()), remedy),
        Ok((head, len)) => match kind(&head) {
            Ok(kind) => Finding::ok(name, format!("{}, {kind}, {} KiB", path.display(), len.div_ceil(1024))),
            Err(wrong) => Finding::fail(name, format!("{}: {wrong}", path.display()), remedy),
        },
    }
}

/// The first bytes of a file, and its length.
fn head(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut head = Vec::new();
    file.take(64).read_to_end(&mut head)?;
    Ok((head, len))
}

/// `e_ident`, `e_type` and `e_machine` of an ELF header.
fn kernel(head: &[u8]) -> Result<&'static str, &'static str> {
    if !head.starts_with(b"\x7fELF") {
        return Err("no ELF image: an uncompressed vmlinux is needed, not a bzImage");
    }
    match (head.get(4), head.get(16..20)) {
        (Some(2), Some([2 | 3, 0, 62, 0])) => Ok("ELF for x86-64"),
        _ => Err("no executable for x86-64"),
    }
}

/// The archive formats a kernel unpacks.
fn initrd(head: &[u8]) -> Result<&'static str, &'static str> {
    let formats: [(&[u8], _); 5] = [
        (b"070701", "cpio"),
        (b"070702", "cpio with checksums"),
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ", "xz"),
    ];
    let found = formats.iter().find(|(magic, _)| head.starts_with(magic));
    found.map(|(_, name)| *name).ok_or("no initial RAM file system: a cpio archive (newc) is needed")
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use std::fs;

    #[test]
    fn images_of_the_right_kind_are_told_from_others() {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0]);
        assert!(kernel(&elf).is_ok());
        elf[18] = 40;
        assert!(kernel(&elf).is_err() && kernel(b"MZ").is_err() && kernel(b"\x7fELF").is_err());
        assert!(initrd(b"070701000").is_ok() && initrd(b"").is_err());
    }

    #[test]
    fn what_is_missing_or_wrong_fails_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { kernel: dir.path().join("k"), initrd: dir.path().join("i"), ..Config::default() };
        fs::write(&config.initrd, "070701").unwrap();
        let [kernel, initrd] = images(&config);
        assert_eq!((kernel.status, initrd.status), (Status::Fail, Status::Ok));
        assert!(kernel.detail.contains("cannot read") && kernel.remedy.contains("kernel"));
        let path = dir.path().join("c");
        assert_eq!(configuration(&path).1[0].status, Status::Ok);
        fs::write(&path, "x = 1").unwrap();
        let finding = &configuration(&path).1[0];
        assert!(finding.status == Status::Fail && finding.detail.contains("c:1: "), "{finding:?}");
    }
}
