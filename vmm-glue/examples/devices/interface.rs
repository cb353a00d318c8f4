//! Sets up a tap and an interface's address with ioctls, so that neither the node nor the guest needs ip(8).

use std::fs::File;
use std::io::{Error, Result};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;

use husk_base::sys::interface;

/// Name of the tap.
pub const TAP: &str = "husktap";
/// Addresses of the host and the guest.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// TCP port on which the host listens.
pub const PORT: u16 = 5000;

/// Creates the tap.
pub fn tap() -> Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    interface::set_tap(&tap, TAP, libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)?;
    Ok(tap)
}

/// Sets an interface's address and brings the interface up.
pub fn up(name: &str, address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: ifreq is a C structure for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // The kernel reads these 14 bytes as fields of a sockaddr_in: port, address, padding.
    let mut data = [0; 14];
    for (to, from) in data.iter_mut().skip(2).zip(address.octets()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_addr = libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data };
    // SAFETY: SIOCSIFADDR reads an ifreq, to which the argument is a valid pointer.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw const request) } != 0 {
        return Err(Error::last_os_error());
    }
    interface::set_flags(name, libc::IFF_UP | libc::IFF_RUNNING)
}
