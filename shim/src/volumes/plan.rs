//! Decides how each mount of a container's specification is made available in the guest, and prepares the mount.

use std::{
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::{Component, Path},
};

use husk_proto::{agent::MountVolumeRequest, volume};
use nix::sys::stat::{SFlag, fstat, major, minor};

use crate::host_view::HostView;
use crate::oci::devices;
use crate::oci::id_mappings::IdMappings;
use crate::oci::spec::Mount;
use crate::volumes::error::VolumeError;
use crate::volumes::host_only::HostOnly;
use crate::volumes::kubelet_paths::DiskEmptyDir;
use crate::volumes::mirror;
use crate::volumes::mirror::{Mirror, Volume};
use crate::volumes::reuse::Part;
use crate::volumes::source::{Flags, Source};
use crate::volumes::staging_dir::CopyContext;
use crate::volumes::{bind, host_only, kubelet_paths, memory_volume};

/// How a mount of the specification is made available in the guest.
#[derive(Debug)]
enum Plan {
    /// The guest makes the mount as specified.
    Keep,
    /// The guest binds the file or directory at this guest path into the container.
    GuestPath(String),
    /// The shim binds this directory or file into the share.
    Bind { source: OwnedFd, directory: bool, id_mappings: Option<IdMappings>, ignores_mount_id: bool },
    /// The shim binds an emptyDir into the share. The guest binds the emptyDir or its subdirectory into the container.
    EmptyDir { volume: DiskEmptyDir, id_mappings: Option<IdMappings> },
    /// The shim mirrors the volume.
    Mirror { source: Volume, id_mappings: Option<IdMappings> },
    /// The guest creates a memory volume.
    Memory(Box<MountVolumeRequest>),
}

/// Volumes that the agent must set up before it creates the container.
#[derive(Debug, Default)]
pub struct GuestVolumes {
    /// Mirrored volumes.
    pub mirrors: Vec<Mirror>,
    /// Memory volumes, and parts of mounts in the share.
    pub memory: Vec<MountVolumeRequest>,
}

/// Properties of the container and its sandbox that the plan depends on.
pub struct PlanContext<'a> {
    /// Bundle directory. Relative sources are relative to this directory.
    pub bundle: &'a Path,
    /// Path of the share on the host.
    pub share: &'a Path,
    /// Recognizes host-only file systems.
    pub host_only: &'a HostOnly,
    /// Resolves the sources.
    pub host: &'a HostView,
    /// The node's sockets to which containers may connect.
    pub host_sockets: &'a [String],
    /// Container id.
    pub container: &'a str,
    /// Whether containerd's CRI created the specification.
    pub kubernetes: bool,
    /// The pod's uid. Empty if the specification does not contain the uid.
    pub pod: &'a str,
}

impl<'a> PlanContext<'a> {
    fn copy(&self) -> CopyContext<'a> {
        CopyContext { host_only: self.host_only, host: self.host }
    }
}

/// Prepares `mount`, which has the index `index` in the specification. Returns the source that the guest must use, or
/// `None` if the guest must use the specification's source.
pub fn prepare_mount(
    mount: &Mount,
    index: usize,
    context: &PlanContext<'_>,
    notes: &mut Vec<String>,
    guest: &mut GuestVolumes,
) -> Result<Option<String>, VolumeError> {
    let number = u32::try_from(index).unwrap_or(u32::MAX);
    match plan(mount, number, context, notes)? {
        Plan::Mirror { source, id_mappings } => {
            guest.mirrors.push(Mirror { source, id_mappings, mount: number });
            Ok(Some(mirror::guest_path(context.container, index)))
        }
        Plan::Memory(request) => {
            let path = volume::guest_path(&request).to_string_lossy().into_owned();
            guest.memory.push(*request);
            Ok(Some(path))
        }
        Plan::Keep => Ok(None),
        Plan::GuestPath(path) => Ok(Some(path)),
        Plan::Bind { source, directory, id_mappings, ignores_mount_id } => {
            let (id_mappings, flags, receives_mounts) =
                (id_mappings.as_ref(), Flags::of(mount), Flags::of(mount).slave);
            let source = Source {
                file: &source,
                directory,
                id_mappings,
                flags,
                ignores_mount_id,
                receives_mounts,
                private: false,
            };
            let part = bind::bind(mount, &source, (context.share, context.container), context.copy(), notes)?;
            Ok(Some(path_of_part(part, (context.container, number), guest)))
        }
        Plan::EmptyDir { volume: DiskEmptyDir { root, subdirectory }, id_mappings } => {
            let (id_mappings, flags, receives_mounts) =
                (id_mappings.as_ref(), Flags::enforced_by_guest(), Flags::of(mount).slave);
            let source = Source {
                file: &root,
                directory: true,
                id_mappings,
                flags,
                ignores_mount_id: false,
                receives_mounts,
                private: true,
            };
            let mut part = bind::bind(mount, &source, (context.share, context.container), context.copy(), notes)?;
            part.below.extend(subdirectory);
            Ok(Some(path_of_part(part, (context.container, number), guest)))
        }
    }
}

/// Returns the path of a part of a mount in the guest. If the part is not the whole mount, the agent must first bind
/// the part.
fn path_of_part(part: Part, (container, number): (&str, u32), guest: &mut GuestVolumes) -> String {
    let request = memory_volume::subdirectory_request(part.name, part.below, (container, number));
    let path = volume::guest_path(&request).to_string_lossy().into_owned();
    if !request.directories.is_empty() {
        guest.memory.push(request);
    }
    path
}

/// Returns the order in which to prepare mounts: writable mounts before read-only ones, volumes before their subPaths,
/// and directories before the directories below them. A mount then finds the mounts that contain its source.
pub fn order(mounts: &[Mount]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..mounts.len()).collect();
    order.sort_by_cached_key(|index| {
        mounts.get(*index).map(|mount| {
            let source = Path::new(mount.source.as_deref().unwrap_or_default());
            (Flags::of(mount).read_only, kubelet_paths::is_sub_path(source), source.components().count())
        })
    });
    order
}

fn plan(mount: &Mount, number: u32, context: &PlanContext<'_>, notes: &mut Vec<String>) -> Result<Plan, VolumeError> {
    let source = mount.source.as_deref().unwrap_or_default();
    let reject = |message: String| {
        Err(VolumeError::Unsupported { mount_source: source.into(), destination: mount.destination.clone(), message })
    };
    let id_mappings = match IdMappings::from_mount(&mount.uid_mappings, &mount.gid_mappings) {
        Ok(id_mappings) => id_mappings,
        Err(error) => return reject(error.to_string()),
    };
    if id_mappings.is_none() && mount.options().iter().any(|option| option == "idmap" || option == "ridmap") {
        return reject("an id-mapped mount (idmap, ridmap) needs uidMappings and gidMappings".into());
    }
    if !mount.is_bind() {
        return match id_mappings {
            Some(_) => reject("only bind mounts can be id-mapped; remove uidMappings and gidMappings".into()),
            None => Ok(Plan::Keep),
        };
    }
    if let Some(option) = mount.options().iter().find(|option| *option == "shared" || *option == "rshared") {
        let message = format!(
            "{option} mounts of the guest cannot propagate to the host; use rslave (HostToContainer) or rprivate (None)"
        );
        return reject(message);
    }
    let path = context.bundle.join(source);
    // If the source is on a host-only file system, use the guest's instance of the file system. The VMM would open
    // files of the host's instance with the VMM's permissions.
    let guest_instance = |path: &Path, kind: &str, notes: &mut Vec<String>| match host_only::guest_path(path) {
        Some(guest) => {
            notes.push(format!("the mount of {} shows the guest's file system instead of the host's", path.display()));
            Ok(Plan::GuestPath(guest.to_string_lossy().into_owned()))
        }
        None => reject(format!(
            "{} is on a host-only file system ({kind}) and cannot be shared with a VM; to get the guest's file \
             system, mount /proc, /sys or /dev; to use a single device, add the device to the container's devices",
            path.display()
        )),
    };
    let is_host_only_path = path.starts_with("/proc") || path.starts_with("/sys") || path == Path::new("/dev");
    // Check only the text of the path, because the path may not exist on the host. Skip a path with `..`, because such
    // a path may lead elsewhere.
    if is_host_only_path && !path.components().any(|part| part == Component::ParentDir) {
        return guest_instance(&path, "proc", notes);
    }
    if context.kubernetes && mount.destination == "/dev/shm" && is_sandbox_shm(&path) {
        return Ok(Plan::GuestPath(husk_proto::GUEST_SHM.into()));
    }
    let host = |step, source_error| VolumeError::Host {
        mount_source: source.into(),
        destination: mount.destination.clone(),
        step,
        source: source_error,
    };
    let fd = context.host.open(&path, true).map_err(|error| host("open the source", error))?;
    let stat = fstat(&fd).map_err(|error| host("stat the source", error.into()))?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    let shareable = kind == SFlag::S_IFDIR || kind == SFlag::S_IFREG;
    // The source's path, with all symlinks resolved.
    let resolved =
        fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|e| host("resolve the source", e))?;
    let on_host_only = |file: &OwnedFd| {
        context.host_only.type_of(file, context.host).map_err(|error| host("stat the file system of the source", error))
    };
    if (shareable || kind == SFlag::S_IFSOCK)
        && let Some(kind) = on_host_only(&fd)?
    {
        return guest_instance(&resolved, kind, notes);
    }
    if kind == SFlag::S_IFDIR {
        let memory =
            memory_volume::request_for(&fd, &path, id_mappings.as_ref(), (context.container, number), context.host);
        let error = |error| VolumeError::Memory {
            mount_source: source.into(),
            destination: mount.destination.clone(),
            source: error,
        };
        if let Some(request) = memory.map_err(error)? {
            return Ok(Plan::Memory(Box::new(request)));
        }
    }
    if shareable {
        let volume = kubelet_paths::disk_empty_dir(&fd, &path, id_mappings.as_ref(), (context.pod, context.host));
        if let Some(volume) = volume.map_err(|error| host("determine the emptyDir of the source", error))? {
            if let Some(kind) = on_host_only(&volume.root)? {
                return guest_instance(&path, kind, notes);
            }
            return Ok(Plan::EmptyDir { volume, id_mappings });
        }
    }
    let ignores_mount_id = kubelet_paths::is_sub_path(&path);
    match kind {
        SFlag::S_IFDIR
            if context.kubernetes
                && Flags::of(mount).read_only
                && mirror::is_mirrored_volume(&resolved, context.pod) =>
        {
            let source =
                Volume::new(&fd, path, context.host).map_err(|error| host("copy the source's mount", error))?;
            Ok(Plan::Mirror { source, id_mappings })
        }
        SFlag::S_IFDIR => Ok(Plan::Bind { source: fd, directory: true, id_mappings, ignores_mount_id }),
        SFlag::S_IFREG => Ok(Plan::Bind { source: fd, directory: false, id_mappings, ignores_mount_id }),
        SFlag::S_IFCHR | SFlag::S_IFBLK => {
            match devices::guest_path(kind == SFlag::S_IFCHR, major(stat.st_rdev), minor(stat.st_rdev)) {
                Ok(path) => Ok(Plan::GuestPath(path.into())),
                Err(message) => reject(message),
            }
        }
        SFlag::S_IFSOCK if husk_config::host_sockets::allow(context.host_sockets, &resolved) => {
            Ok(Plan::Bind { source: fd, directory: false, id_mappings, ignores_mount_id })
        }
        SFlag::S_IFSOCK => reject(format!(
            "a socket of the host cannot be reached from a VM; to allow it, add {} to host_sockets in {}",
            resolved.display(),
            husk_config::DEFAULT_PATH
        )),
        SFlag::S_IFIFO => reject("a fifo of the host cannot be reached from a VM".into()),
        _ => reject("only directories and files can be shared with a VM".into()),
    }
}

/// Returns whether `path` is the shared memory directory that containerd's CRI creates for a pod:
/// `…/sandboxes/<id>/shm`.
fn is_sandbox_shm(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == "shm")
        && path.parent().and_then(Path::parent).and_then(Path::file_name).is_some_and(|name| name == "sandboxes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(source: &str, destination: &str, options: &[&str]) -> Mount {
        Mount {
            destination: destination.into(),
            kind: Some("bind".into()),
            source: Some(source.into()),
            options: Some(options.iter().map(ToString::to_string).collect()),
            ..Mount::default()
        }
    }

    fn plan_for(mount: &Mount) -> Result<Plan, String> {
        plan_allowing(&[], mount)
    }

    fn plan_allowing(host_sockets: &[String], mount: &Mount) -> Result<Plan, String> {
        let host_only = &HostOnly::new([]).unwrap();
        let (bundle, share, host) = (Path::new("/b"), Path::new("/h"), &HostView::own());
        let context = PlanContext {
            bundle,
            share,
            host_only,
            host,
            host_sockets,
            container: "c",
            kubernetes: true,
            pod: "pod-uid",
        };
        plan(mount, 0, &context, &mut Vec::new()).map_err(|error| error.to_string())
    }

    #[test]
    fn plan_uses_proc_sys_dev_and_shm_of_the_guest() {
        for path in ["/proc", "/sys/fs/cgroup", "/dev"] {
            assert!(matches!(plan_for(&mount(path, "/x", &["rbind"])), Ok(Plan::GuestPath(to)) if to == path));
        }
        assert!(matches!(plan_for(&mount("/dev/null", "/x", &["bind"])), Ok(Plan::GuestPath(to)) if to == "/dev/null"));
        let shm = mount("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/a/shm", "/dev/shm", &["rbind"]);
        assert!(matches!(plan_for(&shm), Ok(Plan::GuestPath(to)) if to == husk_proto::GUEST_SHM));
        let tmpfs = Mount { kind: Some("tmpfs".into()), options: None, ..mount("tmpfs", "/tmp", &[]) };
        assert!(matches!(plan_for(&tmpfs), Ok(Plan::Keep)));
    }

    #[test]
    fn order_begins_with_the_mounts_that_contain_others() {
        let subpath = "/var/lib/kubelet/pods/u/volume-subpaths/data/c/0";
        let whole = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~local-volume/data/a/b/c/d";
        let mounts = [
            ("/a", "ro"),
            (subpath, "rw"),
            ("/a/b", "rw"),
            (whole, "rw"),
            ("/a", "rw"),
            ("/a/b/c", "rro"),
            ("/x", "rw"),
        ];
        let mounts = mounts.map(|(source, option)| mount(source, "/x", &["rbind", option]));
        assert_eq!(order(&mounts), [4, 6, 2, 3, 1, 0, 5]);
        assert!(order(&[]).is_empty());
    }

    #[test]
    fn plan_resolves_symlinks_to_host_only_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let of = |target: &str, name: &str| {
            let link = dir.path().join(name);
            std::os::unix::fs::symlink(target, &link).unwrap();
            plan_for(&mount(link.to_str().unwrap(), "/x", &["rbind"]))
        };
        for (target, name) in [("/proc", "a"), ("/proc/sys/kernel", "b"), ("/sys/kernel", "c"), ("/dev", "d")] {
            assert!(matches!(of(target, name), Ok(Plan::GuestPath(to)) if to == target), "{target}");
        }
        for (target, name) in [("/proc/1", "e"), ("/proc/self/status", "f"), ("/proc/self/ns/net", "g")] {
            let error = of(target, name).unwrap_err();
            assert!(error.contains("host-only") && error.contains("/proc"), "{error}");
        }
        let sideways = format!("/proc/..{}", dir.path().display());
        assert!(matches!(plan_for(&mount(&sideways, "/x", &["rbind"])), Ok(Plan::Bind { directory: true, .. })));
        assert!(plan_for(&mount("/sys/../proc/1", "/x", &["rbind"])).is_err());
    }

    #[test]
    fn plan_rejects_paths_of_host_processes_in_proc() {
        for path in ["/proc/1/root", "/proc/self", "/proc/thread-self/attr"] {
            let error = plan_for(&mount(path, "/x", &["rbind"])).unwrap_err();
            assert!(error.contains("host-only"), "{error}");
        }
    }

    #[test]
    fn plan_mirrors_read_only_config_maps_of_the_pod() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("pod-uid/volumes/kubernetes.io~configmap/a");
        fs::create_dir_all(&volume).unwrap();
        let of = |path: &Path, options: &[&str]| plan_for(&mount(path.to_str().unwrap(), "/x", options));
        assert!(matches!(of(&volume, &["rbind", "ro"]), Ok(Plan::Mirror { source, .. }) if source.path() == volume));
        assert!(matches!(of(&volume, &["rbind", "rw"]), Ok(Plan::Bind { directory: true, .. })));
        // The target of this symlink is not a volume.
        let link = volume.with_file_name("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        assert!(matches!(of(&link, &["rbind", "ro"]), Ok(Plan::Bind { directory: true, .. })));
        // This volume belongs to another pod.
        let other = dir.path().join("other-uid/volumes/kubernetes.io~configmap/a");
        fs::create_dir_all(&other).unwrap();
        assert!(matches!(of(&other, &["rbind", "ro"]), Ok(Plan::Bind { directory: true, .. })));
    }

    #[test]
    fn plan_binds_an_allowed_socket() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&socket, &link).unwrap();
        let allowed = [socket.to_str().unwrap().to_owned()];
        // The path without symlinks counts.
        for path in [&socket, &link] {
            let plan = plan_allowing(&allowed, &mount(path.to_str().unwrap(), "/x", &["rbind"]));
            assert!(matches!(plan, Ok(Plan::Bind { directory: false, .. })), "{}", path.display());
        }
        let other = [link.to_str().unwrap().to_owned()];
        assert!(plan_allowing(&other, &mount(link.to_str().unwrap(), "/x", &["rbind"])).is_err());
    }

    #[test]
    fn plan_rejects_sockets_fifos_and_shared_propagation() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for (path, expected) in [(&socket, "to allow it, add /"), (&fifo, "a fifo of the host")] {
            let error = plan_for(&mount(path.to_str().unwrap(), "/x", &["bind"])).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let directory = dir.path().to_str().unwrap();
        for option in ["rshared", "shared", "ridmap"] {
            assert!(plan_for(&mount(directory, "/x", &["rbind", option])).is_err());
        }
        assert!(matches!(plan_for(&mount(directory, "/x", &["rbind"])), Ok(Plan::Bind { directory: true, .. })));
        let error = plan_for(&mount("/nowhere/x", "/x", &["rbind"])).unwrap_err();
        assert_eq!(error, "error mounting \"/nowhere/x\" to rootfs at \"/x\": failed to open the source");
    }
}
