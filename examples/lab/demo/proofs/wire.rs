//! What the underlay carries of a packet between pods: VXLAN or UDP from node to node, or the packet as the pod sent it. That nobody can read it is
//! shown in [`super::sealed`].
//!
//! Seen on the wire, outside of either node; podnet is not asked.

use std::time::Duration;

use podnet::types::Family;
use serde_json::json;

use super::{reaches, sealed};
use crate::cluster::UNDERLAY_INTERFACE;
use crate::demo::backend::{udp_overhead, vxlan_overhead};
use crate::demo::node_state::mac;
use crate::demo::{Cluster, Crossing, DemoError, Seen};
use crate::probe::{Capture, Frame};
use crate::{LabError, Node};

const VNI: u32 = 1;
const PORT: u16 = 8472;
/// Of the custom backend, as of flannel's `udp`.
const UDP_PORT: u16 = 8285;
const SOON: Duration = Duration::from_secs(5);

/// What is to be seen.
pub(super) fn claim(cluster: &Cluster) -> &'static str {
    match cluster.crossing() {
        Crossing::Vxlan => "on the wire it is VXLAN",
        Crossing::Udp => "on the wire it is UDP",
        Crossing::Sealed => "on the wire it cannot be read",
        Crossing::Plain => "on the wire it is as sent",
        Crossing::Nowhere => "on the wire",
    }
}

pub(super) async fn crossing(cluster: &Cluster, family: Family) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return cluster.cannot();
    };
    if cluster.crossing() == Crossing::Sealed {
        return sealed::unreadable(cluster, family).await;
    }
    let node = cluster.first();
    let (pod, peer) = (&node.pods()[0], &other.pods()[0]);
    let way = Way { node, other, from: pod.ip_in(family)?, to: peer.ip_in(family)?, family };
    let capture = Capture::start(cluster.lab().fabric(), &cluster.lab().fabric_port(node.index())).await?;
    let answered = reaches(pod.netns(), way.to).await?;
    let seen = match cluster.crossing() {
        Crossing::Vxlan => way.in_vxlan(cluster, &capture).await?,
        Crossing::Udp => way.in_udp(&capture).await?,
        Crossing::Plain => way.plain(&capture).await?,
        Crossing::Sealed | Crossing::Nowhere => return cluster.cannot(),
    };
    Ok(if answered { seen } else { Seen::new(false, format!("{} does not answer", way.to)) })
}

/// From which pod to which.
struct Way<'a> {
    node: &'a Node,
    other: &'a Node,
    from: std::net::IpAddr,
    to: std::net::IpAddr,
    family: Family,
}

impl Way<'_> {
    async fn in_vxlan(&self, cluster: &Cluster, capture: &Capture) -> Result<Seen, DemoError> {
        let is_ours = |frame: &Frame| {
            let inner = frame.vxlan.and_then(|vxlan| vxlan.ip);
            inner.is_some_and(|inner| (inner.source, inner.destination) == (self.from, self.to))
        };
        let frame = capture.wait_for(SOON, is_ours).await?;
        let (Some(outer), Some(udp), Some(vxlan)) = (frame.ip, frame.udp, frame.vxlan) else {
            return Ok(Seen::new(false, "a packet between pods without an outer IP header"));
        };
        let inner_length = vxlan.ip.map_or(0, |inner| inner.total_length);
        let more = outer.total_length.saturating_sub(inner_length);
        // Pods' packets must not be seen on the underlay as they are.
        let bare = capture.report().frames.iter().filter(|frame| frame.is_between(self.from, self.to)).count();

        let own_mac = device_mac(cluster, self.node, self.family).await?;
        let peer_mac = device_mac(cluster, self.other, self.family).await?;
        let holds = (outer.source, outer.destination)
            == (self.node.ip_in(self.family)?, self.other.ip_in(self.family)?)
            && (udp.destination, vxlan.vni) == (PORT, VNI)
            && own_mac == Some(vxlan.source_mac)
            && peer_mac == Some(vxlan.destination_mac)
            && u32::from(more) == vxlan_overhead(self.family)
            && outer.extension_headers == 0
            && bare == 0;
        let text = format!(
            "{} > {} udp {}, VNI {}; {inner_length} bytes inside, {more} more outside",
            outer.source, outer.destination, udp.destination, vxlan.vni
        );
        let macs = (mac(vxlan.source_mac), mac(vxlan.destination_mac));
        let details = [format!("inside: {} > {}, MAC {} > {}", self.from, self.to, macs.0, macs.1)];
        let figures = json!({ "outer_source": outer.source, "outer_destination": outer.destination, "port": udp.destination,
                              "vni": vxlan.vni, "inner_source_mac": macs.0, "inner_destination_mac": macs.1,
                              "overhead_bytes": more, "bare_packets": bare });
        Ok(Seen::new(holds, text).details(details).figures(figures))
    }

    async fn in_udp(&self, capture: &Capture) -> Result<Seen, DemoError> {
        let is_ours = |frame: &Frame| {
            let inner = frame.in_udp;
            inner.is_some_and(|inner| (inner.source, inner.destination) == (self.from, self.to))
        };
        let frame = capture.wait_for(SOON, is_ours).await?;
        let (Some(outer), Some(udp), Some(inner)) = (frame.ip, frame.udp, frame.in_udp) else {
            return Ok(Seen::new(false, "a packet between pods without an outer IP header"));
        };
        let more = outer.total_length.saturating_sub(inner.total_length);
        let bare = capture.report().frames.iter().filter(|frame| frame.is_between(self.from, self.to)).count();
        let holds = (outer.source, outer.destination)
            == (self.node.ip_in(self.family)?, self.other.ip_in(self.family)?)
            && udp.destination == UDP_PORT
            && u32::from(more) == udp_overhead(self.family)
            && outer.extension_headers == 0
            && bare == 0;
        let text = format!(
            "{} > {} udp {}; {} bytes inside, {more} more outside",
            outer.source, outer.destination, udp.destination, inner.total_length
        );
        let details = [format!("inside: {} > {}", self.from, self.to)];
        let figures = json!({ "outer_source": outer.source, "outer_destination": outer.destination,
                              "port": udp.destination, "overhead_bytes": more, "bare_packets": bare });
        Ok(Seen::new(holds, text).details(details).figures(figures))
    }

    async fn plain(&self, capture: &Capture) -> Result<Seen, DemoError> {
        let frame = capture.wait_for(SOON, |frame| frame.is_between(self.from, self.to)).await?;
        let Some(ip) = frame.ip else {
            return Ok(Seen::new(false, "a packet between pods without an IP header"));
        };
        let own_mac = self.node.host().link(UNDERLAY_INTERFACE).await?.mac;
        let peer_mac = self.other.host().link(UNDERLAY_INTERFACE).await?.mac;
        let wrapped = capture.report().vxlan().count();
        let holds = own_mac == Some(frame.source_mac) && peer_mac == Some(frame.destination_mac) && wrapped == 0;
        let text = format!("{} > {}, {} bytes, nothing around it", ip.source, ip.destination, ip.total_length);
        let macs = (mac(frame.source_mac), mac(frame.destination_mac));
        let details = [format!("from node to node: MAC {} > {}", macs.0, macs.1)];
        let figures = json!({ "source": ip.source, "destination": ip.destination, "length": ip.total_length,
                              "source_mac": macs.0, "destination_mac": macs.1, "vxlan_packets": wrapped });
        Ok(Seen::new(holds, text).details(details).figures(figures))
    }
}

async fn device_mac(cluster: &Cluster, node: &Node, family: Family) -> Result<Option<[u8; 6]>, LabError> {
    match cluster.device(node, family) {
        Some(device) => Ok(node.host().link(device).await?.mac),
        None => Ok(None),
    }
}
