//! Arithmetic on networks of either family, so that one set of networks has one list, and a list is what a driver finds
//! again in the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::types::Family;

/// Without host bits: [`IpNetwork`] keeps them.
pub(crate) fn canonical(network: IpNetwork) -> IpNetwork {
    network_of(Family::of(network.ip()), bits(network.network()), network.prefix())
}

/// Those of a family, in order, none inside another, halves of one network joined: one meaning, one list.
pub(super) fn merged(networks: &[IpNetwork], family: Family) -> Vec<IpNetwork> {
    let mut sorted: Vec<_> = networks.iter().filter(|n| Family::of(n.ip()) == family).map(|n| canonical(*n)).collect();
    sorted.sort();
    let mut out: Vec<IpNetwork> = Vec::new();
    for network in sorted {
        if out.last().is_some_and(|last| last.contains(network.ip())) {
            continue;
        }
        out.push(network);
        while let [.., low, high] = out.as_slice() {
            let Some(whole) = joined(*low, *high) else { break };
            out.truncate(out.len() - 2);
            out.push(whole);
        }
    }
    out
}

/// The network of which these are the two halves.
fn joined(low: IpNetwork, high: IpNetwork) -> Option<IpNetwork> {
    let family = Family::of(low.ip());
    let prefix = low.prefix().checked_sub(1)?;
    let whole = canonical(network_of(family, bits(low.ip()), prefix));
    let halves = low.prefix() == high.prefix() && low != high && whole.ip() == low.ip() && whole.contains(high.ip());
    halves.then_some(whole)
}

/// An address as a number.
pub(crate) fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// A network from its number and its length. Bits beyond the family's width and prefixes beyond its length are cut: no caller has any.
pub(crate) fn network_of(family: Family, bits: u128, prefix: u8) -> IpNetwork {
    match family {
        Family::V4 => {
            let address = Ipv4Addr::from_bits(bits as u32);
            Ipv4Network::new_checked(address, prefix.min(32)).unwrap_or_else(|| Ipv4Network::from(address)).into()
        }
        Family::V6 => {
            let address = Ipv6Addr::from_bits(bits);
            Ipv6Network::new_checked(address, prefix.min(128)).unwrap_or_else(|| Ipv6Network::from(address)).into()
        }
    }
}
