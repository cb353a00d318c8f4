//! Starts many pods through the CRI, in batches, and measures after each batch.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use husk_base::sync::lock;
use husk_benchmarks::median;
use serde_json::{Value, json};

use super::line::LEAST;
use super::{Outcome, Series, limits, sample};
use crate::cri::pod::KUBELET;
use crate::cri::{Pods, Status, try_call, try_call_within};
use crate::{BUSYBOX, grpc};

/// Time limit of one request. Several pods start at the same time on an emulated node.
const LIMIT: Duration = Duration::from_secs(300);
/// Time between a batch and its sample. Idle threads of the shims end after 10 s.
const SETTLE: Duration = Duration::from_secs(12);

/// How many pods are started.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Number of pods.
    pub pods: u32,
    /// Number of pods of a batch.
    pub batch: u32,
    /// Number of pods that start at the same time.
    pub at_once: usize,
}

/// Starts the pods, measures, and removes the pods.
///
/// # Errors
/// If there are too few batches, or if a pod cannot be started or removed. The pods that run are then left to `pods`.
pub fn run(pods: &Pods, options: Options) -> Result<Outcome, String> {
    let samples = options.pods.div_ceil(options.batch.max(1)) as usize;
    if samples < LEAST {
        return Err(format!("{samples} batches are too few to find non-linear growth; it takes {LEAST}"));
    }
    let mut series = Series::default();
    let mut read = Vec::new();
    let mut started = 0;
    while started < options.pods {
        let count = options.batch.clamp(1, options.pods - started);
        let configs: Vec<Value> = (0..count).map(|_| pods.config()).collect();
        let (dir, handler) = (pods.dir(), pods.handler());
        let seconds = at_once(options.at_once, &configs, |config| start(dir, handler, config))?;
        started += count;
        thread::sleep(SETTLE);
        let median = median(&seconds);
        series.add(started, sample::take(), median);
        println!("{started} pods run, a start took {median:.1} s");
        read = limits::read();
    }
    let outcome = series.judge(read);
    let listed = try_call("ListPodSandbox", &json!({})).map_err(|status| status.to_string())?;
    let ids: Vec<Value> = listed["items"].as_array().into_iter().flatten().map(|pod| pod["id"].clone()).collect();
    let begin = Instant::now();
    at_once(options.at_once, &ids, |id| {
        request("RemovePodSandbox", &json!({ "pod_sandbox_id": id })).map(drop).map_err(|status| status.to_string())
    })?;
    println!("{} pods removed in {:.0} s", ids.len(), begin.elapsed().as_secs_f64());
    Ok(outcome)
}

/// Number of times that the start of a pod is repeated.
const RETRIES: u32 = 3;

fn request(method: &str, request: &Value) -> Result<Value, Status> {
    try_call_within(LIMIT, "RuntimeService", method, request)
}

/// Runs `work` for each item on several threads. Returns the results in any order, or the first error.
fn at_once<I: Sync, T: Send>(
    threads: usize,
    items: &[I],
    work: impl Fn(&I) -> Result<T, String> + Sync,
) -> Result<Vec<T>, String> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = work(item);
                    lock(&results).push(result);
                }
                grpc::disconnect();
            });
        }
    });
    results.into_inner().unwrap_or_default().into_iter().collect()
}

/// Starts a pod with one container, which has a service account's token as most pods have. Returns the time in seconds.
fn start(dir: &Path, handler: &str, config: &Value) -> Result<f64, String> {
    let name = config["metadata"]["name"].as_str().unwrap_or_default();
    let uid = config["metadata"]["uid"].as_str().unwrap_or_default();
    let token = dir.join(uid).join("volumes/kubernetes.io~projected/token");
    fs::create_dir_all(&token)
        .and_then(|()| fs::write(token.join("token"), name))
        .map_err(|error| error.to_string())?;
    let failed = |status: Status| format!("{name} cannot be started: {status}");
    let mut config = config.clone();
    let mut begin = Instant::now();
    let mut run = run_sandbox(handler, &config);
    for attempt in 1..=RETRIES {
        let Err(status) = &run else { break };
        if !is_interrupted_plugin(&status.to_string()) {
            break;
        }
        println!("{name} is started again: {status}");
        config["metadata"]["attempt"] = attempt.into();
        begin = Instant::now();
        run = run_sandbox(handler, &config);
    }
    let run = run.map_err(failed)?;
    let container = json!({
        "metadata": { "name": "main", "attempt": 0 },
        "image": { "image": BUSYBOX },
        "command": ["sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"],
        "log_path": "main.log",
        "mounts": [{ "host_path": token.to_string_lossy(), "container_path": "/token", "readonly": true }],
        "linux": { "resources": {}, "security_context": KUBELET.clone() },
    });
    let create = json!({ "pod_sandbox_id": run["pod_sandbox_id"], "config": container, "sandbox_config": config });
    let created = request("CreateContainer", &create).map_err(failed)?;
    request("StartContainer", &json!({ "container_id": created["container_id"] })).map_err(failed)?;
    Ok(begin.elapsed().as_secs_f64())
}

fn run_sandbox(handler: &str, config: &Value) -> Result<Value, Status> {
    request("RunPodSandbox", &json!({ "config": config, "runtime_handler": handler }))
}

/// Returns whether a pod cannot be started because a CNI plugin has read a list from the kernel while the list changed
/// (NLM_F_DUMP_INTR of netlink(7)). The plugins do not repeat the request. The kubelet starts such a pod
/// again.
fn is_interrupted_plugin(error: &str) -> bool {
    error.contains("failed to setup network for sandbox") && error.contains("interrupted system call")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_of_a_plugin_are_repeated() {
        let error = "failed to setup network for sandbox \"af44\": plugin type=\"bridge\" failed (add): failed to set \
                     bridge addr: could not get list of IP addresses: interrupted system call";
        assert!(is_interrupted_plugin(error));
        assert!(!is_interrupted_plugin("failed to create shim task: interrupted system call"));
    }

    #[test]
    fn at_once_handles_each_item_once() {
        let items: Vec<u32> = (0..100).collect();
        let mut results = at_once(8, &items, |item| Ok(*item)).unwrap();
        results.sort_unstable();
        assert_eq!(results, items);
        assert!(at_once(2, &items, |item| if *item == 50 { Err("50".to_owned()) } else { Ok(()) }).is_err());
    }
}
