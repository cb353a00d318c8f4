//! The witness: a pod without a fault. Its container counts once a second. A gap in the numbers, or a long time without
//! a new number, means that a fault has spread.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use husk_base::sync::lock;
use serde_json::json;

use crate::cri::{Pod, PodContainer, Pods};
use crate::node;

/// Longest time without a new number. On an emulated node, the start of a VM keeps a CPU busy for seconds.
const GAP: Duration = Duration::from_secs(20);

/// The witness.
pub struct Witness {
    /// The witness's pod.
    pub pod: Pod,
    container: PodContainer,
    file: PathBuf,
    longest: Arc<Mutex<Duration>>,
    end: Arc<AtomicBool>,
}

impl Witness {
    /// Starts the witness.
    #[track_caller]
    pub fn start(pods: &Pods) -> Self {
        let dir = pods.dir().join("witness");
        fs::create_dir_all(&dir).unwrap();
        let pod = pods.pod();
        let mut config = pod.sh("i=0; while :; do i=$((i+1)); echo $i >> /w/count; sleep 1; done");
        config["mounts"] = json!([{ "host_path": dir.to_string_lossy(), "container_path": "/w" }]);
        let container = pod.start(&config);
        let file = dir.join("count");
        let counts = node::eventually(Duration::from_secs(60), || (size(&file) > 0).then_some(()));
        assert!(counts.is_some(), "the witness does not count");
        let (longest, end) = (Arc::new(Mutex::new(Duration::ZERO)), Arc::new(AtomicBool::new(false)));
        thread::spawn({
            let (file, longest, end) = (file.clone(), Arc::clone(&longest), Arc::clone(&end));
            move || watch(&file, &longest, &end)
        });
        Self { pod, container, file, longest, end }
    }

    /// Returns the container's id.
    pub fn id(&self) -> &str {
        &self.container.id
    }

    /// Judges the time since the last call. Returns what is wrong with the witness.
    pub fn judge(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let longest = std::mem::take(&mut *lock(&self.longest));
        if longest > GAP {
            wrong.push(format!("the witness did not count for {longest:.1?}"));
        }
        // The last line can be incomplete.
        let text = fs::read_to_string(&self.file).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for (line, expected) in whole.lines().zip(1..) {
            if line.parse() != Ok(expected) {
                wrong.push(format!("the witness wrote {line:?} instead of {expected}"));
                break;
            }
        }
        wrong
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

fn size(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |metadata| metadata.len())
}

/// Records the longest time without a change of the file's size. Polls, because an inotify instance would change what
/// the faults and the census see.
fn watch(file: &Path, longest: &Mutex<Duration>, end: &AtomicBool) {
    let (mut last, mut since) = (size(file), Instant::now());
    while !end.load(Ordering::Relaxed) {
        let now = size(file);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        let mut longest = lock(longest);
        *longest = since.elapsed().max(*longest);
        drop(longest);
        thread::sleep(Duration::from_millis(500));
    }
}
