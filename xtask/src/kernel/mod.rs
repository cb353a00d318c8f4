//! `cargo xtask kernel`: builds the guest kernel from the distribution's source package, `guest/kernel/husk.config` and
//! the patches in `guest/kernel/patches`.

mod source;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::pins::KERNEL_SOURCE;
use crate::stamp::{Key, Stamp};
use crate::user_cache::{Origin, Step};
use crate::{cmd, files, lock, paths, ui};

/// Increase this number whenever the steps below change.
const RECIPE: u32 = 3;

/// Builds the kernel if its inputs changed. Returns the kernel's path.
pub fn kernel() -> Result<PathBuf> {
    let made = paths::vmlinux();
    let fragment = paths::root().join("guest/kernel/husk.config");
    let _lock = lock::take("kernel")?;
    let (tarball, version) = source::find()?;
    let wanted = fs::read_to_string(&fragment).with_context(|| format!("failed to read {}", fragment.display()))?;
    // The key lacks the compiler's version. The source and the compiler are packages of the same distribution release,
    // and another release has another version of the source. Within a release, the compiler gets only fixes. They do
    // not justify a repetition of the longest build step. docs/testing.md says how to build with a new package.
    let patches = patches(&paths::root().join("guest/kernel/patches"))?;
    let mut key = Key::new("kernel", RECIPE);
    key.text(&version).text(&settings(&wanted));
    for (_, content) in &patches {
        key.text(content);
    }
    let key = key.finish();
    let step = Step { kind: "kernel", key: &key, outputs: &[&made], stamp: Stamp::new("kernel") };
    match step.run(|| build(&tarball, &version, &fragment, &patches, &made))? {
        Origin::Present => ui::say("kernel", format!("up to date ({KERNEL_SOURCE} {version})")),
        Origin::Cache => ui::say("kernel", format!("from the cache ({KERNEL_SOURCE} {version})")),
        Origin::Build => ui::say("kernel", format!("{} ({:.1} MiB)", made.display(), mebibytes(&made)?)),
    }
    Ok(made)
}

/// File to which the kernel's build writes the relocations for the decompressor (arch/x86/Makefile.postlink). The path
/// is relative to the source's directory.
const RELOCATIONS: &str = "arch/x86/boot/compressed/vmlinux.relocs";
/// Section of the image that contains the relocations. The VMM reads this section (vmm-glue/src/arch/kaslr.rs).
const RELOCATIONS_SECTION: &str = ".husk.relocs";

/// The path and the content of a patch.
type Patch = (PathBuf, String);

/// Reads the patches for the kernel, in the order of their names.
fn patches(dir: &Path) -> Result<Vec<Patch>> {
    let mut patches = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "patch") {
            let content = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
            patches.push((path, content));
        }
    }
    patches.sort();
    Ok(patches)
}

/// Compiles the kernel, strips it, and adds its relocations.
fn build(tarball: &Path, version: &str, fragment: &Path, patches: &[Patch], made: &Path) -> Result<()> {
    let source = unpack(&paths::state().join("kernel"), tarball, version, patches)?;
    configure(&source, fragment)?;
    ui::say("kernel", format!("compiling on {} processors; this is the longest step", cmd::processors()));
    cmd::logged("kernel", "kernel-make", make(&source).arg(format!("-j{}", cmd::processors())).arg("vmlinux"))?;
    let mut strip = Command::new("objcopy");
    let section = format!("{RELOCATIONS_SECTION}={}", source.join(RELOCATIONS).display());
    strip.args(["--strip-all", "--add-section", &section]).arg(source.join("vmlinux")).arg(made);
    cmd::logged("kernel", "kernel-strip", &mut strip)
}

/// Returns the size of a file in MiB.
pub fn mebibytes(path: &Path) -> Result<f64> {
    Ok(fs::metadata(path).with_context(|| format!("failed to stat {}", path.display()))?.len() as f64 / 1048576.0)
}

/// Unpacks the source in `dir` and applies the patches, unless this version is already unpacked with the same patches.
/// Returns the source's directory.
fn unpack(dir: &Path, tarball: &Path, version: &str, patches: &[Patch]) -> Result<PathBuf> {
    let (source, stamp) = (dir.join(KERNEL_SOURCE), Stamp::at(dir.join("unpacked")));
    let mut key = Key::new("kernel-patches", RECIPE);
    for (_, content) in patches {
        key.text(content);
    }
    let unpacked = format!("{version} {}", key.finish());
    if stamp.fresh(&unpacked, &[&source.join("Makefile")]) {
        return Ok(source);
    }
    stamp.remove()?;
    files::make_dir(dir)?;
    if source.exists() {
        fs::remove_dir_all(&source).with_context(|| format!("failed to remove {}", source.display()))?;
    }
    ui::say("kernel", format!("unpacking {} ({version})", tarball.display()));
    cmd::logged("kernel", "kernel-unpack", Command::new("tar").arg("-xf").arg(tarball).arg("-C").arg(dir))?;
    for (path, _) in patches {
        // If a patch applies only with fuzz, the code around it has changed, and the patch must be checked.
        let mut patch = Command::new("patch");
        patch.args(["-p1", "--fuzz=0", "--batch", "--forward", "--no-backup-if-mismatch", "-d"]);
        cmd::logged("kernel", "kernel-patch", patch.arg(&source).arg("-i").arg(path))?;
    }
    stamp.write(&unpacked)?;
    Ok(source)
}

/// Returns a command that runs `make` in the source. Fixes the build's time, user and host, which would otherwise
/// differ between builds.
fn make(source: &Path) -> Command {
    // The build must not slow down other steps that run at the same time.
    let mut command = Command::new("nice");
    command.arg("make").arg("-C").arg(source).env("LC_ALL", "C");
    command.env("KBUILD_BUILD_TIMESTAMP", "@0").env("KBUILD_BUILD_USER", "husk").env("KBUILD_BUILD_HOST", "husk");
    command.env_remove("MAKEFLAGS").env_remove("RUSTFLAGS");
    command
}

/// Merges the fragment into the kernel's smallest configuration. Fails if the result lacks a setting of the fragment.
fn configure(source: &Path, fragment: &Path) -> Result<()> {
    let config = source.join(".config");
    let before = fs::read_to_string(&config).ok();
    cmd::logged("kernel", "kernel-config", make(source).arg("tinyconfig"))?;
    let mut merge = Command::new(source.join("scripts/kconfig/merge_config.sh"));
    merge.current_dir(source).args(["-m", "-O", ".", ".config"]).arg(fragment);
    cmd::logged("kernel", "kernel-merge", &mut merge)?;
    cmd::logged("kernel", "kernel-olddefconfig", make(source).arg("olddefconfig"))?;
    let after = fs::read_to_string(&config).with_context(|| format!("failed to read {}", config.display()))?;
    let wanted = fs::read_to_string(fragment).with_context(|| format!("failed to read {}", fragment.display()))?;
    let missed = missed(&wanted, &after);
    if !missed.is_empty() {
        bail!(
            "failed to apply these settings of {} (a dependency is missing, or the symbol does not exist):\n{}",
            fragment.display(),
            missed.iter().map(|m| format!("    {m}\n")).collect::<String>()
        );
    }
    ui::say(
        "kernel",
        format!(
            "configured{}",
            if before.as_deref() == Some(&after) { "; the configuration did not change" } else { "" }
        ),
    );
    Ok(())
}

/// Returns the lines of a configuration that set a symbol or turn it off. Comments are left out, so that a changed
/// comment does not cause a rebuild.
fn settings(config: &str) -> String {
    let set =
        |line: &&str| line.starts_with("CONFIG_") || (line.starts_with("# CONFIG_") && line.ends_with(" is not set"));
    config.lines().filter(set).flat_map(|line| [line, "\n"]).collect()
}

/// Returns the symbols that a configuration sets, with their values.
fn symbols(config: &str) -> HashMap<&str, &str> {
    config.lines().filter_map(|line| line.strip_prefix("CONFIG_")?.split_once('=')).collect()
}

/// Returns the settings of `fragment` that `config` lacks.
fn missed(fragment: &str, config: &str) -> Vec<String> {
    let set = symbols(config);
    let mut missed = Vec::new();
    for line in fragment.lines() {
        if let Some((name, value)) = line.strip_prefix("CONFIG_").and_then(|l| l.split_once('=')) {
            match set.get(name) {
                Some(have) if *have == value => {}
                Some(have) => missed.push(format!("CONFIG_{name}: expected {value}, found {have}")),
                None => missed.push(format!("CONFIG_{name}: expected {value}, but it is not set")),
            }
        } else if let Some(name) = line.strip_prefix("# CONFIG_").and_then(|l| l.strip_suffix(" is not set"))
            && let Some(have) = set.get(name)
        {
            missed.push(format!("CONFIG_{name}: expected no value, found {have}"));
        }
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_unpack_removes_the_stamp() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("unpacked"), "6.12").unwrap();
        // A file in place of the directory makes the removal of the old source fail.
        fs::write(dir.path().join(KERNEL_SOURCE), "").unwrap();
        unpack(dir.path(), Path::new("/no/such/tarball"), "6.12", &[]).unwrap_err();
        assert!(
            !dir.path().join("unpacked").exists(),
            "the stamp still exists, so an incomplete source would count as unpacked"
        );
    }

    #[test]
    fn patches_are_read_in_order_and_have_a_reason_and_a_licence() {
        let patches = patches(&paths::root().join("guest/kernel/patches")).unwrap();
        assert!(patches.len() > 1 && patches.is_sorted());
        for (path, content) in patches {
            let head = content.split("\n--- a/").next().unwrap();
            assert!(head.contains("SPDX-License-Identifier: GPL-2.0"), "{} must state its licence", path.display());
            assert!(head.lines().count() > 4, "{} must state its reason", path.display());
        }
    }

    #[test]
    fn missing_settings_are_named() {
        let config = "CONFIG_A=y\nCONFIG_B=\"x\"\n# CONFIG_C is not set\nCONFIG_D=y\n";
        let fragment =
            "# about\nCONFIG_A=y\nCONFIG_B=\"y\"\nCONFIG_C=y\n# CONFIG_D is not set\n# CONFIG_E is not set\n";
        assert_eq!(
            missed(fragment, config),
            [
                "CONFIG_B: expected \"y\", found \"x\"",
                "CONFIG_C: expected y, but it is not set",
                "CONFIG_D: expected no value, found y"
            ]
        );
    }
}
