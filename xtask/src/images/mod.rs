//! Builds the OCI image tars that the demo and the end-to-end suites import, without a registry.
//!
//! An image is rebuilt only if the hash of its inputs has changed. A file beside the tar has the hash.

mod builders;
mod busybox;
mod debian;
mod fsx;
mod layer;
mod oci;
mod pause;
mod python;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::stamp::Stamp;
use crate::user_cache::{Origin, Step};

/// Reference of the image with busybox-static.
pub const BUSYBOX: &str = "husk.test/busybox:latest";
/// Reference of the Debian-based image with Python.
pub const PYTHON: &str = "husk.test/python:latest";
/// Reference of the sandbox image.
pub const PAUSE: &str = "husk.test/pause:latest";

/// Reference of the image with Docker's daemon.
pub const DOCKER: &str = "husk.test/docker:latest";
/// Reference of the image with buildah.
pub const BUILDAH: &str = "husk.test/buildah:latest";
/// Reference of the image with fsx.
pub const FSX: &str = "husk.test/fsx:latest";

/// Builds image tars in the directory `out_dir`: the tars of the images that most suites use. Returns the paths of
/// these tars, for `ctr images import`.
///
/// # Errors
/// Fails if an input is missing (busybox-static, mmdebstrap) or a file cannot be written.
pub fn build(out_dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out_dir).with_context(|| format!("failed to create {}", out_dir.display()))?;
    let busybox = busybox::Inputs::find()?;
    let python = python::Inputs::find()?;
    Ok(vec![
        cached(out_dir, "busybox", &busybox.hash(), |tar| busybox.build(tar))?,
        cached(out_dir, "pause", &pause::hash(&busybox), |tar| pause::build(&busybox, tar))?,
        cached(out_dir, "python", &python.hash(), |tar| python.build(tar))?,
    ])
}

/// Builds the images that contain an image builder (Docker's daemon, buildah). [`build`] does not build these images,
/// because each is several hundred megabytes in size and only one suite uses them.
///
/// # Errors
/// Fails if mmdebstrap is missing or a file cannot be written.
pub fn build_builders(out_dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out_dir).with_context(|| format!("failed to create {}", out_dir.display()))?;
    Ok(vec![
        cached(out_dir, "docker", &builders::DOCKER.hash(), |tar| builders::DOCKER.build(tar))?,
        cached(out_dir, "buildah", &builders::BUILDAH.hash(), |tar| builders::BUILDAH.build(tar))?,
    ])
}

/// Builds the image with fsx, which only one suite uses.
///
/// # Errors
/// Fails if the program cannot be fetched or built.
pub fn build_fsx(out_dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(out_dir).with_context(|| format!("failed to create {}", out_dir.display()))?;
    Ok(vec![cached(out_dir, "fsx", &fsx::hash(), fsx::build)?])
}

/// Makes `<name>.tar`, unless the file exists and was made from inputs with this hash.
fn cached(out_dir: &Path, name: &str, inputs: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let tar = out_dir.join(format!("{name}.tar"));
    let kind = format!("image-{name}");
    let stamp = Stamp::at(out_dir.join(format!("{name}.tar.inputs")));
    let origin = Step { kind: &kind, key: inputs, outputs: &[&tar], stamp }.run(|| {
        println!("image {name}: building {}", tar.display());
        make(&tar).with_context(|| format!("failed to build image {name}"))
    })?;
    match origin {
        Origin::Present => println!("image {name}: up to date"),
        Origin::Cache => println!("image {name}: from the cache"),
        Origin::Build => {}
    }
    Ok(tar)
}

/// Returns the lower-case hexadecimal SHA-256 of several pieces. The length of each piece is hashed too. Therefore the
/// hash depends on where a piece ends and the next piece begins.
fn hash_of(pieces: &[&[u8]]) -> String {
    let mut hasher = Sha256::new();
    for piece in pieces {
        hasher.update((piece.len() as u64).to_le_bytes());
        hasher.update(piece);
    }
    hex(&hasher.finalize())
}

/// Returns the lower-case hexadecimal form of a digest.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
