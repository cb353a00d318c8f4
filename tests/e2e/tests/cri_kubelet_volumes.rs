//! Mirrored volumes: Secrets, projected volumes, downward API volumes and their updates reach the guest unchanged.

use std::os::unix::fs::chown;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use husk_e2e::cri::kubelet::{Entry, write_atomically};
use husk_e2e::cri::pod::{need_image, pods};
use husk_e2e::cri::{Pod, PodContainer};
use husk_e2e::{PYTHON, node};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;

/// Prints a hash over the visible files of the directory `$0` (name, mode, owner, size, content). Then prints the
/// number of hashed lines. Each file has two lines.
const HASH_FILES: &str = r"
    cd $0 && export LC_ALL=C && find -L . -path './..?*' -prune -o -type f \
        -exec stat -L -c '%n %a %u:%g %s' {} + -exec sha256sum {} + | sort > /tmp/files
    sha256sum < /tmp/files; wc -l < /tmp/files";

/// Prints the volume's hash at the start and after each inotify event of a file that is created, deleted or renamed.
const WATCH_FILES: &str = r#"
import ctypes, os, sys
os.environ["HASH_FILES"] = sys.argv[1]
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, b"/volume", 0x80 | 0x100 | 0x200) > 0
while True:
    os.system('echo seen $(sh -c "$HASH_FILES" /volume 2>&1)')
    os.read(fd, 1 << 20)
"#;

/// Returns the directory's hash and number of hashed lines, as the node sees them.
#[track_caller]
fn hash_on_node(dir: &Path) -> String {
    let seen = Command::new("sh").args(["-c", HASH_FILES]).arg(dir).output().unwrap();
    assert!(seen.status.success() && seen.stderr.is_empty(), "{seen:?}");
    String::from_utf8(seen.stdout).unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Starts a container that watches a volume.
fn start_watcher(pod: &Pod, volume: &Path) -> PodContainer {
    let mut config = pod.python(WATCH_FILES);
    config["command"].as_array_mut().unwrap().push(HASH_FILES.into());
    config["mounts"] =
        json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume", "readonly": true }]);
    pod.start(&config)
}

/// Waits until the container sees the same files in the volume as the node.
#[track_caller]
fn wait_until_seen(container: &PodContainer, volume: &Path) {
    let expected = hash_on_node(volume);
    container.wait_for(&format!("seen {expected}"));
}

#[test]
fn secret_updates_keep_bytes_modes_and_owners() {
    need_image(PYTHON);
    pods("cri-secret", |pods| {
        let pod = pods.pod();
        let volume = pods.volume(&pod, "secret", "data");
        // The kubelet mounts a tmpfs for a Secret.
        mount(Some("tmpfs"), &volume, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let all_bytes: Vec<u8> = (0..=255).collect();
        let version = |name: &str, word: &[u8]| {
            write_atomically(
                &volume,
                name,
                &[("tls.key", word, 0o400), ("bytes", &all_bytes, 0o440), ("none", b"", 0o444)],
            );
            // With an fsGroup, the kubelet gives the files to that group.
            chown(volume.join("tls.key"), Some(0), Some(2000)).unwrap();
        };
        version("..1", b"first");
        let container = start_watcher(&pod, &volume);
        wait_until_seen(&container, &volume);
        version("..2", b"second");
        wait_until_seen(&container, &volume);
        assert_eq!(container.sh("cat /volume/tls.key; stat -L -c ' %a %u:%g' /volume/tls.key"), "second 400 0:2000");
        let denied = container.exec(&["sh", "-c", "rm /volume/..data/bytes"]);
        assert!(denied.code != 0 && denied.err.contains("ead-only"), "{denied:?}");
        pod.stop();
        umount2(&volume, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn projected_volume_updates_add_and_remove_files_and_directories() {
    need_image(PYTHON);
    pods("cri-projected", |pods| {
        let pod = pods.pod();
        let volume = pods.volume(&pod, "projected", "data");
        let first: [Entry; 5] = [
            ("token", b"one", 0o600),
            ("ca.crt", b"certificate", 0o644),
            ("labels/app/name", b"web", 0o444),
            ("labels/app/tier", b"front", 0o400),
            ("scripts/run", b"#!/bin/sh\necho ran\n", 0o755),
        ];
        write_atomically(&volume, "..1", &first);
        let container = start_watcher(&pod, &volume);
        wait_until_seen(&container, &volume);
        assert_eq!(container.sh("/volume/scripts/run; ls /volume/labels/app"), "ran\nname\ntier");
        // The update adds the directory `more`, changes `token`, and removes `labels/app/tier` and the directory
        // `scripts`.
        let second: [Entry; 4] = [
            ("token", b"two", 0o600),
            ("ca.crt", b"certificate", 0o644),
            ("labels/app/name", b"web", 0o444),
            ("more/deep/er/file", b"new", 0o444),
        ];
        write_atomically(&volume, "..2", &second);
        wait_until_seen(&container, &volume);
        let check = "! test -e /volume/scripts && ! test -e /volume/labels/app/tier && cat /volume/more/deep/er/file";
        let names = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        // The kubelet removes the old links only after it has switched to the new version.
        container.sh("until [ \"$(ls /volume | wc -l)\" = 4 ]; do sleep 0.1; done");
        assert_eq!(container.sh(check), "new");
        assert_eq!(names(container.sh("ls /volume")), ["ca.crt", "labels", "more", "token"]);
        // File modes restrict a container that does not run as root.
        let mut config = pod.sh("cat /volume/labels/app/name; cat /volume/token; id -u");
        config["mounts"] =
            json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume", "readonly": true }]);
        config["linux"]["security_context"]["run_as_user"] = json!({ "value": 1000 });
        let user = pod.start(&config);
        user.wait();
        assert!(user.log().contains("stdout F web1000") && user.log().contains("Permission denied"), "{}", user.log());
    });
}

#[test]
fn downward_api_updates_reach_the_guest() {
    pods("cri-downward", |pods| {
        let pod = pods.pod();
        let volume = pods.volume(&pod, "downward-api", "data");
        write_atomically(&volume, "..1", &[("labels", b"app=\"web\"", 0o644), ("limits/memory", b"64", 0o644)]);
        let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
        config["mounts"] =
            json!([{ "host_path": volume.to_string_lossy(), "container_path": "/volume", "readonly": true }]);
        let container = pod.start(&config);
        let hash = || container.exec(&["sh", "-c", HASH_FILES, "/volume"]);
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&hash().out), hash_on_node(&volume));
        write_atomically(
            &volume,
            "..2",
            &[("labels", b"app=\"web\"\ntier=\"x\"", 0o644), ("limits/memory", b"96", 0o644)],
        );
        let expected = hash_on_node(&volume);
        let seen = node::eventually(Duration::from_secs(60), || (words(&hash().out) == expected).then_some(()));
        assert!(seen.is_some(), "expected the hash {expected}, got {:?}", hash());
        assert_eq!(container.sh("cat /volume/limits/memory"), "96");
    });
}

#[test]
#[ignore = "long: 30 to 90 s in an emulated node; shorter tests cover parts of it"]
fn mirrored_volumes_have_no_limit_on_entries_or_size() {
    need_image(PYTHON);
    pods("cri-many-entries", |pods| {
        let pod = pods.pod();
        // The volume first has 5000 entries, and then 5100.
        let many = pods.volume(&pod, "configmap", "data");
        let version = |name: &str, count: usize| {
            let files: Vec<_> = (0..count).map(|n| (format!("entry-{n:05}"), format!("{name} {n}"))).collect();
            let files: Vec<_> = files.iter().map(|(path, text)| (path.as_str(), text.as_bytes(), 0o644)).collect();
            write_atomically(&many, name, &files);
        };
        version("..1", 5000);
        let container = start_watcher(&pod, &many);
        wait_until_seen(&container, &many);
        assert!(container.log().contains(" 10000"), "{}", container.log());
        version("..2", 5100);
        wait_until_seen(&container, &many);
        assert_eq!(container.sh("cat /volume/entry-05099; cat /volume/entry-00000"), "..2 5099..2 0");
        container.stop(0);
        container.remove();
        // Both the volume and one of its files are larger than ttrpc's maximum message of 4 MiB.
        let large = pods.volume(&pod, "projected", "data");
        let bytes =
            |seed: usize, length: usize| (0..length).map(|i| (i * 31 + seed + i / 251) as u8).collect::<Vec<_>>();
        let contents: Vec<_> = (0..6).map(|n| bytes(n, 1 << 20)).chain([bytes(7, 5 << 20)]).collect();
        let names: Vec<_> = (0..contents.len()).map(|n| format!("dir-{}/file-{n}", n % 2)).collect();
        let mut entries: Vec<Entry> =
            names.iter().zip(&contents).map(|(name, content)| (name.as_str(), content.as_slice(), 0o644)).collect();
        write_atomically(&large, "..1", &entries);
        let container = start_watcher(&pod, &large);
        wait_until_seen(&container, &large);
        entries.rotate_left(1);
        entries.truncate(6);
        write_atomically(&large, "..2", &entries);
        wait_until_seen(&container, &large);
    });
}
