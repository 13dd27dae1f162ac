//! Who a pod's packet is from and for. It reads addresses and nothing else, and changes no packet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Source and destination of an IP packet (RFC 791, section 3.1; RFC 8200, section 3); `None` if it is too short to be one, or of
/// another version.
pub(crate) fn ends(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let header = packet.first_chunk::<20>()?;
            Some((v4(header.get(12..16)?)?, v4(header.get(16..20)?)?))
        }
        6 => {
            let header = packet.first_chunk::<40>()?;
            Some((v6(header.get(8..24)?)?, v6(header.get(24..40)?)?))
        }
        _ => None,
    }
}

fn v4(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into())
}

fn v6(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(source: IpAddr, destination: IpAddr) -> Vec<u8> {
        match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                [&[0x45; 1][..], &[0; 11], &source.octets(), &destination.octets()].concat()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                [&[0x60; 1][..], &[0; 7], &source.octets(), &destination.octets()].concat()
            }
            _ => panic!("two families"),
        }
    }

    proptest! {
        #[test]
        fn what_was_written_into_a_header_is_read_from_it(a: [u8; 4], b: [u8; 4], c: [u8; 16], d: [u8; 16], rest: Vec<u8>) {
            for (source, destination) in [(IpAddr::from(a), IpAddr::from(b)), (IpAddr::from(c), IpAddr::from(d))] {
                let whole = header(source, destination);
                prop_assert_eq!(ends(&[&whole[..], &rest].concat()), Some((source, destination)));
                prop_assert_eq!(ends(&whole[..whole.len() - 1]), None, "a header that is cut off");
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            let read = ends(&bytes);
            prop_assert!(read.is_none() || matches!(bytes[0] >> 4, 4 | 6) && bytes.len() >= 20);
        }
    }
}
