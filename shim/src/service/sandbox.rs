//! Serves containerd's Sandbox API (containerd.runtime.sandbox.v1). containerd's sandbox controller plugin calls this
//! API.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use husk_proto::containerd::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
    SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse, ShutdownSandboxRequest,
    ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
    WaitSandboxRequest, WaitSandboxResponse,
};
use husk_proto::containerd::sandbox_async::{Sandbox, create_sandbox};
use husk_proto::metrics;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use ttrpc::r#async::{Service, TtrpcContext};

use crate::blocking;
use crate::container::Shim;
use crate::container::escalation::VM_END_TIMEOUT;
use crate::error::ServiceError;
use crate::events::timestamp;
use crate::pod;
use crate::resources::cgroup::CgroupLocation;
use crate::resources::cgroup_v1_metrics;

/// CRI's names for the states of a sandbox. containerd passes these names to CRI clients unchanged.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// Returns the Sandbox service.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    create_sandbox(Arc::new(Handler { shim: Arc::clone(shim) }))
}

struct Handler {
    shim: Arc<Shim>,
}

impl Handler {
    /// Checks that the request names this shim's only sandbox.
    fn check(&self, id: &str) -> Result<(), ServiceError> {
        if id == self.shim.sandbox.id { Ok(()) } else { Err(ServiceError::NoSandbox(id.to_owned())) }
    }
}

#[async_trait]
impl Sandbox for Handler {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let options = request.options.as_ref().filter(|options| !options.type_url.is_empty());
        let mut config = pod::config(options).map_err(|e| ServiceError::Invalid(crate::chain(&e)))?;
        config.annotations.extend(request.annotations);
        self.shim.create_sandbox(&config, &request.netns_path).await?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        self.check(&request.sandbox_id)?;
        if !self.shim.sandbox_state.is_created() {
            return Err(ServiceError::NotCreated.into());
        }
        self.shim.sandbox.ready().await.map_err(|error| ServiceError::failed(error.to_string()))?;
        self.shim.sandbox.timeline.mark("sandbox started");
        self.shim.sandbox.timeline.save();
        Ok(StartSandboxResponse {
            pid: self.shim.sandbox.pid(),
            created_at: Some(timestamp(self.shim.sandbox_state.created_at())).into(),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.check(&request.sandbox_id)?;
        let mut response = PlatformResponse::new();
        let platform = response.platform.mut_or_insert_default();
        // The values are Go's GOOS and GOARCH. Husk supports only x86_64.
        platform.os = "linux".to_owned();
        platform.architecture = "amd64".to_owned();
        Ok(response)
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> ttrpc::Result<StopSandboxResponse> {
        self.check(&request.sandbox_id)?;
        self.shim.stop_sandbox().await;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> ttrpc::Result<WaitSandboxResponse> {
        self.check(&request.sandbox_id)?;
        let exit = self.shim.sandbox_state.wait().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        self.check(&request.sandbox_id)?;
        let Shim { sandbox, sandbox_state, .. } = &*self.shim;
        let exit = sandbox_state.exit();
        let ready = exit.is_none() && sandbox.agent().is_some();
        let mut info = HashMap::new();
        if request.verbose {
            let text = json!({
                "pid": sandbox.pid(),
                "shimPid": std::process::id(),
                "runtimeSpec": sandbox_state.spec(),
                "vmEndReason": sandbox.known_end_reason().as_deref(),
            });
            info.insert("info".to_owned(), text.to_string());
        }
        Ok(SandboxStatusResponse {
            sandbox_id: sandbox.id.clone(),
            pid: if exit.is_none() { sandbox.pid() } else { 0 },
            state: if ready { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: Some(timestamp(sandbox_state.created_at())).into(),
            exited_at: exit.map(|exit| timestamp(exit.at)).into(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> ttrpc::Result<PingResponse> {
        self.check(&request.sandbox_id)?;
        if let Some(reason) = self.shim.sandbox.end_reason().await {
            return Err(ServiceError::Gone(reason).into());
        }
        if self.shim.sandbox.is_dead() {
            return Err(ServiceError::NotReady.into());
        }
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.check(&request.sandbox_id)?;
        self.shim.stop_sandbox().await;
        self.shim.finish_by_request(self.shim.sandbox.timeout(VM_END_TIMEOUT)).await;
        Ok(ShutdownSandboxResponse::new())
    }

    /// Returns the resource usage of the sandbox's cgroup on the host.
    ///
    /// This cgroup contains the VMM and the shim. Therefore, `pids` counts the threads of the VMM and the shim, not the
    /// guest's processes.
    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        self.check(&request.sandbox_id)?;
        let cgroup =
            self.shim.sandbox.cgroup().map(|cgroup| cgroup.location().clone()).ok_or(ServiceError::NoMetrics)?;
        let read = blocking::spawn(move || match &cgroup {
            CgroupLocation::V2(path) => metrics::read(path),
            CgroupLocation::V1(_) => cgroup_v1_metrics::read(&cgroup),
        })
        .await;
        let value = read.map_err(ServiceError::failed)?.write_to_bytes();
        let value = value.map_err(ServiceError::failed)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id.clone_from(&self.shim.sandbox.id);
        metric.timestamp = Some(timestamp(std::time::SystemTime::now())).into();
        metric.data = Some(Any { type_url: metrics::TYPE_URL.to_owned(), value, ..Default::default() }).into();
        Ok(response)
    }
}
