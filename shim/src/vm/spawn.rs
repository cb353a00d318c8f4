//! Starts the VMM process in the sandbox's network namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use husk_vmm::client::{self, SpawnOptions, Spawned};
use nix::sched::{CloneFlags, unshare};

use crate::host_view;
use crate::launcher::Launcher;
use crate::oci::Network;
use crate::vm::vmm::VmmError;

/// Opens the sandbox's network namespace, or creates it.
///
/// # Errors
/// [`VmmError::Netns`] or [`VmmError::NewNetns`].
pub fn network_namespace(network: &Network) -> Result<OwnedFd, VmmError> {
    match network {
        Network::Path(path) => host_view::of_process()
            .reach(path)
            .and_then(|reached| File::open(&reached.path))
            .map(OwnedFd::from)
            .map_err(|source| VmmError::Netns { path: path.display().to_string(), source }),
        Network::New => new_network_namespace().map_err(VmmError::NewNetns),
    }
}

/// Creates a network namespace on another thread, so that this thread need not return to its own namespace.
fn new_network_namespace() -> io::Result<OwnedFd> {
    let creator = thread::Builder::new().name("new-network".into()).spawn(|| -> io::Result<OwnedFd> {
        unshare(CloneFlags::CLONE_NEWNET)?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    })?;
    creator.join().unwrap_or_else(|_| Err(io::Error::other("the thread that creates the namespace panicked")))
}

/// Starts the VMM process in a network namespace. The process inherits this process's cgroup and mount namespace.
///
/// Must be called on the main thread. When the calling thread exits, the kernel kills the VMM (PR_SET_PDEATHSIG).
///
/// # Errors
/// [`VmmError::Spawn`], or [`VmmError::Netns`] if the fd cannot be duplicated.
pub fn spawn(namespace: &OwnedFd) -> Result<Spawned, VmmError> {
    let namespace = namespace.try_clone().map_err(|source| VmmError::Netns { path: "of the pod".into(), source })?;
    let network = client::Network::Join(namespace);
    client::spawn(SpawnOptions { network, ..Default::default() }).map_err(VmmError::Spawn)
}

/// Lets the launcher start the VMM process, because this process is confined already. `cgroups` are the open files
/// `cgroup.procs` of the cgroups that the VMM process enters. The VMM process also enters this process's mount
/// namespace. When the main thread of this process exits, the kernel kills the VMM process.
///
/// # Errors
/// [`VmmError::Launch`], or [`VmmError::Netns`] if the mount namespace cannot be opened.
pub fn spawn_by_launcher(launcher: &Launcher, namespace: &OwnedFd, cgroups: &[OwnedFd]) -> Result<Spawned, VmmError> {
    let path = "/proc/self/ns/mnt";
    let mounts = File::open(path).map_err(|source| VmmError::Netns { path: path.into(), source })?;
    launcher.start_vmm(mounts.as_fd(), namespace.as_fd(), cgroups).map_err(VmmError::Launch)
}
