//! Exec, attach, terminals, logs and security contexts of a pod's containers through containerd's CRI.

use std::fs;
use std::time::{Duration, Instant};

use husk_e2e::cri::stream::{Stream, channel};
use husk_e2e::cri::{PodContainer, call, pods, try_call};
use husk_e2e::node;
use serde_json::json;

/// Sends an Exec or Attach request with the additional fields `more`, and connects to the stream.
#[track_caller]
fn open(method: &str, container: &PodContainer, more: serde_json::Value) -> Stream {
    let mut request = json!({ "container_id": container.id, "stdout": true });
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Stream::connect(call(method, &request)["url"].as_str().unwrap())
}

#[test]
fn exec_returns_output_and_exit_code_and_enforces_the_timeout() {
    pods("cri-exec", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["envs"] = json!([{ "key": "WORD", "value": "from the pod" }]);
        config["working_dir"] = json!("/srv");
        let container = pod.start(&config);
        // An exec returns stdout, stderr and the exit code, and has the container's environment.
        let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (7, "out\n", "err\n"));
        assert_eq!(container.sh("echo $WORD; pwd"), "from the pod\n/srv");
        assert_eq!(container.exec(&["sh", "-c", "kill -9 $$"]).code, 137);
        let error = try_call("ExecSync", &json!({ "container_id": container.id, "cmd": ["/no/such"], "timeout": 20 }));
        assert!(error.unwrap_err().message.contains("/no/such"));
        // A timeout kills the command.
        let started = Instant::now();
        let request = json!({ "container_id": container.id, "cmd": ["sleep", "4713"], "timeout": 2 });
        let error = try_call("ExecSync", &request).unwrap_err();
        assert!(error.message.contains("timeout"), "{error}");
        assert!(
            started.elapsed() < Duration::from_secs(40),
            "the exec with a timeout of 2 s ended after {:?}",
            started.elapsed()
        );
        let count = "grep -lE '471[3]' /proc/[0-9]*/cmdline 2>/dev/null | wc -l";
        let gone = node::eventually(Duration::from_secs(10), || (container.sh(count) == "0").then_some(()));
        assert!(gone.is_some(), "the command still runs after its timeout\n{}", container.sh("ps"));
        // The stream of an exec with stdin ends with the exit status.
        let mut stream = open(
            "Exec",
            &container,
            json!({ "cmd": ["sh", "-c", "read a; echo got $a; echo bad >&2; exit 4"], "stdin": true, "stderr": true }),
        );
        stream.send(channel::STDIN, b"a line\n");
        let (out, err, status) = stream.finish();
        assert_eq!((out, err), (b"got a line\n".to_vec(), b"bad\n".to_vec()));
        assert!(status.contains("\"4\"") || status.contains("exit code 4"), "{status}");
        // The command sees that its terminal is resized.
        let script = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.1; done";
        let mut stream = open("Exec", &container, json!({ "cmd": ["sh", "-c", script], "stdin": true, "tty": true }));
        stream.wait_for(channel::STDOUT, "up\r\n");
        stream.send(channel::RESIZE, br#"{"Width":101,"Height":37}"#);
        stream.wait_for(channel::STDOUT, "37 101\r\n");
        // The command sends more data than all buffers on the way can hold.
        let command = json!({ "cmd": ["sh", "-c", "head -c 20000000 /dev/zero; echo done >&2"], "stderr": true });
        let (out, err, _) = open("Exec", &container, command).finish();
        assert_eq!((out.len(), err), (20_000_000, b"done\n".to_vec()));
        container.stop(10);
    });
}

#[test]
fn attach_sends_stdin_and_log_splits_long_lines_and_can_be_reopened() {
    pods("cri-attach", |pods| {
        let pod = pods.pod();
        let mut config =
            pod.sh("echo begin; while read line; do echo heard $line; echo aside >&2; done; echo end; exit 5");
        config["stdin"] = json!(true);
        config["stdin_once"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("begin");
        let mut stream = open("Attach", &container, json!({ "stdin": true, "stderr": true }));
        stream.send(channel::STDIN, b"first\nsecond\n");
        stream.wait_for(channel::STDOUT, "heard second");
        // With `stdin_once`, stdin closes when the first client disconnects.
        drop(stream);
        assert_eq!(container.wait(), (5, "Error".into()));
        // In CRI's log format, each line has a time, a stream, `F` (full) or `P` (partial), and a text.
        let log = container.log();
        let mut texts: Vec<(&str, &str)> = Vec::new();
        for line in log.lines() {
            let mut fields = line.splitn(4, ' ');
            let (time, stream) = (fields.next().unwrap(), fields.next().unwrap());
            assert!(time.len() > 20 && time.contains('T'), "{line}");
            assert_eq!(fields.next(), Some("F"), "{line}");
            texts.push((stream, fields.next().unwrap_or_default()));
        }
        let of =
            |name: &str| texts.iter().filter(|(stream, _)| *stream == name).map(|(_, text)| *text).collect::<Vec<_>>();
        assert_eq!(of("stdout"), ["begin", "heard first", "heard second", "end"]);
        assert_eq!(of("stderr"), ["aside", "aside"]);
        container.remove();
        // A long line is split into parts. ReopenContainerLog creates a new file after the old file was renamed.
        let container = pod.start(&pod.sh(
            "head -c 40000 /dev/zero | tr '\\0' x; echo; echo one; until [ -e /tmp/go ]; do sleep 0.2; done; echo two; sleep 1000",
        ));
        container.wait_for("one");
        let log = container.log();
        let parts: Vec<&str> = log.lines().filter(|line| line.contains(" stdout P ")).collect();
        assert_eq!(
            parts.len(),
            2,
            "40000 bytes must be two partial lines of 16384 bytes and the rest; the log has {} bytes",
            log.len()
        );
        let old = container.log_path().with_extension("old");
        fs::rename(container.log_path(), &old).unwrap();
        call("ReopenContainerLog", &json!({ "container_id": container.id }));
        container.sh("touch /tmp/go");
        container.wait_for("two");
        assert!(!fs::read_to_string(&old).unwrap().contains("two"));
        container.stop(0);
        // Attach also works with a terminal.
        let mut config = pod.sh("stty -echo; echo up; read line; echo said $line");
        config["tty"] = json!(true);
        config["stdin"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let mut stream = open("Attach", &container, json!({ "stdin": true, "tty": true }));
        stream.send(channel::STDIN, b"word\n");
        stream.wait_for(channel::STDOUT, "said word");
        assert_eq!(container.wait().0, 0);
    });
}

#[test]
fn container_has_the_requested_mounts_limits_and_security_context() {
    pods("cri-context", |pods| {
        let pod = pods.pod();
        let dir = pods.dir().join("volume");
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("file"), "from the node\n").unwrap();
        let host = |path: &str| dir.join(path).to_string_lossy().into_owned();
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] = json!([
            { "host_path": host(""), "container_path": "/volume" },
            { "host_path": host("file"), "container_path": "/etc/one-file", "readonly": true },
            { "host_path": host("sub"), "container_path": "/read-only", "readonly": true },
        ]);
        config["linux"]["resources"] =
            json!({ "memory_limit_in_bytes": 100 << 20, "cpu_quota": 50000, "cpu_period": 100_000 });
        let context = &mut config["linux"]["security_context"];
        context["run_as_user"] = json!({ "value": 1000 });
        context["run_as_group"] = json!({ "value": 1001 });
        context["supplemental_groups"] = json!([3000]);
        context["readonly_rootfs"] = json!(true);
        context["no_new_privs"] = json!(true);
        context["capabilities"] = json!({ "drop_capabilities": ["ALL"], "add_capabilities": ["NET_BIND_SERVICE"] });
        context["seccomp"] = json!({ "profile_type": "RuntimeDefault" });
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let container = pod.start(&config);
        assert_eq!(
            container.sh("id -u; id -g; id -G"),
            "1000\n1001\n1001 2000 3000".replace(" 2000", &groups(&container))
        );
        assert_eq!(container.sh("cat /etc/one-file; cat /volume/file"), "from the node\nfrom the node");
        container.sh("echo from the pod > /volume/new");
        assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "from the pod\n");
        for (path, what) in [("/etc/one-file", "a file"), ("/read-only/x", "a directory"), ("/srv/x", "the rootfs")] {
            let done = container.exec(&["sh", "-c", &format!("echo x > {path}")]);
            assert!(done.code != 0 && done.err.contains("ead-only"), "writing to {what} must fail: {done:?}");
        }
        let status = container.sh("grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status");
        let fields: Vec<&str> = status.split_whitespace().collect();
        assert_eq!(fields, ["CapBnd:", "0000000000000400", "NoNewPrivs:", "1", "Seccomp:", "2"]);
        assert_eq!(container.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max"), "104857600\n50000 100000");
        // A container that exceeds its memory limit is killed, and CRI reports the reason.
        let mut config = pod.sh("exec tail /dev/zero");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 30 << 20 });
        let over_limit = pod.start(&config);
        assert_eq!(over_limit.wait(), (137, "OOMKilled".into()));
        container.stop(10);
    });
}

/// Returns the groups that the image's /etc/group lists for `tester`. containerd 1.7 adds these groups to the requested
/// groups.
fn groups(container: &PodContainer) -> String {
    let listed = container.sh("grep -E ':[^:]*tester' /etc/group | cut -d: -f3");
    let mut groups: Vec<u32> = listed.lines().filter_map(|line| line.parse().ok()).collect();
    groups.sort_unstable();
    groups.iter().map(|group| format!(" {group}")).collect()
}
