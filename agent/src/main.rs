//! `husk-agent`: PID 1 of the guest, and the helper that starts one process.

use std::process::ExitCode;

fn main() -> ExitCode {
    husk_agent::main()
}
