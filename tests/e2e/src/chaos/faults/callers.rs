//! Faults of callers: a client or containerd ends while its request runs.

use super::{Armed, Hold};
use crate::chaos::plan::Fault;
use crate::cri::restart;

/// Ends containerd. The engine itself drops the request of [`Fault::DropRequest`].
pub fn arm(fault: Fault) -> Result<Armed, String> {
    match fault {
        Fault::DropRequest => Ok(Armed::done()),
        Fault::KillContainerd => {
            restart::kill_containerd();
            Ok(Armed::new(Hold::Short(std::time::Duration::ZERO), restart::start_containerd))
        }
        _ => Err(format!("{fault:?} is no fault of a caller")),
    }
}
