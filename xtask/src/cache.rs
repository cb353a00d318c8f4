//! Remembers what a step was made from, so that it is made again only when that changed.

use crate::paths;
use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The SHA-256 of a step's inputs, fed one after another.
pub struct Key(Sha256);

impl Key {
    /// A key for `step`, whose recipe has the version `recipe`.
    pub fn new(step: &str, recipe: u32) -> Self {
        let mut key = Key(Sha256::new());
        key.text(step).text(&recipe.to_string());
        key
    }

    /// Adds a piece of text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        self.0.update((text.len() as u64).to_le_bytes());
        self.0.update(text);
        self
    }

    /// Adds what is in a file.
    pub fn file(&mut self, path: &Path) -> Result<&mut Self> {
        let mut file = fs::File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let length = file.metadata()?.len();
        self.0.update(length.to_le_bytes());
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))? {
                0 => return Ok(self),
                n => self.0.update(buffer.get(..n).unwrap_or_default()),
            }
        }
    }

    /// The key in hexadecimal.
    pub fn finish(&self) -> String {
        self.0.clone().finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

fn stamp(step: &str) -> PathBuf {
    paths::state().join("stamps").join(step)
}

/// Whether `step` was last made from inputs with this key and `made` is all still there.
pub fn fresh(step: &str, key: &str, made: &[&Path]) -> bool {
    made.iter().all(|path| path.exists()) && fs::read_to_string(stamp(step)).is_ok_and(|old| old == key)
}

/// Notes that `step` was made from inputs with this key.
pub fn done(step: &str, key: &str) -> Result<()> {
    let path = stamp(step);
    make_dir(path.parent().unwrap_or(&path))?;
    fs::write(&path, key).with_context(|| format!("cannot write {}", path.display()))
}

/// Forgets `step`: it is about to be made, and what is there may be half of it.
pub fn forget(step: &str) -> Result<()> {
    match fs::remove_file(stamp(step)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context("cannot remove a stamp"),
        _ => Ok(()),
    }
}

/// Makes a directory and those above it.
pub fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}
