//! Attaching to a pod's containers: by a terminal that changes its size, by several at once, and for input only once.

use std::time::Duration;

use husk_e2e::cri::stream::{Stream, channel};
use husk_e2e::cri::{PodContainer, call, pods, try_call, userns};
use husk_e2e::{RUNC, node, runtime};
use serde_json::json;

/// Attaches with input; without a terminal standard errors come on a channel of their own.
#[track_caller]
fn attach(container: &PodContainer, tty: bool) -> Stream {
    let request = json!({ "container_id": container.id, "stdin": true, "stdout": true, "stderr": !tty, "tty": tty });
    Stream::connect(call("Attach", &request)["url"].as_str().unwrap())
}

/// Attaches, and waits until what the container says comes: the server answers before that.
#[track_caller]
fn attached(container: &PodContainer, name: &str, tty: bool) -> Stream {
    let mut stream = attach(container, tty);
    stream.send(channel::STDIN, format!("{name}\n").as_bytes());
    stream.wait_for(channel::STDOUT, &format!("heard {name}{}", if tty { "\r\n" } else { "\n" }));
    stream
}

/// Says what it hears, to both outputs.
const EAR: &str = "echo up; while read line; do echo heard $line; echo aside $line >&2; done; echo end; exit 5";

/// Says what it hears, and the terminal's size whenever that changes. A signal that comes just before `read` is looked at
/// after it only; `wait` misses none.
const TERMINAL: &str = "exec 3<&0; while read line; do echo heard $line; done <&3 & trap 'stty size' WINCH; echo up; \
                        while :; do wait; done";

#[test]
fn a_terminal_has_the_size_of_the_one_that_is_attached() {
    pods("cri-attach-size", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(TERMINAL);
        config["tty"] = json!(true);
        config["stdin"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let mut one = attached(&container, "one", true);
        for (width, height) in [(101, 37), (80, 24), (333, 111)] {
            one.send(channel::RESIZE, format!(r#"{{"Width":{width},"Height":{height}}}"#).as_bytes());
            one.wait_for(channel::STDOUT, &format!("{height} {width}\r\n"));
        }
        // A second terminal sees the same one, and what it is resized to is everybody's.
        let mut two = attached(&container, "two", true);
        two.send(channel::RESIZE, br#"{"Width":90,"Height":30}"#);
        two.wait_for(channel::STDOUT, "30 90\r\n");
        one.wait_for(channel::STDOUT, "30 90\r\n");
        two.send(channel::STDIN, b"hello\n");
        one.wait_for(channel::STDOUT, "heard hello\r\n");
        // With one that leaves nothing ends, nor is anything resized.
        drop(one);
        two.send(channel::STDIN, b"again\n");
        two.wait_for(channel::STDOUT, "heard again\r\n");
        let size = container.exec(&["sh", "-c", "stty size < /dev/pts/0 || stty size < /dev/console"]);
        assert_eq!(size.out, "30 90\n", "{size:?}");
        container.stop(0);
    });
}

#[test]
fn several_attach_at_once_and_leave_one_by_one() {
    pods("cri-attach-two", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(EAR);
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
        // Nobody is there, and it runs on: its input is still open for the next.
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
fn input_that_comes_once_ends_with_the_first_that_leaves() {
    pods("cri-attach-once", |pods| {
        let pod = pods.pod();
        let mut config = pod.sh(EAR);
        config["stdin"] = json!(true);
        config["stdin_once"] = json!(true);
        let container = pod.start(&config);
        container.wait_for("up");
        let (mut one, two) = (attached(&container, "one", false), attached(&container, "two", false));
        one.send(channel::STDIN, b"all of it\n");
        one.wait_for(channel::STDOUT, "heard all of it\n");
        drop(one);
        // Who only listens learns of the end.
        let (out, err, _) = two.finish();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert_eq!(text(out), "heard all of it\nend\n");
        assert!(text(err).ends_with("aside all of it\n"));
        assert_eq!(container.wait(), (5, "Error".into()));
    });
}

#[test]
fn nothing_is_left_of_a_command_that_took_too_long_in_a_user_namespace() {
    pods("cri-exec-users", |pods| {
        let pod = userns::pod(pods);
        let container = pod.start(&userns::sh(&pod, userns::SLEEP));
        let scripts = ["exec sleep 4715", "sleep 4715 & sleep 4715", "setsid sh -c 'sleep 4715; :' & sleep 4715"];
        // runc ends the command alone: what that has started runs on, and the call waits for it.
        let scripts = if runtime() == RUNC { &scripts[..1] } else { &scripts[..] };
        for script in scripts {
            let request = json!({ "container_id": container.id, "cmd": ["sh", "-c", script], "timeout": 2 });
            let error = try_call("ExecSync", &request).unwrap_err();
            assert!(error.message.contains("timeout"), "{script}: {error}");
            let count = "grep -lE '471[5]' /proc/[0-9]*/cmdline 2>/dev/null | wc -l";
            let gone = node::eventually(Duration::from_secs(10), || (container.sh(count) == "0").then_some(()));
            assert!(gone.is_some(), "{script}: {}", container.sh("ps"));
        }
        assert_eq!(container.sh("echo still"), "still");
        container.stop(0);
    });
}
