//! The ttrpc service `husk.agent.v1.Sandbox`.

use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use husk_proto::agent::{
    AppArmorRequest, AppArmorResponse, Event, EventsRequest, ForgetRequest, ForgetResponse, HugePagesRequest,
    HugePagesResponse, MirrorRequest, MirrorResponse, NetworkRequest, NetworkResponse, ProcessorsRequest,
    ProcessorsResponse, ReleaseRequest, ReleaseResponse, RescanRequest, RescanResponse, SetupRequest, SetupResponse,
    SyncRequest, SyncResponse, VolumeRequest, VolumeResponse,
};
use husk_proto::agent_ttrpc;
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};

use super::network::{Network, NetworkConfig};
use super::volume::Volumes;
use super::{Sandbox, apparmor, apply, hotplug, namespaces, slots};
use crate::error::failed;
use crate::events::Hub;
use crate::users::IdMappings;

/// Implementation of the Sandbox service.
pub struct SandboxService {
    sandbox: Arc<Sandbox>,
    hub: Hub,
    volumes: Arc<Volumes>,
    network: Network,
}

impl SandboxService {
    /// Creates the service for `sandbox`. The Events request streams the events of `hub`.
    pub fn new(sandbox: Arc<Sandbox>, hub: Hub) -> Self {
        Self { sandbox, hub, volumes: Arc::default(), network: Network::default() }
    }
}

#[async_trait]
impl agent_ttrpc::Sandbox for SandboxService {
    async fn setup(&self, _: &TtrpcContext, request: SetupRequest) -> ttrpc::Result<SetupResponse> {
        if request.clock_ns > 0
            && let Err(error) = apply::clock(request.clock_ns)
        {
            tracing::warn!("failed to set the clock: {error}");
        }
        if !request.entropy.is_empty()
            && let Err(error) = husk_base::entropy::credit(&request.entropy)
        {
            tracing::warn!("failed to add entropy: {error}");
        }
        if request.pids_max > 0 {
            crate::cgroup::limit_pids(request.pids_max).map_err(failed("limit the number of tasks"))?;
        }
        self.sandbox.prepare(IdMappings::from_setup(&request)).map_err(failed("prepare the pod's namespaces"))?;
        namespaces::run_in_pod(|| -> io::Result<()> {
            if !request.hostname.is_empty() {
                nix::unistd::sethostname(&request.hostname)?;
            }
            Ok(())
        })
        .map_err(failed("enter the pod's namespaces"))?
        .map_err(failed("set the host name"))?;
        for mount in &request.mounts {
            apply::mount_one(mount).map_err(failed(format!("mount {}", mount.target)))?;
        }
        let SetupRequest { interfaces, routes, neighbours, rules, .. } = request;
        let config = NetworkConfig { interfaces, routes, neighbours, rules };
        self.network.apply(config).await.map_err(failed("set up the network"))?;
        namespaces::run_in_pod(|| -> ttrpc::Result<()> {
            for (name, value) in &request.sysctls {
                apply::sysctl(name, value).map_err(failed(format!("set sysctl {name}")))?;
            }
            Ok(())
        })
        .map_err(failed("enter the pod's namespaces"))??;
        let kernel_release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Ok(SetupResponse {
            kernel_release: kernel_release.trim().to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
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

    async fn rescan(&self, _: &TtrpcContext, request: RescanRequest) -> ttrpc::Result<RescanResponse> {
        let found = tokio::task::spawn_blocking(move || {
            hotplug::set_movable_policy();
            slots::rescan(request.slot)
        })
        .await;
        let found = found.map_err(failed("probe the slot"))?.map_err(failed("probe the slot"))?;
        let (major, minor) = found.unwrap_or_default();
        Ok(RescanResponse { major, minor, ..Default::default() })
    }

    async fn release(&self, _: &TtrpcContext, request: ReleaseRequest) -> ttrpc::Result<ReleaseResponse> {
        let released = tokio::task::spawn_blocking(move || slots::release(request.slot)).await;
        released.map_err(failed("release the slot"))?.map_err(failed("release the slot"))?;
        Ok(ReleaseResponse::new())
    }

    async fn network(&self, _: &TtrpcContext, request: NetworkRequest) -> ttrpc::Result<NetworkResponse> {
        let NetworkRequest { interfaces, routes, neighbours, rules, .. } = request;
        let changed = self.network.apply(NetworkConfig { interfaces, routes, neighbours, rules }).await;
        changed.map_err(failed("set up the network"))?;
        Ok(NetworkResponse::new())
    }

    async fn mirror(&self, _: &TtrpcContext, request: MirrorRequest) -> ttrpc::Result<MirrorResponse> {
        let sandbox = Arc::clone(&self.sandbox);
        let applied = tokio::task::spawn_blocking(move || sandbox.mirrors.apply(&request)).await;
        applied.unwrap_or_else(|error| Err(io::Error::other(error))).map_err(failed("update the mirrored volume"))?;
        Ok(MirrorResponse::new())
    }

    async fn volume(&self, _: &TtrpcContext, request: VolumeRequest) -> ttrpc::Result<VolumeResponse> {
        let volumes = Arc::clone(&self.volumes);
        let provided = tokio::task::spawn_blocking(move || volumes.provide(&request)).await;
        provided.map_err(failed("provide the volume"))?.map_err(failed("provide the volume"))?;
        Ok(VolumeResponse::new())
    }

    async fn app_armor(&self, _: &TtrpcContext, request: AppArmorRequest) -> ttrpc::Result<AppArmorResponse> {
        let loaded = tokio::task::spawn_blocking(move || apparmor::load(&request.policy)).await;
        loaded.map_err(failed("load the AppArmor policy"))?.map_err(failed("load the AppArmor policy"))?;
        Ok(AppArmorResponse::new())
    }

    async fn forget(&self, _: &TtrpcContext, request: ForgetRequest) -> ttrpc::Result<ForgetResponse> {
        let dropped = tokio::task::spawn_blocking(move || hotplug::drop_caches(request.pages)).await;
        dropped.map_err(failed("drop caches"))?.map_err(failed("drop caches"))?;
        Ok(ForgetResponse::new())
    }

    async fn huge_pages(&self, _: &TtrpcContext, request: HugePagesRequest) -> ttrpc::Result<HugePagesResponse> {
        let resized = tokio::task::spawn_blocking(move || hotplug::set_huge_pages(request.count)).await;
        let count =
            resized.map_err(failed("set the number of huge pages"))?.map_err(failed("set the number of huge pages"))?;
        Ok(HugePagesResponse { count, ..Default::default() })
    }

    async fn processors(&self, _: &TtrpcContext, request: ProcessorsRequest) -> ttrpc::Result<ProcessorsResponse> {
        let switched = tokio::task::spawn_blocking(move || hotplug::set_online_cpus(request.count)).await;
        let online = switched
            .map_err(failed("set the number of online CPUs"))?
            .map_err(failed("set the number of online CPUs"))?;
        Ok(ProcessorsResponse { online, ..Default::default() })
    }

    async fn sync(&self, _: &TtrpcContext, _: SyncRequest) -> ttrpc::Result<SyncResponse> {
        let synced = tokio::task::spawn_blocking(nix::unistd::sync).await;
        synced.map_err(failed("sync file systems"))?;
        Ok(SyncResponse::new())
    }
}
