//! `containerd-shim-husk-v2`: the shim that containerd starts for each sandbox. If `argv[0]` is the VMM's name, the
//! program runs as the VMM instead.

#![deny(clippy::indexing_slicing)]

fn main() -> std::process::ExitCode {
    husk_shim::main()
}
