//! An upgrade of the node while pods run: the pods of the previous version continue to run, and the new version cleans
//! up after them.
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use husk_e2e::cri::pods;
use husk_e2e::node::{self, Config};
use husk_e2e::vm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const SHIM: &str = "/usr/local/bin/containerd-shim-husk-v2";
const INITRD: &str = "/usr/local/share/husk/initrd.cpio";
const KERNEL: &str = "/usr/local/share/husk/vmlinux";

/// A replaced file. Dropping the value restores the file.
struct Replaced {
    path: &'static str,
    saved: PathBuf,
}

impl Replaced {
    /// Replaces a file by a new file, as `cp --remove-destination` does.
    fn by(path: &'static str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> Self {
        let saved = PathBuf::from(format!("{path}.saved"));
        fs::rename(path, &saved).unwrap();
        let this = Self { path, saved };
        fs::write(path, change(fs::read(&this.saved).unwrap())).unwrap();
        fs::set_permissions(path, fs::metadata(&this.saved).unwrap().permissions()).unwrap();
        this
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        let _ = fs::rename(&self.saved, self.path);
    }
}

#[test]
fn pods_survive_an_upgrade_of_binary_image_and_configuration() {
    pods("cri-upgrade", |pods| {
        let (pod, orphan) = (pods.pod(), pods.pod());
        let container = pod.sleeper();
        let other = orphan.sleeper();
        // A program can have further bytes after its last section.
        let replaced = [
            Replaced::by(SHIM, |binary| [binary, b"next version".to_vec()].concat()),
            Replaced::by(INITRD, |_| b"another image".to_vec()),
            Replaced::by(KERNEL, |_| b"another kernel".to_vec()),
        ];
        let config = Config::set("a_key_of_another_version = 1\n");
        let error = pods.expect_error(&pods.config());
        assert!(error.contains("a_key_of_another_version"), "{error}");
        // The VMM is still the program with which the pod was started.
        let exe = |pid: i32| fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let shim = vm::shim_pids_of(&pod.id)[0];
        assert_eq!(exe(shim), Path::new(&format!("{SHIM}.saved")));
        assert_eq!(exe(vm::vmm_pids_of(&pod.id)[0]), Path::new(&format!("{SHIM}.saved")));
        assert_eq!(container.sh("echo here"), "here");
        let second = pod.sleeper();
        assert_eq!(second.sh("echo here"), "here");
        second.stop(5);
        second.remove();
        // containerd runs the new binary with `delete`.
        kill(Pid::from_raw(vm::shim_pids_of(&orphan.id)[0]), Signal::SIGKILL).unwrap();
        // containerd notices the end of the shim.
        assert_eq!(other.wait().0, 255);
        orphan.stop();
        orphan.remove();
        let id = orphan.id.as_str();
        let gone = node::eventually(Duration::from_secs(20), || {
            (!Path::new("/run/husk/k8s.io").join(id).exists()).then_some(())
        });
        assert!(gone.is_some(), "the new version did not clean up after the previous one\n{}", node::log_tail(20));
        pod.stop();
        pod.remove();
        drop((config, replaced));
        let next = pods.pod();
        assert_eq!(next.sleeper().sh("echo here"), "here");
    });
}
