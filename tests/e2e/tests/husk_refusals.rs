//! Refusals: clear errors for containers that Husk cannot run, and complete cleanup afterwards.
use std::fs;
use std::process::Command;

use husk_e2e::command::{Input, Output, Running};
use husk_e2e::cri::{expect_error, pods};
use husk_e2e::node::Config;
use husk_e2e::{case, spec};
use serde_json::json;

/// Runs a container with `configuration` as Husk's configuration. The run must fail with an error that contains
/// all `parts`. `case` checks for leftovers.
fn assert_refused(name: &str, configuration: &str, parts: &[&str]) {
    case(name, |case| {
        let _config = Config::set(configuration);
        case.busybox(&["echo", "must not run"]).output().expect_error(parts);
    });
}

#[test]
fn create_rejects_host_network() {
    case("net-host", |case| {
        case.sh("true").flags(&["--net-host"]).output().expect_error(&["network", "host"]);
        let run = case.sh("true").flags(&["--with-ns", "network:/proc/1/ns/net"]);
        run.output().expect_error(&["network", "host"]);
    });
}

#[test]
fn create_rejects_host_pid_and_ipc() {
    case("pid-host", |case| {
        for kind in ["pid", "ipc"] {
            let run = case.with_spec("true", |value| spec::remove_namespace(value, kind));
            run.output().expect_error(&[kind, "host"]);
        }
    });
}

#[test]
fn create_rejects_invalid_specification() {
    case("bundle", |case| {
        let run = case.with_spec("true", |spec| spec["root"]["path"] = json!("/no/such/root"));
        run.output().expect_error(&["/no/such/root"]);
        let run = case.with_spec("true", |spec| spec["process"]["args"] = json!([]));
        run.output().expect_error(&["args"]);
        let run = case.with_spec("true", |spec| spec["process"]["cwd"] = json!("not/absolute"));
        run.output().expect_error(&["cwd"]);
    });
}

#[test]
fn create_rejects_cgroups_path_that_cannot_be_created() {
    // No cgroup can be created below this cgroup (cgroup-v2.rst, cgroup.max.descendants).
    let closed = std::path::Path::new("/sys/fs/cgroup/husk-closed");
    fs::create_dir(closed).unwrap();
    fs::write(closed.join("cgroup.max.descendants"), "0").unwrap();
    case("cgroup-closed", |case| {
        let run = case.with_spec("true", |spec| spec["linux"]["cgroupsPath"] = json!("/husk-closed/one"));
        run.output().expect_error(&["cgroup", "/sys/fs/cgroup/husk-closed/one"]);
        let run = case.with_spec("true", |spec| spec["linux"]["cgroupsPath"] = json!("/../outside"));
        run.output().expect_error(&["cgroupsPath", "/../outside"]);
        // A path in systemd's format is refused, because this suite runs on hosts without systemd.
        let run = case.sh("true").flags(&["--cgroup", "husk_e2e.slice:husk:one"]);
        run.output().expect_error(&["husk-one.scope", "husk_e2e.slice", "/run/systemd/private"]);
        // Without a path, the container runs without a cgroup.
        let run = case.with_spec("echo runs", |spec| spec["linux"]["cgroupsPath"] = json!(""));
        run.output().expect_out("runs");
    });
    pods("husk-cgroup-closed", |pods| {
        let mut config = pods.config();
        config["linux"]["cgroup_parent"] = json!("/husk-closed");
        let error = pods.expect_error(&config);
        assert!(error.contains("create the cgroup /sys/fs/cgroup/husk-closed/"), "{error}");
    });
    fs::remove_dir(closed).unwrap();
}

/// Starts the shim in the case's directory as containerd does in a bundle.
fn start_shim(case: &husk_e2e::Case, id: &str) -> Output {
    let mut command = Command::new("containerd-shim-husk-v2");
    command.args(["-namespace", husk_e2e::NAMESPACE, "-address", "/run/containerd/containerd.sock"]);
    command.args(["-publish-binary", "/usr/bin/containerd", "-id", id, "start"]).current_dir(case.dir());
    command.env("TTRPC_ADDRESS", "/run/containerd/containerd.sock.ttrpc");
    Running::start(command, Input::Null).wait()
}

#[test]
fn shim_start_rejects_missing_or_malformed_config_json() {
    case("raw", |case| {
        for (number, content) in [None, Some("{ not json"), Some("[]")].into_iter().enumerate() {
            let id = format!("raw-{number}");
            if let Some(content) = content {
                fs::write(case.dir().join("config.json"), content).unwrap();
            }
            let output = start_shim(case, &id);
            assert!(output.code != 0 && output.err().contains("config.json"), "{}", output.describe());
        }
    });
}

#[test]
fn create_rejects_block_io_limits() {
    case("block-io", |case| {
        for (limits, part) in [
            (json!({ "blockIO": { "weight": 500 } }), "blockio.weight"),
            (json!({ "blockIO": { "throttleReadBpsDevice": [{ "major": 8, "minor": 0, "rate": 1 }] } }), "blockio"),
            (json!({ "unified": { "io.max": "8:0 rbps=1048576" } }), "unified.io.max"),
        ] {
            let run = case.with_spec("true", |spec| spec["linux"]["resources"] = limits.clone());
            run.output().expect_error(&[part]);
        }
    });
}

#[test]
fn sysctls_and_cgroup_files_outside_of_the_pod_are_rejected() {
    pods("husk-outside", |pods| {
        let mut config = pods.config();
        config["linux"]["sysctls"] = json!({ "kernel.core_pattern": "|/bin/sh" });
        let error = pods.expect_error(&config);
        assert!(
            error.contains("kernel.core_pattern") && error.contains("not in a separate kernel namespace"),
            "{error}"
        );

        let pod = pods.pod();
        let files = [
            ("/proc/sys/kernel/core_pattern", "must be a file name (no slashes)"),
            ("../memory.max", "must be a file name (no slashes)"),
            ("cgroup.procs", "cannot be set"),
            ("memory", "must be in the form controller.parameter"),
        ];
        for (file, reason) in files {
            let mut config = pod.sh("echo must not run");
            config["linux"]["resources"] = json!({ "unified": { file: "1" } });
            let container = pod.create(&config);
            let error = expect_error("StartContainer", &json!({ "container_id": container.id }));
            assert!(error.contains(&format!("unified.{file}")) && error.contains(reason), "{error}");
            container.remove();
        }
        let container = pod.start(&pod.sh("trap 'exit 0' TERM; sleep 100000 & wait"));
        let pattern = container.sh("cat /proc/sys/kernel/core_pattern");
        for (file, reason) in files {
            let linux = json!({ "unified": { file: "1" } });
            let request = json!({ "container_id": container.id, "linux": linux });
            let error = expect_error("UpdateContainerResources", &request);
            assert!(error.contains(&format!("unified.{file}")) && error.contains(reason), "{error}");
        }
        assert_eq!(container.sh("cat /proc/sys/kernel/core_pattern"), pattern);
    });
}

#[test]
fn create_rejects_missing_or_invalid_kernel_and_initrd() {
    assert_refused("no-kernel", "kernel = \"/no/such/vmlinux\"\n", &["/no/such/vmlinux", "no such file"]);
    assert_refused("bad-kernel", "kernel = \"/etc/passwd\"\n", &["/etc/passwd"]);
    assert_refused("no-initrd", "initrd = \"/no/such/initrd\"\n", &["/no/such/initrd", "no such file"]);
}

#[test]
fn guest_kernel_panic_is_in_the_error() {
    // The kernel panics, because the initrd has no init. The error has to contain the kernel's last message.
    assert_refused("panic", "initrd = \"/etc/passwd\"\n", &["kernel panic"]);
}

#[test]
fn create_rejects_too_low_memory_limit() {
    case("memory", |case| {
        let run = case.sh("true").flags(&["--memory-limit", "4194304"]);
        run.output().expect_error(&["the memory limit of 4194304 bytes is too low", "8 MiB", "min_memory_mib"]);
    });
}

#[test]
fn create_rejects_invalid_configuration() {
    assert_refused("unknown-key", "no_such_key = 1\n", &["/etc/husk/config.toml", "no_such_key"]);
    assert_refused("bad-value", "default_vcpus = 0\n", &["/etc/husk/config.toml", "default_vcpus"]);
    assert_refused("bad-toml", "this is no toml\n", &["/etc/husk/config.toml"]);
    case("unreadable", |case| {
        let _config = Config::directory();
        case.sh("true").output().expect_error(&["/etc/husk/config.toml", "directory"]);
    });
}

#[test]
fn create_rejects_forbidden_or_invalid_annotation() {
    case("annotation", |case| {
        let run = case.sh("true").flags(&["--annotation", "io.husk.kernel_params=quiet"]);
        run.output().expect_error(&["io.husk.kernel_params"]);
        let run = case.sh("true").flags(&["--annotation", "io.husk.vcpus=many"]);
        run.output().expect_error(&["io.husk.vcpus"]);
    });
}
