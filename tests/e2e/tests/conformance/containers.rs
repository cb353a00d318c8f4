//! Containers: lifecycle, status and lists, and several containers in a pod.

use std::fs;

use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::{call, number, try_call};
use serde_json::json;

use super::{run_once, sleeper};

#[test]
fn container() {
    pods("conf-container", |pods| {
        let pod = pods.pod();
        group("Container", |group| {
            group.check("create, start, stop, remove, with the state at each step", || {
                let container = pod.create(&pod.sh("trap 'exit 0' TERM; echo up; sleep 100000 & wait"));
                assert_eq!(container.status()["state"], "CONTAINER_CREATED");
                container.start();
                assert_eq!(container.status()["state"], "CONTAINER_RUNNING");
                container.wait_for("up");
                container.stop(10);
                let status = container.status();
                assert_eq!((&status["state"], &status["reason"]), (&json!("CONTAINER_EXITED"), &json!("Completed")));
                assert!(number(&status["started_at"]) <= number(&status["finished_at"]), "{status}");
                container.remove();
                assert!(try_call("ContainerStatus", &json!({ "container_id": container.id })).is_err());
            });
            group.check("exit code and reason of a failed container", || {
                let container = pod.start(&pod.sh("exit 42"));
                assert_eq!(container.wait(), (42, "Error".into()));
                container.remove();
            });
            group.check("SIGTERM first, SIGKILL after the timeout", || {
                let container = pod.start(&pod.sh("trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done"));
                container.wait_for("up");
                container.stop(2);
                assert_eq!(container.wait().0, 137);
                assert!(container.log().contains("asked"));
                container.remove();
            });
            group.check("removing a running container ends it", || {
                let container = sleeper(&pod, |_| {});
                container.remove();
                assert!(try_call("ContainerStatus", &json!({ "container_id": container.id })).is_err());
            });
            group.check("removing a container twice succeeds", || {
                let container = pod.create(&pod.sh("true"));
                container.remove();
                container.remove();
            });
            group.check("stopping a container twice succeeds", || {
                let container = sleeper(&pod, |_| {});
                container.stop(0);
                container.stop(0);
                container.remove();
            });
            group.check("starting a container twice is an error", || {
                let container = sleeper(&pod, |_| {});
                assert!(try_call("StartContainer", &json!({ "container_id": container.id })).is_err());
                container.remove();
            });
            group.check("StartContainer fails if the program does not exist", || {
                let mut config = pod.sh("");
                config["command"] = json!(["/no/such/program"]);
                let container = pod.create(&config);
                let error = try_call("StartContainer", &json!({ "container_id": container.id })).unwrap_err();
                assert!(error.message.contains("/no/such/program"), "{error}");
                assert_eq!(number(&container.status()["exit_code"]), 128);
                container.remove();
            });
            group.check("command, arguments, environment, working directory", || {
                let text = run_once(&pod, "", |config| {
                    config["command"] = json!(["sh", "-c"]);
                    config["args"] = json!(["echo $WORD in $PWD $0", "argument"]);
                    config["envs"] = json!([{ "key": "WORD", "value": "value" }]);
                    config["working_dir"] = json!("/srv");
                });
                assert_eq!(text, "value in /srv argument");
            });
            group.check("labels, annotations, mounts and image in the status", || {
                let container = sleeper(&pod, |config| {
                    config["labels"] = json!({ "a": "label" });
                    config["annotations"] = json!({ "an": "annotation" });
                    config["mounts"] =
                        json!([{ "host_path": pods.dir().to_string_lossy(), "container_path": "/m", "readonly": true }]);
                });
                let status = container.status();
                assert_eq!((&status["labels"]["a"], &status["annotations"]["an"]), (&json!("label"), &json!("annotation")));
                assert_eq!(status["mounts"][0]["container_path"], "/m");
                assert!(status["image"]["image"].as_str().unwrap().contains("busybox"), "{status}");
                container.remove();
            });
            group.check("a container is listed by pod and state, by label and by id", || {
                let container = sleeper(&pod, |config| config["labels"] = json!({ "find": "me" }));
                let state = json!({ "state": "CONTAINER_RUNNING" });
                for filter in [
                    json!({ "pod_sandbox_id": pod.id, "state": state }),
                    json!({ "label_selector": { "find": "me" } }),
                    json!({ "id": container.id }),
                ] {
                    let list = call("ListContainers", &json!({ "filter": filter }));
                    let ids: Vec<_> =
                        list["containers"].as_array().unwrap().iter().map(|one| one["id"].clone()).collect();
                    assert_eq!(ids, [json!(container.id)], "ListContainers with {filter} must list only the container");
                }
                container.remove();
            });
            group.check("each new container starts with the image's files", || {
                assert_eq!(run_once(&pod, "echo mark > /srv/mark; ls /srv", |_| {}), "mark");
                assert_eq!(run_once(&pod, "ls /srv", |_| {}), "");
            });
            group.check("a termination message reaches the node", || {
                let message = pods.dir().join("message");
                fs::write(&message, "").unwrap();
                run_once(&pod, "echo why > /dev/termination-log", |config| {
                    config["mounts"] =
                        json!([{ "host_path": message.to_string_lossy(), "container_path": "/dev/termination-log" }]);
                });
                assert_eq!(fs::read_to_string(&message).unwrap(), "why\n");
            });
        });
    });
}

#[test]
fn several_containers() {
    pods("conf-several", |pods| {
        let pod = pods.pod();
        group("Several containers of a pod", |group| {
            group.check("containers reach each other by localhost", || {
                let server = sleeper(&pod, |config| {
                    config["command"] = json!(["sh", "-c", "nc -ll -p 8080 -e echo served & echo up; wait"]);
                });
                server.wait_for("up");
                let client = sleeper(&pod, |_| {});
                client.sh("until netstat -ltn | grep -q :8080; do sleep 0.1; done");
                assert_eq!(client.sh("nc 127.0.0.1 8080 < /dev/null"), "served");
                server.remove();
                client.remove();
            });
            group.check("each container has its own log", || {
                let (a, b) = (pod.start(&pod.sh("echo of a")), pod.start(&pod.sh("echo of b")));
                a.wait();
                b.wait();
                assert!(a.log().ends_with("of a\n") && b.log().ends_with("of b\n"));
                a.remove();
                b.remove();
            });
            group.check("System V and POSIX shared memory is shared in the pod", || {
                let (a, b) = (sleeper(&pod, |_| {}), sleeper(&pod, |_| {}));
                a.sh("echo shared > /dev/shm/file");
                assert_eq!(b.sh("cat /dev/shm/file"), "shared");
                assert_eq!(a.sh("readlink /proc/self/ns/ipc"), b.sh("readlink /proc/self/ns/ipc"));
                a.remove();
                b.remove();
            });
            group.check("init containers in order, with a sidecar that keeps running", || {
                let dir = pods.dir().join("order");
                fs::create_dir_all(&dir).unwrap();
                let shared = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/shared" }]);
                let line = |text: &str| {
                    assert_eq!(
                        run_once(&pod, &format!("echo {text} >> /shared/order"), |c| c["mounts"] = shared.clone()),
                        ""
                    );
                };
                line("first");
                let sidecar = sleeper(&pod, |config| {
                    config["mounts"] = shared.clone();
                    config["command"] = json!([
                        "sh",
                        "-c",
                        "trap 'echo ends >> /shared/order; exit 0' TERM; echo sidecar >> /shared/order; echo up
                         while :; do sleep 0.1; done"
                    ]);
                });
                sidecar.wait_for("up");
                line("second");
                line("main");
                sidecar.stop(30);
                assert_eq!(sidecar.status()["exit_code"], 0);
                sidecar.remove();
                assert_eq!(fs::read_to_string(dir.join("order")).unwrap(), "first\nsidecar\nsecond\nmain\nends\n");
            });
            group.check("the pod stays ready after its last container ends", || {
                run_once(&pod, "true", |_| {});
                assert!(pod.is_ready());
                assert_eq!(run_once(&pod, "echo next", |_| {}), "next");
            });
        });
    });
}
