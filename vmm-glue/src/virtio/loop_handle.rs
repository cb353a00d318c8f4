//! Lets the devices' transports run closures on the device loop.

use event_manager::RemoteEndpoint;

use super::device::SharedDevice;

/// A handle to the device loop that every thread can use.
#[derive(Clone)]
pub struct LoopHandle(RemoteEndpoint<SharedDevice>);

impl LoopHandle {
    /// Creates a handle from the loop's endpoint.
    pub fn new(endpoint: RemoteEndpoint<SharedDevice>) -> Self {
        Self(endpoint)
    }

    /// Runs a closure on the device loop. Does not wait until the closure has run. Closures run in the order of the
    /// calls.
    ///
    /// # Errors
    /// If the device loop has ended.
    pub fn run(&self, closure: impl FnOnce() + Send + 'static) -> Result<(), event_manager::Error> {
        self.0.fire(move |_| closure())
    }
}
