//! What a `cgroupsPath` means: a path, or systemd's `slice:prefix:name`.

use std::path::{Component, Path, PathBuf};

use super::CgroupError;
use crate::systemd::{Scope, Unit};

/// A cgroup that was named.
#[derive(Debug, PartialEq, Eq)]
pub struct Named {
    /// Where it is in the hierarchy.
    pub relative: PathBuf,
    /// The scope of systemd's that it is to be.
    pub scope: Option<Scope>,
}

/// Reads a `cgroupsPath`.
///
/// # Errors
/// [`CgroupError::Path`] when it would lead out of the hierarchy, or is of systemd's form and names no scope.
pub fn named(cgroups_path: &str) -> Result<Named, CgroupError> {
    let error = || CgroupError::Path(cgroups_path.to_owned());
    let parts: Vec<&str> = cgroups_path.split(':').collect();
    let (text, scope) = match parts.as_slice() {
        [path] => ((*path).to_owned(), None),
        [slice, prefix, name] => {
            let slice = if slice.is_empty() { "system.slice" } else { slice };
            // As with runc (libcontainer/cgroups/systemd/common.go, getUnitName). A slice has no processes of its own.
            let unit = format!("{prefix}-{name}.scope");
            if name.is_empty() || name.ends_with(".slice") || unit.contains('/') {
                return Err(error());
            }
            let text = format!("{}/{unit}", expand_slice(slice).ok_or_else(error)?);
            (text, Some(Scope { slice: slice.to_owned(), unit: Unit::new(unit) }))
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
    if relative.as_os_str().is_empty() { Err(error()) } else { Ok(Named { relative, scope }) }
}

/// systemd keeps `a-b.slice` in `a.slice`.
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
    fn paths() {
        let path = |text: &str| named(text).map(|named| named.relative.display().to_string()).ok();
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
    fn systemd_is_asked_only_in_its_own_form() {
        let scope = |text: &str| named(text).unwrap().scope;
        assert_eq!(scope("/kubepods.slice/x.scope"), None);
        assert_eq!(scope(":p:n"), Some(Scope { slice: "system.slice".into(), unit: Unit::new("p-n.scope") }));
    }
}
