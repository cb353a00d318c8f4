//! `containerd-shim-husk-v2`: the shim that containerd starts for each sandbox. With another `argv[0]` it is the VMM.

#![deny(clippy::indexing_slicing)]

fn main() -> std::process::ExitCode {
    husk_shim::main()
}
