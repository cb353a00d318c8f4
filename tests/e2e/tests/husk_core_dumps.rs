//! Core dumps: a VMM that crashes leaves none, because a core dump would hold guest memory.

use std::fs;
use std::time::Duration;

use husk_e2e::{case, node};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A sysctl with a temporary value. Dropping this value restores the previous value.
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

/// The instruction `ud2`, which is always invalid, as the kernel reads it from memory.
const UD2: libc::c_long = 0x0b0f;

/// Makes the main thread of a process execute an invalid instruction. A signal from this process would not end the VMM,
/// because the VMM is PID 1 of its PID namespace.
fn crash(pid: i32) {
    let pid = Pid::from_raw(pid);
    ptrace::attach(pid).unwrap();
    waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
    let mut registers = ptrace::getregs(pid).unwrap();
    // Without a system call number, the kernel does not restart an interrupted system call.
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
        // A core file would be written with the rights of the VMM, which can create no file outside its share. A program
        // that gets the core dump has all rights.
        let pattern = format!("|/usr/bin/dd of={}", case.dir().join("core.%P").display());
        // With 2, the kernel also dumps processes that have switched their user, as the VMM does for the guest's users.
        let _dumpable = Sysctl::set("/proc/sys/fs/suid_dumpable", "2");
        let _pattern = Sysctl::set("/proc/sys/kernel/core_pattern", &pattern);
        let core_of = |unlimited: bool| {
            let container = case.sleeper();
            container.exec_with("user", &["--user", "1000"], &["touch", "/tmp/file"]).expect_code(0);
            let vmm = container.pid();
            if unlimited {
                let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
                // SAFETY: `limit` outlives the call.
                let set = unsafe { libc::prlimit(vmm, libc::RLIMIT_CORE, &raw const limit, std::ptr::null_mut()) };
                assert_eq!(set, 0);
            }
            crash(vmm);
            container.running.wait().expect_code(137);
            case.dir().join(format!("core.{vmm}"))
        };
        let core = core_of(false);
        // The second crash shows that nothing but the limit prevents the dump.
        let unlimited = core_of(true);
        let found = node::eventually(Duration::from_secs(20), || unlimited.exists().then_some(()));
        assert!(found.is_some() && !core.exists());
    });
}
