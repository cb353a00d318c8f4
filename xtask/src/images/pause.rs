//! Builds the sandbox image, which has a program that sleeps. runc runs this program. Husk does not run it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Result;

use super::busybox::Inputs;
use super::layer::{Layer, Owner};
use super::{hash_of, oci};

/// Increase this number whenever the content of the image changes.
const VERSION: &str = "1";

/// Returns a hash of the inputs of the image.
pub fn hash(inputs: &Inputs) -> String {
    hash_of(&[VERSION.as_bytes(), inputs.binary()])
}

/// Writes the image's tar.
pub fn build(inputs: &Inputs, out: &Path) -> Result<()> {
    let work = tempfile::tempdir()?;
    let path = work.path().join("layer.tar");
    let mut layer = Layer::new(BufWriter::new(File::create(&path)?));
    layer.dir("bin", Owner::root(0o755))?;
    layer.file("bin/busybox", Owner::root(0o755), inputs.binary())?;
    layer.finish()?.flush()?;
    let config = oci::Config { env: &["PATH=/bin"], cmd: &["/bin/busybox", "sleep", "2147483647"], working_dir: "/" };
    oci::write(out, super::PAUSE, &config, &[&path])
}
