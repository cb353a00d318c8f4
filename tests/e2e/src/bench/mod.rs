//! The benchmarks. Each benchmark is a module whose function `measure` returns a report.

pub mod burst;
pub mod density;
pub mod exec;
pub mod give_back;
pub mod guest_memory;
pub mod io_meta;
pub mod io_seq;
pub mod limits;
pub mod memory;
pub mod net;
mod options;
mod python;
pub mod restore;
pub mod sandbox;
pub mod start;
mod timelines;
mod variant;

use husk_benchmarks::{Better, Measurement, Report, figure};

pub use options::Options;
pub use variant::Variant;

/// A quantity that a benchmark measures.
#[derive(Debug, Clone)]
pub struct Quantity {
    name: String,
    unit: &'static str,
    better: Better,
}

impl Quantity {
    /// Creates a quantity. Lower values are better.
    pub fn lower(name: impl Into<String>, unit: &'static str) -> Self {
        Self { name: name.into(), unit, better: Better::Lower }
    }

    /// Creates a quantity. Higher values are better.
    pub fn higher(name: impl Into<String>, unit: &'static str) -> Self {
        Self { name: name.into(), unit, better: Better::Higher }
    }
}

/// The value of a quantity that a variant does not have.
pub const ABSENT: f64 = f64::NAN;

/// Measures all variants in turn, `runs` times, and adds the results to the report. `measure` gets the index of a variant
/// and the number of a round, and returns one value for each quantity. Before these rounds, round 0 warms up the node's
/// caches, and its values are not counted.
pub fn interleave(
    report: &mut Report,
    runs: u32,
    variants: &[&str],
    quantities: &[Quantity],
    mut measure: impl FnMut(usize, u32) -> Vec<f64>,
) {
    let mut values = vec![vec![Vec::new(); variants.len()]; quantities.len()];
    for round in 0..=runs {
        for (index, variant) in variants.iter().enumerate() {
            let measured = measure(index, round);
            assert_eq!(measured.len(), quantities.len(), "wrong number of values");
            println!("{} round {round}: {variant}: {}", report.benchmark, line(quantities, &measured));
            for (value, values) in measured.into_iter().zip(&mut values) {
                if round > 0 && value.is_finite() {
                    values[index].push(value);
                }
            }
        }
    }
    for (Quantity { name, unit, better }, values) in quantities.iter().zip(values) {
        report.measurements.push(Measurement::new(name, unit, *better, variants.iter().copied().zip(values)));
    }
}

/// Describes the values of one run.
fn line(quantities: &[Quantity], values: &[f64]) -> String {
    let each = quantities.iter().zip(values).filter(|(_, value)| value.is_finite());
    each.map(|(one, value)| format!("{} {} {}", one.name, figure(*value), one.unit)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleave_alternates_and_does_not_count_the_first_round() {
        let mut order = Vec::new();
        let mut report = Report::new("test");
        let quantities = [Quantity::lower("time", "s"), Quantity::higher("rate", "MiB/s")];
        interleave(&mut report, 2, &["runc", "husk boot"], &quantities, |variant, round| {
            order.push((variant, round));
            vec![f64::from(round), if variant == 0 { ABSENT } else { 7.0 }]
        });
        assert_eq!(order, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]);
        let [time, rate] = &report.measurements[..] else { panic!("{report:?}") };
        assert_eq!(time.series[0].values, [1.0, 2.0]);
        assert_eq!(time.ratio("husk boot"), Some(1.0));
        assert_eq!(rate.series.len(), 1);
    }
}
