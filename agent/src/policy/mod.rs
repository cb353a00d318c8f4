//! Enforces the agent policies of the node and the pod. The first Setup request contains both policies, and no later
//! request changes them.

mod facts;

use std::net::SocketAddr;
use std::sync::OnceLock;

use husk_policy::{Exec, ParseError, Policies, Refusal};
use husk_proto::containerd::api::CreateTaskRequest;
use libcontainer::oci_spec::runtime::{Process, Spec};

use crate::error::{ServiceError, malformed};
use crate::log::audit;

/// The policies of the node and the pod, which the first Setup request sets. The inner value is `None` if this request
/// contained an invalid policy. In this case, every check fails.
#[derive(Debug, Default)]
pub struct Guard(OnceLock<Option<Policies>>);

impl Guard {
    /// Accepts the policies of the first Setup request.
    ///
    /// # Errors
    /// Fails if a policy is invalid, or if an earlier request has set the policies. After an invalid policy, every
    /// check fails.
    pub fn accept(&self, node: &[u8], pod: &[u8]) -> Result<(), ServiceError> {
        let (policies, parsed) = match Policies::from_json(node, pod) {
            Ok(policies) => (Some(policies), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.0.set(policies).map_err(|_| {
            audit("refused a second Setup request: the policies of a pod can be set only once");
            ServiceError::FailedPrecondition("the sandbox has already been set up".into())
        })?;
        parsed.map_err(|error: ParseError| {
            audit("a policy in the Setup request is invalid: all containers are refused");
            malformed("invalid policy")(error)
        })
    }

    /// Checks whether a container may be created. `spec` is the specification of the request.
    pub fn check_container(&self, spec: &Spec, request: &CreateTaskRequest, rootfs: &str) -> Result<(), ServiceError> {
        self.check(|policies| policies.check_container(&facts::container(spec, request, rootfs)))
    }

    /// Checks whether an exec of `process` is allowed in a container. `own` is the process of the container's
    /// specification.
    pub fn check_exec(&self, container: &str, own: &Process, process: &Process) -> Result<(), ServiceError> {
        let exec = Exec {
            container,
            arguments: process.args().as_deref().unwrap_or_default(),
            difference: facts::difference(own, process),
            capabilities: facts::capabilities(process),
        };
        self.check(|policies| policies.check_exec(&exec))
    }

    /// Checks whether a connection to `address` may be forwarded.
    pub fn check_port_forward(&self, address: SocketAddr) -> Result<(), ServiceError> {
        self.check(|policies| policies.check_port_forward(&address.to_string()))
    }

    fn check(&self, check: impl FnOnce(&Policies) -> Result<(), Refusal>) -> Result<(), ServiceError> {
        match self.0.get() {
            Some(Some(policies)) => check(policies).map_err(|refusal| {
                audit(&refusal.to_string());
                ServiceError::Refused(refusal)
            }),
            Some(None) => Err(ServiceError::FailedPrecondition("the Setup request contained an invalid policy".into())),
            None => Err(ServiceError::FailedPrecondition("the sandbox has not been set up yet".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forwarded(guard: &Guard) -> Result<(), String> {
        guard.check_port_forward("127.0.0.1:80".parse().unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn check_fails_before_setup_and_after_an_invalid_policy() {
        let guard = Guard::default();
        assert_eq!(forwarded(&guard).unwrap_err(), "the sandbox has not been set up yet");
        let error = guard.accept(b"", br#"{"port_foward": true}"#).unwrap_err();
        assert!(husk_base::error::chain(&error).contains("unknown field `port_foward`"), "{error:?}");
        assert_eq!(forwarded(&guard).unwrap_err(), "the Setup request contained an invalid policy");
        guard.accept(b"", b"").unwrap_err();
        assert_eq!(forwarded(&guard).unwrap_err(), "the Setup request contained an invalid policy");
    }

    #[test]
    fn accept_refuses_a_second_setup() {
        let guard = Guard::default();
        guard.accept(br#"{"port_forward": false}"#, b"").unwrap();
        for (node, pod) in [(&b""[..], &b""[..]), (b"{}", b"{}"), (b"no", b"")] {
            let error = guard.accept(node, pod).unwrap_err();
            assert_eq!(error.to_string(), "the sandbox has already been set up");
        }
        assert!(forwarded(&guard).unwrap_err().contains("refused by the rule \"port_forward\" of the node's policy"));
    }

    #[test]
    fn setup_without_policies_allows_everything() {
        let guard = Guard::default();
        guard.accept(b"", b"").unwrap();
        forwarded(&guard).unwrap();
    }
}
