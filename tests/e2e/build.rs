//! Compiles the .proto files of the CRI and of containerd's services into one descriptor set, without `protoc`. The
//! suites' CRI and containerd clients read the descriptors at run time (reflection).

use std::path::{Path, PathBuf};

use protobuf::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The shim uses the .proto files of this directory. The suites need only one of these files.
    let shared = "../../proto/protos";
    println!("cargo:rerun-if-changed=protos");
    println!("cargo:rerun-if-changed={shared}/cri_sandbox.proto");
    let mut parser = protobuf_parse::Parser::new();
    parser
        .pure()
        .include("protos")
        .include(shared)
        .input(format!("{shared}/cri_sandbox.proto"))
        .input("protos/cri.proto");
    for entry in Path::new("protos/containerd").read_dir()? {
        parser.input(entry?.path());
    }
    let set = parser.file_descriptor_set()?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; run this build script with cargo")?);
    std::fs::write(out.join("services.pb"), set.write_to_bytes()?)?;
    Ok(())
}
