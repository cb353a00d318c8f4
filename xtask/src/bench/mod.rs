//! `cargo xtask bench …`: runs the benchmarks in the test node, records their results, and compares results with the
//! recorded ones.

mod chart;
mod check;
mod page;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use husk_benchmarks::{Benchmark, Report};

use crate::build::{self, Profile};
use crate::node::kvm::{self, Verdict};
use crate::node::{self, Add, Crashed, Limits, Line, Machine, Run, Seat};
use crate::{cmd, dist, files, paths, setup, ui};

/// The node's memory in MiB. It is enough for 100 idle pods.
const MEMORY: u32 = 12288;
/// Time limits: a limit for the whole run, and a limit for the time without output.
const LIMITS: Limits = Limits::secs(6 * 3600, 3600);
/// Name of the program that runs in the node.
const PROGRAM: &str = "husk-bench";
/// The choice of all benchmarks.
const ALL: &str = "all";

/// The options of `cargo xtask bench`.
#[derive(Args)]
pub struct Options {
    /// The benchmarks. They run in one boot of the node.
    #[arg(value_parser = choices(), required_unless_present_any = ["record", "check"])]
    benchmarks: Vec<Choice>,
    /// Build the programs in the quick profile.
    #[arg(long)]
    quick: bool,
    /// The number of runs of each variant, after one warm-up run. Default: depends on the benchmark.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Write the results to docs/performance and docs/performance.md. Without BENCHMARKS, write the results of earlier
    /// runs.
    #[arg(long)]
    record: bool,
    /// Run quick measurements of start, memory and burst. Fail if a ratio to runc is 25 % worse than the recorded one.
    #[arg(long, conflicts_with_all = ["benchmarks", "record", "args"])]
    check: bool,
    /// Further options of husk-bench.
    #[arg(last = true)]
    args: Vec<String>,
}

/// A value of the option for benchmarks.
#[derive(Clone, Copy)]
enum Choice {
    /// All benchmarks that compare something.
    All,
    One(Benchmark),
}

fn choices() -> impl TypedValueParser<Value = Choice> {
    let all = PossibleValue::new(ALL).help("All benchmarks except limits");
    let values = Benchmark::value_variants().iter().filter_map(ValueEnum::to_possible_value);
    PossibleValuesParser::new(values.chain([all]))
        .try_map(|name| if name == ALL { Ok(Choice::All) } else { Benchmark::from_str(&name, false).map(Choice::One) })
}

/// Runs the benchmarks. Returns the exit code.
pub fn bench(options: &Options) -> Result<u8> {
    let runs = options.runs.map(|runs| ["--runs".to_owned(), runs.to_string()]);
    let args = [runs.into_iter().flatten().collect(), options.args.clone()].concat();
    let profile = Profile::quick(options.quick);
    if options.check {
        return check::check(profile, args);
    }
    let mut benchmarks = Vec::new();
    for choice in &options.benchmarks {
        match choice {
            Choice::All => benchmarks.extend(Benchmark::COMPARISONS),
            Choice::One(one) => benchmarks.push(*one),
        }
    }
    benchmarks.sort();
    benchmarks.dedup();
    let code = if benchmarks.is_empty() { 0 } else { run(&benchmarks, profile, args)? };
    if options.record {
        let all = Benchmark::value_variants();
        page::record(if benchmarks.is_empty() { all } else { &benchmarks })?;
    }
    Ok(code)
}

/// Runs the benchmarks in one boot of the node. Returns the exit code.
fn run(benchmarks: &[Benchmark], profile: Profile, args: Vec<String>) -> Result<u8> {
    setup::setup()?;
    dist::dist(profile)?;
    let programs = build::programs(&["husk-e2e"], Profile::Node)?;
    let program = build::find(&programs, &[PROGRAM])?;
    let mut add = node::images()?;
    add.push(Add::new(&program.path, format!("/husk/{PROGRAM}")));
    // The variants are an option of husk-bench. All variants are its default.
    let variants = args.iter().skip_while(|arg| *arg != "--variants").nth(1);
    if benchmarks.contains(&Benchmark::Start) && variants.is_none_or(|list| list.contains("unjailed")) {
        let shim = build::unjailed_shim(profile)?;
        add.push(Add::new(shim.path, "/usr/local/bin/containerd-shim-husk-unjailed-v2"));
    }
    let conditions = conditions(profile)?;
    let conditions = conditions.iter().flat_map(|(name, value)| ["--condition".to_owned(), format!("{name}={value}")]);
    files::remove(&results())?;
    files::make_dir(&results())?;
    let seat = Seat::default();
    let plan = Run {
        script: paths::root().join("tests/node/bench.sh"),
        args: benchmarks.iter().map(|one| one.name()).chain(conditions).chain(args).collect(),
        env: vec![("HUSK_IMAGES".to_owned(), node::IMAGES.to_owned())],
        add,
        imported: true,
        machine: Machine { memory: MEMORY, ..Machine::default() },
        containerd: Line::One,
        limits: LIMITS,
        seat,
    };
    let mut end = node::run(&plan);
    if let Err(error) = &end
        && error.is::<Crashed>()
    {
        // The emulator has defects that crash the node's kernel.
        ui::say("bench", format!("running the benchmarks again after a crash of the node: {error:#}"));
        end = node::run(&plan);
    }
    let code = end?;
    for benchmark in benchmarks {
        seat.keep(&file_name(*benchmark), &results().join(file_name(*benchmark)))?;
    }
    ui::say("bench", format!("results are in {}", results().display()));
    Ok(code)
}

/// Returns the conditions of the measurements.
fn conditions(profile: Profile) -> Result<[(&'static str, String); 3]> {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty", "--exclude=*"]).current_dir(paths::root());
    let node = match kvm::judge() {
        Verdict::Usable { .. } => "KVM",
        Verdict::Not(_) => "emulated",
    };
    let commit = cmd::output(&mut git)?.trim().to_owned();
    Ok([("profile", profile.name().to_owned()), ("node", node.to_owned()), ("commit", commit)])
}

/// Reads the results of a benchmark. Returns `None` if the file does not exist.
fn read(path: &Path) -> Result<Option<Report>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_json::from_str(&text).map(Some).with_context(|| format!("failed to parse {}", path.display()))
}

/// Returns the directory of the results.
fn results() -> PathBuf {
    paths::state().join("bench")
}

/// Returns the name of the file with the results of a benchmark.
fn file_name(benchmark: Benchmark) -> String {
    format!("{}.json", benchmark.name())
}
