//! The ttrpc service `husk.agent.v1.Sandbox`.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use husk_proto::agent::{
    AdjustClockRequest, AdjustClockResponse, BindDeviceRequest, BindDeviceResponse, DropCachesRequest,
    DropCachesResponse, Event, EventsRequest, LoadAppArmorRequest, LoadAppArmorResponse, MountVolumeRequest,
    MountVolumeResponse, SetHugePagesRequest, SetHugePagesResponse, SetOnlineVcpusRequest, SetOnlineVcpusResponse,
    SetupRequest, SetupResponse, SyncRequest, SyncResponse, UnbindDeviceRequest, UnbindDeviceResponse,
    UpdateMirrorRequest, UpdateMirrorResponse, UpdateNetworkRequest, UpdateNetworkResponse,
};
use husk_proto::{AGENT_PROTOCOL, agent_ttrpc, sysctls};
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use super::network::{Network, NetworkConfig};
use super::volume::Volumes;
use super::{Sandbox, apparmor, clock, hotplug, identity, namespaces, setup, share, slots};
use crate::error::{ServiceError, failed};
use crate::events::EventHub;
use crate::host_sockets;
use crate::id_mappings::IdMappings;
use crate::io::streams::Streams;

/// Implementation of the Sandbox service.
pub struct SandboxService {
    sandbox: Arc<Sandbox>,
    hub: EventHub,
    streams: Streams,
    volumes: Arc<Volumes>,
    network: Network,
    /// Whether this guest was made from a template. Setup then mounts the share.
    from_template: bool,
}

impl SandboxService {
    /// Creates the service for `sandbox`. The Events request streams the events of `hub`. The connections to sockets of
    /// the node use `streams`. `from_template` says whether the guest is made from a template.
    pub fn new(sandbox: Arc<Sandbox>, hub: EventHub, streams: Streams, from_template: bool) -> Self {
        Self { sandbox, hub, streams, volumes: Arc::default(), network: Network::default(), from_template }
    }
}

/// Checks the shim's version of the protocol.
fn check_protocol(version: u32) -> Result<(), ServiceError> {
    if version == AGENT_PROTOCOL {
        return Ok(());
    }
    Err(ServiceError::FailedPrecondition(format!(
        "the shim has version {version} of the agent's protocol, and the guest's agent has version {AGENT_PROTOCOL}: \
         install the shim and the initrd from the same release"
    )))
}

#[async_trait]
impl agent_ttrpc::Sandbox for SandboxService {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        check_protocol(request.protocol_version)?;
        // Setup sets the policies first, so that they are in force even if a later step fails.
        self.sandbox.policy.accept(&request.node_policy, &request.pod_policy)?;
        if request.clock_ns > 0
            && let Err(error) = clock::set(request.clock_ns)
        {
            tracing::warn!("failed to set the clock: {error}");
        }
        if self.from_template {
            let entropy = request.entropy.clone();
            let own = tokio::task::spawn_blocking(move || -> Result<(), ServiceError> {
                identity::renew(&entropy).map_err(failed("renew the guest's random numbers"))?;
                share::mount().map_err(failed("mount the share"))
            });
            let own = own.await.map_err(|error| ServiceError::Template(error.into()))?;
            own.map_err(|error| ServiceError::Template(error.into()))?;
        } else if !request.entropy.is_empty()
            && let Err(error) = husk_base::entropy::credit(&request.entropy)
        {
            tracing::warn!("failed to add entropy: {error}");
        }
        if request.pids_max > 0 {
            crate::cgroup::limit_pids(request.pids_max).map_err(failed("limit the number of processes and threads"))?;
        }
        let id_mappings = IdMappings::from_setup(&request);
        for name in request.sysctls.keys() {
            sysctls::check(name, id_mappings.is_some())
                .map_err(|error| ServiceError::InvalidArgument(error.to_string()))?;
        }
        self.sandbox.prepare(id_mappings).map_err(failed("prepare the pod's namespaces"))?;
        namespaces::run_in_pod(|| -> io::Result<()> {
            if !request.hostname.is_empty() {
                nix::unistd::sethostname(&request.hostname)?;
            }
            Ok(())
        })
        .map_err(failed("enter the pod's namespaces"))?
        .map_err(failed("set the host name"))?;
        for mount in &request.mounts {
            setup::mount(mount).map_err(failed(format!("mount {}", mount.target)))?;
        }
        let relays_host_sockets = request.relays_host_sockets;
        let SetupRequest { interfaces, routes, neighbours, rules, .. } = request;
        let config = NetworkConfig { interfaces, routes, neighbours, rules };
        self.network.apply(config).await.map_err(failed("set up the network"))?;
        namespaces::run_in_pod(|| -> ttrpc::Result<()> {
            for (name, value) in &request.sysctls {
                setup::set_sysctl(name, value).map_err(failed(format!("set sysctl {name}")))?;
            }
            Ok(())
        })
        .map_err(failed("enter the pod's namespaces"))??;
        if relays_host_sockets {
            host_sockets::start(self.hub.clone(), self.streams.clone());
        }
        let kernel_release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(SetupResponse {
            kernel_release: kernel_release.trim().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol_version: AGENT_PROTOCOL,
            ..Default::default()
        })
    }

    async fn events(&self, _: &TtrpcContext, _: EventsRequest, to: ServerStreamSender<Event>) -> ttrpc::Result<()> {
        let mut events = self.hub.subscribe();
        while let Some(event) = events.recv().await {
            to.send(&event).await?;
        }
        Ok(())
    }

    async fn bind_device(&self, _: &TtrpcContext, request: BindDeviceRequest) -> ttrpc::Result<BindDeviceResponse> {
        let found = tokio::task::spawn_blocking(move || {
            hotplug::set_movable_policy();
            slots::bind_device(request.slot)
        })
        .await;
        let found =
            found.map_err(failed("bind the device of the slot"))?.map_err(failed("bind the device of the slot"))?;
        let (major, minor) = found.unwrap_or_default();
        Ok(BindDeviceResponse { major, minor, ..Default::default() })
    }

    async fn unbind_device(
        &self,
        _: &TtrpcContext,
        request: UnbindDeviceRequest,
    ) -> ttrpc::Result<UnbindDeviceResponse> {
        let unbound = tokio::task::spawn_blocking(move || slots::unbind_device(request.slot)).await;
        unbound.map_err(failed("unbind the device of the slot"))?.map_err(failed("unbind the device of the slot"))?;
        Ok(UnbindDeviceResponse::new())
    }

    async fn update_network(
        &self,
        _: &TtrpcContext,
        request: UpdateNetworkRequest,
    ) -> ttrpc::Result<UpdateNetworkResponse> {
        self.network.update(request).await.map_err(failed("update the network"))?;
        Ok(UpdateNetworkResponse::new())
    }

    async fn update_mirror(
        &self,
        _: &TtrpcContext,
        request: UpdateMirrorRequest,
    ) -> ttrpc::Result<UpdateMirrorResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let applied = tokio::task::spawn_blocking(move || sandbox.mirrors.apply(&request)).await;
        applied.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed("update the mirrored volume"))?;
        Ok(UpdateMirrorResponse::new())
    }

    async fn mount_volume(&self, _: &TtrpcContext, request: MountVolumeRequest) -> ttrpc::Result<MountVolumeResponse> {
        let volumes = Arc::clone(&self.volumes);
        let mounted = tokio::task::spawn_blocking(move || volumes.mount(&request)).await;
        mounted.map_err(failed("mount the volume"))?.map_err(failed("mount the volume"))?;
        Ok(MountVolumeResponse::new())
    }

    async fn load_app_armor(
        &self,
        _: &TtrpcContext,
        request: LoadAppArmorRequest,
    ) -> ttrpc::Result<LoadAppArmorResponse> {
        let loaded = tokio::task::spawn_blocking(move || apparmor::load(&request.policy)).await;
        loaded.map_err(failed("load the AppArmor policy"))?.map_err(failed("load the AppArmor policy"))?;
        Ok(LoadAppArmorResponse::new())
    }

    async fn drop_caches(&self, _: &TtrpcContext, request: DropCachesRequest) -> ttrpc::Result<DropCachesResponse> {
        let dropped = tokio::task::spawn_blocking(move || hotplug::drop_caches(request.page_cache)).await;
        dropped.map_err(failed("drop caches"))?.map_err(failed("drop caches"))?;
        Ok(DropCachesResponse::new())
    }

    async fn set_huge_pages(
        &self,
        _: &TtrpcContext,
        request: SetHugePagesRequest,
    ) -> ttrpc::Result<SetHugePagesResponse> {
        let resized = tokio::task::spawn_blocking(move || hotplug::set_huge_pages(request.count)).await;
        let count =
            resized.map_err(failed("set the number of huge pages"))?.map_err(failed("set the number of huge pages"))?;
        Ok(SetHugePagesResponse { count, ..Default::default() })
    }

    async fn set_online_vcpus(
        &self,
        _: &TtrpcContext,
        request: SetOnlineVcpusRequest,
    ) -> ttrpc::Result<SetOnlineVcpusResponse> {
        let switched = tokio::task::spawn_blocking(move || hotplug::set_online_cpus(request.count)).await;
        let online = switched
            .map_err(failed("set the number of online CPUs"))?
            .map_err(failed("set the number of online CPUs"))?;
        Ok(SetOnlineVcpusResponse { online, ..Default::default() })
    }

    async fn sync(&self, _: &TtrpcContext, _: SyncRequest) -> ttrpc::Result<SyncResponse> {
        let synced = tokio::task::spawn_blocking(nix::unistd::sync).await;
        synced.map_err(failed("sync file systems"))?;
        Ok(SyncResponse::new())
    }

    async fn adjust_clock(&self, _: &TtrpcContext, request: AdjustClockRequest) -> ttrpc::Result<AdjustClockResponse> {
        let clock_ns = clock::adjust(request.offset_ns).map_err(failed("correct the clock"))?;
        Ok(AdjustClockResponse { clock_ns, ..Default::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_protocol_names_both_versions() {
        check_protocol(AGENT_PROTOCOL).unwrap();
        for other in [0, AGENT_PROTOCOL + 1] {
            let error = check_protocol(other).unwrap_err().to_string();
            assert!(
                error.contains(&format!("version {other} ")) && error.contains(&AGENT_PROTOCOL.to_string()),
                "{error}"
            );
        }
    }
}
