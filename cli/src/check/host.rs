//! Checks the host: KVM, and the kernel features that Husk needs.

use std::{fs, io, path::Path};

use husk_base::error::chain;
use husk_config::{Config, Seccomp};
use husk_vmm::jail::Landlock;
use husk_vmm::kvm_probe::{Probe, ProbeError, kvm_speed};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, TMPFS_MAGIC, statfs};

use super::Finding;

/// First kernel whose mount_setattr(2) has MOUNT_ATTR_NOSYMFOLLOW, which the shim sets on all mounts of a share.
const MIN_KERNEL: (u32, u32) = (5, 14);

/// Kinds of namespaces that the VMM's jail uses, by their names in `/proc/self/ns`.
const NAMESPACES: [&str; 6] = ["mnt", "pid", "net", "ipc", "uts", "cgroup"];
/// The actions of the kernel's seccomp filters, separated by spaces (proc_sys_kernel(5)).
const SECCOMP_ACTIONS: &str = "/proc/sys/kernel/seccomp/actions_avail";

/// Runs all checks of the host.
pub fn all(config: &Config) -> Vec<Finding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let file_systems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    vec![
        user(),
        kvm(kvm_speed()),
        kernel(release.trim()),
        namespaces(Path::new("/proc/self/ns")),
        seccomp(fs::read_to_string(SECCOMP_ACTIONS), config.seccomp),
        seccomp_mode(config.seccomp),
        landlock(Landlock::of_kernel(), config.require_landlock),
        overlay(&file_systems),
        tun(),
        vhost_net(),
        cgroup(),
    ]
}

fn user() -> Finding {
    if nix::unistd::geteuid().is_root() {
        return Finding::ok("user", "root");
    }
    Finding::warn("user", "not root: some findings may be wrong", "run this command as root, like containerd")
}

fn kvm(probe: Result<Probe, ProbeError>) -> Finding {
    let name = "kvm";
    let remedy = "load kvm_intel or kvm_amd; if the node is a VM, enable nested virtualization";
    match probe {
        Ok(probe) => {
            let speed = format!(
                "{:.1} million guest instructions a second at privilege level 0",
                probe.instructions_per_second / 1e6
            );
            if probe.usable() {
                return Finding::ok(name, speed);
            }
            let remedy =
                "use a node with hardware virtualization: this KVM interprets guest code and cannot boot a kernel";
            Finding::fail(name, format!("much too slow: {speed}"), remedy)
        }
        Err(ProbeError::Open(error)) => match error.kind() {
            io::ErrorKind::NotFound => Finding::fail(name, "/dev/kvm does not exist", remedy),
            io::ErrorKind::PermissionDenied => {
                Finding::fail(name, "no permission to open /dev/kvm", "run this command as root, like containerd")
            }
            _ => Finding::fail(name, format!("failed to open /dev/kvm: {error}"), remedy),
        },
        Err(error) => Finding::fail(name, chain(&error), remedy),
    }
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = MIN_KERNEL;
    if version >= MIN_KERNEL {
        return Finding::ok("kernel", format!("Linux {release}"));
    }
    Finding::fail("kernel", format!("Linux {release}"), format!("install Linux {major}.{minor} or later"))
}

fn namespaces(dir: &Path) -> Finding {
    let name = "namespaces";
    let missing: Vec<&str> = NAMESPACES.into_iter().filter(|kind| !dir.join(kind).exists()).collect();
    if missing.is_empty() {
        return Finding::ok(name, NAMESPACES.join(", "));
    }
    Finding::fail(name, format!("missing: {}", missing.join(", ")), "use a kernel with these namespaces")
}

/// Checks whether the kernel supports the seccomp actions that Husk needs in `mode`. The seccomp filters of the VMM and
/// the shim use these actions.
fn seccomp(available: io::Result<String>, mode: Seccomp) -> Finding {
    let name = "seccomp";
    let needed = match mode {
        Seccomp::Enforce => ["allow", "errno", "trap"],
        Seccomp::Log => ["allow", "errno", "log"],
    };
    let available = match available {
        Ok(available) => available,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let detail = format!("the kernel has no seccomp filters: {SECCOMP_ACTIONS} does not exist");
            return Finding::fail(
                name,
                detail,
                "use a kernel with CONFIG_SECCOMP_FILTER: without this option, no pod can start",
            );
        }
        Err(error) => {
            let detail = format!("failed to read {SECCOMP_ACTIONS}: {error}");
            return Finding::warn(name, detail, "run this command as root, in the host's mount namespace");
        }
    };
    let missing: Vec<&str> =
        needed.into_iter().filter(|action| !available.split_whitespace().any(|found| found == *action)).collect();
    if missing.is_empty() {
        return Finding::ok(name, format!("filters with the actions {}", needed.join(", ")));
    }
    let detail = format!("the kernel's seccomp filters lack the actions {}", missing.join(", "));
    Finding::fail(name, detail, "use a kernel whose seccomp filters have these actions")
}

fn seccomp_mode(mode: Seccomp) -> Finding {
    let name = "seccomp mode";
    match mode {
        Seccomp::Enforce => Finding::ok(name, "enforce"),
        Seccomp::Log => Finding::warn(
            name,
            "log: the seccomp filters of the VMM and the shim only log the system calls that they do not allow",
            "set seccomp = \"enforce\" in the configuration, and create the pods again",
        ),
    }
}

fn landlock(landlock: Landlock, required: bool) -> Finding {
    let name = "landlock";
    match landlock.missing() {
        None => Finding::ok(name, landlock.to_string()),
        Some(missing) if required && !landlock.is_usable() => Finding::fail(
            name,
            format!("{missing}; require_landlock = true in the configuration requires landlock"),
            format!("{}, or set require_landlock = false", landlock.remedy()),
        ),
        Some(missing) => Finding::warn(name, missing, landlock.remedy()),
    }
}

fn overlay(file_systems: &str) -> Finding {
    let name = "overlay";
    if file_systems.lines().any(|line| line.split_whitespace().last() == Some("overlay")) {
        return Finding::ok(name, "available");
    }
    Finding::warn(name, "not loaded", "run `modprobe overlay`, or use another snapshotter in containerd")
}

fn tun() -> Finding {
    let name = "tun";
    match fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Finding::ok(name, "/dev/net/tun"),
        Err(error) => Finding::warn(
            name,
            format!("failed to open /dev/net/tun: {error}"),
            "run `modprobe tun`: without this module, pods have no network",
        ),
    }
}

fn vhost_net() -> Finding {
    let name = "vhost-net";
    match fs::OpenOptions::new().read(true).write(true).open("/dev/vhost-net") {
        Ok(_) => Finding::ok(name, "/dev/vhost-net"),
        Err(error) => Finding::warn(
            name,
            format!("failed to open /dev/vhost-net: {error}"),
            "run `modprobe vhost_net`: without this module, all network frames pass through the VMM",
        ),
    }
}

fn cgroup() -> Finding {
    let name = "cgroup";
    match statfs("/sys/fs/cgroup").map(|stat| stat.filesystem_type()) {
        Ok(CGROUP2_SUPER_MAGIC) => Finding::ok(name, "cgroup v2"),
        Ok(TMPFS_MAGIC) => Finding::ok(name, "cgroup v1"),
        _ => Finding::fail(
            name,
            "no cgroup file system at /sys/fs/cgroup",
            "run `mount -t cgroup2 cgroup2 /sys/fs/cgroup`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn kvm_is_rated_by_its_speed() {
        let speed = |rate| kvm(Ok(Probe { instructions_per_second: rate }));
        assert_eq!(speed(2.5e9).status, Status::Ok);
        assert!(speed(6e5).detail.starts_with("much too slow: 0.6 million"));
        let open = |kind: io::ErrorKind| kvm(Err(ProbeError::Open(kind.into())));
        assert_eq!(open(io::ErrorKind::NotFound).detail, "/dev/kvm does not exist");
        assert_eq!(open(io::ErrorKind::PermissionDenied).detail, "no permission to open /dev/kvm");
    }

    #[test]
    fn kernel_versions_are_compared_numerically() {
        assert_eq!(kernel("6.1.0-18-amd64").status, Status::Ok);
        assert_eq!(kernel("5.14").status, Status::Ok);
        assert_eq!(kernel("5.13.9-1").status, Status::Fail);
        assert_eq!(kernel("").status, Status::Fail);
        assert_eq!(overlay("nodev\tproc\nnodev\toverlay\n").status, Status::Ok);
        assert_eq!(overlay("nodev\tproc\n").status, Status::Warn);
    }

    #[test]
    fn all_host_checks_run() {
        let names: Vec<_> = all(&Config::default()).iter().map(|finding| finding.name).collect();
        let expected = [
            "user",
            "kvm",
            "kernel",
            "namespaces",
            "seccomp",
            "seccomp mode",
            "landlock",
            "overlay",
            "tun",
            "vhost-net",
            "cgroup",
        ];
        assert_eq!(names, expected);
    }

    #[test]
    fn missing_namespace_fails() {
        let dir = tempfile::tempdir().unwrap();
        for kind in NAMESPACES {
            assert_eq!(namespaces(dir.path()).status, Status::Fail, "{kind} is missing, but no finding fails");
            fs::write(dir.path().join(kind), "").unwrap();
        }
        assert_eq!(namespaces(dir.path()), Finding::ok("namespaces", "mnt, pid, net, ipc, uts, cgroup"));
        fs::remove_file(dir.path().join("cgroup")).unwrap();
        assert_eq!(namespaces(dir.path()).detail, "missing: cgroup");
    }

    #[test]
    fn seccomp_fails_without_filters_or_without_an_action_that_the_mode_needs() {
        let seccomp = |available: &str, mode| seccomp(Ok(available.to_owned()), mode);
        let linux_6 = "kill_process kill_thread trap errno user_notif trace log allow\n";
        for mode in [Seccomp::Enforce, Seccomp::Log] {
            assert_eq!(seccomp(linux_6, mode).status, Status::Ok);
            let missing = super::seccomp(Err(io::ErrorKind::NotFound.into()), mode);
            assert!(missing.status == Status::Fail && missing.remedy.contains("CONFIG_SECCOMP_FILTER"), "{missing:?}");
            let unreadable = super::seccomp(Err(io::ErrorKind::PermissionDenied.into()), mode);
            assert_eq!(unreadable.status, Status::Warn, "{unreadable:?}");
            assert_eq!(seccomp("kill_process log trap allow", mode).status, Status::Fail);
        }
        assert_eq!(seccomp("trap errno allow", Seccomp::Enforce).status, Status::Ok);
        let without_log = seccomp("trap errno allow", Seccomp::Log);
        assert!(without_log.status == Status::Fail && without_log.detail.ends_with("actions log"), "{without_log:?}");
        assert_eq!(seccomp("errno log allow", Seccomp::Enforce).status, Status::Fail);
    }

    #[test]
    fn seccomp_mode_log_is_a_warning() {
        assert_eq!(seccomp_mode(Seccomp::Enforce), Finding::ok("seccomp mode", "enforce"));
        let log = seccomp_mode(Seccomp::Log);
        assert!(log.status == Status::Warn && log.remedy.contains("enforce"), "{log:?}");
    }

    #[test]
    fn missing_landlock_fails_only_if_it_is_required() {
        assert_eq!(landlock(Landlock::Abi(6), true), Finding::ok("landlock", "this kernel has landlock ABI 6"));
        for required in [false, true] {
            let partial = landlock(Landlock::Abi(2), required);
            assert!(partial.status == Status::Warn && partial.detail.contains("TCP"), "{partial:?}");
            let expected = if required { Status::Fail } else { Status::Warn };
            for landlock in [Landlock::Abi(1), Landlock::NotBuilt, Landlock::NotEnabled].map(|l| landlock(l, required))
            {
                assert_eq!(landlock.status, expected, "{landlock:?}");
            }
        }
    }
}
