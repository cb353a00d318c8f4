//! The limits of a node that pods use up, and the numbers of pods at which they are reached.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::line::Line;
use super::sample::{Kind, Process, number_at};

/// Whose use of a limit grows with the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Shim, launcher and VMM.
    Husk,
    /// containerd, CNI or the machine. The use is the same with another runtime.
    Node,
}

/// A limit, and the quantity that counts towards it.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// The limit's name.
    pub name: &'static str,
    /// The limit.
    pub value: f64,
    /// The quantity.
    pub quantity: &'static str,
    /// Whose use grows.
    pub user: User,
}

/// Limits that are files with one number.
const FILES: [(&str, &str, &str, User); 21] = [
    ("fs.inotify.max_user_instances", "/proc/sys/fs/inotify/max_user_instances", "inotify instances", User::Husk),
    ("fs.inotify.max_user_watches", "/proc/sys/fs/inotify/max_user_watches", "inotify watches", User::Husk),
    ("fs.epoll.max_user_watches", "/proc/sys/fs/epoll/max_user_watches", "epoll watches", User::Husk),
    ("kernel.pid_max", "/proc/sys/kernel/pid_max", "threads of the node", User::Husk),
    ("kernel.threads-max", "/proc/sys/kernel/threads-max", "threads of the node", User::Husk),
    ("fs.file-max", "/proc/sys/fs/file-max", "open files of the node", User::Husk),
    ("fs.aio-max-nr", "/proc/sys/fs/aio-max-nr", "asynchronous I/O requests", User::Husk),
    ("fs.mount-max, in the node's namespace", "/proc/sys/fs/mount-max", "mounts of the node", User::Husk),
    ("fs.mount-max, in a shim's namespace", "/proc/sys/fs/mount-max", "most mounts of a shim", User::Husk),
    ("fs.mount-max, in a VMM's namespace", "/proc/sys/fs/mount-max", "most mounts of a VMM", User::Husk),
    ("user.max_mnt_namespaces", "/proc/sys/user/max_mnt_namespaces", "mount namespaces", User::Husk),
    ("user.max_pid_namespaces", "/proc/sys/user/max_pid_namespaces", "PID namespaces", User::Husk),
    ("user.max_net_namespaces", "/proc/sys/user/max_net_namespaces", "network namespaces", User::Husk),
    ("user.max_ipc_namespaces", "/proc/sys/user/max_ipc_namespaces", "IPC namespaces", User::Husk),
    ("user.max_uts_namespaces", "/proc/sys/user/max_uts_namespaces", "UTS namespaces", User::Husk),
    ("user.max_cgroup_namespaces", "/proc/sys/user/max_cgroup_namespaces", "cgroup namespaces", User::Husk),
    ("user.max_user_namespaces", "/proc/sys/user/max_user_namespaces", "user namespaces", User::Husk),
    ("pids.max of kubepods", "/sys/fs/cgroup/kubepods/pids.max", "tasks of kubepods", User::Husk),
    ("kernel.keys.root_maxkeys", "/proc/sys/kernel/keys/root_maxkeys", "keys of root", User::Node),
    ("net.ipv4.neigh.default.gc_thresh3", "/proc/sys/net/ipv4/neigh/default/gc_thresh3", "IPv4 neighbours", User::Node),
    ("net.ipv6.neigh.default.gc_thresh3", "/proc/sys/net/ipv6/neigh/default/gc_thresh3", "IPv6 neighbours", User::Node),
];

/// Limits in the kernel's source: the default of RLIMIT_NOFILE, MEM_CGROUP_ID_MAX, and BR_MAX_PORTS without port 0.
const FIXED: [(&str, f64, &str, User); 3] = [
    ("RLIMIT_NOFILE of a shim, default", 1024.0, "most fds of a shim", User::Husk),
    ("memory cgroups of the kernel", 65535.0, "memory cgroups", User::Husk),
    ("ports of a bridge", 1023.0, "ports of CNI's bridge", User::Node),
];

/// Reads the node's limits. A limit that does not exist or is infinite is left out.
pub fn read() -> Vec<Limit> {
    let files = FILES.iter().map(|(name, path, quantity, user)| (*name, number_at(path, 0), *quantity, *user));
    let limit = |(name, value, quantity, user)| Limit { name, value, quantity, user };
    let mut limits: Vec<Limit> = files.chain(FIXED).map(limit).collect();
    let processes = Process::all();
    let of = |kind| processes.iter().find(|process| process.kind == kind).and_then(Process::fd_limit);
    limits.extend(
        of(Kind::Shim).map(|value| limit(("RLIMIT_NOFILE of a shim", value, "most fds of a shim", User::Husk))),
    );
    let containerd = of(Kind::Containerd);
    limits
        .extend(containerd.map(|value| limit(("RLIMIT_NOFILE of containerd", value, "fds of containerd", User::Node))));
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).unwrap_or_default();
    limits.push(limit(("memory of the node", total, "memory in use", User::Node)));
    limits.retain(|limit| limit.value > 0.0);
    limits
}

/// A limit, and when it is reached.
#[derive(Debug, Clone, PartialEq)]
pub struct Reached {
    /// The limit.
    pub limit: Limit,
    /// The number of pods. `None` if the quantity does not grow.
    pub pods: Option<f64>,
}

impl Reached {
    /// Returns the limit as JSON.
    pub fn to_json(&self) -> Value {
        let Limit { name, value, quantity, user } = &self.limit;
        json!({ "limit": name, "value": value, "quantity": quantity, "husk": *user == User::Husk,
                "pods": self.pods.map(f64::floor) })
    }
}

/// Extends the lines to the limits. Returns the limits in the order in which they are reached.
pub fn extend(limits: Vec<Limit>, lines: &BTreeMap<&'static str, Line>) -> Vec<Reached> {
    let reached = |limit: Limit| {
        let pods = lines.get(limit.quantity).and_then(|line| line.reaches(limit.value));
        Reached { limit, pods }
    };
    let mut reached: Vec<Reached> = limits.into_iter().map(reached).collect();
    let order = |one: &Reached| one.pods.unwrap_or(f64::INFINITY);
    reached.sort_by(|a, b| order(a).total_cmp(&order(b)));
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_ordered_by_the_pods_that_reach_them() {
        let limit = |name, value, quantity| Limit { name, value, quantity, user: User::Husk };
        let limits = vec![limit("never", 10.0, "steady"), limit("late", 2000.0, "b"), limit("first", 128.0, "a")];
        let line = |start, slope| Line { start, slope };
        let lines = BTreeMap::from([("steady", line(5.0, 0.0)), ("a", line(28.0, 1.0)), ("b", line(0.0, 2.0))]);
        let reached: Vec<_> = extend(limits, &lines).into_iter().map(|one| (one.limit.name, one.pods)).collect();
        assert_eq!(reached, [("first", Some(100.0)), ("late", Some(1000.0)), ("never", None)]);
    }

    #[test]
    fn every_limit_has_a_quantity() {
        let quantities: Vec<&str> = super::super::QUANTITIES.iter().map(|quantity| quantity.name).collect();
        let limits = read();
        assert!(limits.iter().any(|limit| limit.name == "kernel.pid_max"));
        assert!(limits.iter().all(|limit| quantities.contains(&limit.quantity)), "{limits:?}");
    }
}
