//! AppArmor: the node's profiles apply to containers. Under Husk, the guest's kernel enforces these profiles.

use std::fs;
use std::path::Path;
use std::process::Command;

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::try_call;
use serde_json::{Value, json};

use super::{run_once, security_context};

/// Loads a profile on the node, in place of any profile with the same name.
#[track_caller]
fn load_profile(dir: &Path, text: &str) {
    let path = dir.join("profile");
    fs::write(&path, text).unwrap();
    let status = Command::new("apparmor_parser").arg("--replace").arg("--skip-cache").arg(&path).status().unwrap();
    assert!(status.success(), "apparmor_parser failed: {status}");
}

#[test]
fn apparmor() {
    pods("conf-apparmor", |pods| {
        let pod = pods.pod();
        group("AppArmor", |group| {
            let apparmor = |kind: &'static str, name: &'static str| {
                move |config: &mut Value| {
                    security_context(config)["apparmor"] = json!({ "profile_type": kind, "localhost_ref": name });
                }
            };
            let current = "cat /proc/self/attr/apparmor/current";
            group.check("unconfined", || {
                assert_eq!(run_once(&pod, current, apparmor("Unconfined", "")), "unconfined");
            });
            group.check("the default profile", || {
                assert_eq!(run_once(&pod, current, |_| ()), "cri-containerd.apparmor.d (enforce)");
                assert_eq!(
                    run_once(&pod, current, apparmor("RuntimeDefault", "")),
                    "cri-containerd.apparmor.d (enforce)"
                );
            });
            group.check("a profile of the node, also for an exec", || {
                let profile = "profile husk-e2e flags=(attach_disconnected) { file, capability, network, signal,
                    deny /srv/** wl, }";
                load_profile(pods.dir(), profile);
                let write = format!("{current}; (echo x > /srv/y) 2>&1");
                let text = run_once(&pod, &write, apparmor("Localhost", "husk-e2e"));
                assert!(text.starts_with("husk-e2e (enforce)") && text.contains("denied"), "{text}");
                let mut config = pod.sh("sleep 1000");
                apparmor("Localhost", "husk-e2e")(&mut config);
                let container = pod.start(&config);
                assert_eq!(container.sh(current), "husk-e2e (enforce)");
                // After the node has loaded a new version of the profile, the next container gets this version.
                load_profile(pods.dir(), &profile.replace("/srv/**", "/mnt/**"));
                let text = run_once(&pod, "echo x > /srv/y && echo written", apparmor("Localhost", "husk-e2e"));
                assert_eq!(text, "written");
            });
            group.check("a missing profile is refused", || {
                let mut config = pod.sh("true");
                security_context(&mut config)["apparmor"] =
                    json!({ "profile_type": "Localhost", "localhost_ref": "localhost/no-such-profile" });
                let request = json!({ "pod_sandbox_id": pod.id, "config": config, "sandbox_config": pod.config });
                let created = try_call("CreateContainer", &request);
                assert!(
                    created
                        .and_then(|made| try_call("StartContainer", &json!({ "container_id": made["container_id"] })))
                        .is_err()
                );
            });
        });
    });
}
