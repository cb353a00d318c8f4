//! Opens vhost-net for the VMM, which cannot reach the device from its jail.
//!
//! The VMM is not trusted. Therefore, the shim opens vhost-net at most once for each queue pair of an interface,
//! regardless of repeated requests.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Mutex;

use husk_vmm::config::NetConfig;

use crate::blocking;
use crate::lock;

/// Device node of vhost-net.
pub const DEVICE: &str = "/dev/vhost-net";

/// The interfaces that may still get vhost-net. Maps each interface's MAC address to the interface's number of
/// queue pairs.
#[derive(Debug, Default)]
pub struct VhostPermits(Mutex<HashMap<[u8; 6], usize>>);

impl VhostPermits {
    /// Creates a permit for an interface if `net.vhost` is true. Otherwise, removes the interface's permit.
    pub fn allow(&self, net: &NetConfig) {
        let mut permits = lock(&self.0);
        if net.vhost {
            permits.insert(net.mac, net.taps.len());
        } else {
            permits.remove(&net.mac);
        }
    }

    /// Removes an interface's permit, if there is one.
    pub fn revoke(&self, mac: [u8; 6]) {
        lock(&self.0).remove(&mac);
    }

    /// Uses up an interface's permit. Returns the number of queue pairs, or `None` if the interface has no permit.
    pub fn take(&self, mac: [u8; 6]) -> Option<usize> {
        lock(&self.0).remove(&mac)
    }
}

/// Opens vhost-net once for each of `pairs` queue pairs.
///
/// # Errors
/// The error of open(2), for example if the kernel module is missing.
pub async fn open(pairs: usize) -> io::Result<Vec<File>> {
    // The first open(2) may load the kernel module. The load can take long, and must not block the async runtime.
    let open = move || (0..pairs).map(|_| File::options().read(true).write(true).open(DEVICE)).collect();
    blocking::spawn(open).await?
}

#[cfg(test)]
mod tests {
    use husk_vmm::config::{FdIndex, RateLimit};

    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn net(vhost: bool) -> NetConfig {
        NetConfig {
            taps: vec![FdIndex(0), FdIndex(1)],
            vhost,
            mac: MAC,
            mtu: 1500,
            receive_rate_limit: RateLimit::default(),
            transmit_rate_limit: RateLimit::default(),
        }
    }

    #[test]
    fn take_succeeds_once_after_each_allow() {
        let permits = VhostPermits::default();
        assert_eq!(permits.take(MAC), None);
        for _ in 0..2 {
            permits.allow(&net(true));
            assert_eq!(permits.take([9; 6]), None);
            assert_eq!(permits.take(MAC), Some(2));
            assert_eq!(permits.take(MAC), None);
        }
    }

    #[test]
    fn removed_interface_and_interface_without_vhost_have_no_permit() {
        let permits = VhostPermits::default();
        permits.allow(&net(true));
        permits.revoke(MAC);
        assert_eq!(permits.take(MAC), None);
        permits.allow(&net(true));
        permits.allow(&net(false));
        assert_eq!(permits.take(MAC), None);
    }
}
