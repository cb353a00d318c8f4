//! `kubectl attach`: terminal resizes, several clients at once, and `stdinOnce`.

use std::thread;
use std::time::Duration;

use husk_e2e::cri::stream::{Stream, channel};
use husk_e2e::cri::{PodContainer, call, pods, try_call, userns};
use husk_e2e::{RUNC, node, runtime};
use serde_json::json;

/// Attaches with stdin. Without a terminal, stderr has its own channel.
#[track_caller]
fn attach(container: &PodContainer, tty: bool) -> Stream {
    let request = json!({ "container_id": container.id, "stdin": true, "stdout": true, "stderr": !tty, "tty": tty });
    Stream::connect(call("Attach", &request)["url"].as_str().unwrap())
}

/// Attaches, and waits until the container answers a line of input. The wait is necessary, because containerd
/// answers the Attach request before the streams are connected.
#[track_caller]
fn attached(container: &PodContainer, name: &str, tty: bool) -> Stream {
    let mut stream = attach(container, tty);
    stream.send(channel::STDIN, format!("{name}\n").as_bytes());
    stream.wait_for(channel::STDOUT, &format!("heard {name}{}", if tty { "\r\n" } else { "\n" }));
    stream
}

/// Prints each line of stdin to stdout and stderr.
const ECHO_LINES: &str = "echo up; while read line; do echo heard $line; echo aside $line >&2; done; echo end; exit 5";

/// Prints each line of stdin, and the terminal's size after each SIGWINCH. A background process reads stdin, and the
/// shell calls `wait`. If a signal arrived just before the shell called `read`, the shell would run the trap only after
/// `read` has returned. `wait` does not have this race.
const ECHO_TTY: &str = "exec 3<&0; while read line; do echo heard $line; done <&3 & trap 'stty size' WINCH; echo up; \
                        while :; do wait; done";

#[test]
fn attach_resizes_the_terminal_of_the_container() {
    pods("cri-attach-size", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(ECHO_TTY);
        config["tty"] = json!(true);
        config["stdin"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let mut one = attached(&container, "one", true);
        for (width, height) in [(101, 37), (80, 24), (333, 111)] {
            one.send(channel::RESIZE, format!(r#"{{"Width":{width},"Height":{height}}}"#).as_bytes());
            one.wait_for(channel::STDOUT, &format!("{height} {width}\r\n"));
        }
        // Two clients share the container's terminal. A resize by the second client applies to both clients.
        let mut two = attached(&container, "two", true);
        two.send(channel::RESIZE, br#"{"Width":90,"Height":30}"#);
        two.wait_for(channel::STDOUT, "30 90\r\n");
        one.wait_for(channel::STDOUT, "30 90\r\n");
        two.send(channel::STDIN, b"hello\n");
        one.wait_for(channel::STDOUT, "heard hello\r\n");
        // When a client disconnects, the container continues and the terminal keeps its size.
        drop(one);
        two.send(channel::STDIN, b"again\n");
        two.wait_for(channel::STDOUT, "heard again\r\n");
        let size = container.exec(&["sh", "-c", "stty size < /dev/pts/0 || stty size < /dev/console"]);
        assert_eq!(size.out, "30 90\n", "the terminal's size has changed: {size:?}");
        container.stop(0);
    });
}

#[test]
fn container_runs_on_after_all_attached_clients_disconnect() {
    pods("cri-attach-two", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(ECHO_LINES);
        config["stdin"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let (mut one, mut two) = (attached(&container, "one", false), attached(&container, "two", false));
        one.send(channel::STDIN, b"first\n");
        two.wait_for(channel::STDOUT, "heard first\n");
        one.wait_for(channel::STDOUT, "heard first\n");
        two.send(channel::STDIN, b"second\n");
        for stream in [&mut one, &mut two] {
            stream.wait_for(channel::STDERR, "aside second\n");
        }
        drop(one);
        two.send(channel::STDIN, b"third\n");
        two.wait_for(channel::STDOUT, "heard third\n");
        drop(two);
        // Without clients, the container continues to run, and its stdin stays open for the next client.
        assert_eq!(container.status()["state"], "CONTAINER_RUNNING");
        let mut three = attached(&container, "three", false);
        three.send(channel::STDIN, b"fourth\n");
        three.wait_for(channel::STDOUT, "heard fourth\n");
        drop(three);
        container.wait_for("aside fourth");
        container.stop(0);
    });
}

#[test]
fn stdin_once_closes_stdin_when_the_first_client_disconnects() {
    pods("cri-attach-once", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(ECHO_LINES);
        config["stdin"] = json!(true);
        config["stdin_once"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let (mut one, two) = (attached(&container, "one", false), attached(&container, "two", false));
        one.send(channel::STDIN, b"all of it\n");
        one.wait_for(channel::STDOUT, "heard all of it\n");
        drop(one);
        // The second client, which stays attached, receives the rest of the output and the end of both streams.
        let (out, err, _) = two.finish();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert_eq!(text(out), "heard all of it\nend\n");
        assert!(text(err).ends_with("aside all of it\n"));
        assert_eq!(container.wait(), (5, "Error".into()));
    });
}

#[test]
fn exec_timeout_kills_all_processes_of_the_exec_in_a_user_namespace() {
    pods("cri-exec-users", |pods| {
        let pod = userns::pod(pods);
        let container = pod.start(&userns::sh(&pod, userns::SLEEP));
        let scripts = ["exec sleep 4715", "sleep 4715 & sleep 4715", "setsid sh -c 'sleep 4715; :' & sleep 4715"];
        // After a timeout, runc kills only the command itself. The children of the other two commands would continue
        // to run, and ExecSync would wait for these children.
        let scripts = if runtime() == RUNC { &scripts[..1] } else { &scripts[..] };
        // Make the calls at the same time, because each call takes as long as its timeout.
        thread::scope(|scope| {
            let calls = scripts.iter().map(|script| {
                let request = json!({ "container_id": container.id, "cmd": ["sh", "-c", script], "timeout": 2 });
                scope.spawn(move || try_call("ExecSync", &request).unwrap_err())
            });
            for (call, script) in calls.collect::<Vec<_>>().into_iter().zip(scripts) {
                let error = call.join().unwrap();
                assert!(error.message.contains("timeout"), "the exec of {script:?} must end with a timeout: {error}");
            }
        });
        let count = "grep -lE '471[5-7]' /proc/[0-9]*/cmdline 2>/dev/null | wc -l";
        let gone = node::eventually(Duration::from_secs(10), || (container.sh(count) == "0").then_some(()));
        assert!(gone.is_some(), "processes of an exec still run\n{}", container.sh("ps"));
        assert_eq!(container.sh("echo still"), "still");
        container.stop(0);
    });
}
