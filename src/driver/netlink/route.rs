//! Routes as messages, exactly as flannel's but for the protocol number, which is our mark.

use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network};

use super::PROTOCOL;
use super::wire::{Message, Messages, attributes, family_of, ip_of, number, u16_of, u32_of};
use crate::plan::{NextHop, Route};

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_NH_ID: u16 = 30;

/// `RTM_F_CLONED`: an entry of the route cache.
const RTM_F_CLONED: u32 = 0x200;
const RTM_F_FIB_MATCH: u32 = 0x2000;

/// Whether a route may be there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// It must not.
    Create,
    /// It may: it is replaced.
    Replace,
}

/// How a route names where it leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Nowhere.
    Blackhole,
    /// Out of a device.
    Device(u32),
    /// To a gateway on a device.
    Gateway { index: u32, address: IpAddr, onlink: bool },
    /// To whatever a nexthop object says.
    Object(u32),
}

fn header(destination: IpNetwork, protocol: u8, scope: u8, kind: u8, flags: u32) -> [u8; 12] {
    let [f0, f1, f2, f3] = flags.to_ne_bytes();
    let family = family_of(destination.ip());
    [family, destination.prefix(), 0, 0, number::RT_TABLE_MAIN, protocol, scope, kind, f0, f1, f2, f3]
}

/// Creates or replaces a route.
pub(super) fn set(out: &mut Messages, mode: Mode, route: &Route, way: Way) {
    let flags = number::NLM_F_CREATE
        | match mode {
            Mode::Create => number::NLM_F_EXCL,
            Mode::Replace => number::NLM_F_REPLACE,
        };
    let v4 = route.destination.is_ipv4();
    let (scope, kind, bits) = match way {
        Way::Blackhole => (number::RT_SCOPE_UNIVERSE, number::RTN_BLACKHOLE, 0),
        // IPv6 has no scopes.
        Way::Device(_) if v4 => (number::RT_SCOPE_LINK, number::RTN_UNICAST, 0),
        Way::Gateway { onlink: true, .. } => (number::RT_SCOPE_UNIVERSE, number::RTN_UNICAST, number::RTNH_F_ONLINK),
        _ => (number::RT_SCOPE_UNIVERSE, number::RTN_UNICAST, 0),
    };
    out.begin(number::RTM_NEWROUTE, flags, &header(route.destination, PROTOCOL, scope, kind, bits));
    out.attribute_ip(RTA_DST, route.destination.network());
    if route.metric != 0 {
        out.attribute_u32(RTA_PRIORITY, route.metric);
    }
    match way {
        Way::Blackhole => {}
        Way::Device(index) => {
            out.attribute_u32(RTA_OIF, index);
        }
        Way::Gateway { index, address, .. } => {
            out.attribute_ip(RTA_GATEWAY, address).attribute_u32(RTA_OIF, index);
        }
        Way::Object(id) => {
            out.attribute_u32(RTA_NH_ID, id);
        }
    }
}

/// Deletes a route of ours: the kernel compares destination, metric, table and protocol.
pub(super) fn delete(out: &mut Messages, route: &Route) {
    let fixed = header(route.destination, PROTOCOL, number::RT_SCOPE_NOWHERE, number::RTN_UNSPEC, 0);
    out.begin(number::RTM_DELROUTE, 0, &fixed).attribute_ip(RTA_DST, route.destination.network());
    if route.metric != 0 {
        out.attribute_u32(RTA_PRIORITY, route.metric);
    }
}

/// Deletes a route that flannel left: its protocol is `boot`, which is also that of routes made by hand, so the kernel
/// compares device and gateway too.
pub(super) fn delete_legacy(out: &mut Messages, route: &Route, index: u32) {
    let fixed = header(route.destination, number::RTPROT_BOOT, number::RT_SCOPE_NOWHERE, number::RTN_UNSPEC, 0);
    out.begin(number::RTM_DELROUTE, 0, &fixed)
        .attribute_ip(RTA_DST, route.destination.network())
        .attribute_u32(RTA_OIF, index);
    if route.metric != 0 {
        out.attribute_u32(RTA_PRIORITY, route.metric);
    }
    if let NextHop::Gateway { address, .. } = route.next {
        out.attribute_ip(RTA_GATEWAY, address);
    }
}

/// Asks for the main table of a family.
pub(super) fn dump(family: u8) -> Messages {
    let fixed = [family, 0, 0, 0, number::RT_TABLE_MAIN, 0, 0, 0, 0, 0, 0, 0];
    let mut request = Messages::one(number::RTM_GETROUTE, number::NLM_F_DUMP, &fixed);
    request.attribute_u32(RTA_TABLE, number::RT_TABLE_MAIN.into());
    request
}

/// Asks for the route of the table by which the kernel reaches the first address of a destination (`RTM_F_FIB_MATCH`, since
/// 4.13): of destination itself, unless there is a more special one.
pub(super) fn get(destination: Ipv4Network) -> Messages {
    let [f0, f1, f2, f3] = RTM_F_FIB_MATCH.to_ne_bytes();
    let fixed = [number::AF_INET, 32, 0, 0, 0, 0, 0, 0, f0, f1, f2, f3];
    let mut request = Messages::one(number::RTM_GETROUTE, 0, &fixed);
    request.attribute_ip(RTA_DST, destination.network().into());
    request
}

/// A route of the main table as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RawRoute {
    pub(super) destination: IpNetwork,
    pub(super) metric: u32,
    pub(super) protocol: u8,
    /// `RTN_*`.
    pub(super) kind: u8,
    pub(super) source: Option<IpAddr>,
    pub(super) nexthop: Option<u32>,
    /// Its ways: none of a blackhole, several of a multipath route.
    pub(super) hops: Vec<Hop>,
}

/// One way of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Hop {
    pub(super) index: Option<u32>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) onlink: bool,
}

/// Reads a route of the main table. Others, cached ones, and those that choose by source or type of service are passed over:
/// they share no key with ours.
pub(super) fn decode(message: &Message<'_>) -> Option<RawRoute> {
    let (fixed, rest) = message.payload.split_first_chunk::<12>()?;
    let [family, length, source_length, tos, table, protocol, _scope, kind, ..] = *fixed;
    let flags = u32_of(fixed.get(8..)?)?;
    let mut destination = match family {
        number::AF_INET => IpAddr::from([0; 4]),
        number::AF_INET6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    if source_length != 0 || tos != 0 || flags & RTM_F_CLONED != 0 {
        return None;
    }
    let mut table = u32::from(table);
    let mut metric = 0;
    let (mut source, mut nexthop) = (None, None);
    let mut hop = Hop { onlink: flags & number::RTNH_F_ONLINK != 0, ..Hop::default() };
    let mut hops = Vec::new();
    for (kind, value) in attributes(rest) {
        match kind {
            RTA_DST => destination = ip_of(value)?,
            RTA_OIF => hop.index = u32_of(value),
            RTA_GATEWAY => hop.gateway = ip_of(value),
            RTA_VIA => hop.gateway = via_of(value),
            RTA_PRIORITY => metric = u32_of(value)?,
            RTA_PREFSRC => source = ip_of(value),
            RTA_TABLE => table = u32_of(value)?,
            RTA_NH_ID => nexthop = u32_of(value),
            RTA_MULTIPATH => hops = multipath(value),
            _ => {}
        }
    }
    if table != u32::from(number::RT_TABLE_MAIN) {
        return None;
    }
    if hops.is_empty() && hop.index.is_some() {
        hops.push(hop);
    }
    let destination = IpNetwork::new(destination, length).ok()?;
    Some(RawRoute { destination, metric, protocol, kind, source, nexthop, hops })
}

/// `struct rtvia`: the gateway of a route in another family.
fn via_of(value: &[u8]) -> Option<IpAddr> {
    ip_of(value.get(2..)?)
}

/// The ways of a multipath route: `struct rtnexthop`, each with attributes.
fn multipath(mut bytes: &[u8]) -> Vec<Hop> {
    let mut hops = Vec::new();
    while let Some(length) = u16_of(bytes).map(usize::from)
        && let Some(one) = bytes.get(..length)
        && let Some((fixed, rest)) = one.split_first_chunk::<8>()
    {
        let [_, _, flags, _, i0, i1, i2, i3] = *fixed;
        let mut hop = Hop {
            index: Some(u32::from_ne_bytes([i0, i1, i2, i3])),
            gateway: None,
            onlink: u32::from(flags) & number::RTNH_F_ONLINK != 0,
        };
        for (kind, value) in attributes(rest) {
            match kind {
                RTA_GATEWAY => hop.gateway = ip_of(value),
                RTA_VIA => hop.gateway = via_of(value),
                _ => {}
            }
        }
        hops.push(hop);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    hops
}
