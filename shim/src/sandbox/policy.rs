//! The agent policies of a pod. The shim passes these policies to the agent in the `Setup` request.

use husk_config::{Config, annotation};
use husk_policy::{ParseError, Policy};

use crate::oci::annotations::Annotations;

/// The policies in JSON, as fields of the agent's `Setup` request. An empty policy allows everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodPolicies {
    /// The node's policy.
    pub node: Vec<u8>,
    /// The pod's policy.
    pub pod: Vec<u8>,
}

/// The pod's policy annotation does not contain a valid policy.
#[derive(Debug, thiserror::Error)]
#[error("invalid annotation {}", annotation::POLICY)]
pub struct PolicyError(#[source] ParseError);

impl PodPolicies {
    /// Returns the policies of a pod with these annotations. [`crate::resources::boot_size`] checks whether the pod may
    /// use the policy annotation.
    ///
    /// # Errors
    /// Fails with a [`PolicyError`] if the annotation does not contain a valid policy.
    pub fn new(annotations: &Annotations, config: &Config) -> Result<Self, PolicyError> {
        let pod = match annotations.get(annotation::POLICY) {
            Some(text) => Policy::from_json(text.as_bytes()).map_err(PolicyError)?.to_json(),
            None => Vec::new(),
        };
        Ok(Self { node: config.policy.to_json(), pod })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use husk_policy::Policies;

    use super::*;

    fn policies(node: &str, pod: Option<&str>) -> Result<Policies, String> {
        let annotations = pod.map(|text| (annotation::POLICY.to_owned(), text.to_owned()));
        let annotations = Annotations(annotations.into_iter().collect::<BTreeMap<_, _>>());
        let config = Config { policy: Policy::from_json(node.as_bytes()).unwrap(), ..Config::default() };
        let policies = PodPolicies::new(&annotations, &config).map_err(|error| crate::chain(&error))?;
        Ok(Policies::from_json(&policies.node, &policies.pod).unwrap())
    }

    #[test]
    fn new_returns_the_policies_of_node_and_pod_unchanged() {
        assert_eq!(policies("{}", None).unwrap(), Policies::default());
        let (node, pod) = (r#"{"exec": []}"#, r#"{"exec": [["ls"]], "attach": false}"#);
        let parse = |text: &str| Policy::from_json(text.as_bytes()).unwrap();
        assert_eq!(policies(node, Some(pod)).unwrap(), Policies { node: parse(node), pod: parse(pod) });
    }

    #[test]
    fn invalid_annotation_is_rejected() {
        let error = policies("{}", Some(r#"{"exce": []}"#)).unwrap_err();
        assert!(
            error.starts_with("invalid annotation io.husk.policy: failed to parse the policy: unknown field"),
            "{error}"
        );
        assert!(policies("{}", Some("")).is_err());
    }
}
