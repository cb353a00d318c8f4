//! Builds mount trees from the kernel's mount list, and finds the submounts that a path lookup reaches.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use crate::volumes::mountinfo::Entry;

/// A mount tree.
pub struct Tree<'a> {
    base: &'a Entry,
    /// Child mounts, by the id of their parent mount.
    children: HashMap<u64, Vec<&'a Entry>>,
}

/// A submount of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submount<'a> {
    /// Mount point, relative to the tree's mount point. Empty for a mount that covers the tree's root.
    pub path: PathBuf,
    /// The mount's entry in the mount list.
    pub entry: &'a Entry,
    /// Whether a cover ([`crate::volumes::covers`]) is at the path: in the share, the mount itself is a cover. In the
    /// host's tree, the mount is left out, and the share has a cover in its place.
    pub is_cover: bool,
}

impl<'a> Tree<'a> {
    /// Returns the tree at the mount point of mount `id`. If several mounts are stacked at this mount point, the tree's
    /// root is the bottom mount. Returns `None` if `entries` does not contain mount `id`.
    pub fn of(entries: &'a [Entry], id: u64) -> Option<Self> {
        let by_id: HashMap<u64, &Entry> = entries.iter().map(|entry| (entry.id, entry)).collect();
        let mut base = *by_id.get(&id)?;
        // A mount that covers another mount's root is a child of the covered mount, and has the same mount point.
        while let Some(parent) = by_id.get(&base.parent).filter(|p| p.point == base.point && p.id != base.id) {
            base = parent;
        }
        let mut children: HashMap<u64, Vec<&Entry>> = HashMap::new();
        for entry in entries.iter().filter(|entry| entry.id != entry.parent) {
            children.entry(entry.parent).or_default().push(entry);
        }
        // Sort by path components, so that the mount points below a mount point directly follow this mount point.
        children.values_mut().for_each(|mounts| mounts.sort_by(|a, b| a.point.cmp(&b.point)));
        Some(Self { base, children })
    }

    /// Returns the submounts that a path lookup reaches, in two lists. The second list has the submounts for which
    /// `excluded` returns true. The first list has all other submounts. In the first list, parents come before their
    /// submounts.
    ///
    /// Both lists omit all mounts below an excluded submount. A path lookup does not reach a mount if the mount's root,
    /// or a directory above the mount point, is covered by another mount.
    pub fn reachable(&self, excluded: impl Fn(&Entry) -> bool) -> (Vec<Submount<'a>>, Vec<Submount<'a>>) {
        let (mut found, mut left_out) = (Vec::new(), Vec::new());
        let top = self.top(self.base);
        if top.id == self.base.id {
            self.push_children(top, &mut found);
        } else {
            found.push(top);
        }
        let mut reached = Vec::new();
        while let Some(entry) = found.pop() {
            let Ok(path) = entry.point.strip_prefix(&self.base.point) else { continue };
            let submount = Submount { path: path.to_owned(), entry, is_cover: false };
            if excluded(entry) {
                left_out.push(submount);
            } else {
                reached.push(submount);
                self.push_children(entry, &mut found);
            }
        }
        (reached, left_out)
    }

    /// Returns the topmost mount that covers the root of `mount`, or `mount` if nothing covers its root.
    fn top(&self, mount: &'a Entry) -> &'a Entry {
        let mut top = mount;
        while let Some(cover) = self.children(top).find(|cover| cover.point == top.point) {
            top = cover;
        }
        top
    }

    /// Adds to `into` the children of `parent` that a path lookup reaches. If other mounts cover a child's root, adds
    /// the topmost of these mounts instead of the child.
    fn push_children(&self, parent: &'a Entry, into: &mut Vec<&'a Entry>) {
        let mut last: Option<&Path> = None;
        for child in self.children(parent) {
            // Skip a child if another child is mounted at the same mount point, or at a directory above this mount
            // point.
            if !last.is_some_and(|last| child.point.starts_with(last)) {
                last = Some(&child.point);
                into.push(self.top(child));
            }
        }
    }

    fn children(&self, parent: &Entry) -> impl Iterator<Item = &'a Entry> {
        self.children.get(&parent.id).into_iter().flatten().copied()
    }
}

/// Returns two lists that turn `old` into `new`: the submounts to remove, and the submounts to add.
///
/// Two submounts are equal if they show the same directory of the same file system at the same path, or if both are
/// covers at the same path. An unmount of a submount includes all mounts below it. Therefore, the first list omits a
/// submount below another removed submount. The second list includes each submount of `new` that is below a removed
/// submount.
pub fn differences<'a>(old: Vec<Submount<'a>>, new: Vec<Submount<'a>>) -> (Vec<Submount<'a>>, Vec<Submount<'a>>) {
    let same = |a: &Submount<'_>, b: &Submount<'_>| {
        a.path == b.path
            && a.is_cover == b.is_cover
            && (a.is_cover || (a.entry.device, &a.entry.root) == (b.entry.device, &b.entry.root))
    };
    let gone: Vec<&Submount<'_>> = old.iter().filter(|old| !new.iter().any(|new| same(old, new))).collect();
    let below_gone = |path: &Path| gone.iter().any(|gone| path != gone.path && path.starts_with(&gone.path));
    let removed = gone.iter().filter(|gone| !below_gone(&gone.path)).map(|gone| (*gone).clone()).collect();
    let added = new.iter().filter(|new| below_gone(&new.path) || !old.iter().any(|old| same(old, new))).cloned();
    (removed, added.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: u64, parent: u64, point: &str, kind: &str) -> Entry {
        Entry { id, parent, device: id, root: "/".into(), point: point.into(), kind: kind.into(), id_mapped: false }
    }

    fn reached(entries: &[Entry], id: u64) -> (Vec<(String, u64)>, Vec<u64>) {
        let tree = Tree::of(entries, id).unwrap();
        let (reached, left_out) = tree.reachable(|entry| entry.kind == "proc");
        let place = |submount: Submount<'_>| (submount.path.to_str().unwrap().to_owned(), submount.entry.id);
        (reached.into_iter().map(place).collect(), left_out.into_iter().map(|submount| submount.entry.id).collect())
    }

    fn tree() -> Vec<Entry> {
        vec![
            entry(1, 0, "/", "ext4"),
            entry(2, 1, "/v", "ext4"),
            entry(3, 2, "/v/a", "tmpfs"),
            entry(4, 3, "/v/a/b", "tmpfs"),
            entry(5, 2, "/v/a-b", "tmpfs"),
        ]
    }

    #[test]
    fn reachable_lists_parents_first() {
        let (mut paths, left_out) = reached(&tree(), 2);
        let at = |paths: &[(String, u64)], id| paths.iter().position(|(_, found)| *found == id).unwrap();
        assert!(at(&paths, 3) < at(&paths, 4));
        paths.sort();
        assert_eq!(paths, [("a".into(), 3), ("a-b".into(), 5), ("a/b".into(), 4)]);
        assert!(left_out.is_empty());
    }

    #[test]
    fn reachable_skips_mounts_that_a_later_mount_hides() {
        // Mount 7 is on a directory above the mount point of mount 6.
        let mut entries = tree();
        entries.push(entry(6, 2, "/v/run/netns/x", "proc"));
        entries.push(entry(7, 2, "/v/run", "tmpfs"));
        let (paths, left_out) = reached(&entries, 2);
        assert!(left_out.is_empty() && paths.contains(&("run".into(), 7)), "{paths:?}");
        // Mount 8 is on the root of mount 3, and hides mounts 3 and 4.
        entries.push(entry(8, 3, "/v/a", "tmpfs"));
        let (paths, _) = reached(&entries, 2);
        assert!(paths.contains(&("a".into(), 8)) && !paths.iter().any(|(_, id)| [3, 4].contains(id)), "{paths:?}");
    }

    #[test]
    fn reachable_excludes_a_mount_with_everything_below_it() {
        let mut entries = tree();
        entries.push(entry(6, 3, "/v/a/proc", "proc"));
        entries.push(entry(7, 6, "/v/a/proc/sys/fs", "tmpfs"));
        // Mount 8 is excluded and covers mount 5. Therefore, `paths` must contain neither mount.
        entries.push(entry(8, 5, "/v/a-b", "proc"));
        let (mut paths, mut left_out) = reached(&entries, 2);
        paths.sort();
        left_out.sort_unstable();
        assert_eq!(paths, [("a".into(), 3), ("a/b".into(), 4)]);
        assert_eq!(left_out, [6, 8]);
    }

    #[test]
    fn mount_that_covers_the_root_of_the_tree_has_an_empty_path() {
        let mut entries = tree();
        entries.push(entry(6, 2, "/v", "tmpfs"));
        entries.push(entry(7, 6, "/v/a", "tmpfs"));
        for id in [2, 6] {
            assert_eq!(reached(&entries, id).0, [("".into(), 6), ("a".into(), 7)]);
        }
        assert!(Tree::of(&entries, 9).is_none());
    }

    #[test]
    fn differences_lists_only_submounts_that_differ() {
        let entries = tree();
        let all = || Tree::of(&entries, 2).unwrap().reachable(|_| false).0;
        assert_eq!(differences(all(), all()), (vec![], vec![]));
        let (gone, new) = differences(vec![], all());
        assert_eq!((gone, new), (vec![], all()));
        // Covers of different mounts are equal. A cover and a mount differ.
        let one = |entry, is_cover| vec![Submount { path: "a".into(), entry, is_cover }];
        assert_eq!(differences(one(&entries[2], true), one(&entries[3], true)), (vec![], vec![]));
        let (gone, new) = differences(one(&entries[2], true), one(&entries[2], false));
        assert_eq!((gone, new), (one(&entries[2], true), one(&entries[2], false)));
    }
}
