//! Formats an error with its causes.

use std::error::Error;

/// Formats an error and its chain of sources as one line. Colons separate the texts.
///
/// The text of some errors already contains the text of their source, and a transparent wrapper has the same text as
/// the wrapped error. A cause is therefore left out if the line already ends with the text of this cause.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;

    #[derive(Debug)]
    struct Layer(&'static str, Option<Box<Layer>>);

    impl fmt::Display for Layer {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(self.0)
        }
    }

    impl Error for Layer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|cause| cause as _)
        }
    }

    fn layers(texts: &[&'static str]) -> Layer {
        let (first, rest) = texts.split_first().unwrap();
        Layer(first, (!rest.is_empty()).then(|| Box::new(layers(rest))))
    }

    #[test]
    fn chain_joins_causes_and_omits_repeated_causes() {
        assert_eq!(chain(&layers(&["a"])), "a");
        assert_eq!(chain(&layers(&["failed to open x", "not found"])), "failed to open x: not found");
        assert_eq!(chain(&layers(&["a: b", "b", "c"])), "a: b: c");
        assert_eq!(chain(&layers(&["same", "same", "same"])), "same");
        assert_eq!(chain(&layers(&["a: b: c", "b: c", "c"])), "a: b: c");
        // Text in the middle of the line does not count as a repetition.
        assert_eq!(chain(&layers(&["failed to open a file", "open"])), "failed to open a file: open");
    }
}
