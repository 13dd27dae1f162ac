//! What flannel makes on a node, made by hand: for tests that take it over.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::link::InfoVxlan;
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::{Host, Route};
use rtnetlink::LinkVxlan;

use super::DEVICE;

/// The device as flannel makes it, with what may be changed.
pub async fn flannels_device(host: &Host, mac: [u8; 6], local: [u8; 4], (vni, port): (u32, u16), mtu: u32) {
    let lower = host.link(UNDERLAY_INTERFACE).await.expect("the underlay").index;
    let device = LinkVxlan::new(DEVICE, vni)
        .dev(lower)
        .local(local.into())
        .port(port)
        .ttl(0)
        .tos(0)
        .learning(false)
        .proxy(false)
        .rsc(false)
        .l2miss(false)
        .l3miss(false)
        .append_info_data(InfoVxlan::UDPZeroCsumTX(false))
        .append_info_data(InfoVxlan::UDPZeroCsumRX(false))
        .address(mac.to_vec())
        .mtu(mtu)
        .txqueuelen(0)
        .build();
    host.handle().link().add(device).execute().await.expect("the device");
}

/// What flannel does for a peer.
pub async fn flannels_peer(host: &Host, subnet: IpNetwork, mac: [u8; 6], address: IpAddr) {
    host.add_neighbour(DEVICE, subnet.network(), mac).await.expect("a neighbour");
    host.add_fdb(DEVICE, mac, address).await.expect("a forwarding entry");
    host.replace_route(&Route::via(subnet, subnet.network(), DEVICE).onlink()).await.expect("a route");
}
