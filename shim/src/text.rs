//! Prepares texts from untrusted sources for errors and the log: limits their length, and replaces control characters.

/// Maximum length of the text of an error and its causes, in bytes. A cause may contain a text from the agent.
const MAX_ERROR_TEXT: usize = 16 << 10;

/// Formats an error and its causes. Limits the length, and replaces control characters.
pub fn chain(error: &dyn std::error::Error) -> String {
    bounded(&husk_base::error::chain(error), MAX_ERROR_TEXT)
}

/// Shortens `text` to at most `limit` bytes, then replaces control characters.
pub fn bounded(text: &str, limit: usize) -> String {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    clean(text.get(..end).unwrap_or_default())
}

/// Replaces control characters, except tabs and newlines. Otherwise, the guest could send escape sequences to a
/// terminal that shows the log.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\t' && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_cuts_at_a_character_and_replaces_control_characters() {
        assert_eq!(bounded("a\u{1b}b", 10), "a\u{fffd}b");
        assert_eq!(bounded("a\u{e4}b", 2), "a");
        assert_eq!(bounded("a\tb\nc", 4), "a\tb\n");
    }
}
