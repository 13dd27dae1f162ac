//! What no packet gets past where encryption is required: the rules that let nothing go to pods of other nodes but by a device
//! that encrypts, whatever the routes say.
//!
//! Routes are the first guard (a blackhole behind the pod network) and can be flushed in one stroke with the route that they guard;
//! this is the second. It judges a packet where its device is settled, so that no route and no table of routes can lead around it.

use ipnetwork::IpNetwork;

use super::network::merged;
use super::ruleset::{Chain, Hook, Match, Rule, Verdict};
use crate::types::{DeviceName, Family};

/// By which way pod packets may leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Seal {
    /// The devices that encrypt.
    pub(crate) devices: Vec<DeviceName>,
    /// Networks inside the cluster network that are no pods': what the host itself is connected to, and what is reserved. No peer
    /// has a subnet there.
    pub(crate) others: Vec<IpNetwork>,
}

/// The chain for a family; both networks are of it and have no host bits.
pub(super) fn seal(network: IpNetwork, subnet: IpNetwork, seal: &Seal) -> Chain {
    let mut rules = vec![Rule::new([Match::To(subnet)], Verdict::Return, "to this node's pods")];
    let inside = |other: &&IpNetwork| other.prefix() > network.prefix() && network.contains(other.ip());
    let others: Vec<IpNetwork> = seal.others.iter().filter(inside).copied().collect();
    rules.extend(
        merged(&others, Family::of(network.ip()))
            .into_iter()
            .map(|other| Rule::new([Match::To(other)], Verdict::Return, "no pods are there")),
    );
    rules.extend(seal.devices.iter().map(|d| Rule::new([Match::By(d.clone())], Verdict::Return, "encrypted")));
    rules.push(Rule::new([Match::To(network)], Verdict::Drop, "encryption is required"));
    Chain { hook: Hook::Seal, rules }
}
