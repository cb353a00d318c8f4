//! Builds the image with fsx, a public program that tests a file system with random operations on a file. It is built
//! from crates.io, statically, and is the only file of the image.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use super::layer::{Layer, Owner};
use super::{hash_of, oci};
use crate::{build, cmd, paths};

/// Raised whenever what this file builds changes.
const RECIPE: &str = "1";
/// The crate's version. It is built with its own lock file.
const VERSION: &str = "0.3.2";

/// Identifies the image's content.
pub fn hash() -> String {
    hash_of(&[RECIPE, VERSION].map(str::as_bytes))
}

/// Builds the program and writes the image's tar.
pub fn build(out: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    // Kept if building the image fails.
    let compiled = paths::state().join("fsx");
    let mut install = build::cargo();
    install.args(["install", "fsx", "--version", &format!("={VERSION}"), "--locked", "--target", build::TARGET]);
    install.args(["--no-track", "--root"]).arg(work.path());
    install.env("RUSTFLAGS", build::STATIC).env("CARGO_TARGET_DIR", &compiled);
    cmd::logged("images", "fsx", &mut install)?;
    let program = fs::read(work.path().join("bin/fsx")).context("cargo did not install fsx")?;
    let path = work.path().join("layer.tar");
    let mut layer = Layer::new(BufWriter::new(File::create(&path)?));
    for dir in ["bin", "dev", "etc", "proc", "sys", "work"] {
        layer.dir(dir, Owner::root(0o755))?;
    }
    layer.file("bin/fsx", Owner::root(0o755), &program)?;
    layer.finish()?.flush()?;
    let config = oci::Config { env: &["PATH=/bin"], cmd: &["/bin/fsx", "--version"], working_dir: "/work" };
    oci::write(out, super::FSX, &config, &[&path])
}
