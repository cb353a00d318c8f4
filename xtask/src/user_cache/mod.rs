//! The user's cache of build outputs: another clone on the same machine uses what this one has built.
//!
//! A step makes its outputs in `target/husk`, with a [`Stamp`] of its key, whether there is a cache or not. The cache
//! has them too, as hard links where the file system supports it: `KIND/KEY/OUTPUT` in `$XDG_CACHE_HOME/husk`, or
//! in `~/.cache/husk`. An entry appears by renaming a directory, so that no process sees an incomplete one. Nothing in
//! an entry is ever written: a step removes its old outputs before it makes new ones.

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
/// Maximum number of entries of a kind: those used last stay.
const MAX_VERSIONS: usize = 3;
const DAY: u64 = 24 * 60 * 60;
/// Prefix of a directory that is not an entry yet. A process that was killed leaves it.
const PART: &str = ".part-";

/// A build step whose outputs the cache keeps.
pub struct Step<'a> {
    /// The directory in the cache: one for each thing that is built.
    pub kind: &'a str,
    /// The hash of the inputs.
    pub key: &'a str,
    /// Files or directories in `target/husk`, with different names.
    pub outputs: &'a [&'a Path],
    /// The record of the key of the outputs in `target/husk`.
    pub stamp: Stamp,
}

/// Where the outputs of a step came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// They were in `target/husk`.
    Present,
    /// They were in the cache.
    Cache,
    /// They have been built.
    Build,
}

impl Step<'_> {
    /// Makes the outputs, unless they are in `target/husk` or in the user's cache. The caller holds a lock that
    /// excludes other processes from the outputs.
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
        // Another clone may be building the same, which takes longer than waiting for it.
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

/// Returns the user's cache. `None` if there is none; the first call says why.
fn user() -> Option<&'static Cache> {
    static USER: OnceLock<Option<Cache>> = OnceLock::new();
    let open = || match directory(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")).and_then(Cache::open) {
        Ok(cache) => Some(cache),
        Err(error) => {
            ui::say("cache", format!("outputs are kept in target/husk only: {error:#}"));
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
    /// Creates the directory, and checks that it can be written.
    fn open(dir: PathBuf) -> Result<Cache> {
        files::make_dir(&dir)?;
        // https://bford.info/cachedir: backups leave it out.
        let tag = "Signature: 8a477f597d28d172789f06886806bc55\n# Build outputs of Husk's `cargo xtask`.\n";
        let path = dir.join("CACHEDIR.TAG");
        fs::write(&path, tag).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(Cache { dir })
    }

    fn entry(&self, step: &Step) -> PathBuf {
        self.dir.join(step.kind).join(step.key)
    }

    /// Links the outputs from the cache to `target/husk`. Returns false if the cache lacks them.
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
            ui::say("cache", format!("{} is incomplete, and is made again", entry.display()));
            let _ = files::remove(&entry);
            return false;
        }
        touch(&entry);
        match step.outputs.iter().try_for_each(fetch) {
            Ok(()) => true,
            Err(error) => {
                ui::say("cache", format!("failed to use {}: {error:#}", entry.display()));
                false
            }
        }
    }

    /// Adds the outputs, unless the cache has them. A failure is no error of the step.
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
            // The directory has another name now: there is nothing to remove.
            Ok(()) => drop(part.keep()),
            // Another process was faster.
            Err(_) if entry.exists() => {}
            Err(error) => return Err(error).with_context(|| format!("failed to create {}", entry.display())),
        }
        Ok(())
    }
}

fn name(output: &Path) -> Result<&OsStr> {
    output.file_name().with_context(|| format!("{} has no name", output.display()))
}

/// Copies a file or directory as hard links. Between file systems it copies the content, and leaves holes as they are.
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

/// Notes that an entry was used: its modification time says when.
fn touch(entry: &Path) {
    // If the cache belongs to somebody else, its owner's uses count.
    let _ = File::open(entry).and_then(|dir| dir.set_modified(SystemTime::now()));
}

/// An entry of the cache.
struct Entry {
    path: PathBuf,
    used: SystemTime,
}

/// Returns the entries of a kind, those used last first.
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

/// Creates a directory that is no entry, and is removed when it is dropped.
fn part(kind: &Path) -> Result<TempDir> {
    let part = tempfile::Builder::new().prefix(PART).tempdir_in(kind);
    part.with_context(|| format!("failed to create a directory in {}", kind.display()))
}

fn is_part(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PART.as_bytes())
}

/// Removes the entries of a kind that are too old or too many, and what killed processes left a day ago.
fn prune(kind: &Path, now: SystemTime) -> Result<()> {
    let age = |used: SystemTime| now.duration_since(used).unwrap_or_default();
    for (number, entry) in entries(kind)?.into_iter().enumerate() {
        if number >= MAX_VERSIONS || age(entry.used) > MAX_AGE {
            // Renamed first, so that no process finds an incomplete entry.
            let part = part(kind)?;
            match fs::rename(&entry.path, part.path().join("entry")) {
                // Another process removed it.
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

/// Returns the kinds that the cache has, in alphabetical order.
fn kinds(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = fs::read_dir(dir).with_context(|| format!("failed to read {}", dir.display()))?;
    let mut kinds: Vec<PathBuf> = list.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    kinds.retain(|path| path.is_dir());
    kinds.sort();
    Ok(kinds)
}

/// Returns the bytes that a file or directory occupies. Holes do not count.
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

/// `cargo xtask cache`: lists the entries, after removing those that are too old or too many if `pruned`.
pub fn list_entries(pruned: bool) -> Result<()> {
    let dir = directory(std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME"))?;
    let kinds = if dir.exists() { kinds(&dir)? } else { Vec::new() };
    if pruned {
        kinds.iter().try_for_each(|kind| prune(kind, SystemTime::now()))?;
    }
    print!("{}", list(&dir, &kinds, SystemTime::now())?);
    Ok(())
}

/// Returns the list of entries: size in MiB, days since the last use, kind and key.
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
