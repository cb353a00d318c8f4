//! Runs a future to its end in an async runtime.

use std::future::Future;

/// Runs `future` on a runtime with one thread. Drops all tasks at its end.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("create a runtime").block_on(future)
}
