//! Basic container runs: output, exit codes, image layers, names and log URIs.
use husk_e2e::case;
use husk_e2e::command::Input;
use serde_json::json;

#[test]
fn busybox_prints_and_returns_exit_code() {
    case("exit", |case| {
        case.busybox(&["echo", "hello from a container"]).output().expect_clean().expect_out("hello from a container");
        // The script kills a child, because the kernel ignores a SIGKILL that PID 1 gets from its own PID namespace
        // (pid_namespaces(7)).
        case.sh("sh -c 'kill -9 $$'; exit $?").output().expect_code(137);
    });
}

#[test]
fn killed_container_exits_with_137() {
    case("killed", |case| {
        case.sleeper().kill();
    });
}

#[test]
fn debian_python_image_runs() {
    case("python", |case| {
        let program = "import sys, json, hashlib, threading, os\n\
            t = threading.Thread(target=lambda: print(json.dumps({'sum': hashlib.sha256(b'husk').hexdigest()})))\n\
            t.start(); t.join()\n\
            print(open('/etc/os-release').readline().strip())\n\
            print(sorted(os.listdir('/proc/self/fd'))[:3], flush=True)\n\
            sys.exit(3)";
        let output = case.python(program).output().expect_code(3);
        let out = output.out();
        let sum = "c8b1f4b76229cb72d6bc950f3d2e2b5891e14a35743e3b6f21bf0cd87511a1ba";
        assert!(out.contains(&format!("{{\"sum\": \"{sum}\"}}")), "{}", output.describe());
        assert!(out.contains("PRETTY_NAME=") || out.contains("NAME="), "{}", output.describe());
        assert!(out.contains("['0', '1', '2']"), "{}", output.describe());
    });
}

#[test]
fn image_layers_stack_and_rootfs_is_writable() {
    case("layers", |case| {
        let script = "test ! -e /etc/removed-above || echo whiteout ignored
            cat /etc/replaced-above
            ls -ln /home/tester/mine | cut -c1-10
            stat -c '%u:%g %a' /home/tester /tmp
            echo new > /etc/new && mv /etc/new /srv/moved && cat /srv/moved
            rm /etc/replaced-above && test ! -e /etc/replaced-above && echo removed
            mkdir /opt/tools/d && chown 1000:44 /opt/tools/d && stat -c '%u:%g' /opt/tools/d
            ln /bin/busybox /srv/link && stat -c %h /srv/link
            mkfifo /srv/fifo && (echo through > /srv/fifo & cat /srv/fifo)";
        case.sh(script)
            .output()
            .expect_clean()
            .expect_out("second layer\n-rw-------\n1000:1000 750\n0:0 1777\nnew\nremoved\n1000:44\n2\nthrough");
    });
}

#[test]
fn container_name_is_free_after_removal() {
    case("again", |case| {
        let run = case.sh("echo once").keep_container();
        run.output().expect_out("once");
        // The name stays in use until the container is removed.
        run.output().expect_error(&["already exists"]);
        husk_e2e::command::run_ctr(&["tasks", "delete", run.id()]);
        husk_e2e::command::run_ctr(&["containers", "rm", run.id()]).expect_code(0);
        husk_e2e::command::run_ctr(&["snapshots", "rm", run.id()]);
        run.clone().output().expect_out("once");
        husk_e2e::command::run_ctr(&["tasks", "delete", run.id()]);
        husk_e2e::command::run_ctr(&["containers", "rm", run.id()]).expect_code(0);
    });
}

#[test]
fn output_goes_to_log_file_or_binary_logger() {
    case("logs", |case| {
        let file = case.dir().join("file.log");
        let script = "echo to stdout; echo to stderr >&2";
        let run = case.sh(script).flags(&["--log-uri", &format!("file://{}", file.display())]);
        run.start(Input::Null).wait().expect_code(0);
        let text =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("failed to read {}: {error}", file.display()));
        let mut lines: Vec<_> = text.lines().collect();
        lines.sort_unstable();
        assert_eq!(lines, ["to stderr", "to stdout"]);

        // A binary logger reads stdout from fd 3 and stderr from fd 4, and closes fd 5 when it is ready. runc's shim
        // sends SIGTERM to the logger after the container's exit. The logger ignores SIGTERM, so that it reads all
        // output.
        let logged = case.dir().join("binary.log");
        let logger = case.dir().join("logger");
        let program = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\ncat <&3 >> LOG &\ncat <&4 >> LOG\nwait\n";
        std::fs::write(&logger, program.replace("LOG", &logged.to_string_lossy())).unwrap();
        std::fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let run = case.sh(script).flags(&["--log-uri", &format!("binary://{}", logger.display())]);
        run.start(Input::Null).wait().expect_code(0);
        let complete = husk_e2e::node::eventually(std::time::Duration::from_secs(10), || {
            let text = std::fs::read_to_string(&logged).ok()?;
            (text.lines().count() == 2 && text.contains("to stdout") && text.contains("to stderr")).then_some(())
        });
        assert!(
            complete.is_some(),
            "the logger wrote {:?}, expected one line of stdout and one of stderr",
            std::fs::read_to_string(&logged)
        );
    });
}

#[test]
fn hooks_run_in_the_mount_namespace_of_the_node_with_full_privileges() {
    case("hooks", |case| {
        let seen = case.dir().join("seen");
        let script = format!(
            "{{ readlink /proc/self/ns/mnt; grep -E '^(NoNewPrivs|Seccomp|CapEff|CapBnd):' /proc/self/status; \
             grep -c '\"status\": *\"'; }} >> {}",
            seen.display()
        );
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"] });
        let run = case.with_spec("true", |spec| {
            spec["hooks"] = json!({ "createRuntime": [hook], "poststop": [hook] });
        });
        run.start(Input::Null).wait().expect_code(0);
        let mounts = std::fs::read_link("/proc/1/ns/mnt").unwrap();
        let status = std::fs::read_to_string("/proc/1/status").unwrap();
        let field = |name: &str| status.lines().find(|line| line.starts_with(name)).unwrap();
        let rights = ["CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:"].map(field).join("\n");
        let once = format!("{}\n{rights}\n1\n", mounts.display());
        let both = husk_e2e::node::eventually(std::time::Duration::from_secs(10), || {
            std::fs::read_to_string(&seen).ok().filter(|text| *text == once.repeat(2))
        });
        assert!(both.is_some(), "the hooks wrote {:?}, expected {once:?} twice", std::fs::read_to_string(&seen));
    });
}
