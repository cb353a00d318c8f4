//! Finds cycles among the child modules of a crate or of a module.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::uses::Use;
use crate::source::Module;

/// The name under which the functions of the crate's root count as a module. No module can have this name.
const ROOT: &str = "crate";

/// Uses among the children of one module. The key is the pair of the using child and the used child. The value is the
/// first use of the used child by the using child.
type Siblings<'a> = BTreeMap<(&'a str, &'a str), &'a Use>;

/// Children of one module that all use each other, directly or through other children.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Knot<'a> {
    /// The path of the module that has these children. Empty for the crate's root.
    pub within: &'a [String],
    pub modules: Vec<&'a str>,
    /// The uses among these children.
    pub uses: Siblings<'a>,
}

/// The uses among the modules of a crate.
pub struct Graph<'a> {
    /// The uses among the children of each module.
    siblings: BTreeMap<&'a [String], Siblings<'a>>,
    /// Number of pairs of a module and its child that use each other.
    pub mutual_with_parent: usize,
}

impl<'a> Graph<'a> {
    /// Creates the graph. Each use counts as a use between two children of the innermost module that contains both the
    /// using and the used module. The functions of the crate's root count as one more child of the root, [`ROOT`].
    pub fn new(modules: &'a [Module], uses: &'a [Use]) -> Self {
        let mut siblings: BTreeMap<&[String], Siblings<'_>> = BTreeMap::new();
        let (mut up, mut down) = (BTreeSet::new(), BTreeSet::new());
        let root: &[String] = &[];
        for used in uses {
            let (from, to) = (modules[used.from].path.as_slice(), modules[used.to].path.as_slice());
            let common = from.iter().zip(to).take_while(|(a, b)| a == b).count();
            let (within, _) = from.split_at(common);
            match (from.get(common), to.get(common)) {
                (Some(from), Some(to)) => {
                    siblings.entry(within).or_default().entry((from, to)).or_insert(used);
                }
                (Some(child), None) => {
                    up.insert((within, child));
                    if used.root_function {
                        siblings.entry(root).or_default().entry((child, ROOT)).or_insert(used);
                    }
                }
                (None, Some(child)) => {
                    down.insert((within, child));
                    if used.root_function {
                        siblings.entry(root).or_default().entry((ROOT, child)).or_insert(used);
                    }
                }
                (None, None) => {}
            }
        }
        Graph { siblings, mutual_with_parent: up.intersection(&down).count() }
    }

    /// Returns the number of pairs of siblings in which the first sibling uses the second.
    pub fn uses(&self) -> usize {
        self.siblings.values().map(BTreeMap::len).sum()
    }

    /// Returns all knots, those of the crate's root first.
    pub fn knots(&self) -> Vec<Knot<'a>> {
        self.siblings.iter().flat_map(|(within, siblings)| knots(within, siblings)).collect()
    }
}

fn knots<'a>(within: &'a [String], siblings: &Siblings<'a>) -> Vec<Knot<'a>> {
    let names: BTreeSet<&str> = siblings.keys().flat_map(|(from, to)| [*from, *to]).collect();
    let reach: BTreeMap<&str, BTreeSet<&str>> = names.iter().map(|name| (*name, reachable(siblings, name))).collect();
    let reaches = |from: &str, to: &str| reach.get(from).is_some_and(|reached| reached.contains(to));
    let mut done = BTreeSet::new();
    let mut knots = Vec::new();
    for name in &names {
        if done.contains(name) || !reaches(name, name) {
            continue;
        }
        let modules: Vec<&str> =
            names.iter().copied().filter(|other| reaches(name, other) && reaches(other, name)).collect();
        done.extend(modules.iter().copied());
        let inside = |(from, to): &(&str, &str)| modules.contains(from) && modules.contains(to);
        let uses = siblings.iter().filter(|(ends, _)| inside(ends)).map(|(ends, used)| (*ends, *used)).collect();
        knots.push(Knot { within, modules, uses });
    }
    knots
}

/// Returns the modules that `start` reaches by one or more uses.
fn reachable<'a>(siblings: &Siblings<'a>, start: &str) -> BTreeSet<&'a str> {
    let (mut reached, mut queue) = (BTreeSet::new(), VecDeque::from([start.to_owned()]));
    while let Some(name) = queue.pop_front() {
        for (_, to) in siblings.keys().filter(|(from, _)| *from == name) {
            if reached.insert(*to) {
                queue.push_back((*to).to_owned());
            }
        }
    }
    reached
}

impl<'a> Knot<'a> {
    /// Returns the uses, in order, of the shortest cycle that begins with the use of `to` by `from`.
    pub fn cycle(&self, from: &'a str, to: &'a str) -> Vec<(&'a str, &'a str)> {
        // Maps each module to the next module on the shortest way to `from`. A breadth-first search, backwards from
        // `from`, fills the map.
        let mut next: BTreeMap<&str, &str> = BTreeMap::new();
        let mut queue = VecDeque::from([from]);
        while let Some(name) = queue.pop_front() {
            for (user, _) in self.uses.keys().filter(|(_, used)| *used == name) {
                if *user != from && !next.contains_key(user) {
                    next.insert(user, name);
                    queue.push_back(user);
                }
            }
        }
        let mut cycle = vec![(from, to)];
        let mut at = to;
        while at != from {
            let Some(after) = next.get(at) else { break };
            cycle.push((at, after));
            at = after;
        }
        cycle
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// Returns modules with these paths, and these uses among them.
    fn crate_of(paths: &[&str], pairs: &[(&str, &str)]) -> (Vec<Module>, Vec<Use>) {
        let module = |path: &&str| Module {
            path: path.split("::").filter(|name| !name.is_empty()).map(str::to_owned).collect(),
            file: PathBuf::new(),
            attrs: vec![],
            items: vec![],
            test_only: false,
        };
        let index = |name: &str| paths.iter().position(|path| *path == name).unwrap();
        let uses = pairs
            .iter()
            .map(|(from, to)| Use { from: index(from), to: index(to), line: 1, root_function: false })
            .collect();
        (paths.iter().map(module).collect(), uses)
    }

    #[test]
    fn knots_are_found_at_each_level() {
        let paths = ["", "a", "a::x", "a::y", "b", "c", "d"];
        let pairs = [("a::x", "b"), ("b", "c"), ("c", "a::y"), ("d", "a"), ("a::x", "a::y"), ("a::y", "a::x")];
        let (modules, uses) = crate_of(&paths, &pairs);
        let graph = Graph::new(&modules, &uses);
        let knots = graph.knots();
        assert_eq!(knots[0].modules, ["a", "b", "c"]);
        assert_eq!((knots[1].within, &knots[1].modules), (&["a".to_owned()][..], &vec!["x", "y"]));
        assert_eq!(knots.len(), 2);
        assert_eq!(knots[0].cycle("b", "c"), [("b", "c"), ("c", "a"), ("a", "b")]);
        assert_eq!(graph.uses(), 6);
    }

    #[test]
    fn functions_of_the_root_count_as_a_module() {
        let (modules, mut uses) = crate_of(&["", "a", "b", "b::x"], &[("a", ""), ("", "b"), ("b::x", "a")]);
        assert!(Graph::new(&modules, &uses).knots().is_empty());
        for used in &mut uses {
            used.root_function = true;
        }
        let graph = Graph::new(&modules, &uses);
        assert_eq!(graph.knots()[0].cycle("a", "crate"), [("a", "crate"), ("crate", "b"), ("b", "a")]);
    }

    #[test]
    fn child_and_parent_may_use_each_other() {
        let paths = ["", "a", "a::x", "b"];
        let (modules, uses) = crate_of(&paths, &[("a", "a::x"), ("a::x", "a"), ("", "b"), ("a::x", "b")]);
        let graph = Graph::new(&modules, &uses);
        assert!(graph.knots().is_empty());
        assert_eq!(graph.mutual_with_parent, 1);
    }
}
