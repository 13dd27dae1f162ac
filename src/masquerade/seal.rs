//! What no packet gets past where encryption is required: the rules that let nothing go to pods of other nodes but by a device
//! that encrypts, whatever the routes say.
//!
//! Routes are the first guard (a blackhole behind the pod network) and can be flushed in one stroke with the route that they guard;
//! this is the second. It judges a packet where its device is settled, so that no route, rule or table can lead around it.

use ipnetwork::IpNetwork;

use super::ruleset::{Chain, Hook, Match, Rule, Verdict};
use crate::types::DeviceName;

/// The chain for a family; both networks are of it and have no host bits. `devices` are those that encrypt.
pub(super) fn seal(network: IpNetwork, subnet: IpNetwork, devices: &[DeviceName]) -> Chain {
    let mut rules = vec![Rule::new([Match::To(subnet)], Verdict::Return, "to this node's pods")];
    rules.extend(devices.iter().map(|d| Rule::new([Match::By(d.clone())], Verdict::Return, "encrypted")));
    rules.push(Rule::new([Match::To(network)], Verdict::Drop, "encryption is required"));
    Chain { hook: Hook::Seal, rules }
}
