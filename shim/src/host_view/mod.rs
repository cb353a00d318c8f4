//! Resolves paths in the mount namespace of the host.
//!
//! The shim's own mount namespace contains only what the shim itself needs ([`crate::daemon`]). The paths of volumes,
//! layers and network namespaces lead to other mounts, which the host may make at any time. Therefore, threads that
//! stay in the host's namespace open these paths. The shim gets fds, and attaches copies of mounts in its own
//! namespace.
//!
//! These threads only open paths without read or write access (O_PATH), and copy mounts. Their seccomp filter allows no
//! other changes ([`crate::confinement`]).

mod call;
mod reach;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use husk_base::sys::mount;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, gettid};

use crate::blocking::{Job, Pool};
use crate::host_view::call::{Abandoned, CALL_TIMEOUT, Call, Fd, Runner};

pub use reach::Reached;

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
    abandoned: Arc<Abandoned>,
    /// How long a caller waits for a call.
    timeout: Duration,
}

/// A request to the first thread of a view.
enum Request {
    /// Start a thread. A thread is in the mount namespace of the thread that has started it.
    Start(SyncSender<io::Result<()>>),
    /// Call the function. Threads that are started later inherit its effect on the thread.
    Call(Job),
}

/// Returns the view of this process: the host's namespace in the shim's daemon, and otherwise the namespace of the
/// calling thread.
pub fn of_process() -> &'static HostView {
    OF_PROCESS.get().unwrap_or(&OWN)
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
        let (first_only, abandoned) = (Arc::default(), Arc::default());
        Ok(Self { threads: Some(Threads { first_only, pool, requests, id, abandoned, timeout: CALL_TIMEOUT }) })
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
    /// If the thread has ended, or hangs in an earlier call.
    pub fn confine<T: Send + 'static>(&self, confine: impl FnOnce() -> T + Send + 'static) -> io::Result<Option<T>> {
        let Some(threads) = &self.threads else { return Ok(None) };
        let (sender, done) = mpsc::sync_channel(1);
        let call = Box::new(move || drop(sender.send(confine())));
        threads.requests.send(Request::Call(call)).map_err(|_| ended())?;
        let hangs = |error| match error {
            mpsc::RecvTimeoutError::Timeout => io::Error::new(io::ErrorKind::TimedOut, "the thread hangs"),
            mpsc::RecvTimeoutError::Disconnected => ended(),
        };
        let confined = done.recv_timeout(threads.timeout).map_err(hangs)?;
        self.work_on_first_thread(false);
        Ok(Some(confined))
    }

    /// Opens `path` with O_PATH. If `follow` is true, follows a symlink in the final component.
    ///
    /// # Errors
    /// The errors of open(2), or [`io::ErrorKind::TimedOut`] if the file system hangs.
    pub fn open(&self, path: &Path, follow: bool) -> io::Result<OwnedFd> {
        let to_open = path.to_owned();
        self.run(vec![path.to_owned()], move |_| open_path(&to_open, follow).map(Fd::new))?.into_owned()
    }

    /// Opens several paths as [`HostView::open`] does, and follows symlinks.
    ///
    /// # Errors
    /// If the paths cannot be opened by another thread. Otherwise, each path has its own result.
    pub fn open_all(&self, paths: Vec<PathBuf>) -> io::Result<Vec<io::Result<OwnedFd>>> {
        let opened = self.run(paths.clone(), move |call| {
            let open = |path: &PathBuf| {
                let opened = open_path(path, true).map(Fd::new);
                call.next();
                opened
            };
            Ok(paths.iter().map(open).collect::<Vec<_>>())
        })?;
        Ok(opened.into_iter().map(|opened| opened?.into_owned()).collect())
    }

    /// Returns a detached copy of the mount of `source`, with submounts if `recursive`. The copy has the given
    /// propagation, for example `MS_PRIVATE`.
    ///
    /// # Errors
    /// The errors of open_tree(2) and mount_setattr(2).
    pub fn clone_tree(&self, source: &OwnedFd, recursive: bool, propagation: u64) -> io::Result<OwnedFd> {
        self.clone_trees(&[source], recursive, propagation)?.pop().ok_or_else(ended)
    }

    /// Copies several mounts as [`HostView::clone_tree`] does, with one request to another thread.
    ///
    /// # Errors
    /// The errors of [`HostView::clone_tree`]. After an error, no copy stays.
    pub fn clone_trees(&self, sources: &[&OwnedFd], recursive: bool, propagation: u64) -> io::Result<Vec<OwnedFd>> {
        // The paths are only for errors.
        let paths = sources.iter().map(|source| std::fs::read_link(path_of(source)).unwrap_or_default()).collect();
        let duplicates =
            sources.iter().map(|source| source.try_clone().map(Fd::new)).collect::<io::Result<Vec<_>>>()?;
        let trees = self.run(paths, move |call| {
            let clone = |source: &Fd| {
                let tree = mount::clone_tree(source.borrow()?, recursive).map(Fd::new);
                call.next();
                tree
            };
            duplicates.iter().map(clone).collect::<io::Result<Vec<_>>>()
        })?;
        let trees = trees.into_iter().map(Fd::into_owned).collect::<io::Result<Vec<_>>>()?;
        trees.iter().try_for_each(|tree| mount::set_attributes(tree.as_fd(), 0, propagation, true))?;
        Ok(trees)
    }

    /// Returns the id of a thread in the namespace, or `None` for the calling thread's own namespace.
    pub fn thread(&self) -> Option<i32> {
        self.threads.as_ref().map(|threads| threads.id)
    }

    /// Runs `work` on a thread of the view, and waits for its result. `paths` are the paths that `work` looks up.
    fn run<T: Send + 'static>(
        &self,
        paths: Vec<PathBuf>,
        work: impl FnOnce(&Call) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let Some(threads) = &self.threads else { return work(&Call::new(paths)) };
        let send = |job| threads.requests.send(Request::Call(job)).map_err(|_| ended());
        let start = || threads.start_thread();
        let runner = match threads.first_only.load(Ordering::Relaxed) {
            true => Runner::First(&send),
            false => Runner::Pool(&threads.pool, &start),
        };
        call::run(&runner, (&threads.abandoned, threads.timeout), paths, work)
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
    use std::io::Read;

    use husk_vmm::config::SeccompMode;
    use nix::mount::umount;
    use nix::sys::prctl;

    use super::*;
    use crate::confinement::seccomp;
    use crate::volumes::test_support::{isolated, tmpfs};

    #[test]
    fn starts_no_thread_before_it_is_confined() {
        let host = HostView::start().unwrap();
        host.work_on_first_thread(true);
        let thread = || Some(host.run(Vec::new(), |_| Ok(gettid().as_raw())).unwrap());
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
                move || host.run(Vec::new(), move |_| Ok(held.recv().is_err()))
            });
            host.open(Path::new("/"), false).unwrap();
            drop(release);
            assert!(hanging.join().unwrap().unwrap());
        });
    }

    impl HostView {
        /// Returns the view with a timeout that ends at once.
        fn impatient(&self) -> Self {
            let threads = self.threads.clone();
            Self { threads: threads.map(|threads| Threads { timeout: Duration::from_millis(1), ..threads }) }
        }

        /// Starts a call for `path` that hangs until the returned value is dropped. Its late result is the returned
        /// pipe's write end.
        fn hang(&self, path: &str) -> (io::Error, mpsc::Sender<()>, std::io::PipeReader) {
            loop {
                let (release, held) = mpsc::channel::<()>();
                let (reader, writer) = std::io::pipe().unwrap();
                let (writer, paths) = (Fd::new(writer.into()), ["/opened", path].map(PathBuf::from).to_vec());
                let hung = self.impatient().run(paths, move |call| {
                    call.next();
                    let _ = held.recv();
                    Ok(writer)
                });
                let error = hung.unwrap_err();
                // The timeout can end before a thread begins the call.
                if !error.to_string().contains("did not begin") && !error.to_string().contains("/opened") {
                    return (error, release, reader);
                }
            }
        }
    }

    #[test]
    fn call_that_hangs_fails_and_its_late_result_is_closed() {
        let host = confined();
        let (error, release, mut reader) = host.hang("/hangs");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(error.to_string().contains("/hangs"), "{error}");
        drop(release);
        // The read ends when the write end is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn paths_that_hang_leave_threads_for_other_paths() {
        let host = confined();
        let held: Vec<_> = (0..80).map(|number| host.hang(&format!("/hangs/{number}"))).collect();
        assert!(held.iter().all(|(error, ..)| error.to_string().contains("file system may hang")), "{:?}", held[79].0);
        host.open(Path::new("/"), false).unwrap();
    }

    #[test]
    fn path_that_hangs_is_refused_until_it_answers() {
        let host = confined();
        let held: Vec<_> = (0..2).map(|_| host.hang("/hangs")).collect();
        let begins = || host.run(vec!["/".into(), "/hangs".into()], |_| Ok(()));
        assert!(begins().unwrap_err().to_string().contains("earlier lookups of /hangs still hang"));
        host.open(Path::new("/"), false).unwrap();
        for (_, release, mut reader) in held {
            drop(release);
            assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        }
        begins().unwrap();
    }
}
