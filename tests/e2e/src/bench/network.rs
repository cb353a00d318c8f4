//! Measures a pod's network with vhost-net and with the VMM's data path, in alternating runs.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use husk_config::timeline::Timeline;

use super::median;
use crate::cri::pod::need_image;
use crate::cri::{Pod, PodContainer, pods_with_handler};
use crate::{PYTHON, node};

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
const TIMELINES: &str = "/run/husk-bench-timelines";

struct Variant {
    name: &'static str,
    config: String,
    egress: Vec<f64>,
    ingress: Vec<f64>,
    round_trip: Vec<f64>,
    connected: Vec<f64>,
    started: Vec<f64>,
}

/// Measures vhost-net and the VMM's data path with `vcpus` vCPUs per pod. Prints a table with one row per data path.
///
/// # Panics
/// If a step fails.
pub fn measure(runs: u32, mib: usize, vcpus: u32) {
    need_image(PYTHON);
    let variant = |(name, vhost)| Variant {
        name,
        config: format!("vhost_net = {vhost}\ntimeline_log = \"{TIMELINES}\"\n"),
        egress: Vec::new(),
        ingress: Vec::new(),
        round_trip: Vec::new(),
        connected: Vec::new(),
        started: Vec::new(),
    };
    let mut variants = [("vhost-net", true), ("VMM", false)].map(variant);
    traffic(&mut variants, runs, mib, vcpus);
    starts(&mut variants, runs);
    println!("\n| frames carried by | out MiB/s | in MiB/s | round trip | network connected | sandbox set up |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");
    for variant in variants {
        let [egress, ingress, trip] =
            [&variant.egress, &variant.ingress, &variant.round_trip].map(|values| median(values));
        let [connected, started] = [&variant.connected, &variant.started].map(|values| median(values));
        let name = variant.name;
        println!("| {name} | {egress:.1} | {ingress:.1} | {trip:.0} µs | {connected:.0} ms | {started:.0} ms |");
    }
}

fn traffic(variants: &mut [Variant; 2], runs: u32, mib: usize, vcpus: u32) {
    pods_with_handler("bench-network", "husk", |pods| {
        let made: Vec<(Pod, PodContainer)> = variants
            .iter()
            .map(|variant| {
                let _config = node::Config::set(&variant.config);
                let mut config = pods.config();
                config["annotations"]["io.husk.vcpus"] = vcpus.to_string().into();
                let pod = pods.run(config);
                let container = pod.start(&pod.python(SERVER));
                container.wait_for("up");
                (pod, container)
            })
            .collect();
        for round in 0..=runs {
            for (variant, (pod, container)) in variants.iter_mut().zip(&made) {
                let ip = pod.addresses().into_iter().find(IpAddr::is_ipv4).unwrap();
                let egress = measure_egress(container, mib);
                let ingress = measure_ingress(ip, mib);
                let trip = round_trip(ip);
                let threads = fs::read_dir(format!("/proc/{}/task", pod.pid())).unwrap().count();
                println!(
                    "round {round}: {} out {egress:.1} MiB/s, in {ingress:.1} MiB/s, round trip {trip:.0} µs, \
                     {threads} threads",
                    variant.name
                );
                // Round 0 is not counted, because it warms the node's caches and includes the switch to vhost-net.
                if round > 0 {
                    variant.egress.push(egress);
                    variant.ingress.push(ingress);
                    variant.round_trip.push(trip);
                }
            }
        }
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
fn starts(variants: &mut [Variant; 2], runs: u32) {
    for round in 0..=runs {
        for variant in variants.iter_mut() {
            let _config = node::Config::set(&variant.config);
            let mut id = String::new();
            pods_with_handler("bench-network-start", "husk", |pods| id = pods.pod().id);
            let text = fs::read_to_string(Path::new(TIMELINES)).unwrap();
            let all = Timeline::from_lines(&text).unwrap();
            let steps = all.into_iter().rev().find(|timeline| timeline.sandbox == id).unwrap().steps;
            let at = |name: &str| steps.iter().find(|step| step.name == name).unwrap().at_ns as f64 / 1e6;
            let connected = at("network connected") - at("vmm process");
            let started = at("sandbox set up") - at("shim start");
            println!("start {round}: {} network {connected:.1} ms of {started:.0} ms", variant.name);
            if round > 0 {
                variant.connected.push(connected);
                variant.started.push(started);
            }
        }
    }
}
