//! Sets up a tap and an interface's address with ioctls, so that neither the node nor the guest needs a tool.

use std::fs::File;
use std::io::{Error, Result};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

/// Name of the tap.
pub const TAP: &str = "husktap";
/// Addresses of the host and the guest.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// TCP port on which the host listens.
pub const PORT: u16 = 5000;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is a C structure for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: RawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> Result<()> {
    // SAFETY: the ioctls that callers use read or write an ifreq, to which the argument is a valid pointer.
    match unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Creates the tap.
pub fn tap() -> Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(TAP);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    ioctl(tap.as_raw_fd(), TUNSETIFF, &mut request)?;
    Ok(tap)
}

/// Sets an interface's address and brings the interface up.
pub fn up(name: &str, address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut set = request(name);
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: sockaddr_in has the size of sockaddr, and both are plain data. For AF_INET, the kernel reads the address
    // as a sockaddr_in.
    set.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
    ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &mut set)?;
    let mut flags = request(name);
    flags.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut flags)
}
