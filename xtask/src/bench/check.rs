//! `cargo xtask bench --check`: compares measurements with the recorded results.

use anyhow::{Context, Result};
use husk_benchmarks::{Benchmark, Better, Measurement, Report};

use super::{file_name, page, read, results, run};
use crate::build::Profile;
use crate::ui;

/// The benchmarks whose results are compared.
const CHECKED: [Benchmark; 3] = [Benchmark::Start, Benchmark::Memory, Benchmark::Burst];
/// Options of husk-bench that make the measurements quick.
const QUICK: [&str; 4] = ["--variants", "runc,husk-boot,husk-clone", "--pods", "10"];
/// A ratio that is worse by more than this factor is an error.
const WORSE: f64 = 1.25;

/// Measures, and compares the ratios to runc with the recorded ones. Returns the exit code.
pub fn check(profile: Profile, args: Vec<String>) -> Result<u8> {
    let recorded = |benchmark: Benchmark| {
        let path = page::dir().join(file_name(benchmark));
        let name = benchmark.name();
        read(&path)?.with_context(|| {
            format!("{} does not exist: make it with `cargo xtask bench {name} --record`", path.display())
        })
    };
    let recorded = CHECKED.into_iter().map(recorded).collect::<Result<Vec<_>>>()?;
    let args = QUICK.map(str::to_owned).into_iter().chain(args).collect();
    let code = run(&CHECKED, profile, args)?;
    let mut found = Vec::new();
    for (benchmark, recorded) in CHECKED.into_iter().zip(recorded) {
        let path = results().join(file_name(benchmark));
        let measured = read(&path)?.with_context(|| format!("the run has not written {}", path.display()))?;
        found.extend(worse(&recorded, &measured));
    }
    found.iter().for_each(|line| ui::say("bench", line));
    Ok(if found.is_empty() { code } else { 1 })
}

/// Describes the ratios to runc that are worse than the recorded ones. Both reports need to have the measurement.
fn worse(recorded: &Report, measured: &Report) -> Vec<String> {
    let mut found = Vec::new();
    for Measurement { name, better, series, .. } in &measured.measurements {
        let Some(before) = recorded.measurements.iter().find(|one| one.name == *name) else { continue };
        for series in series {
            let (Some(now), Some(before)) = (series.ratio, before.ratio(&series.variant)) else { continue };
            let is_worse = match better {
                Better::Lower => now > before * WORSE,
                Better::Higher => now * WORSE < before,
            };
            if is_worse {
                let (benchmark, variant) = (&measured.benchmark, &series.variant);
                found.push(format!("{benchmark}: {name}: {variant} is {now:.2} × runc, recorded: {before:.2}"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(better: Better, husk: f64) -> Report {
        let series = [("runc", vec![2.0]), ("husk boot", vec![husk])];
        Report { measurements: vec![Measurement::new("x", "s", better, series)], ..Report::new("start") }
    }

    #[test]
    fn ratios_that_are_a_quarter_worse_are_found() {
        let lower = |husk| worse(&report(Better::Lower, 4.0), &report(Better::Lower, husk));
        assert_eq!(lower(5.0), Vec::<String>::new());
        assert_eq!(lower(5.1), ["start: x: husk boot is 2.55 × runc, recorded: 2.00"]);
        assert_eq!(lower(1.0), Vec::<String>::new());
        let higher = |husk| worse(&report(Better::Higher, 4.0), &report(Better::Higher, husk));
        assert_eq!(higher(3.3), Vec::<String>::new());
        assert_eq!(higher(3.1).len(), 1);
    }

    #[test]
    fn measurements_that_are_not_recorded_are_not_compared() {
        assert_eq!(worse(&Report::new("start"), &report(Better::Lower, 9.0)), Vec::<String>::new());
    }
}
