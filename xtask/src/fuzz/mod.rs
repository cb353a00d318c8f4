//! `cargo xtask fuzz`: runs the fuzz targets of tests/fuzz under libFuzzer, and writes a table of the results.

mod corpus;
mod report;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use husk_base::sync::{into_inner, lock};

use crate::build::{self, TARGET, cargo};
use crate::{cmd, paths, ui};
use report::Row;

/// The environment variable that tells the program of tests/fuzz which target to run.
const TARGET_VARIABLE: &str = "HUSK_FUZZ_TARGET";
/// Flags that make LLVM instrument all Rust crates for libFuzzer. cargo-fuzz uses the same flags.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares";
/// Maximum resident memory of a target without a sanitizer, and maximum size of one allocation, both in MiB.
const MEMORY_MIB: u32 = 1024;
/// Additional memory of a target with AddressSanitizer, in MiB. The sanitizer keeps freed memory for a while.
const SANITIZER_MIB: u32 = 1024;
/// Maximum number of seconds for one input.
const INPUT_SECONDS: u32 = 25;

/// The options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct Options {
    /// Run each target for this many seconds.
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Run each target with this many inputs, without a time limit.
    #[arg(long, value_name = "N", conflicts_with = "seconds")]
    runs: Option<u64>,
    /// Build with AddressSanitizer and the nightly toolchain. Default: build with the toolchain that runs xtask, and
    /// without a sanitizer.
    #[arg(long)]
    sanitizer: bool,
    /// The number of targets that run at the same time. Default: the number of processors.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// After the runs, merge libFuzzer's new inputs into the corpora in tests/fuzz/corpus. Then minimize these corpora.
    #[arg(long)]
    minimize: bool,
    /// The targets to run. Default: all targets.
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
}

/// The directories of a target.
struct Dirs {
    /// The corpus to which libFuzzer adds inputs.
    found: PathBuf,
    /// The corpus in the repository.
    kept: PathBuf,
    /// The inputs that made the target fail.
    artifacts: PathBuf,
}

impl Dirs {
    fn new(target: &str) -> Result<Self> {
        let state = paths::state().join("fuzz");
        let dirs = Self {
            found: state.join("corpus").join(target),
            kept: paths::root().join("tests/fuzz/corpus").join(target),
            artifacts: state.join("artifacts").join(target),
        };
        for dir in [&dirs.found, &dirs.kept, &dirs.artifacts] {
            fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        Ok(dirs)
    }
}

/// Runs the targets. Returns the exit code, which is 1 if a target found a defect.
pub fn fuzz(options: &Options) -> Result<u8> {
    let program = program(options.sanitizer)?;
    let all = cmd::output(Command::new(&program).env_remove(TARGET_VARIABLE))?;
    let all: Vec<&str> = all.lines().collect();
    if let Some(unknown) = options.targets.iter().find(|target| !all.contains(&target.as_str())) {
        bail!("there is no fuzz target {unknown}; the targets are {}", all.join(", "));
    }
    let chosen: Vec<&str> =
        if options.targets.is_empty() { all } else { options.targets.iter().map(String::as_str).collect() };
    let rows = run_all(&program, &chosen, options)?;
    if options.minimize {
        for target in &chosen {
            corpus::minimize(&program, target, &Dirs::new(target)?)?;
        }
    }
    print!("{}", report::table(&rows));
    Ok(u8::from(rows.iter().any(|row| row.failure.is_some())))
}

/// Builds the program that contains all targets.
fn program(sanitizer: bool) -> Result<PathBuf> {
    let (mut command, flags, dir) = if sanitizer {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo"]).current_dir(paths::root()).env_remove("CARGO");
        (command, format!("{COVERAGE} -Zsanitizer=address"), "address")
    } else {
        (cargo(), COVERAGE.to_owned(), "plain")
    };
    // Without `--target`, Cargo passes RUSTFLAGS to build scripts and procedural macros too.
    command.args(["build", "--package", "husk-fuzz", "--features", "libfuzzer", "--profile", "fuzz", "--locked"]);
    command.args(["--target", TARGET, "--target-dir"]).arg(paths::state().join("fuzz").join(dir));
    command.env("RUSTFLAGS", flags);
    ui::say("fuzz", if sanitizer { "build with AddressSanitizer" } else { "build without a sanitizer" });
    let programs = build::run(command, false)?;
    Ok(build::find(&programs, &["husk-fuzz"])?.path.clone())
}

/// Runs targets in parallel, and writes the table each time a target has ended. Returns a row for each target.
fn run_all(program: &Path, targets: &[&str], options: &Options) -> Result<Vec<Row>> {
    let waiting = Mutex::new(targets.iter().copied().collect::<VecDeque<_>>());
    let rows = Mutex::new(Vec::new());
    let next = || lock(&waiting).pop_front();
    let work = || -> Result<()> {
        while let Some(target) = next() {
            ui::say("fuzz", format!("{target}: started"));
            let row = run(program, target, options)?;
            ui::say("fuzz", format!("{target}: {row}"));
            let mut rows = lock(&rows);
            rows.push(row);
            rows.sort_by(|a: &Row, b: &Row| a.target.cmp(&b.target));
            report::write(&rows)?;
        }
        Ok(())
    };
    let jobs = options.jobs.unwrap_or_else(cmd::processors).clamp(1, targets.len().max(1));
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| bail!("a thread that runs fuzz targets panicked")))
    })?;
    Ok(into_inner(rows))
}

/// Runs a target for the time or the number of inputs in `options`, or until the target finds a defect.
fn run(program: &Path, target: &str, options: &Options) -> Result<Row> {
    let dirs = Dirs::new(target)?;
    let memory = MEMORY_MIB + if options.sanitizer { SANITIZER_MIB } else { 0 };
    let mut command = command(program, target);
    command.args(match options.runs {
        Some(runs) => [format!("-runs={runs}"), "-max_total_time=0".to_owned()],
        None => ["-runs=-1".to_owned(), format!("-max_total_time={}", options.seconds)],
    });
    command.args(["-print_final_stats=1".to_owned(), format!("-timeout={INPUT_SECONDS}")]);
    command.args([format!("-rss_limit_mb={memory}"), format!("-malloc_limit_mb={MEMORY_MIB}")]);
    command.arg(format!("-artifact_prefix={}/", dirs.artifacts.display()));
    let dictionary = paths::root().join("tests/fuzz/dictionaries").join(target);
    if dictionary.exists() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    command.args([&dirs.found, &dirs.kept]);
    let begin = Instant::now();
    let (success, log) = logged(&mut command, &format!("fuzz-{target}"))?;
    Ok(Row::new(target, begin.elapsed(), success, &log))
}

/// Returns a command that runs a target.
fn command(program: &Path, target: &str) -> Command {
    let mut command = Command::new(program);
    // A leak is not a defect here, because the process keeps its threads and statics until it exits.
    command.env(TARGET_VARIABLE, target).env("ASAN_OPTIONS", "detect_leaks=0").stdin(Stdio::null());
    command
}

/// Runs a command, and writes the command's output to a log file. Returns whether the command succeeded, and the
/// output.
fn logged(command: &mut Command, log: &str) -> Result<(bool, String)> {
    let path = cmd::log_path(log)?;
    let file = File::create(&path).with_context(|| format!("failed to write {}", path.display()))?;
    let status = command.stdout(file.try_clone()?).stderr(file).status().context("failed to start a fuzz target")?;
    let text = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
    Ok((status.success(), String::from_utf8_lossy(&text).into_owned()))
}
