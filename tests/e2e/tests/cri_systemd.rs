//! Pods on a host with systemd, whose kubelet has the cgroup driver of that name: the scope is a unit as runc's is.
//!
//! Requires: systemd

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::{Pod, Pods, call, pods, pods_of};
use husk_e2e::{case, node};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// How long systemd may take to see that a cgroup is empty, and what has grown or shrunk to be seen.
const SETTLE: Duration = Duration::from_secs(30);

/// Runs `systemctl`; gives what it prints.
#[track_caller]
fn systemctl(args: &[&str]) -> String {
    run("systemctl", args)
}

#[track_caller]
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {err}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// A unit's properties.
#[track_caller]
fn show(unit: &str) -> BTreeMap<String, String> {
    let text = systemctl(&["show", unit]);
    text.lines()
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// A pod's configuration as the kubelet makes it with this driver, and the pod's slice.
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
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

/// The cgroup that a unit has.
#[track_caller]
fn cgroup(unit: &str) -> PathBuf {
    let group = show(unit)["ControlGroup"].clone();
    assert!(group.ends_with(unit), "{unit} has the cgroup {group:?}");
    Path::new("/sys/fs/cgroup").join(group.trim_start_matches('/'))
}

/// What is limited, as the kernel has it.
fn limits(dir: &Path) -> [String; 4] {
    ["memory.max", "memory.high", "cpu.max", "cpuset.cpus"].map(|name| file(dir, name))
}

/// The same limits as systemd has them, in the kernel's words.
#[track_caller]
fn known_limits(unit: &str) -> [String; 4] {
    let shown = show(unit);
    let number = |key: &str| if shown[key] == "infinity" { "max".to_owned() } else { shown[key].clone() };
    // In seconds or milliseconds for each second.
    let quota = &shown["CPUQuotaPerSecUSec"];
    let millis = quota.strip_suffix("ms").and_then(|text| text.parse::<f64>().ok());
    let millis = millis.or_else(|| Some(quota.strip_suffix('s')?.parse::<f64>().ok()? * 1000.0));
    let cpu = millis.map_or("max 100000".to_owned(), |millis| format!("{:.0} 100000", millis * 100.0));
    [number("MemoryMax"), number("MemoryHigh"), cpu, shown.get("AllowedCPUs").cloned().unwrap_or_default()]
}

/// Has systemd read all units again, and then write all that it knows of this one's memory and processors: limits that
/// it does not know of would be gone. They stay in any case, and so do the controllers.
#[track_caller]
fn kept(unit: &str, dir: &Path) {
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
    assert!(back.is_some(), "{:?} and {}, before {had:?}", limits(dir), controllers());
}

/// Waits until the limits are these, and systemd's too.
#[track_caller]
fn reached(unit: &str, dir: &Path, quota: &str, cpus: &str, least_mib: u64) {
    let reached = node::eventually(SETTLE, || {
        let [max, _, cpu, set] = limits(dir);
        let range = least_mib * MIB..(least_mib + 160) * MIB;
        let max = max.parse().ok().filter(|max| range.contains(max));
        (max.is_some() && cpu == quota && set == cpus && known_limits(unit) == limits(dir)).then_some(())
    });
    assert!(reached.is_some(), "{unit}: {:?}, systemd has {:?}", limits(dir), known_limits(unit));
}

/// A container's configuration with limits.
fn limited(pod: &Pod, millis: u64, mib: u64, cpus: &str) -> Value {
    let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
    config["linux"]["resources"] = resources(millis, mib, cpus);
    config
}

fn resources(millis: u64, mib: u64, cpus: &str) -> Value {
    let memory = mib * MIB;
    json!({ "cpu_quota": millis * 100, "cpu_period": 100_000, "memory_limit_in_bytes": memory, "cpuset_cpus": cpus })
}

/// Waits until systemd knows nothing of a unit, and of none that failed.
#[track_caller]
fn gone(unit: &str) {
    let gone = node::eventually(SETTLE, || (show(unit)["LoadState"] == "not-found").then_some(()));
    assert!(gone.is_some(), "{unit} is left: {:?}\n{}", show(unit), node::log_tail(20));
    assert_eq!(systemctl(&["--failed", "--plain", "--no-legend"]), "");
}

#[test]
fn a_pod_is_a_scope_whose_limits_systemd_knows() {
    pods("cri-systemd", |pods| {
        let (mut config, slice) = in_a_slice(pods);
        config["linux"]["resources"] = resources(500, 128, "");
        let pod = pods.run(config.clone());
        let name = unit(&pod);
        let shown = show(&name);
        config["metadata"]["name"] = "by-runc".into();
        config["metadata"]["uid"] = "by-runc".into();
        let other = pods.run_by("runc", config);
        let like = show(&unit(&other));
        for key in ["LoadState", "ActiveState", "SubState", "Slice", "Transient", "Delegate", "DelegateControllers"]
            .into_iter()
            .chain(["DefaultDependencies", "CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting"])
            .chain(["TasksMax", "KillMode", "OOMPolicy", "Conflicts", "Before"])
        {
            assert_eq!(shown.get(key), like.get(key), "{key} of Husk's scope, and of runc's");
        }
        assert_eq!([&shown["ActiveState"], &shown["Slice"], &shown["Delegate"]], ["active", slice.as_str(), "yes"]);
        other.stop();
        call("RemovePodSandbox", &json!({ "pod_sandbox_id": other.id }));
        gone(&unit(&other));

        // All of the VMM's and of the shim's is in it.
        let dir = cgroup(&name);
        for pid in [pod.pid(), shim(&pod)] {
            for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
                assert_eq!(file(&task.path(), "cgroup"), format!("0::{}", shown["ControlGroup"]));
            }
        }
        let all = file(dir.parent().unwrap(), "cgroup.subtree_control");
        assert!(["cpu", "cpuset", "memory", "pids"].iter().all(|name| all.split(' ').any(|one| one == *name)), "{all}");

        let first = pod.start(&limited(&pod, 500, 128, "1"));
        reached(&name, &dir, "75000 100000", "1", 128);
        kept(&name, &dir);
        let second = pod.start(&limited(&pod, 255, 64, "2"));
        // 1005 thousandths: systemd keeps hundredths.
        reached(&name, &dir, "101000 100000", "1-2", 192);
        call("UpdateContainerResources", &json!({ "container_id": first.id, "linux": resources(1000, 256, "1") }));
        reached(&name, &dir, "151000 100000", "1-2", 320);
        kept(&name, &dir);
        assert_eq!(first.sh("cat /sys/fs/cgroup/memory.max"), (256 * MIB).to_string());
        assert_eq!(second.sh("echo still here"), "still here");

        pod.stop();
        pod.remove();
        gone(&name);
        assert!(!dir.exists() && dir.parent().unwrap().exists(), "the slice is the kubelet's to remove");
        systemctl(&["stop", &slice]);
    });
}

/// The pid of a pod's shim.
fn shim(pod: &Pod) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pod.pid())).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_pod_whose_sandbox_is_the_shim_is_a_scope() {
    pods_of("cri-systemd-shim", "husk-sandbox", |pods| {
        let (mut config, slice) = in_a_slice(pods);
        config["linux"]["resources"] = resources(500, 128, "");
        let pod = pods.run(config);
        let name = unit(&pod);
        let container = pod.start(&limited(&pod, 500, 128, ""));
        let dir = cgroup(&name);
        reached(&name, &dir, "75000 100000", "", 128);
        assert_eq!(container.sh("echo runs"), "runs");
        pod.stop();
        pod.remove();
        gone(&name);
        systemctl(&["stop", &slice]);
    });
}

#[test]
fn a_shim_that_is_killed_leaves_no_unit() {
    pods("cri-systemd-killed", |pods| {
        let (config, slice) = in_a_slice(pods);
        let pod = pods.run(config);
        let name = unit(&pod);
        let container = pod.sleeper();
        let dir = cgroup(&name);
        // SAFETY: kill takes two integers.
        assert_eq!(unsafe { libc::kill(shim(&pod), libc::SIGKILL) }, 0);
        gone(&name);
        // containerd tries once more, a second later, to delete a task that it could not ask for, and removes nothing
        // before.
        container.wait();
        pod.stop();
        pod.remove();
        assert!(!dir.exists());
        systemctl(&["stop", &slice]);
    });
}

#[test]
fn a_unit_of_the_name_is_forgotten_when_it_failed_and_left_alone_otherwise() {
    case("systemd-units", |case| {
        let scope = |id: &str| format!("husk-{id}.scope");
        let group = |id: &str| format!("husk_e2e.slice:husk:{id}");
        // One that failed, as the scope of a process does whose time is over.
        let run = case.sh("cat /proc/1/cgroup");
        let (id, name) = (run.id().to_owned(), scope(run.id()));
        let timed = ["--scope", "--quiet", "--unit", &name, "-p", "RuntimeMaxSec=100ms", "sleep", "100"];
        assert!(!Command::new("systemd-run").args(timed).status().unwrap().success());
        let failed = node::eventually(SETTLE, || (show(&name)["ActiveState"] == "failed").then_some(()));
        assert!(failed.is_some(), "{:?}", show(&name));
        run.flags(&["--cgroup", &group(&id)]).output().expect_code(0);
        gone(&name);
        assert!(Path::new("/sys/fs/cgroup/husk_e2e.slice").exists());

        // One that runs.
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
        gone(&name);

        // One that cannot be, as its slice cannot.
        systemctl(&["mask", "--runtime", "husk_masked.slice"]);
        let run = case.sh("echo not reached");
        let (id, name) = (run.id().to_owned(), scope(run.id()));
        let output = run.flags(&["--cgroup", &format!("husk_masked.slice:husk:{id}")]).output();
        output.expect_error(&[&name, "husk_masked.slice", "masked"]);
        gone(&name);
        systemctl(&["unmask", "--runtime", "husk_masked.slice"]);
        systemctl(&["stop", "husk_e2e.slice"]);
    });
}
