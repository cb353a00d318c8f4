//! Python programs that measure something inside a container.

use std::time::Duration;

use crate::cri::PodContainer;

/// Runs a Python program in the container. Returns the numbers that it prints. `limit` is the timeout.
#[track_caller]
pub fn run(container: &PodContainer, program: &str, arguments: &[&str], limit: Duration) -> Vec<f64> {
    let command = [&["python3", "-S", "-c", program][..], arguments].concat();
    let done = container.exec_within(limit, &command);
    assert_eq!(done.code, 0, "the Python program failed: {done:?}");
    done.out.split_whitespace().map(|number| number.parse().unwrap()).collect()
}
