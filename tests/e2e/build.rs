//! Compiles the CRI's protocol file into a descriptor set, without `protoc`; the client works by reflection.

use protobuf::Message;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=protos/cri.proto");
    let set = protobuf_parse::Parser::new().pure().include("protos").input("protos/cri.proto").file_descriptor_set()?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    std::fs::write(out.join("cri.pb"), set.write_to_bytes()?)?;
    Ok(())
}
