//! Memory that the node uses for each idle pod.

use std::thread;
use std::time::Duration;

use husk_benchmarks::Report;
use serde_json::Value;

use super::variant::names;
use super::{ABSENT, Options, Quantity, Variant, interleave};
use crate::cri::pod::Pod;
use crate::cri::{Pods, pods_with_handler};
use crate::node;
use crate::vm;

/// How long the pods are idle before they are measured.
const IDLE: Duration = Duration::from_secs(10);
/// The limit of pods that have one.
const LIMIT: i64 = 128 << 20;

/// Measures pods of each variant, without and with a memory limit.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    let runs = options.runs.unwrap_or(3);
    let mut report = Report::new("memory").with("runs", runs).with("pods", options.pods.clone()).with("limit", LIMIT);
    for limit in [None, Some(LIMIT)] {
        pods_with_handler("bench-memory", "husk", |pods| {
            for &count in &options.pods {
                let quantities = quantities(count, limit);
                interleave(&mut report, runs, &names(&Variant::COMPARED), &quantities, |index, round| {
                    // The warm-up needs only one pod.
                    let count = if round == 0 { 1 } else { count };
                    measure_pods(pods, Variant::COMPARED[index], count, limit)
                });
            }
        });
    }
    report
}

fn quantities(count: usize, limit: Option<i64>) -> Vec<Quantity> {
    let limit = if limit.is_some() { "128 MiB limit" } else { "no limit" };
    let name = |what: &str| format!("{what}, pods: {count}, {limit}");
    [
        "decrease of MemAvailable",
        "PSS of shim and launcher",
        "PSS of VMM, without guest memory",
        "guest memory, anonymous",
        "guest memory, shared",
        "page tables",
        "page tables of KVM",
    ]
    .map(|what| Quantity::lower(name(what), "MiB"))
    .to_vec()
}

/// Returns the configuration of a pod with this memory limit.
fn config(pods: &Pods, limit: Option<i64>) -> Value {
    let mut config = pods.config();
    if let Some(limit) = limit {
        config["linux"]["resources"]["memory_limit_in_bytes"] = limit.into();
    }
    config
}

/// Runs `count` pods, and returns the value of each quantity for one pod, in MiB.
fn measure_pods(pods: &Pods, variant: Variant, count: usize, limit: Option<i64>) -> Vec<f64> {
    let _config = variant.configure();
    node::wait_for_stable_memory();
    let before = Node::read();
    let made: Vec<Pod> = (0..count)
        .map(|_| {
            let pod = pods.run_with_handler(variant.handler(), config(pods, limit));
            let mut container = pod.sh("trap 'exit 0' TERM; sleep 100000 & wait");
            if let Some(limit) = limit {
                container["linux"]["resources"]["memory_limit_in_bytes"] = limit.into();
            }
            pod.start(&container);
            pod
        })
        .collect();
    thread::sleep(IDLE);
    let after = Node::read();
    let processes: Vec<[f64; 4]> = made.iter().map(|pod| processes(variant, &pod.id)).collect();
    made.iter().for_each(Pod::remove);
    let mib = |kib: f64| kib / 1024.0 / count as f64;
    let total = |index: usize| mib(processes.iter().map(|pod| pod[index]).sum());
    vec![
        mib(before.available - after.available),
        total(0),
        total(1),
        total(2),
        total(3),
        mib(after.page_tables - before.page_tables),
        mib(after.kvm_tables - before.kvm_tables),
    ]
}

/// Returns the memory of a pod's processes in KiB: shim and launcher, VMM, anonymous guest memory, shared guest memory.
fn processes(variant: Variant, id: &str) -> [f64; 4] {
    let memory = |pids: Vec<i32>| pids.into_iter().map(|pid| vm::memory(pid).unwrap()).collect::<Vec<_>>();
    let all = |memory: &[vm::Memory]| memory.iter().map(|one| one.other + one.guest).sum::<u64>() as f64;
    if !variant.is_husk() {
        return [all(&memory(vm::runc_shim_pids_of(id))), ABSENT, ABSENT, ABSENT];
    }
    let shim = memory([vm::shim_pids_of(id), vm::launcher_pids_of(id)].concat());
    let [vmm] = memory(vm::vmm_pids_of(id))[..] else { panic!("expected exactly one VMM of {id}") };
    let shared = vmm.guest.saturating_sub(vmm.guest_anonymous);
    [all(&shim), vmm.other as f64, vmm.guest_anonymous as f64, shared as f64]
}

/// Memory of the node, in KiB.
struct Node {
    available: f64,
    page_tables: f64,
    kvm_tables: f64,
}

impl Node {
    /// Reads the node's memory, after its caches were dropped.
    fn read() -> Self {
        node::drop_caches();
        let kib = |key: &str| node::meminfo(key) / 1024.0;
        Self { available: kib("MemAvailable"), page_tables: kib("PageTables"), kvm_tables: kib("SecPageTables") }
    }
}
