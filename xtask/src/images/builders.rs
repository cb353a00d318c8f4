//! Builds the images that build images: Docker's daemon, and buildah for an unprivileged user.

use std::path::Path;

use anyhow::Result;

use super::debian::{EXCLUDED, Packages};
use super::{hash_of, oci};
use crate::{pins, setup};

/// Raised whenever what this file builds changes.
const VERSION: &str = "1";

/// One of the images.
pub struct Builder {
    /// Its reference.
    pub reference: &'static str,
    packages: &'static str,
    hooks: &'static [&'static str],
    env: &'static [&'static str],
}

/// Debian's `docker.io`, with its client, whose package is only recommended: it starts a build.
pub const DOCKER: Builder = Builder {
    reference: super::DOCKER,
    packages: "docker.io,docker-cli,iptables,busybox-static",
    // dockerd never starts these programs, and they are a fifth of the image.
    hooks: &["cd \"$1/usr/bin\" && rm -f ctr containerd-shim containerd-shim-runc-v1"],
    env: &["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
};

/// Debian's `buildah` with `netavark`, which is only recommended but required, and a user `build` with subordinate user
/// ids.
pub const BUILDAH: Builder = Builder {
    reference: super::BUILDAH,
    packages: "buildah,netavark,uidmap,libcap2-bin,busybox-static",
    hooks: &[
        "echo build:x:1000:1000::/home/build:/bin/sh >> \"$1/etc/passwd\"",
        "echo build:x:1000: >> \"$1/etc/group\"",
        "echo build:100000:65536 | tee \"$1/etc/subuid\" > \"$1/etc/subgid\"",
        // Debian's programs are set-user-ID, and need CAP_SYS_ADMIN then. With file capabilities they do not.
        "chmod u-s \"$1/usr/bin/newuidmap\" \"$1/usr/bin/newgidmap\"",
        "chroot \"$1\" setcap cap_setuid=ep /usr/bin/newuidmap cap_setgid=ep /usr/bin/newgidmap",
        "install -d -o 1000 -g 1000 \"$1/home/build\" \"$1/home/build/.local\" \"$1/home/build/.local/share\"",
    ],
    env: &["PATH=/usr/local/bin:/usr/bin:/bin", "HOME=/home/build"],
};

impl Builder {
    /// Identifies the image's content, except for updates of Debian's packages.
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
