//! Network data path of a pod: a queue pair per vCPU, vhost-net for pods with much traffic, and MAC anti-spoofing
//! with and without vhost-net.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, PodContainer, Pods, pods};
use husk_e2e::{PYTHON, case, node, vm};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Prints `up` and serves as an echo server for many connections at the same time.
const ECHO_SERVER: &str = "import _thread, socket
def echo(peer):
    while data := peer.recv(65536):
        peer.sendall(data)
    peer.close()
listener = socket.create_server(('0.0.0.0', 8080), backlog=256)
print('up', flush=True)
while True:
    _thread.start_new_thread(echo, listener.accept()[:1])";

/// Opens 40 connections to an echo server at the same time, and prints how many returned the data that was sent.
const ECHO_CLIENT: &str = "import socket, sys
peers = [socket.create_connection((sys.argv[1], int(sys.argv[2]))) for _ in range(40)]
for number, peer in enumerate(peers):
    peer.sendall(bytes([number]) * 20000)
    peer.shutdown(socket.SHUT_WR)
received = [b''.join(iter(lambda: peer.recv(65536), b'')) for peer in peers]
print(sum(data == bytes([number]) * 20000 for number, data in enumerate(received)))";

/// Starts a pod with `vcpus` vCPUs and the echo server.
fn server(pods: &Pods, vcpus: u32) -> (Pod, PodContainer) {
    need_image(PYTHON);
    let mut config = pods.config();
    config["annotations"] = json!({ "io.husk.vcpus": vcpus.to_string(), "io.husk.memory_mib": "256" });
    let pod = pods.run(config);
    let mut config = pod.python(ECHO_SERVER);
    config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN", "NET_RAW"] });
    let container = pod.start(&config);
    container.wait_for("up");
    (pod, container)
}

fn address(pod: &Pod) -> SocketAddr {
    (pod.addresses().into_iter().find(|ip| ip.is_ipv4()).unwrap(), 8080).into()
}

/// Returns the /proc directories of the pod's vhost workers, which are threads of the VMM.
fn vhost_workers(pod: &Pod) -> Vec<String> {
    let tasks = format!("/proc/{}/task", pod.pid());
    let mut found: Vec<_> = fs::read_dir(tasks)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("vhost-")))
        .map(|path| path.display().to_string())
        .collect();
    found.sort();
    found
}

/// Returns whether the pod's VMM has an open fd of vhost-net.
fn has_vhost_fd(pod: &Pod) -> bool {
    let fds = fs::read_dir(format!("/proc/{}/fd", pod.pid())).unwrap();
    // An fd may be closed before its link is read.
    fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).any(|target| target.starts_with("/dev/vhost-net"))
}

/// Hides a device of the node. Dropping this value makes the device visible again.
struct MissingDevice(&'static str);

impl MissingDevice {
    fn new(path: &'static str) -> Self {
        fs::rename(path, format!("{path}.missing")).unwrap();
        Self(path)
    }
}

impl Drop for MissingDevice {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}.missing", self.0), self.0);
    }
}

/// Returns the number of a thread's voluntary context switches, which is how often the thread has waited for work.
fn voluntary_switches(task: &str) -> u64 {
    let status = fs::read_to_string(format!("{task}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// Opens `count` connections at the same time. Sends `bytes` bytes on each connection and expects the same bytes back.
fn echo_over_connections(address: SocketAddr, count: u8, bytes: usize) {
    let connections: Vec<_> = (0..count)
        .map(|number| {
            thread::spawn(move || {
                let mut stream = TcpStream::connect_timeout(&address, TIMEOUT).unwrap();
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                let sent = vec![number; bytes];
                let (mut writer, data) = (stream.try_clone().unwrap(), sent.clone());
                let writing = thread::spawn(move || {
                    writer.write_all(&data).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut received = Vec::new();
                stream.read_to_end(&mut received).unwrap();
                writing.join().unwrap();
                assert!(received == sent, "connection {number}: received {} of {bytes} bytes", received.len());
            })
        })
        .collect();
    connections.into_iter().for_each(|connection| connection.join().unwrap());
}

/// Starts an echo server on the node that serves `connections` connections, and returns its port.
fn start_node_server(connections: usize) -> u16 {
    let listener = TcpListener::bind("10.88.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().take(connections) {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                stream.write_all(&all).unwrap();
            });
        }
    });
    port
}

#[test]
fn vhost_net_serves_one_queue_pair_per_vcpu() {
    pods("net-queues", |pods| {
        let (pod, container) = server(pods, 2);
        assert_eq!(container.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 rx-1 tx-0 tx-1");
        echo_over_connections(address(&pod), 40, 50_000);
        let port = start_node_server(40);
        let client = container.exec(&["python3", "-S", "-c", ECHO_CLIENT, "10.88.0.1", &port.to_string()]);
        assert_eq!(client.out.trim(), "40", "{client:?}");
        let active = vhost_workers(&pod);
        assert_eq!(active.len(), 2, "two queue pairs must have two vhost workers");
        // The connections are spread over both workers.
        let before: Vec<_> = active.iter().map(|task| voluntary_switches(task)).collect();
        echo_over_connections(address(&pod), 40, 50_000);
        let added: Vec<_> = active.iter().zip(before).map(|(task, before)| voluntary_switches(task) - before).collect();
        assert!(
            added.iter().all(|&count| count > 10),
            "each worker must make more than 10 voluntary context switches: {added:?}"
        );

        // A hot-plugged interface has the same number of queue pairs.
        let run = |command: &str| {
            let words: Vec<_> = command.split(' ').collect();
            let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
            assert!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        };
        let (path, name) = (pod.netns(), pod.netns().file_name().unwrap().to_string_lossy().into_owned());
        run("ip link add huskveth type veth peer name later");
        run(&format!("ip link set later netns {name}"));
        run("ip addr add 10.98.0.1/24 dev huskveth");
        run("ip link set huskveth up");
        run(&format!("nsenter --net={} ip addr add 10.98.0.2/24 dev later", path.display()));
        run(&format!("nsenter --net={} ip link set later up", path.display()));
        // The echo server's image has no `ip`. Therefore, the test looks for the address in /proc/net/fib_trie, which
        // also lists the guest kernel's own addresses.
        let has_address = || container.sh("cat /proc/net/fib_trie").contains("10.98.0.2\n").then_some(());
        assert!(node::eventually(TIMEOUT, has_address).is_some(), "{}", node::log_tail(20));
        assert_eq!(container.sh("ls /sys/class/net/later/queues | wc -l"), "4");
        echo_over_connections("10.98.0.2:8080".parse().unwrap(), 40, 50_000);
        assert_eq!(vhost_workers(&pod).len(), 4, "two interfaces must have four vhost workers");
        run("ip link del huskveth");
        // The first interface still works.
        echo_over_connections(address(&pod), 10, 1000);
    });
}

#[test]
fn much_traffic_starts_vhost_worker_and_spoofed_frames_are_dropped() {
    pods("net-idle", |pods| {
        let (pod, container) = server(pods, 1);
        assert_eq!(container.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 tx-0");
        echo_over_connections(address(&pod), 1, 100);
        assert_eq!(vhost_workers(&pod).len(), 0);
        assert!(!has_vhost_fd(&pod), "the VMM has an fd of vhost-net before it needs vhost-net");
        echo_over_connections(address(&pod), 40, 50_000);
        assert_eq!(vhost_workers(&pod).len(), 1, "{}", node::log_tail(20));
        assert!(has_vhost_fd(&pod));
        assert_spoofed_frames_are_dropped(&pod, &container);
        // The pod's network still works after the spoofed frames.
        echo_over_connections(address(&pod), 20, 1000);
    });
}

#[test]
fn vmm_carries_frames_if_vhost_net_cannot_be_opened() {
    pods("net-no-vhost", |pods| {
        let failures = || node::log_tail(usize::MAX).matches("failed to open /dev/vhost-net").count();
        let (pod, _container) = server(pods, 1);
        let before = failures();
        let missing = MissingDevice::new("/dev/vhost-net");
        echo_over_connections(address(&pod), 40, 50_000);
        let logged = node::eventually(TIMEOUT, || (failures() > before).then_some(()));
        assert!(logged.is_some(), "{}", node::log_tail(20));
        drop(missing);
        // After the failure, the VMM does not ask for vhost-net again.
        echo_over_connections(address(&pod), 40, 50_000);
        assert_eq!((vhost_workers(&pod).len(), failures() - before), (0, 1), "{}", node::log_tail(20));
    });
}

#[test]
fn vhost_net_can_be_disabled_by_configuration() {
    let _config = node::Config::set("vhost_net = false\n");
    pods("net-loop", |pods| {
        let (pod, container) = server(pods, 2);
        assert_eq!(container.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 rx-1 tx-0 tx-1");
        echo_over_connections(address(&pod), 40, 50_000);
        assert_eq!(vhost_workers(&pod).len(), 0);
        assert_spoofed_frames_are_dropped(&pod, &container);
    });
}

/// Sends frames with spoofed source MACs, alternating with frames with the interface's MAC. Sends each frame to the
/// broadcast address and to the node, with and without a VLAN tag.
const FRAMES: &str = "import socket, sys
own, node = (bytes.fromhex(word.replace(':', '')) for word in sys.argv[1:3])
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(('eth0', 0))
foreign = [bytes.fromhex('020000000077'), node, own[:5] + bytes([own[5] ^ 1]), bytes([own[0] ^ 2]) + own[1:]]
def send(source, mark):
    for to in b'\\xff' * 6, node:
        for kind in b'\\x88\\xb5', b'\\x81\\x00\\x00\\x05\\x88\\xb5':
            link.send(to + source + kind + mark.ljust(60, b'.'))
for round in range(10):
    for source in foreign:
        send(source, b'husk-foreign')
    send(own, b'husk-own')
send(own, b'husk-last')";

#[track_caller]
fn assert_spoofed_frames_are_dropped(pod: &Pod, container: &PodContainer) {
    let own = container.sh("cat /sys/class/net/eth0/address");
    let node = fs::read_to_string("/sys/class/net/cni0/address").unwrap();
    let all = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .expect("failed to open a packet socket");
    setsockopt(&all, sockopt::ReceiveTimeout, &TimeVal::seconds(20)).unwrap();
    let sent = container.exec(&["python3", "-S", "-c", FRAMES, &own, node.trim()]);
    assert_eq!(sent.code, 0, "{sent:?}");
    let (mut own, mut spoofed, mut last) = (0, 0, 0);
    // The pod sends `husk-last` in four frames. Each frame is captured on several interfaces.
    while last < 4 {
        let mut frame = [0u8; 2048];
        if let Err(error) = recv(all.as_raw_fd(), &mut frame, MsgFlags::empty()) {
            panic!("failed to receive a frame: {error}; {own} own and {spoofed} spoofed frames so far");
        }
        let contains = |mark: &[u8]| frame.windows(mark.len()).any(|window| window == mark);
        own += usize::from(contains(b"husk-own"));
        spoofed += usize::from(contains(b"husk-foreign"));
        last += usize::from(contains(b"husk-last"));
    }
    assert_eq!(spoofed, 0, "frames with a spoofed source MAC left the pod");
    assert!(own >= 40, "captured {own} frames with the interface's MAC, expected at least 40");
    // With vhost-net, the host's tc filter drops the spoofed frames and counts them. Without vhost-net, the VMM drops
    // them.
    let dropped = Command::new("nsenter")
        .arg(format!("--net={}", pod.netns().display()))
        .args(["tc", "-s", "filter", "show", "dev", "husk2", "ingress"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&dropped.stdout);
    assert_eq!(
        text.contains("(dropped 160,"),
        !vhost_workers(pod).is_empty(),
        "only with vhost-net, tc drops 160 frames\n{text}"
    );
}

#[test]
fn failed_network_update_is_retried() {
    pods("husk-net-again", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let shim = vm::shim_pids_of(&pod.id)[0];
        // Without a free fd the shim cannot read the network's configuration.
        let limit = vm::set_fd_limit(shim, 3);
        let netns = format!("--net={}", pod.netns().display());
        let added =
            Command::new("nsenter").args([&netns, "ip", "route", "add", "10.77.0.0/16", "dev", "eth0"]).status();
        assert!(added.unwrap().success());
        let logged = node::eventually(TIMEOUT, || {
            node::log_tail(40).contains("failed to apply a change of the pod's network").then_some(())
        });
        vm::set_fd_limit(shim, limit);
        assert!(logged.is_some(), "{}", node::log_tail(20));
        // No further change notifies the shim. Therefore only the retry can bring the route to the guest.
        let applied = node::eventually(TIMEOUT, || container.sh("ip route").contains("10.77.0.0/16").then_some(()));
        assert!(applied.is_some(), "{}", node::log_tail(20));
        pod.stop();
    });
}

/// Runs a program of the node. Returns its output.
fn on_node(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A client such as `ctr` can run one pod after another in a network namespace of its own.
#[test]
fn network_namespace_that_outlives_a_pod_serves_the_next_pod() {
    case("netns-again", |case| {
        on_node("ip", "netns add husk-again");
        on_node("ip", "link add again0 type veth peer name eth0 netns husk-again");
        on_node("ip", "addr add 10.97.0.1/24 dev again0");
        on_node("ip", "link set again0 up");
        on_node("ip", "-n husk-again addr add 10.97.0.2/24 dev eth0");
        on_node("ip", "-n husk-again link set eth0 up");
        let filters = || on_node("tc", "-n husk-again filter show dev eth0 ingress");
        for _ in 0..2 {
            let run = case.sh("ping -c 1 -w 30 10.97.0.1 > /dev/null && echo up; exec sleep 1000");
            let container = case.container(run.flags(&["--with-ns", "network:/run/netns/husk-again"]));
            container.kill();
            let removed = node::eventually(TIMEOUT, || filters().trim().is_empty().then_some(()));
            assert!(removed.is_some(), "the pod has left a filter: {}", filters());
            // A shim that is killed leaves a filter that redirects to a tap which no longer exists.
            on_node("ip", "-n husk-again link add gone type dummy");
            on_node(
                "tc",
                "-n husk-again filter add dev eth0 ingress prio 1 matchall action mirred egress redirect dev gone",
            );
            on_node("ip", "-n husk-again link del gone");
        }
        on_node("ip", "netns del husk-again");
        // `ip netns add` has made this mount for the names of namespaces.
        on_node("umount", "/run/netns");
    });
}
