//! Many requests at once, and many streams whose readers have stopped.
use std::fs::File;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use husk_e2e::cri::pod::{need_image, remove_parent, text};
use husk_e2e::cri::{Pod, pods, try_call_within};
use husk_e2e::{containerd_log, node};
use nix::sched::{CloneFlags, setns};
use serde_json::json;

/// Each exec has two streams to the guest.
const EXECS: usize = 130;
/// Each connection has a stream to the guest.
const CONNECTIONS: usize = 150;
/// The timeout of an exec. This number of execs takes long in an emulated node.
const LIMIT: Duration = Duration::from_secs(240);
/// The timeout of a connection's first byte.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// Number of pods that are removed at once.
const PODS: usize = 12;
/// Number of processes that keep the node busy meanwhile.
const BUSY: usize = 24;
/// The timeout of a request that removes a pod, and of its repetitions by the kubelet.
const REQUEST: Duration = Duration::from_secs(120);
const REMOVAL: Duration = Duration::from_secs(150);
/// The timeout for the pods' cgroups to be removable: a shim may end later than its pod.
const CGROUPS: Duration = Duration::from_secs(60);

/// A server that sends without end to every client.
const SERVER: &str = "
import _thread, socket, time
def send(peer):
    while True:
        peer.sendall(bytes(65536))
def serve(listener):
    while True:
        _thread.start_new_thread(send, (listener.accept()[0],))
_thread.start_new_thread(serve, (socket.create_server(('127.0.0.1', 8001), backlog=128),))
print('up', flush=True)
time.sleep(100000)";

#[test]
#[ignore = "long: 130 execs take a minute in an emulated node"]
fn many_execs_at_once_all_run() {
    pods("cri-burst", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let id = &container.id;
        let results = thread::scope(|scope| {
            let exec = |number: usize| {
                let command = ["echo", &format!("exec {number}")];
                let request = json!({ "container_id": id, "cmd": command, "timeout": LIMIT.as_secs() });
                try_call_within(LIMIT, "RuntimeService", "ExecSync", &request)
            };
            let execs: Vec<_> = (0..EXECS).map(|number| scope.spawn(move || exec(number))).collect();
            execs.into_iter().map(|exec| exec.join().unwrap()).collect::<Vec<_>>()
        });
        let failed: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        assert!(failed.is_empty(), "{} of {EXECS} execs failed: {:?}\n{}", failed.len(), failed[0], node::log_tail(20));
        assert!(results.iter().all(|result| result.as_ref().unwrap()["exit_code"].as_i64().unwrap_or(0) == 0));
    });
}

/// Processes that use all CPU time of the node until they are dropped.
struct BusyNode(Vec<Child>);

impl BusyNode {
    fn start() -> Self {
        let busy = || Command::new("/bin/sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        BusyNode((0..BUSY).map(|_| busy()).collect())
    }
}

impl Drop for BusyNode {
    fn drop(&mut self) {
        for process in &mut self.0 {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Stops and removes a pod as the kubelet does: a request that fails is repeated.
fn remove(pod: &str) -> Result<(), String> {
    let request = json!({ "pod_sandbox_id": pod });
    for method in ["StopPodSandbox", "RemovePodSandbox"] {
        let call = || {
            let result = try_call_within(REQUEST, "RuntimeService", method, &request);
            result.inspect_err(|status| eprintln!("{pod}: {method} failed: {status}")).ok()
        };
        node::eventually(REMOVAL, call).ok_or_else(|| format!("{method} failed"))?;
    }
    Ok(())
}

// On a busy node, requests exceed containerd's timeouts. containerd then repeats them while the shim is handling them.
#[test]
#[ignore = "long: many pods take minutes on a busy emulated node"]
fn pods_removed_at_once_on_a_busy_node_leave_nothing() {
    pods("cri-burst-removal", |pods| {
        let up = thread::scope(|scope| {
            let start = || {
                let pod = pods.pod();
                let container = pod.sleeper().id;
                (pod.id, container, text(&pod.config["metadata"]["name"]))
            };
            let starts: Vec<_> = (0..PODS).map(|_| scope.spawn(start)).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect::<Vec<_>>()
        });
        let busy = BusyNode::start();
        let begin = Instant::now();
        let results: Vec<_> = thread::scope(|scope| {
            let removals: Vec<_> = up.iter().map(|(id, ..)| scope.spawn(move || remove(id))).collect();
            removals.into_iter().map(|removal| removal.join().unwrap()).collect()
        });
        drop(busy);
        println!("{PODS} pods were removed in {:?}: {results:?}", begin.elapsed());
        assert!(results.iter().all(Result::is_ok), "{results:?}\n{}", node::log_tail(60));
        for (pod, container, name) in &up {
            let log = || containerd_log::lines_with(&[pod, container]);
            assert!(remove_parent_within(name, CGROUPS), "the cgroup of {name} stays\n{}", log());
        }
    });
}

/// Removes the parent cgroup of a pod. Returns whether it is gone within the limit.
fn remove_parent_within(name: &str, limit: Duration) -> bool {
    let path = Path::new("/sys/fs/cgroup/kubepods").join(name);
    let gone = || {
        remove_parent(name);
        (!path.exists()).then_some(())
    };
    node::eventually(limit, gone).is_some()
}

/// Connects to the server in the pod as port forwarding does: from a process on the node, in the pod's network
/// namespace.
fn connect(pod: &Pod) -> Vec<TcpStream> {
    let netns = File::open(pod.netns()).unwrap();
    // The thread ends afterwards, because it stays in the namespace.
    let connect = move || {
        setns(netns, CloneFlags::CLONE_NEWNET).unwrap();
        (0..CONNECTIONS).map(|_| TcpStream::connect("127.0.0.1:8001").unwrap()).collect()
    };
    thread::spawn(connect).join().unwrap()
}

#[test]
fn pod_with_many_stalled_connections_runs_on() {
    need_image(husk_e2e::PYTHON);
    pods("cri-burst-stall", |pods| {
        let pod = pods.pod();
        let server = pod.start(&pod.python(SERVER));
        server.wait_for("up");
        let stalled = connect(&pod);
        // Each stalled connection gets data until the buffers on its way are full.
        for stream in &stalled {
            stream.set_read_timeout(Some(READ_TIMEOUT)).unwrap();
            assert_eq!(stream.peek(&mut [0; 1]).unwrap(), 1);
        }
        assert_eq!(server.exec(&["echo", "here"]).out, "here\n");
        drop(stalled);
        assert_eq!(server.exec(&["echo", "here"]).out, "here\n");
    });
}
