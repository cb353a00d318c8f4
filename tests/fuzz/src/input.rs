//! Turns the bytes of an input into a value.

use arbitrary::{Arbitrary, Unstructured};

/// Makes a value from the bytes. Returns `None` if there are too few bytes.
pub fn input<'a, T: Arbitrary<'a>>(bytes: &'a [u8]) -> Option<T> {
    T::arbitrary_take_rest(Unstructured::new(bytes)).ok()
}
