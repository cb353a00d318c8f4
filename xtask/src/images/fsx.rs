//! Builds the OCI image whose only file is fsx, a public program that tests a file system with random operations on a
//! file. fsx comes from crates.io and is linked statically.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};

use super::layer::{Layer, Owner};
use super::{hash_of, oci};
use crate::{build, cmd, paths};

/// Increase this number whenever the content of the image changes.
const RECIPE: &str = "1";
/// The version of the crate `fsx`. The crate is built with its own lock file.
const VERSION: &str = "0.3.2";

/// Returns a hash of the inputs of the image.
pub fn hash() -> String {
    hash_of(&[RECIPE, VERSION].map(str::as_bytes))
}

/// Builds the program and writes the image's tar.
pub fn build(out: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    // This directory is kept. If building the image fails, the next attempt can use the compiled files in the
    // directory.
    let compiled = paths::state().join("fsx");
    let mut install = build::cargo();
    install.args(["install", "fsx", "--version", &format!("={VERSION}"), "--locked", "--target", build::TARGET]);
    install.args(["--no-track", "--root"]).arg(work.path());
    install.env("RUSTFLAGS", build::STATIC).env("CARGO_TARGET_DIR", &compiled);
    cmd::logged("images", "fsx", &mut install)?;
    let program =
        fs::read(work.path().join("bin/fsx")).context("failed to read the program fsx that cargo installed")?;
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
