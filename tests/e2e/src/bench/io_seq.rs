//! Writing and reading a large file in the root file system and in a volume.

use std::time::Duration;

use husk_benchmarks::Report;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave, python};
use crate::cri::pod::need_image;
use crate::cri::pods_with_handler;
use crate::{PYTHON, node};

/// Writes a file, waits until it is on the disk, and removes it from the caches of the guest's kernel. Prints the
/// duration until the file is on the disk, in seconds.
const WRITE: &str = "import os, sys, time
path, mib = sys.argv[1], int(sys.argv[2])
data = os.urandom(1 << 20)
begin = time.monotonic()
fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
for _ in range(mib):
    assert os.write(fd, data) == len(data)
os.fsync(fd)
print(time.monotonic() - begin)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)";

/// Reads a file. Prints the duration in seconds.
const READ: &str = "import sys, time
path, mib = sys.argv[1], int(sys.argv[2])
buffer, count = bytearray(1 << 20), 0
begin = time.monotonic()
with open(path, 'rb', buffering=0) as file:
    while read := file.readinto(buffer):
        count += read
print(time.monotonic() - begin)
assert count == mib << 20";

/// Timeout of a command.
const LIMIT: Duration = Duration::from_secs(600);

/// Measures one pod for each variant.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    need_image(PYTHON);
    let (runs, mib) = (options.runs.unwrap_or(5), options.mib.unwrap_or(256));
    let mut report = Report::new("io-seq").with("runs", runs).with("mib", mib);
    let mut quantities = Vec::new();
    for place in ["root file system", "volume"] {
        quantities.extend(
            ["write and fsync", "read, caches cold", "read, caches warm"]
                .map(|step| Quantity::higher(format!("{step}, {place}"), "MiB/s")),
        );
    }
    pods_with_handler("bench-io-seq", "husk", |pods| {
        let made = Variant::COMPARED.map(|variant| {
            let _config = variant.configure();
            let pod = pods.run_with_handler(variant.handler(), pods.config());
            let volume = pods.disk_volume(&pod, "file");
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["image"]["image"] = PYTHON.into();
            config["mounts"] = serde_json::json!([{ "host_path": volume.path(), "container_path": "/volume" }]);
            let container = pod.start(&config);
            (pod, container, volume)
        });
        interleave(&mut report, runs, &names(&Variant::COMPARED), &quantities, |index, _| {
            let (_, container, _) = &made[index];
            let mut values = Vec::new();
            for path in ["/var/tmp/file", "/volume/file"] {
                let step = |program| python::run(container, program, &[path, &mib.to_string()], LIMIT)[0];
                values.push(step(WRITE));
                node::drop_caches();
                values.extend([step(READ), step(READ)]);
                container.sh(&format!("rm {path}"));
            }
            values.into_iter().map(|seconds| mib as f64 / seconds).collect()
        });
        // The volumes are removed after their pods.
        made.iter().for_each(|(pod, ..)| pod.remove());
    });
    report
}
