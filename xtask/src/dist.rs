//! `cargo xtask dist`: builds `dist/root`, the directory whose content an installation copies to `/` of a node.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::build::{self, Profile};
use crate::images::hex;
use crate::{files, image, kernel, lock, paths, ui};

/// The files that Husk installs on a node, with their permissions. The paths are relative to `/`.
const INSTALLED: [(&str, u32); 7] = [
    ("usr/local/bin/containerd-shim-husk-v2", 0o755),
    ("usr/local/bin/husk", 0o755),
    ("usr/local/share/husk/vmlinux", 0o644),
    ("usr/local/share/husk/initrd.cpio", 0o644),
    ("etc/husk/config.toml", 0o644),
    ("etc/containerd/conf.d/husk.toml", 0o644),
    ("usr/local/share/husk/containerd-2.toml", 0o644),
];

/// Builds all files and copies them to `dist/root`. Returns the path of `dist/root`.
pub fn dist(profile: Profile) -> Result<PathBuf> {
    let kernel = kernel::kernel()?;
    let programs = build::programs(&[image::AGENT, "husk-shim", "husk-cli"], profile)?;
    let _lock = lock::take("image")?;
    let initrd = image::pack(build::find(&programs, &[image::AGENT])?)?;
    let shim = build::find(&programs, &["containerd-shim-husk-v2", "husk-shim"])?;
    let husk = build::find(&programs, &["husk", "husk-cli"])?;
    let root = paths::dist();
    let repository = paths::root();
    let from: [&Path; 7] = [
        &shim.path,
        &husk.path,
        &kernel,
        &initrd,
        &repository.join("config/config.toml"),
        &repository.join("deploy/containerd/husk.toml"),
        &repository.join("deploy/containerd/husk-2.toml"),
    ];
    for (from, (to, mode)) in from.into_iter().zip(INSTALLED) {
        place(from, &root.join(to), mode)?;
        if !to.starts_with("etc/") {
            ui::say("dist", format!("{to} ({:.1} MiB)", kernel::mebibytes(from)?));
        }
    }
    for (key, file) in [("kernel_sha256", &kernel), ("initrd_sha256", &initrd)] {
        let content = fs::read(file).with_context(|| format!("failed to read {}", file.display()))?;
        ui::say("dist", format!("{key} = \"{}\"", hex(&Sha256::digest(content))));
    }
    ui::say("dist", format!("{} is ready", root.display()));
    Ok(root)
}

/// Copies a file atomically. Does nothing if the target already has the same content.
fn place(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let context = || format!("failed to copy {} to {}", from.display(), to.display());
    let content = fs::read(from).with_context(context)?;
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    files::make_dir(to.parent().unwrap_or(to))?;
    let part = to.with_extension("part");
    fs::write(&part, &content).with_context(context)?;
    fs::set_permissions(&part, fs::Permissions::from_mode(mode)).with_context(context)?;
    fs::rename(&part, to).with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readme_and_uninstall_commands_name_each_installed_file() {
        let read = |name: &str| fs::read_to_string(paths::root().join(name)).unwrap();
        let (install, readme) = (read("docs/install.md"), read("README.md"));
        let removed: Vec<&str> = install
            .lines()
            .filter_map(|line| line.strip_prefix("# rm "))
            .flat_map(str::split_whitespace)
            .filter_map(|word| word.strip_prefix('/'))
            // The commands also remove files below /run, which are not installed.
            .filter(|path| !path.starts_with("run/"))
            .collect();
        for (path, _) in INSTALLED {
            assert!(
                removed.iter().any(|gone| Path::new(path).starts_with(gone)),
                "docs/install.md does not remove {path}; it removes {removed:?}"
            );
            let name = Path::new(path).file_name().unwrap().to_str().unwrap();
            assert!(
                readme.contains(&format!("`{path}`")) || readme.contains(&format!("`{name}`")),
                "README.md does not list {path}"
            );
        }
        for gone in removed {
            assert!(
                INSTALLED.iter().any(|(path, _)| Path::new(path).starts_with(gone)),
                "docs/install.md removes /{gone}, which is not installed"
            );
        }
    }
}
