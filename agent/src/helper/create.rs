//! Creates a container: libcontainer up to the point where its init waits to be started.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchownat};

use super::executor::HuskExecutor;
use super::protocol::CreateRequest;
use super::tmpfs::{self, Staging};
use super::{devices, trail};
use crate::log::chain;
use crate::sandbox::users::Users;
use crate::task::volumes;

/// Creates the container and returns its init's process id.
///
/// # Errors
/// The reason in runc's form.
pub fn run(request: &CreateRequest) -> Result<i32, String> {
    let config = request.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|error| chain(&error))?;
    volumes::visit(&volumes::of(&spec));
    let users = spec.linux().as_ref().and_then(Users::of);
    make_working_directory(&spec, users.as_ref());
    let staging = Staging { dir: &request.bundle, cgroup: &request.cgroup };
    let changed = tmpfs::prepare(&mut spec, &staging, users.as_ref()).map_err(|(destination, error)| {
        let error = chain(&error);
        format!("error during container init: error mounting \"tmpfs\" to rootfs at {destination:?}: {error}")
    })?;
    if changed {
        spec.save(&config).map_err(|error| chain(&error))?;
    }
    let built = ContainerBuilder::new(request.id.clone(), SyscallType::default())
        .with_executor(HuskExecutor::default())
        .with_console_socket(request.console.clone())
        .with_root_path(request.state_root.clone())
        .and_then(ContainerBuilder::validate_id)
        .and_then(|builder| {
            builder.as_init(request.bundle.clone()).with_systemd(false).with_detach(true).as_sibling(true).build()
        });
    let container = built.map_err(|error| match trail::read_own() {
        // runc looks the program up before what it calls the init.
        Some(reason) if reason.starts_with("exec: ") => reason,
        Some(reason) => format!("error during container init: {reason}"),
        None => chain(&error),
    })?;
    let pid = container.pid().ok_or("the container has no process")?.as_raw();
    let rules = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let extra = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let rules = rules.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    devices::restrict(&request.cgroup, rules, extra).map_err(|error| {
        // SAFETY: kill takes no pointers; the process is the init just made, waiting for its start.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        format!("error setting cgroup config for procHooks process: cannot restrict devices: {error}")
    })?;
    Ok(pid)
}

/// runc makes a working directory that does not exist. The image is hostile: every step is resolved inside its root.
fn make_working_directory(spec: &Spec, users: Option<&Users>) {
    let (Some(root), Some(process)) = (spec.root(), spec.process()) else { return };
    let Ok(root) = File::open(root.path()) else { return };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let mut parent: OwnedFd = root.into();
    let Ok(anchor) = parent.try_clone() else { return };
    let mut walked = PathBuf::from("/");
    for part in process.cwd().components() {
        let Component::Normal(name) = part else { continue };
        walked.push(name);
        let open = || openat2(anchor.as_fd(), walked.as_path(), how);
        let next = match open() {
            Err(nix::Error::ENOENT)
                if mkdirat(parent.as_fd(), Path::new(name), Mode::from_bits_truncate(0o755)).is_ok() =>
            {
                if let Some(users) = users {
                    let (uid, gid) = (Uid::from_raw(users.uid(0)), Gid::from_raw(users.gid(0)));
                    let _ =
                        fchownat(parent.as_fd(), Path::new(name), Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW);
                }
                open()
            }
            other => other,
        };
        match next {
            Ok(fd) => parent = fd,
            Err(error) => {
                tracing::debug!("working directory (descriptor {}): {error}", parent.as_raw_fd());
                return;
            }
        }
    }
}
