//! Records a sandbox's cgroup in the state directory, so that the action `delete` can remove it if the shim dies.

use std::path::Path;

use crate::chain;
use crate::resources::cgroup::{Cgroup, CgroupError, CgroupLocation, PlannedCgroup};
use crate::sandbox::state_dir::{StateDir, StateError};
use crate::systemd::Unit;

/// Creates the cgroup, moves this process into it, and records it in `dir`.
///
/// # Errors
/// [`StateError`] if the cgroup cannot be recorded. The cgroup is then not created. The inner error says why the cgroup
/// cannot be created or entered.
pub fn enter(dir: &StateDir, planned: PlannedCgroup) -> Result<Result<Cgroup, CgroupError>, StateError> {
    let recorded = record_unless_exists(dir, planned.parts())?;
    let entered = planned.enter().inspect_err(|error| {
        if !may_appear_later(error) {
            dir.forget_cgroup();
        }
    });
    if let (Ok(cgroup), false) = (&entered, recorded)
        && let Err(error) = record(dir, (cgroup.location(), cgroup.unit()))
    {
        // Only a shim that dies needs the record.
        tracing::warn!(error = %chain(&error), "failed to record the sandbox's cgroup");
    }
    Ok(entered)
}

/// Records a cgroup before it is created, unless it exists already. Returns whether it was recorded.
///
/// A cgroup that exists can belong to another sandbox. If the shim died before it knew, the action `delete` would stop
/// the other sandbox's scope.
fn record_unless_exists(dir: &StateDir, parts: (&CgroupLocation, Option<&Unit>)) -> Result<bool, StateError> {
    let exists = parts.0.dirs().any(Path::exists);
    if !exists {
        record(dir, parts)?;
    }
    Ok(!exists)
}

/// Returns whether the cgroup can still appear after `error`: systemd may create the scope after the timeout. After any
/// other error, the cgroup no longer exists, or belongs to another sandbox.
fn may_appear_later(error: &CgroupError) -> bool {
    matches!(error, CgroupError::Unit(error) if !error.is_name_in_use())
}

fn record(dir: &StateDir, (location, unit): (&CgroupLocation, Option<&Unit>)) -> Result<(), StateError> {
    let dirs: Vec<_> = location.dirs().map(|dir| dir.display().to_string()).collect();
    let recorded = dir.write("cgroup", &dirs.join("\n"));
    let recorded = recorded.and_then(|()| unit.map_or(Ok(()), |unit| dir.write("unit", unit.name())));
    recorded.inspect_err(|_| dir.forget_cgroup())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::systemd::{CallError, UnitError};

    #[test]
    fn record_stays_if_systemd_is_slow_but_not_if_the_scope_is_of_another_sandbox() {
        let failed =
            |source| CgroupError::Unit(UnitError::Start { unit: "a.scope".into(), slice: "pods.slice".into(), source });
        assert!(may_appear_later(&failed(CallError::Io(io::ErrorKind::TimedOut.into()))));
        let name = "org.freedesktop.systemd1.UnitExists".to_owned();
        assert!(!may_appear_later(&failed(CallError::Failed { name, text: String::new() })));
        assert!(!may_appear_later(&CgroupError::None));
    }

    #[test]
    fn cgroup_that_exists_is_not_recorded_in_advance() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(dir.path());
        let (taken, unit) = (dir.path().join("taken"), Unit::new("a.scope"));
        std::fs::create_dir(&taken).unwrap();
        for (path, recorded) in [(taken, false), (dir.path().join("free"), true)] {
            let location = CgroupLocation::V2(path);
            assert_eq!(record_unless_exists(&state, (&location, Some(&unit))).unwrap(), recorded);
            assert_eq!((state.read("cgroup").is_some(), state.read("unit").is_some()), (recorded, recorded));
        }
    }

    #[test]
    fn cgroup_is_recorded_before_it_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::at(dir.path());
        let planned = PlannedCgroup::new("/husk-test-planned/x", "husk-test").unwrap();
        let first = planned.parts().0.dirs().next().unwrap().to_owned();
        record(&state, planned.parts()).unwrap();
        assert!(state.read("cgroup").unwrap().lines().any(|line| Path::new(line) == first));
        assert!(!first.exists());
        state.forget_cgroup();
        assert_eq!(state.read("cgroup"), None);
        // If a cgroup cannot be recorded, it must not be created.
        let missing = StateDir::at(&dir.path().join("missing"));
        assert!(record(&missing, planned.parts()).is_err());
    }
}
