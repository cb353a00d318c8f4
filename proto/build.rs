//! Generates Rust code for the agent's ttrpc service and the CRI messages from `protos/`, without `protoc`.

use std::path::Path;

use ttrpc_codegen::{Codegen, Customize};

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=protos");
    let out = std::env::var_os("OUT_DIR").unwrap_or_default();
    // The messages of the previous version of the agent's protocol, for a test.
    let previous = Path::new(&out).join("previous");
    std::fs::create_dir_all(&previous)?;
    Codegen::new()
        .out_dir(&previous)
        .input("protos/previous/agent.proto")
        .include("protos/previous")
        .rust_protobuf()
        .run()?;
    Codegen::new()
        .out_dir(&out)
        .inputs(["protos/agent.proto", "protos/cri_sandbox.proto"])
        .include("protos")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .run()?;
    // `include!` does not accept inner attributes or inner doc comments. Therefore, this program removes the attributes
    // and turns the doc comments into comments. Each module that includes one of these files sets its own attributes.
    for file in ["agent.rs", "agent_ttrpc.rs", "cri_sandbox.rs", "previous/agent.rs"] {
        let path = Path::new(&out).join(file);
        let text: String =
            std::fs::read_to_string(&path)?.lines().filter(|l| !l.starts_with("#![")).flat_map(|l| [l, "\n"]).collect();
        std::fs::write(&path, text.replace("//!", "//"))?;
    }
    Ok(())
}
