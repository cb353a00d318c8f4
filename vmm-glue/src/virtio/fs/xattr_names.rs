//! How the names of extended attributes in the guest are mapped to names on the host (xattr(7)).
//!
//! The host's kernel lets only a process with CAP_SYS_ADMIN read and set attributes `trusted.*`, and set attributes
//! `security.*` other than `security.capability`. The guest needs such attributes. For example, overlayfs in the guest
//! sets `trusted.overlay.*` if its upper directory is on the share.
//!
//! No thread of the VMM has CAP_SYS_ADMIN. An attacker with this capability could mount file systems, clear `nodev` of
//! the share, and read the memory of the host's kernel by bpf(2). Therefore the file server adds the prefix
//! `user.husk.` to these names on the host. The guest's kernel decides which processes in the guest may use the
//! attributes.
//!
//! Consequences:
//!
//! - The guest does not see attributes `trusted.*` and `security.*` that the host has set, except
//!   `security.capability`. For example, overlayfs in the guest does not see that the host has marked a directory as
//!   opaque.
//! - Attributes `user.*` exist only for regular files and directories. For other files, setting the attribute fails
//!   with EPERM. overlayfs ignores this error (`ovl_set_origin_fh` in fs/overlayfs/copy_up.c).
//! - The guest cannot use the names that begin with `user.husk.`. Otherwise, an unprivileged process in the guest could
//!   set an attribute `trusted.*`.
//! - A file system of the host has to support attributes `user.*`. tmpfs supports them since Linux 6.6.

use virtiofsd::passthrough::xattrmap::{Error, XattrMap};

/// The rules of the mapping. The first rule that matches a name applies. A rule has the fields TYPE, SCOPE, KEY and
/// PREPEND. KEY is the prefix of a name that the guest sends. For a rule of the type `prefix`, the file server
/// adds PREPEND to the guest's name, and removes PREPEND from the names that the host's listxattr(2) returns. For other
/// rules, PREPEND is the prefix of names from the host. The type `bad` hides or refuses a name.
const RULES: &str = "\
    /ok/all/security.capability/security.capability/ \
    /prefix/all/trusted./user.husk./ \
    /prefix/all/security./user.husk./ \
    /bad/server//trusted./ \
    /bad/server//security./ \
    /bad/client/user.husk.// \
    /ok/all///";

/// Returns the mapping for virtiofsd.
pub fn map() -> Result<XattrMap, Error> {
    XattrMap::try_from(RULES)
}
