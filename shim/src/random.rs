//! Unpredictable tokens.

use std::io;

use husk_base::entropy;
use husk_proto::stream::AGENT_TOKEN;

/// Returns an unpredictable number that is never 0, and that the agent never chooses.
///
/// # Errors
/// Fails if [`entropy::bytes`] fails.
pub fn token() -> io::Result<u64> {
    Ok((u64::from_ne_bytes(entropy::bytes()?) & !AGENT_TOKEN).max(1))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn tokens_are_distinct_and_not_consecutive() {
        let tokens: Vec<u64> = (0..64).map(|_| token().unwrap()).collect();
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len());
        assert!(tokens.iter().all(|token| token & AGENT_TOKEN == 0));
        assert!(tokens.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 1 << 20));
    }
}
