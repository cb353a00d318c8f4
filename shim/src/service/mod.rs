//! Adapters between containerd's ttrpc services and the operations in [`crate::container`].

mod end_reason;
mod sandbox;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use ttrpc::r#async::Service;

use crate::container::Shim;

#[cfg(test)]
pub(crate) use task::checked_stats;

/// Returns all ttrpc services of the shim. Once the VM has ended, failed requests say why.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut all = task::services(shim);
    all.extend(sandbox::services(shim));
    end_reason::explained(shim, all)
}
