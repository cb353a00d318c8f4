//! Tests of the node's and the pod's agent policy, and of the configured digests of guest kernel and initrd.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use husk_e2e::command::{Input, Output, Running};
use husk_e2e::cri::manifest::READ_ONLY;
use husk_e2e::cri::spdy::PortForward;
use husk_e2e::cri::stream::Stream;
use husk_e2e::cri::{Pod, PodContainer, call, expect_error, pods};
use husk_e2e::node::Config;
use husk_e2e::{BUSYBOX, KUBERNETES, case, node};
use serde_json::{Value, json};

const SLEEP: &str = "trap 'exit 0' TERM; sleep 100000 & wait";

fn context(config: &mut Value) -> &mut Value {
    &mut config["linux"]["security_context"]
}

/// Returns the configuration that the kubelet makes for an unprivileged container with one capability.
fn plain(pod: &Pod, script: &str) -> Value {
    let mut config = pod.sh(script);
    context(&mut config)["readonly_paths"] = json!(READ_ONLY);
    context(&mut config)["capabilities"] = json!({ "drop_capabilities": ["ALL"], "add_capabilities": ["CHOWN"] });
    config
}

/// Asserts that the agent refuses a container, and that the error contains `expected`.
#[track_caller]
fn assert_refused(pod: &Pod, config: &Value, expected: &str) {
    let container = pod.create(config);
    let error = expect_error("StartContainer", &json!({ "container_id": container.id }));
    assert!(error.contains(&expected.to_lowercase()), "expected {expected:?} in: {error}");
    container.remove();
}

/// Asserts that the agent refuses an exec, and that the error contains `expected`.
#[track_caller]
fn assert_exec_refused(container: &PodContainer, command: &[&str], expected: &str) {
    let error = container.try_exec(command).unwrap_err().message;
    assert!(error.contains(&format!("exec of {command:?} in container ")), "{error}");
    assert!(error.contains(expected), "expected {expected:?} in: {error}");
}

/// Runs a command as `kubectl exec -it` does. Returns the command's output and status.
#[track_caller]
fn exec_on_terminal(container: &PodContainer, command: &[&str]) -> (String, String) {
    let request = json!({
        "container_id": container.id, "cmd": command, "stdin": true, "stdout": true, "tty": true,
    });
    let (out, _, status) = Stream::connect(call("Exec", &request)["url"].as_str().unwrap()).finish();
    (String::from_utf8(out).unwrap(), status)
}

/// Runs a command in the container with `ctr`, which is a client that bypasses the CRI.
#[track_caller]
fn exec_by_ctr(container: &PodContainer, options: &[&str], command: &[&str]) -> Output {
    let mut ctr = Command::new("ctr");
    ctr.args(["-n", KUBERNETES, "tasks", "exec", "--exec-id", "by-ctr"]).args(options).arg(&container.id).args(command);
    Running::start(ctr, Input::Null).wait()
}

/// Waits until containerd's log has a warning that contains the pod's id and all `parts`.
#[track_caller]
fn assert_logged(pod: &Pod, parts: &[&str]) {
    let found = node::eventually(Duration::from_secs(10), || {
        let log = node::log_tail(400);
        let of_pod = |line: &&str| line.contains(&pod.id) && line.contains("level=warning");
        log.lines().filter(of_pod).any(|line| parts.iter().all(|part| line.contains(part))).then_some(())
    });
    assert!(found.is_some(), "the log has no warning of the pod with {parts:?}:\n{}", node::log_tail(60));
}

#[track_caller]
fn assert_port_forward_refused(pod: &Pod, port: u16) {
    let answer = call("PortForward", &json!({ "pod_sandbox_id": pod.id, "port": [] }));
    let session = PortForward::connect(answer["url"].as_str().unwrap());
    let connection = session.open(port, 0);
    assert!(connection.read_to_end().is_empty());
}

#[test]
fn policy_of_the_node_is_enforced() {
    let _config = Config::set(
        "policy.exec = [[\"id\", \"-u\"]]\npolicy.attach = false\npolicy.port_forward = false\n\
         policy.privileged = false\npolicy.capabilities = [\"CHOWN\"]\npolicy.mounts = [\"/data\"]\n",
    );
    pods("policy-node", |pods| {
        let mut config = pods.config();
        // The pod is privileged, because containerd itself refuses a privileged container in an unprivileged pod.
        context(&mut config)["privileged"] = json!(true);
        let pod = pods.run(config);
        let dir = pods.dir().join("volume");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("file"), "content").unwrap();
        let with_volume = |source: &str, path: &str| {
            let mut config = plain(&pod, SLEEP);
            config["mounts"] = json!([{ "host_path": source, "container_path": path }]);
            config
        };
        let volume = dir.to_str().unwrap();
        let container = pod.start(&with_volume(volume, "/data/deep"));

        let rule = "is refused by the rule \"exec\" of the node's policy: ";
        assert_eq!(container.exec(&["id", "-u"]).out, "0\n");
        for other in [&["sh", "-c", "id"][..], &["id"], &["id", "-u", "root"]] {
            assert_exec_refused(&container, other, &format!("{rule}the command is not listed"));
        }
        assert_eq!(exec_on_terminal(&container, &["id", "-u"]).0, "0\r\n");
        let (out, status) = exec_on_terminal(&container, &["sh"]);
        let refusal = format!("exec of [\\\"sh\\\"] in container {} is refused by the rule \\\"exec\\\"", container.id);
        assert!(out.is_empty() && status.contains(&refusal), "{out}{status}");
        assert_logged(&pod, &["audit: exec of", "the node's policy: the command is not listed"]);
        exec_by_ctr(&container, &[], &["id", "-u"]).expect_out("0");
        exec_by_ctr(&container, &["--user", "1000"], &["id", "-u"])
            .expect_error(&[rule, "the exec's user differs from the container's"]);
        exec_by_ctr(&container, &["--cwd", "/tmp"], &["id", "-u"])
            .expect_error(&[rule, "the exec's working directory differs from the container's"]);

        assert_port_forward_refused(&pod, 8099);
        assert_logged(&pod, &["audit: port forwarding to", ":8099 is refused by the rule"]);

        let changed = |change: &dyn Fn(&mut Value)| {
            let mut config = plain(&pod, "echo must not run");
            change(&mut config);
            config
        };
        let refused = |change: &dyn Fn(&mut Value), expected: &str| assert_refused(&pod, &changed(change), expected);
        let rule = "is refused by the rule \"attach\" of the node's policy";
        refused(&|config| config["stdin"] = json!(true), &format!("with stdin {rule}"));
        refused(&|config| config["tty"] = json!(true), &format!("with a terminal {rule}"));
        let rule = "is refused by the rule \"capabilities\" of the node's policy";
        let add =
            |config: &mut Value| context(config)["capabilities"]["add_capabilities"] = json!(["CHOWN", "NET_RAW"]);
        refused(&add, "CAP_NET_RAW for container");
        refused(&|config| context(config)["capabilities"] = json!({}), rule);
        let rule = "is refused by the rule \"privileged\" of the node's policy: ";
        let expected = format!("{rule}the container has access to all devices");
        refused(&|config| context(config)["privileged"] = json!(true), &expected);
        refused(&|config| context(config)["readonly_paths"] = json!([]), &format!("{rule}/proc/sys or /proc/sysrq"));
        let expected = format!("{rule}the container mounts a directory or device");
        assert_refused(&pod, &with_volume("/proc", "/data/proc"), &expected);
        let rule = "is refused by the rule \"mounts\" of the node's policy: the path is not listed";
        assert_refused(&pod, &with_volume(volume, "/database"), "the volume at \"/database\" of container");
        assert_refused(&pod, &with_volume(volume, "/data/../etc"), rule);

        let mut config = with_volume(volume, "/data");
        config["command"] = json!(["cat", "/data/file"]);
        let reader = pod.start(&config);
        assert_eq!(reader.wait(), (0, "Completed".into()));
        assert!(reader.log().contains("content"), "{}", reader.log());
        container.stop(0);
    });
}

#[test]
fn policy_of_the_pod_can_only_forbid_more() {
    let _config = Config::set("policy.exec = [[\"id\", \"-u\"], [\"id\", \"-g\"]]\n");
    pods("policy-pod", |pods| {
        let mut config = pods.config();
        let policy = json!({ "exec": [["id", "-u"], ["date"]], "port_forward": false, "mounts": ["/data"] });
        config["annotations"] = json!({ "io.husk.policy": policy.to_string() });
        let pod = pods.run(config);
        let container = pod.sleeper();
        assert_eq!(container.exec(&["id", "-u"]).out, "0\n");
        // The node's policy forbids `date`, and the pod's policy forbids `id -g`.
        assert_exec_refused(&container, &["date"], "by the rule \"exec\" of the node's policy");
        assert_exec_refused(&container, &["id", "-g"], "by the rule \"exec\" of the pod's policy");
        assert_port_forward_refused(&pod, 8098);
        assert_logged(&pod, &["audit: port forwarding to", "of the pod's policy"]);
        let mut config = pod.sh("echo must not run");
        config["mounts"] = json!([{ "host_path": pods.dir().to_str().unwrap(), "container_path": "/x" }]);
        assert_refused(&pod, &config, "is refused by the rule \"mounts\" of the pod's policy");
        container.stop(0);
    });
}

#[test]
fn pod_with_an_invalid_or_disallowed_policy_is_rejected() {
    let rejected = |configuration: &str, policy: &str, parts: &[&str]| {
        let _config = Config::set(configuration);
        pods("policy-invalid", |pods| {
            let mut config = pods.config();
            config["annotations"] = json!({ "io.husk.policy": policy });
            let error = pods.expect_error(&config);
            assert!(
                parts.iter().all(|part| error.contains(part)),
                "the error for the policy {policy} must contain {parts:?}: {error}"
            );
        });
    };
    let annotation = "io.husk.policy";
    rejected("allowed_annotations = [\"io.husk.vcpus\"]\n", "{}", &[annotation, "not allowed on this node"]);
    rejected("", r#"{"exce": []}"#, &[annotation, "unknown field `exce`"]);
    rejected("", r#"{"exec": "none"}"#, &[annotation, "expected \"any\" or a list"]);
    let parts = ["/etc/husk/config.toml:1", "unknown capability \"cap_all\""];
    rejected("policy.capabilities = [\"CAP_ALL\"]\n", "{}", &parts);
}

#[test]
fn images_are_allowed_by_digest_only_and_no_exec_is_allowed() {
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let _config = Config::set(&format!("policy.images = [\"{digest}\"]\npolicy.exec = []\n"));
    let named = |reference: &str| format!("io.kubernetes.cri.image-name={reference}");
    case("policy-images", |case| {
        let run = |reference: &str| case.sh("echo up; exec sleep 1000").flags(&["--annotation", &named(reference)]);
        let container = case.container(run(&format!("example.com/app@{digest}")));
        container.exec("none", &["true"]).expect_error(&["is refused by the rule \"exec\" of the node's policy"]);
        container.kill();
        let other = format!("example.com/app@{}", digest.replace("0123", "4567"));
        run(&other)
            .output()
            .expect_error(&["is refused by the rule \"images\" of the node's policy: the digest is not listed"]);
    });
    // The reference of the image has a tag, but no digest.
    pods("policy-image-tag", |pods| {
        let pod = pods.pod();
        let expected = format!("image \"{BUSYBOX}\" of container");
        assert_refused(&pod, &pod.sh("echo must not run"), &expected);
        assert_logged(&pod, &["audit: image", "the image must be named by its digest"]);
    });
}

const KERNEL: &str = "/usr/local/share/husk/vmlinux";
const INITRD: &str = "/usr/local/share/husk/initrd.cpio";
const COPIES: &str = "/run/husk-images";

fn sha256(path: impl AsRef<Path>) -> String {
    let mut command = Command::new("sha256sum");
    command.arg(path.as_ref());
    Running::start(command, Input::Null).wait().expect_code(0).out().split_whitespace().next().unwrap().to_owned()
}

/// Returns the names and inode numbers of the files in `COPIES`, which are copies of a guest kernel and of an initrd.
/// The name of a copy begins with the copy's digest.
fn copies() -> BTreeMap<String, u64> {
    let entries = fs::read_dir(COPIES).into_iter().flatten().map(Result::unwrap);
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().ino())).collect()
}

#[test]
fn vm_boots_only_if_kernel_and_initrd_have_the_configured_digests() {
    let (kernel, initrd) = (sha256(KERNEL), sha256(INITRD));
    case("digests", |case| {
        {
            let _config = Config::set(&format!("kernel_sha256 = \"{kernel}\"\ninitrd_sha256 = \"{initrd}\"\n"));
            case.sh("echo runs").output().expect_out("runs");
            let first = copies();
            let digests: Vec<&str> = first.keys().map(|name| name.split_once('-').unwrap().0).collect();
            assert!(
                digests.len() == 2 && digests.contains(&&*kernel) && digests.contains(&&*initrd),
                "expected a copy of the kernel and a copy of the initrd: {first:?}"
            );
            assert_eq!(fs::metadata(COPIES).unwrap().mode() & 0o777, 0o700);
            case.sh("echo runs again").output().expect_out("runs again");
            assert_eq!(copies(), first, "the second start has made new copies");
        }
        let zeros = "0".repeat(64);
        {
            let _config = Config::set(&format!("kernel_sha256 = \"{zeros}\"\n"));
            let found = format!("found {kernel}");
            let parts = ["guest kernel", KERNEL, &format!("expected SHA-256 {zeros}"), &found, "kernel_sha256"];
            case.sh("echo must not run").output().expect_error(&parts);
            let output = Command::new("husk").arg("check").output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(!output.status.success() && text.contains(&found), "{text}");
        }
        let copy = case.dir().join("initrd");
        fs::copy(INITRD, &copy).unwrap();
        let _config = Config::set(&format!("initrd = {copy:?}\ninitrd_sha256 = \"{initrd}\"\n"));
        case.sh("echo runs").output().expect_out("runs");
        let mut changed = fs::read(&copy).unwrap();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&copy, changed).unwrap();
        let found = format!("found {}", sha256(&copy));
        let parts = [copy.to_str().unwrap(), &format!("expected SHA-256 {initrd}"), &found, "initrd_sha256"];
        case.sh("echo must not run").output().expect_error(&parts);
    });
    fs::remove_dir_all(COPIES).unwrap();
}
