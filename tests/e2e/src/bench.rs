//! The benchmark of starts.
