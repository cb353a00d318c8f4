//! A VMM that crashes must not leave a core dump, because a core dump would contain guest memory.

use std::fs;
use std::time::Duration;

use husk_base::sys::resource::{self, Limit};
use husk_e2e::{case, node};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A sysctl that has a temporary value. `drop` restores the previous value.
struct Sysctl(&'static str, String);

impl Sysctl {
    fn set(path: &'static str, value: &str) -> Self {
        let saved = Self(path, fs::read_to_string(path).unwrap());
        fs::write(path, value).unwrap();
        saved
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        let _ = fs::write(self.0, &self.1);
    }
}

/// The bytes 0f 0b of the instruction `ud2` as a little-endian number. `ud2` always causes an invalid-opcode exception.
const UD2: libc::c_long = 0x0b0f;

/// Makes the main thread of a process execute an invalid instruction, which crashes the process. A signal such as
/// SIGABRT from this test would not crash the VMM, because the VMM is PID 1 of its PID namespace (pid_namespaces(7)).
fn crash(pid: i32) {
    let pid = Pid::from_raw(pid);
    ptrace::attach(pid).unwrap();
    waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
    let mut registers = ptrace::getregs(pid).unwrap();
    // The value -1 means that the thread is not in a system call. With another value, the kernel could restart a
    // system call that ptrace has interrupted, and the thread would not execute the instruction.
    registers.orig_rax = u64::MAX;
    let next = registers.rip as ptrace::AddressType;
    let code = ptrace::read(pid, next).unwrap();
    ptrace::write(pid, next, (code & !0xffff) | UD2).unwrap();
    ptrace::setregs(pid, registers).unwrap();
    ptrace::detach(pid, None).unwrap();
}

#[test]
fn vmm_that_crashes_leaves_no_core_dump() {
    case("jail-core", |case| {
        // The kernel writes a core file with the rights of the VMM, and the VMM cannot create a file outside its share.
        // Therefore, the test lets the kernel pipe the core dump to `dd`. The kernel runs `dd` as root.
        let pattern = format!("|/usr/bin/dd of={}", case.dir().join("core.%P").display());
        // With the value 2, the kernel also dumps processes that have changed their user id. The VMM's threads that
        // serve the share change their user id to the user id of a guest's user.
        let _dumpable = Sysctl::set("/proc/sys/fs/suid_dumpable", "2");
        let _pattern = Sysctl::set("/proc/sys/kernel/core_pattern", &pattern);
        let core_of = |unlimited: bool| {
            let container = case.sleeper();
            container.exec_with("user", &["--user", "1000"], &["touch", "/tmp/file"]).expect_code(0);
            let vmm = container.pid();
            if unlimited {
                let limit = Limit { soft: libc::RLIM_INFINITY, hard: libc::RLIM_INFINITY };
                resource::limit(Pid::from_raw(vmm), libc::RLIMIT_CORE, Some(limit)).unwrap();
            }
            crash(vmm);
            container.running.wait().expect_code(137);
            case.dir().join(format!("core.{vmm}"))
        };
        let core = core_of(false);
        // The second VMM has no core limit. Its core dump shows that only the limit prevents the first VMM's core dump.
        let unlimited = core_of(true);
        let found = node::eventually(Duration::from_secs(20), || unlimited.exists().then_some(()));
        assert!(found.is_some() && !core.exists());
    });
}
