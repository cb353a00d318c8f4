//! The VM of a container: its kernel, its size, its overhead, and the lifetimes of VMM and shim.
use std::fs;
use std::time::Duration;

use husk_e2e::command::run_ctr;
use husk_e2e::figures::print_figure;
use husk_e2e::node::Config;
use husk_e2e::{case, node, vm};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Returns the guest kernel's release. Reads it from the text "Linux version RELEASE (…" in the kernel's image.
fn guest_release() -> String {
    let image = fs::read("/usr/local/share/husk/vmlinux").unwrap();
    // The image also has a format string with the same words, followed by `%s`. Split the image at `L` first, because a
    // comparison at each byte would take seconds.
    let banners = image.split(|byte| *byte == b'L').filter_map(|part| part.strip_prefix(b"inux version "));
    let mut releases = banners.map(|rest| rest.split(|byte| *byte == b' ').next().unwrap_or_default());
    let found = releases.find(|release| release.first().is_some_and(u8::is_ascii_digit)).unwrap();
    String::from_utf8(found.to_owned()).unwrap()
}

#[test]
fn container_runs_on_guest_kernel() {
    case("uname", |case| {
        let release = guest_release();
        assert_ne!(release, node::kernel_release());
        case.busybox(&["uname", "-r"]).output().expect_clean().expect_out(&release);
    });
}

/// Virtual address at which the guest kernel is linked (`__START_KERNEL`).
const LINK_ADDRESS: u64 = 0xffff_ffff_8100_0000;

#[test]
fn guest_kernel_has_a_random_address() {
    case("kaslr", |case| {
        let address = || {
            let run = case.sh("grep -m1 ' _text$' /proc/kallsyms").flags(&["--privileged"]);
            let output = run.output().expect_clean();
            u64::from_str_radix(output.out().split(' ').next().unwrap(), 16).unwrap()
        };
        // Guests of one template have the same address.
        let booted = Config::set("template = \"off\"\n");
        // There are about 490 addresses. Three guests have the same address once in 240 000 runs.
        let addresses = [address(), address(), address()];
        assert!(
            addresses.iter().any(|other| *other != addresses[0]),
            "all guest kernels have the same address: {addresses:x?}"
        );
        for address in addresses {
            assert!(
                address >= LINK_ADDRESS && (address - LINK_ADDRESS).is_multiple_of(2 << 20),
                "{address:x} is below the link address or not aligned to 2 MiB"
            );
        }
        drop(booted);
        let _config = Config::set("kernel_params = \"nokaslr\"\n");
        assert_eq!(address(), LINK_ADDRESS);
    });
}

#[test]
fn vmm_lives_as_long_as_its_container() {
    case("vmm-life", |case| {
        let container = case.sleeper();
        let vmms = vm::vmm_pids_of(&container.id);
        assert_eq!(vmms.len(), 1, "a container must have exactly one VMM");
        assert_eq!(container.pid(), vmms[0], "the task's pid must be the VMM's pid");
        // CNI configures the network namespace of this pid. Therefore the VMM must not be in the node's network
        // namespace.
        let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_ne!(net(&vmms[0].to_string()), net("self"));
        // The pod's mounts are only in the mount namespaces of the shim and the VMM.
        assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains("/run/husk/"));
        container.kill();
        assert_eq!(vm::vmm_pids(), Vec::<i32>::new(), "a VMM still runs after ctr run has returned");
    });
}

#[test]
fn limits_set_boot_size() {
    case("sizing", |case| {
        let script = "nproc; awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo";
        let output = case.sh(script).output().expect_clean();
        let numbers: Vec<u64> = output.out().lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers[0], 1, "the default must be one vCPU");
        assert!((900..1024).contains(&numbers[1]), "the default must be 1024 MiB: {}", output.describe());
        let run = case.sh(script).flags(&["--memory-limit", "268435456", "--cpus", "1.5"]);
        let output = run.output().expect_clean();
        let numbers: Vec<u64> = output.out().lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(numbers[0], 2, "1.5 CPUs must give two vCPUs");
        assert!((256..330).contains(&numbers[1]), "expected 256 MiB plus the overhead: {}", output.describe());
    });
}

#[test]
fn task_ends_when_vmm_is_killed() {
    case("vmm-kill", |case| {
        let container = case.sleeper();
        for pid in vm::vmm_pids_of(&container.id) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        container.running.wait().expect_code(137);

        // Without --rm, the stopped task stays until it is deleted. Its execs also end, and leave nothing behind.
        let run = case.sh("echo up; exec sleep 1000").keep_container();
        let container = case.container(run);
        let exec = container.exec_command("e", &[], &["sh", "-c", "echo up; sleep 1000"]);
        let mut exec = husk_e2e::Running::start(exec, husk_e2e::command::Input::Null);
        exec.wait_for("up");
        for pid in vm::vmm_pids_of(&container.id) {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        exec.wait().expect_code(137);
        let id = container.id.clone();
        container.running.wait().expect_code(137);
        run_ctr(&["tasks", "delete", &id]);
        run_ctr(&["containers", "rm", &id]).expect_code(0);
        // `ctr run` deletes the task as soon as the task has ended. If the exec's `ctr` makes a call after the
        // deletion, the call fails, and `ctr` exits without removing its fifos.
        remove_fifos();
    });
}

/// Removes fifo directories. ctr makes one directory for each process, and leaves the directory behind if ctr exits
/// with an error.
fn remove_fifos() {
    for entry in fs::read_dir("/run/containerd/fifo").unwrap() {
        fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
}

#[test]
fn nothing_is_left_when_shim_is_killed() {
    case("shim-kill", |case| {
        let container = case.sleeper();
        let shims = vm::shim_pids_of(&container.id);
        assert!(!shims.is_empty(), "no shim process found");
        for pid in shims {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        let gone = node::eventually(Duration::from_secs(10), || vm::vmm_pids().is_empty().then_some(()));
        assert!(gone.is_some(), "the VMM outlives its shim");
        // containerd 1.7 answers the pending Wait with the error of the broken connection, and `ctr` ends with that
        // error.
        let output = container.running.wait().expect_code(1);
        assert!(output.err().contains("ttrpc: closed"), "{}", output.describe());
        // With that error, `ctr` exits without removing its fifos.
        remove_fifos();
    });
}

#[test]
fn idle_vmm_takes_at_most_8_mib_in_addition_to_guest_memory() {
    case("weight", |case| {
        let container = case.sleeper();
        // The container first does some work, because memory for stdio, execs and files is part of the overhead.
        container.exec("work", &["sh", "-c", "find / -xdev | wc -l; cat /bin/busybox | sha256sum"]).expect_code(0);
        let [pid] = vm::vmm_pids_of(&container.id)[..] else { panic!("expected one VMM") };
        let memory = vm::memory(pid).unwrap();
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
        assert!(memory.guest > 0, "no guest memory found\n{smaps}");
        assert!(
            memory.other <= 8 << 10,
            "the VMM's PSS without guest memory is {} KiB, expected at most 8 MiB\n{smaps}",
            memory.other
        );
        print_figure(format_args!(
            "VMM: {} KiB without guest memory, {} KiB of guest memory",
            memory.other, memory.guest
        ));
        container.kill();
    });
}
