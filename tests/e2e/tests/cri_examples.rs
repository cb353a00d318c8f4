//! Runs the example pods of deploy/kubernetes from their YAML files. `cri_builders` runs the image builders.

use std::time::Duration;

use husk_e2e::cri::{manifest, pods};
use husk_e2e::{BUSYBOX, PYTHON, node};

#[test]
fn web_server_example_serves_its_page() {
    pods("cri-web", |pods| {
        let manifest = include_str!("../../../deploy/kubernetes/web-server.yaml");
        let applied = manifest::apply(pods, manifest, &[("busybox:stable", BUSYBOX)]);
        applied.wait_ready(Duration::from_secs(60));
        let page = applied.get(80, "/index.html").unwrap();
        assert!(page.contains("hello from 6.") && !page.contains(&node::kernel_release()), "{page}");
    });
}

#[test]
fn untrusted_code_example_runs_to_completion() {
    pods("cri-untrusted", |pods| {
        let manifest = include_str!("../../../deploy/kubernetes/untrusted.yaml");
        let applied = manifest::apply(pods, manifest, &[("python:slim", PYTHON)]);
        let container = &applied.containers[0];
        assert_eq!(container.wait(), (0, "Completed".into()), "{}", container.log());
        assert!(container.log().contains("stdout F hello from a kernel of my own"), "{}", container.log());
    });
}
