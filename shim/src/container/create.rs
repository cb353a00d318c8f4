//! Handles Create: prepares the bundle while the guest boots, then tells the agent to create the container.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use husk_base::failpoint;
use husk_config::BaseTimeout;
use husk_proto::CREATE_OPTIONS_TYPE_URL;
use husk_proto::agent::CreateOptions;
use husk_proto::containerd::api::{CreateTaskRequest, DeleteRequest};
use husk_proto::containerd::events::task::{TaskCreate, TaskIO};
use husk_proto::containerd::topics::TASK_CREATE_EVENT_TOPIC;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde_json::Value;

use super::prepare;
use crate::blocking;
use crate::container::containers::{Container, Reservation};
use crate::container::prepare::Prepared;
use crate::container::process::Process;
use crate::container::streams::ConnectedStdio;
use crate::container::{Shim, stdio_paths};
use crate::error::ServiceError;
use crate::hooks;
use crate::host_view;
use crate::oci;
use crate::oci::{Bundle, Disk, Spec};
use crate::pod;
use crate::resources::growth::Limits;
use crate::stdio::{LoggerContext, Stdio};
use crate::vm::agent;
use crate::vm::agent::{Agent, timeouts, within};
use crate::volumes;
use crate::volumes::mirror;

/// How long a request to delete a container may wait for the end of the container's creation.
const CANCEL_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(4);
/// Timeout for the agent's answer to the request that deletes a container whose creation was cancelled. If it expires,
/// the agent still gets the request, because the requests arrive in order.
const UNDO_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(2);

/// How long the removal of a container's mounts may take. A file system of the host that hangs can delay it. The
/// removal then continues in the background.
const TEARDOWN_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(1);

/// The shim cannot watch the host's mounts. Therefore, it cannot propagate the mounts to the guest.
#[derive(Debug, thiserror::Error)]
#[error("failed to watch the host's mounts")]
struct WatchError(#[source] io::Error);

impl Shim {
    /// Creates a container. After an error, removes everything that was made for the container.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<(), ServiceError> {
        if !crate::ids::is_name(&request.id) {
            return Err(ServiceError::Invalid(format!("container id {:?}", request.id)));
        }
        if !request.checkpoint.is_empty() {
            return Err(ServiceError::Unsupported("restoring a checkpoint"));
        }
        if !self.sandbox.is_launched() {
            return Err(ServiceError::NotCreated);
        }
        // A sandbox whose launch has failed must not run the hooks.
        self.check_alive().await?;
        self.sandbox.timeline.mark("create begin");
        let reservation = self.containers.reserve(&request.id)?;
        // From here on, the orderly end cancels the creation.
        self.check_not_ending()?;
        self.sandbox.dir().record_container(&request.id);
        let created = self.create_reserved(&request, &reservation).await;
        if let Err(error) = &created {
            tracing::error!(container = request.id, error = %crate::chain(error), "failed to create the container");
            // A client waits for the end of a cancelled creation.
            let limit = match error {
                ServiceError::Cancelled => self.sandbox.timeout(UNDO_TIMEOUT),
                _ => timeouts::QUICK,
            };
            self.delete_in_guest(&request.id, limit).await;
            self.tear_down_bundle(&request.id).await;
            self.release_resources(&request.id);
            self.release_pid(&request.id);
            self.sandbox.dir().forget_container(&request.id);
        }
        // If there is no container, the id becomes free only after the cleanup.
        drop(reservation);
        self.shut_down_if_waiting();
        created
    }

    async fn create_reserved(
        &self,
        request: &CreateTaskRequest,
        reservation: &Reservation<'_>,
    ) -> Result<(), ServiceError> {
        failpoint!(async "shim.create.reserved").map_err(ServiceError::failed)?;
        let bundle = read(request.bundle.clone()).await?;
        let spec = bundle.spec.clone();
        if spec.annotations.is_sandbox() {
            return self.create_sandbox_container(request, spec, reservation).await;
        }
        let io = stdio_paths(&request.stdin, &request.stdout, &request.stderr, request.terminal);
        let logger = LoggerContext { id: &request.id, namespace: &self.namespace, launcher: &self.launcher };
        let prepare = async {
            self.acquire_pid(&request.id, &spec).await?;
            let prepared = self.prepare(request, bundle).await?;
            if prepared.needs_propagation {
                let started = self.sandbox.start_propagation();
                started.map_err(|error| ServiceError::failed(WatchError(error)))?;
            }
            // The hooks may run CNI plugins, which open the pod's network namespace as /proc/PID/ns/net. The PID
            // belongs to the VMM, which does not exist before the launch. `create` has checked that the sandbox is
            // launched.
            self.check_alive().await?;
            self.run_hooks("prestart", &spec.hooks.prestart, "creating", request, &spec).await?;
            self.run_hooks("createRuntime", &spec.hooks.create_runtime, "creating", request, &spec).await?;
            Ok::<_, ServiceError>(prepared)
        };
        let stdio = async { Stdio::open(&io, &logger).await.map_err(ServiceError::failed) };
        let (prepared, stdio, agent) = tokio::join!(
            prepare,
            reservation.unless_cancelled(stdio),
            reservation.unless_cancelled(self.ready_agent()),
        );
        let (prepared, agent, stdio) = (prepared?, agent?, stdio?);
        failpoint!(async "shim.create.prepared").map_err(ServiceError::failed)?;
        for note in &prepared.notes {
            tracing::info!(container = request.id, "{note}");
        }
        let guest_spec = self.plug_disks(&agent, prepared.spec, &prepared.disks).await?;
        self.load_profile(&agent, &prepared.profile).await?;
        for volume in &prepared.volumes.memory {
            let made = agent.sandbox.mount_volume(within(timeouts::QUICK), volume).await;
            made.map_err(|error| agent::error("mount_volume", error))?;
        }
        let mirroring = mirror::start(&self.watchers, &agent, &request.id, prepared.volumes.mirrors).await;
        let mirroring = mirroring.map_err(ServiceError::failed)?;
        self.apply_oom_score(&request.id, &spec);
        self.reserve_resources(&request.id, Limits::from_resources(&spec.linux.resources)).await?;
        let connect = self.connect_stdio(stdio);
        let ConnectedStdio { relay, tokens, turn } = reservation.unless_cancelled(connect).await?;
        failpoint!(async "shim.create.connected").map_err(ServiceError::failed)?;
        let options = CreateOptions { spec: guest_spec, rootfs: prepared.rootfs, ..Default::default() };
        let options = Any {
            type_url: CREATE_OPTIONS_TYPE_URL.to_owned(),
            value: options.write_to_bytes().map_err(ServiceError::failed)?,
            ..Default::default()
        };
        let guest = CreateTaskRequest {
            id: request.id.clone(),
            bundle: request.id.clone(),
            terminal: request.terminal,
            stdin: tokens.stdin,
            stdout: tokens.stdout,
            stderr: tokens.stderr,
            options: Some(options).into(),
            ..Default::default()
        };
        let limit = within(timeouts::SLOW);
        let create = async { agent.task.create(limit, &guest).await.map_err(|error| agent::error("create", error)) };
        reservation.unless_cancelled(create).await?;
        drop(turn);
        failpoint!(async "shim.create.answered").map_err(ServiceError::failed)?;
        let init = Process::new(&request.id, "", io);
        init.set_relay(relay);
        let container = Arc::new(Container::new(&request.id, &request.bundle, spec, init, mirroring));
        self.publish_created(&container, request);
        // Resize only after the creation, because the resize can lower the CPU limit on the host. A lower limit would
        // slow down the creation.
        self.queue_resize();
        Ok(())
    }

    /// Fails if the launch or the boot has failed, or if the VM has ended. Does not wait for the boot.
    async fn check_alive(&self) -> Result<(), ServiceError> {
        if self.sandbox.known_end_reason().is_some() { self.ready_agent().await.map(drop) } else { Ok(()) }
    }

    /// Waits until the agent accepts containers.
    pub(crate) async fn ready_agent(&self) -> Result<Agent, ServiceError> {
        self.sandbox.ready().await.map_err(|error| ServiceError::failed(error.to_string()))
    }

    /// Cancels the creation of the container `id`, if the container is being created. Waits at most
    /// [`CANCEL_TIMEOUT`] until everything that was made for the container is removed.
    pub(crate) async fn cancel_creation(&self, id: &str) {
        self.cancel(Some(id)).await;
    }

    /// Cancels the creations of all containers, as [`Shim::cancel_creation`] does.
    pub(crate) async fn cancel_all_creations(&self) {
        self.cancel(None).await;
    }

    async fn cancel(&self, id: Option<&str>) {
        if tokio::time::timeout(self.sandbox.timeout(CANCEL_TIMEOUT), self.containers.cancel(id)).await.is_err() {
            let id = id.unwrap_or("(all)");
            tracing::error!(container = id, "the creation of a container does not end after its cancellation");
        }
    }

    /// After a failed creation, tells the agent to delete the container and the copies of its mirrored volumes.
    ///
    /// If the agent is still creating the container, the agent deletes the container after the creation. The agent
    /// deletes the container even if the Delete request has timed out.
    async fn delete_in_guest(&self, id: &str, limit: Duration) {
        let Ok(agent) = self.agent().await else { return };
        let request = DeleteRequest { id: id.to_owned(), ..Default::default() };
        match agent.task.delete(within(limit), &request).await {
            Ok(_) => tracing::info!(container = id, "deleted the container in the guest after its creation failed"),
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
            Err(error) => {
                tracing::warn!(
                    container = id,
                    %error,
                    "failed to delete the container in the guest after its creation failed"
                );
            }
        }
    }

    /// Hot-plugs `disks`. Returns `spec` as JSON, with the guest's device numbers instead of the host's numbers.
    async fn plug_disks(&self, agent: &Agent, mut spec: Value, disks: &[Disk]) -> Result<Vec<u8>, ServiceError> {
        let mut numbers = Vec::new();
        for disk in disks {
            let guest = self.sandbox.disk(agent, *disk).await.map_err(ServiceError::failed)?;
            numbers.push((*disk, guest));
        }
        oci::replace_disk_numbers(&mut spec, &numbers);
        Ok(spec.to_string().into_bytes())
    }

    /// Loads a process's AppArmor profile into the guest's kernel.
    pub(crate) async fn load_profile(&self, agent: &Agent, profile: &str) -> Result<(), ServiceError> {
        self.sandbox.load_profile(agent, profile).await.map_err(ServiceError::failed)
    }

    /// Stores the new container and publishes its TaskCreate event.
    pub(crate) fn publish_created(&self, container: &Arc<Container>, request: &CreateTaskRequest) {
        self.containers.insert(Arc::clone(container));
        self.sandbox.timeline.mark("create end");
        let event = TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..Default::default()
            })
            .into(),
            pid: self.pid(&container.id),
            ..Default::default()
        };
        self.events.publish(TASK_CREATE_EVENT_TOPIC, &event);
        if self.vm_has_ended() {
            self.mark_all_killed(container);
        }
    }

    /// Prepares the bundle. Runs on a blocking thread, because mount(2) can block.
    async fn prepare(&self, request: &CreateTaskRequest, mut bundle: Bundle) -> Result<Prepared, ServiceError> {
        let (id, share) = (request.id.clone(), self.sandbox.share());
        let (files, pids) = (self.sandbox_state.files(), self.pids());
        let rootfs: Vec<_> = request.rootfs.iter().map(volumes::RootMount::from).collect();
        let (is_of_sandbox, vmm) = (id == self.sandbox.id, self.sandbox.pid());
        let host_sockets = self.sandbox.host_sockets();
        let prepared = blocking::spawn(move || {
            bundle.check_in_sandbox(is_of_sandbox, vmm).map_err(|e| crate::chain(&e))?;
            if let Some(files) = files {
                pod::add_mounts(&mut bundle, &files);
            }
            // Remove the mounts that an earlier container with this id may have left behind after a failed unmount.
            volumes::teardown(&share, &id).map_err(|e| crate::chain(&e))?;
            let request = prepare::Request {
                id: &id,
                share: &share,
                rootfs: &rootfs,
                host: host_view::of_process(),
                host_sockets: host_sockets.as_ref().map_or(&[], |sockets| sockets.allowed()),
                pids: &pids,
            };
            prepare::prepare(&bundle, &request).map_err(|e| crate::chain(&e))
        })
        .await;
        match prepared {
            Ok(prepared) => prepared.map_err(ServiceError::failed),
            Err(error) => Err(ServiceError::failed(error)),
        }
    }

    /// Removes the container's mounts from the host. Best effort. Waits at most [`TEARDOWN_TIMEOUT`].
    pub(crate) async fn tear_down_bundle(&self, id: &str) {
        let (container, share) = (id.to_owned(), self.sandbox.share());
        let done = blocking::spawn(move || volumes::teardown(&share, &container).map_err(|error| crate::chain(&error)));
        match tokio::time::timeout(self.sandbox.timeout(TEARDOWN_TIMEOUT), done).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(container = id, error, "failed to remove the container's mounts"),
            Err(_) => {
                tracing::error!(container = id, "the container's mounts are not removed yet: a file system may hang");
            }
            Ok(Err(error)) => {
                tracing::warn!(container = id, %error, "failed to run the task that removes the container's mounts");
            }
        }
    }

    pub(crate) async fn run_hooks(
        &self,
        kind: &'static str,
        hooks: &[oci::Hook],
        status: &str,
        request: &CreateTaskRequest,
        spec: &Spec,
    ) -> Result<(), ServiceError> {
        let state = hooks::State {
            oci_version: &spec.oci_version,
            id: &request.id,
            status,
            pid: self.pid(&request.id),
            bundle: &request.bundle,
            annotations: &spec.annotations,
        };
        hooks::run(&self.launcher, kind, hooks, &state).await.map_err(ServiceError::failed)
    }

    /// Runs the poststart or poststop hooks. A failure is only logged.
    pub(crate) async fn run_late_hooks(&self, kind: &'static str, container: &Container, status: &str) {
        let (hooks, pid) = match kind {
            "poststart" => (&container.spec.hooks.poststart, self.pid(&container.id)),
            _ => (&container.spec.hooks.poststop, 0),
        };
        let state = hooks::State {
            oci_version: &container.spec.oci_version,
            id: &container.id,
            status,
            pid,
            bundle: &container.bundle,
            annotations: &container.spec.annotations,
        };
        if let Err(error) = hooks::run(&self.launcher, kind, hooks, &state).await {
            tracing::warn!(container = container.id, error = %crate::chain(&error), "failed to run the hooks");
        }
    }
}

/// Reads the bundle's specification. Runs on a blocking thread, because reading a file can block.
async fn read(dir: String) -> Result<Bundle, ServiceError> {
    match blocking::spawn(move || Bundle::read(Path::new(&dir))).await {
        Ok(bundle) => bundle.map_err(ServiceError::failed),
        Err(error) => Err(ServiceError::failed(error)),
    }
}
