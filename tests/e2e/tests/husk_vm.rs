//! What only Husk has: a kernel of the container's own, a VMM process, and what becomes of both.
use std::fs;
use std::time::Duration;

use husk_e2e::command::run_ctr;
use husk_e2e::{case, node, vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The release of the guest kernel, out of its image: "Linux version RELEASE (…".
fn guest_release() -> String {
    let image = fs::read("/usr/local/share/husk/vmlinux").unwrap();
    let banner = b"Linux version ";
    // The format string has the banner's words too, before a `%s`.
    let releases = image
        .windows(banner.len() + 1)
        .enumerate()
        .filter(|(_, bytes)| bytes.starts_with(banner) && bytes[banner.len()].is_ascii_digit());
    let start = releases.map(|(at, _)| at + banner.len()).next().unwrap();
    image[start..].iter().take_while(|byte| **byte != b' ').map(|byte| char::from(*byte)).collect()
}

#[test]
fn the_kernel_is_the_guests() {
    case("uname", |case| {
        let release = guest_release();
        assert_ne!(release, node::kernel_release());
        case.busybox(&["uname", "-r"]).output().expect_clean().expect_out(&release);
        case.python("import os; print(os.uname().release)").output().expect_clean().expect_out(&release);
    });
}

#[test]
fn the_vmm_lives_as_long_as_the_container() {
    case("vmm-life", |case| {
        let container = case.sleeper();
        let vmms = vm::vmm_of(&container.id);
        assert_eq!(vmms.len(), 1, "one VMM per container");
        assert_eq!(container.pid(), vmms[0], "the task's pid is the VMM's");
        // CNI sets up the network namespace it finds behind that pid: it must not be the node's.
        let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(net(&vmms[0].to_string()), net("self"));
        // The pod's mounts are in no namespace but the shim's and the VMM's.
        assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains("/run/husk/"));
        container.kill();
        assert_eq!(vm::vmm_pids(), Vec::<i32>::new(), "the VMM is gone when ctr run has returned");
    });
}

#[test]
fn cpus_and_memory_follow_the_limits() {
    case("sizing", |case| {
        let script = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";
        let output = case.sh(script).output().expect_clean();
        let numbers: Vec<u64> = output.out().lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers[0], 1, "one vCPU by default");
        assert!((900..1024).contains(&numbers[1]), "1024 MiB by default: {}", output.describe());
        let run = case.sh(script).flags(&["--memory-limit", "268435456", "--cpus", "1.5"]);
        let output = run.output().expect_clean();
        let numbers: Vec<u64> = output.out().lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers[0], 2, "1.5 CPUs are two vCPUs");
        assert!((256..330).contains(&numbers[1]), "256 MiB and the overhead: {}", output.describe());
    });
}

#[test]
fn a_killed_vmm_ends_the_task() {
    case("vmm-kill", |case| {
        let container = case.sleeper();
        for pid in vm::vmm_of(&container.id) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        container.running.wait().expect_code(137);

        // Without --rm the stopped task stays until it is deleted, its execs end in order, and then nothing stays.
        let run = case.sh("echo up; exec sleep 1000").keep();
        let container = case.container(run);
        let exec = container.exec_command("e", &[], &["sh", "-c", "echo up; sleep 1000"]);
        let mut exec = husk_e2e::Running::start(exec, husk_e2e::command::Input::Null);
        exec.wait_for("up");
        for pid in vm::vmm_of(&container.id) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        exec.wait().expect_code(137);
        let id = container.id.clone();
        container.running.wait().expect_code(137);
        run_ctr(&["tasks", "delete", &id]);
        run_ctr(&["containers", "rm", &id]).expect_code(0);
        // `ctr run` deletes the task as soon as it has ended; an exec's ctr that comes later gets an error and ends
        // without removing the fifos it made itself.
        remove_fifos();
    });
}

/// Removes the directories of fifos that ctr makes for each process and leaves when it ends with an error.
fn remove_fifos() {
    for entry in fs::read_dir("/run/containerd/fifo").unwrap() {
        fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
}

#[test]
fn a_killed_shim_leaves_nothing() {
    case("shim-kill", |case| {
        let container = case.sleeper();
        let shims = vm::shims_of(&container.id);
        assert!(!shims.is_empty(), "no shim process found");
        for pid in shims {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        let gone = node::eventually(Duration::from_secs(10), || vm::vmm_pids().is_empty().then_some(()));
        assert!(gone.is_some(), "the VMM outlives its shim");
        // containerd 1.7 answers the pending Wait with the broken connection, and ctr ends with that error.
        let output = container.running.wait().expect_code(1);
        assert!(output.err().contains("ttrpc: closed"), "{}", output.describe());
        // With that error ctr ends without removing the fifos it made itself.
        remove_fifos();
    });
}

#[test]
fn an_idle_vmm_takes_at_most_8_mib_beside_guest_memory() {
    case("weight", |case| {
        let container = case.sleeper();
        // Some work first: what it needs for stdio, exec and files is part of what it weighs.
        container.exec("work", &["sh", "-c", "find / -xdev | wc -l; cat /bin/busybox | sha256sum"]).expect_code(0);
        let [pid] = vm::vmm_of(&container.id)[..] else { panic!("not one VMM") };
        let memory = vm::memory(pid).unwrap();
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        assert!(memory.guest > 0, "no guest memory found\n{smaps}");
        assert!(memory.own <= 8 << 10, "PSS beside guest memory: {} KiB\n{smaps}", memory.own);
        println!("VMM: {} KiB of its own, {} KiB of the guest's", memory.own, memory.guest);
        container.kill();
    });
}
