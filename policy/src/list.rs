//! The value of a list rule: the text `any`, or a list of the allowed entries.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, SeqAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Maximum number of entries of a list.
pub const MAX_ENTRIES: usize = 64;

/// The text that stands for [`AtMost::Any`] in a policy.
const ANY: &str = "any";

/// What is allowed: everything, or at most the entries of a list. An empty list allows nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AtMost<T> {
    /// Everything is allowed.
    #[default]
    Any,
    /// Only these entries are allowed.
    List(Vec<T>),
}

impl<T> AtMost<T> {
    /// Returns the entries of the list, or `None` if everything is allowed.
    pub fn list(&self) -> Option<&[T]> {
        match self {
            Self::Any => None,
            Self::List(entries) => Some(entries),
        }
    }
}

impl<T: Serialize> Serialize for AtMost<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Any => serializer.serialize_str(ANY),
            Self::List(entries) => entries.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for AtMost<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AtMostVisitor(PhantomData))
    }
}

struct AtMostVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for AtMostVisitor<T> {
    type Value = AtMost<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{ANY:?} or a list")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        if text == ANY { Ok(AtMost::Any) } else { Err(E::invalid_value(Unexpected::Str(text), &self)) }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = sequence.next_element()? {
            if entries.len() == MAX_ENTRIES {
                return Err(A::Error::custom(format!("the list has more than {MAX_ENTRIES} entries")));
            }
            entries.push(entry);
        }
        Ok(AtMost::List(entries))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_has_at_most_64_entries() {
        let parse = |count: usize| serde_json::from_value::<AtMost<usize>>((0..count).collect());
        assert_eq!(parse(64).unwrap().list().map(<[usize]>::len), Some(64));
        assert_eq!(parse(65).unwrap_err().to_string(), "the list has more than 64 entries");
        assert_eq!(parse(0).unwrap(), AtMost::List(Vec::new()));
    }
}
