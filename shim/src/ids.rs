//! Checks containerd's ids and namespaces, because the shim uses them as path components.

/// Returns whether `name` is valid as an id or a namespace.
///
/// This function only ensures that the name is a single path component that cannot lead out of its directory.
/// containerd's own rule is stricter: it allows at most 76 characters, for example.
pub fn is_name(name: &str) -> bool {
    name.len() <= 255
        && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_name_accepts_single_path_components_only() {
        for bad in ["", "..", "a/b", ".hidden", "a\nb"] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(is_name("a.b_c-1"));
    }
}
