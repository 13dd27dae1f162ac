//! Addresses: read by hand, written through rtnetlink.

use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};

use super::wire::{Message, Messages, attributes, ip_of, number, u32_of};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;

const IFA_F_TEMPORARY: u32 = 0x01;
const IFA_F_DEPRECATED: u32 = 0x20;
const IFA_F_PERMANENT: u32 = 0x80;

/// Asks for all addresses.
pub(super) fn dump() -> Messages {
    Messages::one(number::RTM_GETADDR, number::NLM_F_DUMP, &[number::AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0])
}

/// An address as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawAddress {
    pub(super) index: u32,
    pub(super) address: IpNetwork,
    pub(super) scope: u8,
    flags: u32,
}

impl RawAddress {
    pub(super) fn temporary(&self) -> bool {
        // The bit means "secondary" in IPv4.
        self.address.is_ipv6() && self.flags & IFA_F_TEMPORARY != 0
    }

    pub(super) fn deprecated(&self) -> bool {
        self.flags & IFA_F_DEPRECATED != 0
    }

    pub(super) fn permanent(&self) -> bool {
        self.flags & IFA_F_PERMANENT != 0
    }
}

/// Reads an address.
pub(super) fn decode(message: &Message<'_>) -> Option<RawAddress> {
    let (fixed, rest) = message.payload.split_first_chunk::<8>()?;
    let [_family, length, flags, scope, i0, i1, i2, i3] = *fixed;
    let mut flags = u32::from(flags);
    let (mut address, mut local) = (None, None);
    for (kind, value) in attributes(rest) {
        match kind {
            IFA_ADDRESS => address = ip_of(value),
            IFA_LOCAL => local = ip_of(value),
            IFA_FLAGS => flags = u32_of(value)?,
            _ => {}
        }
    }
    // On a point-to-point device IFA_ADDRESS is the other end.
    let address = IpNetwork::new(local.or(address)?, length).ok()?;
    Some(RawAddress { index: u32::from_ne_bytes([i0, i1, i2, i3]), address, scope, flags })
}

/// The message for an address on a device: scope global and no broadcast address, which rtnetlink's builder would add. IPv6
/// without duplicate detection: nobody else has the address, and it works at once.
pub(super) fn message(index: u32, address: IpNetwork) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = address.prefix();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(address.ip()));
    message.attributes.push(AddressAttribute::Address(address.ip()));
    if address.is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}
