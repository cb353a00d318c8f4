//! The results of a benchmark, as they are stored in JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The variant with which the others are compared.
const REFERENCE: &str = "runc";

/// The results of a benchmark.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the benchmark.
    pub benchmark: String,
    /// Parameters of the run, such as the number of pods.
    pub parameters: BTreeMap<String, Value>,
    /// What was measured.
    pub measurements: Vec<Measurement>,
    /// Further tables.
    #[serde(default)]
    pub tables: Vec<Table>,
    /// Sentences about the results.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Reasons why the benchmark fails. The list is empty if the benchmark passes.
    #[serde(default)]
    pub failures: Vec<String>,
}

/// One quantity, measured with each variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// What was measured, such as `RunPodSandbox`.
    pub name: String,
    /// Unit of the values.
    pub unit: String,
    /// Which values are better.
    pub better: Better,
    /// The values of each variant.
    pub series: Vec<Series>,
}

/// Which values of a quantity are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// Lower values, as for a duration.
    Lower,
    /// Higher values, as for a throughput.
    Higher,
}

/// The values of one variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Name of the variant, such as `husk boot`.
    pub variant: String,
    /// One value for each counted run.
    pub values: Vec<f64>,
    /// Median of the values.
    pub median: f64,
    /// Median divided by the median of runc. `None` if there is no such value.
    pub ratio: Option<f64>,
}

/// A table of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Titles of the columns. All columns except the first are aligned to the right.
    pub columns: Vec<String>,
    /// The rows.
    pub rows: Vec<Vec<String>>,
}

impl Report {
    /// Creates a report without measurements.
    pub fn new(benchmark: &str) -> Self {
        Self { benchmark: benchmark.to_owned(), ..Self::default() }
    }

    /// Adds a parameter.
    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.parameters.insert(name.to_owned(), value.into());
        self
    }
}

impl Measurement {
    /// Creates a measurement from pairs of a variant's name and values. Leaves out variants without values.
    pub fn new<'a>(
        name: &str,
        unit: &str,
        better: Better,
        series: impl IntoIterator<Item = (&'a str, Vec<f64>)>,
    ) -> Self {
        let series = series.into_iter().filter(|(_, values)| !values.is_empty());
        let mut series: Vec<Series> = series
            .map(|(variant, values)| Series {
                variant: variant.to_owned(),
                median: round(median(&values)),
                values: values.into_iter().map(round).collect(),
                ratio: None,
            })
            .collect();
        let reference = series.iter().find(|one| one.variant == REFERENCE).map(|one| one.median);
        for one in &mut series {
            one.ratio = reference.filter(|reference| *reference > 0.0).map(|reference| round(one.median / reference));
        }
        Self { name: name.to_owned(), unit: unit.to_owned(), better, series }
    }

    /// Returns the ratio of a variant to runc.
    pub fn ratio(&self, variant: &str) -> Option<f64> {
        self.series.iter().find(|one| one.variant == variant)?.ratio
    }
}

/// Rounds to four significant digits. Noise is larger than the rest.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powf(3.0 - value.abs().log10().floor());
    (value * scale).round() / scale
}

/// Returns the median, or 0 if there are no values. For an even number of values, the median is the mean of the two
/// middle values.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_handles_odd_and_even_counts() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn values_are_rounded_to_four_digits() {
        assert_eq!([1234.56, 0.0123456, -7.0, 0.0].map(round), [1235.0, 0.01235, -7.0, 0.0]);
    }

    #[test]
    fn ratios_are_relative_to_runc_wherever_it_is_in_the_list() {
        let series = [("husk boot", vec![3.0, 3.0, 9.0]), ("runc", vec![2.0]), ("unjailed", vec![])];
        let made = Measurement::new("start", "s", Better::Lower, series);
        assert_eq!(made.ratio("husk boot"), Some(1.5));
        assert_eq!(made.ratio("unjailed"), None);
        assert_eq!(made.series.len(), 2);
        let alone = Measurement::new("restore", "ms", Better::Lower, [("husk boot", vec![3.0])]);
        assert_eq!(alone.ratio("husk boot"), None);
    }

    #[test]
    fn report_survives_json() {
        let mut report = Report::new("start").with("runs", 7);
        report.measurements.push(Measurement::new("start", "s", Better::Lower, [("runc", vec![2.0, 2.5])]));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
