//! That nobody on the underlay can read what pods say to each other: text that is known goes from pod to pod while everything on a node's wire
//! is looked at, byte by byte.
//!
//! Judged by what is on the wire alone: neither podnet nor WireGuard is asked. On a wire that is not encrypted it fails.

use std::net::IpAddr;
use std::time::Duration;

use ipnetwork::IpNetwork;
use podnet::types::Family;
use serde_json::json;
use tokio::net::UdpSocket;

use crate::demo::backend::sealed_overhead;
use crate::demo::cluster::at;
use crate::demo::{Cluster, DemoError, Seen, wireguard};
use crate::error::Context as _;
use crate::probe::{Capture, Chatter, Frame, Needle};
use crate::{LabError, families};

/// What pods say here.
const TEXT: &[u8] = b"podnet: whoever reads this on the underlay has read what is not for him";
/// So long is each packet of it: what WireGuard pads nothing to, which pads to 16 bytes.
const PACKET: u16 = 128;
/// Where pods listen to it.
const PORT: u16 = 7009;
const SOON: Duration = Duration::from_secs(5);
/// So many packets that can be read are told of.
const TOLD: usize = 5;

/// From a pod of the first node to one of the last and back: it arrives, and nothing of it is seen on the way.
pub async fn unreadable(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    let node = cluster.first();
    let wire = Wire::listen(cluster).await?;
    let arrived = exchange(cluster, family).await?;

    let (from, to, port) = (node.ip_in(family)?, other.ip_in(family)?, wireguard::port(family));
    let long = u32::from(PACKET) + sealed_overhead(family);
    let is_ours = |frame: &Frame| {
        frame.is_between(from, to)
            && frame.udp.is_some_and(|udp| udp.destination == port)
            && frame.ip.is_some_and(|ip| u32::from(ip.total_length) == long)
    };
    let seen = wire.capture.wait_for(SOON, |frame| is_ours(frame) || wire.can_read(frame)).await.is_ok();
    let heard = wire.heard();
    let as_long = seen && wire.capture.report().frames.iter().any(is_ours);
    let length = match as_long {
        true => format!("{PACKET} bytes inside, {} more outside", sealed_overhead(family)),
        false => format!("no packet of {long} bytes, which is what {PACKET} bytes should be"),
    };
    let holds = arrived && as_long && heard.is_unreadable();
    let text = format!("{from} > {to} udp {port}; {length}; {}", heard.summary());
    let text = if arrived { text } else { format!("{text}; what the pods said did not arrive") };
    let looked = "looked for in every byte: what the pods say, and their addresses".to_owned();
    let figures = json!({ "outer_source": from, "outer_destination": to, "port": port, "overhead_bytes": sealed_overhead(family),
                          "sealed_packets": heard.sealed, "readable_packets": heard.readable.len() });
    Ok(Seen::new(holds, text).details([looked].into_iter().chain(heard.told())).figures(figures))
}

/// Says it one way and back, and whether both have heard it.
async fn exchange(cluster: &Cluster, family: Family) -> Result<bool, DemoError> {
    let (Some(pod), Some(peer)) =
        (cluster.first().pods().first(), cluster.other().and_then(|node| node.pods().first()))
    else {
        return Ok(false);
    };
    let (here, there) = (at(pod.ip_in(family)?, PORT), at(peer.ip_in(family)?, PORT));
    let (near, far) = (pod.netns().udp_socket(here)?, peer.netns().udp_socket(there)?);
    let said = said(family);
    let what = || format!("saying something from {here} to {there}");
    near.send_to(&said, there).await.context(what)?;
    let forth = hears(&far, &said).await;
    far.send_to(&said, here).await.context(what)?;
    Ok(forth && hears(&near, &said).await)
}

async fn hears(socket: &UdpSocket, said: &[u8]) -> bool {
    let mut buffer = [0; 512];
    let heard = tokio::time::timeout(SOON, socket.recv_from(&mut buffer)).await;
    matches!(heard, Ok(Ok((length, _))) if &buffer[..length] == said)
}

/// The text, as long as the packet wants it.
fn said(family: Family) -> Vec<u8> {
    let headers = if family == Family::V4 { 28 } else { 48 };
    TEXT.iter().copied().cycle().take(usize::from(PACKET) - headers).collect()
}

/// The wire of the first node, and who listens to it.
#[derive(Debug)]
pub(crate) struct Wire {
    capture: Capture,
    nodes: Vec<IpAddr>,
    networks: Vec<IpNetwork>,
}

impl Wire {
    /// Hears all that comes after this returns.
    pub(crate) async fn listen(cluster: &Cluster) -> Result<Self, LabError> {
        let lab = cluster.lab();
        let (mut nodes, mut networks, mut needles) =
            (Vec::new(), Vec::new(), vec![("what the pods say", TEXT.to_vec())]);
        for family in lab.spec().families() {
            networks.push(families::network(&lab.spec().networks, family)?);
            for node in lab.nodes() {
                nodes.push(node.ip_in(family)?);
            }
            let (here, there) = (cluster.first().pods()[0].ip_in(family)?, cluster.other().unwrap_or(cluster.first()));
            let there = there.pods()[0].ip_in(family)?;
            needles.extend([header(here, there), header(there, here)]);
        }
        let port = lab.fabric_port(cluster.first().index());
        Ok(Self { capture: Capture::looking_for(lab.fabric(), &port, needles).await?, nodes, networks })
    }

    /// What has been on it so far.
    pub(crate) fn heard(&self) -> Heard {
        let frames = self.capture.report().frames;
        let sealed = frames.iter().filter(|frame| self.is_sealed(frame)).count();
        let readable = frames.iter().filter(|frame| self.can_read(frame)).map(told).collect();
        Heard { sealed, readable }
    }

    fn is_between_nodes(&self, frame: &Frame) -> bool {
        frame.ip.is_some_and(|ip| self.nodes.contains(&ip.source) && self.nodes.contains(&ip.destination))
    }

    fn is_sealed(&self, frame: &Frame) -> bool {
        let ports = Family::BOTH.map(wireguard::port);
        self.is_between_nodes(frame) && frame.udp.is_some_and(|udp| ports.contains(&udp.destination))
    }

    /// It shows something of what pods say or who they are; or it goes between nodes and is none of WireGuard's. What nodes tell each other of
    /// their neighbourhood (ICMP) is their own.
    fn can_read(&self, frame: &Frame) -> bool {
        let of_pods = |ip: IpAddr| self.networks.iter().any(|network| network.contains(ip));
        !frame.reveals.is_empty()
            || frame.ip.is_some_and(|ip| of_pods(ip.source) || of_pods(ip.destination))
            || (self.is_between_nodes(frame) && !self.is_sealed(frame) && !frame.is_icmp())
    }
}

/// What a packet of either family between the two has in its header: both addresses, one behind the other.
fn header(from: IpAddr, to: IpAddr) -> Needle {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    ("the pods' addresses", [bytes(from), bytes(to)].concat())
}

fn told(frame: &Frame) -> String {
    let way = frame.ip.map(|ip| format!("{} > {} protocol {}", ip.source, ip.destination, ip.protocol));
    let way = way.unwrap_or_else(|| format!("a frame of type {:#06x}", frame.ether_type));
    let port = frame.udp.map(|udp| format!(" port {}", udp.destination)).unwrap_or_default();
    let shows = if frame.reveals.is_empty() { "itself".to_owned() } else { frame.reveals.join(" and ") };
    format!("{way}{port} shows {shows}")
}

/// What was on the wire.
#[derive(Debug)]
pub(crate) struct Heard {
    /// Packets of WireGuard's between nodes.
    sealed: usize,
    /// Packets that whoever listens can read, in words.
    readable: Vec<String>,
}

impl Heard {
    pub(crate) fn is_unreadable(&self) -> bool {
        self.readable.is_empty()
    }

    pub(crate) fn heard_something(&self) -> bool {
        self.sealed > 0
    }

    pub(crate) fn summary(&self) -> String {
        match self.readable.len() {
            0 => format!("none of {} packets can be read", self.sealed),
            readable => format!("{readable} packets CAN BE READ"),
        }
    }

    /// Some of what could be read.
    pub(crate) fn told(&self) -> impl Iterator<Item = String> + '_ {
        self.readable.iter().take(TOLD).cloned()
    }
}

/// A pod of the first node says the text to one of the last in each family, whether it arrives or not, until what this returns is dropped.
pub(crate) fn chatter(cluster: &Cluster) -> Result<Vec<Chatter>, LabError> {
    let Some(other) = cluster.other() else {
        return Ok(Vec::new());
    };
    let (pod, peer) = (&cluster.first().pods()[0], &other.pods()[0]);
    let families = cluster.lab().spec().families();
    families.map(|family| Chatter::start(pod.netns(), at(peer.ip_in(family)?, PORT), said(family))).collect()
}
