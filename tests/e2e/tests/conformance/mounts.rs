//! Mounts, volumes and devices.

use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Command;

use husk_e2e::BUSYBOX;
use husk_e2e::conformance::{group, pods};
use husk_e2e::cri::kubelet::write_atomically;
use husk_e2e::cri::{self, expect_error};
use husk_e2e::disk::Disk;
use serde_json::{Value, json};

use super::{run_once, security_context, sleeper};

/// Mounts the node's path `source` at `/volume`. The mount has the additional fields `options`.
fn mount(source: &Path, options: &Value) -> impl FnOnce(&mut Value) {
    let mut mount = json!({ "host_path": source.to_string_lossy(), "container_path": "/volume" });
    mount.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    move |config| config["mounts"] = json!([mount])
}

/// Runs a command on the node.
#[track_caller]
fn node(command: &[&str]) {
    let status = Command::new(command[0]).args(&command[1..]).status().unwrap();
    assert!(status.success(), "{command:?} failed: {status}");
}

#[test]
fn mounts() {
    pods("conf-mounts", |pods| {
        let pod = pods.pod();
        let dir = pods.dir().join("volume");
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("file"), "of the node\n").unwrap();
        let plain = json!({});
        group("Mounts", |group| {
            group.check("a directory, seen and written to from both sides", || {
                assert_eq!(
                    run_once(&pod, "cat /volume/file; echo back > /volume/new", mount(&dir, &plain)),
                    "of the node"
                );
                assert_eq!(fs::read_to_string(dir.join("new")).unwrap(), "back\n");
            });
            group.check("a file", || {
                assert_eq!(run_once(&pod, "cat /volume", mount(&dir.join("file"), &plain)), "of the node");
            });
            group.check("the target of a symbolic link", || {
                symlink(&dir, pods.dir().join("link")).unwrap();
                assert_eq!(run_once(&pod, "cat /volume/file", mount(&pods.dir().join("link"), &plain)), "of the node");
            });
            group.check("a missing directory is created", || {
                let missing = pods.dir().join("not/there");
                run_once(&pod, "echo made > /volume/file", mount(&missing, &plain));
                assert_eq!(fs::read_to_string(missing.join("file")).unwrap(), "made\n");
            });
            group.check("a read-only mount", || {
                let text = run_once(&pod, "touch /volume/x 2>&1", mount(&dir, &json!({ "readonly": true })));
                assert!(text.contains("ead-only"), "{text}");
            });
            group.check("private: later mounts of the node are not seen", || {
                let late = dir.join("sub");
                let container = sleeper(&pod, mount(&dir, &plain));
                node(&["mount", "-t", "tmpfs", "tmpfs", &late.to_string_lossy()]);
                fs::write(late.join("late"), "").unwrap();
                let seen = container.sh("ls /volume/sub");
                node(&["umount", &late.to_string_lossy()]);
                assert_eq!(seen, "");
                container.remove();
            });
            group.check("host to container: later mounts of the node are seen", || {
                let late = dir.join("sub");
                let container = sleeper(&pod, mount(&dir, &json!({ "propagation": "PROPAGATION_HOST_TO_CONTAINER" })));
                node(&["mount", "-t", "tmpfs", "tmpfs", &late.to_string_lossy()]);
                fs::write(late.join("late"), "").unwrap();
                let seen = container.exec(&["ls", "/volume/sub"]).out;
                container.remove();
                node(&["umount", &late.to_string_lossy()]);
                assert_eq!(seen, "late\n");
            });
            group.check("recursive read-only (Husk: with the handler husk-userns)", || {
                let below = dir.join("sub");
                node(&["mount", "-t", "tmpfs", "tmpfs", &below.to_string_lossy()]);
                let text = catch_unwind(AssertUnwindSafe(|| {
                    // containerd 2.x reports support for recursive read-only mounts only for handlers with runc's
                    // `runtime_type`. Of Husk's handlers, only husk-userns has this `runtime_type`.
                    let handler = if cri::handler() == "runc" { "runc" } else { "husk-userns" };
                    let pod = pods.run_with_handler(handler, pods.config());
                    let recursive = json!({ "readonly": true, "recursive_read_only": true });
                    let text =
                        run_once(&pod, "touch /volume/x 2>&1; touch /volume/sub/x 2>&1", mount(&dir, &recursive));
                    pod.remove();
                    text
                }));
                node(&["umount", &below.to_string_lossy()]);
                let text = text.unwrap_or_default();
                assert_eq!(text.matches("ead-only").count(), 2, "{text}");
            });
            let both = json!({ "propagation": "PROPAGATION_BIDIRECTIONAL" });
            let privileged = |config: &mut Value| {
                mount(&dir, &both)(config);
                security_context(config)["privileged"] = json!(true);
            };
            let mut config = pods.config();
            security_context(&mut config)["privileged"] = json!(true);
            let trusted = pods.run(config);
            let seen = || {
                let container = sleeper(&trusted, privileged);
                container.sh("mount -t tmpfs tmpfs /volume/sub; touch /volume/sub/inside");
                let seen = dir.join("sub/inside").exists();
                container.sh("umount /volume/sub");
                assert!(seen);
                container.remove();
            };
            group.check_or_rejected(
                "bidirectional: mounts of the container are seen by the node",
                "propagation",
                seen,
                || {
                    let mut config = trusted.sh("true");
                    privileged(&mut config);
                    let request =
                        json!({ "pod_sandbox_id": trusted.id, "config": config, "sandbox_config": trusted.config });
                    let created = husk_e2e::cri::try_call("CreateContainer", &request);
                    match created {
                        Ok(made) => expect_error("StartContainer", &json!({ "container_id": made["container_id"] })),
                        Err(status) => status.message.to_lowercase(),
                    }
                },
            );
            trusted.remove();
        });
    });
}

#[test]
fn volumes() {
    pods("conf-volumes", |pods| {
        let pod = pods.pod();
        let plain = json!({});
        group("Volumes", |group| {
            group.check("an emptyDir in memory, with its size limit", || {
                let dir = pods.dir().join("memory");
                fs::create_dir_all(&dir).unwrap();
                node(&["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", &dir.to_string_lossy()]);
                let script = "head -c 20000000 /dev/zero > /volume/x 2> /dev/null; stat -c %s /volume/x";
                let text = run_once(&pod, script, mount(&dir, &plain));
                node(&["umount", &dir.to_string_lossy()]);
                assert_eq!(text, "8388608");
            });
            group.check("owner, mode, links and modification time", || {
                let dir = pods.dir().join("files");
                fs::create_dir_all(&dir).unwrap();
                let script = "cd /volume; touch a; chown 1234:5678 a; chmod 4750 a; ln a b; ln -s a c;
                    touch -d '2001-02-03 04:05:06' a; stat -c '%u %g %a %h %Y' b; readlink c";
                assert_eq!(run_once(&pod, script, mount(&dir, &plain)), "1234 5678 4750 2 981173106\na");
            });
            group.check("a fifo between two containers", || {
                let dir = pods.dir().join("pipes");
                fs::create_dir_all(&dir).unwrap();
                let (a, b) = (sleeper(&pod, mount(&dir, &plain)), sleeper(&pod, mount(&dir, &plain)));
                a.sh("mkfifo /volume/fifo; (echo through > /volume/fifo) > /dev/null 2>&1 &");
                assert_eq!(b.sh("cat /volume/fifo"), "through");
                a.remove();
                b.remove();
            });
            for (behaviour, sub_path) in [
                ("a fifo in a volume that one container mounts read-only", false),
                ("a fifo through two subPaths of an emptyDir", true),
            ] {
                group.check(behaviour, || {
                    let uid = pod.config["metadata"]["uid"].as_str().unwrap();
                    let pod_dir = Path::new("/var/lib/kubelet/pods").join(uid);
                    let volume = pod_dir.join("volumes/kubernetes.io~empty-dir/pipes");
                    fs::create_dir_all(volume.join("sub")).unwrap();
                    let paths = ["a", "b"].map(|container| {
                        let path = pod_dir.join("volume-subpaths/pipes").join(container).join("0");
                        if !sub_path {
                            return volume.clone();
                        }
                        fs::create_dir_all(&path).unwrap();
                        node(&["mount", "--bind", &volume.join("sub").to_string_lossy(), &path.to_string_lossy()]);
                        path
                    });
                    let result = catch_unwind(AssertUnwindSafe(|| {
                        let a = sleeper(&pod, mount(&paths[0], &plain));
                        let b = sleeper(&pod, mount(&paths[1], &json!({ "readonly": true })));
                        a.sh("mkfifo /volume/fifo; (echo through > /volume/fifo) > /dev/null 2>&1 &");
                        assert_eq!(b.sh("timeout 20 cat /volume/fifo"), "through");
                        a.remove();
                        b.remove();
                    }));
                    for path in paths.iter().filter(|_| sub_path) {
                        node(&["umount", "-l", &path.to_string_lossy()]);
                    }
                    fs::remove_dir_all(&pod_dir).unwrap();
                    result.unwrap_or_else(|panic| resume_unwind(panic));
                });
            }
            group.check("an emptyDir in memory is charged to the container", || {
                let dir = pods.dir().join("volumes/kubernetes.io~empty-dir/counted");
                fs::create_dir_all(&dir).unwrap();
                node(&["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", &dir.to_string_lossy()]);
                let script = "head -c 16777216 /dev/zero > /volume/x;
                    awk '/^shmem / {print int($2 / 1048576)}' /sys/fs/cgroup/memory.stat";
                let text = catch_unwind(AssertUnwindSafe(|| run_once(&pod, script, mount(&dir, &plain))));
                node(&["umount", &dir.to_string_lossy()]);
                assert_eq!(text.unwrap_or_default(), "16");
            });
            group.check("a projected volume is updated atomically", || {
                let dir = pods.volume(&pod, "projected", "token");
                write_atomically(&dir, "..1", &[("dir/token", b"first", 0o600)]);
                let container = sleeper(&pod, mount(&dir, &json!({ "readonly": true })));
                assert_eq!(container.sh("cat /volume/dir/token"), "first");
                write_atomically(&dir, "..2", &[("dir/token", b"second", 0o600), ("more", b"", 0o644)]);
                container.sh("until [ -e /volume/more ]; do sleep 0.1; done");
                assert_eq!(container.sh("cat /volume/dir/token; stat -L -c %a /volume/dir/token"), "second600");
                container.remove();
            });
            group.check("an image as a volume", || {
                let text = run_once(&pod, "ls /volume/bin/busybox", |config| {
                    config["mounts"] =
                        json!([{ "image": { "image": BUSYBOX }, "container_path": "/volume", "readonly": true }]);
                });
                assert_eq!(text, "/volume/bin/busybox");
            });
        });
    });
}

#[test]
fn devices() {
    pods("conf-devices", |pods| {
        let disk = Disk::new(&pods.dir().join("disk"), 16);
        let mut config = pods.config();
        security_context(&mut config)["privileged"] = json!(true);
        let (pod, trusted) = (pods.pod(), pods.run(config));
        let device = |permissions: &'static str| json!([{ "container_path": "/dev/xvda", "host_path": disk.device, "permissions": permissions }]);
        group("Devices", |group| {
            group.check("a raw block device", || {
                let text = run_once(&pod, "echo on the disk > /dev/xvda; sync; head -c 11 /dev/xvda", |config| {
                    config["devices"] = device("mrw");
                });
                let mut seen = [0; 11];
                fs::File::open(&disk.device).unwrap().read_exact(&mut seen).unwrap();
                assert_eq!(text, "on the disk");
                assert_eq!(&seen, b"on the disk", "the node's device lacks the data that the container wrote");
            });
            group.check("a read-only block device", || {
                let text = run_once(&pod, "head -c 11 /dev/xvda && echo; echo x 2>&1 > /dev/xvda", |config| {
                    config["devices"] = device("r");
                });
                assert!(text.starts_with("on the disk\n") && text.contains("not permitted"), "{text}");
                let mut seen = [0; 11];
                fs::File::open(&disk.device).unwrap().read_exact(&mut seen).unwrap();
                assert_eq!(&seen, b"on the disk");
            });
            group.check("a privileged container formats and mounts a block device", || {
                let script = "mke2fs /dev/xvda > /dev/null 2>&1; mkdir /mounted; mount -t ext4 /dev/xvda /mounted
                    echo inside > /mounted/file; umount /mounted";
                run_once(&trusted, script, |config| {
                    config["devices"] = device("mrw");
                    security_context(config)["privileged"] = json!(true);
                });
                let point = pods.dir().join("mounted");
                let _mounted = disk.mount(&point, "ro");
                assert_eq!(fs::read_to_string(point.join("file")).unwrap(), "inside\n");
            });
        });
        pod.stop();
        trusted.stop();
    });
}
