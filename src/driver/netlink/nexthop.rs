//! Nexthop objects as messages (`linux/nexthop.h`, kernel 5.3): netlink-packet-route has none.

use std::net::{IpAddr, Ipv4Addr};

use super::PROTOCOL;
use super::wire::{Message, Messages, attributes, ip_of, number, u32_of};

const NHA_ID: u16 = 1;
const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;

/// Which gateway, by what it is to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Via {
    pub(super) index: u32,
    pub(super) gateway: Ipv4Addr,
    pub(super) onlink: bool,
}

/// Creates a nexthop object; an id that is taken is an error.
pub(super) fn create(out: &mut Messages, id: u32, via: Via) {
    let [f0, f1, f2, f3] = if via.onlink { number::RTNH_F_ONLINK } else { 0 }.to_ne_bytes();
    let fixed = [number::AF_INET, 0, PROTOCOL, 0, f0, f1, f2, f3];
    out.begin(number::RTM_NEWNEXTHOP, number::NLM_F_CREATE | number::NLM_F_EXCL, &fixed)
        .attribute_u32(NHA_ID, id)
        .attribute_u32(NHA_OIF, via.index)
        .attribute_ip(NHA_GATEWAY, via.gateway.into());
}

/// Deletes a nexthop object, and with it every route that names it.
pub(super) fn delete(out: &mut Messages, id: u32) {
    out.begin(number::RTM_DELNEXTHOP, 0, &[0; 8]).attribute_u32(NHA_ID, id);
}

/// Asks for all nexthop objects.
pub(super) fn dump() -> Messages {
    Messages::one(number::RTM_GETNEXTHOP, number::NLM_F_DUMP, &[0; 8])
}

/// A nexthop object as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawNexthop {
    pub(super) id: u32,
    pub(super) protocol: u8,
    pub(super) index: Option<u32>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
}

impl RawNexthop {
    /// What it is to us, if it can be one of ours.
    pub(super) fn via(&self) -> Option<Via> {
        match (self.index, self.gateway) {
            (Some(index), Some(IpAddr::V4(gateway))) => Some(Via { index, gateway, onlink: self.onlink }),
            _ => None,
        }
    }
}

/// Reads a nexthop object; groups and blackholes have neither device nor gateway.
pub(super) fn decode(message: &Message<'_>) -> Option<RawNexthop> {
    let (fixed, rest) = message.payload.split_first_chunk::<8>()?;
    let flags = u32_of(fixed.get(4..)?)?;
    let mut id = None;
    let (mut index, mut gateway) = (None, None);
    for (kind, value) in attributes(rest) {
        match kind {
            NHA_ID => id = u32_of(value),
            NHA_OIF => index = u32_of(value),
            NHA_GATEWAY => gateway = ip_of(value),
            _ => {}
        }
    }
    Some(RawNexthop { id: id?, protocol: *fixed.get(2)?, index, gateway, onlink: flags & number::RTNH_F_ONLINK != 0 })
}
