//! Control of a running container: signals, pause and resume, process list, metrics, limit updates.
use std::time::Duration;

use husk_e2e::case;
use husk_e2e::command::{Input, Running};
use husk_e2e::{node, shim};
use serde_json::{Value, json};

#[test]
fn kill_delivers_signals_to_init() {
    case("signals", |case| {
        let script = "for s in HUP USR1 USR2 TERM; do trap \"echo caught $s\" $s; done
            trap 'echo leaving; exit 4' QUIT; echo up; while :; do sleep 0.1; done";
        let mut container = case.container(case.sh(script));
        for signal in ["HUP", "USR1", "USR2", "TERM"] {
            container.task(&["kill", "--signal", &format!("SIG{signal}")]).expect_clean();
            container.running.wait_for(&format!("caught {signal}"));
        }
        container.task(&["kill", "--signal", "SIGQUIT"]).expect_clean();
        container.running.wait_for("leaving");
        container.running.wait().expect_code(4);
    });
}

#[test]
fn kill_signals_one_exec_or_all_processes() {
    case("kill-exec", |case| {
        let script = "sh -c 'trap \"echo child caught\" USR1; echo up; while :; do sleep 0.1; done' & 
            trap 'echo parent caught' USR1; while :; do wait; done";
        let mut container = case.container(case.sh(script));
        let exec = container.exec_command("k1", &[], &["sh", "-c", "echo up; exec sleep 1000"]);
        let mut exec = Running::start(exec, Input::Pipe);
        exec.wait_for("up");
        container.task(&["kill", "--signal", "SIGTERM", "--exec-id", "k1"]).expect_clean();
        exec.wait().expect_code(143);
        container.task(&["kill", "--all", "--signal", "SIGUSR1"]).expect_clean();
        let one = container.running.wait_for("caught");
        let two = container.running.wait_for("caught");
        let mut both = [one.as_str(), two.as_str()];
        both.sort_unstable();
        assert_eq!(both, ["child caught", "parent caught"]);
        container.kill();
    });
}

#[test]
fn init_without_handler_ignores_sigterm() {
    case("sigterm", |case| {
        let container = case.sleeper();
        container.task(&["kill", "--signal", "SIGTERM"]).expect_clean();
        container.exec("alive", &["true"]).expect_clean();
        container.kill();
    });
}

#[test]
fn resume_continues_paused_processes() {
    case("pause", |case| {
        // The script updates the file by a rename, which is atomic. Therefore a reader always sees a number.
        let script = "i=0; echo 0 > /tmp/count; echo up
            while :; do i=$((i+1)); echo $i > /tmp/next; mv /tmp/next /tmp/count; sleep 0.1; done";
        let container = case.container(case.sh(script));
        container.task(&["pause"]).expect_clean();
        assert_eq!(container.state(), "PAUSED");
        container.task(&["resume"]).expect_clean();
        assert_eq!(container.state(), "RUNNING");
        let count = |id: &str| container.exec(id, &["cat", "/tmp/count"]).expect_clean().out().trim().parse::<u64>();
        let first = count("c1").unwrap();
        let later = node::eventually(Duration::from_secs(10), || {
            count(&format!("c{}", std::process::id())).ok().filter(|now| *now > first)
        });
        assert!(later.is_some(), "the counter does not continue after resume");
        container.kill();
    });
}

#[test]
fn paused_container_does_not_run() {
    case("paused", |case| {
        let script = "echo up; while read line; do echo echo $line; done";
        let mut container = case.container(case.sh(script));
        // The twin runs the same script and is never paused. Its answers show that the paused container had enough time
        // to answer.
        let mut twin = case.container(case.sh(script));
        container.running.write(b"before\n");
        container.running.wait_for("echo before");
        container.task(&["pause"]).expect_clean();
        container.running.write(b"meanwhile\n");
        for round in 0..20 {
            twin.running.write(format!("round {round}\n").as_bytes());
            twin.running.wait_for(&format!("echo round {round}"));
        }
        assert!(!container.running.has_printed("echo meanwhile"), "the paused container answered");
        container.task(&["resume"]).expect_clean();
        container.running.wait_for("echo meanwhile");
        twin.kill();
        // A paused container can be killed.
        container.task(&["pause"]).expect_clean();
        container.task(&["kill", "--signal", "SIGKILL"]).expect_clean();
        container.task(&["resume"]);
        container.running.wait().expect_code(137);
    });
}

#[test]
fn ps_lists_each_process_with_distinct_pid() {
    case("ps", |case| {
        let container =
            case.container(case.sh("sleep 1001 & sleep 1002 & (sleep 1003 & sleep 1004 & wait) & echo up; wait"));
        let listed = || {
            let output = container.task(&["ps"]).expect_clean();
            let mut pids: Vec<u32> =
                output.out().lines().skip(1).filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
            pids.sort_unstable();
            pids
        };
        // The list has a shell, a subshell and four `sleep` processes.
        let pids_before = node::eventually(Duration::from_secs(10), || Some(listed()).filter(|pids| pids.len() == 6));
        let pids_before = pids_before.unwrap_or_else(|| panic!("expected six processes, listed pids: {:?}", listed()));
        let mut distinct = pids_before.clone();
        distinct.dedup();
        assert_eq!(distinct.len(), 6, "pids are repeated: {pids_before:?}");
        // The container sees these six processes, and up to three processes of the command that counts.
        let inside = container.exec("count", &["sh", "-c", "exec 2>/dev/null; grep -l . /proc/[0-9]*/cmdline | wc -l"]);
        let inside: usize = inside.expect_clean().out().trim().parse().unwrap();
        assert!((6..=9).contains(&inside), "the container sees {inside} processes, expected 6 to 9");
        // An exec adds one pid to the list. When the exec ends, its pid disappears.
        let exec = container.exec_command("more", &[], &["sh", "-c", "echo up; exec sleep 1005"]);
        let mut exec = Running::start(exec, Input::Null);
        exec.wait_for("up");
        assert_eq!(listed().len(), 7);
        container.task(&["kill", "--signal", "SIGKILL", "--exec-id", "more"]).expect_clean();
        exec.wait().expect_code(137);
        assert_eq!(listed(), pids_before);
        container.kill();
    });
}

#[test]
fn metrics_come_from_container_cgroup() {
    case("metrics", |case| {
        // The container is charged for 48 MiB of tmpfs and for the CPU time of a loop.
        let script = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=48 2>/dev/null
            i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000 & sleep 1000 & echo up; wait";
        let container = case.container(case.sh(script).flags(&["--memory-limit", "201326592"]));
        let output = container.task(&["metrics", "--format", "json"]).expect_code(0);
        let metrics: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("metrics are not JSON: {error}\n{}", output.describe()));
        // ctr prints the cgroup v2 message with its protobuf field names.
        let number = |pointer: &str| {
            let value = metrics
                .pointer(pointer)
                .unwrap_or_else(|| panic!("the metrics have no {pointer}\n{}", output.describe()));
            value
                .as_u64()
                .or_else(|| value.as_str()?.parse().ok())
                .unwrap_or_else(|| panic!("{pointer} is {value}, not a number"))
        };
        assert_eq!(number("/pids/current"), 3, "{}", output.describe());
        assert_eq!(number("/memory/usage_limit"), 201_326_592, "{}", output.describe());
        let usage = number("/memory/usage");
        assert!(
            (48 << 20..120 << 20).contains(&usage),
            "the memory usage is {usage} bytes, expected 48 to 120 MiB\n{}",
            output.describe()
        );
        let shmem = number("/memory/shmem");
        assert!(
            (48 << 20..60 << 20).contains(&shmem),
            "shmem is {shmem} bytes, expected 48 to 60 MiB\n{}",
            output.describe()
        );
        assert!(number("/cpu/usage_usec") > 10_000, "{}", output.describe());
        container.kill();
    });
}

#[test]
fn update_changes_limits_in_container_cgroup() {
    case("update", |case| {
        // In a cgroup namespace, the container's own cgroup is at the mount point /sys/fs/cgroup.
        let run = case.with_spec("echo up; exec sleep 1000", |spec| {
            spec["linux"]["resources"]["memory"] = json!({ "limit": 134_217_728 });
            spec["linux"]["resources"]["cpu"] = json!({ "quota": 50_000, "period": 100_000, "shares": 512 });
            spec["linux"]["resources"]["pids"] = json!({ "limit": 50 });
            husk_e2e::spec::push(spec, "/linux", "namespaces", json!({ "type": "cgroup" }));
            husk_e2e::spec::push(
                spec,
                "",
                "mounts",
                json!({
                    "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                    "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]
                }),
            );
        });
        let container = case.container(run);
        let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
        container.exec("u1", &["sh", "-c", script]).expect_clean().expect_out("134217728\n50000 100000\n50");
        let resources = json!({
            "memory": { "limit": 201_326_592 },
            "cpu": { "quota": 150_000, "period": 100_000 },
            "pids": { "limit": 70 },
        });
        shim::update(&container.id, &resources).unwrap_or_else(|error| panic!("failed to update the limits: {error}"));
        container.exec("u2", &["sh", "-c", script]).expect_clean().expect_out("201326592\n150000 100000\n70");
        container.kill();
    });
}
