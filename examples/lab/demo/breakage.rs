//! What somebody else breaks, and how long it takes until the kernel holds everything again.
//!
//! The kernel is watched, not podnet: the time runs from the kernel's acknowledgement of the break until its state is what it was before.

use std::future::Future;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use podnet::driver::netlink;
use podnet::types::Family;
use serde_json::json;

use super::cluster::milliseconds;
use super::node_state::{self, NodeState, mac};
use super::proofs::sealed::{Wire, chatter};
use super::proofs::{SESSION, reaches, seen_outside};
use super::{Cluster, Crossing, DemoError, Part, Seen, Stage};
use crate::cluster::UNDERLAY_INTERFACE;
use crate::families::{self, is_link_local};
use crate::probe::Chatter;
use crate::{Host, LabError, Netns, Node, Route, wait_until};

/// How long a repair may take. The design wants it within a second; a busy machine may take longer, and what is printed is what it took.
const DEADLINE: Duration = Duration::from_secs(5);

/// How long hosts may take to find each other on a link that is up again: the kernel asks three times, once a second.
const NEIGHBOURS: Duration = Duration::from_secs(3);

/// RTPROT_KERNEL: what the kernel makes with an address.
const PROTOCOL_KERNEL: u8 = 2;

/// How often the kernel is looked at: what is printed is exact to about that.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Breaks one thing after the other, in each family of the cluster.
pub async fn all(cluster: &Cluster, stage: &mut Stage<'_>) {
    let part = Part::Repair;
    // A device of both families is broken once.
    let mut broken = Vec::new();
    for family in cluster.spec().families.families() {
        let named = |claim: &str| cluster.named(claim, family);
        stage.show(part, &named("a route deleted"), route(cluster, family)).await;
        let usual = cluster.spec().backend.device(family).filter(|device| !broken.contains(device));
        if let Some((usual, device)) = usual.zip(cluster.device(cluster.first(), family)) {
            broken.push(usual);
            let on = Overlay { cluster, family, device };
            if cluster.crossing() == Crossing::Vxlan {
                stage.show(part, &named("a neighbour deleted"), on.neighbour()).await;
                stage.show(part, &named("an FDB entry deleted"), on.fdb_entry()).await;
            }
            stage.show(part, &format!("{usual} set down and up"), on.down_and_up()).await;
            stage.show(part, &format!("{usual} deleted"), on.deleted()).await;
        }
        stage.show(part, &named(cluster.spec().masquerade.breakage()), rules(cluster, family)).await;
    }
    // What it takes away: plain routes, and IPv6 addresses with all that stands on them. Of encapsulation over IPv4 it takes nothing.
    let takes_something = match cluster.crossing() {
        Crossing::Plain => true,
        Crossing::Vxlan | Crossing::Udp | Crossing::Sealed => cluster.spec().families.has(Family::V6),
        Crossing::Nowhere => false,
    };
    if takes_something {
        stage.show(part, &format!("{UNDERLAY_INTERFACE} set down and up"), underlay(cluster)).await;
    }
}

/// The link that carries everything fails for a moment.
async fn underlay(cluster: &Cluster) -> Result<Seen, DemoError> {
    if cluster.other().is_none() {
        return cluster.cannot();
    }
    let host = cluster.first().host();
    let configuration = HostConfiguration::of(host).await?;
    let shake = async {
        host.set_down(UNDERLAY_INTERFACE).await?;
        host.set_up(UNDERLAY_INTERFACE).await?;
        configuration.restore(host).await
    };
    let repair = repair(cluster, shake, || NodeState::of(host)).await?;
    // The nodes look for each other's Ethernet addresses anew, and ask again after a second.
    let repair = Repair { patience: repair.patience.max(NEIGHBOURS), ..repair };
    repaired(cluster, cluster.spec().families.families(), repair, "all that went with it, once it had its addresses")
        .await
}

/// What the host's network manager configured on the underlay, and brings back when the link comes up again: not podnet's to repair.
#[derive(Debug, Clone)]
pub struct HostConfiguration {
    addresses: Vec<IpNetwork>,
    routes: Vec<Route>,
}

impl HostConfiguration {
    /// As it is now.
    pub async fn of(host: &Host) -> Result<Self, LabError> {
        let addresses = host.addresses(UNDERLAY_INTERFACE).await?.into_iter();
        let mut routes = Vec::new();
        for family in Family::BOTH {
            let all = host.routes_in(family).await?.into_iter();
            let configured = |protocol| protocol != netlink::PROTOCOL && protocol != PROTOCOL_KERNEL;
            routes.extend(all.filter(|route| route.device == UNDERLAY_INTERFACE && configured(route.protocol)));
        }
        // The way to the gateway before what goes through it.
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(Self { addresses: addresses.filter(|address| !is_link_local(address.ip())).collect(), routes })
    }

    /// Brings back what is missing, once the link carries packets.
    pub async fn restore(&self, host: &Host) -> Result<(), LabError> {
        host.wait_ready(UNDERLAY_INTERFACE, DEADLINE).await?;
        // The kernel keeps IPv4 addresses over a down, and no IPv6 address.
        let there = host.addresses(UNDERLAY_INTERFACE).await?;
        for address in self.addresses.iter().filter(|address| !there.contains(address)) {
            host.add_address(UNDERLAY_INTERFACE, *address).await?;
        }
        for route in &self.routes {
            host.replace_route(route).await?;
        }
        Ok(())
    }
}

async fn route(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let host = cluster.first().host();
    let subnet = match cluster.crossing() {
        // One for all peers.
        Crossing::Sealed => families::network(&cluster.lab().spec().networks, family)?,
        Crossing::Vxlan | Crossing::Udp | Crossing::Plain | Crossing::Nowhere => cluster.subnet(other, family)?,
    };
    let routes = host.routes_in(family).await?;
    let Some(victim) = routes.into_iter().find(|route| route.destination == subnet) else {
        return Ok(Seen::new(false, format!("there is no route to {subnet} to delete")));
    };
    let gateway = victim.gateway.map(|gateway| format!(" via {gateway}")).unwrap_or_default();
    let took = repair(cluster, host.delete_route(&victim), || node_state::routes(host)).await?;
    repaired(cluster, [family], took, &format!("{subnet}{gateway}")).await
}

async fn rules(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let (node, host) = (cluster.first(), cluster.first().host());
    let harm = async { cluster.spec().masquerade.break_on(host, family) };
    let took = repair(cluster, harm, || async { node_state::rules(host) }).await?;
    let (seen, address) = (seen_outside(cluster, &node.pods()[0], family).await?, node.ip_in(family)?);
    if seen.iter().any(|seen| *seen != address) {
        return Ok(Seen::new(false, format!("the rules are back, but the outside sees {seen:?}")));
    }
    repaired(cluster, [family], took, "and the outside sees the node as before").await
}

/// The overlay's device of one family, on the first node.
struct Overlay<'a> {
    cluster: &'a Cluster,
    family: Family,
    device: &'a str,
}

impl Overlay<'_> {
    fn host(&self) -> &Host {
        self.cluster.first().host()
    }

    async fn repaired(&self, repair: Repair, what: &str) -> Result<Seen, DemoError> {
        repaired(self.cluster, [self.family], repair, what).await
    }

    async fn neighbour(&self) -> Result<Seen, DemoError> {
        let Some(other) = self.cluster.other() else {
            return self.cluster.cannot();
        };
        let (host, device) = (self.host(), self.device);
        let vtep = self.cluster.subnet(other, self.family)?.network();
        let delete = host.delete_neighbour(device, vtep);
        let took = repair(self.cluster, delete, || node_state::neighbours(host, device)).await?;
        self.repaired(took, &format!("{vtep} on {device}")).await
    }

    async fn fdb_entry(&self) -> Result<Seen, DemoError> {
        let Some(other) = self.cluster.other() else {
            return self.cluster.cannot();
        };
        let (host, device, address) = (self.host(), self.device, other.ip_in(self.family)?);
        let entries = host.fdb(device).await?;
        let Some(victim) = entries.iter().find(|entry| entry.address == Some(address)).and_then(|entry| entry.mac)
        else {
            return Ok(Seen::new(false, format!("there is no FDB entry to {address} to delete")));
        };
        let took = repair(self.cluster, host.delete_fdb(device, victim), || node_state::fdb(host, device)).await?;
        self.repaired(took, &format!("{} to {address}", mac(victim))).await
    }

    async fn down_and_up(&self) -> Result<Seen, DemoError> {
        let (host, device) = (self.host(), self.device);
        let shake = async {
            host.set_down(device).await?;
            host.set_up(device).await
        };
        let took = repair(self.cluster, shake, || NodeState::of(host)).await?;
        let with_it = match self.cluster.crossing() {
            Crossing::Vxlan => "its address, neighbours, routes",
            Crossing::Udp => "its addresses, routes",
            Crossing::Sealed => "its address, routes, peers",
            Crossing::Plain | Crossing::Nowhere => "its address",
        };
        self.repaired(took, with_it).await
    }

    async fn deleted(&self) -> Result<Seen, DemoError> {
        let (host, device) = (self.host(), self.device);
        let before = host.link(device).await?;
        let took = repair(self.cluster, host.delete_link(device), || NodeState::of(host)).await?;
        let after = host.link(device).await?;
        let same = before.mac == after.mac;
        let text = match after.mac {
            Some(after) if same => format!("made anew with the same MAC {}", mac(after)),
            Some(after) => format!("made anew with ANOTHER MAC {}", mac(after)),
            None => "made anew".to_owned(),
        };
        let seen = self.repaired(took, &text).await?;
        if !same || before.index == after.index {
            return Ok(Seen::new(false, format!("{text} (index {} before, {} after)", before.index, after.index)));
        }
        Ok(seen)
    }
}

/// Breaks something on the first node and waits until what `look` looks at is as before.
async fn repair<Look>(
    cluster: &Cluster,
    breaking: impl Future<Output = Result<(), LabError>>,
    look: impl Fn() -> Look,
) -> Result<Repair, DemoError>
where
    Look: Future<Output = Result<NodeState, LabError>>,
{
    let host: &Host = cluster.first().host();
    let (whole, watched) = (NodeState::of(host).await?, look().await?);
    let listening = match cluster.crossing() {
        Crossing::Sealed => Some((Wire::listen(cluster).await?, chatter(cluster)?)),
        Crossing::Vxlan | Crossing::Udp | Crossing::Plain | Crossing::Nowhere => None,
    };
    breaking.await?;
    let broken = Instant::now();
    wait_for(&watched, look).await?;
    let took = broken.elapsed();
    // And nothing else has changed by it.
    wait_for(&whole, || NodeState::of(host)).await?;
    // Two nodes may have to agree on keys anew, and a device in user space gets its peers after all else: neither is seen in the kernel.
    let patience = if listening.is_some() { SESSION } else { Duration::ZERO };
    Ok(Repair { took, patience, listening })
}

/// What was broken is there again.
struct Repair {
    took: Duration,
    /// How long pods may take to reach each other then; zero where the first packet must be answered.
    patience: Duration,
    /// Who heard what was on the wire meanwhile, while pods talked, where nobody should read it.
    listening: Option<(Wire, Vec<Chatter>)>,
}

async fn wait_for<Look>(wanted: &NodeState, look: impl Fn() -> Look) -> Result<(), LabError>
where
    Look: Future<Output = Result<NodeState, LabError>>,
{
    let start = Instant::now();
    loop {
        let changes = match look().await {
            Ok(state) => state.changes_since(wanted),
            // What is looked at is not there yet.
            Err(error) if error.is_absent() => vec![error.to_string()],
            Err(error) => return Err(error),
        };
        if changes.is_empty() {
            return Ok(());
        }
        if start.elapsed() >= DEADLINE {
            return Err(LabError::Invalid(format!("not repaired within {DEADLINE:?}: {}", changes.join("; "))));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn reaches_within(patience: Duration, from: &Netns, to: IpAddr) -> Result<bool, LabError> {
    match wait_until("an answer", patience, || reaches(from, to)).await {
        Ok(_) => Ok(true),
        Err(LabError::Deadline { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The kernel holds it again; it must work too.
async fn repaired(
    cluster: &Cluster,
    families: impl IntoIterator<Item = Family>,
    repair: Repair,
    what: &str,
) -> Result<Seen, DemoError> {
    let node: &Node = cluster.first();
    let mut works = true;
    if let Some(other) = cluster.other() {
        for family in families {
            let (from, to) = (node.pods()[0].netns(), other.pods()[0].ip_in(family)?);
            works &= reaches_within(repair.patience, from, to).await?;
        }
    }
    let took_ms = milliseconds(repair.took);
    let mut text =
        format!("{took_ms:>6.1} ms  {what}{}", if works { "" } else { ", but pods do not reach each other" });
    let mut leaked = Vec::new();
    if let Some((wire, _chatter)) = repair.listening {
        let heard = wire.heard();
        text.push_str(&format!("; {}", heard.summary()));
        // Where nothing was heard, nothing is shown.
        works &= heard.is_unreadable() && (cluster.other().is_none() || heard.heard_something());
        leaked.extend(heard.told());
    }
    Ok(Seen::new(works, text).details(leaked).figures(json!({ "repaired_ms": took_ms })))
}
