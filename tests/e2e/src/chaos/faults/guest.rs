//! Faults of the guest: containers that use up what they have, and a pod with very little CPU time.

use serde_json::{Value, json};

use super::{Armed, Field, Hold, write_until};
use crate::chaos::plan::Fault;
use crate::chaos::victim::{BEGIN, START_BUDGET};
use crate::cri::try_call_within;

/// Returns the limits with which the victim's container is created, and which the fault will reach.
pub fn resources(fault: Fault) -> Value {
    match fault {
        Fault::ForkBomb => json!({ "unified": { "pids.max": "40" } }),
        Fault::ContainerMemory => json!({ "memory_limit_in_bytes": 30 << 20 }),
        _ => json!({}),
    }
}

/// Injects a fault into the guest.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    let attack = |script| field.victim.attack(&format!("{BEGIN}\n{script}")).map(|()| Armed::done());
    match fault {
        Fault::StarvePod => {
            let hold = Hold::Short(field.seconds(3.0, 10.0));
            write_until(field.cgroup()?.join("cpu.max"), "2000 100000", hold)
        }
        Fault::BusyLoop => {
            // The limit comes last. With 1 % of a CPU, the container would need half a minute for its start.
            let armed = attack("while :; do :; done")?;
            let limit = json!({ "cpu_period": 100_000, "cpu_quota": 1000 });
            let request = json!({ "container_id": field.container, "linux": limit });
            let limited = try_call_within(START_BUDGET, "RuntimeService", "UpdateContainerResources", &request);
            limited.map(|_| armed).map_err(|status| format!("failed to limit the container: {status}"))
        }
        Fault::ForkBomb => attack("while :; do sleep 1000 & done 2>/dev/null"),
        Fault::ContainerMemory | Fault::GuestMemory => attack("tail /dev/zero"),
        _ => Err(format!("{fault:?} is no fault of a guest")),
    }
}
