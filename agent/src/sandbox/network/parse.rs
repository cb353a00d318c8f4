//! Parses addresses and numbers of a network request.

use std::net::IpAddr;

use super::NetworkError;

pub(super) fn parse_ip(text: &str) -> Result<IpAddr, NetworkError> {
    text.parse().map_err(|_| NetworkError::Malformed(text.to_owned(), "IP address"))
}

/// Parses an IP address. Returns `None` for an empty string.
pub(super) fn parse_optional_ip(text: &str) -> Result<Option<IpAddr>, NetworkError> {
    if text.is_empty() { Ok(None) } else { parse_ip(text).map(Some) }
}

pub(super) fn parse_cidr(text: &str) -> Result<(IpAddr, u8), NetworkError> {
    let malformed = || NetworkError::Malformed(text.to_owned(), "address with prefix length, such as 10.0.0.1/24");
    let (address, prefix) = text.split_once('/').ok_or_else(malformed)?;
    let address = parse_ip(address)?;
    let prefix: u8 = prefix.parse().map_err(|_| malformed())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    if prefix <= longest { Ok((address, prefix)) } else { Err(malformed()) }
}

/// Parses a prefix. Returns `None` for an empty string, and for a prefix of length 0 such as 0.0.0.0/0.
pub(super) fn parse_optional_cidr(text: &str) -> Result<Option<(IpAddr, u8)>, NetworkError> {
    if text.is_empty() { Ok(None) } else { Ok(Some(parse_cidr(text)?).filter(|(_, prefix)| *prefix > 0)) }
}

/// Converts a number for a one-byte field of a netlink message.
pub(super) fn parse_byte(number: u32, what: &'static str) -> Result<u8, NetworkError> {
    u8::try_from(number).map_err(|_| NetworkError::Malformed(number.to_string(), what))
}

/// Parses a MAC address: six bytes in hexadecimal, separated by colons.
pub fn parse_mac(text: &str) -> Result<Vec<u8>, NetworkError> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|part| u8::from_str_radix(part, 16)).collect();
    bytes.ok().filter(|mac| mac.len() == 6).ok_or_else(|| NetworkError::Malformed(text.to_owned(), "MAC address"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parsers_reject_malformed_addresses() {
        assert_eq!(parse_cidr("10.1.2.3/24").unwrap(), ("10.1.2.3".parse().unwrap(), 24));
        assert!(parse_cidr("10.1.2.3/33").is_err());
        assert!(parse_cidr("fd00::1/64").is_ok());
        assert_eq!(parse_mac("02:00:00:00:00:0a").unwrap(), [2, 0, 0, 0, 0, 10]);
        assert!(parse_mac("02:00").is_err());
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text: String) {
            let _ = parse_cidr(&text);
            let _ = parse_mac(&text);
        }
    }
}
