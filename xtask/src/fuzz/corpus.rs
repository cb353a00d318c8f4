//! Makes the small corpora in tests/fuzz/corpus, which unit tests replay.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Dirs, command, logged};
use crate::ui;

/// Maximum number of inputs of a target's corpus in the repository.
const MAX_INPUTS: usize = 36;
/// Maximum total size of these inputs in bytes.
const MAX_BYTES: u64 = 32 << 10;

/// Replaces a target's corpus in the repository with a small corpus of the same coverage. If the small corpus exceeds
/// `MAX_INPUTS` or `MAX_BYTES`, the largest inputs are left out.
pub fn minimize(program: &Path, target: &str, dirs: &Dirs) -> Result<()> {
    let merged = dirs.found.with_file_name(format!("{target}.merged"));
    if merged.exists() {
        fs::remove_dir_all(&merged).with_context(|| format!("failed to remove {}", merged.display()))?;
    }
    fs::create_dir_all(&merged).with_context(|| format!("failed to create {}", merged.display()))?;
    let mut merge = command(program, target);
    // With this value of `-use_counters`, libFuzzer ignores how often an input takes an edge of the control flow.
    merge.args(["-set_cover_merge=1", "-use_counters=0"]).args([&merged, &dirs.kept, &dirs.found]);
    let (success, _) = logged(&mut merge, &format!("fuzz-merge-{target}"))?;
    if !success {
        bail!("failed to merge the corpus of {target}; target/husk/logs/fuzz-merge-{target}.log has the output");
    }
    let mut inputs = inputs(&merged)?;
    let count = inputs.len();
    trim(&mut inputs);
    fs::remove_dir_all(&dirs.kept).with_context(|| format!("failed to remove {}", dirs.kept.display()))?;
    fs::create_dir_all(&dirs.kept).with_context(|| format!("failed to create {}", dirs.kept.display()))?;
    for (_, path) in &inputs {
        let name = path.file_name().unwrap_or_default();
        fs::copy(path, dirs.kept.join(name)).with_context(|| format!("failed to copy {}", path.display()))?;
    }
    ui::say("fuzz", format!("{target}: kept {} of the {count} inputs of the merged corpus", inputs.len()));
    Ok(())
}

/// Returns the size and path of each file in a directory.
fn inputs(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))?;
    entries
        .map(|entry| {
            Ok((entry.as_ref().map_or(0, |entry| entry.metadata().map_or(0, |meta| meta.len())), entry?.path()))
        })
        .collect()
}

/// Leaves out the largest inputs until the rest is within the limits.
fn trim(inputs: &mut Vec<(u64, PathBuf)>) {
    inputs.sort();
    inputs.truncate(MAX_INPUTS);
    while inputs.iter().map(|(size, _)| size).sum::<u64>() > MAX_BYTES {
        inputs.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trim_leaves_out_the_largest_inputs() {
        let of = |sizes: &[u64]| sizes.iter().map(|&size| (size, PathBuf::from(size.to_string()))).collect::<Vec<_>>();
        let mut inputs = of(&[MAX_BYTES, 7, 5]);
        trim(&mut inputs);
        assert_eq!(inputs, of(&[5, 7]));
        let mut inputs = of(&(1..=100).rev().collect::<Vec<_>>());
        trim(&mut inputs);
        assert_eq!(inputs, of(&(1..=36).collect::<Vec<_>>()));
    }
}
