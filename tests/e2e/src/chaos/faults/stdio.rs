//! Faults of streams: readers that stop reading, clients that are killed, and half a request.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{Armed, Field, Hold};
use crate::chaos::plan::Fault;
use crate::chaos::targets;
use crate::chaos::victim::{BEGIN, START_BUDGET};
use crate::cri::pod::text;
use crate::cri::stream::Stream;
use crate::cri::try_call_within;
use crate::node;

/// Number of streams that stall.
const STREAMS: usize = 4;

/// Opens streams whose clients do not read, or are killed.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    match fault {
        Fault::StalledExec => {
            let command = ["sh", "-c", "yes 2>/dev/null"];
            let request = json!({ "container_id": field.container, "cmd": command, "stdout": true });
            stalled("Exec", &request, Hold::Life)
        }
        Fault::StalledForward => {
            // Each client of the port gets an endless output.
            field.victim.attack(&format!(
                "nc -ll -p 7777 -e yes &\nuntil netstat -ltn | grep -q :7777; do sleep 0.1; done\n{BEGIN}\nwait"
            ))?;
            stalled("PortForward", &json!({ "pod_sandbox_id": field.pod, "port": [7777] }), Hold::Life)
        }
        Fault::KilledAttach => {
            let request = json!({ "container_id": field.container, "stdin": false, "stdout": true, "stderr": true });
            stalled("Attach", &request, Hold::Short(field.seconds(0.2, 2.0)))
        }
        Fault::HalfRequest => half_requests(field),
        _ => Err(format!("{fault:?} is no fault of a stream")),
    }
}

/// Opens streams from which nobody reads. Healing closes the connections without a close frame, as the death of a
/// client does.
fn stalled(method: &str, request: &Value, hold: Hold) -> Result<Armed, String> {
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let answer = try_call_within(START_BUDGET, "RuntimeService", method, request);
        let url = text(&answer.map_err(|status| status.to_string())?["url"]);
        let connect = AssertUnwindSafe(|| Stream::connect(&url));
        streams.push(catch_unwind(connect).map_err(|_| format!("failed to connect to {url}"))?);
    }
    Ok(Armed::new(hold, move || drop(streams)))
}

/// Sends half a header of a ttrpc message to each shim's socket, the witness's too, and keeps the connections open.
fn half_requests(field: &Field<'_>) -> Result<Armed, String> {
    let connect = || {
        let victim = |path: &PathBuf| !field.sockets.contains(path) && UnixStream::connect(path).is_ok();
        targets::sockets().iter().any(victim).then_some(())
    };
    node::eventually(field.appears, connect).ok_or("no socket of the victim's shim")?;
    let mut open: Vec<UnixStream> =
        targets::sockets().iter().filter_map(|path| UnixStream::connect(path).ok()).collect();
    for stream in &mut open {
        let _ = stream.write_all(&[0, 0, 1, 0, 0]);
    }
    Ok(Armed::new(Hold::Life, move || drop(open)))
}
