//! Compiles the CRI's protocol file into a descriptor set, without `protoc`; the client works by reflection.

use protobuf::Message;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What the shim reads of it as well is written there.
    let shims = "../../proto/protos";
    println!("cargo:rerun-if-changed=protos");
    println!("cargo:rerun-if-changed={shims}/cri_sandbox.proto");
    let mut parser = protobuf_parse::Parser::new();
    parser
        .pure()
        .include("protos")
        .include(shims)
        .input(format!("{shims}/cri_sandbox.proto"))
        .input("protos/cri.proto");
    let set = parser.file_descriptor_set()?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("cri.pb"), set.write_to_bytes()?)?;
    Ok(())
}
