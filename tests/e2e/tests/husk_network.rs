//! Who carries a pod's frames, and how many at once: queues for each processor, vhost-net where there is much to carry,
//! and no frame from an address that is not the guest's, whoever carries it.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::thread;
use std::time::Duration;

use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, PodContainer, Pods, pods};
use husk_e2e::{PYTHON, node, vm};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// Sends back whatever it is sent, to many at once; prints `up`, then connects as often as it is told on a line of its
/// own to an address, all at once, and prints how many of those connections brought back what they should.
const PROGRAM: &str = "import asyncio
async def echo(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()
async def serve():
    server = await asyncio.start_server(echo, '0.0.0.0', 8080, backlog=256)
    print('up', flush=True)
    await server.serve_forever()
asyncio.run(serve())";

const CLIENT: &str = "import asyncio, sys
async def one(number):
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    sent = bytes([number]) * 20000
    writer.write(sent)
    writer.write_eof()
    got = await reader.read(-1)
    writer.close()
    return got == sent
async def all():
    return sum(await asyncio.gather(*[one(number) for number in range(40)]))
print(asyncio.run(all()))";

/// A pod of so many processors with a server in it.
fn server(pods: &Pods, vcpus: u32) -> (Pod, PodContainer) {
    need_image(PYTHON);
    let mut config = pods.config();
    config["annotations"] = json!({ "io.husk.vcpus": vcpus.to_string(), "io.husk.memory_mib": "256" });
    let pod = pods.run(config);
    let mut config = pod.python(PROGRAM);
    config["linux"]["security_context"]["capabilities"] = json!({ "add_capabilities": ["NET_ADMIN", "NET_RAW"] });
    let container = pod.start(&config);
    container.wait_for("up");
    (pod, container)
}

fn address(pod: &Pod) -> SocketAddr {
    (pod.addresses().into_iter().find(|ip| ip.is_ipv4()).unwrap(), 8080).into()
}

/// The ids of the kernel's threads that carry frames for the pod: they are the VMM's.
fn workers(pod: &Pod) -> Vec<String> {
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

/// How often a thread has waited: for work.
fn turns(task: &str) -> u64 {
    let status = fs::read_to_string(format!("{task}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

/// Connections that send and get back what they sent, all at once.
fn many_connections(address: SocketAddr, count: u8, bytes: usize) {
    let connections: Vec<_> = (0..count)
        .map(|number| {
            thread::spawn(move || {
                let mut stream = TcpStream::connect_timeout(&address, PATIENCE).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let sent = vec![number; bytes];
                let (mut writer, data) = (stream.try_clone().unwrap(), sent.clone());
                let writing = thread::spawn(move || {
                    writer.write_all(&data).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut got = Vec::new();
                stream.read_to_end(&mut got).unwrap();
                writing.join().unwrap();
                assert!(got == sent, "connection {number}: {} bytes came back of {bytes}", got.len());
            })
        })
        .collect();
    connections.into_iter().for_each(|connection| connection.join().unwrap());
}

/// The node's own server, which gives back what it gets; its port.
fn node_server(connections: usize) -> u16 {
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
fn each_processor_has_queues_and_the_kernel_serves_them() {
    pods("net-queues", |pods| {
        let (pod, container) = server(pods, 2);
        assert_eq!(container.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 rx-1 tx-0 tx-1");
        many_connections(address(&pod), 40, 50_000);
        let port = node_server(40);
        let client = container.exec(&["python3", "-c", CLIENT, "10.88.0.1", &port.to_string()]);
        assert_eq!(client.out.trim(), "40", "{client:?}");
        let carrying = workers(&pod);
        assert_eq!(carrying.len(), 2, "a thread for each pair of queues");
        // The connections are spread over both.
        let before: Vec<_> = carrying.iter().map(|task| turns(task)).collect();
        many_connections(address(&pod), 40, 50_000);
        let more: Vec<_> = carrying.iter().zip(before).map(|(task, before)| turns(task) - before).collect();
        assert!(more.iter().all(|&turns| turns > 10), "turns of each: {more:?}");

        // An interface that comes later has as many.
        let run = |command: &str| {
            let words: Vec<_> = command.split(' ').collect();
            let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        };
        let (path, name) = (pod.netns(), pod.netns().file_name().unwrap().to_string_lossy().into_owned());
        run("ip link add huskveth type veth peer name later");
        run(&format!("ip link set later netns {name}"));
        run("ip addr add 10.98.0.1/24 dev huskveth");
        run("ip link set huskveth up");
        run(&format!("nsenter --net={} ip addr add 10.98.0.2/24 dev later", path.display()));
        run(&format!("nsenter --net={} ip link set later up", path.display()));
        // The server's image has no such program.
        let beside = pod.sleeper();
        let there = || beside.sh("ip addr").contains("10.98.0.2").then_some(());
        assert!(node::eventually(PATIENCE, there).is_some(), "{}", node::log_tail(20));
        assert_eq!(container.sh("ls /sys/class/net/later/queues | wc -l"), "4");
        many_connections("10.98.0.2:8080".parse().unwrap(), 40, 50_000);
        assert_eq!(workers(&pod).len(), 4, "and is served so");
        run("ip link del huskveth");
        // What is left works.
        many_connections(address(&pod), 10, 1000);

        let one = server(pods, 1);
        assert_eq!(one.1.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 tx-0");
    });
}

#[test]
fn a_pod_with_little_to_carry_has_no_thread_for_it() {
    pods("net-idle", |pods| {
        let (pod, _container) = server(pods, 1);
        many_connections(address(&pod), 1, 100);
        assert_eq!(workers(&pod).len(), 0);
        many_connections(address(&pod), 40, 50_000);
        assert_eq!(workers(&pod).len(), 1);
    });
}

#[test]
fn the_operator_can_do_without_vhost() {
    let _config = node::Config::set("vhost_net = false\n");
    pods("net-loop", |pods| {
        let (pod, container) = server(pods, 2);
        assert_eq!(container.sh("ls /sys/class/net/eth0/queues | tr '\\n' ' '"), "rx-0 rx-1 tx-0 tx-1");
        many_connections(address(&pod), 40, 50_000);
        assert_eq!(workers(&pod).len(), 0);
        only_own_frames_leave(&pod, &container);
    });
}

#[test]
fn the_kernel_lets_only_the_guests_own_frames_out() {
    pods("net-foreign", |pods| {
        let (pod, container) = server(pods, 1);
        many_connections(address(&pod), 20, 50_000);
        assert_eq!(workers(&pod).len(), 1, "{}", node::log_tail(20));
        only_own_frames_leave(&pod, &container);
        // The guest's own doing does not end its network.
        many_connections(address(&pod), 20, 1000);
    });
}

/// Sends frames from foreign addresses, between frames of its own: plain and tagged, broadcast and to the node.
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
fn only_own_frames_leave(pod: &Pod, container: &PodContainer) {
    let own = container.sh("cat /sys/class/net/eth0/address");
    let node = fs::read_to_string("/sys/class/net/cni0/address").unwrap();
    // SAFETY: socket takes three integers; the descriptor is new and nobody else's.
    let all = unsafe {
        let fd = libc::socket(
            libc::AF_PACKET,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::c_int::from((libc::ETH_P_ALL as u16).to_be()),
        );
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let limit = libc::timeval { tv_sec: 20, tv_usec: 0 };
    // SAFETY: the structure lives through the call and the length is its own.
    let set = unsafe {
        let length = size_of_val(&limit) as libc::socklen_t;
        libc::setsockopt(all.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const limit).cast(), length)
    };
    assert_eq!(set, 0);
    let sent = container.exec(&["python3", "-c", FRAMES, &own, node.trim()]);
    assert_eq!(sent.code, 0, "{sent:?}");
    let (mut own, mut foreign, mut last) = (0, 0, 0);
    // All four of the last, and each is seen more than once on its way.
    while last < 4 {
        let mut frame = [0u8; 2048];
        // SAFETY: the buffer lives through the call and the length is its own.
        let got = unsafe { libc::recv(all.as_raw_fd(), frame.as_mut_ptr().cast(), frame.len(), 0) };
        assert!(got >= 0, "no frame: {}; {own} own ones, {foreign} foreign ones", std::io::Error::last_os_error());
        let holds = |mark: &[u8]| frame.windows(mark.len()).any(|window| window == mark);
        own += usize::from(holds(b"husk-own"));
        foreign += usize::from(holds(b"husk-foreign"));
        last += usize::from(holds(b"husk-last"));
    }
    assert_eq!(foreign, 0, "frames from a foreign address left the pod");
    assert!(own >= 40, "{own} frames of the pod's own");
    // The host counts those it drops itself.
    let dropped = Command::new("nsenter")
        .arg(format!("--net={}", pod.netns().display()))
        .args(["tc", "-s", "filter", "show", "dev", "husk2", "ingress"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&dropped.stdout);
    assert_eq!(text.contains("(dropped 160,"), !workers(pod).is_empty(), "{text}");
}

#[test]
fn a_change_that_did_not_reach_the_guest_is_tried_again() {
    pods("husk-net-again", |pods| {
        let pod = pods.pod();
        let container = pod.sleeper();
        let shim = vm::shims_of(&pod.id)[0];
        // Without a descriptor the shim cannot look at the network.
        let limit = vm::limit_descriptors(shim, 3);
        let netns = format!("--net={}", pod.netns().display());
        let added =
            Command::new("nsenter").args([&netns, "ip", "route", "add", "10.77.0.0/16", "dev", "eth0"]).status();
        assert!(added.unwrap().success());
        let said =
            node::eventually(PATIENCE, || node::log_tail(40).contains("does not reach the guest yet").then_some(()));
        vm::limit_descriptors(shim, limit);
        assert!(said.is_some(), "{}", node::log_tail(20));
        // Nothing else changes that would tell the shim.
        let there = node::eventually(PATIENCE, || container.sh("ip route").contains("10.77.0.0/16").then_some(()));
        assert!(there.is_some(), "{}", node::log_tail(20));
        pod.stop();
    });
}
