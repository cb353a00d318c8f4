//! Runs fsx, a public test program for file systems, on a volume on the node's disk and on a container's rootfs.
//!
//! Runs: by name only: the test image contains fsx, which has to be compiled

use std::fs;
use std::path::Path;
use std::time::Duration;

use husk_e2e::FSX;
use husk_e2e::cri::pod::{need_image, pods};
use serde_json::json;

/// Number of operations that fsx performs on its file.
const OPERATIONS: &str = "3000";
/// Timeout of one fsx run. fsx takes some seconds, but much longer on a busy emulated node.
const TIMEOUT: Duration = Duration::from_secs(900);

/// fsx's operations that every file system supports.
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
/// Operations that allocate and free space with fallocate(2).
const FALLOCATE: &str = "
posix_fallocate = 2
punch_hole = 2
";

/// Runs fsx on `file`. A file in `/data` is on the volume. Any other file is on the container's rootfs.
#[track_caller]
fn run_fsx(name: &str, file: &str, weights: &[&str], seed: &str) {
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
        let ended = container.wait_within(TIMEOUT);
        let log = container.log();
        let is_on_node = volume.join("file").exists();
        pod.stop();
        fs::remove_dir_all(dir).unwrap();
        assert!(ended.0 == 0 && log.contains("All operations completed"), "{ended:?}\n{log}");
        // The node sees the file only if the file is on the volume.
        assert_eq!(is_on_node, file.starts_with("/data"));
    });
}

#[test]
fn fsx_passes_on_a_volume() {
    run_fsx("fsx-volume", "/data/file", &[PLAIN], "20240101");
}

#[test]
fn fsx_with_fallocate_passes_on_a_volume() {
    run_fsx("fsx-holes", "/data/file", &[PLAIN, FALLOCATE], "20240102");
}

#[test]
fn fsx_passes_on_the_rootfs() {
    run_fsx("fsx-root", "/work/file", &[PLAIN, FALLOCATE], "20240103");
}
