//! A container's bundle: reading it, refusing what a virtual machine cannot give, and making it ready for the guest.
//!
//! Everything here blocks (file system and mount calls): call it from `spawn_blocking`, or before the runtime is up.
//!
//! ```text
//! let bundle = Bundle::load(dir)?;                       // config.json, checked: host namespaces refused
//! let sizing = sizing(&bundle.spec, &config)?;           // only for the first container of a sandbox
//! let prepared = prepare(&bundle, &Request { id, share, rootfs: &request.rootfs })?; // mounts made, spec for the guest
//! …
//! teardown(share, id)?;                                  // any number of times, also after a failed prepare
//! ```
//!
//! ```text
//! pub struct Bundle { pub dir: PathBuf, pub raw: serde_json::Value, pub spec: oci_spec::runtime::Spec }
//! impl Bundle { pub fn load(dir: &Path) -> Result<Bundle, BundleError>; }      // reads, parses, refuses host namespaces
//! impl Bundle { pub fn annotation(&self, key: &str) -> Option<&str>; pub fn network_namespace(&self) -> Option<&str>; pub fn hostname(&self) -> Option<&str>; }
//! pub struct Sizing { pub vcpus: u8, pub memory_mib: u64 }
//! pub fn sizing(spec: &Spec, config: &husk_config::Config) -> Result<Sizing, SizingError>;
//! pub struct Request<'a> { pub id: &'a str, pub share: &'a Path, pub rootfs: &'a [containerd_shim_protos::types::mount::Mount] }
//! pub struct Prepared { pub spec: Vec<u8>, pub rootfs: String /* guest path */, pub hooks: Hooks, pub selinux_label: Option<String>, pub notes: Vec<String> }
//! pub fn prepare(bundle: &Bundle, request: &Request<'_>) -> Result<Prepared, PrepareError>;   // cleans up after itself on error
//! pub fn exec_process(raw: &[u8]) -> Result<Vec<u8>, TranslateError>;       // Task.Exec's spec (JSON) for the guest
//! pub fn resources_update(raw: &[u8]) -> Result<Vec<u8>, TranslateError>;   // Task.Update's resources (JSON) for the guest
//! pub fn teardown(share: &Path, id: &str) -> Result<(), TeardownError>;     // idempotent
//! ```

mod capability;
mod devices;
mod host;
mod load;
mod mounts;
mod rootfs;
mod sizing;
mod syscall;
mod teardown;
mod translate;
mod update;

pub use load::{Bundle, BundleError, load_annotations};
pub use mounts::{Bind, MountPlan};
pub use rootfs::RootfsError;
pub use sizing::{Sizing, SizingError, sizing};
pub use teardown::{TeardownError, teardown};
pub use translate::{TranslateError, exec_process};
pub use update::resources_update;
