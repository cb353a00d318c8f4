//! A layer of Debian packages, unpacked by mmdebstrap: the essential ones and those an image is about.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What no container needs, as dpkg path patterns.
pub const EXCLUDED: &[&str] = &[
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
    "/usr/share/lintian/*",
];

/// What the layer is made of.
pub struct Packages<'a> {
    /// Debian's release.
    pub suite: &'a str,
    /// The site that has it; without one mmdebstrap takes its own.
    pub mirror: Option<&'a str>,
    /// Beside the essential ones.
    pub include: &'a str,
    /// Shell commands run at the end, the tree's directory in `$1`.
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
        // debconf's and apt's caches are of no use.
        command.arg("--customize-hook=rm -rf \"$1\"/var/cache/* \"$1\"/var/lib/apt/* \"$1\"/var/log/*");
        command.arg(self.suite).arg(layer).args(self.mirror);
        // The date of every file, so that the layer depends on the packages only.
        command.env("SOURCE_DATE_EPOCH", "1704067200");
        let status = command.status().context("cannot run mmdebstrap (package mmdebstrap)")?;
        if !status.success() {
            bail!("mmdebstrap failed: {status}");
        }
        Ok(())
    }
}
