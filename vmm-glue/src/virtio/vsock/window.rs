//! How much data from the guest a connection may hold: its receive window (`buf_alloc`), and the send buffer of its
//! socket.
//!
//! A client that does not read makes its connection hold a whole window in the VMM, and a whole send buffer in the
//! kernel. Both count towards the pod's memory limit, whose headroom is `HOST_MIB` in `shim/src/resources/growth.rs`.
//! Therefore, each connection begins with a small window. The window doubles while the client reads what the guest
//! sends, until the device's pool is used up. A window never shrinks, because the guest may already have sent data for
//! the complete window (virtio 1.2, 5.10.6.3).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::socket::{setsockopt, sockopt};

/// The first window of a connection, in bytes.
pub const MIN_WINDOW: u32 = 8 * 1024;
/// The largest window of a connection, in bytes.
pub const MAX_WINDOW: u32 = 256 * 1024;
/// By how many bytes all windows of a device together may exceed [`MIN_WINDOW`].
const POOL: u32 = 4 * 1024 * 1024;
/// The part of the pool that one window may take at once. Therefore, the pool always has something left for the next
/// connection.
const SHARE: u32 = 4;
/// A window grows after the delivery of this many windows of data. The socket holds at most two windows of unread data
/// ([`set_send_buffer`]). Therefore, the client has then read a part of the data.
const GROWTH_AFTER: u32 = 4;

/// The bytes that windows may still take.
pub struct WindowPool(Arc<AtomicU32>);

impl Default for WindowPool {
    fn default() -> Self {
        Self(Arc::new(POOL.into()))
    }
}

impl WindowPool {
    /// Returns a window of [`MIN_WINDOW`] bytes for a connection with this socket. Also sets the size of the socket's
    /// send buffer.
    pub fn window(&self, socket: &OwnedFd) -> Window {
        set_send_buffer(socket, MIN_WINDOW);
        Window { size: MIN_WINDOW, delivered: 0, pool: Arc::clone(&self.0) }
    }
}

/// The window of one connection. Dropping the window gives its bytes back to the pool.
pub struct Window {
    size: u32,
    /// Number of bytes delivered to the socket since the window last grew.
    delivered: u32,
    pool: Arc<AtomicU32>,
}

impl Window {
    /// Returns the window's size in bytes.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Records that `count` bytes were delivered to the socket.
    pub fn delivered(&mut self, count: u32) {
        self.delivered = self.delivered.saturating_add(count);
    }

    /// Doubles the window and the socket's send buffer, if the client reads, and if the pool has enough bytes.
    pub fn grow(&mut self, socket: &OwnedFd) {
        if self.delivered < self.size.saturating_mul(GROWTH_AFTER) {
            return;
        }
        self.delivered = 0;
        let wanted = self.size.min(MAX_WINDOW.saturating_sub(self.size));
        let take = |free: u32| (wanted > 0 && wanted <= free / SHARE).then(|| free - wanted);
        if self.pool.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            self.size += wanted;
            set_send_buffer(socket, self.size);
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.pool.fetch_add(self.size - MIN_WINDOW, Ordering::Relaxed);
    }
}

/// Sets the size of a socket's send buffer. The kernel doubles the size, to have space for its own structures, and does
/// not exceed `net.core.wmem_max` (socket(7)).
fn set_send_buffer(socket: &OwnedFd, size: u32) {
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if let Err(error) = setsockopt(socket, sockopt::SndBuf, &size) {
        log::warn!("vsock: failed to set the send buffer of a socket: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no setsockopt for UNIX sockets")]
    fn windows_grow_until_the_pool_is_used_up() {
        let pool = WindowPool::default();
        let (_client, socket) = UnixStream::pair().unwrap();
        let socket = OwnedFd::from(socket);
        let mut windows: Vec<_> = (0..1000).map(|_| pool.window(&socket)).collect();
        for window in &mut windows {
            for _ in 0..10 {
                window.delivered(2 * MAX_WINDOW);
                window.delivered(2 * MAX_WINDOW);
                window.grow(&socket);
                window.grow(&socket);
            }
        }
        let sizes: Vec<_> = windows.iter().map(Window::size).collect();
        assert_eq!((sizes[0], sizes[999]), (MAX_WINDOW, MIN_WINDOW));
        assert!(sizes.iter().sum::<u32>() <= POOL + 1000 * MIN_WINDOW);
        assert!(sizes.iter().filter(|&&size| size > MIN_WINDOW).count() > 20);
        drop(windows);
        assert_eq!(pool.0.load(Ordering::Relaxed), POOL);
    }
}
