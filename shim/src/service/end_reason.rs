//! Adds to the response of each failed request why the VM has ended.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response, Status};

use crate::container::Shim;

/// A method of a service. If the VM has ended, the method's errors say why.
struct Explained {
    method: Box<dyn MethodHandler + Send + Sync>,
    shim: Arc<Shim>,
}

/// Makes all methods of the services say why the VM has ended.
pub fn explained(shim: &Arc<Shim>, mut services: HashMap<String, Service>) -> HashMap<String, Service> {
    for service in services.values_mut() {
        let explain =
            |method| -> Box<dyn MethodHandler + Send + Sync> { Box::new(Explained { method, shim: Arc::clone(shim) }) };
        service.methods = service.methods.drain().map(|(name, method)| (name, explain(method))).collect();
    }
    services
}

#[async_trait]
impl MethodHandler for Explained {
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let mut response = self.method.handler(context, request).await?;
        if let Some(status) = response.status.as_mut().filter(|status| status.code() != Code::OK) {
            let sandbox = &self.shim.sandbox;
            let reason = match status.code() {
                // The connection to the agent breaks before the shim notices the end of the VMM process.
                Code::UNAVAILABLE => sandbox.wait_end().await,
                _ => sandbox.end_reason().await,
            };
            if let Some(reason) = reason {
                add(status, &reason, || sandbox.console_tail());
            }
        }
        Ok(response)
    }
}

/// Adds `reason`, which says why the VM has ended, to the status of a failed request. `console` returns the last lines
/// of the guest's console.
///
/// The text still begins with the original text, because clients match on texts of runc's shim.
fn add(status: &mut Status, reason: &str, console: impl FnOnce() -> String) {
    let code = status.code();
    // These codes describe the request, whatever the state of the VM is.
    let is_of_request =
        matches!(code, Code::NOT_FOUND | Code::ALREADY_EXISTS | Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED);
    if is_of_request || status.message.contains(reason) {
        return;
    }
    status.message.push_str(": the sandbox's VM has ended: ");
    status.message.push_str(reason);
    if code == Code::FAILED_PRECONDITION {
        return;
    }
    // The request was in progress when the VM ended.
    let console = console();
    if !console.is_empty() {
        status.message.push_str("; the last lines of the guest's console:\n");
        status.message.push_str(&console);
    }
    // A client may retry after the code UNAVAILABLE, but the VM does not come back.
    status.set_code(Code::UNKNOWN);
}

#[cfg(test)]
mod tests {
    use ttrpc::Error;

    use super::*;
    use crate::error::ServiceError;

    /// Returns the code and the text of `error` after the VM has ended because of `reason`.
    fn added(error: impl Into<Error>, reason: &str) -> (Code, String) {
        let Error::RpcStatus(mut status) = error.into() else { panic!("the error is not a status") };
        add(&mut status, reason, || "a panic".to_owned());
        (status.code(), status.message)
    }

    #[test]
    fn error_of_a_request_names_the_reason_once_the_vm_has_ended() {
        let reason = "thread vcpu0 made system call 41 (socket)";
        let (code, text) = added(ServiceError::Exec("stopped"), reason);
        assert_eq!(code, Code::FAILED_PRECONDITION);
        let runc = "cannot exec in a stopped state: failed precondition";
        assert_eq!(text, format!("{runc}: the sandbox's VM has ended: {reason}"));
        let lost = crate::vm::agent::error("exec", Error::RemoteClosed);
        let (code, text) = added(lost, reason);
        assert_eq!(code, Code::UNKNOWN);
        assert!(text.starts_with("the agent's exec call failed: ") && text.ends_with("console:\na panic"), "{text}");
        assert!(text.contains(&format!("the sandbox's VM has ended: {reason}; ")), "{text}");
    }

    #[test]
    fn reason_is_added_neither_twice_nor_to_an_error_of_the_request() {
        let gone = || ServiceError::Gone("killed".into());
        assert_eq!(added(gone(), "killed"), (Code::FAILED_PRECONDITION, gone().to_string()));
        for error in [ServiceError::NoContainer, ServiceError::Finished, ServiceError::Exists("e".into())] {
            let (code, text) = (error.code(), error.to_string());
            assert_eq!(added(error, "killed"), (code, text));
        }
    }
}
