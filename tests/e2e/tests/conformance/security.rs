//! Security contexts: users, capabilities, privileges and seccomp profiles.

use std::fs;

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::{call, try_call};
use serde_json::{Value, json};

use super::{run_once, security_context};

/// Returns a command that prints a field of `/proc/self/status`.
fn status(field: &str) -> String {
    format!("awk '/^{field}:/ {{print $2}}' /proc/self/status")
}

/// All capabilities of the node's kernel and of the guest's kernel. The last one is `CAP_CHECKPOINT_RESTORE` (40).
const ALL_CAPS: &str = "000001ffffffffff";

#[test]
fn users() {
    pods("conf-users", |pods| {
        let pod = pods.pod();
        group("Security context", |group| {
            group.check("RunAsUser", || {
                assert_eq!(
                    run_once(&pod, "id -u", |c| security_context(c)["run_as_user"] = json!({ "value": 1001 })),
                    "1001"
                );
            });
            group.check("RunAsUserName", || {
                assert_eq!(
                    run_once(&pod, "id -u", |c| security_context(c)["run_as_username"] = json!("tester")),
                    "1000"
                );
            });
            group.check("RunAsGroup", || {
                let text = run_once(&pod, "id -u; id -g", |config| {
                    security_context(config)["run_as_user"] = json!({ "value": 1001 });
                    security_context(config)["run_as_group"] = json!({ "value": 1002 });
                });
                assert_eq!(text, "1001\n1002");
            });
            group.check("RunAsGroup without a user is refused", || {
                let mut config = pod.sh("id");
                security_context(&mut config)["run_as_group"] = json!({ "value": 1002 });
                let request = json!({ "pod_sandbox_id": pod.id, "config": config, "sandbox_config": pod.config });
                assert!(try_call("CreateContainer", &request).is_err());
            });
            group.check("SupplementalGroups", || {
                let text = run_once(&pod, "id -G", |config| {
                    security_context(config)["run_as_user"] = json!({ "value": 1001 });
                    security_context(config)["supplemental_groups"] = json!([3001, 3002]);
                });
                let groups: Vec<&str> = text.split_whitespace().collect();
                assert!(groups.contains(&"3001") && groups.contains(&"3002"), "{text}");
            });
            // The image's /etc/group lists user 1000 in the groups 29, 44 and 2000.
            let groups = |policy: &str| {
                let text = run_once(&pod, "id -G", |config| {
                    security_context(config)["run_as_user"] = json!({ "value": 1000 });
                    security_context(config)["run_as_group"] = json!({ "value": 1000 });
                    security_context(config)["supplemental_groups"] = json!([3001]);
                    security_context(config)["supplemental_groups_policy"] = json!(policy);
                });
                let mut groups: Vec<u32> = text.split_whitespace().map(|group| group.parse().unwrap()).collect();
                groups.sort_unstable();
                groups
            };
            group.check("SupplementalGroupsPolicy Merge: the groups of the pod and of the image's /etc/group", || {
                assert_eq!(groups("Merge"), [29, 44, 1000, 2000, 3001]);
            });
            if call("Status", &json!({}))["features"]["supplemental_groups_policy"] == true {
                group.check("SupplementalGroupsPolicy Strict: only the pod's groups", || {
                    assert_eq!(groups("Strict"), [1000, 3001]);
                });
            }
            group.check("a read-only rootfs", || {
                let read_only = |config: &mut Value| security_context(config)["readonly_rootfs"] = json!(true);
                let text = run_once(&pod, "touch /srv/x 2>&1; touch /dev/shm/x && echo but not all", read_only);
                assert!(text.contains("ead-only") && text.ends_with("but not all"), "{text}");
            });
            group.check("a writable rootfs", || {
                assert_eq!(run_once(&pod, "touch /srv/x && echo written", |_| {}), "written");
            });
            group.check("no_new_privs, set and not set", || {
                let text = run_once(&pod, &status("NoNewPrivs"), |c| security_context(c)["no_new_privs"] = json!(true));
                assert_eq!((text.as_str(), run_once(&pod, &status("NoNewPrivs"), |_| {}).as_str()), ("1", "0"));
            });
            group.check("masked and read-only paths", || {
                let text =
                    run_once(&pod, "wc -c < /proc/meminfo; echo x 2>&1 > /proc/sys/kernel/domainname", |config| {
                        security_context(config)["masked_paths"] = json!(["/proc/meminfo"]);
                        security_context(config)["readonly_paths"] = json!(["/proc/sys"]);
                    });
                assert!(text.starts_with('0') && text.contains("ead-only"), "{text}");
            });
            group.check("oom_score_adj", || {
                let text = run_once(&pod, "cat /proc/self/oom_score_adj", |config| {
                    config["linux"]["resources"]["oom_score_adj"] = json!(777);
                });
                assert_eq!(text, "777");
            });
        });
    });
}

#[test]
fn capabilities() {
    pods("conf-capabilities", |pods| {
        let mut config = pods.config();
        security_context(&mut config)["privileged"] = json!(true);
        let pod = pods.run(config);
        let change = |change: Value| move |config: &mut Value| security_context(config)["capabilities"] = change;
        group("Capabilities and privileges", |group| {
            group.check("default capabilities", || {
                assert_eq!(run_once(&pod, &status("CapEff"), |_| {}), "00000000a80425fb");
            });
            group.check("one capability added", || {
                let text = run_once(&pod, &status("CapEff"), change(json!({ "add_capabilities": ["SYS_ADMIN"] })));
                assert_eq!(text, "00000000a82425fb");
            });
            group.check("one capability dropped", || {
                let text = run_once(&pod, &status("CapEff"), change(json!({ "drop_capabilities": ["CHOWN"] })));
                assert_eq!(text, "00000000a80425fa");
            });
            group.check("all capabilities added", || {
                assert_eq!(run_once(&pod, &status("CapEff"), change(json!({ "add_capabilities": ["ALL"] }))), ALL_CAPS);
            });
            group.check("all capabilities dropped, one added", || {
                let changes = json!({ "drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"] });
                assert_eq!(run_once(&pod, &status("CapEff"), change(changes)), "0000000000000400");
            });
            group.check("privileged: capabilities, devices, mounts", || {
                let script = format!(
                    "{}; mkdir /srv/m && mount -t tmpfs none /srv/m && echo mounted; test -e /dev/kmsg && echo devices;
                     test -w /sys/fs/cgroup/cgroup.procs && echo cgroups",
                    status("CapEff")
                );
                let text = run_once(&pod, &script, |config| security_context(config)["privileged"] = json!(true));
                assert_eq!(text, format!("{ALL_CAPS}\nmounted\ndevices\ncgroups"));
            });
            group.check("not privileged: cannot mount, sees no /dev/kmsg, cannot write to cgroups", || {
                let script = "mkdir /srv/m; mount -t tmpfs none /srv/m 2> /dev/null || echo refused;
                    test -e /dev/kmsg || echo hidden; touch /sys/fs/cgroup/x 2> /dev/null || echo closed";
                assert_eq!(run_once(&pod, script, |_| {}), "refused\nhidden\nclosed");
            });
        });
    });
}

#[test]
fn profiles() {
    pods("conf-profiles", |pods| {
        let pod = pods.pod();
        let profile = pods.dir().join("profile.json");
        let rules = json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }]);
        fs::write(&profile, json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules }).to_string()).unwrap();
        let seccomp = |kind: &str, path: &str| {
            let profile = json!({ "profile_type": kind, "localhost_ref": path });
            move |config: &mut Value| security_context(config)["seccomp"] = profile
        };
        group("Seccomp and other profiles", |group| {
            group.check("seccomp: the runtime's default", || {
                assert_eq!(run_once(&pod, &status("Seccomp"), seccomp("RuntimeDefault", "")), "2");
            });
            group.check("seccomp: unconfined", || {
                assert_eq!(run_once(&pod, &status("Seccomp"), seccomp("Unconfined", "")), "0");
            });
            group.check("seccomp: a profile of the node", || {
                let path = profile.to_string_lossy().into_owned();
                let text =
                    run_once(&pod, "mkdir /srv/x 2>&1; touch /srv/y && echo touched", seccomp("Localhost", &path));
                assert!(text.contains("not permitted") && text.ends_with("touched"), "{text}");
            });
            group.check("seccomp: a missing profile is refused", || {
                let mut config = pod.sh("true");
                seccomp("Localhost", "/no/such/profile")(&mut config);
                let request = json!({ "pod_sandbox_id": pod.id, "config": config, "sandbox_config": pod.config });
                assert!(try_call("CreateContainer", &request).is_err());
            });
        });
    });
}
