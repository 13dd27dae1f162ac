//! What a subnet must be in itself, whoever claims it: the rules that need no other lease.

use ipnetwork::IpNetwork;

use super::claims::Prefix;
use super::{Refusal, Reserved};
use crate::types::Family;

/// What a subnet must be in itself, whoever claims it.
pub(super) fn possible_subnet(subnet: IpNetwork, network: IpNetwork) -> Result<(), Refusal> {
    // Outside before host bits: 10.42.9.7/24 is worth a hint, 8.8.8.8/0 is not.
    if subnet.prefix() < network.prefix() || !network.contains(subnet.network()) {
        return Err(Refusal::OutsideNetwork { subnet, network });
    }
    if subnet.ip() != subnet.network() {
        let canonical = IpNetwork::new(subnet.network(), subnet.prefix()).unwrap_or(subnet);
        return Err(Refusal::HostBits { subnet, canonical });
    }
    if subnet.prefix() >= Prefix::width(Family::of(subnet.ip())) - 1 {
        return Err(Refusal::TooSmall { subnet });
    }
    Ok(())
}

pub(super) fn not_reserved<'a>(
    subnet: IpNetwork,
    reserved: impl IntoIterator<Item = &'a Reserved>,
) -> Result<(), Refusal> {
    match reserved.into_iter().find(|r| overlap(r.network, subnet)) {
        Some(r) => Err(Refusal::Reserved { subnet, network: r.network, what: r.what.clone() }),
        None => Ok(()),
    }
}

/// Judges this node's own subnet as every peer will: what they must refuse is of no use here either.
pub(crate) fn judge_own(subnet: IpNetwork, network: IpNetwork, reserved: &[Reserved]) -> Result<(), Refusal> {
    possible_subnet(subnet, network)?;
    not_reserved(subnet, never_pods().iter().chain(reserved))
}

/// Whether two networks of any family share an address.
pub(crate) fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    match (a, b) {
        (IpNetwork::V4(a), IpNetwork::V4(b)) => a.contains(b.network()) || b.contains(a.network()),
        (IpNetwork::V6(a), IpNetwork::V6(b)) => a.contains(b.network()) || b.contains(a.network()),
        _ => false,
    }
}

/// Ranges in which no pod can live, whatever the cluster network (RFC 6890).
pub(super) fn never_pods() -> Vec<Reserved> {
    [
        ("0.0.0.0/8", "the unspecified network"),
        ("127.0.0.0/8", "the loopback network"),
        ("169.254.0.0/16", "the link-local network"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "the broadcast address"),
        ("::/96", "the unspecified and loopback addresses"),
        ("::ffff:0:0/96", "IPv4 addresses in IPv6 form"),
        ("fe80::/10", "the link-local network"),
        ("ff00::/8", "multicast"),
    ]
    .iter()
    .filter_map(|(network, what)| Some(Reserved { network: network.parse().ok()?, what: (*what).to_owned() }))
    .collect()
}
