//! The PIDs that the pod's containers have on the host. Each PID is the id of an idle thread of the VMM.
//!
//! A container's processes are in the guest. However, a client that asks the runtime for a task's pid may read the
//! container's namespaces and cgroup from `/proc/PID/ns` and `/proc/PID/cgroup`. A thread of the VMM has the pod's
//! namespaces and cgroup, and a pid that no other task has.

use std::collections::HashMap;
use std::sync::mpsc::{Sender, channel};
use std::{io, thread};

use crate::jail::{Kind, confine};

/// Maximum number of pids. A pod has far fewer containers.
const MAX_PIDS: usize = 1024;
/// Stack size in bytes. A small stack is sufficient, because the thread only waits.
const STACK: usize = 32 << 10;

/// The idle threads by pid. Each thread ends when its sender is dropped.
#[derive(Default)]
pub struct Pids(HashMap<u32, Sender<()>>);

impl Pids {
    /// Acquires a unique PID.
    ///
    /// # Errors
    /// The call fails if `MAX_PIDS` pids are in use already, or if the thread cannot be started or confined.
    pub fn acquire(&mut self) -> io::Result<u32> {
        if self.0.len() >= MAX_PIDS {
            return Err(io::Error::other("failed to acquire a pid: the sandbox has too many containers"));
        }
        let (sender, pid) = channel();
        let (hold, held) = channel::<()>();
        thread::Builder::new().name("husk-task".into()).stack_size(STACK).spawn(move || {
            let confined = confine(Kind::Pid).map_err(io::Error::other);
            let _ = sender.send(confined.map(|()| nix::unistd::gettid().as_raw()));
            // This call blocks until the sender is dropped, and then returns an error.
            let _ = held.recv();
        })?;
        let pid = pid.recv().map_err(io::Error::other)??.cast_unsigned();
        self.0.insert(pid, hold);
        Ok(pid)
    }

    /// Releases a PID. Does nothing if the PID was not acquired.
    pub fn release(&mut self, pid: u32) {
        self.0.remove(&pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no capset")]
    fn pid_is_a_thread_of_this_process_until_released() {
        let mut pids = Pids::default();
        let (a, b) = (pids.acquire().unwrap(), pids.acquire().unwrap());
        assert_ne!(a, b);
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_eq!(namespace(&a.to_string()), namespace("self"));
        pids.release(a);
        pids.release(a);
        while std::fs::exists(format!("/proc/{a}")).unwrap() {
            thread::yield_now();
        }
        assert!(std::fs::exists(format!("/proc/{b}")).unwrap());
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no capset")]
    fn number_of_pids_is_bounded() {
        let mut pids = Pids::default();
        let acquired: Vec<u32> = (0..MAX_PIDS).map(|_| pids.acquire().unwrap()).collect();
        assert!(pids.acquire().is_err());
        pids.release(acquired[0]);
        pids.acquire().unwrap();
    }
}
