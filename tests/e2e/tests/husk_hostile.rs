//! While a pod attacks its VMM, another pod on the node still works, and the node's log grows only a little.
//!
//! The test `hostile` of `husk-vmm` attacks every device from a guest without a kernel. Here, the attacker is a
//! privileged container or an agent that lies. The test includes the shim and containerd. The suite also runs the
//! attacks of `husk-vmm` on an interface whose queues vhost-net serves. The tests of `husk-vmm` cannot rely on
//! vhost-net, because a machine that only builds Husk may lack it.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use husk_benchmarks::median;
use husk_e2e::cri::pod::need_image;
use husk_e2e::cri::{Pod, PodContainer, Pods, pods, try_call};
use husk_e2e::figures::print_figure;
use husk_e2e::node::Config;
use husk_e2e::vm::{shim_pids_of, vmm_pids_of};
use husk_e2e::{PYTHON, containerd_log, node};
use serde_json::json;
use sha2::{Digest, Sha256};

/// Number of execs in the neighbour pod for each measurement.
const EXECS: usize = 15;
/// Maximum number of log statements of the shim that a hostile pod can reach again and again, such as the statements
/// for an event of an unknown container and for a line of the guest's log.
const STATEMENTS: usize = 6;
/// Maximum number of log lines from one pod at once. The shim limits each log statement: 300 lines at once, then five
/// lines per second (`shim/src/log.rs`).
const LOG_LINES: usize = STATEMENTS * 300;
/// Maximum number of further log lines from one pod, per second.
const LOG_LINES_PER_SECOND: usize = STATEMENTS * 5;

/// Attacks with one process for each kind of attack. Each process counts its rounds in a file in /dev/shm.
const ATTACKS: &str = r#"
import os, socket, sys, time

def connections():
    for port in range(1, 100):
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        s.setblocking(False)
        s.connect_ex((2, port))
        s.close()

def files():
    for n in range(100):
        try:
            os.stat("/no/such/file/%d" % time.monotonic_ns())
        except OSError:
            pass
        with open("/storm", "w") as f:
            f.write("x")

def kernel_log():
    with open("/dev/kmsg", "w") as log:
        for n in range(100):
            log.write("<0>flood %d\n" % n)
            log.flush()

def rebind():
    for driver in ["virtio_rng", "virtio_balloon"]:
        directory = "/sys/bus/virtio/drivers/" + driver
        for name in os.listdir(directory):
            if name.startswith("virtio"):
                for file in ["unbind", "bind"]:
                    with open(directory + "/" + file, "w") as f:
                        f.write(name)

def ports(port, values):
    import ctypes, mmap
    if ctypes.CDLL(None).iopl(3) != 0:
        raise OSError("iopl failed")
    # edx = port, eax = value, 1000 times: out dx, al
    code = bytes.fromhex("89fa 89f0 b9e8030000 ee ffc9 75fb c3")
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    out = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    def storm():
        for value in values:
            out(port, value)
    # The code must stay mapped.
    storm.memory = memory
    return storm

def boot_marks():
    return ports(0x5f0, [1, 2, 3])

def console():
    return ports(0x3f8, [ord("x"), 10])

def note(name, text):
    # A reader must not see an empty file.
    with open("/dev/shm/." + name, "w") as f:
        f.write(text)
    os.rename("/dev/shm/." + name, "/dev/shm/" + name)

attacks = {
    "connections": lambda: connections,
    "files": lambda: files,
    "kernel-log": lambda: kernel_log,
    "rebind": lambda: rebind,
    "boot-marks": boot_marks,
    "console": console,
}
for name, make in attacks.items():
    if os.fork() == 0:
        rounds = 0
        try:
            attack = make()
            while True:
                attack()
                rounds += 1
                note(name, str(rounds))
        except Exception as error:
            note(name, "%s after %d rounds" % (error, rounds))
            os._exit(1)
print("attacking", flush=True)
time.sleep(100000)
"#;

#[test]
fn hostile_pod_neither_starves_its_neighbour_nor_floods_the_log() {
    need_image(PYTHON);
    pods("hostile", |pods| {
        let neighbour = pods.pod();
        let container = neighbour.sleeper();
        let mut config = pods.config();
        config["linux"]["security_context"]["privileged"] = json!(true);
        let hostile = pods.run(config);
        let quiet = latencies(&container);

        let log = containerd_log::len();
        let attacker = attack(&hostile);
        let begin = Instant::now();
        let attacked = latencies(&container);
        let duration = begin.elapsed();
        let lines = containerd_log::since(log);
        let rounds = attacker.sh("cd /dev/shm; grep . *");

        print_figure(format_args!("latency of an exec in the neighbour pod, in ms: {}", describe(&quiet)));
        print_figure(format_args!("during the attack of {} s: {}", duration.as_secs(), describe(&attacked)));
        print_figure(format_args!("rounds of the attacks:\n{rounds}"));
        let of_attacker = lines.lines().filter(|line| line.contains(&hostile.id)).count();
        print_figure(format_args!(
            "containerd's log has grown by {} lines; the attacker caused {of_attacker} of these lines",
            lines.lines().count()
        ));
        for name in ["connections", "files", "kernel-log", "rebind", "boot-marks", "console"] {
            let count = rounds.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let count: u64 = count.unwrap_or_default().parse().unwrap_or(0);
            assert!(count > 0, "the attack {name} did not run:\n{rounds}");
        }
        let limit = LOG_LINES + LOG_LINES_PER_SECOND * duration.as_secs() as usize;
        assert!(
            of_attacker <= limit,
            "the attacker caused {of_attacker} log lines, more than {limit}:\n{}",
            ends(&lines)
        );
        assert!(neighbour.is_ready() && container.sh("echo served") == "served");
        assert!(hostile.is_ready(), "the attack ended its own pod:\n{}", node::log_tail(40));
    });
}

/// Starts the attacks, and waits until all of them have had a turn.
fn attack(pod: &Pod) -> PodContainer {
    let mut config = pod.python(ATTACKS);
    config["linux"]["security_context"]["privileged"] = json!(true);
    let container = pod.start(&config);
    container.wait_for("attacking");
    let all = node::eventually(Duration::from_secs(120), || (container.sh("ls /dev/shm | wc -l") == "6").then_some(()));
    assert!(all.is_some(), "not all attacks run: {}", container.sh("ls /dev/shm"));
    container
}

/// Returns the duration of each of several execs, in milliseconds.
fn latencies(container: &PodContainer) -> Vec<f64> {
    let exec = |_| {
        let begin = Instant::now();
        assert_eq!(container.exec(&["true"]).code, 0);
        begin.elapsed().as_secs_f64() * 1e3
    };
    (0..EXECS).map(exec).collect()
}

fn describe(latencies: &[f64]) -> String {
    let longest = latencies.iter().copied().fold(0.0, f64::max);
    format!("median {:.0}, longest {longest:.0}", median(latencies))
}

/// Returns the first and the last lines of a log.
fn ends(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let (first, last) = (lines.iter().take(20), lines.iter().skip(lines.len().saturating_sub(20)));
    first.chain(last).copied().collect::<Vec<_>>().join("\n")
}

#[test]
fn hostile_pod_that_runs_out_of_memory_again_and_again_logs_few_lines() {
    pods("hostile-oom", |pods| {
        let pod = pods.pod();
        // Each child takes more than the container's memory, and the OOM killer of the guest kills it.
        let mut config =
            pod.sh("while :; do sh -c 'x=$(head -c 100000000 /dev/zero | tr \"\\0\" x)'; echo round; done");
        config["linux"]["resources"] = json!({ "memory_limit_in_bytes": 16 << 20 });
        let log = containerd_log::len();
        let container = pod.start(&config);
        let killed = || {
            let text = fs::read_to_string(container.log_path()).unwrap_or_default();
            (text.lines().count() >= 20).then_some(())
        };
        let killed = node::eventually(Duration::from_secs(300), killed);
        let lines = containerd_log::since(log);
        let of_pod = lines.lines().filter(|line| line.contains(&pod.id)).count();
        print_figure(format_args!("20 OOM kills have caused {of_pod} lines in containerd's log"));
        assert!(killed.is_some(), "the container was not killed 20 times:\n{}", container.log());
        assert!(of_pod < 100, "the pod caused {of_pod} lines in containerd's log, 100 or more:\n{}", ends(&lines));
    });
}

#[test]
#[ignore = "long: each of the attacks boots a VM"]
fn attacks_on_vhost_net_neither_end_the_vmm_nor_touch_the_host() {
    let output = Command::new("/husk/hostile").arg("--vhost-net").output().expect("run /husk/hostile");
    let (table, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    print_figure(format_args!("attacks on vhost-net:\n{table}"));
    assert!(output.status.success(), "{}:\n{table}{errors}", output.status);
    assert!(table.lines().count() > 40, "the table has too few rows:\n{table}");
}

/// Initramfs whose PID 1 is `husk-lying-agent`.
const LYING_AGENT: &str = "/husk/lying-agent.cpio";
/// Limit for a shim's peak resident memory, in KiB. A shim with an honest agent stays below a quarter.
const SHIM_PEAK_KIB: u64 = 48 << 10;
/// Maximum length of an error text that containerd returns: the maximum length of the shim's text, and the texts that
/// containerd adds.
const ERROR_LEN: usize = (16 << 10) + 256;

/// Sets a configuration with which the agent of each new pod lies. The documentation of
/// `husk-lying-agent` lists the lies.
fn agent_that_lies(lie: &str) -> Config {
    let digest = Sha256::digest(fs::read(LYING_AGENT).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    Config::set(&format!(
        "initrd = \"{LYING_AGENT}\"\ninitrd_sha256 = \"{digest}\"\nkernel_params = \"lie={lie}\"\n\
         start_timeout_secs = 30\n"
    ))
}

/// Returns the highest resident memory that a process has had, in KiB.
fn peak_kib(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Asserts that a pod whose agent lies fails to start, and that the error contains `expected`.
#[track_caller]
fn assert_fails_to_start(pods: &Pods, lie: &str, expected: &str) {
    let _config = agent_that_lies(lie);
    let (log, begin) = (containerd_log::len(), Instant::now());
    let error = pods.expect_error(&pods.config());
    let (lines, secs) = (containerd_log::since(log).lines().count(), begin.elapsed().as_secs());
    print_figure(format_args!(
        "agent with the lie {lie}: {lines} log lines in {secs} s; the error has {} bytes",
        error.len()
    ));
    assert!(error.contains(expected), "the error does not contain {expected:?}: {error}");
    assert!(error.len() <= ERROR_LEN, "the error has {} bytes, more than {ERROR_LEN}: {error}", error.len());
    let control = error.chars().find(|c| c.is_control() && *c != '\n');
    assert_eq!(control, None, "the error contains a control character: {error:?}");
    assert!(
        lines <= LOG_LINES,
        "the failed start caused {lines} log lines, more than {LOG_LINES}:\n{}",
        node::log_tail(40)
    );
}

#[test]
#[ignore = "long: waits until the start of a pod times out"]
fn pod_whose_agent_lies_during_the_boot_fails_with_a_clear_error() {
    pods("lying-boot", |pods| {
        let neighbour = pods.pod();
        let container = neighbour.sleeper();
        // The garbage begins like a message of 4 GiB, which the shim would not keep. It waits for the end of the
        // message.
        assert_fails_to_start(pods, "garbage", "the guest's agent was not ready after 30 s");
        let log = containerd_log::len();
        assert_fails_to_start(pods, "silent", "the guest's agent was not ready after 30 s");
        let log = containerd_log::since(log);
        assert!(log.contains("where the guest is") && log.contains("vCPU 0 at 0xffffffff8"), "{log}");
        assert_fails_to_start(pods, "error", "failed to set up the sandbox in the guest");
        assert_fails_to_start(pods, "connect", "0 connections succeeded: []");
        assert_fails_to_start(pods, "version", "install the shim and the initrd from the same release");
        assert!(neighbour.is_ready() && container.sh("echo served") == "served");
    });
}

#[test]
#[ignore = "long: waits until the shim ends a VM whose agent ignores SIGKILL"]
fn pod_whose_agent_floods_the_shim_can_be_removed_and_its_neighbour_works() {
    pods("lying-flood", |pods| {
        let neighbour = pods.pod();
        let container = neighbour.sleeper();
        let quiet = latencies(&container);
        let (log, begin) = (containerd_log::len(), Instant::now());
        let config = agent_that_lies("flood");
        let liar = pods.pod();
        drop(config);
        // The agent claims that the container runs. The output that it sends for the container never ends.
        let flooded = liar.sleeper();
        let output = node::eventually(Duration::from_secs(60), || {
            fs::metadata(flooded.log_path()).ok().map(|file| file.len()).filter(|len| *len > 4 << 20)
        });
        assert!(output.is_some(), "the lying agent's output did not arrive:\n{}", node::log_tail(40));
        let stats = try_call("ContainerStats", &json!({ "container_id": flooded.id }));
        if let Err(status) = &stats {
            assert!(
                status.message.len() <= ERROR_LEN,
                "the error of ContainerStats has {} bytes, more than {ERROR_LEN}",
                status.message.len()
            );
        }
        let attacked = latencies(&container);
        let (shim, vmm) = (shim_pids_of(&liar.id)[0], vmm_pids_of(&liar.id)[0]);
        let peak = peak_kib(shim);
        let fds = |pid: i32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let duration = begin.elapsed();
        let lines = containerd_log::since(log);
        let of_liar = lines.lines().filter(|line| line.contains(&liar.id)).count();
        print_figure(format_args!("latency of an exec in the neighbour pod, in ms: {}", describe(&quiet)));
        print_figure(format_args!("during the flood of the lying agent: {}", describe(&attacked)));
        print_figure(format_args!(
            "after {} s of the flood: {of_liar} log lines of the pod, shim's peak memory {peak} KiB, {} fds of the \
             shim, {} of the VMM; ContainerStats: {}",
            duration.as_secs(),
            fds(shim),
            fds(vmm),
            if stats.is_ok() { "an answer" } else { "an error" },
        ));
        assert!(peak <= SHIM_PEAK_KIB, "the shim has used {peak} KiB, more than {SHIM_PEAK_KIB} KiB");
        let limit = LOG_LINES + LOG_LINES_PER_SECOND * duration.as_secs() as usize;
        assert!(
            of_liar <= limit,
            "the pod with the lying agent caused {of_liar} log lines, more than {limit}:\n{}",
            ends(&lines)
        );
        // The agent claims that it has killed the container, but reports no exit. The shim then ends the VM.
        let begin = Instant::now();
        liar.remove();
        print_figure(format_args!("the pod was removed in {} s", begin.elapsed().as_secs()));
        assert_eq!((shim_pids_of(&liar.id), vmm_pids_of(&liar.id)), (Vec::new(), Vec::new()));
        assert!(neighbour.is_ready() && container.sh("echo served") == "served");
    });
}
