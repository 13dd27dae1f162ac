//! What a node's kernel holds, as lines that can be compared and printed: links, addresses, routes, neighbours, FDB, nexthop objects, tables.
//!
//! It leaves out what moves by itself: interface indices, counters, entries that were learned, IPv6 link-local addresses.

use std::collections::BTreeSet;

use super::OVERLAY_DEVICE;
use crate::host::Neighbour;
use crate::{Host, LabError, nexthops, services};

/// A set of lines, each one object of the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeState(BTreeSet<String>);

impl NodeState {
    /// Reads all of it.
    pub async fn of(host: &Host) -> Result<Self, LabError> {
        let mut state = links_and_addresses(host).await?;
        state.0.extend(routes(host).await?.0);
        if host.has_link(OVERLAY_DEVICE).await? {
            // The device may go while it is looked at: then what was seen of it is not the whole, and differs.
            for part in [neighbours(host).await, fdb(host).await] {
                match part {
                    Ok(part) => state.0.extend(part.0),
                    Err(error) if error.is_absent() => {}
                    Err(error) => return Err(error),
                }
            }
        }
        state.0.extend(tables(host)?.0);
        state.0.extend(nexthops::ids(host)?.iter().map(|id| format!("nexthop id {id}")));
        state.0.insert(format!("sysctl net.ipv4.ip_forward {}", host.sysctl("net.ipv4.ip_forward")?));
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
        lines.extend(addresses.iter().filter(|a| a.is_ipv4()).map(|a| format!("address {a} dev {}", link.name)));
    }
    Ok(NodeState(lines))
}

/// The IPv4 routes of the main table. The id of a nexthop object is not compared: it is another after each repair.
pub async fn routes(host: &Host) -> Result<NodeState, LabError> {
    let routes = host.routes().await?.into_iter();
    Ok(routes.map(|route| format!("route {}", crate::Route { nexthop_id: None, ..route })).collect())
}

/// The permanent neighbours of the overlay's device.
pub async fn neighbours(host: &Host) -> Result<NodeState, LabError> {
    let all = host.neighbours(OVERLAY_DEVICE).await?;
    Ok(all.iter().filter(|entry| entry.permanent).map(|entry| entry_line("neighbour", entry)).collect())
}

/// The FDB of the overlay's device.
pub async fn fdb(host: &Host) -> Result<NodeState, LabError> {
    Ok(host.fdb(OVERLAY_DEVICE).await?.iter().map(|entry| entry_line("fdb", entry)).collect())
}

/// The nftables tables.
pub fn tables(host: &Host) -> Result<NodeState, LabError> {
    Ok(services::tables(host)?.into_iter().map(|name| format!("table {name}")).collect())
}

fn entry_line(what: &str, entry: &Neighbour) -> String {
    let address = entry.address.map(|address| address.to_string()).unwrap_or_default();
    format!("{what} {address} lladdr {} dev {OVERLAY_DEVICE}", entry.mac.map(mac).unwrap_or_default())
}

/// A link-layer address as people write it.
pub fn mac(bytes: [u8; 6]) -> String {
    bytes.map(|byte| format!("{byte:02x}")).join(":")
}
