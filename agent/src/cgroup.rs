//! Guest control groups: the hierarchy's root, and what is read from and written to one container's group.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Where the hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// The group all containers live under.
const PARENT: &str = "husk";

/// Makes the parent of all containers' groups, with every controller on.
///
/// # Errors
/// What the kernel says when the group cannot be made.
pub fn init_root() -> io::Result<()> {
    let root = Path::new(MOUNT);
    let parent = root.join(PARENT);
    let controllers = fs::read_to_string(root.join("cgroup.controllers"))?;
    let all: String = controllers.split_whitespace().flat_map(|name| ["+", name, " "]).collect();
    fs::write(root.join("cgroup.subtree_control"), &all)?;
    fs::create_dir_all(&parent)?;
    fs::write(parent.join("cgroup.subtree_control"), &all)
}

/// Limits the tasks that all containers together may have.
///
/// # Errors
/// What the kernel says.
pub fn limit_pids(most: u64) -> io::Result<()> {
    fs::write(Path::new(MOUNT).join(PARENT).join("pids.max"), most.to_string())
}

/// One container's group.
#[derive(Debug, Clone)]
pub struct Cgroup {
    name: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The group of container `id`, whether it exists or not.
    pub fn of(id: &str) -> Self {
        let name = Path::new("/").join(PARENT).join(id);
        Self { path: Path::new(MOUNT).join(PARENT).join(id), name }
    }

    /// Makes it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn create(&self) -> io::Result<()> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Its name in the hierarchy, as `cgroupsPath` wants it.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One of its files.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, file: &str) -> io::Result<String> {
        fs::read_to_string(self.path.join(file))
    }

    /// Writes one of its files.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// A file of `key value` lines.
    pub fn table(&self, file: &str) -> BTreeMap<String, u64> {
        self.read(file).map(|text| parse_table(&text)).unwrap_or_default()
    }

    /// How often the kernel has killed a process of this group for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.table("memory.events").get("oom_kill").copied().unwrap_or(0)
    }

    /// All processes, of this group and of those below it (a container may have made some).
    pub fn pids(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        self.each_group(&mut |path| {
            if let Ok(text) = fs::read_to_string(path.join("cgroup.procs")) {
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0));
            }
        });
        pids
    }

    /// Kills every process.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn kill(&self) -> io::Result<()> {
        self.write("cgroup.kill", "1")
    }

    /// Stops or continues every process. The kernel acts at once; it reports through `cgroup.events`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn freeze(&self, frozen: bool) -> io::Result<()> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether every process has stopped.
    pub fn is_frozen(&self) -> bool {
        self.table("cgroup.events").get("frozen") == Some(&1)
    }

    /// Whether any process is left.
    pub fn is_populated(&self) -> bool {
        self.table("cgroup.events").get("populated") == Some(&1)
    }

    /// Removes it and the groups below it.
    ///
    /// # Errors
    /// What the kernel says, EBUSY while a process is left.
    pub fn remove(&self) -> io::Result<()> {
        let mut groups = Vec::new();
        self.each_group(&mut |path| groups.push(path.to_owned()));
        for path in groups.iter().rev() {
            match fs::remove_dir(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Visits this group and all below it, parents first.
    fn each_group(&self, visit: &mut dyn FnMut(&Path)) {
        let mut queue = vec![self.path.clone()];
        while let Some(path) = queue.pop() {
            visit(&path);
            let Ok(entries) = fs::read_dir(&path) else { continue };
            queue.extend(
                entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()),
            );
        }
    }
}

/// Lines of `key value`; others are skipped.
pub fn parse_table(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables() {
        let table = parse_table("anon 12\nfile 0\nbroken\nmax max\n");
        assert_eq!(table.get("anon"), Some(&12));
        assert_eq!(table.len(), 2);
    }
}
