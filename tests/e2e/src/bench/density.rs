//! Duration of a start while many pods run.

use husk_benchmarks::{Better, Measurement, Report};

use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::cri::pods_with_handler;
use crate::{BUSYBOX, node};

/// Measures starts without other pods, and starts beside idle pods of the same variant.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    node::need_image(BUSYBOX);
    let (runs, count) = (options.runs.unwrap_or(7), options.background);
    let mut report = Report::new("density").with("runs", runs).with("pods", count);
    let start = |variant: Variant, pods: usize, round: u32| {
        vec![variant.run_true(&format!("bench-density-{}-{pods}-{round}", variant.name().replace(' ', "-")))]
    };
    let quantity = |pods: usize| Quantity::lower(format!("`ctr run --rm … true`, pods: {pods}"), "s");
    interleave(&mut report, runs, &names(&Variant::COMPARED), &[quantity(0)], |index, round| {
        start(Variant::COMPARED[index], 0, round)
    });
    // The pods of the variants cannot run at the same time. Therefore the variants do not alternate here.
    let mut beside = Vec::new();
    for variant in Variant::COMPARED {
        let mut part = Report::new("density");
        pods_with_handler("bench-density", "husk", |pods| {
            for _ in 0..count {
                let _config = variant.configure();
                pods.run_with_handler(variant.handler(), pods.config()).sleeper();
            }
            interleave(&mut part, runs, &[variant.name()], &[quantity(count)], |_, round| start(variant, count, round));
        });
        beside.push((variant.name(), part.measurements.remove(0).series.remove(0).values));
    }
    let beside = Measurement::new(&quantity(count).name, "s", Better::Lower, beside);
    let slower = report.measurements[0].series.iter().zip(&beside.series);
    let slower = slower.map(|(alone, beside)| (alone.variant.as_str(), vec![beside.median / alone.median]));
    let slower = Measurement::new("second row divided by the first", "×", Better::Lower, slower);
    report.measurements.extend([beside, slower]);
    report
}
