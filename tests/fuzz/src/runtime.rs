//! Runs a future to completion in an async runtime.

use std::future::Future;

/// Runs `future` to completion on a single-threaded runtime. Then drops the runtime with all its tasks.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("create a runtime").block_on(future)
}
