//! `cargo xtask imports`: checks that `use` items are grouped, and can group them. rustfmt can group imports only with
//! nightly Rust.
//!
//! The groups are: the standard library; other crates; this crate (`crate`, `super`, `self`, and modules that the same
//! file declares). A blank line separates two groups. A group has no blank line inside. Re-exports (`pub use`) are a
//! fourth group. If the re-exports already come first, they stay first. Otherwise they come last. rustfmt sorts the
//! items of a group.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use proc_macro2::Span;
use syn::{Item, ItemUse, UseTree, Visibility};

use crate::build::cargo;
use crate::source::name;
use crate::{cmd, paths, ui};

/// The group of a `use` item. The variants are in the order of the groups in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Group {
    FirstReExports,
    Std,
    External,
    Own,
    ReExports,
}

/// The lines of a `use` item in its file, including the comments right above the item.
struct Import {
    group: Group,
    /// The index of the first line, and the index of the line after the last one. Line 1 of the file has the index 0.
    lines: (usize, usize),
    /// Whether the item must be moved by hand, because it has attributes or comments or shares a line with other code.
    by_hand: bool,
}

/// Successive `use` items that have only blank lines and comments between them.
type Block = Vec<Import>;

/// The blocks of a file that are grouped wrongly.
struct Findings {
    /// The number of each wrong block's first line. The file's first line has the number 1.
    lines: Vec<usize>,
    /// The number of the first line of each wrong block that must be grouped by hand.
    by_hand: Vec<usize>,
    /// The file's text, in which all wrong blocks are grouped, except those in `by_hand`.
    text: String,
}

/// Fails if the imports of a file are grouped wrongly. With `fix`, first groups imports and runs `cargo fmt`, and then
/// fails only if imports must be grouped by hand.
pub fn imports(fix: bool) -> Result<()> {
    let root = paths::root();
    let (mut wrong, mut fixed) = (Vec::new(), 0);
    for path in files(&root)? {
        let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let findings = inspect(&text).with_context(|| format!("failed to parse {}", path.display()))?;
        if fix && findings.text != text {
            fs::write(&path, &findings.text).with_context(|| format!("failed to write {}", path.display()))?;
            fixed += 1;
        }
        let shown = path.strip_prefix(&root).unwrap_or(&path).display();
        let lines = if fix { findings.by_hand } else { findings.lines };
        wrong.extend(lines.iter().map(|line| format!("{shown}:{line}")));
    }
    if fix {
        ui::say("imports", format!("changed {fixed} files"));
        cmd::shown(cargo().current_dir(&root).args(["fmt", "--all"]))?;
    }
    match (wrong.is_empty(), fix) {
        (true, _) => Ok(()),
        (false, true) => {
            bail!("failed to group imports with attributes or comments; group them by hand:\n{}", wrong.join("\n"))
        }
        (false, false) => bail!(
            "imports are not grouped (std, other crates, this crate); `cargo xtask imports --fix` groups them:\n{}",
            wrong.join("\n")
        ),
    }
}

/// Returns the Rust files in `dir` and its subdirectories, without build outputs and hidden directories.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let entries = fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("failed to list {}", dir.display()))?;
        let (path, kind) = (entry.path(), entry.file_type()?);
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if kind.is_dir() && !hidden && entry.file_name() != "target" && path != paths::target() {
            files.extend(self::files(&path)?);
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Finds the blocks of a file that are grouped wrongly. Groups these blocks, except those that must be grouped by hand.
fn inspect(text: &str) -> Result<Findings> {
    let lines: Vec<&str> = text.lines().collect();
    let file = syn::parse_file(text)?;
    let mut blocks = Vec::new();
    collect(&file.items, &lines, &mut blocks);
    let mut findings = Findings { lines: Vec::new(), by_hand: Vec::new(), text: String::new() };
    let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    // The blocks are changed from the end of the file, so that the line numbers of earlier blocks stay valid.
    blocks.sort_by_key(|block| block.first().map(|import| import.lines.0));
    for block in blocks.iter().rev() {
        let (Some(first), Some(last)) = (block.first(), block.last()) else { continue };
        if is_grouped(block, &lines) {
            continue;
        }
        findings.lines.push(first.lines.0 + 1);
        // If a comment belongs to no import, only its author knows where the comment should go. Such a block is grouped
        // by hand.
        let gaps = block.windows(2).flat_map(|pair| lines.get(pair[0].lines.1..pair[1].lines.0).unwrap_or_default());
        if block.iter().any(|import| import.by_hand) || gaps.into_iter().any(|line| !line.trim().is_empty()) {
            findings.by_hand.push(first.lines.0 + 1);
            continue;
        }
        changed.splice(first.lines.0..last.lines.1, grouped(block, &lines));
    }
    findings.lines.reverse();
    findings.by_hand.reverse();
    findings.text = changed.iter().map(|line| format!("{line}\n")).collect();
    Ok(findings)
}

/// Adds the blocks of a module and of its inline modules to `blocks`.
fn collect(items: &[Item], lines: &[&str], blocks: &mut Vec<Block>) {
    let modules: Vec<String> = items
        .iter()
        .filter_map(|item| match item {
            Item::Mod(module) => Some(name(&module.ident)),
            _ => None,
        })
        .collect();
    for run in items.chunk_by(|a, b| matches!((a, b), (Item::Use(_), Item::Use(_)))) {
        let mut block = Block::new();
        for item in run {
            match item {
                Item::Use(item) => {
                    let re_exports = if block.iter().all(|import| import.group == Group::FirstReExports) {
                        Group::FirstReExports
                    } else {
                        Group::ReExports
                    };
                    block.push(import(item, lines, &modules, re_exports));
                }
                Item::Mod(module) => {
                    if let Some((_, items)) = &module.content {
                        collect(items, lines, blocks);
                    }
                }
                _ => {}
            }
        }
        if !block.is_empty() {
            blocks.push(block);
        }
    }
}

fn import(item: &ItemUse, lines: &[&str], modules: &[String], re_exports: Group) -> Import {
    let is_private = matches!(item.vis, Visibility::Inherited);
    let group = if is_private { group(&item.tree, item.leading_colon.is_some(), modules) } else { re_exports };
    let begin = match (item.attrs.first(), &item.vis) {
        (Some(attr), _) => attr.pound_token.span,
        (None, Visibility::Public(token)) => token.span,
        (None, Visibility::Restricted(restricted)) => restricted.pub_token.span,
        (None, Visibility::Inherited) => item.use_token.span,
    };
    let end: Span = item.semi_token.span;
    let (first, last) = (begin.start().line - 1, end.end().line);
    let line = |number: usize| lines.get(number).copied().unwrap_or_default();
    let alone = line(first).chars().take(begin.start().column).all(char::is_whitespace)
        && line(last - 1).chars().skip(end.end().column).all(char::is_whitespace);
    let comments = lines.get(..first).unwrap_or_default().iter().rev();
    let comments = comments.take_while(|line| line.trim_start().starts_with("//") && !line.contains("//!")).count();
    let by_hand = !item.attrs.is_empty() || !alone || comments > 0;
    Import { group, lines: (first - comments, last), by_hand }
}

fn group(tree: &UseTree, leading_colon: bool, modules: &[String]) -> Group {
    let first = match tree {
        UseTree::Path(path) => name(&path.ident),
        UseTree::Name(own) => name(&own.ident),
        UseTree::Rename(rename) => name(&rename.ident),
        UseTree::Glob(_) | UseTree::Group(_) => return Group::External,
    };
    match first.as_str() {
        "std" | "core" | "alloc" => Group::Std,
        "crate" | "super" | "self" => Group::Own,
        _ if !leading_colon && modules.contains(&first) => Group::Own,
        _ => Group::External,
    }
}

/// Whether the groups are in order, with a blank line between two groups and none inside a group.
fn is_grouped(block: &Block, lines: &[&str]) -> bool {
    block.windows(2).all(|pair| {
        let (before, after) = (&pair[0], &pair[1]);
        let gap = lines.get(before.lines.1..after.lines.0).unwrap_or_default();
        let apart = gap.iter().any(|line| line.trim().is_empty());
        match before.group.cmp(&after.group) {
            std::cmp::Ordering::Less => apart,
            std::cmp::Ordering::Equal => !apart,
            std::cmp::Ordering::Greater => false,
        }
    })
}

/// Returns the lines of a block, grouped.
fn grouped(block: &Block, lines: &[&str]) -> Vec<String> {
    let mut imports: Vec<&Import> = block.iter().collect();
    imports.sort_by_key(|import| import.group);
    let mut text = Vec::new();
    for group in imports.chunk_by(|a, b| a.group == b.group) {
        if !text.is_empty() {
            text.push(String::new());
        }
        for import in group {
            let own = lines.get(import.lines.0..import.lines.1).unwrap_or_default();
            text.extend(own.iter().map(|line| (*line).to_owned()));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the text with its blocks grouped. Fails if a block must be grouped by hand.
    fn fixed(text: &str) -> String {
        let findings = inspect(text).unwrap();
        assert!(findings.by_hand.is_empty(), "blocks to group by hand: {:?}", findings.by_hand);
        assert!(inspect(&findings.text).unwrap().lines.is_empty(), "{}", findings.text);
        findings.text
    }

    #[test]
    fn imports_are_grouped_by_origin() {
        let text = "//! A file.\n\nuse crate::a::{\n    b,\n    c,\n};\nuse anyhow::Result;\nuse std::fs;\nuse super::d;\n\nfn f() {}\n";
        let expected = "//! A file.\n\nuse std::fs;\n\nuse anyhow::Result;\n\nuse crate::a::{\n    b,\n    c,\n};\nuse super::d;\n\nfn f() {}\n";
        assert_eq!(inspect(text).unwrap().lines, [3]);
        assert_eq!(fixed(text), expected);
    }

    #[test]
    fn grouped_imports_are_not_changed() {
        let text = "use std::fs;\n\nuse anyhow::Result;\n\nuse super::d;\n";
        assert_eq!(fixed(text), text);
        let one = "pub use std::fs;\n";
        assert_eq!(fixed(one), one);
    }

    #[test]
    fn blank_line_inside_a_group_is_removed() {
        assert_eq!(fixed("use std::fs;\n\nuse std::io;\n"), "use std::fs;\nuse std::io;\n");
    }

    #[test]
    fn module_that_the_file_declares_belongs_to_this_crate() {
        assert_eq!(
            fixed("mod graph;\n\nuse graph::Graph;\nuse other::Other;\n"),
            "mod graph;\n\nuse other::Other;\n\nuse graph::Graph;\n"
        );
        let other = "mod graph;\n\nuse ::graph::Graph;\nuse other::Other;\n";
        assert_eq!(fixed(other), other);
    }

    #[test]
    fn re_exports_are_a_separate_group() {
        assert_eq!(
            fixed("use std::fs;\npub use crate::a;\nuse crate::b;\n"),
            "use std::fs;\n\nuse crate::b;\n\npub use crate::a;\n"
        );
        assert_eq!(fixed("pub use crate::a;\nuse crate::b;\n"), "pub use crate::a;\n\nuse crate::b;\n");
    }

    #[test]
    fn imports_of_inner_modules_are_grouped() {
        let text = "mod tests {\n    use super::*;\n    use std::fs;\n}\n";
        assert_eq!(fixed(text), "mod tests {\n    use std::fs;\n\n    use super::*;\n}\n");
    }

    #[test]
    fn imports_with_comments_or_attributes_must_be_grouped_by_hand() {
        for text in [
            "use crate::a;\n// Why.\nuse std::fs;\n",
            "use crate::a;\n#[cfg(test)]\nuse std::fs;\n",
            "use crate::a; // Why.\nuse std::fs;\n",
            "use crate::a; use std::fs;\n",
            "use crate::a;\n// A remark.\n\nuse std::fs;\n",
        ] {
            let findings = inspect(text).unwrap();
            assert_eq!((findings.lines, findings.by_hand, findings.text.as_str()), (vec![1], vec![1], text));
        }
        assert!(inspect("// Why.\nuse std::fs;\n\n#[cfg(test)]\nuse crate::a;\n").unwrap().lines.is_empty());
    }
}
