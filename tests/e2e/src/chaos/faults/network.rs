//! Faults of the pod's network: links and routes that change under the pod.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Armed, Field, Hold};
use crate::chaos::plan::Fault;
use crate::node;

/// Number of times that a route is added and deleted.
const FLAPS: u32 = 40;

/// Injects a fault into the pod's interface or its routes.
pub fn arm(fault: Fault, field: &mut Field<'_>) -> Result<Armed, String> {
    let namespace = field.namespace()?;
    // A pod that is being made gets its interface after its namespace.
    let appears = field.appears;
    let change = |batch: &str| {
        let mut last = String::new();
        let changed = node::eventually(appears, || ip(&namespace, batch).map_err(|error| last = error).ok());
        changed.ok_or(last)
    };
    match fault {
        Fault::LinkDown => {
            change("link set eth0 down\n")?;
            let hold = Hold::Short(field.seconds(1.0, 5.0));
            Ok(Armed::new(hold, move || {
                // The pod may be gone.
                let _ = ip(&namespace, "link set eth0 up\n");
            }))
        }
        Fault::LinkDeleted => change("link del eth0\n").map(|()| Armed::done()),
        Fault::RouteFlaps => {
            let flap = "route add 10.77.0.0/16 dev eth0\nroute del 10.77.0.0/16 dev eth0\n";
            change(&flap.repeat(FLAPS as usize)).map(|()| Armed::done())
        }
        _ => Err(format!("{fault:?} is no fault of a network")),
    }
}

/// Adds an interface to the network namespace of a running pod, as a network plug-in can do late.
pub fn add_interface(namespace: &Path) -> Result<(), String> {
    ip(
        namespace,
        "link add later type veth peer name later-peer\naddr add 10.98.0.2/24 dev later\nlink set later-peer up\n\
         link set later up\n",
    )
}

/// Runs the commands of one `ip -batch` in a network namespace.
fn ip(namespace: &Path, batch: &str) -> Result<(), String> {
    let file = PathBuf::from("/tmp/husk-chaos-ip");
    std::fs::write(&file, batch).map_err(|error| error.to_string())?;
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).args(["ip", "-batch"]).arg(&file).stdin(Stdio::null());
    let output = command.output().map_err(|error| error.to_string());
    let _ = std::fs::remove_file(file);
    let output = output?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}
