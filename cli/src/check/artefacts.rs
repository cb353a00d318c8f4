//! Checks the configuration, and the guest kernel and initrd that it names.

use std::{fs::File, io, io::Read, path::Path};

use husk_base::error::chain;
use husk_config::{Config, digest};

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
    [
        image("guest kernel", "kernel", (&config.kernel, &config.kernel_sha256), kernel),
        image("guest initrd", "initrd", (&config.initrd, &config.initrd_sha256), initrd),
    ]
}

fn image(
    name: &'static str,
    key: &str,
    (path, digest): (&Path, &str),
    kind: fn(&[u8]) -> Result<&'static str, &'static str>,
) -> Finding {
    let remedy = format!("copy Husk's dist/root to /, or set {key} in the configuration");
    let unreadable = |error| Finding::fail(name, format!("failed to read {}: {error}", path.display()), remedy.clone());
    let (head, len) = match head(path) {
        Ok(found) => found,
        Err(error) => return unreadable(error),
    };
    let kind = match kind(&head) {
        Ok(kind) => kind,
        Err(reason) => return Finding::fail(name, format!("{}: {reason}", path.display()), remedy),
    };
    let checked = if digest.is_empty() {
        "digest not checked"
    } else {
        match File::open(path).and_then(|file| digest::sha256(file, |_| Ok(()))) {
            Err(error) => return unreadable(error),
            Ok(found) if found == digest => "digest correct",
            Ok(found) => {
                let detail = format!("{}: expected SHA-256 {digest}, found {found}", path.display());
                let remedy = format!("install the right file, or correct {key}_sha256 in the configuration");
                return Finding::fail(name, detail, remedy);
            }
        }
    };
    Finding::ok(name, format!("{}, {kind}, {} KiB, {checked}", path.display(), len.div_ceil(1024)))
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
    fn image_is_compared_with_the_digest_in_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config { initrd: dir.path().join("i"), ..Config::default() };
        fs::write(&config.initrd, "070701").unwrap();
        let check = |config: &Config| images(config)[1].clone();
        assert!(check(&config).detail.ends_with("1 KiB, digest not checked"));
        config.initrd_sha256 = digest::sha256(&b"070701"[..], |_| Ok(())).unwrap();
        assert!(check(&config).detail.ends_with("1 KiB, digest correct"));
        fs::write(&config.initrd, "0707012").unwrap();
        let finding = check(&config);
        let found = digest::sha256(&b"0707012"[..], |_| Ok(())).unwrap();
        assert_eq!(finding.status, Status::Fail);
        assert!(finding.detail.ends_with(&format!("expected SHA-256 {}, found {found}", config.initrd_sha256)));
        assert!(finding.remedy.contains("initrd_sha256"));
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
