//! Measures whether the devices of a VM keep to their rate limits. Each device is measured twice: with a limit in bytes
//! per second, and with a limit in operations per second. The load is always faster than the limit.

use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use husk_benchmarks::{Report, Table};
use serde_json::json;

use super::{Options, python};
use crate::cri::pod::need_image;
use crate::cri::stream::{Stream, channel};
use crate::cri::{Pod, PodContainer, call, pods_with_handler};
use crate::disk::Disk;
use crate::{PYTHON, node};

/// Duration of the load before each measurement. This load uses up the burst, which is a tenth of the rate.
const WARM_UP: Duration = Duration::from_secs(2);

/// A Python program that reads a file. The reads use O_DIRECT, to bypass the guest's page cache. Four threads read, so
/// that a request is always waiting for the rate limit, however long one read takes. Prints the number of reads and the
/// duration of the measurement in seconds. If the file is in the share, the guest kernel also requests the file's
/// attributes about once per second and thread (fuse_update_attributes() in fs/fuse/dir.c). The requests for attributes
/// take tokens, but the printed number does not include them. Therefore the share's limit in operations is high in
/// comparison with these requests.
const READ: &str = "import os, mmap, sys, threading, time
path, size, warm_up, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
end = os.lseek(fd, 0, os.SEEK_END)
counts = [0] * 4
def read(number):
    buffer, at = mmap.mmap(-1, size), number * size
    while True:
        assert os.preadv(fd, [buffer], at) == size
        counts[number] += 1
        at = (at + size) % (end - size + 1) // size * size
for number in range(len(counts)):
    threading.Thread(target=read, args=(number,), daemon=True).start()
time.sleep(warm_up)
begin, count = time.monotonic(), sum(counts)
time.sleep(seconds)
print(sum(counts) - count, time.monotonic() - begin, flush=True)
os._exit(0)";

/// A Python program that sends datagrams to an address for a number of seconds.
const TRANSMIT: &str = "import socket, sys, time
to, data, seconds = (sys.argv[1], int(sys.argv[2])), bytes(int(sys.argv[3])), float(sys.argv[4])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        sender.sendto(data, to)";

/// A Python program that measures what the interface receives. Prints the numbers of bytes and frames, and the duration
/// of the measurement in seconds.
const RECEIVE: &str = "import socket, sys, time
def counters():
    values = [open('/sys/class/net/eth0/statistics/rx_' + name).read() for name in ('bytes', 'packets')]
    return [time.monotonic()] + [int(value) for value in values]
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.bind(('0.0.0.0', 9999))
time.sleep(float(sys.argv[1]))
begin = counters()
time.sleep(float(sys.argv[2]))
end = counters()
print(end[1] - begin[1], end[2] - begin[2], end[0] - begin[0])";

/// Total length of the Ethernet, IPv4 and UDP headers, in bytes.
const UDP_HEADERS: usize = 14 + 20 + 8;

/// The limits of one pod's devices.
struct Limits {
    disk: Limit,
    receive: Limit,
    transmit: Limit,
    share: Limit,
    vsock: Limit,
}

#[derive(Clone, Copy)]
enum Limit {
    /// Number of bytes per second.
    Bytes(u64),
    /// Number of operations per second.
    Operations(u64),
}

impl Limit {
    fn to_toml(self) -> String {
        match self {
            Self::Bytes(rate) => format!("{{ bytes_per_sec = {rate} }}"),
            Self::Operations(rate) => format!("{{ ops_per_sec = {rate} }}"),
        }
    }

    /// Returns the length of a read in bytes. `BYTES` allows 32 such reads per second. `OPERATIONS` allows 40 for the
    /// disk, and 200 for the share.
    fn read_len(self) -> usize {
        match self {
            Self::Bytes(_) => 128 << 10,
            Self::Operations(_) => 4096,
        }
    }

    /// Returns the length of a datagram's payload in bytes.
    fn datagram_len(self) -> usize {
        match self {
            Self::Bytes(_) => 1400,
            Self::Operations(_) => 100,
        }
    }

    /// Returns the measured rate in the limit's unit.
    fn rate(self, bytes: f64, operations: f64, seconds: f64) -> f64 {
        match self {
            Self::Bytes(_) => bytes / seconds,
            Self::Operations(_) => operations / seconds,
        }
    }
}

/// Limits in bytes per second. Even an emulated node can reach these rates.
const BYTES: Limits = Limits {
    disk: Limit::Bytes(4 << 20),
    receive: Limit::Bytes(400_000),
    transmit: Limit::Bytes(400_000),
    share: Limit::Bytes(4 << 20),
    vsock: Limit::Bytes(1 << 20),
};
/// Limits in operations per second. Even an emulated node can reach these rates.
const OPERATIONS: Limits = Limits {
    disk: Limit::Operations(40),
    receive: Limit::Operations(100),
    transmit: Limit::Operations(100),
    share: Limit::Operations(200),
    vsock: Limit::Operations(10),
};

/// Measures each device. The report has a failure for each rate that differs from its limit by more than 5 %.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    need_image(PYTHON);
    let mut report = Report::new("limits").with("seconds", options.seconds);
    let mut table = Table {
        columns: ["device", "limit per second", "measured", "× limit"].map(str::to_owned).to_vec(),
        rows: Vec::new(),
    };
    for limits in [&BYTES, &OPERATIONS] {
        pods_with_handler("bench-limits", "husk", |pods| {
            let _config = node::Config::set(&configuration(limits));
            let disk = Disk::new(&pods.dir().join("disk"), 16);
            let pod = pods.pod();
            let mut config = pod.python("import time; time.sleep(100000)");
            config["devices"] =
                json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": "rw" }]);
            let container = pod.start(&config);
            let duration = Duration::from_secs(options.seconds);
            let mut row = |device: &str, limit: Limit, rate: f64| {
                let (configured, unit) = match limit {
                    Limit::Bytes(rate) => (rate as f64, "bytes"),
                    Limit::Operations(rate) => (rate as f64, "operations"),
                };
                let ratio = rate / configured;
                if !(0.95..=1.05).contains(&ratio) {
                    report.failures.push(format!("{device}: {rate:.1} of {configured} {unit} per second"));
                }
                let cells = [device.to_owned(), format!("{configured} {unit}"), format!("{rate:.1}")];
                table.rows.push([cells.to_vec(), vec![format!("{ratio:.3}")]].concat());
                println!("{device}: {rate:.1} of {configured} {unit} per second ({ratio:.3})");
            };
            row("disk", limits.disk, read(&container, "/dev/xvda", limits.disk, duration));
            container.exec_within(2 * crate::command::TIMEOUT, &["python3", "-S", "-c", CREATE]);
            row("share", limits.share, read(&container, "/limited", limits.share, duration));
            row("interface, transmit", limits.transmit, transmit(&container, limits.transmit, duration));
            row("interface, receive", limits.receive, receive(&pod, &container, limits.receive, duration));
            row("vsock", limits.vsock, vsock(&container, limits.vsock, duration));
        });
    }
    report.tables.push(table);
    report
}

/// Creates the file that [`READ`] reads from the share.
const CREATE: &str = "open('/limited', 'wb').write(bytes(2 << 20))";

fn configuration(limits: &Limits) -> String {
    let Limits { disk, receive, transmit, share, vsock } = limits;
    [
        ("disk_rate_limit", disk),
        ("net_receive_rate_limit", receive),
        ("net_transmit_rate_limit", transmit),
        ("virtio_fs_rate_limit", share),
        ("vsock_rate_limit", vsock),
    ]
    .map(|(key, limit)| format!("{key} = {}\n", limit.to_toml()))
    .concat()
}

/// Runs a Python program that measures for `duration`, and returns the numbers that it prints.
fn run(container: &PodContainer, program: &str, arguments: &[&str], duration: Duration) -> Vec<f64> {
    python::run(container, program, arguments, duration + 2 * crate::command::TIMEOUT)
}

fn seconds(duration: Duration) -> String {
    duration.as_secs_f64().to_string()
}

fn read(container: &PodContainer, path: &str, limit: Limit, duration: Duration) -> f64 {
    let length = limit.read_len();
    let arguments = [path, &length.to_string(), &seconds(WARM_UP), &seconds(duration)];
    let printed = run(container, READ, &arguments, WARM_UP + duration);
    limit.rate(printed[0] * length as f64, printed[0], printed[1])
}

/// Lets the container send datagrams to the node, and measures the rate at which the datagrams arrive.
fn transmit(container: &PodContainer, limit: Limit, duration: Duration) -> f64 {
    let receiver = UdpSocket::bind("10.88.0.1:0").unwrap();
    receiver.set_read_timeout(Some(crate::command::TIMEOUT)).unwrap();
    let (port, length) = (receiver.local_addr().unwrap().port().to_string(), limit.datagram_len());
    let counting = std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        receiver.recv(&mut buffer).unwrap();
        let first = Instant::now();
        while first.elapsed() < WARM_UP {
            receiver.recv(&mut buffer).unwrap();
        }
        let (begin, mut count) = (Instant::now(), 0_u32);
        while begin.elapsed() < duration {
            receiver.recv(&mut buffer).unwrap();
            count += 1;
        }
        (f64::from(count), begin.elapsed().as_secs_f64())
    });
    let sending = WARM_UP + duration + Duration::from_secs(2);
    run(container, TRANSMIT, &["10.88.0.1", &port, &length.to_string(), &seconds(sending)], sending);
    let (frames, seconds) = counting.join().unwrap();
    limit.rate(frames * (length + UDP_HEADERS) as f64, frames, seconds)
}

/// Sends datagrams to the pod at twice the limit, and measures the rate at which the guest receives frames.
fn receive(pod: &Pod, container: &PodContainer, limit: Limit, duration: Duration) -> f64 {
    let address = pod.addresses().into_iter().find(IpAddr::is_ipv4).unwrap();
    let length = limit.datagram_len();
    let interval = match limit {
        Limit::Bytes(rate) => Duration::from_secs_f64((length + UDP_HEADERS) as f64 / rate as f64 / 2.0),
        Limit::Operations(rate) => Duration::from_secs_f64(0.5 / rate as f64),
    };
    let ended = AtomicBool::new(false);
    let printed = std::thread::scope(|scope| {
        scope.spawn(|| {
            let sender = UdpSocket::bind("0.0.0.0:0").unwrap();
            let (begin, data) = (Instant::now(), vec![0; length]);
            for number in 0.. {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep((begin + interval * number).saturating_duration_since(Instant::now()));
                // Lost datagrams do not matter, because this thread sends datagrams at twice the limit.
                let _ = sender.send_to(&data, (address, 9999));
            }
        });
        let printed = run(container, RECEIVE, &[&seconds(WARM_UP), &seconds(duration)], WARM_UP + duration);
        ended.store(true, Ordering::Relaxed);
        printed
    });
    limit.rate(printed[0], printed[1], printed[2])
}

fn exec(container: &PodContainer, command: &[&str]) -> Stream {
    let request = json!({ "container_id": container.id, "cmd": command, "stdin": true, "stdout": true });
    Stream::connect(call("Exec", &request)["url"].as_str().unwrap())
}

/// Measures the rate of the vsock device. If the limit is in bytes, a command writes output. If the limit is in
/// operations, commands echo single bytes. For each echoed byte, the guest sends two packets: the echo, and a credit
/// update. The guest sends the credit update because its receive buffer is empty again
/// (virtio_transport_stream_do_dequeue() in net/vmw_vsock/virtio_transport_common.c).
fn vsock(container: &PodContainer, limit: Limit, duration: Duration) -> f64 {
    match limit {
        Limit::Bytes(rate) => {
            // At the limit's rate, the output lasts three seconds longer than the warm-up and the measurement together.
            let bytes = (WARM_UP + duration + Duration::from_secs(3)).as_secs() * rate;
            let mut stream = exec(container, &["dd", "if=/dev/zero", "bs=65536", &format!("count={}", bytes / 65536)]);
            let mut receive = || {
                let (from, data) = stream.receive().expect("the command ended before the end of the measurement");
                if from == channel::STDOUT { data.len() as u64 } else { 0 }
            };
            while receive() == 0 {}
            let first = Instant::now();
            while first.elapsed() < WARM_UP {
                receive();
            }
            let (begin, mut bytes) = (Instant::now(), 0);
            while begin.elapsed() < duration {
                bytes += receive();
            }
            let seconds = begin.elapsed().as_secs_f64();
            stream.finish();
            bytes as f64 / seconds
        }
        Limit::Operations(_) => {
            // Two commands run at the same time. While a byte of the first command is on its way through the node, a
            // packet of the second command waits for the rate limit. Therefore, the limit is always in use.
            let mut streams = [(); 2].map(|()| exec(container, &["cat"]));
            let rates = std::thread::scope(|scope| {
                let echo = |stream: &mut Stream| {
                    let mut run = |limit: Duration| {
                        let (begin, mut count) = (Instant::now(), 0_u32);
                        while begin.elapsed() < limit {
                            stream.send(channel::STDIN, b"x");
                            stream.wait_for(channel::STDOUT, "x");
                            count += 1;
                        }
                        f64::from(count) / begin.elapsed().as_secs_f64()
                    };
                    run(WARM_UP);
                    run(duration)
                };
                streams.each_mut().map(|stream| scope.spawn(move || echo(stream))).map(|thread| thread.join().unwrap())
            });
            2.0 * rates.iter().sum::<f64>()
        }
    }
}
