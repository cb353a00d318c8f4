//! Fuzz targets for the code that parses bytes from a guest, from a client, or from another program. README.md lists
//! the targets.

pub mod driver;
pub mod input;
pub mod jail;
pub mod runtime;
pub mod targets;
