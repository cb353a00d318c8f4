//! Finds the uses among the modules of a crate: `use` declarations, and paths in code and in macro calls.
//!
//! Names are resolved only as far as is needed to find their modules. Through `super::`, a child module can use a name
//! that its parent imports. This counts as a use, by the child, of the module that defines the name. Test code is left
//! out.

use std::collections::{HashMap, HashSet};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Item, UseTree};

use crate::source::{self, Module};

/// Maximum length of a chain of imports that is followed. Longer chains occur only if imports form a cycle.
const DEPTH: usize = 16;

/// A use of one module by another. `from` and `to` are indices in the list of modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub from: usize,
    pub to: usize,
    /// The line in the file of `from`.
    pub line: usize,
    /// Whether a function of the crate's root uses `to`, or `from` uses such a function.
    pub root_function: bool,
}

/// A path that occurs in a module.
struct Named {
    segments: Vec<String>,
    line: usize,
    kind: Kind,
    /// Whether the path is in a function that is an item of the module.
    in_function: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// The path is in code.
    Path,
    /// The path is in a `use` declaration.
    Declared,
    /// The path is in a `use` declaration that imports all names of a module.
    Glob,
}

/// The names of one module.
#[derive(Default)]
struct Names {
    items: HashSet<String>,
    /// The items that are functions.
    functions: HashSet<String>,
    /// The path that each imported name stands for.
    imports: HashMap<String, Vec<String>>,
    /// The paths of the modules from which all names are imported.
    globs: Vec<Vec<String>>,
    named: Vec<Named>,
}

/// The modules of a crate with their names.
struct Scope<'a> {
    modules: &'a [Module],
    index: HashMap<&'a [String], usize>,
    names: Vec<Names>,
}

/// Returns the uses between different modules of a crate.
pub fn uses(modules: &[Module]) -> Vec<Use> {
    let index = modules.iter().enumerate().map(|(number, module)| (module.path.as_slice(), number)).collect();
    let scope = Scope { modules, index, names: modules.iter().map(names).collect() };
    let mut uses = Vec::new();
    for (from, names) in scope.names.iter().enumerate() {
        for named in &names.named {
            // A path that is a single name may be a variable with the name of a child module. Therefore such a path
            // does not count as a use.
            if let (Kind::Path, [name]) = (named.kind, named.segments.as_slice())
                && scope.child(from, name).is_some()
            {
                continue;
            }
            let Some(to) = scope.resolve(from, from, &named.segments, 0) else { continue };
            // An import of all names of an enclosing module does not count. The imported names are resolved where they
            // are used.
            let around = named.kind == Kind::Glob && scope.is_within(from, to);
            let root_function = (scope.is_root(from) && named.in_function) || scope.names_root_function(to, named);
            let key = (from, to, root_function);
            let twice = uses.iter().any(|earlier: &Use| (earlier.from, earlier.to, earlier.root_function) == key);
            if from != to && !around && !twice {
                uses.push(Use { from, to, line: named.line, root_function });
            }
        }
    }
    uses
}

impl Scope<'_> {
    fn is_root(&self, module: usize) -> bool {
        self.modules[module].path.is_empty()
    }

    /// Whether `named` is a path to a function of the crate's root. `to` is the module to which the path leads.
    fn names_root_function(&self, to: usize, named: &Named) -> bool {
        let first = named.segments.iter().find(|name| !matches!(name.as_str(), "crate" | "self" | "super"));
        self.is_root(to) && first.is_some_and(|name| self.names[to].functions.contains(name))
    }

    /// Whether `module` is the module `around`, or is inside `around`.
    fn is_within(&self, module: usize, around: usize) -> bool {
        self.modules[module].path.starts_with(&self.modules[around].path)
    }

    fn child(&self, module: usize, name: &str) -> Option<usize> {
        let path: Vec<String> = self.modules[module].path.iter().cloned().chain([name.to_owned()]).collect();
        self.index.get(path.as_slice()).copied()
    }

    fn parent(&self, module: usize) -> Option<usize> {
        let (_, above) = self.modules[module].path.split_last()?;
        self.index.get(above).copied()
    }

    /// Returns the module that defines the item to which a path in the module `at` leads, for a use by the module
    /// `from`. Returns `None` if the path leads out of the crate, or to something local.
    fn resolve(&self, from: usize, at: usize, path: &[String], depth: usize) -> Option<usize> {
        let (first, rest) = path.split_first()?;
        let start = match first.as_str() {
            "crate" => *self.index.get(&[][..])?,
            "self" => at,
            "super" => self.parent(at)?,
            name if self.child(at, name).is_some() => return self.descend(from, at, path, depth),
            name if self.names[at].items.contains(name) => return Some(at),
            name => return self.imported(from, at, name, rest, depth),
        };
        self.descend(from, start, rest, depth)
    }

    /// Returns the module that defines the item to which a path leads. The path starts in the module `at`.
    fn descend(&self, from: usize, mut at: usize, path: &[String], depth: usize) -> Option<usize> {
        for (number, name) in path.iter().enumerate() {
            if name == "super" {
                at = self.parent(at)?;
            } else if let Some(child) = self.child(at, name) {
                at = child;
            } else if self.is_within(from, at) && !self.names[at].items.contains(name) {
                let rest = path.get(number + 1..).unwrap_or_default();
                let target = self.imported(from, at, name, rest, depth);
                // An imported name without a target is of another crate.
                return if self.names[at].imports.contains_key(name) { target } else { target.or(Some(at)) };
            } else {
                break;
            }
        }
        Some(at)
    }

    /// Returns the module that defines the item to which a path leads. The path's first name is `name`, which the
    /// module `at` imports. `rest` has the path's other names.
    fn imported(&self, from: usize, at: usize, name: &str, rest: &[String], depth: usize) -> Option<usize> {
        if depth > DEPTH {
            return None;
        }
        if let Some(import) = self.names[at].imports.get(name) {
            let path: Vec<String> = import.iter().chain(rest).cloned().collect();
            // Declarations such as `use serde;` import another crate.
            return if path.first().is_some_and(|first| first == name) && import.len() == 1 {
                None
            } else {
                self.resolve(from, at, &path, depth + 1)
            };
        }
        self.names[at].globs.iter().find_map(|glob| {
            let target = self.resolve(from, at, glob, depth + 1).filter(|target| *target != at)?;
            let names = &self.names[target];
            let path: Vec<String> = [name.to_owned()].into_iter().chain(rest.iter().cloned()).collect();
            if names.items.contains(name) || self.child(target, name).is_some() {
                self.descend(from, target, &path, depth + 1)
            } else if names.imports.contains_key(name) || !names.globs.is_empty() {
                self.imported(from, target, name, rest, depth + 1)
            } else {
                None
            }
        })
    }
}

/// Collects the names of a module.
fn names(module: &Module) -> Names {
    let mut names = Names::default();
    if module.test_only {
        return names;
    }
    for item in &module.items {
        let (attrs, ident) = match item {
            Item::Use(item) => {
                if !source::is_test_only(&item.attrs) {
                    import(&mut names, &item.tree);
                }
                (&item.attrs, None)
            }
            Item::Const(item) => (&item.attrs, Some(&item.ident)),
            Item::Enum(item) => (&item.attrs, Some(&item.ident)),
            Item::Fn(item) => (&item.attrs, Some(&item.sig.ident)),
            Item::Impl(item) => (&item.attrs, None),
            Item::Macro(item) => (&item.attrs, item.ident.as_ref()),
            Item::Static(item) => (&item.attrs, Some(&item.ident)),
            Item::Struct(item) => (&item.attrs, Some(&item.ident)),
            Item::Trait(item) => (&item.attrs, Some(&item.ident)),
            Item::Type(item) => (&item.attrs, Some(&item.ident)),
            Item::Union(item) => (&item.attrs, Some(&item.ident)),
            _ => continue,
        };
        names.items.extend(ident.map(source::name));
        let in_function = matches!(item, Item::Fn(_));
        if in_function {
            names.functions.extend(ident.map(source::name));
        }
        if !source::is_test_only(attrs) {
            Collector { named: &mut names.named, in_function }.visit_item(item);
        }
    }
    names
}

/// Records the names that a `use` declaration of a module imports.
fn import(names: &mut Names, tree: &UseTree) {
    leaves(tree, &mut Vec::new(), &mut |path, name, _| match name {
        Some(name) => drop(names.imports.insert(name.to_owned(), path.to_vec())),
        None => names.globs.push(path.to_vec()),
    });
}

/// A function that takes a path of a `use` declaration, the name that the declaration defines for the path (`None` if
/// the declaration imports all names), and the line of the path.
type Found<'a> = dyn FnMut(&[String], Option<&str>, usize) + 'a;

/// Calls `found` for each path of a `use` declaration. All paths begin with the names in `prefix`.
fn leaves(tree: &UseTree, prefix: &mut Vec<String>, found: &mut Found<'_>) {
    let mut leaf = |ident: &proc_macro2::Ident, renamed: Option<&proc_macro2::Ident>| {
        let name = source::name(ident);
        let line = ident.span().start().line;
        // `a::{self}` means `a`.
        if name != "self" || prefix.is_empty() {
            prefix.push(name);
            let last = prefix.last().cloned().unwrap_or_default();
            found(prefix, Some(&renamed.map_or(last, source::name)), line);
            prefix.pop();
        } else {
            let last = prefix.last().cloned().unwrap_or_default();
            found(prefix, Some(&renamed.map_or(last, source::name)), line);
        }
    };
    match tree {
        UseTree::Path(path) => {
            prefix.push(source::name(&path.ident));
            leaves(&path.tree, prefix, found);
            prefix.pop();
        }
        UseTree::Name(name) => leaf(&name.ident, None),
        UseTree::Rename(rename) => leaf(&rename.ident, Some(&rename.rename)),
        UseTree::Glob(glob) => found(prefix, None, glob.star_token.span.start().line),
        UseTree::Group(group) => group.items.iter().for_each(|tree| leaves(tree, prefix, found)),
    }
}

/// Collects the paths that occur in items.
struct Collector<'a> {
    named: &'a mut Vec<Named>,
    /// Whether the item is a function.
    in_function: bool,
}

impl<'ast> Visit<'ast> for Collector<'_> {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        leaves(&item.tree, &mut Vec::new(), &mut |path, name, line| {
            let kind = if name.is_none() { Kind::Glob } else { Kind::Declared };
            self.named.push(Named { segments: path.to_vec(), line, kind, in_function: self.in_function });
        });
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if let (None, Some(first)) = (&path.leading_colon, path.segments.first()) {
            let segments = path.segments.iter().map(|segment| source::name(&segment.ident)).collect();
            let line = first.ident.span().start().line;
            self.named.push(Named { segments, line, kind: Kind::Path, in_function: self.in_function });
        }
        visit::visit_path(self, path);
    }

    /// The path of `pub(in path)` does not count as a use.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    /// A function of an `impl` does not count if it is for tests only.
    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !source::is_test_only(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_token_stream(&mut self, tokens: &'ast TokenStream) {
        self.tokens(tokens.clone());
    }
}

impl Collector<'_> {
    /// Collects paths from tokens that syn does not parse: those of macro calls and attributes.
    fn tokens(&mut self, tokens: TokenStream) {
        // `path` has the names of the path so far, and its line. `colons` is the number of colons since the last name.
        // `member` says whether the last token was a dot.
        let mut path: Option<(Vec<String>, usize)> = None;
        let (mut colons, mut member) = (0, false);
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    let line = ident.span().start().line;
                    match &mut path {
                        Some((segments, _)) if colons == 2 => segments.push(source::name(&ident)),
                        _ => {
                            self.end(&mut path);
                            // After a dot, the name is a field or method. After two colons, the name ends `::a` or
                            // `<T>::a`. Names of both kinds are left out.
                            path = (!member && colons != 2).then(|| (vec![source::name(&ident)], line));
                        }
                    }
                    (colons, member) = (0, false);
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => {
                    (colons, member) = (colons + 1, false);
                }
                TokenTree::Group(group) => {
                    self.end(&mut path);
                    (colons, member) = (0, false);
                    self.tokens(group.stream());
                }
                TokenTree::Punct(punct) => {
                    self.end(&mut path);
                    (colons, member) = (0, punct.as_char() == '.');
                }
                TokenTree::Literal(_) => {
                    self.end(&mut path);
                    (colons, member) = (0, false);
                }
            }
        }
        self.end(&mut path);
    }

    fn end(&mut self, path: &mut Option<(Vec<String>, usize)>) {
        if let Some((segments, line)) = path.take() {
            self.named.push(Named { segments, line, kind: Kind::Path, in_function: self.in_function });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Returns the uses in a crate of these files, as "FROM > TO LINE", in the order in which they are found.
    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let modules = source::modules(&dir.path().join("lib.rs")).unwrap();
        let name = |index: usize| modules[index].path.join("::");
        uses(&modules).iter().map(|it| format!("{} > {} {}", name(it.from), name(it.to), it.line)).collect()
    }

    #[test]
    fn declarations_and_paths_are_found() {
        let a = "use crate::b::{self, c::{D, E as F}};
use std::fmt;
fn f(x: super::d::T) {
 let y = crate::e::V;
                 println!(\"{}\", crate::f::G);\n x.node();
}
#[derive(X)]
#[x(with = crate::g::h)]
struct S;
                 pub(in crate::h) fn g() {}
";
        let lib = "mod a; mod b { pub mod c {} } mod d {} mod e {} mod f {} mod g {} mod h {}";
        assert_eq!(
            found(&[("lib.rs", lib), ("a.rs", a)]),
            ["a > b 1", "a > b::c 1", "a > d 3", "a > e 4", "a > f 5", "a > g 9"]
        );
    }

    #[test]
    fn names_that_a_parent_imports_count_as_uses_of_their_module() {
        let lib = "mod a; mod b { pub struct B; pub fn f() {} } mod c { pub struct C; }
                   pub use b::B;
use c::*;
use std::io;
pub struct Root;
";
        let a = "use super::B;
use super::*;
fn f() -> C { io::x(); Root }
";
        assert_eq!(found(&[("lib.rs", lib), ("a.rs", a)]), [" > b 2", " > c 3", "a > b 1", "a > c 3", "a >  3"]);
    }

    #[test]
    fn tests_and_variables_are_left_out() {
        let lib = "mod a; mod b {}
#[cfg(test)] mod tests { use crate::b::x; }
                   fn f(b: u8) { g(b); println!(\"{}\", b); }
#[cfg(test)] fn t() { b::x() }
";
        assert_eq!(found(&[("lib.rs", lib), ("a.rs", "#[cfg(test)] use crate::b::x;")]), [""; 0]);
    }

    #[test]
    fn cyclic_imports_are_followed_only_to_a_limit() {
        let lib = "mod a; mod b;
pub use a::*;
pub use b::*;
fn f() -> Missing { }
";
        let files = [
            ("lib.rs", lib),
            (
                "a.rs",
                "pub use super::*;
",
            ),
            (
                "b.rs",
                "pub use super::*;
use super::x as x;",
            ),
        ];
        assert_eq!(found(&files)[..2], [" > a 2", " > b 3"]);
    }
}
