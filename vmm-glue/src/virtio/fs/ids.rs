//! The numbers by which FUSE requests name files.

use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::PassthroughFs;

/// A node id of FUSE.
pub type Inode = <PassthroughFs as FileSystem>::Inode;
/// A file handle of FUSE.
pub type Handle = <PassthroughFs as FileSystem>::Handle;
