//! host-gw and direct routing through the whole engine, on the fake kernel in paused time: who is on the same layer 2 is
//! reached by a plain route, and what the underlay does is followed.

use std::time::Duration;

use podnet::NodeBuilder;
use podnet::backend::Backend;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::plan::NextHop;
use podnet::status::{PeerState, Status};
use podnet::subnet::memory::MemorySubnets;
use podnet::testkit::kernel::{FakeKernel, KernelRoute, PROTOCOL_OURS, PROTOCOL_STATIC};
use podnet::types::{DeviceName, Stack};
use podnet::{Node, Shutdown};
use podnet_host_gw::HostGw;
use podnet_tests::{Running, eventually, host, name, spawn, store};
use podnet_vxlan::Vxlan;

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn builder(kernel: &FakeKernel, subnets: &MemorySubnets, backend: impl Backend) -> NodeBuilder {
    let [sysctl, netlink, firewall] = [kernel.sysctl(), kernel.netlink(), kernel.firewall()];
    Node::builder("me", subnets.clone()).backend(backend).driver(sysctl).driver(netlink).driver(firewall)
}

/// A peer at this address, with the data that its backend publishes.
fn peer(kind: &'static str, number: u8, address: &str) -> Lease {
    let data = match kind {
        "host-gw" => "null".to_owned(),
        _ => format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{number:02x}"}}"#),
    };
    let endpoint = Endpoint { public_ip: address.parse().unwrap(), data: BackendData::from_text(&data).unwrap() };
    Lease {
        node: name(&format!("node-{number}")),
        subnets: Stack::V4(format!("10.42.{number}.0/24").parse().unwrap()),
        offers: vec![Offer { backend: BackendKind::of(kind), endpoints: Stack::V4(endpoint) }],
        precedence: Precedence { since: 1_000_000 + u64::from(number), identity: number.to_string() },
    }
}

const NEAR: &str = "10.240.0.101";
const FAR: &str = "10.99.0.104";

async fn host_gw() -> (FakeKernel, MemorySubnets, Running) {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer("host-gw", 1, NEAR));
    subnets.faults().inject(peer("host-gw", 4, FAR));
    let running = spawn(builder(&kernel, &subnets, HostGw::new())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    (kernel, subnets, running)
}

fn ours(kernel: &FakeKernel) -> Vec<String> {
    let mark = format!("proto {PROTOCOL_OURS}");
    kernel.dump().lines().filter(|line| line.contains(&mark)).map(str::to_owned).collect()
}

fn unreachable(status: &Status) -> Option<String> {
    status.troubled.iter().flat_map(|p| &p.families).find_map(|f| match &f.state {
        PeerState::Unreachable { reason } => Some(reason.clone()),
        _ => None,
    })
}

#[tokio::test(start_paused = true)]
async fn a_peer_on_the_link_has_one_route_and_one_behind_a_gateway_has_nothing_and_says_why() {
    let (kernel, subnets, running) = host_gw().await;
    assert_eq!(ours(&kernel), ["route 10.42.1.0/24 via 10.240.0.101 dev eth0 proto 112"]);
    let status = running.overlay.status().borrow().clone();
    assert_eq!((status.peers.connected, status.peers.unreachable), (1, 1), "{status}");
    let reason = unreachable(&status).unwrap();
    assert!(reason.starts_with("not on the same layer 2 (10.99.0.104: it is behind the gateway"), "{reason}");
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1500, "nothing is wrapped");
    let own = subnets.leases().into_iter().find(|l| l.node == name("me")).unwrap();
    assert_eq!(own.offers[0].endpoints.v4().unwrap().data.as_str(), "null", "as flannel writes it");
    assert!(!kernel.dump().contains("flannel"), "no device is made");
}

#[tokio::test(start_paused = true)]
async fn fault_10_routes_come_back_within_a_second_of_the_underlays_link() {
    let (kernel, _subnets, running) = host_gw().await;
    let whole = ours(&kernel);
    kernel.link_down(&dev("eth0")).unwrap();
    let status = running.until(|s| s.peers.connected == 0 && !s.is_ready()).await;
    assert!(status.to_string().contains("the underlay eth0 is down"), "{status}");
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(ours(&kernel).is_empty());
    kernel.link_up(&dev("eth0")).unwrap();
    let took = eventually("the routes are back", || ours(&kernel) == whole).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    // The default route is the host's to bring back; the underlay stays the one that it was.
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_moves_onto_the_link_or_off_it_is_followed() {
    let (kernel, subnets, running) = host_gw().await;
    subnets.faults().inject(peer("host-gw", 1, "10.99.0.101"));
    running.until(|s| s.peers.unreachable == 2).await;
    assert!(ours(&kernel).is_empty());
    subnets.faults().inject(peer("host-gw", 1, "10.240.0.111"));
    eventually("it is reached again", || ours(&kernel) == ["route 10.42.1.0/24 via 10.240.0.111 dev eth0 proto 112"])
        .await;
    // A more special route of the host's leads elsewhere.
    let next = NextHop::Gateway { device: dev("eth0"), address: "10.240.0.9".parse().unwrap(), onlink: false };
    let detour = KernelRoute::boot("10.240.0.111/32".parse().unwrap(), next).protocol(PROTOCOL_STATIC);
    kernel.ip_route_add(detour).unwrap();
    let status = running.until(|s| s.peers.unreachable == 2).await;
    assert!(status.to_string().contains("it is behind the gateway 10.240.0.9"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn fault_19_the_routes_of_flannels_host_gw_are_taken_over_where_wanted_and_deleted_where_not() {
    let (kernel, subnets) = (host(), store());
    let via = |subnet: &str, gateway: &str, device: &str| {
        let next = NextHop::Gateway { device: dev(device), address: gateway.parse().unwrap(), onlink: false };
        KernelRoute::boot(subnet.parse().unwrap(), next)
    };
    kernel.ip_route_add(via("10.42.1.0/24", NEAR, "eth0")).unwrap();
    kernel.ip_route_add(via("10.42.9.0/24", "10.240.0.109", "eth0")).unwrap();
    kernel.ip_route_add(via("10.42.77.0/24", "172.17.0.77", "docker0")).unwrap();
    kernel.ip_route_add(via("10.42.78.0/24", "10.240.0.78", "eth0").protocol(PROTOCOL_STATIC)).unwrap();
    subnets.faults().inject(peer("host-gw", 1, NEAR));
    let running = spawn(builder(&kernel, &subnets, HostGw::new())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    let dump = kernel.dump();
    assert!(dump.contains("route 10.42.1.0/24 via 10.240.0.101 dev eth0 proto 112"), "{dump}");
    assert!(!dump.contains("10.42.9.0/24"), "a peer that is gone: {dump}");
    assert!(dump.contains("10.42.77.0/24") && dump.contains("10.42.78.0/24"), "others' routes stay: {dump}");
    let replaced = kernel.writes().iter().any(|w| w.what.starts_with("ip route replace route 10.42.1.0/24"));
    assert!(replaced, "in place: {:?}", kernel.writes());
}

#[tokio::test(start_paused = true)]
async fn removing_the_state_takes_the_routes_and_leaves_the_underlay() {
    let (kernel, _subnets, running) = host_gw().await;
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(ours(&kernel).is_empty());
    assert!(kernel.dump().contains("address 10.240.0.103/16 dev eth0"));
}

#[tokio::test(start_paused = true)]
async fn a_public_address_that_is_not_the_underlays_own_does_not_go_with_host_gw() {
    let (kernel, subnets) = (host(), store());
    let given = Stack::V4("203.0.113.7".parse().unwrap());
    let running = spawn(builder(&kernel, &subnets, HostGw::new()).public_addresses(given)).await;
    let status = running.until(|s| s.to_string().contains("Underlay Failed")).await;
    assert!(status.to_string().contains("the public IPv4 address is not this node's own on eth0"), "{status}");
    // A tunnel is published under it and sends with its own.
    let running = spawn(builder(&kernel, &subnets, Vxlan::new()).public_addresses(given)).await;
    running.until(Status::is_ready).await;
    let own = subnets.leases().into_iter().find(|l| l.node == name("me")).unwrap();
    assert_eq!(own.offers[0].endpoints.v4().unwrap().public_ip, std::net::Ipv4Addr::new(203, 0, 113, 7));
    assert!(kernel.dump().contains("local 10.240.0.103"), "{}", kernel.dump());
}

#[tokio::test(start_paused = true)]
async fn with_direct_routing_a_peer_changes_between_route_and_tunnel_without_a_gap() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer("vxlan", 1, NEAR));
    subnets.faults().inject(peer("vxlan", 4, FAR));
    let running = spawn(builder(&kernel, &subnets, Vxlan::new().direct_routing(true))).await;
    running.until(|s| s.is_ready() && s.peers.connected == 2).await;
    let routes = |kernel: &FakeKernel| -> Vec<String> {
        ours(kernel).into_iter().filter(|line| line.starts_with("route")).collect()
    };
    let tunnel = "route 10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink proto 112";
    let direct = "route 10.42.1.0/24 via 10.240.0.101 dev eth0 proto 112";
    let far = "route 10.42.4.0/24 via 10.42.4.0 dev flannel.1 onlink proto 112";
    assert_eq!(routes(&kernel), [direct, far]);
    assert!(!kernel.dump().contains("02:00:00:00:00:01"), "nothing of the tunnel for it: {}", kernel.dump());

    kernel.take_writes();
    let next = NextHop::Gateway { device: dev("eth0"), address: "10.240.0.9".parse().unwrap(), onlink: false };
    kernel.ip_route_add(KernelRoute::boot("10.240.0.101/32".parse().unwrap(), next).protocol(PROTOCOL_STATIC)).unwrap();
    eventually("it goes through the tunnel", || routes(&kernel) == [tunnel, far]).await;
    let words = |kernel: &FakeKernel| -> Vec<String> {
        let writes = kernel.take_writes();
        writes.iter().map(|w| w.what.split(' ').take(3).collect::<Vec<_>>().join(" ")).collect()
    };
    assert_eq!(words(&kernel), ["ip neigh replace", "bridge fdb replace", "ip route replace"]);

    kernel.ip_route_del("10.240.0.101/32".parse().unwrap(), None).unwrap();
    eventually("it is reached directly", || routes(&kernel) == [direct, far]).await;
    assert_eq!(words(&kernel), ["ip route replace", "bridge fdb del", "ip neigh del"]);
    running.until(|s| s.is_ready() && s.peers.connected == 2).await;
}

#[tokio::test(start_paused = true)]
async fn fault_19_what_flannels_vxlan_left_gives_way_to_host_gw() {
    // A node that ran flannel's VXLAN: made by podnet, then stripped of its marks.
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer("vxlan", 1, NEAR));
    let running = spawn(builder(&kernel, &subnets, Vxlan::new())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    running.kill(&kernel).await;
    kernel.link_set_alias(&dev("flannel.1"), None).unwrap();
    let over = NextHop::Gateway { device: dev("flannel.1"), address: "10.42.1.0".parse().unwrap(), onlink: true };
    kernel.ip_route_replace(KernelRoute::boot("10.42.1.0/24".parse().unwrap(), over)).unwrap();

    subnets.faults().inject(peer("host-gw", 1, NEAR));
    let running = spawn(builder(&kernel, &subnets, HostGw::new())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    eventually("flannel's device is gone", || !kernel.dump().contains("flannel.1")).await;
    assert_eq!(ours(&kernel), ["route 10.42.1.0/24 via 10.240.0.101 dev eth0 proto 112"]);
}

#[tokio::test(start_paused = true)]
async fn invariant_05_a_device_that_is_in_the_way_keeps_no_peer_out_that_does_not_need_it() {
    let (kernel, subnets) = (host(), store());
    kernel.link_add(&dev("flannel.1"), "bridge", 1500).unwrap();
    subnets.faults().inject(peer("vxlan", 1, NEAR));
    subnets.faults().inject(peer("vxlan", 4, FAR));
    let running = spawn(builder(&kernel, &subnets, Vxlan::new().direct_routing(true))).await;
    let status = running.until(|s| !s.conflicts.is_empty()).await;
    assert!(!status.is_ready(), "{status}");
    eventually("the near one is reached", || {
        ours(&kernel) == ["route 10.42.1.0/24 via 10.240.0.101 dev eth0 proto 112"]
    })
    .await;
}
