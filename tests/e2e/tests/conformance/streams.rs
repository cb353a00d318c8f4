//! Streams and logs: ExecSync, Exec, Attach, PortForward and container logs.

use std::fs;

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::stream::{Stream, channel};
use husk_e2e::cri::{PodContainer, call, try_call};
use serde_json::{Value, json};

use super::{run_once, sleeper};

/// Sends the request `method` with the additional fields `options`, and connects to the URL in the answer.
#[track_caller]
fn open(method: &str, container: &PodContainer, options: &Value) -> Stream {
    let mut request = json!({ "container_id": container.id, "stdout": true });
    request.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    Stream::connect(call(method, &request)["url"].as_str().unwrap())
}

#[test]
fn streams() {
    pods("conf-streams", |pods| {
        let pod = pods.pod();
        let container = sleeper(&pod, |_| {});
        group("Streaming", |group| {
            group.check("ExecSync: stdout, stderr and the exit code", || {
                let done = container.exec(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
                assert_eq!((done.code, done.out.as_str(), done.err.as_str()), (7, "out\n", "err\n"));
            });
            group.check("ExecSync: timeout", || {
                let request = json!({ "container_id": container.id, "cmd": ["sleep", "4714"], "timeout": 1 });
                assert!(try_call("ExecSync", &request).unwrap_err().message.contains("timeout"));
            });
            group.check("Exec: stdin, stdout, stderr and the exit status", || {
                let script = "read a; echo got $a; echo bad >&2; exit 4";
                let options = json!({ "cmd": ["sh", "-c", script], "stdin": true, "stderr": true });
                let mut stream = open("Exec", &container, &options);
                stream.send(channel::STDIN, b"a line\n");
                let (out, err, status) = stream.finish();
                assert_eq!((out, err), (b"got a line\n".to_vec(), b"bad\n".to_vec()));
                assert!(status.contains('4'), "{status}");
            });
            group.check("Exec: a terminal that is resized", || {
                let script = "trap 'stty size; exit 0' WINCH; echo up; while :; do sleep 0.1; done";
                let mut stream =
                    open("Exec", &container, &json!({ "cmd": ["sh", "-c", script], "stdin": true, "tty": true }));
                stream.wait_for(channel::STDOUT, "up\r\n");
                stream.send(channel::RESIZE, br#"{"Width":101,"Height":37}"#);
                stream.wait_for(channel::STDOUT, "37 101\r\n");
            });
            group.check("Attach: stdin and stdout of a running container", || {
                let mut config = pod.sh("echo up; read line; echo heard $line");
                config["stdin"] = json!(true);
                config["stdin_once"] = json!(true);
                let attached = pod.start(&config);
                attached.wait_for("up");
                let mut stream = open("Attach", &attached, &json!({ "stdin": true }));
                stream.send(channel::STDIN, b"word\n");
                stream.wait_for(channel::STDOUT, "heard word");
                drop(stream);
                attached.wait();
                attached.remove();
            });
            group.check("PortForward to a server on the pod's localhost", || {
                container.sh("echo page > /srv/index.html; httpd -p 127.0.0.1:8081 -h /srv");
                let request = json!({ "pod_sandbox_id": pod.id, "port": [8081] });
                let url = call("PortForward", &request)["url"].as_str().unwrap().to_owned();
                let mut stream = Stream::connect(&format!("{url}?port=8081"));
                stream.send(channel::STDIN, b"GET / HTTP/1.0\r\n\r\n");
                stream.wait_for(channel::STDIN, "page");
            });
        });
        group("Logs", |group| {
            group.check("format of a line: time, stream, full or partial, text", || {
                let logger = pod.start(&pod.sh("echo out; head -c 20000 /dev/zero | tr '\\0' x; echo; echo err >&2"));
                logger.wait();
                let log = logger.log();
                assert!(
                    log.contains(" stdout F out\n") && log.contains(" stdout P xxx") && log.contains(" stderr F err\n")
                );
                logger.remove();
            });
            group.check("ReopenContainerLog starts a new log after rotation", || {
                let logger =
                    pod.start(&pod.sh("echo one; until [ -e /tmp/go ]; do sleep 0.1; done; echo two; sleep 1000"));
                logger.wait_for("one");
                fs::rename(logger.log_path(), logger.log_path().with_extension("old")).unwrap();
                call("ReopenContainerLog", &json!({ "container_id": logger.id }));
                logger.sh("touch /tmp/go");
                logger.wait_for("two");
                assert!(!logger.log().contains("one"));
                logger.remove();
            });
            group.check("the log of an exited container can be read", || {
                assert_eq!(run_once(&pod, "echo last words", |_| {}), "last words");
            });
        });
        container.stop(0);
    });
}
