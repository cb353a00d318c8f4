//! Checks the configuration, and the guest kernel and initrd that it names.

use std::{fs::File, io, io::Read, path::Path};

use husk_base::error::chain;
use husk_config::Config;

use super::Finding;

/// Loads the configuration. Returns the defaults if the configuration is invalid, so that the other checks can run.
pub fn configuration(path: &Path) -> (Config, Vec<Finding>) {
    let name = "configuration";
    match Config::load(path) {
        Ok(config) if path.exists() => (config, vec![Finding::ok(name, path.display().to_string())]),
        Ok(config) => (config, vec![Finding::ok(name, format!("using defaults: {} does not exist", path.display()))]),
        Err(error) => {
            let remedy = format!("correct {}: no pod can start with an invalid configuration", path.display());
            (Config::default(), vec![Finding::fail(name, chain(&error), remedy)])
        }
    }
}

/// Checks the guest kernel and the initrd.
pub fn images(config: &Config) -> [Finding; 2] {
    [image("guest kernel", "kernel", &config.kernel, kernel), image("initrd", "initrd", &config.initrd, initrd)]
}

fn image(name: &'static str, key: &str, path: &Path, kind: fn(&[u8]) -> Result<&'static str, &'static str>) -> Finding {
    let remedy = format!("copy Husk's dist/root to /, or set {key} in the configuration");
    match head(path) {
        Err(error) => Finding::fail(name, format!("failed to read {}: {error}", path.display()), remedy),
        Ok((head, len)) => match kind(&head) {
            Ok(kind) => Finding::ok(name, format!("{}, {kind}, {} KiB", path.display(), len.div_ceil(1024))),
            Err(reason) => Finding::fail(name, format!("{}: {reason}", path.display()), remedy),
        },
    }
}

/// Returns the first 64 bytes of a file, and the file's length.
fn head(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut head = Vec::new();
    file.take(64).read_to_end(&mut head)?;
    Ok((head, len))
}

/// Checks `e_ident`, `e_type` and `e_machine` of an ELF header.
fn kernel(head: &[u8]) -> Result<&'static str, &'static str> {
    if !head.starts_with(b"\x7fELF") {
        return Err("not an ELF image: an uncompressed vmlinux is required, not a bzImage");
    }
    match (head.get(4), head.get(16..20)) {
        (Some(2), Some([2 | 3, 0, 62, 0])) => Ok("ELF for x86-64"),
        _ => Err("not an x86-64 executable"),
    }
}

/// Checks whether a file begins with the magic number of an archive format that the kernel unpacks.
fn initrd(head: &[u8]) -> Result<&'static str, &'static str> {
    let formats: [(&[u8], _); 5] = [
        (b"070701", "cpio"),
        (b"070702", "cpio with checksums"),
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"\xfd7zXZ", "xz"),
    ];
    let found = formats.iter().find(|(magic, _)| head.starts_with(magic));
    found.map(|(_, name)| *name).ok_or("not an initial RAM file system: a cpio archive (newc) is required")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::Status;
    use super::*;

    #[test]
    fn kernel_and_initrd_formats_are_recognized() {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend([2, 0, 62, 0]);
        assert!(kernel(&elf).is_ok());
        elf[18] = 40;
        assert!(kernel(&elf).is_err() && kernel(b"MZ").is_err() && kernel(b"\x7fELF").is_err());
        assert!(initrd(b"070701000").is_ok() && initrd(b"").is_err());
    }

    #[test]
    fn missing_or_invalid_files_fail_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { kernel: dir.path().join("k"), initrd: dir.path().join("i"), ..Config::default() };
        fs::write(&config.initrd, "070701").unwrap();
        let [kernel, initrd] = images(&config);
        assert_eq!((kernel.status, initrd.status), (Status::Fail, Status::Ok));
        assert!(kernel.detail.contains("failed to read") && kernel.remedy.contains("kernel"));
        let path = dir.path().join("c");
        assert_eq!(configuration(&path).1[0].status, Status::Ok);
        fs::write(&path, "x = 1").unwrap();
        let finding = &configuration(&path).1[0];
        assert!(finding.status == Status::Fail && finding.detail.contains("c:1: "), "{finding:?}");
    }
}
