//! Time from the request to the VMM until the agent has answered Setup.

use husk_benchmarks::Report;

use super::timelines::{at, timeline};
use super::variant::names;
use super::{Options, Quantity, Variant, interleave};
use crate::{BUSYBOX, node};

/// The steps before the shim asks the VMM for a guest. The last of them is the time of the request.
const BEFORE: [&str; 3] = ["vmm process", "network connected", "create begin"];

/// Measures the steps with guests that boot, and with guests that are made from a template.
///
/// # Panics
/// If a step fails.
pub fn measure(options: &Options) -> Report {
    node::need_image(BUSYBOX);
    let runs = options.runs.unwrap_or(7);
    let mut report = Report::new("restore").with("runs", runs);
    let quantities = [
        Quantity::lower("VMM asked until the agent is connected", "ms"),
        Quantity::lower("VMM asked until Setup is answered", "ms"),
    ];
    interleave(&mut report, runs, &names(&Variant::HUSK), &quantities, |index, round| {
        let id = format!("bench-restore-{index}-{round}");
        Variant::HUSK[index].run_true(&id);
        let timeline = timeline(&id);
        let asked = BEFORE.map(|step| at(&timeline, step)).into_iter().fold(0.0, f64::max);
        ["agent connected", "sandbox set up"].map(|step| at(&timeline, step) - asked).to_vec()
    });
    report
}
