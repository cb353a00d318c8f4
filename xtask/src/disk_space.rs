//! Warns if the disk is too full for a run of all tests.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use crate::{paths, ui};

/// What a run of all tests needs in a clone without build outputs, in GiB.
const NEEDED: u64 = 20;

/// Prints a warning if a clone without build outputs has less free space than a run of all tests needs. Without the
/// warning, such a run fails after minutes, at whatever file does not fit.
pub fn check() {
    if paths::dist().exists() {
        return;
    }
    if let Some(available) = available_gib(&paths::root()).filter(|gib| *gib < NEEDED) {
        ui::say(
            "setup",
            format!(
                "warning: the disk has only {available} GiB available, and the build outputs of all tests take about \
                 {NEEDED} GiB; remove the directory target of other clones, for example"
            ),
        );
    }
}

fn available_gib(path: &Path) -> Option<u64> {
    let space = statvfs(path).ok()?;
    Some((space.blocks_available() * space.fragment_size()) >> 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_space_of_a_directory_is_known() {
        assert!(available_gib(Path::new("/")).is_some());
        assert_eq!(available_gib(Path::new("/does-not-exist")), None);
    }
}
