//! The list of benchmarks.

use clap::ValueEnum;

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Benchmark {
    /// Duration of `ctr run --rm … true`, the steps of Husk's start, and the memory of an idle container.
    Start,
    /// Duration of RunPodSandbox, and the time until the first line of a container's log.
    Sandbox,
    /// Time from the request to the VMM until the agent has answered Setup.
    Restore,
    /// Memory that the node uses for each idle pod.
    Memory,
    /// Guest memory that the host holds, by part of the guest's address space.
    GuestMemory,
    /// Duration of a start while many pods run.
    Density,
    /// Duration of many starts at once. Fails if an exit code is wrong or if anything is left.
    Burst,
    /// Creating, examining and removing small files, and the start of Python.
    IoMeta,
    /// Writing and reading a large file.
    IoSeq,
    /// Throughput and round-trip time of TCP, with runc, with vhost-net and with the VMM's data path.
    Net,
    /// Part of freed guest memory that the host has again after ten seconds.
    GiveBack,
    /// Throughput of a command's output through the CRI's Exec.
    Exec,
    /// Rates of each device under a rate limit. Fails if a rate differs from its limit by more than 5 %.
    Limits,
}

impl Benchmark {
    /// The benchmarks that compare Husk with runc, or a guest that boots with a guest that is made from a template.
    pub const COMPARISONS: [Self; 12] = [
        Self::Start,
        Self::Sandbox,
        Self::Restore,
        Self::Memory,
        Self::GuestMemory,
        Self::Density,
        Self::Burst,
        Self::IoMeta,
        Self::IoSeq,
        Self::Net,
        Self::GiveBack,
        Self::Exec,
    ];

    /// Returns the name on the command line and of the file with the results.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}
