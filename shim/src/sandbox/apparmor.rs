//! AppArmor profiles: a container's is the node's, carried over to the guest's kernel before the container is made.
//!
//! The kernel gives out the policy that was loaded into it (security/apparmor/apparmorfs.c, `raw_data`, where it is built
//! with CONFIG_SECURITY_APPARMOR_EXPORT_BINARY): so the guest enforces what the node would, whoever wrote the profile.

use std::collections::HashMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use husk_proto::agent::AppArmorRequest;

use super::Sandbox;
use super::agent::{Agent, timeouts, within};
use crate::lock;

/// Where the kernel lists the profiles.
const PROFILES: &str = "/sys/kernel/security/apparmor/policy/profiles";
/// The profile that is none.
const UNCONFINED: &str = "unconfined";
/// Beyond this a message is too long for the agent; a policy is some ten KiB.
const MOST: u64 = 3 << 20;

/// The profiles the guest has, with a digest of their policies.
pub type Loaded = Mutex<HashMap<String, u64>>;

/// Why a container does not get its profile.
#[derive(Debug, thiserror::Error)]
pub enum AppArmorError {
    /// The node has none of this name.
    #[error("AppArmor profile {0:?} is not loaded on the node (apparmor_parser loads it)")]
    Missing(String),
    /// The node's kernel does not give it out.
    #[error(
        "AppArmor profile {profile:?} cannot be carried over to the guest: reading {path}: use Unconfined on nodes whose \
         kernel lacks CONFIG_SECURITY_APPARMOR_EXPORT_BINARY"
    )]
    Read {
        /// The profile.
        profile: String,
        /// What was read.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The policy is too large.
    #[error("AppArmor profile {0:?} is larger than 3 MiB with those it was loaded with")]
    Large(String),
    /// The guest does not take it.
    #[error("AppArmor profile {profile:?} cannot be loaded in the guest")]
    Guest {
        /// The profile.
        profile: String,
        /// Why not.
        #[source]
        source: ttrpc::Error,
    },
}

impl Sandbox {
    /// Makes sure that the guest has the profile of the node's, as the node has it now.
    ///
    /// # Errors
    /// [`AppArmorError`].
    pub async fn load_profile(&self, agent: &Agent, profile: &str) -> Result<(), AppArmorError> {
        if profile.is_empty() || profile == UNCONFINED {
            return Ok(());
        }
        let name = profile.to_owned();
        let read = tokio::task::spawn_blocking(move || policy(Path::new(PROFILES), &name)).await;
        let policy = read.unwrap_or_else(|error| {
            let (profile, path) = (profile.to_owned(), PROFILES.into());
            Err(AppArmorError::Read { profile, path, source: io::Error::other(error) })
        })?;
        let mut digest = DefaultHasher::new();
        policy.hash(&mut digest);
        let digest = digest.finish();
        if lock(&self.profiles).get(profile) == Some(&digest) {
            return Ok(());
        }
        let request = AppArmorRequest { policy, ..Default::default() };
        let loaded = agent.sandbox.app_armor(within(timeouts::SLOW), &request).await;
        loaded.map_err(|source| AppArmorError::Guest { profile: profile.to_owned(), source })?;
        lock(&self.profiles).insert(profile.to_owned(), digest);
        Ok(())
    }
}

/// The policy by which `profile` was loaded; blocks.
fn policy(profiles: &Path, profile: &str) -> Result<Vec<u8>, AppArmorError> {
    // A child is loaded with its parent, as a hat is.
    let parent = profile.split_once("//").map_or(profile, |(parent, _)| parent);
    let missing = || AppArmorError::Missing(profile.to_owned());
    // The directory's name is the profile's, made plain and with a number behind it; the name itself is in a file.
    let entries = fs::read_dir(profiles).map_err(|_| missing())?;
    let is_it = |dir: &Path| fs::read_to_string(dir.join("name")).is_ok_and(|name| name.trim_end() == parent);
    let found = entries.flatten().map(|entry| entry.path()).find(|dir| may_be(dir, parent) && is_it(dir));
    let path = found.ok_or_else(missing)?.join("raw_data");
    let read = |source| AppArmorError::Read { profile: profile.to_owned(), path: path.clone(), source };
    let policy = fs::read(&path).map_err(read)?;
    if policy.len() as u64 > MOST { Err(AppArmorError::Large(profile.to_owned())) } else { Ok(policy) }
}

/// Whether a directory's name can be that of a profile, by the letters that every name keeps: there are hundreds.
fn may_be(dir: &Path, profile: &str) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>();
    name.rsplit_once('.').is_some_and(|(name, _)| plain(name) == plain(profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_policy_is_found_by_the_profiles_name() {
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
    }
}
