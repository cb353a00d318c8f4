//! Shared code of the end-to-end suites: a driver for `ctr`, isolated test cases, and the check for leftovers.
//!
//! The suites run in the test node as root, one test at a time, against the node's containerd. `HUSK_E2E_RUNTIME` names
//! the runtime under test. Running the same tests against runc verifies the tests themselves.

pub mod bench;
pub mod case;
pub mod chaos;
pub mod command;
pub mod conformance;
pub mod containerd;
pub mod containerd_log;
pub mod cri;
pub mod disk;
pub mod dns;
pub mod events;
pub mod figures;
pub mod grpc;
pub mod leftovers;
pub mod node;
pub mod pty;
pub mod run;
pub mod scale;
pub mod shim;
pub mod soak;
pub mod spec;
pub mod template;
pub mod vm;

pub use case::{Case, case};
pub use command::{Output, Running};
pub use run::Run;

/// Reference of the busybox image.
pub const BUSYBOX: &str = "husk.test/busybox:latest";
/// Reference of the Debian-based image with Python.
pub const PYTHON: &str = "husk.test/python:latest";
/// Reference of the sandbox image (pause).
pub const PAUSE: &str = "husk.test/pause:latest";
/// Reference of the image with Docker's daemon.
pub const DOCKER: &str = "husk.test/docker:latest";
/// Reference of the image with buildah.
pub const BUILDAH: &str = "husk.test/buildah:latest";
/// Reference of the image with fsx, the file system exerciser.
pub const FSX: &str = "husk.test/fsx:latest";
/// The reference runtime with which Husk is compared.
pub const RUNC: &str = "io.containerd.runc.v2";
/// containerd namespace of the containers that the suites run with `ctr`.
pub const NAMESPACE: &str = "e2e";
/// containerd namespace of the CRI plugin.
pub const KUBERNETES: &str = "k8s.io";

/// Returns the runtime under test.
pub fn runtime() -> String {
    std::env::var("HUSK_E2E_RUNTIME").unwrap_or_else(|_| "io.containerd.husk.v2".to_owned())
}
