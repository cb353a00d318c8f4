//! Tests Husk's pod annotations, which the node's configuration can allow.

use serde_json::json;

use super::pod::Pods;
use crate::node::Config;

const VCPUS: &str = "io.husk.vcpus";
const MEMORY: &str = "io.husk.memory_mib";
const PARAMS: &str = "io.husk.kernel_params";

fn allow(names: &[&str]) -> Config {
    Config::set(&format!("allowed_annotations = {names:?}\n"))
}

/// Tests that each annotation takes effect if it is allowed, and that a pod with a disallowed annotation is rejected.
#[track_caller]
pub fn check_allow_list(pods: &Pods) {
    {
        let _config = allow(&[VCPUS, MEMORY, PARAMS]);
        let mut config = pods.config();
        config["annotations"] = json!({ VCPUS: "2", MEMORY: "333", PARAMS: "husk.test=word mitigations=off" });
        let pod = pods.run(config);
        let container = pod.sleeper();
        assert_eq!(container.sh("nproc"), "2");
        let mib: u64 = container.sh("awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").parse().unwrap();
        assert!((280..333).contains(&mib), "the guest has {mib} MiB of memory, expected 280 to 332 MiB");
        let line = container.sh("cat /proc/cmdline");
        assert!(line.contains(" husk.test=word mitigations=off"), "kernel parameters are missing in {line}");
        pod.stop();
        pod.remove();
    }
    for (name, value) in [(VCPUS, "2"), (MEMORY, "300"), (PARAMS, "husk.test=word")] {
        let others: Vec<&str> = [VCPUS, MEMORY, PARAMS].into_iter().filter(|other| *other != name).collect();
        let refused = |allowed: &[&str], value: &str| {
            let _config = allow(allowed);
            let mut config = pods.config();
            config["annotations"] = json!({ name: value });
            pods.expect_error(&config)
        };
        let error = refused(&others, value);
        assert!(error.contains(name) && error.contains("not allowed on this node"), "{error}");
        // The value is neither a valid number nor a valid kernel parameter.
        let error = refused(&[name], "zw\u{f6}lf");
        assert!(error.contains(name), "{error}");
    }
}
