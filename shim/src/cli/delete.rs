//! `delete`: run by containerd when a shim died or could not be reached; cleans up whatever remains of it.

use std::io::Write;
use std::path::PathBuf;
use std::time::SystemTime;

use husk_proto::containerd::api::DeleteResponse;
use protobuf::Message;

use super::Args;
use super::bootstrap::Env;
use crate::address::Address;
use crate::events::timestamp;
use crate::sandbox::state::StateDir;
use crate::spec::Spec;

/// What a task gets as its status that nobody saw the end of.
const KILLED: u32 = 128 + 9;

/// Cleans up after a container, and after its sandbox when the shim of it is gone or was this container's.
///
/// # Errors
/// When the answer cannot be written.
pub fn delete(args: &Args) -> std::io::Result<()> {
    let bundle = if args.bundle.as_os_str().is_empty() { std::env::current_dir()? } else { args.bundle.clone() };
    // The configuration may be gone with the bundle; then the container counts as its own sandbox.
    let group = Spec::load(&bundle).ok().and_then(|spec| spec.group(&args.id).ok().map(str::to_owned));
    let group = group.unwrap_or_else(|| args.id.clone());
    let state = StateDir::new(&args.namespace, &group);
    let noted = |path: PathBuf| std::fs::read_to_string(path).ok().and_then(|text| Address::from_uri(&text));
    let address = noted(bundle.join("address")).or_else(|| noted(state.path().join("address"))).unwrap_or_else(|| {
        let address = if args.address.is_empty() { Env::read().grpc_address } else { args.address.clone() };
        Address::new(None, &address, &args.namespace, &group)
    });
    // Other containers of the pod go on in a live shim; only the sandbox' own deletion ends it.
    if group == args.id || !address.is_live() {
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
