//! Adapters between containerd's ttrpc services and the operations in [`crate::container`].

mod completion;
mod end_reason;
mod sandbox;
mod task;

use std::collections::HashMap;
use std::sync::Arc;

use ttrpc::r#async::Service;

use crate::container::Shim;
use crate::error::ServiceError;

#[cfg(test)]
pub(crate) use task::checked_stats;

/// Joins the error and its causes into one text. Only the services convert errors to ttrpc.
impl From<ServiceError> for ttrpc::Error {
    fn from(error: ServiceError) -> Self {
        ttrpc::error::get_rpc_status(error.code(), crate::chain(&error))
    }
}

/// Returns all ttrpc services of the shim. Requests that change state run to completion. Once the VM has ended, failed
/// requests say why.
pub fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    completion::completed(uncompleted(shim))
}

/// Returns the services whose requests end when their client disconnects ([`completion`]).
pub(crate) fn uncompleted(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let mut all = task::services(shim);
    all.extend(sandbox::services(shim));
    end_reason::explained(shim, all)
}

#[cfg(test)]
mod tests {
    #[test]
    fn error_of_the_agent_reaches_the_client_with_its_code_and_text() {
        let text = || "mount /x: permission denied".to_owned();
        let agent = ttrpc::error::get_rpc_status(ttrpc::Code::PERMISSION_DENIED, text());
        let error = crate::vm::agent::error("create", agent);
        let ttrpc::Error::RpcStatus(status) = error.into() else { panic!("the error is not a status") };
        assert_eq!((status.code(), status.message), (ttrpc::Code::PERMISSION_DENIED, text()));
    }
}
