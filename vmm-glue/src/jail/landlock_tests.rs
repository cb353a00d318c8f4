//! Tests of the landlock rules. A test starts a thread that restricts itself, and then checks what this thread can do.
//! The expected results depend on the landlock ABI of the running kernel.

use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::{RenameFlags, renameat2};
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

use super::*;

/// Runs `test` on a thread that has a mount namespace of its own.
fn with_mounts(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).expect("this test needs root for its mounts");
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        test();
    });
    thread.join().unwrap();
}

/// Performs the virtio-fs server's operations in `directory`, and then removes all files that the operations created.
fn use_as_file_server(directory: &Path) {
    let (one, two) = (directory.join("one"), directory.join("two"));
    fs::create_dir(&one).unwrap();
    fs::create_dir(&two).unwrap();
    fs::write(one.join("file"), "content").unwrap();
    // virtiofsd has an O_PATH fd of each file, and opens the file again through this fd.
    let path = File::options().read(true).custom_flags(libc::O_PATH).open(one.join("file")).unwrap();
    let again = format!("/proc/self/fd/{}", path.as_raw_fd());
    File::options().write(true).truncate(true).open(&again).unwrap();
    File::options().read(true).write(true).open(&again).unwrap().set_len(3).unwrap();
    assert_eq!(fs::read(&again).unwrap(), [0; 3]);
    fs::rename(one.join("file"), two.join("moved")).unwrap();
    fs::hard_link(two.join("moved"), one.join("linked")).unwrap();
    fs::write(two.join("other"), "").unwrap();
    let (from, to) = (one.join("linked"), two.join("other"));
    renameat2(nix::fcntl::AT_FDCWD, &from, nix::fcntl::AT_FDCWD, &to, RenameFlags::RENAME_EXCHANGE).unwrap();
    symlink("anything", one.join("symlink")).unwrap();
    mkfifo(&one.join("fifo"), Mode::S_IRWXU).unwrap();
    drop(UnixListener::bind(one.join("socket")).unwrap());
    assert_eq!(fs::read_dir(&one).unwrap().count(), 4);
    fs::rename(&two, one.join("two")).unwrap();
    fs::remove_dir_all(&one).unwrap();
    assert_eq!(File::open(again).unwrap().metadata().unwrap().len(), 3);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no unshare")]
fn only_files_beneath_share_and_its_later_mounts_are_accessible() {
    with_mounts(|| {
        let base = tempfile::tempdir().unwrap();
        let (share, outside) = (base.path().join("share"), base.path().join("outside"));
        for directory in [&share, &outside, &share.join("before"), &share.join("later"), &share.join("gone")] {
            fs::create_dir(directory).unwrap();
        }
        fs::write(outside.join("file"), "secret").unwrap();
        fs::copy("/bin/true", share.join("program")).unwrap();
        let tmpfs =
            |at: &str| mount(Some("t"), &share.join(at), Some("tmpfs"), MsFlags::empty(), None::<&Path>).unwrap();
        tmpfs("before");
        tmpfs("gone");
        fs::write(share.join("gone/file"), "on a mount").unwrap();
        let ((restricted, when_restricted), (go_on, wait)) = (channel(), channel());
        let (inside, program) = (share.clone(), share.join("program"));
        let files = thread::spawn(move || {
            let open = |path: &Path| File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
            let (secret, gone) = (open(&outside.join("file")), open(&inside.join("gone/file")));
            let missing = restrict(Some(&inside), false).unwrap();
            assert_eq!(missing, Landlock::of_kernel().missing());
            restricted.send(()).unwrap();
            wait.recv().unwrap();
            if !Landlock::of_kernel().is_usable() {
                assert!(missing.unwrap().contains("access to files"));
                return assert!(matches!(restrict(Some(&inside), true), Err(LandlockError::Required(_))));
            }
            for directory in ["", "before", "later"] {
                use_as_file_server(&inside.join(directory));
            }
            let denied = |result: io::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
            let reopen = |fd: &File| File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).map(drop);
            denied(reopen(&secret));
            denied(fs::read(outside.join("file")).map(drop));
            denied(fs::read_dir(&outside).map(drop));
            denied(fs::write(outside.join("new"), ""));
            denied(fs::rename(outside.join("file"), inside.join("file")));
            // For this link, the thread lacks only the right to move or link files out of `outside`
            // (LANDLOCK_ACCESS_FS_REFER). If a thread lacks only this right, the kernel returns EXDEV.
            let link = fs::hard_link(outside.join("file"), inside.join("file"));
            assert_eq!(link.unwrap_err().kind(), ErrorKind::CrossesDevices);
            denied(fs::read_dir("/proc/self/fd").map(drop));
            denied(Command::new(&program).status().map(drop));
            // The test has unmounted the file's mount. Therefore the file is no longer beneath the share.
            denied(reopen(&gone));
            let none = None::<&Path>;
            let bind = mount(Some(&inside), &inside.join("before"), none, MsFlags::MS_BIND, none);
            assert_eq!((bind, umount(&inside.join("later"))), (Err(Errno::EPERM), Err(Errno::EPERM)));
        });
        when_restricted.recv().unwrap();
        tmpfs("later");
        nix::mount::umount2(&share.join("gone"), nix::mount::MntFlags::MNT_DETACH).unwrap();
        go_on.send(()).unwrap();
        files.join().unwrap();
    });
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no landlock_create_ruleset")]
fn no_file_is_accessible_without_share() {
    let base = tempfile::tempdir().unwrap();
    fs::write(base.path().join("file"), "").unwrap();
    let path = base.path().to_owned();
    let opened = thread::spawn(move || {
        restrict(None, false).unwrap();
        [File::open(path.join("file")).is_ok(), File::create(path.join("new")).is_ok(), fs::read_dir("/").is_ok()]
    });
    assert_eq!(opened.join().unwrap(), [!Landlock::of_kernel().is_usable(); 3]);
}

#[test]
#[cfg_attr(miri, ignore = "Miri has no landlock_create_ruleset")]
fn tcp_and_abstract_sockets_and_other_processes_are_not_reachable() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let (tcp_address, name) = (tcp.local_addr().unwrap(), format!("husk-landlock-{}", std::process::id()));
    let abstract_address = SocketAddr::from_abstract_name(name).unwrap();
    let _listener = UnixListener::bind_addr(&abstract_address).unwrap();
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    let pid = Pid::from_raw(other.id().cast_signed());
    let reached = thread::spawn(move || {
        restrict(None, false).unwrap();
        // Landlock does not restrict a pair of connected sockets, because the pair has no address.
        UnixStream::pair().unwrap();
        let tcp = TcpStream::connect(tcp_address).is_ok() || TcpListener::bind("127.0.0.1:0").is_ok();
        (tcp, UnixStream::connect_addr(&abstract_address).is_ok(), kill(pid, Signal::SIGCONT).is_ok())
    });
    let reached = reached.join().unwrap();
    other.kill().unwrap();
    other.wait().unwrap();
    let lacks = |version| !matches!(Landlock::of_kernel(), Landlock::Abi(abi) if abi >= version);
    assert_eq!(reached, (lacks(4), lacks(6), lacks(6)));
}

#[test]
fn missing_restrictions_are_named() {
    let missing = |abi| Landlock::Abi(abi).missing();
    assert_eq!((missing(6), missing(99)), (None, None));
    assert_eq!(
        missing(4).unwrap(),
        "this kernel has landlock ABI 4, so landlock does not restrict ioctls of devices, \
         abstract UNIX sockets and signals"
    );
    for landlock in [Landlock::Abi(1), Landlock::NotBuilt, Landlock::NotEnabled] {
        assert!(!landlock.is_usable() && landlock.missing().unwrap().contains("access to files, truncation of files"));
    }
    let error = LandlockError::Required(Landlock::NotEnabled).to_string();
    assert!(
        error.contains("landlock is not enabled") && error.contains("lsm=") && error.contains("= false"),
        "{error}"
    );
}
