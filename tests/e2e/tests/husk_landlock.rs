//! Tests of the VMM's landlock rules: their effects on containers, and the reports about restrictions that the node's
//! kernel lacks.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use husk_base::sys::landlock;
use husk_e2e::{case, node};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use serde_json::Value;

/// First landlock ABI that the VMM can use.
const USABLE: u32 = 2;
/// First landlock ABI that supports every restriction that Husk applies to the VMM.
const COMPLETE: u32 = 6;

/// Returns the ABI version of the node's landlock, or 0.
fn abi() -> u32 {
    landlock::abi().unwrap_or(0)
}

/// Returns status and detail of the finding that `husk check` has about landlock.
fn finding() -> (String, String) {
    let output = Command::new("husk").args(["check", "--output", "json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let finding = report["findings"].as_array().unwrap().iter().find(|finding| finding["name"] == "landlock").unwrap();
    let field = |name: &str| finding[name].as_str().unwrap().to_owned();
    (field("status"), field("detail"))
}

/// Mounts a tmpfs.
fn mount_tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
}

/// Mount points. Dropping this value unmounts the file systems at these mount points.
struct Mounts<'a>(&'a [&'a Path]);

impl Drop for Mounts<'_> {
    fn drop(&mut self) {
        for at in self.0 {
            let _ = umount2(*at, MntFlags::MNT_DETACH);
        }
    }
}

/// A script that makes the VMM's virtio-fs server perform its usual operations in the directory `$1`.
const USE_FILES: &str = r#"set -e
cd "$1" && mkdir one two
echo content > one/file && : > one/file && echo again >> one/file
mv one/file two/moved && ln two/moved one/linked && ln -s two one/symlink && mkfifo one/fifo && mknod one/node c 1 3
[ "$(cat one/linked)" = again ] && mv two one/two && truncate -s 3 one/linked && chmod 600 one/linked
[ "$(ls one | tr '\n' ' ')" = "fifo linked node symlink two " ]
rm -r one && echo used"#;

#[test]
fn landlock_allows_files_of_later_submount_but_not_of_unmounted_submount() {
    case("landlock", |case| {
        let dir = case.dir().join("volume");
        let (gone, later) = (dir.join("gone"), dir.join("later"));
        fs::create_dir_all(&later).unwrap();
        mount_tmpfs(&gone);
        let mounts = [gone.as_path(), later.as_path()];
        let _mounts = Mounts(&mounts);
        fs::write(gone.join("file"), "content\n").unwrap();
        let flags = format!("type=bind,src={},dst=/v,options=rbind:rslave:rw", dir.display());
        // The container's working directory is in the file system that the test unmounts later.
        let script = "cd /v/gone && cat file && echo up; until [ -e /v/go ]; do sleep 0.1; done; cat file; echo end $?";
        let container = case.container(case.sh(script).flags(&["--mount", &flags]));
        for (number, directory) in ["/", "/v", "/v/gone"].iter().enumerate() {
            let exec = container.exec(&format!("before-{number}"), &["sh", "-c", USE_FILES, "sh", directory]);
            exec.expect_out("used");
        }
        mount_tmpfs(&later);
        container.exec("later", &["sh", "-c", USE_FILES, "sh", "/v/later"]).expect_out("used");
        umount(&gone).unwrap();
        let mut next = 0;
        let seen = node::eventually(Duration::from_secs(10), || {
            next += 1;
            container.exec(&format!("gone-{next}"), &["ls", "/v/gone"]).out().is_empty().then_some(())
        });
        assert!(seen.is_some(), "the container still sees the unmounted file system");
        fs::write(dir.join("go"), "").unwrap();
        let output = container.running.wait().expect_code(0);
        // The file is no longer beneath the share. Therefore, landlock does not let the VMM open the file. Without
        // landlock, the VMM can still open the file.
        let expected = if abi() >= USABLE { "content\nup\nend 1\n" } else { "content\nup\ncontent\nend 0\n" };
        assert_eq!(output.out(), expected, "{}", output.describe());
        assert_eq!(output.err().contains("Permission denied"), abi() >= USABLE, "{}", output.describe());
    });
}

#[test]
fn missing_restrictions_are_reported_once_for_each_pod() {
    let (status, detail) = finding();
    assert_eq!(status, if abi() >= COMPLETE { "ok" } else { "warn" }, "{detail}");
    assert!(abi() == 0 || detail.contains(&format!("landlock ABI {}", abi())), "{detail}");
    let warnings = || node::log_tail(usize::MAX).matches("the VMM runs without some Landlock restrictions").count();
    let before = warnings();
    case("landlock-gap", |case| {
        case.sh("echo started").output().expect_out("started");
        case.sh("echo started").output().expect_out("started");
    });
    assert_eq!(warnings() - before, if abi() >= COMPLETE { 0 } else { 2 });
}

#[test]
fn pod_starts_only_with_landlock_if_configuration_requires_landlock() {
    let _config = node::Config::set("require_landlock = true\n");
    let status = finding().0;
    assert_eq!(status == "fail", abi() < USABLE, "{status}");
    case("landlock-required", |case| {
        let output = case.sh("echo started").output();
        if abi() >= USABLE {
            output.expect_out("started");
        } else {
            output.expect_error(&["require_landlock is true", "landlock"]);
        }
    });
}
