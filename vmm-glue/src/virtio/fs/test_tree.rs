//! A share with surroundings on the host, for the tests: both are compared before and after a request.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// The share is `top/share`; the rest is around it.
pub struct Tree {
    base: tempfile::TempDir,
}

/// By path, all that stat(2) tells but the access time, and the content.
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

    /// What is around the share, and what is in it.
    pub fn state(&self) -> (State, State) {
        let mut all = State::new();
        describe(self.base.path(), &mut all);
        let share = self.share();
        all.into_iter().partition(|(path, _)| !path.starts_with(&share))
    }
}

/// What differs between two states.
pub fn differences(before: &State, after: &State) -> Vec<String> {
    let gone = before.keys().filter(|path| !after.contains_key(*path)).map(|path| format!("{path:?} is gone"));
    let other = after.iter().filter_map(|(path, now)| match before.get(path) {
        None => Some(format!("{path:?} is new")),
        Some(then) => (then != now).then(|| format!("{path:?} was {then}, is {now}")),
    });
    gone.chain(other).collect()
}

/// Makes a special file.
pub fn mknod(path: &Path, mode: libc::mode_t, device: libc::dev_t) -> std::io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a string with its end.
    match unsafe { libc::mknod(path.as_ptr(), mode, device) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
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
