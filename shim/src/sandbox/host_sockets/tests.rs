//! Tests of the rules for sockets of the node: a container may connect only to sockets that the configuration lists.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use super::*;
use crate::volumes::Share;
use crate::volumes::test_support::{bind_for, isolated, tmpfs};

fn request(volume: &Path, path: &str) -> HostSocketRequest {
    let credentials = Credentials { uid: 0, gid: 0, groups: Vec::new() };
    let volume = volume.file_name().unwrap().to_str().unwrap().to_owned();
    HostSocketRequest { token: 1, volume, path: path.into(), credentials }
}

fn allowing(entry: &str) -> HostSockets {
    HostSockets::new("default/pod".into(), vec![entry.to_owned()], None)
}

#[test]
fn find_returns_only_allowed_sockets() {
    isolated(|dir| {
        let (share, node) = (Share::mount(dir).unwrap(), dir.join("node"));
        tmpfs(&node);
        std::fs::create_dir(node.join("in")).unwrap();
        let _listeners = ["one", "in/two"].map(|name| UnixListener::bind(node.join(name)).unwrap());
        let volume = bind_for(&share, "c1", &node, &["rbind"]);
        let entry = |name: &str| node.join(name).to_str().unwrap().to_owned();
        let found = |entry: &str, path: &str| allowing(entry).find(&share.host, &request(&volume, path));
        assert!(found(&entry("one"), "one").is_ok());
        assert!(found(&entry("in/"), "in/two").is_ok());
        assert!(found(&entry(""), "in/two").is_ok());
        for (entry, path) in [(entry("one"), "in/two"), (entry("in"), "in/two"), (entry("in/"), "one")] {
            assert!(matches!(found(&entry, path), Err(ConnectError::NotAllowed)), "{entry} {path}");
        }
        let none = HostSockets::default().find(&share.host, &request(&volume, "one"));
        assert!(matches!(none, Err(ConnectError::NotAllowed)));
        share.unmount();
    });
}

#[test]
fn find_follows_no_path_of_a_hostile_agent() {
    isolated(|dir| {
        let (share, node, other) = (Share::mount(dir).unwrap(), dir.join("node"), dir.join("other"));
        tmpfs(&node);
        tmpfs(&other);
        let _listeners = [&node, &other].map(|dir| UnixListener::bind(dir.join("socket")).unwrap());
        std::fs::write(node.join("file"), "").unwrap();
        symlink(&other, node.join("directory")).unwrap();
        symlink(other.join("socket"), node.join("link")).unwrap();
        symlink("socket", node.join("beside")).unwrap();
        let volume = bind_for(&share, "c1", &node, &["rbind"]);
        std::fs::create_dir(share.host.join("c1/rootfs")).unwrap();
        let sockets = allowing(&format!("{}/", dir.display()));
        let refused = |request: &HostSocketRequest| sockets.find(&share.host, request).unwrap_err().to_string();
        assert!(sockets.find(&share.host, &request(&volume, "socket")).is_ok());
        for path in ["..", "../../c1", "/", "directory/socket", "none", "file/socket"] {
            assert_eq!(refused(&request(&volume, path)), "failed to open the socket", "{path}");
        }
        for path in ["file", "link", "beside", "directory", ""] {
            assert_eq!(refused(&request(&volume, path)), "the file is not a socket", "{path}");
        }
        for name in ["../c1/rootfs", "..", "9.1-2-3-4"] {
            let named = HostSocketRequest { volume: name.into(), ..request(&volume, "socket") };
            let error = refused(&named);
            assert!(error.starts_with("the share has no volume") || error == "failed to open the volume", "{error}");
        }
        // A mount point whose mount is gone.
        std::fs::create_dir(share.host.join(".volumes/8.1-2-3-4")).unwrap();
        let gone = HostSocketRequest { volume: "8.1-2-3-4".into(), ..request(&volume, "socket") };
        assert!(refused(&gone).starts_with("the share has no volume"));
        for private in ["rootfs", "8.1-2-3-4-private"] {
            let named = HostSocketRequest { volume: private.into(), ..request(&volume, "socket") };
            assert_eq!(refused(&named), "the volume belongs to the pod");
        }
        share.unmount();
    });
}

#[test]
fn find_uses_the_paths_of_all_mounts_that_lead_to_the_socket() {
    isolated(|dir| {
        let (share, node, bound) = (Share::mount(dir).unwrap(), dir.join("node"), dir.join("bound"));
        tmpfs(&node);
        std::fs::create_dir_all(node.join("sub/dir")).unwrap();
        std::fs::create_dir(&bound).unwrap();
        let _listener = UnixListener::bind(node.join("sub/dir/socket")).unwrap();
        let (none, bind) = (None::<&Path>, nix::mount::MsFlags::MS_BIND);
        nix::mount::mount(Some(&node.join("sub")), &bound, none, bind, none).unwrap();
        // As with a CSI driver, the volume is a mount of the daemon's directory.
        let volume = bind_for(&share, "c1", &bound, &["rbind"]);
        for entry in [node.join("sub/dir/socket"), bound.join("dir/socket")] {
            let sockets = allowing(entry.to_str().unwrap());
            assert!(sockets.find(&share.host, &request(&volume, "dir/socket")).is_ok(), "{}", entry.display());
        }
        // A path that another mount covers does not lead to the socket.
        tmpfs(&node.join("sub/dir"));
        let sockets = allowing(node.join("sub/dir/socket").to_str().unwrap());
        let covered = sockets.find(&share.host, &request(&volume, "dir/socket"));
        assert!(matches!(covered, Err(ConnectError::NotAllowed)));
        share.unmount();
    });
}

#[test]
fn find_follows_a_recreated_socket() {
    isolated(|dir| {
        let (share, node) = (Share::mount(dir).unwrap(), dir.join("node"));
        tmpfs(&node);
        let volume = bind_for(&share, "c1", &node, &["rbind"]);
        let sockets = allowing(node.join("socket").to_str().unwrap());
        for _ in 0..2 {
            let _listener = UnixListener::bind(node.join("socket")).unwrap();
            let file = sockets.find(&share.host, &request(&volume, "socket")).unwrap();
            std::os::unix::net::UnixStream::connect(host_view::path_of(&file)).unwrap();
            std::fs::remove_file(node.join("socket")).unwrap();
        }
        share.unmount();
    });
}

#[test]
fn check_refuses_ids_outside_the_user_namespace() {
    let mapping = |host| crate::oci::IdMapping { container: 0, host, size: 1000 };
    let mappings = IdMappings::from_namespace(true, &[mapping(100_000)], &[mapping(200_000)]).unwrap();
    let sockets = HostSockets::new(String::new(), Vec::new(), mappings);
    let check = |uid, gid, groups: &[u32]| sockets.check(&Credentials { uid, gid, groups: groups.to_vec() }).is_ok();
    assert!(check(100_000, 200_999, &[200_005]));
    for (uid, gid, groups) in [
        (0, 200_000, &[][..]),
        (101_000, 200_000, &[]),
        (100_000, 0, &[]),
        (100_000, 100_000, &[]),
        (100_000, 200_000, &[200_000, 0]),
    ] {
        assert!(!check(uid, gid, groups), "{uid} {gid} {groups:?}");
    }
    let none = HostSockets::default();
    none.check(&Credentials { uid: 0, gid: 0, groups: vec![0] }).unwrap();
}

#[test]
fn refusals_of_a_socket_are_logged_once_a_minute() {
    let (mut refused, begin) = (Refused::default(), Instant::now());
    let mut is_new = |path: &str, seconds| refused.is_new(Path::new(path), begin + Duration::from_secs(seconds));
    assert!(is_new("/a", 0) && is_new("/b", 1));
    assert!(!is_new("/a", 59) && is_new("/a", 60));
    for number in 2..MAX_LOGGED {
        assert!(is_new(&number.to_string(), 60));
    }
    assert!(!is_new("/more", 60), "the guest chooses the paths, and must not fill the log");
    assert!(is_new("/more", 121));
}
