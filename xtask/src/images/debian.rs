//! Builds a layer of Debian packages with mmdebstrap: the essential packages, and the packages that an image lists.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Files that no container needs, as dpkg path patterns.
pub const EXCLUDED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
    "/usr/share/lintian/*",
];

/// The packages of a layer.
pub struct Packages<'a> {
    /// The Debian release.
    pub suite: &'a str,
    /// The Debian mirror. If it is `None`, mmdebstrap uses its default mirror.
    pub mirror: Option<&'a str>,
    /// Packages to install in addition to the essential ones, separated by commas.
    pub include: &'a str,
    /// Shell commands that run at the end, with the tree's directory in `$1`.
    pub hooks: &'a [&'a str],
}

impl Packages<'_> {
    /// Writes the layer's tar.
    pub fn unpack(&self, layer: &Path) -> Result<()> {
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=essential", "--format=tar", "--components=main"]);
        command.arg(format!("--include={}", self.include));
        command.arg("--aptopt=APT::Install-Recommends \"false\"");
        for pattern in EXCLUDED {
            command.arg(format!("--dpkgopt=path-exclude={pattern}"));
        }
        for hook in self.hooks {
            command.arg(format!("--customize-hook={hook}"));
        }
        // Containers do not need caches, apt's package lists or logs.
        command.arg("--customize-hook=rm -rf \"$1\"/var/cache/* \"$1\"/var/lib/apt/* \"$1\"/var/log/*");
        command.arg(self.suite).arg(layer).args(self.mirror);
        // All files have this date, so that the layer depends only on the packages.
        command.env("SOURCE_DATE_EPOCH", "1704067200");
        let status = command.status().context("failed to start mmdebstrap; install package mmdebstrap")?;
        if !status.success() {
            bail!("mmdebstrap ended with {status}; its messages are above");
        }
        Ok(())
    }
}
