//! `delete`: run by containerd when a shim died or could not be reached; cleans up whatever remains of it.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use husk_proto::containerd::api::{DeleteResponse, ShutdownRequest, StateRequest};
use husk_proto::containerd::shim_async::{Client, TaskClient};
use protobuf::Message;
use ttrpc::asynchronous::transport::Socket;

use super::Args;
use super::bootstrap::Env;
use crate::address::Address;
use crate::events::timestamp;
use crate::sandbox::state::StateDir;
use crate::spec::Spec;

/// What a task gets as its status that nobody saw the end of.
const KILLED: u32 = 128 + 9;
/// How long a shim may take to say whether it is still needed.
const PATIENCE: Duration = Duration::from_secs(3);

/// Cleans up after a container, and after its sandbox when the shim of it is gone or was this container's.
///
/// # Errors
/// When the answer cannot be written.
pub fn delete(args: &Args) -> std::io::Result<()> {
    let bundle = if args.bundle.as_os_str().is_empty() { std::env::current_dir()? } else { args.bundle.clone() };
    // The configuration may be gone with the bundle, or there was none; then the container counts as its own sandbox.
    let spec = Spec::load(&bundle).ok();
    let group = spec.as_ref().and_then(|spec| spec.group(&args.id).ok().map(str::to_owned));
    let group = group.unwrap_or_else(|| args.id.clone());
    let state = StateDir::new(&args.namespace, &group);
    let noted = |path: PathBuf| std::fs::read_to_string(path).ok().and_then(|text| Address::from_uri(&text));
    let address = noted(bundle.join("address")).or_else(|| noted(state.path().join("address"))).unwrap_or_else(|| {
        let address = if args.address.is_empty() { Env::read().grpc_address } else { args.address.clone() };
        Address::new(None, &address, &args.namespace, &group)
    });
    // Other containers of the pod go on in a live shim. Only the sandbox' own deletion ends it, unless the sandbox'
    // container was deleted in order and others still are about to be: containerd calls this after any deletion.
    let is_needed =
        || if group == args.id { spec.is_some() && has_others(&address, &args.id) } else { address.is_live() };
    if !is_needed() {
        state.clean_up();
        address.remove();
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(std::io::Error::other)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&bytes)?;
    out.flush()
}

/// Whether a shim that knows of no container `id` any more has others, and so does not end when it is told to.
fn has_others(address: &Address, id: &str) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return false };
    let asked = async {
        let stream = tokio::net::UnixStream::connect(address.path()).await.ok()?;
        let task = TaskClient::new(Client::new(Socket::from(stream)));
        let limit = || ttrpc::context::with_duration(PATIENCE);
        let state = StateRequest { id: id.to_owned(), ..Default::default() };
        match task.state(limit(), &state).await {
            Err(ttrpc::Error::RpcStatus(status)) if status.code() == ttrpc::Code::NOT_FOUND => {}
            _ => return None,
        }
        let shutdown = ShutdownRequest { id: id.to_owned(), ..Default::default() };
        task.shutdown(limit(), &shutdown).await.ok()?;
        // One that ends does not take connections any more when it has answered.
        Some(())
    };
    runtime.block_on(asked).is_some() && address.is_live()
}
