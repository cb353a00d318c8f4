//! The system calls that each kind of thread may make.

use libc::{
    CLONE_CHILD_CLEARTID, CLONE_FILES, CLONE_FS, CLONE_PARENT_SETTID, CLONE_SETTLS, CLONE_SIGHAND, CLONE_SYSVSEM,
    CLONE_THREAD, CLONE_VM, F_DUPFD_CLOEXEC, F_GETFD, F_GETLK, F_OFD_SETLK, F_OFD_SETLKW, F_SETLK, F_SETLKW, FIONBIO,
    PR_CAP_AMBIENT, PR_CAPBSET_READ, PR_GET_NAME, PR_GET_SECUREBITS, PR_SET_NAME, PR_SET_NO_NEW_PRIVS,
    PR_SET_SECUREBITS, PROT_EXEC, SO_SNDBUF,
};
use syscalls::Sysno;

use super::rule::{Rule, allow, allow_if, is, lacks};
use crate::jail::kind::Kind;

/// PID of the VMM in its PID namespace (pid_namespaces(7)). The VMM is the namespace's first process.
const OWN_PID: u32 = 1;
/// Flags with which glibc starts a thread (`create_thread` in nptl/pthread_create.c).
const THREAD_FLAGS: u32 = (CLONE_VM
    | CLONE_FS
    | CLONE_FILES
    | CLONE_SYSVSEM
    | CLONE_SIGHAND
    | CLONE_THREAD
    | CLONE_SETTLS
    | CLONE_PARENT_SETTID
    | CLONE_CHILD_CLEARTID)
    .cast_unsigned();

// linux/kvm.h
const KVM_RUN: u32 = 0xae80;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
const KVM_SET_MSRS: u32 = 0x4008_ae89;
const KVM_SET_FPU: u32 = 0x41a0_ae8d;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
const KVM_CHECK_EXTENSION: u32 = 0xae03;
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_GET_SREGS: u32 = 0x8138_ae83;
const KVM_GET_XSAVE: u32 = 0x9000_aea4;
const KVM_GET_XCRS: u32 = 0x8188_aea6;
const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
const KVM_GET_CPUID2: u32 = 0xc008_ae91;
const KVM_GET_MSRS: u32 = 0xc008_ae88;
const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
const KVM_GET_TSC_KHZ: u32 = 0xaea3;
const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
const KVM_GET_PIT2: u32 = 0x8070_ae9f;
const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
const KVM_PRE_FAULT_MEMORY: u32 = 0xc040_aed5;

// linux/vhost.h
const VHOST_GET_FEATURES: u32 = 0x8008_af00;
const VHOST_SET_FEATURES: u32 = 0x4008_af00;
const VHOST_SET_OWNER: u32 = 0xaf01;
const VHOST_RESET_OWNER: u32 = 0xaf02;
const VHOST_SET_MEM_TABLE: u32 = 0x4008_af03;
const VHOST_SET_VRING_NUM: u32 = 0x4008_af10;
const VHOST_SET_VRING_ADDR: u32 = 0x4028_af11;
const VHOST_SET_VRING_BASE: u32 = 0x4008_af12;
const VHOST_GET_VRING_BASE: u32 = 0xc008_af12;
const VHOST_SET_VRING_KICK: u32 = 0x4008_af20;
const VHOST_SET_VRING_CALL: u32 = 0x4008_af21;
const VHOST_SET_VRING_ERR: u32 = 0x4008_af22;
const VHOST_NET_SET_BACKEND: u32 = 0x4008_af30;

// linux/if_tun.h
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETQUEUE: u32 = 0x4004_54d9;

/// Calls that every thread may make.
const EVERY_THREAD: &[Rule] = &[
    allow(Sysno::futex, "locks, condition variables and channels"),
    allow(Sysno::sched_yield, "a channel of the standard library waits for another sender or receiver"),
    allow(Sysno::write, "eventfds, log lines and the console"),
    allow(Sysno::sendmsg, "notices on the control socket"),
    allow(Sysno::exit_group, "ends the process when the VM ends or a filter is violated"),
    allow(Sysno::rt_sigreturn, "returns from the handler of SIGRTMIN or SIGSYS"),
    allow(Sysno::munmap, "the allocator gives back memory"),
    allow(Sysno::madvise, "the allocator gives back memory"),
    allow(Sysno::brk, "the allocator gets memory"),
    allow_if(Sysno::mmap, &[lacks(2, PROT_EXEC as u32)], "the allocator gets memory, which is never executable"),
    allow_if(
        Sysno::mprotect,
        &[lacks(2, PROT_EXEC as u32)],
        "the allocator extends its heaps, which are never executable",
    ),
    allow(Sysno::clock_gettime, "timestamps, if the host's clock source has no vDSO"),
];

const VCPU: &[Rule] = &[allow_if(
    Sysno::ioctl,
    &[is(1, KVM_RUN), is(1, KVM_KVMCLOCK_CTRL)],
    "runs the guest, and tells the guest about a pause",
)];

/// Calls of a thread that ends before the process ends.
const THREAD_END: &[Rule] = &[
    allow(Sysno::exit, "ends the thread"),
    allow(Sysno::sigaltstack, "removes the stack for signal handlers when the thread ends"),
    allow(Sysno::rt_sigprocmask, "blocks signals while the thread ends"),
];

const WORKER: &[Rule] = &[
    allow(Sysno::epoll_create1, "creates an epoll instance at each activation of the device"),
    allow(Sysno::epoll_ctl, "waits for notifications"),
    allow(Sysno::epoll_wait, "waits for notifications"),
    allow(Sysno::read, "clears a notification"),
    allow(Sysno::close, "closes files, and closes the epoll instance when the device's activation ends"),
    allow(Sysno::restart_syscall, "the kernel resumes an interrupted wait for a rate limit or for a free fd"),
    allow_if(
        Sysno::fcntl,
        &[is(1, F_GETFD as u32)],
        "the standard library of debug builds checks that an fd is open before it closes the fd",
    ),
];

const DISK: &[Rule] = &[
    allow(Sysno::preadv, "reads that the guest requests"),
    allow(Sysno::pwritev, "writes that the guest requests"),
    allow(Sysno::fdatasync, "flush requests"),
    allow(Sysno::fallocate, "discard and write-zeroes requests"),
];

const FILE_SERVER: &[Rule] = &[
    allow(Sysno::mremap, "the allocator resizes large blocks"),
    allow(Sysno::openat, "opens files relative to O_PATH fds, or by their paths in /proc/self/fd"),
    allow(Sysno::openat2, "opens files below the share, and follows no symlink"),
    allow(Sysno::statx, "GETATTR, LOOKUP, STATX"),
    allow(Sysno::readlinkat, "READLINK"),
    allow(Sysno::mkdirat, "MKDIR"),
    allow(Sysno::mknodat, "MKNOD"),
    allow(Sysno::symlinkat, "SYMLINK"),
    allow(Sysno::linkat, "LINK"),
    allow(Sysno::unlinkat, "UNLINK, RMDIR"),
    allow(Sysno::renameat2, "RENAME, RENAME2"),
    allow(Sysno::fchmod, "SETATTR"),
    allow(Sysno::fchmodat, "SETATTR"),
    allow(Sysno::fchownat, "SETATTR"),
    allow(Sysno::ftruncate, "SETATTR"),
    allow(Sysno::utimensat, "SETATTR"),
    allow(Sysno::fstatfs, "STATFS"),
    allow(Sysno::fsync, "FSYNC, FSYNCDIR"),
    allow(Sysno::fdatasync, "FSYNC, FSYNCDIR"),
    allow(Sysno::syncfs, "SYNCFS"),
    allow(Sysno::fallocate, "FALLOCATE"),
    allow(Sysno::lseek, "LSEEK, READDIR"),
    allow(Sysno::copy_file_range, "COPY_FILE_RANGE"),
    allow(Sysno::getdents64, "READDIR"),
    allow(Sysno::preadv2, "READ"),
    allow(Sysno::pwritev2, "WRITE"),
    allow(Sysno::fgetxattr, "GETXATTR"),
    allow(
        Sysno::getxattr,
        "GETXATTR by the path in /proc/self/fd, for files that are not safe to open, such as device nodes",
    ),
    allow(Sysno::fsetxattr, "SETXATTR"),
    allow(
        Sysno::setxattr,
        "SETXATTR by the path in /proc/self/fd, for files that are not safe to open, such as device nodes",
    ),
    allow(Sysno::flistxattr, "LISTXATTR"),
    allow(
        Sysno::listxattr,
        "LISTXATTR by the path in /proc/self/fd, for files that are not safe to open, such as device nodes",
    ),
    allow(Sysno::fremovexattr, "REMOVEXATTR"),
    allow(
        Sysno::removexattr,
        "REMOVEXATTR by the path in /proc/self/fd, for files that are not safe to open, such as device nodes",
    ),
    allow(
        Sysno::fchdir,
        "changes to /proc/self/fd before getxattr and similar calls, because these calls take no directory fd",
    ),
    allow(Sysno::umask, "creates files with the mode that the guest requests"),
    allow(Sysno::geteuid, "checks whether the thread has to switch to the uid of the FUSE request"),
    allow(Sysno::getegid, "checks whether the thread has to switch to the gid of the FUSE request"),
    allow(Sysno::setresuid, "switches to the uid of the FUSE request to create a file"),
    allow(Sysno::setresgid, "switches to the gid of the FUSE request to create a file"),
    allow(Sysno::setgroups, "drops supplementary groups before a file is created"),
    allow(Sysno::capget, "drops and restores CAP_FSETID around a write"),
    allow(Sysno::capset, "drops and restores CAP_FSETID around a write"),
    allow(Sysno::gettid, "libcap-ng reads the thread's id before it reads capabilities"),
    allow_if(
        Sysno::prctl,
        &[is(0, PR_CAPBSET_READ as u32), is(0, PR_CAP_AMBIENT as u32)],
        "libcap-ng checks which capability sets the kernel supports",
    ),
    allow(Sysno::fcntl, "changes file flags for OPEN and CREATE, and duplicates fds"),
    allow(Sysno::dup, "duplicates fds"),
    allow(Sysno::flock, "locks of flock(2) that are taken without waiting"),
    allow(Sysno::getrandom, "seeds the keys of hash tables"),
];

/// Calls of a thread that starts threads.
const THREAD_START: &[Rule] = &[
    allow_if(Sysno::clone, &[is(0, THREAD_FLAGS)], "starts a thread, but no process"),
    allow(
        Sysno::clone3,
        "another filter makes the call fail with ENOSYS, so that glibc calls clone; SIGSYS would end the VMM",
    ),
    allow(Sysno::set_robust_list, "starts a thread"),
    allow(Sysno::rseq, "starts a thread"),
    allow(Sysno::sched_getaffinity, "starts a thread"),
];

/// Calls that start and confine a worker thread of the virtio-fs server.
const FILE_SUPERVISOR: &[Rule] = &[
    allow_if(Sysno::unshare, &[is(0, CLONE_FS.cast_unsigned())], "gives a worker thread its own working directory"),
    allow_if(
        Sysno::prctl,
        &[
            is(0, PR_SET_NAME as u32),
            is(0, PR_GET_NAME as u32),
            is(0, PR_SET_NO_NEW_PRIVS as u32),
            is(0, PR_GET_SECUREBITS as u32),
            is(0, PR_SET_SECUREBITS as u32),
        ],
        "starts and confines a thread",
    ),
    allow(Sysno::seccomp, "confines a thread"),
];

/// Calls of all threads that take locks or wait for them.
const LOCK_THREAD: &[Rule] = &[
    allow(Sysno::close, "closes a file that has no more locks"),
    allow(Sysno::restart_syscall, "the kernel resumes an interrupted wait"),
    allow(Sysno::getrandom, "seeds the keys of hash tables"),
    allow(Sysno::mremap, "the allocator resizes large blocks"),
    allow_if(Sysno::prctl, &[is(0, PR_SET_NAME as u32)], "starts a thread"),
    allow(Sysno::gettid, "reads the thread's id, to which the interruption is sent"),
];

const LOCK_WAITER: &[Rule] = &[
    allow(Sysno::flock, "waits for a lock"),
    allow_if(
        Sysno::fcntl,
        &[
            is(1, F_OFD_SETLK.cast_unsigned()),
            is(1, F_OFD_SETLKW.cast_unsigned()),
            is(1, F_DUPFD_CLOEXEC.cast_unsigned()),
            is(1, F_GETFD.cast_unsigned()),
        ],
        "waits for a lock on a duplicate of an fd",
    ),
    allow(Sysno::getpid, "the process's id is an argument of tgkill"),
    allow_if(Sysno::tgkill, &[is(0, OWN_PID)], "interrupts a wait"),
];

const LOCK_OWNER: &[Rule] = &[
    allow_if(
        Sysno::fcntl,
        &[is(1, F_SETLK.cast_unsigned()), is(1, F_SETLKW.cast_unsigned()), is(1, F_GETLK.cast_unsigned())],
        "takes, waits for and queries POSIX locks",
    ),
    allow_if(Sysno::unshare, &[is(0, CLONE_FILES.cast_unsigned())], "gives an owner of locks its own file table"),
    allow(Sysno::pidfd_getfd, "copies an fd of the VMM into a file table; the only pidfd is that of the VMM"),
];

const DEVICE_LOOP: &[Rule] = &[
    allow(Sysno::mremap, "the allocator resizes large blocks"),
    allow(Sysno::epoll_ctl, "registers the events of devices and connections"),
    allow(Sysno::epoll_wait, "waits for events"),
    allow(Sysno::eventfd2, "creates eventfds when a device is activated again"),
    allow(Sysno::read, "eventfds, timers of rate limits, and sockets of vsock connections"),
    allow(Sysno::readv, "frames from the tap"),
    allow(Sysno::writev, "frames to the tap"),
    allow(Sysno::close, "closes sockets and eventfds"),
    allow(Sysno::recvmsg, "sockets of vsock connections"),
    allow_if(
        Sysno::setsockopt,
        &[is(2, SO_SNDBUF as u32)],
        "sets the send buffers of the sockets of vsock connections",
    ),
    allow_if(
        Sysno::ioctl,
        &[
            is(1, VHOST_GET_FEATURES),
            is(1, VHOST_SET_FEATURES),
            is(1, VHOST_SET_OWNER),
            is(1, VHOST_RESET_OWNER),
            is(1, VHOST_SET_MEM_TABLE),
            is(1, VHOST_SET_VRING_NUM),
            is(1, VHOST_SET_VRING_ADDR),
            is(1, VHOST_SET_VRING_BASE),
            is(1, VHOST_GET_VRING_BASE),
            is(1, VHOST_SET_VRING_KICK),
            is(1, VHOST_SET_VRING_CALL),
            is(1, VHOST_SET_VRING_ERR),
            is(1, VHOST_NET_SET_BACKEND),
            is(1, TUNSETOFFLOAD),
            is(1, TUNSETVNETHDRSZ),
            is(1, TUNSETQUEUE),
            is(1, (FIONBIO & 0xffff_ffff) as u32),
        ],
        "hands queues over to vhost-net, sets the tap's offloads, and makes sockets of vsock connections non-blocking",
    ),
    allow(Sysno::shutdown, "half-closes sockets of vsock connections"),
    allow(Sysno::fcntl, "duplicates eventfds"),
    allow(Sysno::getrandom, "gets random numbers for virtio-rng"),
    allow(Sysno::timerfd_settime, "wakes the device loop when a rate limit admits the next request, frame or packet"),
];

const CONTROL: &[Rule] = &[
    allow(Sysno::epoll_wait, "waits for requests, SIGTERM and SIGINT"),
    allow(Sysno::mremap, "the allocator resizes large blocks"),
    allow(Sysno::recvmsg, "requests on the control socket"),
    allow(Sysno::close, "closes fds"),
    allow(Sysno::eventfd2, "eventfds of hot-plugged devices"),
    allow(Sysno::fcntl, "duplicates eventfds"),
    allow(Sysno::timerfd_create, "creates the timer of a hot-plugged interface that has rate limits"),
    allow(Sysno::read, "clears eventfds, and reads signals from the signalfd"),
    allow(Sysno::lseek, "determines the size of a hot-plugged disk"),
    allow(Sysno::statx, "checks the fds of hot-plugged devices"),
    allow(Sysno::gettid, "a new thread reads its own id, which is a container's PID on the host"),
    allow_if(
        Sysno::prctl,
        &[is(0, PR_SET_NAME as u32), is(0, PR_GET_NAME as u32), is(0, PR_SET_NO_NEW_PRIVS as u32)],
        "starts and confines a thread",
    ),
    allow(Sysno::capget, "confines a thread"),
    allow(Sysno::capset, "confines a thread"),
    allow(Sysno::seccomp, "confines a thread"),
    allow_if(Sysno::tgkill, &[is(0, OWN_PID)], "interrupts vCPUs"),
    allow(Sysno::getpid, "glibc passes the process's id to tgkill (`pthread_kill`)"),
    allow_if(
        Sysno::ioctl,
        &[
            is(1, KVM_CREATE_VCPU),
            is(1, KVM_SET_USER_MEMORY_REGION),
            is(1, KVM_IRQFD),
            is(1, KVM_IOEVENTFD),
            is(1, KVM_SET_CPUID2),
            is(1, KVM_SET_MSRS),
            is(1, KVM_SET_FPU),
            is(1, KVM_GET_LAPIC),
            is(1, KVM_SET_LAPIC),
            is(1, TUNGETIFF),
            is(1, TUNSETOFFLOAD),
            is(1, TUNSETVNETHDRSZ),
            is(1, TUNSETQUEUE),
        ],
        "hot-plugs devices, memory and vCPUs",
    ),
];

const SAVER: &[Rule] = &[
    allow_if(
        Sysno::ioctl,
        &[
            is(1, KVM_CHECK_EXTENSION),
            is(1, KVM_GET_MP_STATE),
            is(1, KVM_GET_REGS),
            is(1, KVM_GET_SREGS),
            is(1, KVM_GET_XSAVE),
            is(1, KVM_GET_XCRS),
            is(1, KVM_GET_DEBUGREGS),
            is(1, KVM_GET_LAPIC),
            is(1, KVM_GET_CPUID2),
            is(1, KVM_GET_MSRS),
            is(1, KVM_GET_VCPU_EVENTS),
            is(1, KVM_GET_TSC_KHZ),
            is(1, KVM_GET_IRQCHIP),
            is(1, KVM_GET_PIT2),
            is(1, KVM_GET_CLOCK),
        ],
        "saves a VM",
    ),
    allow(Sysno::pread64, "reads which pages the guest has touched"),
];

const PREFAULT: &[Rule] = &[allow_if(Sysno::ioctl, &[is(1, KVM_PRE_FAULT_MEMORY)], "maps memory of a restored VM")];

const PID: &[Rule] = &[allow(Sysno::gettid, "reads the thread's id, which is the container's PID on the host")];

/// Returns the tables of a kind of thread. A call may be in several tables.
fn tables(kind: Kind) -> &'static [&'static [Rule]] {
    match kind {
        // The control thread starts other threads, which inherit its filter. Therefore, the control thread's filter
        // also allows the calls of these threads.
        Kind::Control => &[EVERY_THREAD, CONTROL, THREAD_START, THREAD_END, VCPU, WORKER, DISK],
        Kind::Saver => &[EVERY_THREAD, CONTROL, SAVER, THREAD_START, THREAD_END, VCPU, WORKER, DISK],
        Kind::Vcpu => &[EVERY_THREAD, VCPU],
        Kind::DeviceLoop => &[EVERY_THREAD, DEVICE_LOOP],
        Kind::FileServer => &[EVERY_THREAD, THREAD_END, WORKER, FILE_SERVER],
        // The worker threads that this thread starts inherit its filter.
        Kind::FileSupervisor => &[EVERY_THREAD, THREAD_START, THREAD_END, WORKER, FILE_SERVER, FILE_SUPERVISOR],
        Kind::LockWaiter => &[EVERY_THREAD, THREAD_START, THREAD_END, LOCK_THREAD, LOCK_WAITER],
        // The threads that this thread starts inherit its filter.
        Kind::LockOwner => &[EVERY_THREAD, THREAD_START, THREAD_END, LOCK_THREAD, LOCK_OWNER],
        Kind::Disk => &[EVERY_THREAD, THREAD_END, WORKER, DISK],
        Kind::Prefault => &[EVERY_THREAD, THREAD_END, PREFAULT],
        Kind::Pid => &[EVERY_THREAD, THREAD_END, PID],
    }
}

/// Returns the rules of a kind of thread. A call may have several rules.
pub fn rules(kind: Kind) -> impl Iterator<Item = &'static Rule> {
    tables(kind).iter().copied().flatten()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const KINDS: [(Kind, usize); 11] = [
        (Kind::Control, 45),
        (Kind::Saver, 46),
        (Kind::Vcpu, 15),
        (Kind::DeviceLoop, 35),
        (Kind::FileServer, 70),
        (Kind::FileSupervisor, 80),
        (Kind::LockWaiter, 30),
        (Kind::LockOwner, 29),
        (Kind::Disk, 35),
        (Kind::Prefault, 16),
        (Kind::Pid, 16),
    ];

    #[test]
    fn each_kind_of_thread_stays_within_its_budget_of_calls() {
        for (kind, budget) in KINDS {
            let calls: BTreeSet<Sysno> = rules(kind).map(|rule| rule.call).collect();
            assert!(calls.len() <= budget, "{kind:?} has {} calls, but its budget is {budget}", calls.len());
        }
    }

    #[test]
    fn table_has_no_call_twice_and_every_rule_has_a_reason() {
        for (kind, _) in KINDS {
            for table in tables(kind) {
                let calls: BTreeSet<Sysno> = table.iter().map(|rule| rule.call).collect();
                assert_eq!(calls.len(), table.len(), "a table of {kind:?} has a call twice");
                assert!(table.iter().all(|rule| !rule.reason.is_empty()));
            }
        }
    }

    #[test]
    fn powerful_calls_are_allowed_only_with_certain_arguments() {
        use Sysno::{clone, ioctl, mmap, mprotect, prctl, socket, socketpair, tgkill, unshare};
        for (kind, _) in KINDS {
            for rule in rules(kind) {
                let filtered = !rule.when.is_empty();
                let powerful =
                    [clone, ioctl, mmap, mprotect, prctl, socket, socketpair, tgkill, unshare].contains(&rule.call);
                assert!(filtered || !powerful, "{} is allowed with any arguments for {kind:?}", rule.call);
            }
        }
    }

    #[test]
    fn every_kind_allows_the_calls_of_the_violation_handler() {
        for (kind, _) in KINDS {
            let unconditional = |call| rules(kind).any(|rule| rule.call == call && rule.when.is_empty());
            let allowed = [Sysno::write, Sysno::sendmsg, Sysno::exit_group].into_iter().all(unconditional);
            assert!(allowed, "the filter of {kind:?} must always allow write, sendmsg and exit_group");
        }
    }
}
