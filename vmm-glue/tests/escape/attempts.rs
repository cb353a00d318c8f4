//! The attempts to get out of the jail.

use std::ffi::CStr;
use std::os::fd::AsRawFd;

use syscalls::{Errno, Sysno, syscall};

use crate::Stopped;
use crate::chains;
use crate::exhaustion;
use crate::payload::Inside;

/// Why sockets do no harm without the filters.
const EMPTY_NETWORK: &str = "the socket reaches only the pod's network";
const OWN_KEYS: &str = "the process gets access only to its own keys";

type Make = fn(&Inside) -> Result<String, Stopped>;

/// An attempt.
pub struct Attempt {
    pub name: &'static str,
    /// Makes the attempt. Returns what the process has gained, or what stopped the attempt.
    pub make: Make,
    /// The reason why no other wall has to stop the attempt. `None` if another wall has to stop the attempt.
    pub without_filters: Option<&'static str>,
}

/// Returns an attempt that has to fail with and without the seccomp filters.
const fn never(name: &'static str, make: Make) -> Attempt {
    Attempt { name, make, without_filters: None }
}

/// Returns an attempt that only the seccomp filters stop.
const fn filtered(name: &'static str, make: Make, without_filters: &'static str) -> Attempt {
    Attempt { name, make, without_filters: Some(without_filters) }
}

/// Makes a system call. The attempt succeeds if the call succeeds.
macro_rules! call {
    ($name:ident $(, $argument:expr)*) => {
        |_| {
            // SAFETY: the arguments are numbers, or pointers to static data. The process ends after the attempt.
            let result: Result<usize, Errno> = unsafe { syscall!(Sysno::$name $(, $argument)*) };
            Ok(result.map(|_| format!("{} succeeded", stringify!($name)))?)
        }
    };
}

/// Returns the address of a NUL-terminated text.
pub fn text(text: &'static CStr) -> usize {
    text.as_ptr().addr()
}

/// Opens a path and reads its first bytes.
pub fn read(directory: i32, path: &'static CStr, flags: i32) -> Result<String, Stopped> {
    // SAFETY: the path is a static text, and the buffer outlives the call.
    unsafe {
        let fd = syscall!(Sysno::openat, directory, text(path), flags)?;
        let mut buffer = [0u8; 16];
        let len = syscall!(Sysno::read, fd, buffer.as_mut_ptr(), buffer.len())?;
        Ok(format!("{path:?} holds {:?}", String::from_utf8_lossy(&buffer[..len])))
    }
}

pub const AT_FDCWD: i32 = libc::AT_FDCWD;
/// The command of bpf(2) that loads a program (linux/bpf.h).
const BPF_PROG_LOAD: i32 = 5;

/// All attempts.
pub const ATTEMPTS: &[Attempt] = &[
    never("open a host file by its path", |_| read(AT_FDCWD, c"/etc/passwd", libc::O_RDONLY)),
    never("open a file beside the share by `..`", |_| read(AT_FDCWD, c"../secret", libc::O_RDONLY)),
    never("open a file beside the share by `/..`", |_| read(AT_FDCWD, c"/../../secret", libc::O_RDONLY)),
    never("open `..` of the directory /proc/self/fd", |inside| {
        read(inside.belongings.fd_directory.as_raw_fd(), c"../status", libc::O_RDONLY)
    }),
    never("open /proc/1/root", |_| read(AT_FDCWD, c"/proc/1/root/etc/passwd", libc::O_RDONLY)),
    never("open a cgroup file", |_| read(AT_FDCWD, c"/sys/fs/cgroup/cgroup.procs", libc::O_RDWR)),
    never("use an inherited fd", inherited_fds),
    never("read an inherited environment variable", inherited_variables),
    never("chroot to `..`", |_| {
        // SAFETY: the arguments are static texts.
        unsafe { syscall!(Sysno::chroot, text(c".."))? };
        Ok("changed the root".to_owned())
    }),
    never("mount a tmpfs", call!(mount, text(c"x"), text(c"/"), text(c"tmpfs"), 0, 0)),
    never("mount procfs", call!(mount, text(c"x"), text(c"/"), text(c"proc"), 0, 0)),
    never("unmount the root", call!(umount2, text(c"/"), libc::MNT_DETACH)),
    never("create a file system context", call!(fsopen, text(c"proc"), 0)),
    never("clone the root's mount", call!(open_tree, AT_FDCWD, text(c"/"), 1)),
    never("change a mount's flags", |_| {
        chains::clear_nodev(AT_FDCWD, c"/", 0)?;
        Ok("cleared nodev of the share".to_owned())
    }),
    never("attach a new mount", chains::attach_new_mount),
    never("open a device of a new devtmpfs", chains::device_of_devtmpfs),
    never("set the mode of a device of a new devtmpfs", chains::mode_in_devtmpfs),
    never("make a device node of a host disk, and read the disk", chains::disk_in_share),
    never("make a device node on a new mount, and read the disk", chains::disk_on_new_mount),
    never("clear nodev of the share, make a device node, and read the disk", chains::disk_without_nodev),
    never("clear nodev of a clone of the share, make a device node, and read the disk", chains::disk_on_clone),
    never("clear nodev of the share in a new user namespace, and read the disk", chains::disk_in_user_namespace),
    never("open a file by its handle", |_| {
        let mut handle = [128u32; 40];
        let mut mount_id = 0i32;
        // SAFETY: the buffers outlive the calls.
        unsafe {
            syscall!(Sysno::name_to_handle_at, AT_FDCWD, text(c"/"), handle.as_mut_ptr(), &raw mut mount_id, 0)?;
            syscall!(Sysno::open_by_handle_at, AT_FDCWD, handle.as_ptr(), libc::O_RDONLY)?;
        }
        Ok("opened the root by its handle".to_owned())
    }),
    never("trace the parent", |inside| {
        // SAFETY: PTRACE_ATTACH takes no pointers.
        let result = unsafe { syscall!(Sysno::ptrace, libc::PTRACE_ATTACH, inside.parent, 0, 0) };
        Ok(result.map(|_| "traces the parent".to_owned())?)
    }),
    never("read the memory of the parent", |inside| {
        let mut byte = 0u8;
        let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: the vectors outlive the call.
        let result =
            unsafe { syscall!(Sysno::process_vm_readv, inside.parent, &raw const local, 1, &raw const local, 1, 0) };
        Ok(result.map(|_| "read a byte".to_owned())?)
    }),
    never("signal the parent", |inside| {
        // SAFETY: the call takes no pointers.
        let result = unsafe { syscall!(Sysno::kill, inside.parent, 0) };
        Ok(result.map(|_| "may signal the parent".to_owned())?)
    }),
    never("signal all processes", call!(kill, -1i32, 0)),
    never("open a pidfd of the parent", |inside| {
        // SAFETY: the call takes no pointers.
        let result = unsafe { syscall!(Sysno::pidfd_open, inside.parent, 0) };
        Ok(result.map(|_| "has a pidfd of the parent".to_owned())?)
    }),
    filtered("IPv4 socket", call!(socket, libc::AF_INET, libc::SOCK_STREAM, 0), EMPTY_NETWORK),
    never("packet socket", call!(socket, libc::AF_PACKET, libc::SOCK_RAW, 0)),
    filtered(
        "vsock socket",
        call!(socket, libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        "the host has no vsock transport for its own processes",
    ),
    filtered("netlink socket", call!(socket, libc::AF_NETLINK, libc::SOCK_RAW, 0), EMPTY_NETWORK),
    never("crypto socket", call!(socket, 38, libc::SOCK_SEQPACKET, 0)),
    never("connect to an abstract socket of the host", connect_abstract),
    never("load a BPF program that can read the kernel's memory", |_| {
        // The instructions: set register 0 to 0, and exit.
        let instructions = [0xb7u64, 0x95];
        // BPF_PROG_TYPE_KPROBE and the number of instructions, the instructions, the licence, and no log.
        let attributes = [2 | 2 << 32, instructions.as_ptr().addr() as u64, text(c"GPL") as u64, 0, 0, 0];
        // SAFETY: the attributes, and what they point to, outlive the call.
        let result = unsafe { syscall!(Sysno::bpf, BPF_PROG_LOAD, attributes.as_ptr(), 48) };
        Ok(result.map(|_| "loaded the program".to_owned())?)
    }),
    never("count the events of all processes", |_| {
        let mut attributes = [0u64; 15];
        // PERF_TYPE_SOFTWARE, and the length of the attributes. The event is PERF_COUNT_SW_CPU_CLOCK, which is 0.
        attributes[0] = 1 | 120 << 32;
        // SAFETY: the attributes outlive the call.
        let result = unsafe { syscall!(Sysno::perf_event_open, attributes.as_ptr(), -1i32, 0, -1i32, 0) };
        Ok(result.map(|_| "counts events".to_owned())?)
    }),
    filtered("add a key", call!(add_key, text(c"user"), text(c"husk"), text(c"x"), 1, -2i32), OWN_KEYS),
    filtered("read the id of the process's own keyring", call!(keyctl, 0, -2i32, 1), OWN_KEYS),
    filtered(
        "io_uring",
        |_| {
            let mut parameters = [0u64; 15];
            // SAFETY: the parameters outlive the call.
            let result = unsafe { syscall!(Sysno::io_uring_setup, 1, parameters.as_mut_ptr()) };
            Ok(result.map(|_| "has an io_uring".to_owned())?)
        },
        "RLIMIT_MEMLOCK is 0, but some kernels do not charge the memory of rings to this limit",
    ),
    never("userfaultfd", call!(userfaultfd, 0)),
    filtered(
        "new user namespace",
        call!(unshare, libc::CLONE_NEWUSER),
        "the capabilities apply only in the new namespace, which owns no resources of the host",
    ),
    never("new mount namespace", call!(unshare, libc::CLONE_NEWNS)),
    filtered("new process", call!(clone, libc::SIGCHLD, 0, 0, 0, 0), "the new process is in the same jail"),
    never("new process by clone3", |_| {
        let mut arguments = [0u64; 11];
        arguments[4] = libc::SIGCHLD as u64;
        // SAFETY: the arguments outlive the call.
        let result = unsafe { syscall!(Sysno::clone3, arguments.as_mut_ptr(), 88) };
        Ok(result.map(|_| "started a process".to_owned())?)
    }),
    never("execute a file of the share", call!(execve, text(c"/inside"), 0, 0)),
    filtered(
        "execute a memfd",
        |_| {
            // SAFETY: the texts are static.
            unsafe {
                let fd = syscall!(Sysno::memfd_create, text(c"x"), 0)?;
                syscall!(Sysno::write, fd, text(c"#!/bin/sh\n"), 10)?;
                syscall!(Sysno::execveat, fd, text(c""), 0, 0, libc::AT_EMPTY_PATH)?;
            }
            Ok("executed a memfd".to_owned())
        },
        "the jail has no interpreter; a static program would start, but in the same jail",
    ),
    filtered(
        "map executable memory",
        call!(mmap, 0, 4096, libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1i32, 0),
        "the memory belongs to the same process",
    ),
    never("raise capabilities", |_| {
        let header = [0x2008_0522u32, 0];
        let data = [u32::MAX; 6];
        // SAFETY: the buffers outlive the call.
        let result = unsafe { syscall!(Sysno::capset, header.as_ptr(), data.as_ptr()) };
        Ok(result.map(|_| "has all capabilities".to_owned())?)
    }),
    never("load a kernel module", call!(finit_module, 0, text(c""), 0)),
    never("read the kernel's log", |_| {
        let mut buffer = [0u8; 16];
        // SAFETY: the buffer outlives the call.
        let result = unsafe { syscall!(Sysno::syslog, 3, buffer.as_mut_ptr(), buffer.len()) };
        Ok(result.map(|_| "read the log".to_owned())?)
    }),
    never("reboot", call!(reboot, 0xfee1_deadu32, 672_274_793, 0, 0)),
    never("set the clock", |_| {
        let mut now = [0u64; 2];
        // SAFETY: the time outlives the calls. Setting the current time does not change the clock.
        let result = unsafe {
            let _ = syscall!(Sysno::clock_gettime, libc::CLOCK_REALTIME, now.as_mut_ptr());
            syscall!(Sysno::clock_settime, libc::CLOCK_REALTIME, now.as_ptr())
        };
        Ok(result.map(|_| "set the clock".to_owned())?)
    }),
    never("use I/O ports", call!(ioperm, 0x80, 1, 1)),
    never("use a disk quota", call!(quotactl, 0, 0, 0, 0)),
    never("change the real-time priority", |_| {
        let priority = 1i32;
        // SAFETY: the parameter outlives the call.
        let result = unsafe { syscall!(Sysno::sched_setscheduler, 0, libc::SCHED_FIFO, &raw const priority) };
        Ok(result.map(|_| "has a real-time priority".to_owned())?)
    }),
    never("raise the limit of open files", |_| {
        let limit = [u64::from(u32::MAX), u64::from(u32::MAX)];
        // SAFETY: the limit outlives the call.
        let result = unsafe { syscall!(Sysno::prlimit64, 0, libc::RLIMIT_NOFILE, limit.as_ptr(), 0) };
        Ok(result.map(|_| "raised the limit".to_owned())?)
    }),
    never("open a file again and again", exhaustion::files),
    never("create epoll instances again and again", exhaustion::epoll_instances),
    never("start threads again and again", exhaustion::threads),
    never("start processes again and again", exhaustion::processes),
    never("enable core dumps", |_| {
        let limit = [u64::MAX, u64::MAX];
        // SAFETY: the limit outlives the call.
        let result = unsafe { syscall!(Sysno::prlimit64, 0, libc::RLIMIT_CORE, limit.as_ptr(), 0) };
        Ok(result.map(|_| "raised the limit".to_owned())?)
    }),
];

/// Looks for fds other than standard input, output and error, the control socket, and the fds that the jail opens.
fn inherited_fds(inside: &Inside) -> Result<String, Stopped> {
    let known = [0, 1, 2, 3, inside.belongings.fd_directory.as_raw_fd(), inside.belongings.dev_null.as_raw_fd()];
    for fd in (0..1024).filter(|fd| !known.contains(fd)) {
        // Unlike read, this call also succeeds for an O_PATH fd.
        // SAFETY: the call takes no pointers.
        match unsafe { syscall!(Sysno::fcntl, fd, libc::F_GETFD) } {
            Err(Errno::EBADF) => {}
            result => return Ok(format!("fd {fd} is open: {result:?}")),
        }
    }
    Err(Stopped::Nothing("no other fd is open".to_owned()))
}

/// Looks for environment variables other than the variable that the VMM reads. The test itself has more variables,
/// because cargo sets some.
fn inherited_variables(_: &Inside) -> Result<String, Stopped> {
    match std::env::vars_os().find(|(name, _)| name != "HUSK_VMM_LOG") {
        // A value can be secret.
        Some((name, _)) => Ok(format!("has {name:?}")),
        None => Err(Stopped::Nothing("no other variable is set".to_owned())),
    }
}

/// Connects to a socket that the test has bound in the host's network namespace.
fn connect_abstract(_: &Inside) -> Result<String, Stopped> {
    let mut address = [0u8; 14];
    address[0] = libc::AF_UNIX as u8;
    address[3..].copy_from_slice(b"husk-escape");
    // SAFETY: the address outlives the calls.
    unsafe {
        let fd = syscall!(Sysno::socket, libc::AF_UNIX, libc::SOCK_STREAM, 0)?;
        syscall!(Sysno::connect, fd, address.as_ptr(), address.len())?;
    }
    Ok("connected".to_owned())
}
