//! A share and the host's files around the share, for tests that compare all these files before and after a request.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, SFlag};

/// A directory tree. `top/share` is the share.
pub struct Tree {
    base: tempfile::TempDir,
}

/// Content of each file, and the file's stat(2) fields except the access time. The key is the file's path.
pub type State = BTreeMap<PathBuf, String>;

impl Tree {
    pub fn new() -> Self {
        let tree = Self { base: tempfile::tempdir().unwrap() };
        let (top, share) = (tree.top(), tree.share());
        fs::create_dir_all(&share).unwrap();
        for directory in ["empty", "full", "share/dir", "share/dir/hollow", "share/hollow"] {
            fs::create_dir(top.join(directory)).unwrap();
        }
        for file in
            ["../far", "outside", "full/inner", "share/file", "share/dir/inner", "share/dir/file", "share/hello"]
        {
            fs::write(top.join(file), "content").unwrap();
        }
        fs::set_permissions(top.join("outside"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("..", share.join("out")).unwrap();
        symlink("../outside", share.join("outfile")).unwrap();
        symlink(top.join("full"), share.join("absolute")).unwrap();
        mknod(&share.join("fifo"), libc::S_IFIFO | 0o666, 0).unwrap();
        mknod(&share.join("socket"), libc::S_IFSOCK | 0o666, 0).unwrap();
        tree
    }

    pub fn top(&self) -> PathBuf {
        self.base.path().join("top")
    }

    pub fn share(&self) -> PathBuf {
        self.top().join("share")
    }

    /// Returns the state of the files around the share, and of the files in the share.
    pub fn state(&self) -> (State, State) {
        let mut all = State::new();
        describe(self.base.path(), &mut all);
        let share = self.share();
        all.into_iter().partition(|(path, _)| !path.starts_with(&share))
    }
}

/// Returns the differences between two states.
pub fn differences(before: &State, after: &State) -> Vec<String> {
    let removed = before.keys().filter(|path| !after.contains_key(*path)).map(|path| format!("{path:?} was removed"));
    let changed = after.iter().filter_map(|(path, new)| match before.get(path) {
        None => Some(format!("{path:?} was created")),
        Some(old) => (old != new).then(|| format!("{path:?} changed from {old} to {new}")),
    });
    removed.chain(changed).collect()
}

/// Creates a special file.
pub fn mknod(path: &Path, mode: libc::mode_t, device: libc::dev_t) -> std::io::Result<()> {
    let (kind, mode) = (SFlag::from_bits_truncate(mode), Mode::from_bits_truncate(mode));
    nix::sys::stat::mknod(path, kind, mode, device)?;
    Ok(())
}

fn describe(path: &Path, state: &mut State) {
    let meta = fs::symlink_metadata(path).unwrap();
    let content = if meta.is_file() {
        String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned()
    } else if meta.is_symlink() {
        fs::read_link(path).unwrap().to_string_lossy().into_owned()
    } else {
        String::new()
    };
    let times = (meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec());
    let text = format!(
        "{:o} {}:{} links {} rdev {} size {} times {times:?} {content:?}",
        meta.mode(),
        meta.uid(),
        meta.gid(),
        meta.nlink(),
        meta.rdev(),
        meta.len()
    );
    state.insert(path.to_owned(), text);
    if meta.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            describe(&entry.unwrap().path(), state);
        }
    }
}
