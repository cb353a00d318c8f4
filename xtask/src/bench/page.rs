//! The generated parts of `docs/performance.md`: tables and charts of the recorded results.
//!
//! A generated part begins with the line `<!-- bench: NAME -->` and ends with the line `<!-- end -->`. The text around
//! the parts is written by hand.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use husk_benchmarks::{Benchmark, Report, markdown};
use serde_json::Value;

use super::{chart, file_name, read, results};
use crate::{files, paths, ui};

const BEGIN: &str = "<!-- bench: ";
const BEGIN_END: &str = " -->";
const END: &str = "<!-- end -->";

/// Returns the directory of the recorded results and of the charts.
pub fn dir() -> PathBuf {
    paths::root().join("docs/performance")
}

fn page() -> PathBuf {
    paths::root().join("docs/performance.md")
}

/// Copies the results of the last runs to the recorded results, and generates the page and the charts.
pub fn record(benchmarks: &[Benchmark]) -> Result<()> {
    files::make_dir(&dir())?;
    for benchmark in benchmarks {
        let Some(report) = read(&results().join(file_name(*benchmark)))? else { continue };
        if let Some(failure) = report.failures.first() {
            bail!("failed to record {}: the benchmark failed: {failure}", report.benchmark);
        }
        let text = serde_json::to_string_pretty(&report)? + "\n";
        write(&dir().join(file_name(*benchmark)), &text)?;
        ui::say("bench", format!("recorded {}", report.benchmark));
    }
    let before = fs::read_to_string(page()).with_context(|| format!("failed to read {}", page().display()))?;
    let (text, charts) = generate(&before, &dir())?;
    write(&page(), &text)?;
    charts.iter().try_for_each(|(name, svg)| write(&dir().join(name), svg))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}

/// The names and contents of charts.
type Charts = Vec<(String, String)>;

/// Replaces the generated parts of the page. A part without recorded results stays as it is.
fn generate(page: &str, dir: &Path) -> Result<(String, Charts)> {
    let (mut text, mut charts, mut lines) = (String::new(), Vec::new(), page.lines());
    while let Some(line) = lines.next() {
        text += &format!("{line}\n");
        let Some(name) = line.strip_prefix(BEGIN).and_then(|rest| rest.strip_suffix(BEGIN_END)) else { continue };
        let mut old = String::new();
        loop {
            match lines.next() {
                Some(END) => break,
                Some(line) => old += &format!("{line}\n"),
                None => bail!("failed to find the end of the part {name}: expected the line {END}"),
            }
        }
        match read(&dir.join(format!("{name}.json")))? {
            Some(report) => {
                let svg = chart::svg(&report)?;
                text += &part(&report, svg.is_some());
                charts.extend(svg.map(|svg| (format!("{name}.svg"), svg)));
            }
            None => text += &old,
        }
        text += &format!("{END}\n");
    }
    Ok((text, charts))
}

/// Returns the generated part for a report.
fn part(report: &Report, has_chart: bool) -> String {
    let name = &report.benchmark;
    let parameters = report.parameters.iter().map(|(name, value)| {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        format!("{name} {value}")
    });
    let conditions = format!("Conditions: {}.", parameters.collect::<Vec<_>>().join("; "));
    let chart = if has_chart { format!("![chart of {name}](performance/{name}.svg)\n\n") } else { String::new() };
    format!("{chart}{conditions}\n\n{}", markdown(report))
}

#[cfg(test)]
mod tests {
    use husk_benchmarks::{Better, Measurement};

    use super::*;

    #[test]
    fn parts_with_results_are_generated_and_the_rest_stays() {
        let dir = tempfile::tempdir().unwrap();
        let series = [("runc", vec![2.0]), ("husk boot", vec![3.0])];
        let report = Report {
            measurements: vec![Measurement::new("start", "s", Better::Lower, series)],
            ..Report::new("start").with("runs", 7).with("node", "emulated")
        };
        fs::write(dir.path().join("start.json"), serde_json::to_string(&report).unwrap()).unwrap();
        let page = "one\n<!-- bench: start -->\nold\n<!-- end -->\ntwo\n<!-- bench: net -->\nkept\n<!-- end -->\n";
        let (text, charts) = generate(page, dir.path()).unwrap();
        assert!(
            text.starts_with(
                "one\n<!-- bench: start -->\n![chart of start](performance/start.svg)\n\n\
                 Conditions: node emulated; runs 7.\n\n| start | median |"
            ),
            "{text}"
        );
        assert!(text.ends_with("1.50 |\n<!-- end -->\ntwo\n<!-- bench: net -->\nkept\n<!-- end -->\n"), "{text}");
        assert_eq!(charts.len(), 1);
        assert_eq!(generate(&text, dir.path()).unwrap().0, text);
        assert!(generate("<!-- bench: net -->\nkept\n", dir.path()).is_err());
    }

    #[test]
    fn page_and_charts_are_those_of_the_recorded_results() {
        let before = fs::read_to_string(super::page()).unwrap();
        let (text, charts) = generate(&before, &dir()).unwrap();
        assert!(text == before, "docs/performance.md is not current: run `cargo xtask bench --record`");
        for (name, svg) in charts {
            assert!(fs::read_to_string(dir().join(&name)).unwrap() == svg, "{name} is not current");
        }
    }
}
