//! Reads the modules of a crate from its source files, without compiling the crate. Finds the files by the compiler's
//! rules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use syn::{Attribute, Expr, Item, Lit, Meta};

/// A module with its items.
pub struct Module {
    /// The names from the crate's root to this module. Empty for the root.
    pub path: Vec<String>,
    /// The file that has the module's items.
    pub file: PathBuf,
    /// The inner attributes of the module's file. Empty for an inline module.
    pub attrs: Vec<Attribute>,
    pub items: Vec<Item>,
    /// Whether the module is compiled for tests only.
    pub test_only: bool,
}

/// Returns the modules of the crate whose root file is `root`. The first module is the root.
pub fn modules(root: &Path) -> Result<Vec<Module>> {
    let mut modules = Vec::new();
    let dir = root.parent().unwrap_or_else(|| Path::new(""));
    file_module(&mut modules, Vec::new(), root, dir, false)?;
    Ok(modules)
}

/// Adds the module in the file `file`, and the module's children. The files of the children are in `dir`.
fn file_module(modules: &mut Vec<Module>, path: Vec<String>, file: &Path, dir: &Path, test_only: bool) -> Result<()> {
    let text = fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
    let parsed = match syn::parse_file(&text) {
        Ok(parsed) => parsed,
        Err(error) => bail!("failed to parse {}:{}: {error}", file.display(), error.span().start().line),
    };
    let test_only = test_only || is_test_only(&parsed.attrs);
    add(modules, Module { path, file: file.to_owned(), attrs: parsed.attrs, items: parsed.items, test_only }, dir)
}

/// Adds a module and its children. The files of the children are in `dir`.
fn add(modules: &mut Vec<Module>, mut module: Module, dir: &Path) -> Result<()> {
    let (children, items) =
        std::mem::take(&mut module.items).into_iter().partition(|item| matches!(item, Item::Mod(_)));
    module.items = items;
    let (path, file, test_only) = (module.path.clone(), module.file.clone(), module.test_only);
    modules.push(module);
    for child in children {
        let Item::Mod(child) = child else { continue };
        let name = name(&child.ident);
        let test_only = test_only || is_test_only(&child.attrs);
        let path: Vec<String> = path.iter().cloned().chain([name.clone()]).collect();
        if let Some((_, items)) = child.content {
            let attrs = Vec::new();
            add(modules, Module { path, file: file.clone(), attrs, items, test_only }, &dir.join(&name))?;
            continue;
        }
        if let Some(other) = child.attrs.iter().find_map(|attr| value(attr, "path")) {
            let other = file.parent().unwrap_or_else(|| Path::new("")).join(other);
            let children = other.parent().unwrap_or_else(|| Path::new("")).to_owned();
            file_module(modules, path, &other, &children, test_only)?;
            continue;
        }
        let (flat, nested) = (dir.join(format!("{name}.rs")), dir.join(&name).join("mod.rs"));
        let found = if flat.exists() { flat } else { nested };
        file_module(modules, path, &found, &dir.join(&name), test_only)
            .with_context(|| format!("failed to read the module {name}, which {} declares", file.display()))?;
    }
    Ok(())
}

/// Returns an identifier's name, without the `r#` of a raw identifier.
pub fn name(ident: &proc_macro2::Ident) -> String {
    let text = ident.to_string();
    text.strip_prefix("r#").map_or_else(|| text.clone(), str::to_owned)
}

/// Returns the string of an attribute `#[NAME = "…"]`. Returns `None` for any other attribute.
pub fn value(attr: &Attribute, name: &str) -> Option<String> {
    let Meta::NameValue(pair) = &attr.meta else { return None };
    let Expr::Lit(literal) = &pair.value else { return None };
    match &literal.lit {
        Lit::Str(text) if pair.path.is_ident(name) => Some(text.value()),
        _ => None,
    }
}

/// Whether `#[cfg(test)]` or `#[cfg(all(test, …))]` is among the attributes.
pub fn is_test_only(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| match &attr.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let condition: String = list.tokens.to_string().split_whitespace().collect();
            condition == "test" || condition.starts_with("all(test,")
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_modules_and_inline_modules_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("lib.rs", "mod a;\nmod b { pub mod c; }\n#[cfg(test)]\nmod tests { fn t() {} }\n");
        write("a/mod.rs", "mod d;");
        write("a/d.rs", "#[path = \"other.rs\"]\nmod e;\nfn f() {}");
        write("a/other.rs", "");
        write("b/c.rs", "");
        let modules = modules(&dir.path().join("lib.rs")).unwrap();
        let found: Vec<_> = modules.iter().map(|module| (module.path.join("::"), module.test_only)).collect();
        let expected = [("", false), ("a", false), ("a::d", false), ("a::d::e", false), ("b", false), ("b::c", false)];
        assert_eq!(found[..6], expected.map(|(path, test)| (path.to_owned(), test)));
        assert_eq!(found[6], ("tests".to_owned(), true));
        assert_eq!(modules[2].items.len(), 1);
    }

    #[test]
    fn error_for_a_missing_module_names_the_file_that_declares_it() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lib.rs"), "mod gone;").unwrap();
        let error = format!("{:#}", modules(&dir.path().join("lib.rs")).err().unwrap());
        assert!(error.contains("lib.rs declares") && error.contains("gone"), "{error}");
    }
}
