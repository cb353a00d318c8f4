//! Parses a `cgroupsPath`: a path, or systemd's `slice:prefix:name`.

use std::path::{Component, Path, PathBuf};

use crate::resources::cgroup::{CgroupError, MAX_TASKS};
use crate::systemd::{Scope, Unit};

/// A parsed `cgroupsPath`.
#[derive(Debug, PartialEq, Eq)]
pub struct CgroupsPath {
    /// Path relative to the root of the hierarchy.
    pub relative: PathBuf,
    /// systemd scope to create, if the `cgroupsPath` has systemd's form.
    pub scope: Option<Scope>,
}

/// Parses a `cgroupsPath`.
///
/// # Errors
/// [`CgroupError::Path`] if `cgroups_path` is empty, leads out of the hierarchy, or has an invalid slice or name.
pub fn parse(cgroups_path: &str) -> Result<CgroupsPath, CgroupError> {
    let error = || CgroupError::Path(cgroups_path.to_owned());
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let (text, scope) = match parts.as_slice() {
        [path] => ((*path).to_owned(), None),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            // The unit has the same name as under runc (libcontainer/cgroups/systemd/common.go, getUnitName). In
            // runc, a name that ends in `.slice` is the name of a slice. Reject such a name, because a slice cannot
            // contain processes directly.
            let unit = format!("{prefix}-{name}.scope");
            if name.is_empty() || name.ends_with(".slice") || unit.contains('/') {
                return Err(error());
            }
            let text = format!("{}/{unit}", expand_slice(slice).ok_or_else(error)?);
            (text, Some(Scope { slice: slice.to_owned(), unit: Unit::new(unit), max_tasks: MAX_TASKS }))
        }
        _ => return Err(error()),
    };
    let mut relative = PathBuf::new();
    for component in Path::new(&text).components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(error()),
        }
    }
    if relative.as_os_str().is_empty() { Err(error()) } else { Ok(CgroupsPath { relative, scope }) }
}

/// Returns the cgroup path of a slice, or `None` if the slice's name is invalid. For example, the path of `a-b.slice`
/// is `a.slice/a-b.slice`.
fn expand_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice")?;
    if name == "-" {
        return Some(String::new());
    }
    if name.is_empty() || name.contains('/') {
        return None;
    }
    let mut path = String::new();
    let mut prefix = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        prefix = if prefix.is_empty() { part.to_owned() } else { format!("{prefix}-{part}") };
        path.push_str(&format!("/{prefix}.slice"));
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_returns_the_path_and_rejects_invalid_values() {
        let path = |text: &str| parse(text).map(|parse| parse.relative.display().to_string()).ok();
        assert_eq!(path("/default/c1").as_deref(), Some("default/c1"));
        assert_eq!(path("k8s.io/x").as_deref(), Some("k8s.io/x"));
        assert_eq!(
            path("kubepods-burstable-pod1.slice:cri-containerd:abc").as_deref(),
            Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
        );
        assert_eq!(path(":p:n").as_deref(), Some("system.slice/p-n.scope"));
        assert_eq!(path("-.slice::n").as_deref(), Some("-n.scope"));
        for bad in ["", "/", "/../x", "a:b", "a/b.slice:p:n", "a--b.slice:p:n", "a:p:n", "a.slice:p:", "a.slice:p:n/.."]
        {
            assert_eq!(path(bad), None, "{bad}");
        }
        assert_eq!(path("a.slice:p:n.slice"), None);
    }

    #[test]
    fn parse_returns_a_scope_only_for_slice_prefix_name() {
        let scope = |text: &str| parse(text).unwrap().scope;
        assert_eq!(scope("/kubepods.slice/x.scope"), None);
        let (slice, unit) = ("system.slice".into(), Unit::new("p-n.scope"));
        assert_eq!(scope(":p:n"), Some(Scope { slice, unit, max_tasks: MAX_TASKS }));
    }
}
