//! Resolves paths in the mount namespace of the host.
//!
//! The shim's own mount namespace contains only what the shim itself needs ([`crate::daemon`]). The paths of volumes,
//! layers and network namespaces lead to other mounts, which the host may make at any time. Therefore, threads that
//! stay in the host's namespace open these paths. The shim gets fds, and attaches copies of mounts in its own
//! namespace.
//!
//! These threads only open paths without read or write access (O_PATH), and copy mounts. Their seccomp filter allows no
//! other changes ([`crate::confinement`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;

use husk_base::sys::mount;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, gettid};

use crate::blocking::Pool;
use crate::fs_types;

/// The view of this process. It is set once, before the process enters its own mount namespace.
static OF_PROCESS: OnceLock<HostView> = OnceLock::new();
/// A view of the calling thread's own namespace.
static OWN: HostView = HostView { threads: None };

/// The mount namespace of the host.
#[derive(Clone)]
pub struct HostView {
    /// `None` for the calling thread's own namespace.
    threads: Option<Threads>,
}

#[derive(Clone)]
struct Threads {
    /// Whether the first thread runs all work, because a thread of the pool would stay unconfined.
    first_only: Arc<AtomicBool>,
    pool: Arc<Pool>,
    requests: mpsc::Sender<Request>,
    /// Thread id of the first thread.
    id: i32,
}

/// A request to the first thread of a view.
enum Request {
    /// Start a thread. A thread is in the mount namespace of the thread that has started it.
    Start(SyncSender<io::Result<()>>),
    /// Call the function. Threads that are started later inherit its effect on the thread.
    Call(Box<dyn FnOnce() + Send>),
}

/// Returns the view of this process: the host's namespace in the shim's daemon, and otherwise the namespace of the
/// calling thread.
pub fn of_process() -> &'static HostView {
    OF_PROCESS.get().unwrap_or(&OWN)
}

/// A path of the host that this process can use in its own mount namespace.
#[derive(Debug)]
pub struct Reached {
    /// The path, which is valid as long as this value.
    pub path: PathBuf,
    _file: Option<OwnedFd>,
}

impl HostView {
    /// Returns a view of the calling thread's own namespace.
    #[cfg(test)]
    pub fn own() -> Self {
        OWN.clone()
    }

    /// Starts a thread that stays in the mount namespace of the calling thread.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn start() -> io::Result<Self> {
        let pool = Arc::new(Pool::new());
        let (requests, receiver) = mpsc::channel();
        let (sender, started) = mpsc::sync_channel(1);
        let of_thread = Arc::clone(&pool);
        thread::Builder::new().name("host-view".into()).spawn(move || {
            drop(sender.send(separate_directory().map(|()| gettid().as_raw())));
            serve(&of_thread, &receiver);
        })?;
        let id = started.recv().unwrap_or_else(|_| Err(ended()))?;
        Ok(Self { threads: Some(Threads { first_only: Arc::default(), pool, requests, id }) })
    }

    /// Makes this view the view of the process. Until [`HostView::confine`], only the first thread works, so that no
    /// thread stays unconfined.
    pub fn install(self) {
        self.work_on_first_thread(true);
        // Only the daemon installs a view, and does so once.
        let _ = OF_PROCESS.set(self);
    }

    fn work_on_first_thread(&self, first_only: bool) {
        if let Some(threads) = &self.threads {
            threads.first_only.store(first_only, Ordering::Relaxed);
        }
    }

    /// Calls `confine` on the first thread of the view. Threads that start later inherit what it sets.
    ///
    /// # Errors
    /// If the thread has ended.
    pub fn confine<T: Send + 'static>(&self, confine: impl FnOnce() -> T + Send + 'static) -> io::Result<Option<T>> {
        let Some(threads) = &self.threads else { return Ok(None) };
        let (sender, done) = mpsc::sync_channel(1);
        let call = Box::new(move || drop(sender.send(confine())));
        threads.requests.send(Request::Call(call)).map_err(|_| ended())?;
        let confined = done.recv().map_err(|_| ended())?;
        self.work_on_first_thread(false);
        Ok(Some(confined))
    }

    /// Opens `path` with O_PATH. If `follow` is true, follows a symlink in the final component.
    ///
    /// # Errors
    /// The errors of open(2).
    pub fn open(&self, path: &Path, follow: bool) -> io::Result<OwnedFd> {
        let path = path.to_owned();
        self.run(move || open_path(&path, follow))
    }

    /// Opens several paths as [`HostView::open`] does, and follows symlinks.
    ///
    /// # Errors
    /// If the paths cannot be opened by another thread. Otherwise, each path has its own result.
    pub fn open_all(&self, paths: Vec<PathBuf>) -> io::Result<Vec<io::Result<OwnedFd>>> {
        self.run(move || Ok(paths.iter().map(|path| open_path(path, true)).collect()))
    }

    /// Returns a detached copy of the mount of `source`, with submounts if `recursive`. The copy has the given
    /// propagation, for example `MS_PRIVATE`.
    ///
    /// # Errors
    /// The errors of open_tree(2) and mount_setattr(2).
    pub fn clone_tree(&self, source: &OwnedFd, recursive: bool, propagation: u64) -> io::Result<OwnedFd> {
        let source = source.try_clone()?;
        // The calling thread closes `source`: a debug build calls fcntl(2) first, which the thread's filter refuses.
        let (tree, _source) = self.run(move || Ok((mount::clone_tree(source.as_fd(), recursive), source)))?;
        let tree = tree?;
        mount::set_attributes(tree.as_fd(), 0, propagation, true)?;
        Ok(tree)
    }

    /// Returns the id of a thread in the namespace, or `None` for the calling thread's own namespace.
    pub fn thread(&self) -> Option<i32> {
        self.threads.as_ref().map(|threads| threads.id)
    }

    /// Returns a path that leads to the host's file at `path`. The file, and directories above it, need not exist. The
    /// returned path then leads into the deepest directory that exists.
    ///
    /// On a file system that is read-only in this process's namespace ([`crate::confinement`]), returns `path` itself.
    ///
    /// # Errors
    /// The errors of open(2), except ENOENT.
    pub fn reach(&self, path: &Path) -> io::Result<Reached> {
        if self.threads.is_none() {
            return Ok(Reached { path: path.to_owned(), _file: None });
        }
        let mut existing = path;
        let file = loop {
            match (self.open(existing, true), existing.parent()) {
                (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound => existing = parent,
                (opened, _) => break opened?,
            }
        };
        if fs_types::is_protected(&file)? {
            return Ok(Reached { path: path.to_owned(), _file: None });
        }
        let mut reached = path_of(&file);
        let rest = path.strip_prefix(existing).unwrap_or_else(|_| Path::new(""));
        if !rest.as_os_str().is_empty() {
            reached.push(rest);
        }
        Ok(Reached { path: reached, _file: Some(file) })
    }

    /// Runs `work` on a thread of the view, and waits for its result.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        let Some(threads) = &self.threads else { return work() };
        let (sender, done) = mpsc::sync_channel(1);
        let work = Box::new(move || drop(sender.send(work())));
        if threads.first_only.load(Ordering::Relaxed) {
            threads.requests.send(Request::Call(work)).map_err(|_| ended())?;
        } else {
            threads.pool.run(work, || threads.start_thread())?;
        }
        done.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl Threads {
    fn start_thread(&self) -> io::Result<()> {
        let (sender, started) = mpsc::sync_channel(1);
        self.requests.send(Request::Start(sender)).map_err(|_| ended())?;
        started.recv().unwrap_or_else(|_| Err(ended()))
    }
}

impl std::fmt::Debug for HostView {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("HostView").field("thread", &self.thread()).finish()
    }
}

/// Opens `path` with O_PATH. If `follow` is true, follows a symlink in the final component.
///
/// # Errors
/// The errors of open(2).
pub fn open_path(path: &Path, follow: bool) -> io::Result<OwnedFd> {
    let no_follow = if follow { OFlag::empty() } else { OFlag::O_NOFOLLOW };
    Ok(open(path, OFlag::O_PATH | OFlag::O_CLOEXEC | no_follow, Mode::empty())?)
}

/// Returns the path in procfs that leads to the open file `file`.
pub fn path_of(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Gives the calling thread its own working directory, which is the root. Otherwise, the thread would keep the mount of
/// the bundle busy.
fn separate_directory() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    Ok(chdir("/")?)
}

/// Serves the requests to the first thread, until the view is dropped.
fn serve(pool: &Arc<Pool>, requests: &Receiver<Request>) {
    for request in requests {
        match request {
            Request::Start(started) => {
                let pool = Arc::clone(pool);
                let thread = thread::Builder::new().name("host-view".into()).spawn(move || pool.work());
                drop(started.send(thread.map(drop)));
            }
            Request::Call(call) => call(),
        }
    }
}

fn ended() -> io::Error {
    io::Error::other("a thread in the host's mount namespace has ended")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use husk_vmm::config::SeccompMode;
    use nix::mount::umount;
    use nix::sys::prctl;

    use super::*;
    use crate::confinement::seccomp;
    use crate::daemon::mount_namespace;
    use crate::volumes::test_support::{isolated, tmpfs};

    #[test]
    fn starts_no_thread_before_it_is_confined() {
        let host = HostView::start().unwrap();
        host.work_on_first_thread(true);
        let thread = || Some(host.run(|| Ok(gettid().as_raw())).unwrap());
        assert_eq!(thread(), host.thread());
        host.confine(|| ()).unwrap();
        assert_ne!(thread(), host.thread());
    }

    /// Starts a confined view of the calling thread's namespace.
    fn confined() -> HostView {
        let host = HostView::start().unwrap();
        let confined = host.confine(|| {
            prctl::set_no_new_privs().unwrap();
            seccomp::load_for_host_view(SeccompMode::Enforce).unwrap();
        });
        confined.unwrap().unwrap();
        host
    }

    #[test]
    fn confined_view_opens_paths_and_copies_mounts() {
        isolated(|dir| {
            let host = confined();
            tmpfs(&dir.join("a"));
            fs::write(dir.join("a/file"), "text").unwrap();
            let (file, tree) = {
                let directory = host.open(&dir.join("a"), false).unwrap();
                let tree = host.clone_tree(&directory, true, libc::MS_PRIVATE).unwrap();
                (host.open(&dir.join("a/file"), true).unwrap(), tree)
            };
            assert_eq!(fs::read_to_string(path_of(&file)).unwrap(), "text");
            drop(file);
            // The copy does not keep the mount busy.
            umount(&dir.join("a")).unwrap();
            assert_eq!(fs::read_to_string(path_of(&tree).join("file")).unwrap(), "text");
        });
    }

    #[test]
    fn calls_run_at_the_same_time() {
        let host = HostView::start().unwrap();
        thread::scope(|scope| {
            let (release, held) = mpsc::channel::<()>();
            let hanging = scope.spawn({
                let host = host.clone();
                move || host.run(move || Ok(held.recv().is_err()))
            });
            host.open(Path::new("/"), false).unwrap();
            drop(release);
            assert!(hanging.join().unwrap().unwrap());
        });
    }

    #[test]
    fn reach_leads_to_files_that_exist_only_on_the_host() {
        isolated(|dir| {
            let (dir, host) = (dir.to_owned(), HostView::start().unwrap());
            tmpfs(&dir.join("later"));
            fs::write(dir.join("later/file"), "text").unwrap();
            let shim = thread::spawn(move || {
                mount_namespace::enter(&[]).unwrap();
                assert!(!dir.join("later/file").exists());
                let at = |path: &str| host.reach(&dir.join(path)).unwrap();
                let reached = at("later/file");
                assert_eq!(fs::read_to_string(&reached.path).unwrap(), "text");
                let reached = at("later/new/deep/file");
                fs::create_dir_all(reached.path.parent().unwrap()).unwrap();
                fs::write(&reached.path, "new").unwrap();
                // The path of a protected file leads to this namespace's mount of the file.
                let protected = Path::new("/proc/sys/kernel/hostname");
                assert_eq!(host.reach(protected).unwrap().path, protected);
                dir
            });
            let dir = shim.join().unwrap();
            assert_eq!(fs::read_to_string(dir.join("later/new/deep/file")).unwrap(), "new");
        });
    }
}
