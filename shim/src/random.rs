//! Unpredictable tokens.

use std::io;

use husk_base::entropy;

/// Returns an unpredictable number that is never 0.
///
/// # Errors
/// Fails if [`entropy::bytes`] fails.
pub fn token() -> io::Result<u64> {
    Ok(u64::from_ne_bytes(entropy::bytes()?).max(1))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn tokens_are_distinct_and_not_consecutive() {
        let tokens: Vec<u64> = (0..64).map(|_| token().unwrap()).collect();
        assert_eq!(tokens.iter().collect::<HashSet<_>>().len(), tokens.len());
        assert!(tokens.windows(2).all(|pair| pair[0].abs_diff(pair[1]) > 1 << 20));
    }
}
