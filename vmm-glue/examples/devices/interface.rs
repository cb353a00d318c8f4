//! A tap, and an address on an interface, by ioctl: neither the node nor the guest needs any tool.

use std::fs::File;
use std::io::{Error, Result};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};

/// The tap's name.
pub const TAP: &str = "husktap";
/// The host's address and the guest's.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// Where the host listens.
pub const PORT: u16 = 5000;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: RawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> Result<()> {
    // SAFETY: these ioctls read and write an ifreq.
    match unsafe { libc::ioctl(fd, number, std::ptr::from_mut(request)) } {
        0 => Ok(()),
        _ => Err(Error::last_os_error()),
    }
}

/// Makes the tap.
pub fn tap() -> Result<File> {
    let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = request(TAP);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    ioctl(tap.as_raw_fd(), TUNSETIFF, &mut request)?;
    Ok(tap)
}

/// Gives an interface an address and brings it up.
pub fn up(name: &str, address: Ipv4Addr) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut set = request(name);
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address.octets()) },
        sin_zero: [0; 8],
    };
    // SAFETY: a sockaddr_in is one kind of sockaddr, and as long.
    set.ifr_ifru.ifru_addr = unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
    ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &mut set)?;
    let mut flags = request(name);
    flags.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut flags)
}
