//! Benchmarks in the test node.
//!
//! - `husk-bench start`: wall-clock time of a container's run under runc, runsc and Husk, in one boot of the node.
//! - `husk-bench exec`: throughput of a command's output through the CRI's Exec.
//! - `husk-bench limits`: rates of each device under a rate limit.
//! - `husk-bench network`: throughput and latency of a pod's network, with vhost-net and with the VMM's data path.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use husk_config::timeline::Timeline;
use husk_e2e::bench::{MemoryUse, Series, limits, network, report, step_times};
use husk_e2e::command::{Input, Running, ctr};
use husk_e2e::cri::pod::pods_with_handler;
use husk_e2e::cri::stream::{Stream, channel};
use husk_e2e::cri::{Pod, PodContainer, call};
use husk_e2e::{BUSYBOX, node, vm};
use serde_json::json;

/// Benchmarks in the test node.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measures the wall-clock time of `ctr run --rm … true` with each runtime in turn, and the steps of Husk's starts.
    Start {
        /// Number of runs of each runtime, after one warm-up run.
        #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(5..))]
        runs: u32,
        /// Runtimes to measure.
        #[arg(long, value_delimiter = ',', default_value = "runc,runsc,husk,unjailed")]
        runtimes: Vec<String>,
        /// Output file for the Markdown table.
        #[arg(long, default_value = "/out/start.md")]
        out: PathBuf,
    },
    /// Measures the throughput of a command's output through the CRI's Exec, with runc and Husk in turn.
    Exec {
        /// Number of runs of each runtime, after one warm-up run.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
        /// Size of each run's output, in MiB.
        #[arg(long, default_value_t = 128)]
        mib: u64,
    },
    /// Measures whether the rates of each device match its rate limits. Fails if a rate differs from its limit by more
    /// than 5 %.
    Limits {
        /// Duration of each measurement, in seconds.
        #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
        seconds: u64,
    },
    /// Measures throughput, round-trip time and start-up cost of a pod's network, with vhost-net and the VMM in turn.
    Network {
        /// Number of runs with each data path, after one warm-up run.
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
        runs: u32,
        /// Amount of data to send in each direction, in MiB.
        #[arg(long, default_value_t = 64)]
        mib: usize,
        /// Number of vCPUs of each pod.
        #[arg(long, default_value_t = 1)]
        vcpus: u32,
    },
}

/// A runtime, and the `ctr` flags that select it.
struct Runtime {
    name: &'static str,
    flags: &'static [&'static str],
}

const RUNTIMES: [Runtime; 4] = [
    Runtime { name: "runc", flags: &["--runtime", "io.containerd.runc.v2"] },
    // Debian's runsc has no shim. Therefore containerd's shim for runc runs runsc.
    Runtime { name: "runsc", flags: &["--runtime", "io.containerd.runc.v2", "--runc-binary", RUNSC] },
    Runtime { name: "husk", flags: &["--runtime", "io.containerd.husk.v2"] },
    // This is a build of Husk whose VMM has no jail (feature `unjailed` of the crate `husk-vmm`).
    Runtime { name: "unjailed", flags: &["--runtime", "io.containerd.husk-unjailed.v2"] },
];

/// Path of a script that runs runsc with options that containerd's shim for runc cannot set.
const RUNSC: &str = "/run/husk-bench-runsc";

/// `--network=none` is needed because the network namespace of `ctr run` is empty: with a network, runsc refuses to
/// start in an empty network namespace. `--platform=systrap` makes runsc run without KVM, which leaves the node's KVM
/// to Husk's guests.
const RUNSC_SCRIPT: &str = "#!/bin/sh\nexec runsc --network=none --platform=systrap \"$@\"\n";

/// File to which Husk's shims append timelines during the benchmark.
const TIMELINES: &str = "/run/husk-bench-timelines";

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Start { runs, runtimes, out } => measure_starts(runs, &runtimes, &out),
        Command::Exec { runs, mib } => {
            exec(runs, mib);
            Ok(())
        }
        Command::Limits { seconds } => {
            if !limits::measure(seconds) {
                bail!("the rate of a device differs from its limit by more than 5 %");
            }
            Ok(())
        }
        Command::Network { runs, mib, vcpus } => {
            network::measure(runs, mib, vcpus);
            Ok(())
        }
    }
}

/// Creates one pod per runtime. Measures the throughput of a container's output in each pod, in alternating runs.
fn exec(runs: u32, mib: u64) {
    let mut rates = [("runc", Vec::new()), ("husk", Vec::new())];
    pods_with_handler("bench-exec", "husk", |pods| {
        let pods = ["runc", "husk"].map(|handler| pods.run_with_handler(handler, pods.config()));
        let containers = pods.each_ref().map(Pod::sleeper);
        for round in 0..=runs {
            for ((name, rates), container) in rates.iter_mut().zip(&containers) {
                let rate = exec_once(container, mib);
                if round > 0 {
                    println!("round {round}: {name} {rate:.1} MiB/s");
                    rates.push(rate);
                }
            }
        }
    });
    let [runc, husk] = rates.map(|(_, mut rates)| {
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    });
    println!(
        "\n{mib} MiB, medians of {runs} runs: runc {runc:.1} MiB/s, husk {husk:.1} MiB/s ({:.2} × runc)",
        husk / runc
    );
}

/// Returns the throughput of one run, in MiB/s.
fn exec_once(container: &PodContainer, mib: u64) -> f64 {
    let command = ["dd", "if=/dev/zero", "bs=1M", &format!("count={mib}")];
    let request = json!({ "container_id": container.id, "cmd": command, "stdout": true });
    let answer = call("Exec", &request);
    let begin = Instant::now();
    let mut stream = Stream::connect(answer["url"].as_str().unwrap());
    let mut bytes = 0;
    while let Some((from, data)) = stream.receive() {
        if from == channel::STDOUT {
            bytes += data.len() as u64;
        }
    }
    assert_eq!(bytes, mib << 20, "the command's output has a wrong number of bytes");
    mib as f64 / begin.elapsed().as_secs_f64()
}

fn measure_starts(runs: u32, runtimes: &[String], out: &Path) -> Result<()> {
    let mut chosen = Vec::new();
    for name in runtimes {
        let Some(runtime) = RUNTIMES.iter().find(|runtime| runtime.name == name) else {
            bail!("unknown runtime {name:?}: use runc, runsc, husk or unjailed");
        };
        chosen.push(runtime);
    }
    node::need_image(BUSYBOX);
    if runtimes.iter().any(|name| name == "runsc") {
        write_runsc().with_context(|| format!("failed to write {RUNSC}"))?;
    }
    let configuration = fs::read_to_string("/etc/husk/config.toml").unwrap_or_default();
    let _config = node::Config::set(&format!("{configuration}\ntimeline_log = \"{TIMELINES}\"\n"));
    let text = start(runs, &chosen)?;
    println!("\n{text}");
    if let Some(dir) = out.parent() {
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    }
    fs::write(out, text).with_context(|| format!("failed to write {}", out.display()))
}

fn write_runsc() -> std::io::Result<()> {
    fs::write(RUNSC, RUNSC_SCRIPT)?;
    fs::set_permissions(RUNSC, fs::Permissions::from_mode(0o755))
}

fn start(runs: u32, runtimes: &[&Runtime]) -> Result<String> {
    let mut series: Vec<Series> =
        runtimes.iter().map(|runtime| Series { name: runtime.name, seconds: Vec::new() }).collect();
    let mut starts = Vec::new();
    // Round 0 warms caches and is not counted.
    for round in 0..=runs {
        for (runtime, series) in runtimes.iter().zip(&mut series) {
            let began = monotonic();
            let (seconds, id) = run_once(runtime, round)?;
            if round == 0 {
                continue;
            }
            println!("round {round}: {} {seconds:.2} s", runtime.name);
            series.seconds.push(seconds);
            if runtime.name == "husk" {
                starts.push((began, timeline(&id)?));
            }
        }
    }
    let mut weights = Vec::new();
    for runtime in runtimes.iter().filter(|runtime| ["husk", "unjailed"].contains(&runtime.name)) {
        weights.push((runtime.name, measure_memory(runtime)?));
    }
    Ok(report(&series, &step_times(&starts), &weights))
}

/// Runs one container to its end. Returns the wall-clock time in seconds and the container id.
fn run_once(runtime: &Runtime, round: u32) -> Result<(f64, String)> {
    let id = format!("bench-{}-{round}", runtime.name);
    let mut args = vec!["run", "--rm"];
    args.extend(runtime.flags);
    args.extend([BUSYBOX, &id, "true"]);
    let output = Running::start(ctr(&args), Input::Null).wait();
    if output.code != 0 {
        bail!("failed to run a container with {}\n{}", runtime.name, output.describe());
    }
    Ok((output.took.as_secs_f64(), id))
}

/// Returns the timeline of sandbox `id`. Waits for the timeline, because the shim may write it after `ctr` has exited.
fn timeline(id: &str) -> Result<Timeline> {
    let find = || {
        let text = fs::read_to_string(Path::new(TIMELINES)).ok()?;
        Timeline::from_lines(&text).ok()?.into_iter().rev().find(|timeline| timeline.sandbox == id)
    };
    node::eventually(Duration::from_secs(10), find).with_context(|| format!("no timeline of {id} in {TIMELINES}"))
}

/// Measures the memory use of an idle container that runs with `runtime`, which has to be a build of Husk.
fn measure_memory(runtime: &Runtime) -> Result<MemoryUse> {
    let id = "bench-weight";
    let mut args = vec!["run", "--rm"];
    args.extend(runtime.flags);
    args.extend([BUSYBOX, id, "sh", "-c", "echo up; exec sleep 1000"]);
    let mut running = Running::start(ctr(&args), Input::Null);
    running.wait_for("up");
    let [vmm] = vm::vmm_pids_of(id)[..] else { bail!("expected exactly one VMM of {id}") };
    let [shim] = vm::shim_pids_of(id)[..] else { bail!("expected exactly one shim of {id}") };
    let [launcher] = vm::launcher_pids_of(id)[..] else { bail!("expected exactly one launcher of {id}") };
    let (vmm, shim, launcher) = (vm::memory(vmm)?, vm::memory(shim)?, vm::memory(launcher)?);
    Running::start(ctr(&["tasks", "kill", "-s", "KILL", id]), Input::Null).wait();
    running.wait();
    let all = |memory: vm::Memory| memory.other + memory.guest;
    Ok(MemoryUse { vmm: vmm.other, guest: vmm.guest, shim: all(shim), launcher: all(launcher) })
}

/// Returns the current time of CLOCK_MONOTONIC, the clock of the timelines, in ns.
fn monotonic() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("failed to read CLOCK_MONOTONIC");
    u64::try_from(time.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
}
