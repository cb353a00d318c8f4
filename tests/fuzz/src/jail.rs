//! Runs a fuzz target in a private root file system, so that the target cannot change the host's files.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::thread;

use husk_base::sync::lock;
use nix::mount::MsFlags;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chroot, getegid, geteuid};

/// Mount point of the private root file system. chroot(2) then makes this mount point the root directory. The mount
/// exists only in a private mount namespace. Therefore the mount disappears when the process ends.
const AT: &str = "/tmp";
/// Paths that are bind-mounted from the host. The check for changed files must skip these paths.
pub const OF_THE_HOST: [&str; 2] = ["/dev/null", "/proc/self/fd"];

/// If the user is not root, enters a user namespace in which the process is root. The process must be single-threaded.
///
/// # Panics
/// Panics if the user may not create user namespaces.
pub fn prepare() {
    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        return;
    }
    check("unshare", unshare(CloneFlags::CLONE_NEWUSER));
    fs::write("/proc/self/setgroups", "deny").expect("write /proc/self/setgroups");
    fs::write("/proc/self/uid_map", format!("0 {user} 1")).expect("write /proc/self/uid_map");
    fs::write("/proc/self/gid_map", format!("0 {group} 1")).expect("write /proc/self/gid_map");
}

/// A thread whose root directory is a tmpfs. Threads that this thread starts inherit the root directory. The thread
/// calls `work` for each input.
///
/// libFuzzer's thread keeps the host's root directory, because it reads the corpus and writes artifacts.
pub struct Jail<T> {
    inputs: SyncSender<T>,
    done: Mutex<Receiver<Result<(), String>>>,
}

impl<T: Send + 'static> Jail<T> {
    /// Starts the thread, which calls `start` once and passes the result to each call of `work`.
    pub fn new<S>(start: impl FnOnce() -> S + Send + 'static, work: impl Fn(&mut S, T) + Send + 'static) -> Self {
        let (inputs, input) = sync_channel::<T>(0);
        let (done, when_done) = sync_channel(1);
        forward_panics(done.clone());
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

    /// Passes one input to the thread, and waits until the thread has processed the input.
    ///
    /// # Panics
    /// Panics if a thread of the jail panics.
    pub fn run(&self, input: T) {
        let done = lock(&self.done);
        self.inputs.send(input).expect("pass the input to the jail's thread");
        if let Err(panic) = done.recv().expect("wait for the jail's thread") {
            panic!("{panic}");
        }
    }
}

/// Forwards panics of the jail's threads to the thread that waits in [`Jail::run`]. The thread that panics runs
/// libFuzzer's code, which saves the input to a file of the host. Therefore the waiting thread has to panic, because
/// its root directory is the host's.
fn forward_panics(to: SyncSender<Result<(), String>>) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !is_inside() || to.send(Err(info.to_string())).is_err() {
            return hook(info);
        }
        // The waiting thread panics when it receives the message. This panic ends the process or its test.
        loop {
            thread::park();
        }
    }));
}

/// The only jail of the process. The first input starts the jail.
pub type Only<T> = OnceLock<Jail<T>>;

fn enter() {
    let at = |path: &str| Path::new(AT).join(path);
    let limit = fs::read("/proc/sys/fs/nr_open").expect("read /proc/sys/fs/nr_open");
    // The new mount namespace, root and working directory affect only this thread.
    check("unshare", unshare(CloneFlags::CLONE_NEWNS));
    mount("none", Path::new("/"), "", MsFlags::MS_REC | MsFlags::MS_PRIVATE, "");
    // With MS_NODEV, no thread can open the device nodes that fuzzed requests create.
    mount("tmpfs", Path::new(AT), "tmpfs", MsFlags::MS_NODEV | MsFlags::MS_NOSUID, "size=64m,mode=755");
    for directory in ["dev", "proc/self/fd", "proc/sys/fs"] {
        fs::create_dir_all(at(directory)).expect("create a directory in the jail");
    }
    fs::write(at("proc/sys/fs/nr_open"), limit).expect("write the jail's /proc/sys/fs/nr_open");
    fs::write(at("dev/null"), "").expect("create the jail's /dev/null");
    mount("/dev/null", &at("dev/null"), "", MsFlags::MS_BIND, "");
    mount("/proc/self/fd", &at("proc/self/fd"), "", MsFlags::MS_BIND, "");
    check("chroot", chroot(AT));
    std::env::set_current_dir("/").expect("change to the root directory");
    assert!(is_inside(), "the jail's thread can still reach the host's files");
}

/// Whether this thread's root directory is the jail's tmpfs.
fn is_inside() -> bool {
    matches!(fs::metadata("/etc").map_err(|error| error.kind()), Err(ErrorKind::NotFound))
}

fn mount(source: &str, target: &Path, kind: &str, flags: MsFlags, data: &str) {
    check("mount", nix::mount::mount(Some(source), target, Some(kind), flags, Some(data)));
}

fn check(what: &str, result: nix::Result<()>) {
    if let Err(error) = result {
        panic!("{what} failed: {error}; the jail mounts file systems, which needs root or a user namespace");
    }
}
