//! Parses SPDX licence expressions, and decides whether a set of accepted licences satisfies an expression.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::vec::IntoIter;

use anyhow::{Result, bail};

/// A licence expression. The older form `MIT/Apache-2.0` means `MIT OR Apache-2.0`.
#[derive(Debug, PartialEq, Eq)]
pub enum Expression {
    /// A licence, with its exception if the licence has one. For example: `Apache-2.0 WITH LLVM-exception`.
    License(String),
    Both(Box<Expression>, Box<Expression>),
    Either(Box<Expression>, Box<Expression>),
}

impl Expression {
    /// Parses an expression. `WITH` binds most tightly, then `AND`, then `OR`.
    pub fn parse(text: &str) -> Result<Self> {
        let spaced = text.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
        let words: Vec<String> = spaced.split_whitespace().map(str::to_owned).collect();
        let mut words = words.into_iter().peekable();
        let expression = either(&mut words)?;
        match words.next() {
            None => Ok(expression),
            Some(word) => bail!("expected the end of the expression, found `{word}`"),
        }
    }

    /// Whether the licences in `accepted` satisfy the expression.
    pub fn satisfied(&self, accepted: &BTreeSet<&str>) -> bool {
        match self {
            Self::License(name) => accepted.contains(name.as_str()),
            Self::Both(left, right) => left.satisfied(accepted) && right.satisfied(accepted),
            Self::Either(left, right) => left.satisfied(accepted) || right.satisfied(accepted),
        }
    }
}

type Words = Peekable<IntoIter<String>>;

fn either(words: &mut Words) -> Result<Expression> {
    let mut left = both(words)?;
    while words.next_if_eq("OR").is_some() {
        left = Expression::Either(Box::new(left), Box::new(both(words)?));
    }
    Ok(left)
}

fn both(words: &mut Words) -> Result<Expression> {
    let mut left = license(words)?;
    while words.next_if_eq("AND").is_some() {
        left = Expression::Both(Box::new(left), Box::new(license(words)?));
    }
    Ok(left)
}

fn license(words: &mut Words) -> Result<Expression> {
    if words.next_if_eq("(").is_some() {
        let inner = either(words)?;
        return match words.next_if_eq(")") {
            Some(_) => Ok(inner),
            None => bail!("expected `)`"),
        };
    }
    let mut name = id(words)?;
    if words.next_if_eq("WITH").is_some() {
        name = format!("{name} WITH {}", id(words)?);
    }
    Ok(Expression::License(name))
}

fn id(words: &mut Words) -> Result<String> {
    match words.next() {
        Some(word) if !matches!(word.as_str(), "(" | ")" | "AND" | "OR" | "WITH") => Ok(word),
        Some(word) => bail!("expected a licence, found `{word}`"),
        None => bail!("expected a licence at the end"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn satisfied(text: &str, accepted: &[&str]) -> bool {
        Expression::parse(text).unwrap().satisfied(&accepted.iter().copied().collect())
    }

    #[test]
    fn one_accepted_licence_satisfies_or_but_not_and() {
        assert!(satisfied("MIT", &["MIT"]));
        assert!(!satisfied("MIT", &["Apache-2.0"]));
        assert!(satisfied("MIT OR GPL-2.0-only", &["MIT"]));
        assert!(satisfied("GPL-2.0-only OR MIT", &["MIT"]));
        assert!(!satisfied("MIT AND BSD-3-Clause", &["MIT"]));
        assert!(satisfied("MIT AND BSD-3-Clause", &["MIT", "BSD-3-Clause"]));
    }

    #[test]
    fn and_binds_more_tightly_than_or() {
        assert!(satisfied("MIT OR Zlib AND ISC", &["MIT"]));
        assert!(!satisfied("(MIT OR Zlib) AND ISC", &["MIT"]));
        assert!(satisfied("(MIT OR Zlib) AND ISC", &["Zlib", "ISC"]));
        assert!(satisfied("((MIT))", &["MIT"]));
    }

    #[test]
    fn licence_with_an_exception_must_be_accepted_separately() {
        let llvm = "Apache-2.0 WITH LLVM-exception";
        assert!(!satisfied(llvm, &["Apache-2.0"]));
        assert!(satisfied(llvm, &[llvm]));
        assert!(satisfied("Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT", &["MIT"]));
    }

    #[test]
    fn slash_means_or() {
        assert!(satisfied("MIT/Apache-2.0", &["Apache-2.0"]));
        assert!(satisfied("Apache-2.0 / MIT", &["Apache-2.0"]));
    }

    #[test]
    fn malformed_expression_is_an_error() {
        for text in ["", "MIT OR", "AND MIT", "(MIT", "MIT)", "MIT Zlib", "MIT WITH", "MIT WITH OR Zlib", "()"] {
            assert!(Expression::parse(text).is_err(), "{text}");
        }
    }
}
