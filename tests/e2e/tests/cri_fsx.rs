//! fsx, the public test program for file systems, on a volume of the node's disk and on a container's root.
//!
//! Runs: by name only: its image needs fsx, which has to be compiled

use std::fs;
use std::path::Path;
use std::time::Duration;

use husk_e2e::FSX;
use husk_e2e::cri::pod::{need_image, pods};
use serde_json::json;

/// How often fsx does something to its file.
const OPERATIONS: &str = "3000";
/// Some seconds, but for an emulated node that others use as well.
const LIMIT: Duration = Duration::from_secs(900);

/// All it can do to a file but what not every file system has.
const PLAIN: &str = "
[weights]
close_open = 1
read = 10
write = 10
mapread = 10
mapwrite = 10
invalidate = 1
truncate = 3
fsync = 1
fdatasync = 1
sendfile = 3
posix_fadvise = 1
copy_file_range = 3
";
/// That as well: space given and taken by fallocate(2).
const HOLES: &str = "
posix_fallocate = 2
punch_hole = 2
";

/// Runs it on a file in `/data`, which is on the volume, or on one of the root's.
#[track_caller]
fn passes(name: &str, file: &str, weights: &[&str], seed: &str) {
    need_image(FSX);
    pods(name, |pods| {
        let dir = Path::new("/var/lib/kubelet/pods").join(format!("uid-{name}"));
        let volume = dir.join("volumes/kubernetes.io~empty-dir/data");
        fs::create_dir_all(&volume).unwrap();
        let config = pods.dir().join("fsx.toml");
        fs::write(&config, weights.concat()).unwrap();
        let pod = pods.pod();
        let mut container = pod.sh("");
        container["image"]["image"] = FSX.into();
        container["command"] =
            json!(["/bin/fsx", "-f", "/etc/fsx.toml", "-S", seed, "-N", OPERATIONS, "-P", "/work", file]);
        container["mounts"] = json!([
            { "host_path": volume.to_string_lossy(), "container_path": "/data" },
            { "host_path": config.to_string_lossy(), "container_path": "/etc/fsx.toml", "readonly": true },
        ]);
        let container = pod.start(&container);
        let ended = container.wait_within(LIMIT);
        let log = container.log();
        let left = volume.join("file").exists();
        pod.stop();
        fs::remove_dir_all(dir).unwrap();
        assert!(ended.0 == 0 && log.contains("All operations completed"), "{ended:?}\n{log}");
        // The node has the file that all this was done to.
        assert_eq!(left, file.starts_with("/data"));
    });
}

#[test]
fn fsx_passes_on_a_volume() {
    passes("fsx-volume", "/data/file", &[PLAIN], "20240101");
}

#[test]
fn fsx_passes_on_a_volume_with_holes() {
    passes("fsx-holes", "/data/file", &[PLAIN, HOLES], "20240102");
}

#[test]
fn fsx_passes_on_the_root() {
    passes("fsx-root", "/work/file", &[PLAIN, HOLES], "20240103");
}
