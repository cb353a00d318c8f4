//! Files that a guest creates in the share. Device nodes, programs and symbolic links have no effect on the node. A
//! file system of the node can have blocks that are reserved for root. In a guest, only root can use these blocks. The
//! guest caches what only the guest changes, and for a short time what the node changes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use husk_e2e::case::Container;
use husk_e2e::disk::{Disk, run_on_node};
use husk_e2e::{Case, NAMESPACE, case, node, vm};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{major, minor, stat};
use nix::sys::statvfs::statvfs;

/// A mounted tmpfs. `drop` unmounts the tmpfs.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(at.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A Python program that creates device nodes, a symbolic link and a set-user-ID program in each directory of
/// `DIRECTORIES`. Then the Python program writes to the null device, reads through the symbolic link, and runs the
/// set-user-ID program as an ordinary user. In a container, all of these actions must succeed.
const MAKE: &str = r#"
import os, shutil, stat, subprocess, sys
for directory in DIRECTORIES:
    at = lambda name: os.path.join(directory, "made-" + name)
    os.mknod(at("null"), 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    os.mknod(at("disk"), 0o666 | stat.S_IFBLK, os.makedev(*DISK))
    os.chmod(at("null"), 0o666)
    os.symlink("/etc/passwd", at("link"))
    shutil.copy(os.path.realpath(sys.executable), at("program"))
    os.chmod(at("program"), 0o4755)
    with open(at("null"), "w") as null:
        null.write("x")
    assert open(at("link")).read().startswith("root:")
    shown = subprocess.run([at("program"), "-c", "import os; print(os.geteuid())"], user=1000, capture_output=True)
    assert shown.stdout == b"0\n", shown
    print(directory)
"#;

/// Reads the mounts of process `pid` whose mount points `is_listed` selects. Returns the number of these mounts, and
/// the lines of mountinfo that lack one of the share's mount flags.
fn lines_without_flags(pid: i32, is_listed: impl Fn(&str) -> bool) -> (usize, Vec<String>) {
    let list = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let lines: Vec<&str> = list.lines().filter(|line| is_listed(line.split(' ').nth(4).unwrap())).collect();
    let lacks = |line: &&&str| {
        let flags: Vec<&str> = line.split(' ').nth(5).unwrap().split(',').collect();
        !["nosuid", "nodev", "noexec", "nosymfollow"].iter().all(|flag| flags.contains(flag))
    };
    (lines.len(), lines.iter().filter(lacks).map(ToString::to_string).collect())
}

#[test]
fn devices_programs_and_symlinks_of_a_guest_have_no_effect_on_the_node() {
    case("share-flags", |case| {
        let volume = case.dir().join("volume");
        let _before = Tmpfs::new(&volume.join("before"));
        fs::create_dir(volume.join("later")).unwrap();
        let flag = format!("type=bind,src={},dst=/v,options=rbind:rslave:rw", volume.display());
        let program = "import time; print('up', flush=True); time.sleep(1000)";
        let container = case.container(case.python(program).flags(&["--allow-new-privs", "--mount", &flag]));
        let _later = Tmpfs::new(&volume.join("later"));
        // `disk` is the number of the block device that contains the node's root directory.
        let disk = stat("/").unwrap().st_dev;
        let directories = ["/", "/v", "/v/before", "/v/later"];
        let make = format!("DIRECTORIES = {directories:?}\nDISK = ({}, {})\n{MAKE}", major(disk), minor(disk));
        let made = container.exec("make", &["python3", "-c", &make]).expect_code(0);
        assert_eq!(made.out().lines().collect::<Vec<_>>(), directories, "{}", made.describe());

        let ([shim], [vmm]) = (&vm::shim_pids_of(&container.id)[..], &vm::vmm_pids_of(&container.id)[..]) else {
            panic!("expected one shim and one VMM of {}", container.id)
        };
        let sandbox = format!("/run/husk/{NAMESPACE}/{}", container.id);
        let in_share =
            |point: &str| ["share", "guest"].iter().any(|name| point.starts_with(&format!("{sandbox}/{name}")));
        let (mounts, lacking) = lines_without_flags(*shim, in_share);
        // There are at least 10 mounts: the directories `share` and `guest`, and in each directory the rootfs and three
        // mounts of the volume.
        assert!(
            mounts >= 10 && lacking.is_empty(),
            "expected 10 or more mounts, got {mounts}; these lack a flag: {lacking:#?}"
        );
        let (mounts, lacking) = lines_without_flags(*vmm, |_| true);
        assert!(
            mounts >= 5 && lacking.is_empty(),
            "expected 5 or more mounts, got {mounts}; these lack a flag: {lacking:#?}"
        );

        for share in [format!("/proc/{shim}/root{sandbox}/share"), format!("/proc/{vmm}/root")] {
            let share = Path::new(&share);
            let volumes: Vec<PathBuf> =
                fs::read_dir(share.join(".volumes")).unwrap().map(|entry| entry.unwrap().path()).collect();
            let [volume] = &volumes[..] else { panic!("expected one volume: {volumes:?}") };
            let rootfs = share.join(&container.id).join("rootfs");
            for directory in [rootfs, volume.clone(), volume.join("before"), volume.join("later")] {
                let at = |name: &str| directory.join(format!("made-{name}"));
                let error = |result: io::Result<()>| result.unwrap_err().raw_os_error();
                for name in ["null", "disk"] {
                    let opened = File::open(at(name)).map(drop);
                    assert_eq!(error(opened), Some(libc::EACCES), "wrong result of opening {}", at(name).display());
                }
                assert_eq!(
                    error(File::open(at("link")).map(drop)),
                    Some(libc::ELOOP),
                    "wrong result of opening {}",
                    at("link").display()
                );
                let run = Command::new(at("program")).arg("--version").status().map(drop);
                assert_eq!(error(run), Some(libc::EACCES), "wrong result of running {}", at("program").display());
            }
        }
        container.kill();
    });
}

#[test]
fn node_can_unmount_what_it_has_mounted_below_a_slave_volume() {
    case("share-unmount", |case| {
        let volume = case.dir().join("volume");
        let early = Tmpfs::new(&volume.join("early"));
        fs::create_dir(volume.join("later")).unwrap();
        let flag = format!("type=bind,src={},dst=/v,options=rbind:rslave:rw", volume.display());
        let program = "import time; print('up', flush=True); time.sleep(1000)";
        let container = case.container(case.python(program).flags(&["--mount", &flag]));
        let later = Tmpfs::new(&volume.join("later"));
        for tmpfs in [&early, &later] {
            fs::write(tmpfs.0.join("file"), "").unwrap();
        }
        let list = |id: &str| container.exec(id, &["sh", "-c", "ls /v/early /v/later"]).out();
        assert_eq!(list("before"), "/v/early:\nfile\n\n/v/later:\nfile\n");
        for tmpfs in [&early, &later] {
            umount2(&tmpfs.0, MntFlags::empty()).unwrap();
        }
        // The guest caches directory entries for a second.
        let mut attempts = 0;
        let gone = node::eventually(Duration::from_secs(20), || {
            attempts += 1;
            (list(&format!("after{attempts}")) == "/v/early:\n\n/v/later:\n").then_some(())
        });
        assert!(gone.is_some(), "the container still has the mounts: {}", list("last"));
        container.kill();
    });
}

#[test]
fn only_root_of_a_container_fills_blocks_that_are_reserved_for_root() {
    case("share-reserved", |case| {
        let disk = Disk::new(&case.dir().join("disk"), 32);
        disk.format();
        let point = case.dir().join("point");
        let _mounted = disk.mount(&point, "rw");
        fs::set_permissions(&point, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let free_and_reserved = || {
            let stat = statvfs(&point).unwrap();
            (stat.blocks_free(), stat.blocks_free() - stat.blocks_available())
        };
        let (_, reserved) = free_and_reserved();
        assert!(reserved > 100, "{reserved} blocks are reserved for root, expected more than 100");
        let flag = format!("type=bind,src={},dst=/v,options=rbind:rw", point.display());
        let container = case.container(case.sh("echo up; exec sleep 1000").flags(&["--mount", &flag]));
        for user in ["0", "1000"] {
            // The error output of the command says that the disk is full.
            let fill = ["sh", "-c", "cat /dev/zero > /v/large; sync; wc -c < /v/large"];
            let filled = container.exec_with(&format!("fill-{user}"), &["--user", user], &fill);
            assert!(filled.err().contains("No space left on device"), "{}", filled.describe());
            run_on_node(&["sync"]);
            let (free, _) = free_and_reserved();
            assert_eq!(
                free < reserved,
                user == "0",
                "user {user} has left {free} blocks free, {reserved} blocks are reserved for root\n{}",
                filled.describe()
            );
            container.exec(&format!("remove-{user}"), &["rm", "/v/large"]).expect_code(0);
        }
        container.kill();
    });
}

/// Returns the size of a file as the container sees it, or `None` if the container does not see the file.
fn size_seen(container: &Container, path: &str) -> Option<u64> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let id = format!("size-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    container.exec(&id, &["stat", "-c", "%s", path]).out().trim().parse().ok()
}

/// Starts a container with the node's directory `volume` at `/v`.
fn with_volume(case: &Case, volume: &Path) -> Container {
    let flag = format!("type=bind,src={},dst=/v,options=rbind:rw", volume.display());
    case.container(case.sh("echo up; exec sleep 1000").flags(&["--mount", &flag]))
}

/// Returns the directory of the node with the container's root file system, in the mount namespace of the shim.
fn rootfs_on_node(container: &Container) -> PathBuf {
    let [shim] = vm::shim_pids_of(&container.id)[..] else { panic!("expected one shim of {}", container.id) };
    let share = format!("/proc/{shim}/root/run/husk/{NAMESPACE}/{}/share", container.id);
    Path::new(&share).join(&container.id).join("rootfs")
}

#[test]
fn changes_by_the_node_are_visible_in_volumes() {
    case("share-cache", |case| {
        let volume = case.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "1").unwrap();
        let container = with_volume(case, &volume);
        assert_eq!(
            [size_seen(&container, "/v/file"), size_seen(&container, "/v/later")],
            [Some(1), None],
            "the container must see the volume"
        );
        fs::write(volume.join("file"), "four").unwrap();
        fs::write(volume.join("later"), "").unwrap();
        // The default of volume_cache_ms is a second. An exec in an emulated node takes about as long.
        let seen = node::eventually(Duration::from_secs(10), || {
            let sizes = [size_seen(&container, "/v/file"), size_seen(&container, "/v/later")];
            (sizes == [Some(4), Some(0)]).then_some(())
        });
        assert!(seen.is_some(), "the container does not see what the node has written");

        // Only the guest changes a root file system. Therefore, the guest does not ask the node again.
        let rootfs = rootfs_on_node(&container);
        container.exec("make", &["sh", "-c", "echo > /etc/own; ls /etc/none"]);
        fs::write(rootfs.join("etc/own"), "four").unwrap();
        fs::write(rootfs.join("etc/none"), "").unwrap();
        std::thread::sleep(Duration::from_secs(3));
        assert_eq!(
            [size_seen(&container, "/etc/own"), size_seen(&container, "/etc/none")],
            [Some(1), None],
            "the guest has asked the node for a file of its root file system again"
        );
        container.kill();
    });
}

#[test]
fn volume_cache_ms_delays_changes_by_the_node() {
    let _config = node::Config::set("volume_cache_ms = 20000\n");
    case("share-cache-long", |case| {
        let volume = case.dir().join("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "1").unwrap();
        let container = with_volume(case, &volume);
        let begin = Instant::now();
        assert_eq!(size_seen(&container, "/v/file"), Some(1));
        fs::write(volume.join("file"), "four").unwrap();
        let size = size_seen(&container, "/v/file");
        assert!(
            size == Some(1) || begin.elapsed() > Duration::from_secs(19),
            "the guest has not cached the attributes"
        );
        let seen =
            node::eventually(Duration::from_secs(40), || (size_seen(&container, "/v/file") == Some(4)).then_some(()));
        assert!(seen.is_some(), "the container does not see what the node has written");
        container.kill();
    });
}
