//! Boots a guest: sends requests to the VMM and then to the agent, until the agent accepts containers.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use husk_base::entropy;
use husk_config::template::Class;
use husk_config::{Config, Seccomp};
use husk_proto::agent::{BindDeviceRequest, IdMapping, Mount, SetupRequest, UpdateNetworkRequest};
use husk_proto::{AGENT_PROTOCOL, AUDIT_PREFIX, GUEST_SHM, SHARE_TAG, ports};
use husk_vmm::config::{FdIndex, SeccompMode, ShareConfig, Source, VmConfig};
use husk_vmm::control::{Answer, Call, VcpuPlace};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::error::Elapsed;

use crate::network::Network;
use crate::network::sync::net_config;
use crate::oci;
use crate::oci::IdMappings;
use crate::resources::BootSize;
use crate::resources::growth::Size;
use crate::resources::hugepages;
use crate::resources::rate_limits::RateLimits;
use crate::sandbox::end;
use crate::sandbox::guest_image::GuestImages;
use crate::sandbox::host_sockets::HostSockets;
use crate::sandbox::notices;
use crate::sandbox::notices::Progress;
use crate::sandbox::policy::PodPolicies;
use crate::sandbox::template::{self, Choice, Template};
use crate::sandbox::timeline::Timeline;
use crate::text::bounded;
use crate::vm::agent::{self, Agent, SetupError, timeouts, within};
use crate::vm::console;
use crate::vm::console::LogTail;
use crate::vm::vmm::{VMM_EXIT_TIMEOUT, Vmm, VmmError};

/// Number of spare slots at boot, for hot-plugged disks and interfaces.
pub const SPARE_SLOTS: u8 = 5;
/// The guest's CID. All guests have the same one, because each VMM has its own vsock device.
pub const VSOCK_CID: u32 = 3;
/// Mount option for the size of the pod's `/dev/shm`, as in containerd's CRI.
const SHM_SIZE: &str = "size=65536k";
/// Maximum length of the VMM's text in a log line, in bytes. The VMM is not trusted.
const MAX_REASON: usize = 1024;

/// The part of the guest's configuration that depends on the pod.
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// The Kubernetes pod as `namespace/name`. Empty for a container without a pod.
    pub name: String,
    /// Host name of the sandbox.
    pub hostname: String,
    /// Whether the containers share `/dev/shm`.
    pub shared_memory: bool,
    /// Sysctls of the sandbox's namespaces.
    pub sysctls: HashMap<String, String>,
    /// Maximum number of tasks in all containers together. `None` if unlimited.
    pub pids_max: Option<u64>,
    /// Id mappings of the pod's user namespace. `None` if the pod has no user namespace.
    pub id_mappings: Option<IdMappings>,
    /// Network interfaces, with their addresses, routes, neighbours and rules.
    pub network: Network,
    /// Agent policies.
    pub policies: PodPolicies,
    /// Rate limits of the devices.
    pub rate_limits: RateLimits,
}

/// Everything that a boot needs.
pub struct BootPlan {
    /// The part of the guest's configuration that depends on the pod.
    pub pod: Pod,
    /// The operator's configuration.
    pub config: Config,
    /// The pod's size before its first container, and its maximum size.
    pub boot_size: BootSize,
    /// The VM's size when its guest begins. Its memory can be less than that of `boot_size`. Then the rest is plugged in
    /// before the first container is created.
    pub vm_size: Size,
    /// The VM's maximum size.
    pub max_vm_size: Size,
    /// Directory on the host that the VMM serves to the guest as the share.
    pub share: PathBuf,
    /// The opened device `/dev/kvm`.
    pub kvm: File,
    /// Guest kernel and initrd.
    pub images: GuestImages,
    /// The template from which the guest is made. `None` if the guest boots.
    pub template: Option<Template>,
    /// The class of the template that is to be made when the guest has booted.
    pub wanted: Option<Class>,
}

/// A failure to boot the guest.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// `/dev/kvm` cannot be opened.
    #[error("failed to open the KVM device /dev/kvm")]
    Kvm(#[source] std::io::Error),
    /// The pipe for the console could not be created.
    #[error("failed to create a pipe for the guest's console")]
    Console(#[source] std::io::Error),
    /// A request to the VMM failed.
    #[error("failed to {step}")]
    Vmm {
        /// The operation that failed.
        step: String,
        /// Cause.
        #[source]
        source: VmmError,
    },
    /// The guest ended before the boot was complete.
    #[error("the guest ended during its boot: {reason}{console}")]
    Ended {
        /// Cause.
        reason: String,
        /// Last lines of the guest's console.
        console: String,
    },
    /// The agent was not ready before the timeout.
    #[error("the guest's agent was not ready after {secs} s{console}")]
    Timeout {
        /// Timeout in seconds.
        secs: u64,
        /// Last lines of the guest's console.
        console: String,
    },
    /// The connection to the agent cannot be registered with the async runtime.
    #[error("failed to register the connection to the agent with the async runtime")]
    Connect(#[source] std::io::Error),
    /// The agent could not set up the sandbox.
    #[error("failed to set up the sandbox in the guest")]
    Setup(#[source] SetupError),
    /// The agent could not configure the pod's network.
    #[error("failed to configure the pod's network in the guest")]
    Network(#[source] ttrpc::Error),
}

/// Returns what the configuration says about system calls that a filter does not allow.
pub fn seccomp_mode(config: &Config) -> SeccompMode {
    match config.seccomp {
        Seccomp::Enforce => SeccompMode::Enforce,
        Seccomp::Log => SeccompMode::Log,
    }
}

impl BootPlan {
    /// Returns what happens when a process makes a system call that its filter does not allow.
    pub fn seccomp(&self) -> SeccompMode {
        seccomp_mode(&self.config)
    }

    /// Returns which sockets of the node the pod may use.
    pub fn host_sockets(&self) -> HostSockets {
        let Pod { name, id_mappings, .. } = &self.pod;
        HostSockets::new(name.clone(), self.config.host_sockets.clone(), id_mappings.clone())
    }

    /// Opens `/dev/kvm` and returns the plan.
    ///
    /// # Errors
    /// Fails with [`BootError::Kvm`] if `/dev/kvm` cannot be opened.
    pub fn new(
        pod: Pod,
        config: Config,
        images: GuestImages,
        boot_size: BootSize,
        share: PathBuf,
    ) -> Result<Self, BootError> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").map_err(BootError::Kvm)?;
        let wish = template::Wish { pod: &pod.name, interfaces: pod.network.taps.len(), size: &boot_size };
        let (vm_size, max_vm_size, template, wanted) = match template::choose(wish, &images, &config) {
            Choice::Template(template, class) => {
                let max = Size { vcpus: class.max_vcpus, memory_mib: class.max_memory_mib };
                (Size { vcpus: class.vcpus, memory_mib: class.memory_mib }, max, Some(template), None)
            }
            Choice::Boot { wanted } => (boot_size.growth.boot, boot_size.growth.max, None, wanted),
        };
        Ok(Self { pod, config, boot_size, vm_size, max_vm_size, share, kvm, images, template, wanted })
    }
}

/// Boots the guest and connects to its agent.
///
/// # Errors
/// Fails with a [`BootError`]. If the guest ended or the boot timed out, the error contains the console's last lines.
pub async fn boot(
    plan: BootPlan,
    vmm: &Vmm,
    progress: &mut watch::Receiver<Progress>,
    timeline: &Arc<Timeline>,
    tail: &LogTail,
) -> Result<Agent, BootError> {
    let limit = Duration::from_secs(plan.config.start_timeout_secs.max(1));
    let (console_out, console_in) = pipe_pair().map_err(BootError::Console)?;
    log_lines(console_out, "guest", tail.clone());
    let result = tokio::time::timeout(limit, async {
        let goes_on = create(&plan, vmm, console_in).await?;
        if goes_on {
            timeline.mark("template restored");
        } else {
            let state = progress.wait_for(|p| p.ready || p.ended()).await.map(|p| p.clone()).unwrap_or_default();
            if !state.ready {
                return Err(BootError::Ended { reason: String::new(), console: String::new() });
            }
        }
        connect(&plan, vmm, timeline, limit).await
    })
    .await;
    if let Some(Template { identity, .. }) = &plan.template
        && guest_failed(&result, progress)
        && !vmm.is_killed()
    {
        template::strike(identity.clone()).await;
    }
    match result {
        Ok(Ok(agent)) => {
            log_agent_lines(vmm.clone());
            Ok(agent)
        }
        Ok(Err(error)) => {
            // If the guest has ended, return `BootError::Ended` instead of `error`, because `error` is only a
            // consequence. First kill the VMM and wait until the VMM has ended. Only then is the console's output
            // complete.
            let ended = matches!(error, BootError::Ended { .. })
                || matches!(error, BootError::Vmm { source: VmmError::Gone, .. });
            if ended || progress.borrow().ended() {
                vmm.kill();
                let reason = match vmm.wait_exit_or_give_up().await {
                    Some(status) => notices::end_reason(progress, status, None).await,
                    None => end::stuck(&error.to_string(), vmm.timeout(VMM_EXIT_TIMEOUT)),
                };
                return Err(BootError::Ended { reason, console: console_suffix(tail) });
            }
            Err(error)
        }
        Err(_) => {
            log_vcpus(vmm).await;
            Err(BootError::Timeout { secs: limit.as_secs(), console: console_suffix(tail) })
        }
    }
}

/// Returns whether the guest has failed. An error that the agent or the VMM reports is usually the pod's.
fn guest_failed(result: &Result<Result<Agent, BootError>, Elapsed>, progress: &watch::Receiver<Progress>) -> bool {
    match result {
        Ok(Ok(_)) => false,
        Err(_) | Ok(Err(BootError::Ended { .. })) => true,
        Ok(Err(BootError::Vmm { source: VmmError::Gone | VmmError::Timeout { .. }, .. })) => true,
        Ok(Err(BootError::Setup(SetupError::Agent(error)) | BootError::Network(error))) => {
            agent::is_timeout(error) || agent::is_connection_error(error) || agent::is_template_error(error)
        }
        Ok(Err(_)) => progress.borrow().ended(),
    }
}

/// Logs where the vCPUs of a guest that does not answer are. An address in the kernel can be looked up with
/// `addr2line --exe vmlinux`.
pub(crate) async fn log_vcpus(vmm: &Vmm) {
    match vmm.call(Call::Inspect, &[]).await {
        Ok(Answer::Inspected { vcpus }) => {
            let vcpus: Vec<String> = vcpus.iter().enumerate().map(|(id, place)| describe_place(id, *place)).collect();
            tracing::warn!(vcpus = vcpus.join(", "), "where the guest is");
        }
        Ok(other) => tracing::warn!(?other, "the VMM did not say where the guest is"),
        Err(error) => tracing::warn!(error = crate::chain(&error), "the VMM did not say where the guest is"),
    }
}

fn describe_place(id: usize, place: Option<VcpuPlace>) -> String {
    match place {
        Some(VcpuPlace { address, interrupts }) => {
            let interrupts = if interrupts { "enabled" } else { "disabled" };
            format!("vCPU {id} at {address:#x} with interrupts {interrupts}")
        }
        None => format!("vCPU {id} cannot be stopped"),
    }
}

/// Returns the kernel parameters of the configuration and of the pod.
fn kernel_params(plan: &BootPlan) -> String {
    let params = format!("{} {}", plan.config.kernel_params, plan.boot_size.kernel_params);
    #[cfg(feature = "failpoints")]
    let params = match husk_base::failpoint::rule() {
        rule if rule.is_empty() => params,
        rule => format!("{params} {}={rule}", husk_base::failpoint::PARAMETER),
    };
    params.trim().to_owned()
}

/// Tells the VMM to create and start the VM. Returns whether the guest goes on from a template. If not, it boots.
async fn create(plan: &BootPlan, vmm: &Vmm, console: OwnedFd) -> Result<bool, BootError> {
    let huge_mib = hugepages::pool_mib();
    let mut fds = vec![plan.kvm.as_fd(), plan.images.kernel.as_fd(), plan.images.initrd.as_fd(), console.as_fd()];
    let (kernel, initrd) = (FdIndex(1), FdIndex(2));
    let (source, net, spare_slots) = match &plan.template {
        Some(Template { state, memory, identity }) => {
            fds.extend([state.as_fd(), memory.as_fd()]);
            let (state, memory) = (FdIndex(4), FdIndex(5));
            let source = Source::Saved { state, memory, build: identity.key.id, kernel, initrd };
            (source, Vec::new(), SPARE_SLOTS + template::INTERFACES)
        }
        None => {
            let net: Vec<_> = plan.pod.network.taps.iter().map(|tap| net_config(tap, &mut fds)).collect();
            net.iter().for_each(|net| vmm.allow_vhost(net));
            (Source::Kernel { kernel, initrd }, net, SPARE_SLOTS)
        }
    };
    let config = VmConfig {
        id: plan.pod.id.clone(),
        vcpus: plan.vm_size.vcpus,
        max_vcpus: plan.max_vm_size.vcpus,
        memory_mib: plan.vm_size.memory_mib,
        max_memory_mib: plan.max_vm_size.memory_mib,
        huge_mib,
        kvm: FdIndex(0),
        source,
        kernel_params: kernel_params(plan),
        console: FdIndex(3),
        share: Some(ShareConfig {
            tag: SHARE_TAG.to_owned(),
            root: plan.share.display().to_string(),
            workers: plan.config.virtio_fs_workers,
            volume_cache_ms: plan.config.volume_cache_ms,
            rate_limit: plan.pod.rate_limits.virtio_fs,
        }),
        require_landlock: plan.config.require_landlock,
        vsock_cid: VSOCK_CID,
        vsock_rate_limit: plan.pod.rate_limits.vsock,
        net,
        blk: Vec::new(),
        balloon: plan.config.free_page_reporting,
        spare_slots,
        saveable: false,
        seccomp: plan.seccomp(),
    };
    let files = format!("from kernel {} and initrd {}", plan.config.kernel.display(), plan.config.initrd.display());
    let error = |step: String| move |source| BootError::Vmm { step, source };
    let create = Call::Create(Box::new(config));
    let created = vmm.call(create, &fds).await.map_err(error(format!("create the VM {files}")))?;
    let Answer::Created { unrestricted, refused } = created else {
        return Err(error("create the VM".into())(VmmError::Unexpected));
    };
    if let Some(unrestricted) = unrestricted {
        tracing::warn!(unrestricted, "the VMM runs without some Landlock restrictions");
    }
    if let (Some(reason), Some(template)) = (&refused, &plan.template) {
        tracing::warn!(reason = bounded(reason, MAX_REASON), "the guest boots, because its template cannot be used");
        template::discard(template.identity.clone()).await;
    }
    if plan.seccomp() == SeccompMode::Log {
        tracing::warn!(
            "the seccomp filters of the VMM and the shim only log the system calls that they do not allow, because the \
             configuration has seccomp = \"log\""
        );
    }
    vmm.call(Call::Resume, &[]).await.map_err(error("start the VM".into()))?;
    Ok(plan.template.is_some() && refused.is_none())
}

/// Plugs in the interfaces of a guest that was made from a template.
async fn plug_interfaces(plan: &BootPlan, vmm: &Vmm, agent: &Agent) -> Result<(), BootError> {
    for tap in &plan.pod.network.taps {
        let mut fds = Vec::new();
        let config = net_config(tap, &mut fds);
        vmm.allow_vhost(&config);
        let step = || "plug in a network interface".to_owned();
        let attached = vmm.call(Call::AttachNet(config), &fds).await;
        let attached = attached.map_err(|source| BootError::Vmm { step: step(), source })?;
        let Answer::Attached { slot } = attached else {
            return Err(BootError::Vmm { step: step(), source: VmmError::Unexpected });
        };
        let request = BindDeviceRequest { slot, ..Default::default() };
        agent.sandbox.bind_device(within(timeouts::SLOW), &request).await.map_err(BootError::Network)?;
    }
    Ok(())
}

/// Connects to the agent and sets up the sandbox.
async fn connect(plan: &BootPlan, vmm: &Vmm, timeline: &Timeline, limit: Duration) -> Result<Agent, BootError> {
    let stream = vmm
        .connect(ports::AGENT)
        .await
        .map_err(|source| BootError::Vmm { step: "connect to the agent".into(), source })?;
    timeline.mark("agent connected");
    let agent = Agent::new(stream).map_err(BootError::Connect)?;
    if plan.template.is_some() {
        plug_interfaces(plan, vmm, &agent).await?;
        timeline.mark("interfaces plugged in");
    }
    let entropy = entropy::bytes::<64>().map(Vec::from).unwrap_or_default();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let pod = &plan.pod;
    let (uids, gids) = pod.id_mappings.as_ref().map(IdMappings::mappings).unwrap_or_default();
    // As under runc, the pod's root user owns `/dev/shm`.
    let owner = pod.id_mappings.as_ref().and_then(|id_mappings| Some((id_mappings.uid(0)?, id_mappings.gid(0)?)));
    let owner = owner.map(|(uid, gid)| [format!("uid={uid}"), format!("gid={gid}")]).into_iter().flatten();
    let shared_memory = Mount {
        fs_type: "tmpfs".to_owned(),
        source: "shm".to_owned(),
        target: GUEST_SHM.to_owned(),
        options: ["nosuid", "nodev", "noexec", "mode=1777", SHM_SIZE]
            .map(str::to_owned)
            .into_iter()
            .chain(owner)
            .collect(),
        ..Default::default()
    };
    let network = &pod.network.config;
    // A configuration that does not fit in one message follows after Setup.
    let fits = husk_proto::network::parts(network).len() == 1;
    let first = if fits { network.clone() } else { UpdateNetworkRequest::new() };
    let request = SetupRequest {
        sandbox_id: pod.id.clone(),
        hostname: pod.hostname.clone(),
        clock_ns: i64::try_from(now.as_nanos()).unwrap_or(0),
        entropy,
        mounts: pod.shared_memory.then_some(shared_memory).into_iter().collect(),
        interfaces: network.interfaces.clone(),
        routes: first.routes,
        neighbours: first.neighbours,
        rules: first.rules,
        sysctls: pod.sysctls.clone(),
        pids_max: pod.pids_max.unwrap_or(0),
        uid_mappings: uids.iter().map(message).collect(),
        gid_mappings: gids.iter().map(message).collect(),
        node_policy: pod.policies.node.clone(),
        pod_policy: pod.policies.pod.clone(),
        protocol_version: AGENT_PROTOCOL,
        relays_host_sockets: !plan.config.host_sockets.is_empty(),
        ..Default::default()
    };
    let kernel = agent.setup(&request, limit).await.map_err(BootError::Setup)?;
    if !fits {
        agent.update_network(network, limit).await.map_err(BootError::Network)?;
    }
    timeline.mark("sandbox set up");
    tracing::debug!(kernel, "guest is up");
    Ok(agent)
}

fn message(mapping: &oci::IdMapping) -> IdMapping {
    let oci::IdMapping { container, host, size } = *mapping;
    IdMapping { container, host, size, ..Default::default() }
}

fn console_suffix(tail: &LogTail) -> String {
    match tail.console_tail() {
        lines if lines.is_empty() => "; the guest's console is empty".to_owned(),
        lines => format!("; the last lines of the guest's console:\n{lines}"),
    }
}

/// Copies the lines from a pipe to the log and to `tail`.
pub fn log_lines(pipe: OwnedFd, from: &'static str, tail: LogTail) {
    let pipe = match pipe::Receiver::from_owned_fd(pipe) {
        Ok(pipe) => pipe,
        Err(error) => return tracing::warn!(%error, from, "failed to read the log pipe"),
    };
    tokio::spawn(console::read_lines(pipe, move |line| {
        #[cfg(feature = "failpoints")]
        husk_base::failpoint::note_guest_line(&line);
        match from {
            "vmm" => tracing::info!(from, "{line}"),
            _ => tracing::debug!(from, "{line}"),
        }
        tail.push(line);
    }));
}

fn log_agent_lines(vmm: Vmm) {
    let task = async move {
        let stream = vmm.connect(ports::LOG).await.map_err(|e| crate::chain(&e)).and_then(|stream| {
            stream
                .set_nonblocking(true)
                .and_then(|()| tokio::net::UnixStream::from_std(stream))
                .map_err(|e| e.to_string())
        });
        match stream {
            Ok(stream) => console::read_lines(stream, |line| log_agent_line(&line)).await,
            Err(error) => tracing::debug!(error, "failed to read the agent's log"),
        }
    };
    tokio::spawn(task);
}

fn log_agent_line(line: &str) {
    // A line begins with a time and a level.
    match line.splitn(3, ' ').nth(2).filter(|message| message.starts_with(AUDIT_PREFIX)) {
        Some(message) => tracing::warn!(from = "agent", "{message}"),
        None => tracing::debug!(from = "agent", "{line}"),
    }
}

/// Returns the read end and the write end of a new pipe.
///
/// # Errors
/// Fails if the pipe cannot be created, for example because the fd limit is reached.
pub fn pipe_pair() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (out, input) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    // tokio requires a non-blocking read end.
    nix::fcntl::fcntl(&out, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    Ok((out, input))
}
