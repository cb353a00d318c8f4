//! The list of the node's sockets to which containers may connect (`host_sockets`).

use std::path::{Component, Path};

/// Checks an entry of the list. If the entry is invalid, returns the reason.
///
/// # Errors
/// The reason.
pub fn check(entry: &str) -> Result<(), String> {
    let path = Path::new(entry);
    if !path.is_absolute() {
        return Err(format!("{entry:?} is not an absolute path"));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(format!("{entry:?} contains \"..\": write the path without it"));
    }
    // `components` leaves out repeated slashes and ".". An entry with these would never match.
    let plain: std::path::PathBuf = path.components().collect();
    if plain.as_os_str().len() + usize::from(entry.ends_with('/')) != entry.len() || entry.contains('\0') {
        let message = format!("{entry:?} contains \"//\", \".\" or a NUL, or is \"/\": write a plain path below \"/\"");
        return Err(message);
    }
    Ok(())
}

/// Returns whether an entry of `list` is `socket`, or is a directory that contains `socket` at any depth. An entry for
/// a directory ends with a slash. `socket` is a path without symlinks.
pub fn allow(list: &[String], socket: &Path) -> bool {
    if !socket.is_absolute() || socket.components().any(|part| part == Component::ParentDir) {
        return false;
    }
    list.iter().any(|entry| match entry.strip_suffix('/') {
        Some(directory) => socket.starts_with(directory) && socket != Path::new(directory),
        None => socket == Path::new(entry),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn check_accepts_plain_absolute_paths() {
        for good in ["/run/a.sock", "/run/spire/sockets/", "/a b", "/run/..a"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", "run/a", "/run/../a", "/run//a", "/run/./a", "/", "/run/a//", "/run/.", "/a\0b", "."] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn allow_compares_whole_components() {
        let list = ["/run/a.sock".to_owned(), "/run/spire/".to_owned()];
        for (socket, expected) in [
            ("/run/a.sock", true),
            ("/run/spire/x", true),
            ("/run/spire/deep/x", true),
            ("/run/a.sock/x", false),
            ("/run/a.sock2", false),
            ("/run/spire", false),
            ("/run/spire2/x", false),
            ("/run/spire/../x", false),
            ("run/a.sock", false),
            ("/run", false),
        ] {
            assert_eq!(allow(&list, Path::new(socket)), expected, "{socket}");
        }
        assert!(!allow(&[], Path::new("/run/a.sock")));
    }

    proptest! {
        #[test]
        fn allow_never_leaves_the_directory_of_an_entry(parts in prop::collection::vec("[ab.]{1,2}", 1..5), more in "[ab./]{0,8}") {
            let directory = format!("/{}/", parts.join("/"));
            prop_assume!(check(&directory).is_ok());
            let list = [directory.clone()];
            let socket = format!("{directory}{more}");
            let plain: std::path::PathBuf = Path::new(&socket).components().collect();
            let below = !more.split('/').any(|part| part == "..") && plain.as_os_str().len() >= directory.len();
            prop_assert_eq!(allow(&list, Path::new(&socket)), below, "{}", socket);
            let elsewhere = format!("/x{socket}");
            prop_assert!(!allow(&list, Path::new(&elsewhere)));
        }

        #[test]
        fn allow_of_an_exact_entry_allows_only_this_path(entry in "(/[ab]{1,2}){1,4}", socket in "(/[ab]{1,2}){1,4}") {
            prop_assert_eq!(check(&entry), Ok(()));
            prop_assert_eq!(allow(std::slice::from_ref(&entry), Path::new(&socket)), entry == socket);
        }

        #[test]
        fn check_never_panics(entry: String) {
            let _ = check(&entry);
            let _ = allow(&[entry], Path::new("/a"));
        }
    }
}
