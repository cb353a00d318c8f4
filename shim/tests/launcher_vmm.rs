//! The launcher starts the VMM process for a confined shim. The test starts itself as the VMM process, so it needs its
//! own `main`.

#![allow(clippy::expect_used)]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use husk_base::sys::{pidfd, process, scm_rights};
use husk_shim::confinement;
use husk_shim::launcher::Launcher;
use husk_vmm::client::{ARGV0, CONTROL_FD};
use husk_vmm::config::SeccompMode;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::getpid;

fn main() {
    if std::env::args().next().is_some_and(|name| name == ARGV0) {
        be_vmm();
    } else {
        launcher_starts_vmm_in_the_namespaces_of_the_confined_shim();
        println!("test launcher_starts_vmm_in_the_namespaces_of_the_confined_shim ... ok");
    }
}

fn namespace(kind: &str) -> PathBuf {
    fs::read_link(format!("/proc/thread-self/ns/{kind}")).expect("/proc is mounted")
}

/// Reports the process's namespaces, its PID and its rights, and waits until the shim closes the control socket.
fn be_vmm() {
    // SAFETY: the launcher has placed the control socket at this number, and nothing else uses it.
    let control = unsafe { OwnedFd::from_raw_fd(CONTROL_FD) };
    let status = fs::read_to_string("/proc/self/status").expect("/proc is mounted");
    let rights = status.lines().filter(|line| ["NoNewPrivs:", "Seccomp:"].iter().any(|name| line.starts_with(name)));
    let rights: Vec<&str> = rights.collect();
    let text = format!("{:?} {:?} {} {rights:?}", namespace("mnt"), namespace("net"), getpid());
    scm_rights::send(control.as_fd(), text.as_bytes(), &[]).expect("the shim has the other end");
    let _ = scm_rights::receive(control.as_fd(), &mut [0; 16]);
    std::process::exit(9);
}

fn launcher_starts_vmm_in_the_namespaces_of_the_confined_shim() {
    let launcher = Launcher::start().expect("fork works");
    unshare(CloneFlags::CLONE_NEWNS).expect("this test needs root, because it creates namespaces");
    let none = None::<&Path>;
    mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none).expect("mounts can become slaves");
    // A file stands for cgroup.procs.
    let procs = std::env::temp_dir().join(format!("husk-launcher-vmm-{}", getpid()));
    let cgroup = OwnedFd::from(File::create(&procs).expect("the directory for temporary files is writable"));
    confinement::enter(SeccompMode::Enforce).expect("the kernel has seccomp filters");
    let network = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("the shim keeps CAP_SYS_ADMIN");
        (File::open("/proc/thread-self/ns/net").expect("/proc is mounted"), namespace("net"))
    });
    let (network, network_name) = network.join().expect("the thread does not panic");
    let mounts = File::open("/proc/self/ns/mnt").expect("/proc is mounted");
    let vmm = launcher.start_vmm(mounts.as_fd(), network.as_fd(), &[cgroup]).expect("the launcher starts the process");
    let mut bytes = [0; 512];
    let packet = scm_rights::receive(vmm.control.as_fd(), &mut bytes).expect("the process reports");
    let text = String::from_utf8_lossy(&bytes[..packet.len]).into_owned();
    let rights = r#"["NoNewPrivs:\t0", "Seccomp:\t0"]"#;
    assert_eq!(text, format!("{:?} {network_name:?} 1 {rights}", namespace("mnt")));
    assert_eq!(fs::read_to_string(&procs).expect("the file exists"), "0");
    fs::remove_file(&procs).expect("the file exists");
    // The process is a child of this process, although the launcher has started it.
    pidfd::send_signal(vmm.pidfd.as_fd(), 0).expect("the process runs");
    drop(vmm.control);
    let (pid, status) = process::wait(vmm.pid.cast_signed(), 0).expect("it is a child").expect("the call waits");
    assert_eq!((pid.cast_unsigned(), libc::WEXITSTATUS(status)), (vmm.pid, 9));
    std::io::stdout().flush().expect("standard output is open");
}
