//! Builds the OCI images whose containers build images: one with Docker's daemon, and one with buildah for an
//! unprivileged user.

use std::path::Path;

use anyhow::Result;

use super::debian::{EXCLUDED, Packages};
use super::{hash_of, oci};
use crate::{pins, setup};

/// Increase this number whenever the content of the images changes.
const VERSION: &str = "1";

/// An image whose containers build images.
pub struct Builder {
    /// The image's reference.
    pub reference: &'static str,
    packages: &'static str,
    hooks: &'static [&'static str],
    env: &'static [&'static str],
}

/// The image with Debian's `docker.io`. `docker-cli`, the client that starts a build, is listed because `docker.io`
/// only recommends it.
pub const DOCKER: Builder = Builder {
    reference: super::DOCKER,
    packages: "docker.io,docker-cli,iptables,busybox-static",
    // dockerd never starts these programs. They would be a fifth of the image.
    hooks: &["cd \"$1/usr/bin\" && rm -f ctr containerd-shim containerd-shim-runc-v1"],
    env: &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
};

/// The image with Debian's `buildah` and a user `build` with subordinate user ids. `netavark` is listed because buildah
/// needs it, although buildah's package only recommends it.
pub const BUILDAH: Builder = Builder {
    reference: super::BUILDAH,
    packages: "buildah,netavark,uidmap,libcap2-bin,busybox-static",
    hooks: &[
        "echo build:x:1000:1000::/home/build:/bin/sh >> \"$1/etc/passwd\"",
        "echo build:x:1000: >> \"$1/etc/group\"",
        "echo build:100000:65536 | tee \"$1/etc/subuid\" > \"$1/etc/subgid\"",
        // In Debian, newuidmap and newgidmap are set-user-ID root, and in this form the programs need CAP_SYS_ADMIN.
        // With file capabilities, the programs need only CAP_SETUID and CAP_SETGID.
        "chmod u-s \"$1/usr/bin/newuidmap\" \"$1/usr/bin/newgidmap\"",
        "chroot \"$1\" setcap cap_setuid=ep /usr/bin/newuidmap cap_setgid=ep /usr/bin/newgidmap",
        "install -d -o 1000 -g 1000 \"$1/home/build\" \"$1/home/build/.local\" \"$1/home/build/.local/share\"",
    ],
    env: &["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/home/build"],
};

impl Builder {
    /// Returns a hash of the inputs of the image. Updates of Debian's packages do not change the hash.
    pub fn hash(&self) -> String {
        let lists = [self.hooks, self.env, EXCLUDED].map(|list| list.join("\n"));
        let pieces = [VERSION, pins::RELEASE, self.packages, &lists[0], &lists[1], &lists[2]];
        hash_of(&pieces.map(str::as_bytes))
    }

    /// Writes the image's tar.
    pub fn build(&self, out: &Path) -> Result<()> {
        let work = tempfile::tempdir()?;
        let layer = work.path().join("layer.tar");
        let mirror = setup::debian_mirror()?;
        let (include, hooks) = (self.packages, self.hooks);
        Packages { suite: pins::RELEASE, mirror: mirror.as_deref(), include, hooks }.unpack(&layer)?;
        let config = oci::Config { env: self.env, cmd: &["sh"], working_dir: "/" };
        oci::write(out, self.reference, &config, &[&layer])
    }
}
