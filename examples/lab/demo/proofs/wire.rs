//! What the underlay carries: VXLAN from node to node, with the MACs of the two overlay devices inside.

use std::time::Duration;

use serde_json::json;

use super::{needs_two_nodes, reaches};
use crate::demo::node_state::mac;
use crate::demo::{Cluster, DemoError, OVERLAY_DEVICE, Seen};
use crate::probe::{Capture, Frame};

const VNI: u32 = 1;
const PORT: u16 = 8472;
/// Ethernet 14, VXLAN 8, UDP 8, IPv4 20.
const OVERHEAD: u16 = 50;

pub(super) async fn is_vxlan(cluster: &Cluster) -> Result<Seen, DemoError> {
    let Some(other) = cluster.other() else {
        return needs_two_nodes();
    };
    let node = cluster.first();
    let (pod, peer) = (&node.pods()[0], &other.pods()[0]);
    let inner_addresses = (pod.address(), peer.address());
    let capture = Capture::start(cluster.lab().fabric(), &cluster.lab().fabric_port(node.index())).await?;
    let answered = reaches(pod.netns(), peer.address()).await?;
    let is_ours = |frame: &Frame| {
        let inner = frame.vxlan.and_then(|vxlan| vxlan.ipv4);
        inner.is_some_and(|inner| (inner.source, inner.destination) == inner_addresses)
    };
    let frame = capture.wait_for(Duration::from_secs(5), is_ours).await?;
    let (Some(outer), Some(udp), Some(vxlan)) = (frame.ipv4, frame.udp, frame.vxlan) else {
        return Ok(Seen::new(false, "a packet between pods without an outer IPv4 header"));
    };
    let inner_length = vxlan.ipv4.map_or(0, |inner| inner.total_length);
    let more = outer.total_length.saturating_sub(inner_length);
    // Pods' packets must not be seen on the underlay as they are.
    let is_bare =
        |frame: &&Frame| frame.ipv4.is_some_and(|header| (header.source, header.destination) == inner_addresses);
    let bare = capture.report().frames.iter().filter(is_bare).count();

    let own_mac = node.host().link(OVERLAY_DEVICE).await?.mac;
    let peer_mac = other.host().link(OVERLAY_DEVICE).await?.mac;
    let holds = answered
        && (outer.source, outer.destination) == (node.address(), other.address())
        && (udp.destination, vxlan.vni) == (PORT, VNI)
        && own_mac == Some(vxlan.source_mac)
        && peer_mac == Some(vxlan.destination_mac)
        && more == OVERHEAD
        && bare == 0;
    let text = format!(
        "{} > {} udp {}, VNI {}; {inner_length} bytes inside, {more} more outside",
        outer.source, outer.destination, udp.destination, vxlan.vni
    );
    let details = [format!(
        "inside: {} > {}, MAC {} > {}",
        inner_addresses.0,
        inner_addresses.1,
        mac(vxlan.source_mac),
        mac(vxlan.destination_mac)
    )];
    let figures = json!({ "outer_source": outer.source, "outer_destination": outer.destination, "port": udp.destination,
                          "vni": vxlan.vni, "inner_source_mac": mac(vxlan.source_mac),
                          "inner_destination_mac": mac(vxlan.destination_mac), "overhead_bytes": more, "bare_packets": bare });
    Ok(Seen::new(holds, text).details(details).figures(figures))
}
