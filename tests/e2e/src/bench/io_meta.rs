//! Creating, examining and removing small files in the root file system and in a volume, and the start of Python.

use std::time::{Duration, Instant};

use husk_benchmarks::Report;

use super::variant::names;
use super::{Options, Quantity, Variant, interleave, python};
use crate::cri::pod::need_image;
use crate::cri::{PodContainer, pods_with_handler};
use crate::{PYTHON, node};

/// Creates, examines and removes files. Prints the duration of each of these steps in ms.
const FILES: &str = "import os, sys, time
directory, count = sys.argv[1], int(sys.argv[2])
os.makedirs(directory, exist_ok=True)
paths = [f'{directory}/{number}' for number in range(count)]
def create(path):
    with open(path, 'wb') as file:
        file.write(bytes(1024))
for step in create, os.stat, os.remove:
    begin = time.monotonic()
    for path in paths:
        step(path)
    print(1000 * (time.monotonic() - begin))";

/// Timeout of a command.
const LIMIT: Duration = Duration::from_secs(300);

/// Measures one new pod for each run.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    need_image(PYTHON);
    let (runs, count) = (options.runs.unwrap_or(7), options.files.to_string());
    let mut report = Report::new("io-meta").with("runs", runs).with("files", options.files);
    let mut quantities = vec![
        Quantity::lower("exec of python3, caches cold", "ms"),
        Quantity::lower("exec of python3, caches warm", "ms"),
    ];
    for place in ["root file system", "volume"] {
        quantities.extend(
            ["create", "stat", "remove"].map(|step| Quantity::lower(format!("{step} {count} files, {place}"), "ms")),
        );
    }
    pods_with_handler("bench-io-meta", "husk", |pods| {
        interleave(&mut report, runs, &names(&Variant::COMPARED), &quantities, |index, _| {
            let variant = Variant::COMPARED[index];
            let _config = variant.configure();
            let pod = pods.run_with_handler(variant.handler(), pods.config());
            let volume = pods.disk_volume(&pod, "files");
            let mut config = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            config["image"]["image"] = PYTHON.into();
            config["mounts"] = serde_json::json!([{ "host_path": volume.path(), "container_path": "/volume" }]);
            let container = pod.start(&config);
            // In a new pod, the guest's caches do not have Python's files.
            node::drop_caches();
            let mut values = vec![python_start(&container), python_start(&container)];
            for directory in ["/var/tmp/files", "/volume/files"] {
                values.extend(python::run(&container, FILES, &[directory, &count], LIMIT));
            }
            pod.remove();
            values
        });
    });
    report
}

/// Returns the duration of an ExecSync of Python, in ms.
fn python_start(container: &PodContainer) -> f64 {
    let begin = Instant::now();
    let done = container.exec_within(LIMIT, &["python3", "-c", "import json"]);
    assert_eq!(done.code, 0, "{done:?}");
    begin.elapsed().as_secs_f64() * 1000.0
}
