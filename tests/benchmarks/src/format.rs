//! Formats the results of a benchmark as Markdown.

use std::fmt::Write as _;

use crate::report::{Measurement, Report, Series, Table};

/// Stands for a value that does not exist.
const NONE: &str = "–";

/// Formats a number with about three significant digits.
pub fn figure(value: f64) -> String {
    let digits = match value.abs() {
        100.0.. => 0,
        10.0.. => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

/// Formats the results as Markdown: tables and sentences.
pub fn markdown(report: &Report) -> String {
    let mut parts = Vec::new();
    match &report.measurements[..] {
        [] => {}
        [only] => parts.push(table(&details(only))),
        several => parts.push(table(&overview(several))),
    }
    parts.extend(report.notes.iter().map(|note| format!("{note}\n")));
    parts.extend(report.tables.iter().map(table));
    parts.join("\n")
}

/// Returns a table with one row for each variant.
fn details(measurement: &Measurement) -> Table {
    let Measurement { name, unit, series, .. } = measurement;
    let columns = [name.as_str(), "median", "lowest", "highest", "runs", "× runc"];
    let row = |Series { variant, values, median, ratio }: &Series| {
        let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let with_unit = |value| format!("{} {unit}", figure(value));
        let ratio = ratio.map_or_else(|| NONE.to_owned(), |ratio| format!("{ratio:.2}"));
        let numbers = [*median, lowest, highest].map(with_unit);
        [vec![variant.clone()], numbers.to_vec(), vec![values.len().to_string(), ratio]].concat()
    };
    Table { columns: columns.map(str::to_owned).to_vec(), rows: series.iter().map(row).collect() }
}

/// Returns a table with one row for each measurement. A cell has the median, and the ratio to runc in parentheses.
fn overview(measurements: &[Measurement]) -> Table {
    let mut variants: Vec<&str> = Vec::new();
    for series in measurements.iter().flat_map(|one| &one.series) {
        if !variants.contains(&series.variant.as_str()) {
            variants.push(&series.variant);
        }
    }
    let cell = |measurement: &Measurement, variant: &str| {
        let Some(series) = measurement.series.iter().find(|one| one.variant == variant) else { return NONE.to_owned() };
        let ratio = series.ratio.filter(|_| variant != "runc").map(|ratio| format!(" ({ratio:.2})"));
        figure(series.median) + &ratio.unwrap_or_default()
    };
    let row = |measurement: &Measurement| {
        let first = [measurement.name.clone(), measurement.unit.clone()];
        first.into_iter().chain(variants.iter().map(|variant| cell(measurement, variant))).collect()
    };
    let titles = variants
        .iter()
        .map(|&variant| if variant == "runc" { variant.to_owned() } else { format!("{variant} (× runc)") });
    let has_ratios = measurements.iter().flat_map(|one| &one.series).any(|series| series.ratio.is_some());
    let titles: Vec<String> =
        if has_ratios { titles.collect() } else { variants.iter().map(|&name| name.to_owned()).collect() };
    Table {
        columns: [vec!["median of".to_owned(), "unit".to_owned()], titles].concat(),
        rows: measurements.iter().map(row).collect(),
    }
}

fn table(table: &Table) -> String {
    let mut text = String::new();
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    text += &line(&table.columns);
    let _ = writeln!(text, "| --- |{}", " ---: |".repeat(table.columns.len().saturating_sub(1)));
    table.rows.iter().for_each(|row| text += &line(row));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Better;

    fn duration(name: &str) -> Measurement {
        Measurement::new(name, "s", Better::Lower, [("runc", vec![2.0]), ("husk boot", vec![3.0, 3.0, 9.0])])
    }

    #[test]
    fn single_measurement_has_a_row_for_each_variant() {
        let report = Report { measurements: vec![duration("start")], ..Report::new("start") };
        let text = markdown(&report);
        assert!(text.starts_with("| start | median | lowest | highest | runs | × runc |\n| --- | ---: |"), "{text}");
        assert!(text.contains("| husk boot | 3.00 s | 3.00 s | 9.00 s | 3 | 1.50 |\n"), "{text}");
    }

    #[test]
    fn several_measurements_have_a_row_each() {
        let alone = Measurement::new("shim", "MiB", Better::Lower, [("husk boot", vec![12.34])]);
        let report = Report { measurements: vec![duration("start"), alone], ..Report::new("x") };
        let text = markdown(&report);
        assert!(text.starts_with("| median of | unit | runc | husk boot (× runc) |\n"), "{text}");
        assert!(text.contains("| start | s | 2.00 | 3.00 (1.50) |\n| shim | MiB | – | 12.3 |\n"), "{text}");
    }
}
