//! The action `delete`. containerd usually runs this action to clean up after a shim that has died or is unreachable.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use husk_config::BaseTimeout;
use husk_proto::containerd::api::{
    DeleteRequest, DeleteResponse, KillRequest, ShutdownRequest, StateRequest, WaitRequest,
};
use husk_proto::containerd::shim_async::{Client, TaskClient};
use protobuf::Message;
use ttrpc::asynchronous::transport::Socket;

use crate::address::Address;
use crate::cli::Args;
use crate::cli::bootstrap::Env;
use crate::events::timestamp;
use crate::oci::Bundle;
use crate::sandbox::launch;
use crate::sandbox::state_dir::StateDir;
use crate::vm::agent::within;

/// Exit status that `delete` reports: the status after SIGKILL. `delete` cannot know the task's real exit status.
const EXIT_STATUS_KILLED: u32 = 128 + 9;
/// Timeout of the request for the state of a sandbox container, which the sandbox's shim answers at once. containerd
/// kills this process after 5 s (`cleanupTimeout` in runtime/v2/shim.go of containerd 1.7).
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the shim may take to end a container that containerd has given up.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// How long to wait for the deletion of a container that has ended.
const DELETE_ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout of the Shutdown request. This is longer than the shim takes to cancel all creations, to flush the guest's
/// disks, and to tear the sandbox down. A cleanup before that would kill the VM during the flush.
const SHUTDOWN_TIMEOUT: BaseTimeout = BaseTimeout::from_secs(15);

/// Cleans up the container's sandbox, unless the sandbox's shim is alive and needed. Writes a DeleteResponse to stdout
/// even if no cleanup is necessary.
pub fn delete(args: &Args) -> std::io::Result<()> {
    let bundle = if args.bundle.as_os_str().is_empty() { std::env::current_dir()? } else { args.bundle.clone() };
    // If the bundle has no config.json, use the container's id as the sandbox's id. The file is missing if containerd
    // has removed the bundle, or if containerd's sandbox controller plugin made the bundle.
    let spec = Bundle::read(&bundle).ok().map(|bundle| bundle.spec);
    let group = spec.as_ref().and_then(|spec| spec.group(&args.id).ok().map(str::to_owned));
    let group = group.unwrap_or_else(|| args.id.clone());
    let state = StateDir::new(&args.namespace, &group);
    let read_address = |path: PathBuf| std::fs::read_to_string(path).ok().and_then(|text| Address::from_uri(&text));
    let address = read_address(bundle.join("address"))
        .or_else(|| read_address(state.path().join("address")))
        .unwrap_or_else(|| {
            let address = if args.address.is_empty() { Env::read().grpc_address } else { args.address.clone() };
            Address::new(None, &address, &args.namespace, &group)
        });
    // A live shim serves all containers of the pod. Therefore, the deletion of a single container must not clean up the
    // sandbox. containerd runs this action even after a normal deletion of a container. After that of the sandbox
    // container, the shim is needed only if the pod has other containers. If the shim still has another container,
    // containerd has given the container up, and may start it again. Then the container must end first.
    let is_needed = || {
        if group == args.id {
            return spec.is_some() && has_other_containers(&address, &args.id);
        }
        address.is_live() && (!state.has_container(&args.id) || end_container(&address, &args.id))
    };
    if !is_needed() {
        state.clean_up();
        address.remove();
    }
    let response = DeleteResponse {
        exit_status: EXIT_STATUS_KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)?;
    out.flush()
}

fn is_not_found(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if status.code() == ttrpc::Code::NOT_FOUND)
}

/// Ends and deletes a container. Returns whether the shim says that the container has ended or does not exist.
fn end_container(address: &Address, id: &str) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return false };
    let end = async {
        let stream = tokio::net::UnixStream::connect(address.path()).await.ok()?;
        let task = TaskClient::new(Client::new(Socket::from(stream)));
        let exit = async {
            // The error for a container that has exited does not matter: the next request tells.
            let kill = KillRequest { id: id.to_owned(), signal: 9, all: true, ..Default::default() };
            let _ = task.kill(within(END_TIMEOUT), &kill).await;
            task.wait(within(END_TIMEOUT), &WaitRequest { id: id.to_owned(), ..Default::default() }).await
        };
        match tokio::time::timeout(END_TIMEOUT, exit).await.ok()? {
            Ok(_) => {}
            Err(error) => return is_not_found(&error).then_some(()),
        }
        // The shim goes on with the deletion if it does not answer in time.
        let delete = DeleteRequest { id: id.to_owned(), ..Default::default() };
        let _ = task.delete(within(DELETE_ANSWER_TIMEOUT), &delete).await;
        Some(())
    };
    runtime.block_on(end).is_some()
}

/// Returns whether the shim has containers, but does not have container `id`.
///
/// If the shim does not have container `id`, sends a Shutdown request. A shim with containers ignores this request. A
/// shim without containers ends.
fn has_other_containers(address: &Address, id: &str) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return false };
    let probe = async {
        let stream = tokio::net::UnixStream::connect(address.path()).await.ok()?;
        let task = TaskClient::new(Client::new(Socket::from(stream)));
        // If the configuration is invalid, the shim has not started the VM.
        let factor = launch::config().map(|config| config.timeout_factor).unwrap_or_default();
        let context = |base| within(factor.of(base));
        let state = StateRequest { id: id.to_owned(), ..Default::default() };
        match task.state(within(REQUEST_TIMEOUT), &state).await {
            Err(error) if is_not_found(&error) => {}
            _ => return None,
        }
        let shutdown = ShutdownRequest { id: id.to_owned(), ..Default::default() };
        task.shutdown(context(SHUTDOWN_TIMEOUT), &shutdown).await.ok()?;
        // A shim without containers now ends and removes its socket. In this case, `is_live` below returns false.
        Some(())
    };
    runtime.block_on(probe).is_some() && address.is_live()
}
