//! cgroup limits of a container: they are set and enforced, and OOM kills are reported.
use husk_e2e::events::Events;
use husk_e2e::{case, spec};
use serde_json::json;

#[test]
fn create_sets_cgroup_limits() {
    case("cgroup", |case| {
        let script = "cd /sys/fs/cgroup; cat memory.max memory.low cpu.max cpu.weight pids.max; cat /proc/self/cgroup";
        let run = case.with_spec(script, |spec| {
            spec["linux"]["resources"]["memory"] = json!({ "limit": 134_217_728, "reservation": 33_554_432 });
            spec["linux"]["resources"]["cpu"] = json!({ "quota": 150_000, "period": 100_000, "shares": 2048 });
            spec["linux"]["resources"]["pids"] = json!({ "limit": 42 });
            spec::mount_cgroup(spec);
        });
        // The node's runc 1.1 converts 2048 CPU shares to weight 79. runc 1.3.2 and later versions compute weight 174.
        // Husk's libcontainer crate converts like runc 1.3.2.
        let weight = if husk_e2e::runtime() == "io.containerd.runc.v2" { 79 } else { 174 };
        run.output().expect_clean().expect_out(&format!("134217728\n33554432\n150000 100000\n{weight}\n42\n0::/"));
    });
}

// The test sets the limits in the specification, because containerd's CRI sets swap limits only if containerd's own
// cgroup has the file memory.swap.max.
#[test]
fn memory_swap_max_is_the_swap_limit_minus_the_memory_limit() {
    case("swap", |case| {
        for (swap, expected) in [(157_286_400, "52428800"), (104_857_600, "0"), (-1, "max")] {
            let run = case.with_spec("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.swap.max", |spec| {
                spec["linux"]["resources"]["memory"] = json!({ "limit": 104_857_600, "swap": swap });
                spec::mount_cgroup(spec);
            });
            run.output().expect_clean().expect_out(&format!("104857600\n{expected}"));
        }
    });
}

#[test]
fn pids_limit_is_enforced() {
    case("pids", |case| {
        let script = "for i in $(seq 1 30); do sleep 100 & done; echo not reached";
        let run = case.with_spec(script, |spec| spec["linux"]["resources"]["pids"] = json!({ "limit": 10 }));
        let output = run.output();
        assert!(output.err().contains("can't fork"), "{}", output.describe());
    });
}

#[test]
fn oom_kill_emits_oom_event() {
    case("oom", |case| {
        let events = Events::watch();
        let run = case.sh("dd if=/dev/zero of=/dev/null bs=200M count=1").flags(&["--memory-limit", "67108864"]);
        let id = run.id().to_owned();
        run.output().expect_code(137);
        let seen = events.wait_for(&id, 4);
        assert_eq!(seen[..4], ["create", "start", "oom", "exit 137"]);
    });
}

#[test]
fn container_survives_oom_kill_of_child() {
    case("oom-child", |case| {
        let run = case
            .sh("dd if=/dev/zero of=/dev/null bs=200M count=1; echo $?; exit 5")
            .flags(&["--memory-limit", "67108864"]);
        let output = run.output().expect_code(5);
        assert!(output.out().contains("137"), "{}", output.describe());
    });
}
