//! `containerd-shim-husk-v2`: the shim containerd starts for each pod, and, under another argv[0], the pod's VMM.

fn main() -> std::process::ExitCode {
    husk_shim::main()
}
