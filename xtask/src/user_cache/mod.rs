//! The user's cache of build outputs, which all clones of the repository on a machine share.
//!
//! A step always makes its outputs in `target/husk`, with a [`Stamp`] of its key. The cache has the outputs too, as
//! `KIND/KEY/OUTPUT` in `$XDG_CACHE_HOME/husk` or `~/.cache/husk`. If possible, the files in the cache are hard links
//! to the outputs. Writing to such an output would change the file in the cache. Therefore a step removes its old
//! outputs before it makes new outputs. A new entry gets its name only when it is complete, so that no process sees an
//! incomplete entry.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::stamp::Stamp;
use crate::{files, lock, ui};

/// Time after which an unused entry is removed.
const MAX_AGE: Duration = Duration::from_secs(30 * DAY);
/// Maximum number of entries of a kind. The entries that were used last are kept.
const MAX_VERSIONS: usize = 3;
const DAY: u64 = 24 * 60 * 60;
/// Prefix of the names of directories that do not count as entries: each contains an entry that a process is adding or
/// removing. A process that is killed leaves such a directory behind.
const PART: &str = ".part-";

/// A build step whose outputs the cache keeps.
pub struct Step<'a> {
    /// The name of the step's directory in the cache.
    pub kind: &'a str,
    /// The hash of the inputs.
    pub key: &'a str,
    /// The outputs: files or directories in `target/husk`. Their file names must differ from each other.
    pub outputs: &'a [&'a Path],
    /// The record of the key with which the outputs in `target/husk` were made.
    pub stamp: Stamp,
}

/// Where the outputs of a step came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The outputs were in `target/husk`.
    Present,
    /// The outputs were in the cache.
    Cache,
    /// The outputs were built.
    Build,
}

impl Step<'_> {
    /// Makes the outputs in `target/husk`, unless they are already there. Takes the outputs from the user's cache if
    /// they are there, and otherwise builds them. The caller holds a lock that excludes other processes from the
    /// outputs.
    pub fn run(&self, build: impl FnOnce() -> Result<()>) -> Result<Origin> {
        self.run_with(user(), build)
    }

    fn run_with(&self, cache: Option<&Cache>, build: impl FnOnce() -> Result<()>) -> Result<Origin> {
        if self.stamp.fresh(self.key, self.outputs) {
            cache.inspect(|cache| cache.keep(self));
            return Ok(Origin::Present);
        }
        self.stamp.remove()?;
        if cache.is_some_and(|cache| cache.fetch(self)) {
            self.stamp.write(self.key)?;
            return Ok(Origin::Cache);
        }
        // Another clone of the repository may be building the same outputs. Waiting for that build is faster than a
        // second build.
        let lock = cache.map(|cache| lock::take_in(&cache.dir.join(self.kind), &format!("cache of {}", self.kind)));
        if let Some(Ok(_)) = &lock
            && cache.is_some_and(|cache| cache.fetch(self))
        {
            self.stamp.write(self.key)?;
            return Ok(Origin::Cache);
        }
        for output in self.outputs {
            files::remove(output)?;
        }
        build()?;
        self.stamp.write(self.key)?;
        cache.inspect(|cache| cache.keep(self));
        Ok(Origin::Build)
    }
}

/// A cache directory.
struct Cache {
    dir: PathBuf,
}

/// Returns the user's cache, or `None` if the cache cannot be used. In this case, the first call prints the reason.
fn user() -> Option<&'static Cache> {
    static USER: OnceLock<Option<Cache>> = OnceLock::new();
    let open = || match directory(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")).and_then(Cache::open) {
        Ok(cache) => Some(cache),
        Err(error) => {
            ui::say("cache", format!("failed to open the user's cache; outputs are only in target/husk: {error:#}"));
            None
        }
    };
    USER.get_or_init(open).as_ref()
}

/// Returns the cache directory for these values of `XDG_CACHE_HOME` and `HOME`. The XDG specification says to ignore a
/// relative path.
fn directory(xdg: Option<OsString>, home: Option<OsString>) -> Result<PathBuf> {
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute(xdg).or_else(|| Some(absolute(home)?.join(".cache")));
    Ok(cache.context("neither XDG_CACHE_HOME nor HOME is an absolute path")?.join("husk"))
}

impl Cache {
    /// Creates the directory, and checks that files can be written in it.
    fn open(dir: PathBuf) -> Result<Cache> {
        files::make_dir(&dir)?;
        // Backup programs leave out a directory with this file: https://bford.info/cachedir.
        let tag = "Signature: 8a477f597d28d172789f06886806bc55\n# Build outputs of Husk's `cargo xtask`.\n";
        let path = dir.join("CACHEDIR.TAG");
        fs::write(&path, tag).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(Cache { dir })
    }

    fn entry(&self, step: &Step) -> PathBuf {
        self.dir.join(step.kind).join(step.key)
    }

    /// Links the outputs from the cache to `target/husk`. Returns `false` if the cache lacks them, or if they cannot be
    /// linked.
    fn fetch(&self, step: &Step) -> bool {
        let entry = self.entry(step);
        let fetch = |output: &&Path| -> Result<()> {
            files::make_dir(output.parent().unwrap_or(output))?;
            files::remove(output)?;
            link(&entry.join(name(output)?), output)
        };
        if !entry.exists() {
            return false;
        }
        if !step.outputs.iter().all(|output| name(output).is_ok_and(|name| entry.join(name).exists())) {
            ui::say("cache", format!("the entry {} is incomplete; making it again", entry.display()));
            let _ = files::remove(&entry);
            return false;
        }
        touch(&entry);
        match step.outputs.iter().try_for_each(fetch) {
            Ok(()) => true,
            Err(error) => {
                ui::say("cache", format!("failed to use the entry {}: {error:#}", entry.display()));
                false
            }
        }
    }

    /// Adds the outputs to the cache, unless the cache has them. If adding the outputs fails, the error is printed, and
    /// the step succeeds nevertheless.
    fn keep(&self, step: &Step) {
        let entry = self.entry(step);
        if entry.exists() {
            touch(&entry);
            return;
        }
        let added = self.add(step).and_then(|()| prune(&self.dir.join(step.kind), SystemTime::now()));
        if let Err(error) = added {
            ui::say("cache", format!("failed to add {} to {}: {error:#}", step.kind, self.dir.display()));
        }
    }

    fn add(&self, step: &Step) -> Result<()> {
        let kind = self.dir.join(step.kind);
        files::make_dir(&kind)?;
        let part = part(&kind)?;
        fs::set_permissions(part.path(), fs::Permissions::from_mode(0o755))?;
        for output in step.outputs {
            link(output, &part.path().join(name(output)?))?;
        }
        touch(part.path());
        let entry = self.entry(step);
        match fs::rename(part.path(), &entry) {
            // The directory has another name now, so `part` must not remove anything.
            Ok(()) => drop(part.keep()),
            // Another process has added the entry.
            Err(_) if entry.exists() => {}
            Err(error) => return Err(error).with_context(|| format!("failed to create {}", entry.display())),
        }
        Ok(())
    }
}

fn name(output: &Path) -> Result<&OsStr> {
    output.file_name().with_context(|| format!("failed to get the file name of {}", output.display()))
}

/// Copies a file or directory as hard links. Between file systems, the content is copied, and holes stay holes.
fn link(from: &Path, to: &Path) -> Result<()> {
    let cp = |how: &[&str]| -> Result<()> {
        let mut command = Command::new("cp");
        let output = command.args(["--archive", "--no-target-directory"]).args(how).arg(from).arg(to).output();
        let output = output.context("failed to start cp")?;
        if !output.status.success() {
            bail!("failed to copy {}: {}", from.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    };
    cp(&["--link"]).or_else(|_| {
        files::remove(to)?;
        cp(&["--reflink=auto", "--sparse=always"])
    })
}

/// Records in the modification time of an entry that the entry was used now.
fn touch(entry: &Path) {
    // If the cache belongs to another user, setting the time fails, and only uses by the cache's owner count.
    let _ = File::open(entry).and_then(|dir| dir.set_modified(SystemTime::now()));
}

/// An entry of the cache.
struct Entry {
    path: PathBuf,
    used: SystemTime,
}

/// Returns the entries of a kind, sorted by their last use, the latest first.
fn entries(kind: &Path) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(kind).with_context(|| format!("failed to read {}", kind.display()))? {
        let entry = entry?;
        if let (Ok(metadata), false) = (entry.metadata(), is_part(&entry.file_name()))
            && metadata.is_dir()
        {
            entries.push(Entry { path: entry.path(), used: metadata.modified()? });
        }
    }
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.used));
    Ok(entries)
}

/// Creates a directory that does not count as an entry. The directory is removed when the returned value is dropped.
fn part(kind: &Path) -> Result<TempDir> {
    let part = tempfile::Builder::new().prefix(PART).tempdir_in(kind);
    part.with_context(|| format!("failed to create a directory in {}", kind.display()))
}

fn is_part(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PART.as_bytes())
}

/// Removes the entries of a kind that were last used more than `MAX_AGE` ago, and all but the `MAX_VERSIONS` entries
/// that were used last. Also removes directories that killed processes left more than a day ago.
fn prune(kind: &Path, now: SystemTime) -> Result<()> {
    let age = |used: SystemTime| now.duration_since(used).unwrap_or_default();
    for (number, entry) in entries(kind)?.into_iter().enumerate() {
        if number >= MAX_VERSIONS || age(entry.used) > MAX_AGE {
            // The entry is renamed first, so that no process finds an incomplete entry.
            let part = part(kind)?;
            match fs::rename(&entry.path, part.path().join("entry")) {
                // Another process has removed the entry.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                renamed => renamed.with_context(|| format!("failed to remove {}", entry.path.display()))?,
            }
            part.close().with_context(|| format!("failed to remove {}", entry.path.display()))?;
        }
    }
    for entry in fs::read_dir(kind).with_context(|| format!("failed to read {}", kind.display()))? {
        let entry = entry?;
        let old = || entry.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|at| age(at).as_secs() > DAY);
        if is_part(&entry.file_name()) && old() {
            files::remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Returns the directories of the kinds in the cache, in alphabetical order.
fn kinds(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))?;
    let mut kinds: Vec<PathBuf> = list.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    kinds.retain(|path| path.is_dir());
    kinds.sort();
    Ok(kinds)
}

/// Returns the number of bytes that a file or directory occupies. Holes do not count.
fn size(path: &Path) -> Result<u64> {
    let metadata = fs::symlink_metadata(path).with_context(|| format!("failed to stat {}", path.display()))?;
    let mut size = metadata.blocks() * 512;
    if metadata.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("failed to read {}", path.display()))? {
            size += self::size(&entry?.path())?;
        }
    }
    Ok(size)
}

/// `cargo xtask cache`: lists the entries. If `pruned` is true, first removes entries as `prune` does.
pub fn list_entries(pruned: bool) -> Result<()> {
    let dir = directory(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))?;
    let kinds = if dir.exists() { kinds(&dir)? } else { Vec::new() };
    if pruned {
        kinds.iter().try_for_each(|kind| prune(kind, SystemTime::now()))?;
    }
    print!("{}", list(&dir, &kinds, SystemTime::now())?);
    Ok(())
}

/// Returns the list of entries as text. The list has each entry's size in MiB, the days since its last use, its kind
/// and its key.
fn list(dir: &Path, kinds: &[PathBuf], now: SystemTime) -> Result<String> {
    let mut text = format!("{:>9}  {:>9}  entry\n", "MiB", "days");
    let mut total = 0;
    for kind in kinds {
        for entry in entries(kind)? {
            let size = size(&entry.path)?;
            total += size;
            let days = now.duration_since(entry.used).unwrap_or_default().as_secs() / DAY;
            let name = entry.path.strip_prefix(dir).unwrap_or(&entry.path).display();
            text.push_str(&format!("{:9.1}  {days:9}  {name}\n", mebibytes(size)));
        }
    }
    text.push_str(&format!("{:9.1}  {:9}  in all, in {}\n", mebibytes(total), "", dir.display()));
    Ok(text)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / 1048576.0
}

#[cfg(test)]
mod tests;
