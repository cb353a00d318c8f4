//! Names and results of the benchmarks. `husk-bench` writes results in the test node, and xtask reads them.

mod format;
mod name;
mod report;

pub use format::{figure, markdown};
pub use name::Benchmark;
pub use report::{Better, Measurement, Report, Series, Table, median};
