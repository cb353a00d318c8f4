//! Helpers for tests that mount file systems. Each test has its own mount namespace, and needs root.

use std::path::{Path, PathBuf};
use std::sync::mpsc;

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::blocking::Job;
use crate::daemon::mount_namespace;
use crate::host_view::HostView;
use crate::oci::spec::Mount;
use crate::volumes::bind::bind;
use crate::volumes::shared_mounts::{VOLUMES, markers_dir};
use crate::volumes::source::{Flags, Source};
use crate::volumes::staging_dir::{CopyContext, StagingDir};
use crate::volumes::{Share, mount_api};

/// Runs `test` with a new directory, in a thread with a new mount namespace. Mounts in the namespace do not propagate
/// to the machine that runs the tests.
pub fn isolated(test: impl FnOnce(&Path) + Send + 'static) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root to mount file systems");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        test(dir.path());
    });
    thread.join().unwrap();
}

/// A thread with a mount namespace like that of the shim's daemon. The namespace of the thread that starts the daemon
/// stands for the host's.
pub struct Daemon {
    jobs: mpsc::Sender<Job>,
    host: HostView,
}

impl Daemon {
    /// Starts the thread. Its namespace contains the mounts above `needed`.
    pub fn start(needed: &Path) -> Self {
        let host = HostView::start().unwrap();
        let (jobs, receiver) = mpsc::channel::<Job>();
        let (entered, entering) = mpsc::channel();
        let needed = needed.to_owned();
        std::thread::spawn(move || {
            entered.send(mount_namespace::enter(&[needed])).unwrap();
            receiver.iter().for_each(|job| job());
        });
        entering.recv().unwrap().unwrap();
        Self { jobs, host }
    }

    /// Runs `work` on the thread, with the host's view.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce(&HostView) -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        let host = self.host.clone();
        self.jobs.send(Box::new(move || sender.send(work(&host)).unwrap())).unwrap();
        result.recv().expect("the work has panicked")
    }
}

/// Mounts a tmpfs at `point`. Creates `point` if it does not exist.
pub fn tmpfs(point: &Path) {
    std::fs::create_dir_all(point).unwrap();
    mount(Some("t"), point, Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
}

/// Mounts a tmpfs below `dir`, with shared propagation as on most hosts. Returns the mount point.
pub fn shared_mount(dir: &Path) -> PathBuf {
    let (root, none) = (dir.join("shared"), None::<&Path>);
    tmpfs(&root);
    mount(none, &root, none, MsFlags::MS_SHARED, none).unwrap();
    root
}

/// Binds the directory `source` into the share for container `id`. Returns the mount's path in the share.
pub fn bind_for(share: &Share, id: &str, source: &Path, options: &[&str]) -> PathBuf {
    std::fs::create_dir_all(markers_dir(&share.host, id)).unwrap();
    let options = Some(options.iter().map(ToString::to_string).collect());
    let mount = Mount { kind: Some("bind".into()), options, ..Mount::default() };
    let (file, flags) = (mount_api::open_path(source, true).unwrap(), Flags::of(&mount));
    let receives_mounts = flags.slave;
    let source = Source {
        file: &file,
        directory: true,
        id_mappings: None,
        flags,
        ignores_mount_id: false,
        receives_mounts,
        private: false,
    };
    let host_only = StagingDir::for_share(&share.host).host_only(&share.host).unwrap();
    let context = CopyContext { host_only: &host_only, host: &HostView::own() };
    let part = bind(&mount, &source, (&share.host, id), context, &mut Vec::new()).unwrap();
    let below = part.below.iter().map(|directory| &directory.name);
    below.fold(share.host.join(VOLUMES).join(&part.name), |path, name| path.join(name))
}
