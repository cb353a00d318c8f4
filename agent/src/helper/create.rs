//! Creates a container with libcontainer, up to the point where the container's init waits for Start.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use husk_base::error::chain;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Pid, Uid, fchownat};

use super::executor::HuskExecutor;
use super::protocol::CreateRequest;
use super::tmpfs::{self, Staging};
use super::{devices, error_log};
use crate::id_mappings::IdMappings;
use crate::shared_volumes;

/// Creates the container and returns the PID of its init.
///
/// # Errors
/// Returns the reason, in the wording of runc's errors.
pub fn run(request: &CreateRequest) -> Result<i32, String> {
    let config = request.bundle.join("config.json");
    let mut spec = Spec::load(&config).map_err(|error| chain(&error))?;
    shared_volumes::trigger_automounts(&shared_volumes::of_spec(&spec));
    let id_mappings = spec.linux().as_ref().and_then(IdMappings::from_spec);
    create_working_directory(&spec, id_mappings.as_ref());
    let staging = Staging { dir: &request.bundle, cgroup: &request.cgroup };
    let changed = tmpfs::prepare(&mut spec, &staging, id_mappings.as_ref()).map_err(|(destination, error)| {
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
    let container = built.map_err(|error| match error_log::read_reason() {
        // runc looks up the program before the step that it calls "container init". Therefore runc's message about a
        // failed lookup does not have the prefix "error during container init".
        Some(reason) if reason.starts_with("exec: ") => reason,
        Some(reason) => format!("error during container init: {reason}"),
        None => chain(&error),
    })?;
    let pid = container.pid().ok_or("libcontainer returned no PID for the container")?.as_raw();
    let rules = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let devices_of_spec = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    let rules = rules.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    devices::attach_rules(&request.cgroup, rules, devices_of_spec).map_err(|error| {
        // A container without device rules must not start. Therefore kill its init, which waits for Start.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        format!("error setting cgroup config for procHooks process: failed to restrict devices: {error}")
    })?;
    Ok(pid)
}

/// Creates the working directory if it is missing, as runc does. The image is untrusted. Therefore each path component
/// is resolved inside the rootfs. Best effort.
fn create_working_directory(spec: &Spec, id_mappings: Option<&IdMappings>) {
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
            Err(nix::Error::ENOENT) => {
                if let Err(error) = mkdirat(parent.as_fd(), Path::new(name), Mode::from_bits_truncate(0o755)) {
                    tracing::debug!("failed to create {} for the working directory: {error}", walked.display());
                    return;
                }
                if let Some(id_mappings) = id_mappings {
                    let (uid, gid) = (Uid::from_raw(id_mappings.uid(0)), Gid::from_raw(id_mappings.gid(0)));
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
                tracing::debug!("failed to open {} for the working directory: {error}", walked.display());
                return;
            }
        }
    }
}
