//! Loads the node's AppArmor profiles into the guest's kernel before a container is created.
//!
//! If the node's kernel has CONFIG_SECURITY_APPARMOR_EXPORT_BINARY, the kernel exports every loaded policy
//! (security/apparmor/apparmorfs.c, `raw_data`). Therefore, the guest can enforce the node's policies without the
//! profiles' source files.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_proto::agent::LoadAppArmorRequest;

use crate::blocking;
use crate::lock;
use crate::sandbox::Sandbox;
use crate::vm::agent::{Agent, timeouts, within};

/// Directory in which the kernel lists the loaded profiles.
const PROFILES: &str = "/sys/kernel/security/apparmor/policy/profiles";
/// Profile name of a container that is not confined.
const UNCONFINED: &str = "unconfined";
/// Maximum size of a policy in bytes. A policy must fit into one ttrpc message to the agent. A typical policy has about
/// 10 KiB.
const MAX_POLICY: u64 = 3 << 20;

/// Digests of the policies that the guest has loaded, by profile name.
pub type LoadedProfiles = Mutex<HashMap<String, u64>>;

/// A failure to load an AppArmor profile into the guest.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The node has no profile with this name.
    #[error("AppArmor profile {0:?} is not loaded on the node; load it with apparmor_parser")]
    Missing(String),
    /// The policy cannot be read from the node's kernel.
    #[error(
        "failed to read the policy of AppArmor profile {profile:?} from {path} (if the node's kernel lacks \
         CONFIG_SECURITY_APPARMOR_EXPORT_BINARY, use the profile type Unconfined)"
    )]
    Read {
        /// Name of the profile.
        profile: String,
        /// File that was read.
        path: PathBuf,
        /// Cause.
        #[source]
        source: io::Error,
    },
    /// The policy is too large.
    #[error("the policy that contains AppArmor profile {0:?} is larger than the limit of 3 MiB")]
    Large(String),
    /// The guest did not load the policy.
    #[error("failed to load AppArmor profile {profile:?} in the guest")]
    Guest {
        /// Name of the profile.
        profile: String,
        /// Cause.
        #[source]
        source: ttrpc::Error,
    },
}

impl Sandbox {
    /// Loads the node's current version of a profile into the guest, unless the guest already has this version.
    ///
    /// # Errors
    /// Fails with an [`AppArmorError`] that names the profile.
    pub async fn load_profile(&self, agent: &Agent, profile: &str) -> Result<(), AppArmorError> {
        if profile.is_empty() || profile == UNCONFINED {
            return Ok(());
        }
        let name = profile.to_owned();
        let read = blocking::spawn(move || policy(Path::new(PROFILES), &name)).await;
        let policy = read.unwrap_or_else(|error| {
            let (profile, path) = (profile.to_owned(), PROFILES.into());
            Err(AppArmorError::Read { profile, path, source: error })
        })?;
        let mut digest = DefaultHasher::new();
        policy.hash(&mut digest);
        let digest = digest.finish();
        if lock(&self.profiles).get(profile) == Some(&digest) {
            return Ok(());
        }
        let request = LoadAppArmorRequest { policy, ..Default::default() };
        let loaded = agent.sandbox.load_app_armor(within(timeouts::SLOW), &request).await;
        loaded.map_err(|source| AppArmorError::Guest { profile: profile.to_owned(), source })?;
        lock(&self.profiles).insert(profile.to_owned(), digest);
        Ok(())
    }
}

/// Returns the policy blob that contains `profile`. Blocks the calling thread.
fn policy(profiles: &Path, profile: &str) -> Result<Vec<u8>, AppArmorError> {
    // Search for the parent profile, because the parent's policy contains its child profiles and hats.
    let parent = profile.split_once("//").map_or(profile, |(parent, _)| parent);
    let missing = || AppArmorError::Missing(profile.to_owned());
    // Each profile has a directory. The directory's name contains the alphanumeric characters of the profile's name,
    // and ends with a number. The file `name` in the directory contains the profile's full name.
    let entries = fs::read_dir(profiles).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => missing(),
        _ => AppArmorError::Read { profile: profile.to_owned(), path: profiles.to_owned(), source },
    })?;
    let name_matches = |dir: &Path| fs::read_to_string(dir.join("name")).is_ok_and(|name| name.trim_end() == parent);
    let found = entries.flatten().map(|entry| entry.path()).find(|dir| may_match(dir, parent) && name_matches(dir));
    let path = found.ok_or_else(missing)?.join("raw_data");
    let read = |source| AppArmorError::Read { profile: profile.to_owned(), path: path.clone(), source };
    let policy = fs::read(&path).map_err(read)?;
    if policy.len() as u64 > MAX_POLICY { Err(AppArmorError::Large(profile.to_owned())) } else { Ok(policy) }
}

/// Returns whether `dir` may be the directory of `profile`. The kernel builds the directory's name from the profile's
/// name and a number. The kernel changes some characters of the profile's name. Therefore, this function compares only
/// alphanumeric characters.
///
/// Without this check, the shim would read the file `name` in hundreds of directories.
fn may_match(dir: &Path, profile: &str) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
    name.rsplit_once('.').is_some_and(|(name, _)| plain(name) == plain(profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_finds_the_profile_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for (number, name) in ["a.b", "ab", "/usr/bin/x"].into_iter().enumerate() {
            let profile = dir.path().join(format!("{}.{number}", name.trim_matches('/').replace('/', ".")));
            fs::create_dir(&profile).unwrap();
            fs::write(profile.join("name"), format!("{name}\n")).unwrap();
            if number != 1 {
                fs::write(profile.join("raw_data"), name).unwrap();
            }
        }
        let found = |name: &str| policy(dir.path(), name);
        assert_eq!(found("a.b").unwrap(), b"a.b");
        assert_eq!(found("/usr/bin/x//child").unwrap(), b"/usr/bin/x");
        assert!(matches!(found("ab"), Err(AppArmorError::Read { .. })));
        assert!(matches!(found("b"), Err(AppArmorError::Missing(_))));
        assert!(matches!(policy(&dir.path().join("x"), "ab"), Err(AppArmorError::Missing(_))));
        // This path is a file. Reading a file as a directory fails with ENOTDIR.
        let error = policy(&dir.path().join("a.b.0/name"), "ab").unwrap_err();
        assert!(matches!(error, AppArmorError::Read { .. }), "{error}");
    }
}
