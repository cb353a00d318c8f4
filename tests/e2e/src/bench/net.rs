//! Throughput and round-trip time of a pod's network: with runc, with vhost-net and with the VMM's data path.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use husk_benchmarks::{Report, median};

use super::timelines::{at, timeline};
use super::{Options, Quantity, Variant, interleave};
use crate::PYTHON;
use crate::cri::pod::need_image;
use crate::cri::{Pod, PodContainer, pods_with_handler};

/// A Python server. On port 8080, the server echoes the received data. On port 8081, the server counts the received
/// bytes, and sends the count after the client's last byte. Each port serves one connection at a time.
const SERVER: &str = "import socket, threading
def serve(port, each):
    server = socket.create_server(('0.0.0.0', port))
    while True:
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            each(connection)
def echo(connection):
    while data := connection.recv(65536):
        connection.sendall(data)
def sink(connection):
    buffer, count = bytearray(1 << 20), 0
    while got := connection.recv_into(buffer):
        count += got
    connection.sendall(str(count).encode())
threading.Thread(target=serve, args=(8081, sink)).start()
threading.Thread(target=serve, args=(8080, echo)).start()
print('up', flush=True)";

const SENDER: &str = "import socket, sys
data = bytes(1 << 20)
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    for _ in range(int(sys.argv[3])):
        connection.sendall(data)";

/// Number of requests in one measurement of the round-trip time.
const ROUND_TRIPS: usize = 300;

/// A variant: its name, its runtime, and lines of Husk's configuration.
type DataPath = (&'static str, Variant, &'static str);

/// The variants. Husk's default is vhost-net.
const PATHS: [DataPath; 3] = [
    ("runc", Variant::Runc, ""),
    ("husk, vhost-net", Variant::Boot, "vhost_net = true\n"),
    ("husk, VMM", Variant::Boot, "vhost_net = false\n"),
];

/// Measures TCP between a pod and the node, and what the network adds to the start of a pod.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    need_image(PYTHON);
    let (runs, mib, vcpus) = (options.runs.unwrap_or(5), options.mib.unwrap_or(64), options.vcpus);
    let mut report = Report::new("net").with("runs", runs).with("mib", mib).with("vcpus", vcpus);
    traffic(&mut report, runs, mib, vcpus);
    starts(&mut report, runs);
    report
}

fn traffic(report: &mut Report, runs: u32, mib: usize, vcpus: u32) {
    let quantities = [
        Quantity::higher("TCP from the pod", "MiB/s"),
        Quantity::higher("TCP to the pod", "MiB/s"),
        Quantity::lower("round-trip time of one byte", "µs"),
    ];
    pods_with_handler("bench-net", "husk", |pods| {
        let made: Vec<(Pod, PodContainer)> = PATHS
            .iter()
            .map(|(_, variant, lines)| {
                let _config = variant.configure_with(lines);
                let mut config = pods.config();
                config["annotations"]["io.husk.vcpus"] = vcpus.to_string().into();
                let pod = pods.run_with_handler(variant.handler(), config);
                let container = pod.start(&pod.python(SERVER));
                container.wait_for("up");
                (pod, container)
            })
            .collect();
        // The warm-up round includes the switch to vhost-net.
        interleave(report, runs, &PATHS.map(|(name, ..)| name), &quantities, |index, _| {
            let (pod, container) = &made[index];
            let ip = pod.addresses().into_iter().find(IpAddr::is_ipv4).unwrap();
            let values = vec![measure_egress(container, mib), measure_ingress(ip, mib), round_trip(ip)];
            if PATHS[index].1.is_husk() {
                let threads = fs::read_dir(format!("/proc/{}/task", pod.pid())).unwrap().count();
                println!("the VMM of {} has {threads} threads", PATHS[index].0);
            }
            values
        });
    });
}

/// Returns the throughput from the pod to the node, in MiB/s.
fn measure_egress(container: &PodContainer, mib: usize) -> f64 {
    let listener = TcpListener::bind("10.88.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let receiver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut count) = (vec![0; 1 << 20], 0);
        let begin = Instant::now();
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return (count, begin.elapsed()),
                length => count += length,
            }
        }
    });
    let limit = Duration::from_secs(120);
    let sent = container.exec_within(limit, &["python3", "-c", SENDER, "10.88.0.1", &port, &mib.to_string()]);
    assert_eq!(sent.code, 0, "the sending program failed: {sent:?}");
    let (count, took) = receiver.join().unwrap();
    assert_eq!(count, mib << 20);
    mib as f64 / took.as_secs_f64()
}

/// Returns the throughput from the node to the pod, in MiB/s.
fn measure_ingress(ip: IpAddr, mib: usize) -> f64 {
    let mut stream = TcpStream::connect((ip, 8081)).unwrap();
    let data = vec![0; 1 << 20];
    let begin = Instant::now();
    for _ in 0..mib {
        stream.write_all(&data).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut count = String::new();
    stream.read_to_string(&mut count).unwrap();
    assert_eq!(count, (mib << 20).to_string());
    mib as f64 / begin.elapsed().as_secs_f64()
}

/// Returns the median round-trip time of one byte, in µs.
fn round_trip(ip: IpAddr) -> f64 {
    let mut stream = TcpStream::connect((ip, 8080)).unwrap();
    stream.set_nodelay(true).unwrap();
    let trips: Vec<f64> = (0..ROUND_TRIPS)
        .map(|_| {
            let begin = Instant::now();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            begin.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    median(&trips)
}

/// Measures the duration of a pod's start, and the time from the VMM's start until the network is connected.
fn starts(report: &mut Report, runs: u32) {
    let quantities = [
        Quantity::lower("`vmm process` until `network connected`", "ms"),
        Quantity::lower("`shim start` until `sandbox set up`", "ms"),
    ];
    let paths = PATHS.get(1..).unwrap_or_default();
    let names: Vec<&str> = paths.iter().map(|(name, ..)| *name).collect();
    interleave(report, runs, &names, &quantities, |index, _| {
        let (_, variant, lines) = paths[index];
        let _config = variant.configure_with(lines);
        let mut id = String::new();
        pods_with_handler("bench-net-start", "husk", |pods| id = pods.pod().id);
        let timeline = timeline(&id);
        let between = |from, to| at(&timeline, to) - at(&timeline, from);
        vec![between("vmm process", "network connected"), between("shim start", "sandbox set up")]
    });
}
