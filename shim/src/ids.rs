//! Checks the ids and namespaces that the shim uses as path components.

/// Returns whether `name` is valid as an id or a namespace.
///
/// A valid name has 1 to 255 characters of `[A-Za-z0-9_.-]`, and begins with a letter or digit. containerd's own rule
/// is stricter: for example, an id has at most 76 characters.
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
