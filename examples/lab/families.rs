//! What the lab has once a family: addresses and networks of IPv4, of IPv6 or of both, and how to get at one half.
//!
//! The types are podnet's vocabulary ([`Stack`], [`Family`]), so that "neither" cannot be said. Asking for a family that a lab does not have is
//! an error with a name, since only a mistake in a proof does so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use podnet::types::{Family, Stack};

use crate::LabError;

/// Which families there are: `Stack::Dual((), ())` is both.
pub type Families = Stack<(), ()>;
/// An address in each family.
pub type Addresses = Stack<Ipv4Addr, Ipv6Addr>;
/// A network in each family.
pub type Networks = Stack<Ipv4Network, Ipv6Network>;

/// One of two values, or both: those of the families that there are.
pub fn within<A, B, T, U>(families: &Stack<T, U>, v4: A, v6: B) -> Stack<A, B> {
    match families {
        Stack::V4(_) => Stack::V4(v4),
        Stack::V6(_) => Stack::V6(v6),
        Stack::Dual(..) => Stack::Dual(v4, v6),
    }
}

/// The address of a family.
pub fn address(addresses: &Addresses, family: Family) -> Result<IpAddr, LabError> {
    match family {
        Family::V4 => addresses.v4().map(|address| IpAddr::V4(*address)),
        Family::V6 => addresses.v6().map(|address| IpAddr::V6(*address)),
    }
    .ok_or_else(|| missing("address", family))
}

/// The network of a family.
pub fn network(networks: &Networks, family: Family) -> Result<IpNetwork, LabError> {
    match family {
        Family::V4 => networks.v4().map(|network| IpNetwork::V4(*network)),
        Family::V6 => networks.v6().map(|network| IpNetwork::V6(*network)),
    }
    .ok_or_else(|| missing("network", family))
}

/// The first address that there is: IPv4 where there are both.
pub fn first(addresses: &Addresses) -> IpAddr {
    match addresses {
        Stack::V4(address) | Stack::Dual(address, _) => (*address).into(),
        Stack::V6(address) => (*address).into(),
    }
}

/// Address number `number` of a network, counted from the network's own.
pub fn nth(network: IpNetwork, number: u32) -> IpAddr {
    match network {
        IpNetwork::V4(network) => Ipv4Addr::from(u32::from(network.network()).wrapping_add(number)).into(),
        IpNetwork::V6(network) => Ipv6Addr::from(u128::from(network.network()).wrapping_add(number.into())).into(),
    }
}

/// All addresses of a family: the destination of the default route.
pub fn everything(family: Family) -> IpNetwork {
    match family {
        Family::V4 => with_prefix(Ipv4Addr::UNSPECIFIED.into(), 0),
        Family::V6 => with_prefix(Ipv6Addr::UNSPECIFIED.into(), 0),
    }
}

/// An address with a prefix length that the caller knows to be valid; longer ones become the address alone.
pub(crate) fn with_prefix(address: IpAddr, prefix: u8) -> IpNetwork {
    IpNetwork::new(address, prefix).unwrap_or_else(|_| IpNetwork::from(address))
}

/// An address that stays on its link (fe80::/10).
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

fn missing(what: &str, family: Family) -> LabError {
    LabError::Invalid(format!("this lab has no {family} {what}"))
}
