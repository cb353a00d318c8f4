//! Pods with the kubelet's systemd cgroup driver: each VM has a scope. Except for the limit of threads and the order of
//! its stop, the scope has the same properties as runc's scopes.
//!
//! Requires: systemd

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, Pods, call, pods, pods_with_handler};
use husk_e2e::disk::{Disk, TERM_WRITER_PROGRAM};
use husk_e2e::{PYTHON, case, node};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Timeout for systemd to notice an empty cgroup, and for changed limits to be applied.
const SETTLE: Duration = Duration::from_secs(30);

/// Runs `systemctl` and returns its output.
#[track_caller]
fn systemctl(args: &[&str]) -> String {
    run("systemctl", args)
}

#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?} failed: {err}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// Returns a unit's properties.
#[track_caller]
fn show(unit: &str) -> BTreeMap<String, String> {
    let text = systemctl(&["show", unit]);
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Returns a pod's configuration with the systemd cgroup driver, and the name of the pod's slice.
fn in_a_slice(pods: &Pods) -> (Value, String) {
    let mut config = pods.config();
    let name = config["metadata"]["name"].as_str().unwrap().replace('-', "_");
    let slice = format!("kubepods-pod{name}.slice");
    config["linux"]["cgroup_parent"] = format!("/kubepods.slice/{slice}").into();
    (config, slice)
}

fn unit(pod: &Pod) -> String {
    format!("cri-containerd-{}.scope", pod.id)
}

fn file(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("failed to read {}: {error}", path.display()))
        .trim()
        .to_owned()
}

/// Returns a unit's cgroup directory.
#[track_caller]
fn cgroup(unit: &str) -> PathBuf {
    let group = show(unit)["ControlGroup"].clone();
    assert!(group.ends_with(unit), "the cgroup path of {unit} must end with the unit's name: {group:?}");
    Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/'))
}

/// Returns the kernel's limits of a cgroup.
fn limits(dir: &Path) -> [String; 4] {
    ["memory.max", "memory.high", "cpu.max", "cpuset.cpus"].map(|name| file(dir, name))
}

/// Returns systemd's limits of a unit, in the kernel's format.
#[track_caller]
fn systemd_limits(unit: &str) -> [String; 4] {
    let shown = show(unit);
    let number = |key: &str| if shown[key] == "infinity" { "max".to_owned() } else { shown[key].clone() };
    // systemd prints the CPU time per second in s or in ms.
    let quota = &shown["CPUQuotaPerSecUSec"];
    let millis = quota.strip_suffix("ms").and_then(|text| text.parse::<f64>().ok());
    let millis = millis.or_else(|| Some(quota.strip_suffix('s')?.parse::<f64>().ok()? * 1000.0));
    let cpu = millis.map_or_else(|| "max 100000".to_owned(), |millis| format!("{:.0} 100000", millis * 100.0));
    [number("MemoryMax"), number("MemoryHigh"), cpu, shown.get("AllowedCPUs").cloned().unwrap_or_default()]
}

/// Reloads all units, and then makes systemd write the unit's CPU and memory properties. The write would remove limits
/// that systemd does not know. Fails unless the cgroup has all its limits and controllers afterwards.
#[track_caller]
fn assert_limits_survive_reload(unit: &str, dir: &Path) {
    let controllers = || file(dir.parent().unwrap(), "cgroup.subtree_control");
    let had = (limits(dir), controllers());
    systemctl(&["daemon-reload"]);
    assert_eq!((limits(dir), controllers()), had);
    for name in ["memory.max", "memory.high", "cpu.max"] {
        fs::write(dir.join(name), "max").unwrap();
    }
    let weight = if file(dir, "cpu.weight") == "77" { "78" } else { "77" };
    systemctl(&["set-property", "--runtime", unit, &format!("CPUWeight={weight}"), &format!("MemoryLow={weight}M")]);
    let back = node::eventually(SETTLE, || ((limits(dir), controllers()) == had).then_some(()));
    assert!(back.is_some(), "{unit} has limits {:?} and controllers {}; expected {had:?}", limits(dir), controllers());
}

/// Waits until both the kernel and systemd have the CPU quota `quota`, the cpuset `cpus` and a memory limit of at least
/// `least_mib` MiB.
#[track_caller]
fn wait_for_limits(unit: &str, dir: &Path, quota: &str, cpus: &str, least_mib: u64) {
    let applied = node::eventually(SETTLE, || {
        let [max, _, cpu, set] = limits(dir);
        let range = least_mib * MIB..(least_mib + 160) * MIB;
        let max = max.parse().ok().filter(|max| range.contains(max));
        (max.is_some() && cpu == quota && set == cpus && systemd_limits(unit) == limits(dir)).then_some(())
    });
    assert!(
        applied.is_some(),
        "{unit}: expected CPU quota {quota}, cpuset {cpus:?} and memory from {least_mib} MiB; the kernel has {:?}, systemd has {:?}",
        limits(dir),
        systemd_limits(unit)
    );
}

/// Returns a container's configuration with limits.
fn limited(pod: &Pod, millis: u64, mib: u64, cpus: &str) -> Value {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["linux"]["resources"] = resources(millis, mib, cpus);
    config
}

fn resources(millis: u64, mib: u64, cpus: &str) -> Value {
    let memory = mib * MIB;
    json!({ "cpu_quota": millis * 100, "cpu_period": 100_000, "memory_limit_in_bytes": memory, "cpuset_cpus": cpus })
}

/// Waits until a unit is no longer loaded. Also asserts that no unit has failed.
#[track_caller]
fn wait_until_unloaded(unit: &str) {
    let gone = node::eventually(SETTLE, || (show(unit)["LoadState"] == "not-found").then_some(()));
    assert!(gone.is_some(), "the unit {unit} is still loaded: {:?}\n{}", show(unit), node::log_tail(20));
    assert_eq!(systemctl(&["--failed", "--plain", "--no-legend"]), "");
}

#[test]
fn scope_has_runcs_properties_and_systemd_keeps_its_limits() {
    pods("cri-systemd", |pods| {
        let (mut config, slice) = in_a_slice(pods);
        config["linux"]["resources"] = resources(500, 128, "");
        let pod = pods.run(config.clone());
        let name = unit(&pod);
        let shown = show(&name);
        config["metadata"]["name"] = "by-runc".into();
        config["metadata"]["uid"] = "by-runc".into();
        let other = pods.run_with_handler("runc", config);
        let expected = show(&unit(&other));
        for key in ["LoadState", "ActiveState", "SubState", "Slice", "Transient", "Delegate", "DelegateControllers"]
            .into_iter()
            .chain(["DefaultDependencies", "CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"])
            .chain(["KillMode", "OOMPolicy"])
        {
            assert_eq!(shown.get(key), expected.get(key), "property {key} differs between Husk's scope and runc's");
        }
        assert_eq!([&shown["ActiveState"], &shown["Slice"], &shown["Delegate"]], ["active", slice.as_str(), "yes"]);
        // At the node's shutdown, systemd stops Husk's scope after the kubelet and before containerd.
        for (key, unit) in [("Conflicts", "shutdown.target"), ("Before", "kubelet"), ("After", "containerd.service")] {
            assert!(shown[key].contains(unit), "{key}={}", shown[key]);
        }
        // For TasksMax, runc's scope has systemd's default. Husk's scope has the maximum number of a pod's threads
        // on the host.
        assert_eq!(shown["TasksMax"], "2048");
        other.stop();
        call("RemovePodSandbox", &json!({ "pod_sandbox_id": other.id }));
        wait_until_unloaded(&unit(&other));

        // All threads of the VMM and of the shim are in the scope's cgroup.
        let dir = cgroup(&name);
        for pid in [pod.pid(), shim(&pod)] {
            for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
                assert_eq!(file(&task.path(), "cgroup"), format!("0::{}", shown["ControlGroup"]));
            }
        }
        let controllers = file(dir.parent().unwrap(), "cgroup.subtree_control");
        assert!(
            ["cpu", "cpuset", "memory", "pids"].iter().all(|name| controllers.split(' ').any(|one| one == *name)),
            "the slice lacks a controller: {controllers}"
        );

        let first = pod.start(&limited(&pod, 500, 128, "1"));
        wait_for_limits(&name, &dir, "75000 100000", "1", 128);
        assert_limits_survive_reload(&name, &dir);
        let second = pod.start(&limited(&pod, 255, 64, "2"));
        // The containers' limits and the overhead add up to 1005 milli-CPUs, or 100.5 % of a CPU. systemd rounds up to
        // whole percents.
        wait_for_limits(&name, &dir, "101000 100000", "1-2", 192);
        call("UpdateContainerResources", &json!({ "container_id": first.id, "linux": resources(1000, 256, "1") }));
        wait_for_limits(&name, &dir, "151000 100000", "1-2", 320);
        assert_limits_survive_reload(&name, &dir);
        assert_eq!(first.sh("cat /sys/fs/cgroup/memory.max"), (256 * MIB).to_string());
        assert_eq!(second.sh("echo still here"), "still here");

        pod.stop();
        pod.remove();
        wait_until_unloaded(&name);
        assert!(
            !dir.exists() && dir.parent().unwrap().exists(),
            "the scope's cgroup has to be removed, but the slice has to stay for the kubelet"
        );
        systemctl(&["stop", &slice]);
    });
}

/// Returns the pid of a pod's shim.
fn shim(pod: &Pod) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pod.pid())).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn pod_of_the_shim_sandboxer_has_a_scope() {
    pods_with_handler("cri-systemd-shim", "husk-sandbox", |pods| {
        let (mut config, slice) = in_a_slice(pods);
        config["linux"]["resources"] = resources(500, 128, "");
        let pod = pods.run(config);
        let name = unit(&pod);
        let container = pod.start(&limited(&pod, 500, 128, ""));
        let dir = cgroup(&name);
        wait_for_limits(&name, &dir, "75000 100000", "", 128);
        assert_eq!(container.sh("echo runs"), "runs");
        pod.stop();
        pod.remove();
        wait_until_unloaded(&name);
        systemctl(&["stop", &slice]);
    });
}

#[test]
fn stop_of_the_scope_ends_the_pod_in_order() {
    need_image(PYTHON);
    pods("cri-systemd-stop", |pods| {
        let (config, slice) = in_a_slice(pods);
        let disk = Disk::new(&pods.dir().join("disk"), 4);
        let pod = pods.run(config);
        let name = unit(&pod);
        let dir = cgroup(&name);
        let mut config = pod.python(TERM_WRITER_PROGRAM);
        config["devices"] = json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "rwm" }]);
        let writer = pod.start(&config);
        writer.wait_for("ready");
        systemctl(&["stop", &name]);
        assert_eq!(disk.read_written(), "changed");
        assert_eq!(writer.wait().0, 7);
        wait_until_unloaded(&name);
        pod.stop();
        pod.remove();
        assert!(!dir.exists());
        systemctl(&["stop", &slice]);
    });
}

#[test]
fn killed_shim_leaves_no_unit() {
    pods("cri-systemd-killed", |pods| {
        let (config, slice) = in_a_slice(pods);
        let pod = pods.run(config);
        let name = unit(&pod);
        let container = pod.sleeper();
        let dir = cgroup(&name);
        node::send_signal(shim(&pod), Signal::SIGKILL);
        wait_until_unloaded(&name);
        // containerd failed to reach the task, and retries the deletion after a second. Until then, containerd does
        // not remove the container. Therefore the test waits for the container's exit.
        container.wait();
        pod.stop();
        pod.remove();
        assert!(!dir.exists());
        systemctl(&["stop", &slice]);
    });
}

#[test]
fn create_replaces_a_failed_unit_and_rejects_an_active_one() {
    case("systemd-units", |case| {
        let scope = |id: &str| format!("husk-{id}.scope");
        let group = |id: &str| format!("husk_e2e.slice:husk:{id}");
        // In the first case, the unit has failed, because its scope has exceeded RuntimeMaxSec.
        let run = case.sh("cat /proc/1/cgroup");
        let (id, name) = (run.id().to_owned(), scope(run.id()));
        let timed = ["--scope", "--quiet", "--unit", &name, "-p", "RuntimeMaxSec=100ms", "sleep", "100"];
        assert!(!Command::new("systemd-run").args(timed).status().unwrap().success());
        let failed = node::eventually(SETTLE, || (show(&name)["ActiveState"] == "failed").then_some(()));
        assert!(failed.is_some(), "the unit {name} has not failed: {:?}", show(&name));
        run.flags(&["--cgroup", &group(&id)]).output().expect_code(0);
        wait_until_unloaded(&name);
        assert!(Path::new("/sys/fs/cgroup/husk_e2e.slice").exists());

        // In the second case, the unit is active.
        let run = case.sh("echo not reached");
        let (id, name) = (run.id().to_owned(), scope(run.id()));
        let mut running = Command::new("systemd-run");
        let mut running = running.args(["--scope", "--quiet", "--unit", &name, "sleep", "100"]).spawn().unwrap();
        assert!(node::eventually(SETTLE, || (show(&name)["ActiveState"] == "active").then_some(())).is_some());
        let output = run.flags(&["--cgroup", &group(&id)]).output();
        output.expect_error(&[&name, "already loaded", "UnitExists"]);
        assert_eq!(show(&name)["ActiveState"], "active");
        running.kill().unwrap();
        running.wait().unwrap();
        wait_until_unloaded(&name);

        // In the third case, the scope cannot start, because its slice is masked.
        systemctl(&["mask", "--runtime", "husk_masked.slice"]);
        let run = case.sh("echo not reached");
        let (id, name) = (run.id().to_owned(), scope(run.id()));
        let output = run.flags(&["--cgroup", &format!("husk_masked.slice:husk:{id}")]).output();
        output.expect_error(&[&name, "husk_masked.slice", "masked"]);
        wait_until_unloaded(&name);
        systemctl(&["unmask", "--runtime", "husk_masked.slice"]);
        systemctl(&["stop", "husk_e2e.slice"]);
    });
}
