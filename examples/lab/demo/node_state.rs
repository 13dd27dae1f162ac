//! What a node's kernel holds, as lines that can be compared and printed: links, addresses, routes, neighbours, FDB, nexthop objects,
//! firewall chains.
//!
//! It leaves out what moves by itself: interface indices, counters, entries that were learned, IPv6 link-local addresses.

use std::collections::BTreeSet;

use podnet::types::Family;

use crate::cluster::forwarding;
use crate::families::is_link_local;
use crate::host::Neighbour;
use crate::{Host, LabError, firewall, nexthops};

/// A set of lines, each one object of the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState(BTreeSet<String>);

impl NodeState {
    /// Reads all of it.
    pub async fn of(host: &Host) -> Result<Self, LabError> {
        let mut state = links_and_addresses(host).await?;
        state.0.extend(routes(host).await?.0);
        let overlay = host.links().await?.into_iter().filter(|link| link.kind.as_deref() == Some("vxlan"));
        for device in overlay.map(|link| link.name) {
            // The device may go while it is looked at: then what was seen of it is not the whole, and differs.
            for part in [neighbours(host, &device).await, fdb(host, &device).await] {
                match part {
                    Ok(part) => state.0.extend(part.0),
                    Err(error) if error.is_absent() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        state.0.extend(rules(host)?.0);
        state.0.extend(nexthops::ids(host)?.iter().map(|id| format!("nexthop id {id}")));
        for setting in Family::BOTH.map(forwarding) {
            match host.sysctl(setting) {
                Ok(value) => state.0.insert(format!("sysctl {setting} {value}")),
                // A machine without IPv6.
                Err(error) if error.is_absent() => false,
                Err(error) => return Err(error),
            };
        }
        Ok(state)
    }

    /// How many objects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is here and not in `before` ("+ ..."), and the other way round ("- ...").
    pub fn changes_since(&self, before: &NodeState) -> Vec<String> {
        let gone = before.0.difference(&self.0).map(|line| format!("- {line}"));
        let new = self.0.difference(&before.0).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }
}

impl FromIterator<String> for NodeState {
    fn from_iter<I: IntoIterator<Item = String>>(lines: I) -> Self {
        Self(lines.into_iter().collect())
    }
}

async fn links_and_addresses(host: &Host) -> Result<NodeState, LabError> {
    let mut lines = BTreeSet::new();
    for link in host.links().await? {
        let mac = link.mac.map(mac).unwrap_or_default();
        let kind = link.kind.unwrap_or_default();
        let up = if link.up { "up" } else { "down" };
        lines.insert(format!("link {} {kind} mtu {} {mac} {up}", link.name, link.mtu));
        let addresses = match host.addresses(&link.name).await {
            Ok(addresses) => addresses,
            Err(error) if error.is_absent() => continue,
            Err(error) => return Err(error),
        };
        let lasting = addresses.iter().filter(|address| !is_link_local(address.ip()));
        lines.extend(lasting.map(|a| format!("address {a} dev {}", link.name)));
    }
    Ok(NodeState(lines))
}

/// The routes of the main table, of both families. The id of a nexthop object is not compared: it is another after each repair.
pub async fn routes(host: &Host) -> Result<NodeState, LabError> {
    let mut lines = BTreeSet::new();
    for family in Family::BOTH {
        let routes = host.routes_in(family).await?.into_iter();
        lines.extend(routes.map(|route| format!("route {}", crate::Route { nexthop_id: None, ..route })));
        lines.extend(host.blackholes(family).await?.into_iter().map(|hole| format!("route {hole}")));
    }
    Ok(NodeState(lines))
}

/// The permanent neighbours of a device.
pub async fn neighbours(host: &Host, device: &str) -> Result<NodeState, LabError> {
    let all = host.neighbours(device).await?;
    Ok(all.iter().filter(|entry| entry.permanent).map(|entry| entry_line("neighbour", entry, device)).collect())
}

/// The FDB of a device.
pub async fn fdb(host: &Host, device: &str) -> Result<NodeState, LabError> {
    Ok(host.fdb(device).await?.iter().map(|entry| entry_line("fdb", entry, device)).collect())
}

/// The nftables chains that do something, with how many rules are in them or lead there; and with them the tables.
pub fn rules(host: &Host) -> Result<NodeState, LabError> {
    Ok(firewall::chains(host)?.into_iter().map(|chain| format!("chain {chain}")).collect())
}

fn entry_line(what: &str, entry: &Neighbour, device: &str) -> String {
    let address = entry.address.map(|address| address.to_string()).unwrap_or_default();
    format!("{what} {address} lladdr {} dev {device}", entry.mac.map(mac).unwrap_or_default())
}

/// A link-layer address as people write it.
pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
