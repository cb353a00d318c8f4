//! Queries that a fault of the victim must not delay.

use std::time::{Duration, Instant};

use serde_json::json;

use super::victim::{OVERTIME, QUERY_BUDGET};
use crate::cri::try_call_within;
use crate::{KUBERNETES, containerd};

/// Maximum number of requests for the witness's statistics.
const STATS_ATTEMPTS: usize = 5;

/// Asks for the statistics of the container `witness`, and for the pids of the container `victim`. Returns what is
/// wrong.
///
/// Statistics that take longer than a second fail. On a busy machine, this also happens without a fault.
pub fn probe(witness: &str, victim: Option<&str>) -> Vec<String> {
    let mut findings = Vec::new();
    let request = json!({ "container_id": witness });
    let mut failures = Vec::new();
    while failures.len() < STATS_ATTEMPTS {
        let begin = Instant::now();
        let stats = try_call_within(QUERY_BUDGET + OVERTIME, "RuntimeService", "ContainerStats", &request);
        findings.extend(late("ContainerStats of the witness", begin.elapsed()));
        match stats {
            Ok(_) => break,
            Err(status) => failures.push(status.to_string()),
        }
    }
    if failures.len() == STATS_ATTEMPTS {
        findings.push(format!("ContainerStats of the witness failed: {}", failures.join("; ")));
    }
    if let Some(id) = victim {
        let begin = Instant::now();
        let _ = containerd::pids(KUBERNETES, id);
        findings.extend(late("ListPids of the victim", begin.elapsed()));
    }
    findings
}

/// Returns a finding if a query has exceeded its limit.
fn late(what: &str, took: Duration) -> Option<String> {
    (took > QUERY_BUDGET).then(|| format!("{what} took {took:.1?}, its limit is {QUERY_BUDGET:?}"))
}
