//! A file system of a target's own: whatever a target does by a path, it does not reach the host's files.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{Error, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;

/// Where the file system is until it is the root. In the mount namespace alone, so nothing of it stays.
const AT: &str = "/tmp";
/// What the file system has of the host's, and must not be looked at for changes.
pub const OF_THE_HOST: [&str; 2] = ["/dev/null", "/proc/self/fd"];

/// Has an ordinary user be root in a user namespace; call it while there is one thread.
///
/// # Panics
/// When there are no user namespaces for this user.
pub fn prepare() {
    // SAFETY: take nothing.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    if user == 0 {
        return;
    }
    // SAFETY: takes flags.
    check("unshare", unsafe { libc::unshare(libc::CLONE_NEWUSER) });
    fs::write("/proc/self/setgroups", "deny").expect("setgroups");
    fs::write("/proc/self/uid_map", format!("0 {user} 1")).expect("uid_map");
    fs::write("/proc/self/gid_map", format!("0 {group} 1")).expect("gid_map");
}

/// A thread whose root directory is a tmpfs, as is that of the threads it starts. It does `work` for each input.
///
/// libFuzzer's own thread stays with the host's files: the corpus and what is found.
pub struct Jail<T> {
    inputs: SyncSender<T>,
    done: Mutex<Receiver<Result<(), String>>>,
}

impl<T: Send + 'static> Jail<T> {
    /// Starts the thread. `start` is called there first, `work` with what it returns.
    pub fn new<S>(start: impl FnOnce() -> S + Send + 'static, work: impl Fn(&mut S, T) + Send + 'static) -> Self {
        let (inputs, input) = sync_channel::<T>(0);
        let (done, when_done) = sync_channel(1);
        hand_over_panics(done.clone());
        thread::spawn(move || {
            enter();
            let mut state = start();
            for input in input {
                work(&mut state, input);
                if done.send(Ok(())).is_err() {
                    return;
                }
            }
        });
        Self { inputs, done: Mutex::new(when_done) }
    }

    /// Returns when the work is done.
    ///
    /// # Panics
    /// When a thread of the jail does.
    pub fn run(&self, input: T) {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        self.inputs.send(input).expect("the jail's thread");
        if let Err(panic) = done.recv().expect("the jail's thread") {
            panic!("{panic}");
        }
    }
}

/// Has this thread panic where another does. libFuzzer writes the input down on the thread that does, by a path.
fn hand_over_panics(to: SyncSender<Result<(), String>>) {
    let (own, hook) = (thread::current().id(), std::panic::take_hook());
    std::panic::set_hook(Box::new(move |info| {
        if thread::current().id() == own || to.send(Err(info.to_string())).is_err() {
            return hook(info);
        }
        // The process is about to end.
        loop {
            thread::park();
        }
    }));
}

/// The one jail of a process.
pub type Only<T> = OnceLock<Jail<T>>;

fn enter() {
    let at = |path: &str| Path::new(AT).join(path);
    let limit = fs::read("/proc/sys/fs/nr_open").expect("nr_open");
    // SAFETY: takes flags; this thread alone has the new namespace, working and root directory.
    check("unshare", unsafe { libc::unshare(libc::CLONE_NEWNS) });
    mount(c"none", Path::new("/"), c"", libc::MS_REC | libc::MS_PRIVATE, c"");
    // Device nodes that a guest makes cannot be opened, even if something tries to.
    mount(c"tmpfs", Path::new(AT), c"tmpfs", libc::MS_NODEV | libc::MS_NOSUID, c"size=64m,mode=755");
    for directory in ["dev", "proc/self/fd", "proc/sys/fs"] {
        fs::create_dir_all(at(directory)).expect("a directory");
    }
    fs::write(at("proc/sys/fs/nr_open"), limit).expect("nr_open");
    fs::write(at("dev/null"), "").expect("a file");
    mount(c"/dev/null", &at("dev/null"), c"", libc::MS_BIND, c"");
    mount(c"/proc/self/fd", &at("proc/self/fd"), c"", libc::MS_BIND, c"");
    let root = path(Path::new(AT));
    // SAFETY: the path is a string with its end.
    check("chroot", unsafe { libc::chroot(root.as_ptr()) });
    std::env::set_current_dir("/").expect("the root directory");
    let host = fs::metadata("/etc").map_err(|error| error.kind());
    assert!(matches!(host, Err(ErrorKind::NotFound)), "still among the host's files");
}

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path")
}

fn mount(source: &CStr, target: &Path, kind: &CStr, flags: libc::c_ulong, data: &CStr) {
    let target = path(target);
    // SAFETY: all are strings with their ends; the kernel copies the data.
    let result = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) };
    check("mount", result);
}

fn check(what: &str, result: libc::c_int) {
    assert!(result == 0, "{what}: {}", Error::last_os_error());
}
