//! The process that makes a template: boots a guest that never runs a pod, and saves it.
//!
//! The process has no daemon's life: a shim starts it, and it ends when the template is made. It runs at the lowest
//! priority, in a cgroup of its own, to which the template's memory is charged.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use husk_config::template::{Class, STORE};
use husk_config::{Config, ConfigError};
use husk_proto::{SHARE_TAG, TEMPLATE_PARAMETER, ports};
use husk_vmm::client::{CallError, Network, SpawnError, SpawnOptions, Vmm, spawn};
use husk_vmm::config::{FdIndex, RateLimit, ShareConfig, Source, VmConfig};
use husk_vmm::control::{BootStep, Call, ExitReason, Notice};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use crate::chain;
use crate::oci::Spec;
use crate::resources::{self, BootSize, BootSizeError};
use crate::sandbox::boot::{SPARE_SLOTS, VSOCK_CID, seccomp_mode};
use crate::sandbox::guest_image::{GuestImages, ImageError};
use crate::sandbox::launch;
use crate::sandbox::template::{INTERFACES, Key, Store, StoreError, class_of, delay, find, is_delayed, memory_sizes};

/// How long the process waits before it boots the guest, so that the pod that has started it can start first.
const DELAY: Duration = Duration::from_secs(2);
/// `oom_score_adj` of the process and of its VM. If memory is short, they are killed before any pod.
const OOM_SCORE_ADJ: &str = "1000";
/// Timeout for each step of the guest's boot. The boot has the lowest priority, and nobody waits for it.
const LIMIT: Duration = Duration::from_secs(600);
/// The cgroup of the process, and of the templates' memory.
const CGROUP: &str = "husk-templates";

/// Why no template was made.
#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("invalid arguments: expected a class as JSON")]
    Class(#[source] serde_json::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Size(#[from] BootSizeError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("failed to {0}")]
    Host(&'static str, #[source] io::Error),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("failed to {0}")]
    Vmm(&'static str, #[source] CallError),
    #[error("the guest ended: {0:?}")]
    Ended(ExitReason),
}

/// Makes the template of the class in `args`, or those of all sizes of memory, and returns the exit code.
pub fn main(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    match build(args.next()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("husk: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn build(class: Option<OsString>) -> Result<(), BuildError> {
    let class = class.map(|class| serde_json::from_str(&class.to_string_lossy()).map_err(BuildError::Class));
    let class: Option<Class> = class.transpose()?;
    let config = launch::config()?;
    let _ = nix::unistd::setsid();
    let in_background = class.is_some();
    enter_cgroup(in_background);
    fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)
        .map_err(|error| BuildError::Host("set oom_score_adj", error))?;
    // While another process makes a template, this one is not made. A later pod of this class wants it again.
    let Some(store) = Store::open(Path::new(STORE))? else { return Ok(()) };
    let classes = match class {
        Some(class) => {
            log_to(&Path::new(STORE).join("log")).map_err(|error| BuildError::Host("open the log", error))?;
            husk_base::sys::process::lower_priority().map_err(|error| BuildError::Host("lower the priority", error))?;
            thread::sleep(DELAY);
            vec![class]
        }
        // An operator waits for the templates.
        None => all_classes(&config)?,
    };
    let images = GuestImages::open(&config)?;
    let max_age = config.template_max_age();
    for class in &classes {
        let key = Key::new(class, &images, &config).map_err(|error| BuildError::Host("examine this program", error))?;
        let waits = in_background && is_delayed(Path::new(STORE), &key);
        if waits || find(Path::new(STORE), &key, max_age)?.is_some() {
            continue;
        }
        store.make_room(max_age, size_of_files(class));
        if let Err(error) = make(&store, class, &key, &config, &images) {
            delay(Path::new(STORE), &key);
            return Err(error);
        }
    }
    Ok(())
}

/// Returns the size of a template's files, rounded up: the kernel, the agent, and 1/64 of the memory for page metadata.
fn size_of_files(class: &Class) -> u64 {
    (64 << 20) + (class.memory_mib << 20) / 32
}

/// Returns the classes of pods that have at most the default number of vCPUs, from the smallest memory.
fn all_classes(config: &Config) -> Result<Vec<Class>, BuildError> {
    let size = resources::boot_size(&Spec::default(), config, u64::MAX)?;
    let sizes = memory_sizes(config).into_iter();
    Ok(sizes.filter_map(|memory_mib| class_of(&BootSize { memory_mib, ..size.clone() }, config, None)).collect())
}

/// Boots the guest, and saves it.
fn make(store: &Store, class: &Class, key: &Key, config: &Config, images: &GuestImages) -> Result<(), BuildError> {
    let partial = store.begin(key, class)?;
    let share = EmptyShare::mount(&partial.empty).map_err(|error| BuildError::Host("mount an empty share", error))?;
    let mut guest = Guest::boot(class, config, images, &share.0)?;
    guest.wait_for(BootStep::AgentReady)?;
    // The guest runs a container. What it touches meanwhile, each guest of the template will touch at its start.
    guest.record_touched()?;
    drop(guest.vmm.connect(ports::TRIAL).map_err(|error| BuildError::Vmm("begin the trial", error))?);
    // The agent waits for some seconds meanwhile. If a guest were younger than a second, KVM would take the time-stamp
    // counter that a restored vCPU gets for an attempt to synchronize the vCPUs, and would ignore it
    // (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c).
    guest.wait_for(BootStep::TemplateReady)?;
    guest.pause()?;
    let files = [partial.state.as_fd(), partial.memory.as_fd()];
    guest.vmm.call(Call::Save { build: key.id }, &files).map_err(|error| BuildError::Vmm("save the VM", error))?;
    drop(share);
    Ok(store.finish(partial, key)?)
}

/// An empty, read-only mount, which the VMM needs as its root directory. Only this process and the VMM see the mount.
/// Dropping it unmounts it here.
struct EmptyShare(PathBuf);

impl EmptyShare {
    fn mount(path: &Path) -> io::Result<Self> {
        let none = None::<&Path>;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
        mount(Some("husk"), path, Some("tmpfs"), flags, Some("size=4k,nr_inodes=1"))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for EmptyShare {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// Moves this process to its cgroup. Without the cgroup, a template's memory is charged to containerd. Best effort.
fn enter_cgroup(in_background: bool) {
    for hierarchy in ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"].map(Path::new) {
        let cgroup = hierarchy.join(CGROUP);
        if !hierarchy.join("cgroup.procs").exists() {
            continue;
        }
        let _ = fs::create_dir(&cgroup);
        if let Err(error) = fs::write(cgroup.join("cgroup.procs"), "0") {
            eprintln!("husk: failed to enter the cgroup {}: {error}", cgroup.display());
        }
        // SCHED_IDLE counts only within a cgroup. The file does not exist without the cpu controller, and before Linux
        // 5.15.
        let _ = fs::write(cgroup.join("cpu.idle"), if in_background { "1" } else { "0" });
    }
}

/// Writes the output of this process and of the VMM to a file.
fn log_to(path: &Path) -> io::Result<()> {
    let log = File::create(path)?;
    Ok(nix::unistd::dup2_stderr(&log)?)
}

/// The guest that becomes the template. It ends when it is dropped, because its control socket is closed.
struct Guest {
    vmm: Vmm,
    /// The VMM's PID.
    pid: u32,
}

impl Guest {
    fn boot(class: &Class, config: &Config, images: &GuestImages, share: &Path) -> Result<Self, BuildError> {
        let host = |what| move |error| BuildError::Host(what, error);
        let kvm = File::options().read(true).write(true).open("/dev/kvm").map_err(host("open /dev/kvm"))?;
        let (console, writer) = io::pipe().map_err(host("create a pipe for the guest's console"))?;
        log_lines(console).map_err(host("start a thread"))?;
        let spawned = spawn(SpawnOptions { network: Network::New, ..SpawnOptions::default() })?;
        let limit = TimeVal::new(i64::try_from(LIMIT.as_secs()).unwrap_or(i64::MAX), 0);
        setsockopt(&spawned.control.as_fd(), sockopt::ReceiveTimeout, &limit)
            .map_err(|errno| BuildError::Host("set the timeout of the control socket", errno.into()))?;
        let (mut vmm, pid) = (Vmm::new(spawned.control), spawned.pid);
        let create = VmConfig {
            id: "template".to_owned(),
            vcpus: class.vcpus,
            max_vcpus: class.max_vcpus,
            memory_mib: class.memory_mib,
            max_memory_mib: class.max_memory_mib,
            huge_mib: class.huge_mib,
            kvm: FdIndex(0),
            source: Source::Kernel { kernel: FdIndex(1), initrd: FdIndex(2) },
            kernel_params: format!("{} {TEMPLATE_PARAMETER}", config.kernel_params).trim().to_owned(),
            console: FdIndex(3),
            share: Some(ShareConfig {
                tag: SHARE_TAG.to_owned(),
                root: share.display().to_string(),
                workers: config.virtio_fs_workers,
                volume_cache_ms: config.volume_cache_ms,
                rate_limit: RateLimit::default(),
            }),
            require_landlock: config.require_landlock,
            vsock_cid: VSOCK_CID,
            vsock_rate_limit: RateLimit::default(),
            net: Vec::new(),
            blk: Vec::new(),
            balloon: config.free_page_reporting,
            spare_slots: SPARE_SLOTS + INTERFACES,
            saveable: true,
            seccomp: seccomp_mode(config),
        };
        let fds = [kvm.as_fd(), images.kernel.as_fd(), images.initrd.as_fd(), writer.as_fd()];
        vmm.call(Call::Create(Box::new(create)), &fds).map_err(|error| BuildError::Vmm("create the VM", error))?;
        vmm.call(Call::Resume, &[]).map_err(|error| BuildError::Vmm("start the VM", error))?;
        Ok(Self { vmm, pid })
    }

    fn pause(&mut self) -> Result<(), BuildError> {
        self.vmm.call(Call::Pause, &[]).map(drop).map_err(|error| BuildError::Vmm("pause the VM", error))
    }

    /// Lets the VMM record which pages the guest touches.
    fn record_touched(&mut self) -> Result<(), BuildError> {
        let copy = memfd_create("husk-template", MFdFlags::MFD_CLOEXEC)
            .map_err(|errno| BuildError::Host("create a file for a copy of the guest's memory", errno.into()))?;
        let pagemap = File::open(format!("/proc/{}/pagemap", self.pid))
            .map_err(|error| BuildError::Host("open the pagemap of the VMM", error))?;
        self.pause()?;
        let files = [copy.as_fd(), pagemap.as_fd()];
        let recorded = self.vmm.call(Call::RecordTouched, &files);
        recorded.map_err(|error| BuildError::Vmm("record what the guest touches", error))?;
        self.vmm.call(Call::Resume, &[]).map(drop).map_err(|error| BuildError::Vmm("let the VM go on", error))
    }

    /// Waits until the guest has reached a step.
    fn wait_for(&mut self, awaited: BootStep) -> Result<(), BuildError> {
        loop {
            match self.vmm.notice().map_err(|error| BuildError::Vmm("wait for the guest's agent", error))? {
                Notice::BootStep { step, .. } if step == awaited => return Ok(()),
                Notice::Exited { reason } => return Err(BuildError::Ended(reason)),
                _ => {}
            }
        }
    }
}

/// Copies the guest's console to the log.
fn log_lines(mut console: PipeReader) -> io::Result<()> {
    let copy = move || drop(io::copy(&mut console, &mut io::stderr()));
    thread::Builder::new().name("console".into()).spawn(copy).map(drop)
}
