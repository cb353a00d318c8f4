//! Keeps stamps in `target/husk`. A stamp has the hash of the inputs with which a build step last ran. The step runs
//! again only if its inputs have changed.

use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::{files, paths};

/// The SHA-256 of a step's inputs.
pub struct Key(Sha256);

impl Key {
    /// Creates a key for `step`. `recipe` is the version of the step's code.
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

    /// Adds the content of a file.
    pub fn file(&mut self, path: &Path) -> Result<&mut Self> {
        let mut file = fs::File::open(path).with_context(|| format!("failed to read {}", path.display()))?;
        let length = file.metadata()?.len();
        self.0.update(length.to_le_bytes());
        let mut buffer = vec![0; 1 << 16];
        loop {
            match file.read(&mut buffer).with_context(|| format!("failed to read {}", path.display()))? {
                0 => return Ok(self),
                n => self.0.update(buffer.get(..n).unwrap_or_default()),
            }
        }
    }

    /// Returns the key in hexadecimal.
    pub fn finish(&self) -> String {
        self.0.clone().finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// The record of the key with which a step last ran.
pub struct Stamp(PathBuf);

impl Stamp {
    /// Returns the stamp of `step`.
    pub fn new(step: &str) -> Self {
        Stamp(paths::state().join("stamps").join(step))
    }

    /// Returns the stamp whose file is `path`.
    pub fn at(path: PathBuf) -> Self {
        Stamp(path)
    }

    /// Whether the step last ran with this key and all its outputs exist.
    pub fn fresh(&self, key: &str, outputs: &[&Path]) -> bool {
        outputs.iter().all(|path| path.exists()) && fs::read_to_string(&self.0).is_ok_and(|old| old == key)
    }

    /// Records that the step ran with this key.
    pub fn write(&self, key: &str) -> Result<()> {
        files::make_dir(self.0.parent().unwrap_or(&self.0))?;
        fs::write(&self.0, key).with_context(|| format!("failed to write {}", self.0.display()))
    }

    /// Removes the record. The caller removes the record before it runs the step, because an interrupted step leaves
    /// incomplete outputs.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("failed to remove {}", self.0.display()))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn key_depends_on_each_input() {
        let key = |step, recipe, text| Key::new(step, recipe).text(text).finish();
        let keys = [key("a", 1, "x"), key("b", 1, "x"), key("a", 2, "x"), key("a", 1, "y"), key("a", 1, "x")];
        assert_eq!(keys[0], keys[4]);
        assert_eq!(keys.iter().collect::<HashSet<_>>().len(), 4);
        // The key also depends on where one input ends and the next one begins.
        let two = |one, other| Key::new("a", 1).text(one).text(other).finish();
        assert_ne!(two("xy", "z"), two("x", "yz"));
    }
}
