//! The system calls that the shim may make after it has confined itself.

use husk_vmm::jail::seccomp::{Rule, allow, allow_if, is, lacks};
use syscalls::Sysno;

/// Flags with which glibc starts a thread (`create_thread` in nptl/pthread_create.c).
const THREAD_FLAGS: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID)
    .cast_unsigned();
const CLONE_FS: u32 = libc::CLONE_FS.cast_unsigned();
const CLONE_NEWNS: u32 = libc::CLONE_NEWNS.cast_unsigned();
const CLONE_NEWNET: u32 = libc::CLONE_NEWNET.cast_unsigned();
const CLONE_NEWUSER: u32 = libc::CLONE_NEWUSER.cast_unsigned();
const PROT_EXEC: u32 = libc::PROT_EXEC.cast_unsigned();
/// Flags of open(2) that open a file for writing, or create or truncate the file.
const O_WRITING: u32 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC).cast_unsigned();
const PR_SET_NAME: u32 = libc::PR_SET_NAME.cast_unsigned();
const PR_GET_NAME: u32 = libc::PR_GET_NAME.cast_unsigned();
const PR_SET_PDEATHSIG: u32 = libc::PR_SET_PDEATHSIG.cast_unsigned();
const AF_UNIX: u32 = libc::AF_UNIX.cast_unsigned();
const AF_INET: u32 = libc::AF_INET.cast_unsigned();
const AF_INET6: u32 = libc::AF_INET6.cast_unsigned();
const AF_NETLINK: u32 = libc::AF_NETLINK.cast_unsigned();

// asm-generic/ioctls.h, linux/sockios.h, linux/fs.h
const TCGETS: u32 = 0x5401;
const FIONREAD: u32 = 0x541b;
const FIONBIO: u32 = 0x5421;
const SIOCSIFFLAGS: u32 = 0x8914;
const SIOCGIFINDEX: u32 = 0x8933;
const BLKGETSIZE64: u32 = 0x8008_1272;
// linux/if_tun.h
const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNSETQUEUE: u32 = 0x4004_54d9;
// linux/loop.h
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
// linux/bpf.h
const BPF_MAP_CREATE: u32 = 0;
const BPF_MAP_UPDATE_ELEM: u32 = 2;
const BPF_PROG_LOAD: u32 = 5;
const BPF_LINK_CREATE: u32 = 28;

/// Threads, memory, time and the async runtime.
const RUNTIME: &[Rule] = &[
    allow(Sysno::futex, "locks, condition variables and channels"),
    allow(Sysno::sched_yield, "a lock waits for another thread"),
    allow(Sysno::sched_getaffinity, "starts a thread; counts the node's CPUs"),
    allow_if(Sysno::mmap, &[lacks(2, PROT_EXEC)], "the allocator gets memory, which is never executable"),
    allow_if(Sysno::mprotect, &[lacks(2, PROT_EXEC)], "the allocator extends its heaps, which are never executable"),
    allow(Sysno::munmap, "the allocator gives back memory"),
    allow(Sysno::mremap, "the allocator resizes large blocks"),
    allow(Sysno::madvise, "the allocator or an ending thread gives back memory"),
    allow(Sysno::brk, "the allocator gets memory"),
    allow_if(
        Sysno::clone,
        &[is(0, THREAD_FLAGS), is(0, CLONE_NEWUSER)],
        "starts a thread, or the process that holds a user namespace for an id-mapped mount",
    ),
    allow(Sysno::clone3, "another filter makes the call fail with ENOSYS, so that glibc calls clone"),
    allow(Sysno::set_robust_list, "starts a thread"),
    allow(Sysno::rseq, "starts a thread"),
    allow(Sysno::gettid, "the runtime and locks identify threads"),
    allow(Sysno::getpid, "records the shim's PID, and checks netlink answers"),
    allow_if(
        Sysno::prctl,
        &[is(0, PR_SET_NAME), is(0, PR_GET_NAME), is(0, PR_SET_PDEATHSIG)],
        "names threads; the holder of a user namespace ends with the shim",
    ),
    allow(Sysno::pause, "the holder of a user namespace waits"),
    allow(Sysno::exit, "ends a thread"),
    allow(Sysno::exit_group, "ends the shim"),
    allow(Sysno::sigaltstack, "sets a thread's stack for signal handlers"),
    allow(Sysno::rt_sigprocmask, "blocks signals while a thread starts or ends"),
    allow(Sysno::rt_sigaction, "handles SIGTERM and SIGINT"),
    allow(Sysno::rt_sigreturn, "returns from a signal handler"),
    allow(Sysno::restart_syscall, "the kernel resumes an interrupted wait"),
    allow(Sysno::tgkill, "a thread aborts the shim"),
    allow(Sysno::clock_gettime, "reads the time, if the clock source has no vDSO"),
    allow(Sysno::clock_nanosleep, "waits between attempts"),
    allow(Sysno::getrandom, "creates stream tokens, and keys of hash tables"),
    allow(Sysno::epoll_create1, "the async runtime"),
    allow(Sysno::epoll_ctl, "the async runtime"),
    allow(Sysno::epoll_wait, "the async runtime"),
    allow(Sysno::eventfd2, "wakes the async runtime"),
    allow(Sysno::timerfd_create, "notices steps of the node's clock"),
    allow(Sysno::timerfd_settime, "notices steps of the node's clock"),
    allow(Sysno::poll, "waits for one fd"),
    allow(Sysno::ppoll, "waits for one fd"),
];

/// Files: bundles, the state directory, cgroups, procfs, volumes, fifos and logs.
const FILES: &[Rule] = &[
    allow(Sysno::read, "reads files, fifos and streams"),
    allow(Sysno::write, "writes files, fifos and streams"),
    allow(Sysno::readv, "reads streams"),
    allow(Sysno::writev, "writes streams"),
    allow(Sysno::pread64, "reads parts of files"),
    allow(Sysno::pwrite64, "writes parts of files"),
    allow(Sysno::lseek, "sets the position in a file"),
    allow(Sysno::close, "closes fds"),
    allow(Sysno::fcntl, "duplicates fds, and makes them non-blocking"),
    allow(Sysno::pipe2, "creates pipes for hooks and loggers"),
    allow(Sysno::openat, "opens files"),
    allow(Sysno::openat2, "opens files of mirrored volumes, and sockets of the node, below the volume's directory"),
    allow(Sysno::fstat, "reads file types and sizes"),
    allow(Sysno::newfstatat, "reads file types and sizes"),
    allow(Sysno::statx, "reads file types and sizes"),
    allow(Sysno::statfs, "recognizes host-only file systems"),
    allow(Sysno::fstatfs, "recognizes host-only file systems"),
    allow(Sysno::access, "checks whether a file exists"),
    allow(Sysno::faccessat2, "checks whether a file exists"),
    allow(Sysno::readlink, "reads the paths of fds and namespaces"),
    allow(Sysno::readlinkat, "reads symbolic links of mirrored volumes"),
    allow(Sysno::getdents64, "lists directories"),
    allow(Sysno::chdir, "enters the directory of an overlay's layers, to mount the overlay with relative paths"),
    allow(Sysno::mkdir, "creates mount points and cgroups"),
    allow(Sysno::mkdirat, "creates mount points"),
    allow(Sysno::rmdir, "removes mount points and cgroups"),
    allow(Sysno::unlink, "removes files and sockets"),
    allow(Sysno::unlinkat, "removes directory trees"),
    allow(Sysno::rename, "replaces files atomically"),
    allow(Sysno::linkat, "gives a name to the copy of a guest image"),
    allow(Sysno::chmod, "sets the modes of created files"),
    allow(Sysno::fchmod, "sets the modes of created files"),
    allow(Sysno::fchmodat, "sets the modes of created files"),
    allow(Sysno::umask, "sets the modes of created files"),
    allow(Sysno::ftruncate, "replaces the contents of files"),
    allow(Sysno::fsync, "makes files durable"),
    allow(Sysno::fdatasync, "makes files durable"),
    allow(Sysno::fadvise64, "announces sequential reads of the guest image"),
    allow(Sysno::flock, "takes a lock, so that an address has only one shim"),
    allow(Sysno::copy_file_range, "copies files"),
    allow(Sysno::sendfile, "copies files"),
    allow(Sysno::splice, "copies output between fifos and streams"),
    allow(Sysno::memfd_create, "creates files for copies of the guest image and for requests to the launcher"),
    allow(Sysno::mknodat, "creates the mount points of files in the share"),
    allow(Sysno::inotify_init1, "watches mirrored volumes and CNI changes"),
    allow(Sysno::inotify_add_watch, "watches mirrored volumes"),
    allow(Sysno::inotify_rm_watch, "watches mirrored volumes"),
    allow_if(
        Sysno::ioctl,
        &[
            is(1, FIONREAD),
            is(1, FIONBIO),
            is(1, TCGETS),
            is(1, SIOCGIFINDEX),
            is(1, SIOCSIFFLAGS),
            is(1, TUNSETIFF),
            is(1, TUNGETIFF),
            is(1, TUNSETQUEUE),
            is(1, TUNSETOFFLOAD),
            is(1, TUNSETVNETHDRSZ),
            is(1, LOOP_CTL_GET_FREE),
            is(1, LOOP_CONFIGURE),
            is(1, BLKGETSIZE64),
        ],
        "makes streams non-blocking; configures taps; attaches disk images to loop devices; reads sizes of disks",
    ),
];

/// Mounts and namespaces.
const MOUNTS: &[Rule] = &[
    allow(Sysno::mount, "mounts the rootfs and tmpfs"),
    allow(Sysno::umount2, "unmounts what a container used"),
    allow(Sysno::open_tree, "copies mounts of volumes"),
    allow(Sysno::move_mount, "attaches mounts in the share"),
    allow(Sysno::mount_setattr, "sets flags, propagation and id mappings of mounts"),
    allow_if(Sysno::setns, &[is(1, CLONE_NEWNET)], "enters the pod's network namespace"),
    allow_if(
        Sysno::unshare,
        &[is(0, CLONE_FS), is(0, CLONE_FS | CLONE_NEWNS), is(0, CLONE_NEWNET)],
        "separates the directory or mounts of a thread that mounts an overlay; creates the pod's network namespace",
    ),
];

/// Sockets: containerd, the VMM, the launcher, systemd, netlink and port forwarding.
const SOCKETS: &[Rule] = &[
    allow_if(
        Sysno::socket,
        &[is(0, AF_UNIX), is(0, AF_INET), is(0, AF_INET6), is(0, AF_NETLINK)],
        "connects to containerd and systemd; listens for port forwarding; configures networks",
    ),
    allow_if(Sysno::socketpair, &[is(0, AF_UNIX)], "creates sockets for the launcher and for connections to the guest"),
    allow(Sysno::connect, "connects to containerd and systemd"),
    allow(Sysno::bind, "binds sockets for netlink and port forwarding; counts the inotify instances of all shims"),
    allow(Sysno::listen, "listens for connections to forwarded ports"),
    allow(Sysno::accept4, "accepts connections to the shim's socket and to forwarded ports"),
    allow(Sysno::getsockname, "reads the addresses of forwarded connections"),
    allow(Sysno::getpeername, "reads the addresses of forwarded connections"),
    allow(Sysno::setsockopt, "sets options of netlink and TCP sockets, and refuses fds of the VMM"),
    allow(Sysno::getsockopt, "reads the results of connections, and the credentials of clients"),
    allow(Sysno::sendto, "sends netlink requests, and data to streams"),
    allow(Sysno::recvfrom, "receives netlink answers, and data from streams"),
    allow(Sysno::sendmsg, "sends fds to the VMM and the launcher"),
    allow(Sysno::recvmsg, "receives answers of the VMM, and fds from the launcher"),
    allow(Sysno::shutdown, "half-closes streams"),
    allow_if(
        Sysno::bpf,
        &[is(0, BPF_MAP_CREATE), is(0, BPF_MAP_UPDATE_ELEM), is(0, BPF_PROG_LOAD), is(0, BPF_LINK_CREATE)],
        "steers connections to forwarded ports in the pod's network namespace",
    ),
];

/// Processes: the VMM, the launcher and the programs that it starts.
const PROCESSES: &[Rule] = &[
    allow(Sysno::kill, "ends the holder of a user namespace"),
    allow(Sysno::wait4, "reaps child processes"),
    allow(Sysno::waitid, "reaps child processes"),
    allow(Sysno::pidfd_open, "waits for processes of an earlier shim"),
    allow(Sysno::pidfd_send_signal, "ends the VMM and programs"),
    allow(Sysno::getppid, "reads the PID of the parent process"),
    allow(Sysno::prlimit64, "reads and sets fd limits"),
    allow(Sysno::uname, "reads the version of the host's kernel"),
    allow(Sysno::sysinfo, "reads the size of the host's memory"),
    allow(Sysno::getuid, "authenticates the shim to systemd"),
    allow(Sysno::geteuid, "authenticates the shim to systemd"),
    allow(Sysno::getgid, "authenticates the shim to systemd"),
    allow(Sysno::getegid, "authenticates the shim to systemd"),
];

/// Further calls of the threads that stay in the host's mount namespace ([`crate::host_view`]). These threads may also
/// make the calls in [`RUNTIME`]. They can neither change mounts nor open a file for writing.
pub const HOST_VIEW: &[Rule] = &[
    allow_if(Sysno::openat, &[lacks(2, O_WRITING)], "opens paths of the host"),
    allow(Sysno::open_tree, "copies mounts of the host"),
    allow(Sysno::close, "closes fds"),
    allow(Sysno::read, "reads the number of CPUs, to set up the allocator"),
    allow(Sysno::write, "reports a refused call"),
];

/// The tables, with their titles.
pub const TABLES: [(&str, &[Rule]); 5] = [
    ("Threads, memory, time and the async runtime", RUNTIME),
    ("Files", FILES),
    ("Mounts and namespaces", MOUNTS),
    ("Sockets", SOCKETS),
    ("Processes", PROCESSES),
];

/// Returns the rules of the threads in the host's mount namespace.
pub fn host_view_rules() -> impl Iterator<Item = &'static Rule> {
    RUNTIME.iter().chain(HOST_VIEW)
}

/// Returns all rules.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    TABLES.into_iter().flat_map(|(_, table)| table)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn tables_have_no_call_twice_and_every_rule_has_a_reason() {
        let calls: BTreeSet<Sysno> = rules().map(|rule| rule.call).collect();
        assert_eq!(calls.len(), rules().count());
        let host_view: BTreeSet<Sysno> = host_view_rules().map(|rule| rule.call).collect();
        assert_eq!(host_view.len(), host_view_rules().count());
        assert!(rules().chain(HOST_VIEW).all(|rule| !rule.reason.is_empty()));
    }

    #[test]
    fn host_view_cannot_write_to_the_host() {
        let mut calls = [Sysno::mount, Sysno::umount2, Sysno::move_mount, Sysno::mount_setattr, Sysno::setns].to_vec();
        calls.extend([Sysno::unshare, Sysno::mkdir, Sysno::mknodat, Sysno::unlink, Sysno::rename, Sysno::chmod]);
        calls.extend([Sysno::fchmodat, Sysno::openat2, Sysno::ftruncate, Sysno::ioctl, Sysno::connect]);
        assert!(host_view_rules().all(|rule| !calls.contains(&rule.call)));
        let open = host_view_rules().find(|rule| rule.call == Sysno::openat).unwrap();
        let writes = |flags: i32| open.when.iter().all(|when| flags.cast_unsigned() & when.mask != when.value);
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TRUNC, libc::O_TMPFILE | libc::O_RDWR] {
            assert!(writes(flags), "{flags:#x}");
        }
        assert!(!writes(libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW));
    }

    #[test]
    fn powerful_calls_are_allowed_with_certain_arguments_only() {
        use Sysno::{bpf, clone, ioctl, mmap, mprotect, prctl, setns, socket, socketpair, unshare};
        for rule in rules() {
            let powerful = [bpf, clone, ioctl, mmap, mprotect, prctl, setns, socket, socketpair, unshare];
            assert!(
                !rule.when.is_empty() || !powerful.contains(&rule.call),
                "the rule for {} allows all arguments",
                rule.call
            );
        }
    }
}
