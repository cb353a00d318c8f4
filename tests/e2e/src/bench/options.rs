//! The options of the benchmarks.

use clap::Args;

use super::Variant;

/// The options of the benchmarks. Each benchmark ignores the options that it does not need.
#[derive(Args, Debug, Clone)]
pub struct Options {
    /// Number of runs of each variant, after one warm-up run. Default: depends on the benchmark.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: Option<u32>,
    /// start: variants to measure.
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = Variant::ALL)]
    pub variants: Vec<Variant>,
    /// memory: numbers of pods.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10])]
    pub pods: Vec<usize>,
    /// density: number of pods that run during the starts.
    #[arg(long, default_value_t = 30)]
    pub background: usize,
    /// burst: number of containers that start at once.
    #[arg(long, default_value_t = 50)]
    pub at_once: usize,
    /// io-meta: number of files.
    #[arg(long, default_value_t = 500)]
    pub files: usize,
    /// exec, give-back, io-seq, net: amount of data in MiB. Default: depends on the benchmark.
    #[arg(long)]
    pub mib: Option<usize>,
    /// limits: duration of each measurement, in seconds.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// net: number of vCPUs of each pod.
    #[arg(long, default_value_t = 1)]
    pub vcpus: u32,
}
