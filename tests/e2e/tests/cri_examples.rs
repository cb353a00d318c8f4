//! The example pods of deploy/kubernetes, from their YAML; those that build images are in a suite of their own.

use husk_e2e::PYTHON;
use husk_e2e::cri::{manifest, pods};

#[test]
fn untrusted_code_runs() {
    pods("cri-untrusted", |pods| {
        let manifest = include_str!("../../../deploy/kubernetes/untrusted.yaml");
        let applied = manifest::apply(pods, manifest, &[("python:slim", PYTHON)]);
        let container = &applied.containers[0];
        assert_eq!(container.wait(), (0, "Completed".into()), "{}", container.log());
        assert!(container.log().contains("stdout F hello from a kernel of my own"), "{}", container.log());
    });
}
