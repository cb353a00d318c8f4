//! Sends and receives messages on the control socket. Each message is one `SOCK_SEQPACKET` packet with JSON, and fds as
//! ancillary data.
//!
//! The functions keep the socket's blocking mode. On a non-blocking socket, they fail with
//! [`io::ErrorKind::WouldBlock`] instead of waiting. Therefore, an asynchronous caller can wrap these functions.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_base::sys::scm_rights;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Maximum size of a message in bytes.
pub const MAX_MESSAGE: usize = 64 << 10;
/// Maximum number of fds in one message.
pub const MAX_FDS: usize = scm_rights::MAX_FDS;

/// Sends a message with fds.
///
/// # Errors
/// The error of `sendmsg`. [`io::ErrorKind::InvalidInput`] if the message or the number of fds exceeds its limit.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE || fds.len() > MAX_FDS {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "failed to send a control message of {} bytes with {} fds: \
                 at most {MAX_MESSAGE} bytes and {MAX_FDS} fds are allowed",
                bytes.len(),
                fds.len()
            ),
        ));
    }
    scm_rights::send(socket, &bytes, fds).map(drop)
}

/// A packet whose message has not been decoded.
#[derive(Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    truncated: bool,
    lost_fds: bool,
}

impl Packet {
    fn new(mut bytes: Vec<u8>, packet: scm_rights::Packet) -> Self {
        bytes.truncate(packet.len);
        Self { bytes, fds: packet.fds, truncated: packet.truncated, lost_fds: packet.lost_fds }
    }

    /// Returns the number of bytes that were received, at most [`MAX_MESSAGE`].
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Returns whether the packet has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Returns whether fds of the packet are missing.
    pub fn lost_fds(&self) -> bool {
        self.lost_fds
    }

    /// Decodes the message. Returns the message with its fds, or with [`LostFds`] if some of its fds are missing.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if the packet is too long or is not a message of type `T`.
    pub fn decode<T: DeserializeOwned>(self) -> io::Result<(T, Result<Vec<OwnedFd>, LostFds>)> {
        if self.truncated {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("failed to receive a control message: it has more than {MAX_MESSAGE} bytes"),
            ));
        }
        let message =
            serde_json::from_slice(&self.bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok((message, if self.lost_fds { Err(LostFds) } else { Ok(self.fds) }))
    }
}

/// Fds of a message are missing.
#[derive(Debug, thiserror::Error)]
#[error(
    "failed to receive the fds of a control message: the fd limit is reached, or there are more than {MAX_FDS} fds"
)]
pub struct LostFds;

/// Receives a packet with its fds, which are close-on-exec. Does not decode the message.
///
/// # Errors
/// The error of `recvmsg`. [`io::ErrorKind::UnexpectedEof`] if the other side has closed the socket.
pub fn receive(socket: impl AsFd) -> io::Result<Packet> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let packet = scm_rights::receive(socket, &mut bytes)?;
    if packet.len == 0 && packet.fds.is_empty() && !packet.lost_fds {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Packet::new(bytes, packet))
}

/// Receives a packet of the VMM, which must not send fds. The kernel drops fds of the packet
/// ([`scm_rights::receive_bytes`]). Does not decode the message. Therefore, the caller can count the packet before the
/// packet is decoded.
///
/// # Errors
/// The error of `recvmsg`. [`io::ErrorKind::UnexpectedEof`] if the other side has closed the socket.
pub fn receive_bytes(socket: impl AsFd) -> io::Result<Packet> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let packet = scm_rights::receive_bytes(socket, &mut bytes)?;
    if packet.len == 0 && !packet.lost_fds {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Packet::new(bytes, packet))
}

/// Receives a message with its fds, which are close-on-exec.
///
/// # Errors
/// The errors of [`receive`] and [`Packet::decode`]. [`LostFds`] as the source of an [`io::ErrorKind::Other`].
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let (message, fds) = receive(socket)?.decode()?;
    Ok((message, fds.map_err(io::Error::other)?))
}

/// Creates a connected pair of control sockets, which are close-on-exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn recv_returns_message_and_fds() {
        let (a, b) = pair().unwrap();
        let (mut reader, mut writer) = io::pipe().unwrap();
        send(&a, &("hello", 7), &[writer.as_fd(), a.as_fd()]).unwrap();
        let (message, mut fds) = recv::<(String, u32)>(&b).unwrap();
        assert_eq!(message, ("hello".to_owned(), 7));
        assert_eq!(fds.len(), 2);
        writer.write_all(b"x").unwrap();
        drop(writer);
        std::fs::File::from(fds.swap_remove(0)).write_all(b"y").unwrap();
        drop(fds);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xy");
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn recv_distinguishes_end_from_invalid_message() {
        let (a, b) = pair().unwrap();
        send(&a, &"text", &[]).unwrap();
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(a);
        assert_eq!(recv::<u32>(&b).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn message_arrives_even_if_fds_are_lost() {
        let (a, b) = pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        scm_rights::send(&a, b"7", &[writer.as_fd(); MAX_FDS + 1]).unwrap();
        drop(writer);
        assert!(matches!(receive(&b).unwrap().decode::<u32>(), Ok((7, Err(LostFds)))));
        // The reader sees the end of the pipe only if every copy of the writer is closed.
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    #[cfg_attr(miri, ignore = "Miri has no socketpair(SOCK_SEQPACKET)")]
    fn send_rejects_too_long_message() {
        let (a, _b) = pair().unwrap();
        let long = "x".repeat(MAX_MESSAGE);
        assert_eq!(send(&a, &long, &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
