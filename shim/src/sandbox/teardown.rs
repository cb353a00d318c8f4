//! The teardown of a sandbox: ends the VM, and removes what the sandbox has on the host.

use std::sync::atomic::Ordering;

use crate::sandbox::{ENDED_BY_REQUEST, Sandbox, disks};
use crate::vm::State;

impl Sandbox {
    /// Ends the VM. Removes the sandbox's mounts, cgroup and directory from the host.
    ///
    /// If the VMM process does not exit, the cgroup and its records stay. The caller must then call
    /// [`Sandbox::wait_for_stuck_vmm`].
    pub async fn tear_down(&self) {
        self.flush_disks_within(self.timeout(disks::DISK_FLUSH_TIMEOUT)).await;
        self.kill();
        if let Some(vmm) = self.vmm() {
            vmm.wait_exit_or_give_up().await;
        }
        if self.is_launched() {
            // The task of `launch` knows the reason.
            self.wait_end().await;
        }
        self.state.enter(State::Gone(ENDED_BY_REQUEST.into()));
        self.timeline.mark("vmm gone");
        self.propagation.stop();
        // Asked only once, because the process can exit at any time. The kernel removes a cgroup only when its last
        // process has exited.
        if self.has_vmm_process() {
            self.left_for_later.store(true, Ordering::Relaxed);
            if let Some(cgroup) = self.cgroup() {
                cgroup.leave();
            }
            self.dir.remove_except_cleanup();
        } else {
            self.remove_last().await;
        }
        self.timeline.mark("torn down");
        if let Some(launched) = self.launched.get() {
            self.timeline.finish(&launched.timeline_log).await;
        }
    }

    /// If the teardown has left the cgroup and the records because the VMM process did not exit, waits until the
    /// process exits, and then removes them. Called when the shim has no other work.
    ///
    /// The wait has no limit, because nothing else of the pod is left, and nobody waits for the shim. The caller may
    /// drop the wait. The records then stay.
    pub async fn wait_for_stuck_vmm(&self) {
        if !self.left_for_later.load(Ordering::Relaxed) {
            return;
        }
        if let Some(vmm) = self.vmm() {
            if self.has_vmm_process() {
                tracing::warn!("the shim stays until the VMM process exits, which waits in the node's kernel");
            }
            vmm.wait().await;
        }
        self.remove_last().await;
    }

    /// Removes the cgroup and the directory, which a cleanup needs while the VMM process runs.
    async fn remove_last(&self) {
        if let Some(cgroup) = self.cgroup() {
            cgroup.leave_and_remove().await;
        }
        self.dir.remove();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;
    use std::sync::Arc;

    use husk_config::Config;
    use husk_vmm::control::wire;
    use tokio::sync::mpsc;

    use super::*;
    use crate::oci::Spec;
    use crate::resources;
    use crate::resources::cgroup::CgroupLocation;
    use crate::sandbox::state_dir::StateDir;
    use crate::vm::vmm::{ScriptedVmm, Vmm};

    #[tokio::test(start_paused = true)]
    async fn vmm_that_exits_soon_after_the_teardown_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (control, _vmm_end) = wire::pair().unwrap();
        husk_base::sys::fd::set_nonblocking(&control).unwrap();
        let (notify, notices) = mpsc::channel(1);
        let ScriptedVmm { vmm, died, .. } = Vmm::scripted(control, notify).unwrap();
        let (reports, _reported) = mpsc::channel(1);
        let cgroup = CgroupLocation::V2(dir.path().to_owned());
        let growth = resources::boot_size(&Spec::default(), &Config::default(), u64::MAX).unwrap().growth;
        let booted = std::future::pending();
        let mut sandbox = Sandbox::scripted("teardown", booted, vmm, notices, reports, (cgroup, growth));
        let state = dir.path().join("ns").join("teardown");
        std::fs::create_dir_all(&state).unwrap();
        Arc::get_mut(&mut sandbox).unwrap().dir = StateDir::at(&state);
        sandbox.dir.write("vmm.pid", "2 3\n").unwrap();
        sandbox.tear_down().await;
        assert!(sandbox.dir.read("vmm.pid").is_some(), "a cleanup needs the record while the process runs");
        died.send_replace(Some(ExitStatus::from_raw(libc::SIGKILL)));
        sandbox.wait_for_stuck_vmm().await;
        assert!(!state.exists(), "the directory stays");
    }
}
