//! Runs benchmarks in the test node. Each benchmark prints its results as Markdown, and writes them to `/out/NAME.json`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::{fs, io};

use clap::Parser;
use husk_benchmarks::{Benchmark, Report, markdown};
use husk_e2e::bench::{
    Options, burst, density, exec, give_back, guest_memory, io_meta, io_seq, limits, memory, net, restore, sandbox,
    start,
};
use husk_e2e::template::Templates;

/// Runs benchmarks in the test node.
#[derive(Parser)]
struct Cli {
    /// The benchmarks.
    #[arg(value_enum, required = true)]
    benchmarks: Vec<Benchmark>,
    /// A condition of the measurements, for the results.
    #[arg(long = "condition", value_name = "NAME=VALUE", value_parser = condition)]
    conditions: Vec<(String, String)>,
    #[command(flatten)]
    options: Options,
}

fn condition(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    let Cli { benchmarks, conditions, options } = Cli::parse();
    // The template is made before the measurements. Husk uses it only where a benchmark says so.
    let _templates = benchmarks.iter().any(|one| *one != Benchmark::Limits).then(Templates::build);
    let mut failed = Vec::new();
    for benchmark in benchmarks {
        // A panic ends only this benchmark. The panic has been printed.
        let passed = catch_unwind(AssertUnwindSafe(|| run(benchmark, &options, &conditions))).unwrap_or(false);
        if !passed {
            failed.push(benchmark.name());
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("failed: {}", failed.join(", "));
    ExitCode::FAILURE
}

/// Runs a benchmark. Returns whether it passed.
fn run(benchmark: Benchmark, options: &Options, conditions: &[(String, String)]) -> bool {
    let measure = match benchmark {
        Benchmark::Start => start::measure,
        Benchmark::Sandbox => sandbox::measure,
        Benchmark::Restore => restore::measure,
        Benchmark::Memory => memory::measure,
        Benchmark::GuestMemory => guest_memory::measure,
        Benchmark::Density => density::measure,
        Benchmark::Burst => burst::measure,
        Benchmark::IoMeta => io_meta::measure,
        Benchmark::IoSeq => io_seq::measure,
        Benchmark::Net => net::measure,
        Benchmark::GiveBack => give_back::measure,
        Benchmark::Exec => exec::measure,
        Benchmark::Limits => limits::measure,
    };
    let mut report = measure(options);
    for (name, value) in conditions {
        report = report.with(name, value.as_str());
    }
    println!("\n# {}\n\n{}", benchmark.name(), markdown(&report));
    report.failures.iter().for_each(|failure| println!("{} failed: {failure}", benchmark.name()));
    let written = write(&report);
    if let Err(error) = &written {
        eprintln!("failed to write /out/{}.json: {error}", report.benchmark);
    }
    report.failures.is_empty() && written.is_ok()
}

fn write(report: &Report) -> io::Result<()> {
    fs::create_dir_all("/out")?;
    let mut text = serde_json::to_string_pretty(report)?;
    text.push('\n');
    fs::write(format!("/out/{}.json", report.benchmark), text)
}
