//! Encryption required: what the engine does so that nothing leaves in plain text, whatever the backend. On the fake kernel in
//! paused time, with a backend that only says that it encrypts; what is seen on a wire is shown with WireGuard.

use std::net::IpAddr;

use podnet::backend::{
    AdmittedPeer, Backend, BackendError, Capabilities, Device, NodeView, OfferContext, Underlay, Unreachable,
};
use podnet::lease::{BackendData, BackendKind, Endpoint};
use podnet::masquerade::MasqueradePolicy;
use podnet::plan::{NextHop, Object};
use podnet::status::{ConditionKind, PeerState, Status};
use podnet::subnet::SubnetError;
use podnet::subnet::memory::{Call, MemorySubnets};
use podnet::testkit::kernel::{FakeKernel, KernelRoute};
use podnet::types::{DeviceName, Family, Mtu};
use podnet::{Error, Node, NodeBuilder, Shutdown};
use podnet_tests::{Running, claim, eventually, host, name, peer, spawn, start, store};
use podnet_vxlan::Vxlan;

const BLACKHOLE: &str = "route blackhole 10.42.0.0/16 proto 112 metric 1885601792";

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

/// VXLAN with the VNI 7 under another name, which says that it encrypts.
#[derive(Debug)]
struct Sealed(Vxlan);

impl Sealed {
    fn new() -> Self {
        Sealed(Vxlan::new().vni(7).unwrap())
    }
}

impl Backend for Sealed {
    fn kind(&self) -> BackendKind {
        BackendKind::of("sealed")
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities { encrypts: true, ..self.0.capabilities() }
    }
    fn devices(&self, family: Family) -> Vec<Device> {
        self.0.devices(family)
    }
    fn mtu(&self, underlay: &Underlay, family: Family) -> Result<Mtu, BackendError> {
        self.0.mtu(underlay, family)
    }
    fn offer(&self, cx: &OfferContext<'_>) -> Result<BackendData, BackendError> {
        self.0.offer(cx)
    }
    fn claims(&self, endpoint: &Endpoint<IpAddr>) -> Result<Vec<String>, String> {
        self.0.claims(endpoint)
    }
    fn node(&self, view: &NodeView, family: Family) -> Result<Vec<Object>, BackendError> {
        self.0.node(view, family)
    }
    fn peer(&self, view: &NodeView, peer: &AdmittedPeer) -> Result<Vec<Object>, Unreachable> {
        self.0.peer(view, peer)
    }
}

fn sealed(kernel: &FakeKernel, subnets: &MemorySubnets) -> NodeBuilder {
    let [sysctl, netlink, firewall] = [kernel.sysctl(), kernel.netlink(), kernel.firewall()];
    let node = Node::builder("me", subnets.clone()).backend(Sealed::new()).require_encryption(true);
    node.driver(sysctl).driver(netlink).driver(firewall)
}

async fn running(kernel: &FakeKernel, subnets: &MemorySubnets) -> Running {
    let mut friend = peer(1);
    friend.offers[0].backend = BackendKind::of("sealed");
    friend.offers[0] = podnet::lease::Offer { backend: BackendKind::of("sealed"), ..sealed_offer(&friend) };
    subnets.faults().inject(friend);
    let running = spawn(sealed(kernel, subnets)).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    running
}

/// The offer of a peer with the VNI of [`Sealed`].
fn sealed_offer(lease: &podnet::lease::Lease) -> podnet::lease::Offer {
    let endpoint = lease.offers[0].endpoints.v4().unwrap();
    let data = BackendData::from_text(&endpoint.data.as_str().replace("\"VNI\":1", "\"VNI\":7")).unwrap();
    let endpoints = podnet::types::Stack::V4(Endpoint { public_ip: endpoint.public_ip, data });
    podnet::lease::Offer { backend: BackendKind::of("sealed"), endpoints }
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_does_not_encrypt_is_refused_when_encryption_is_required() {
    let problem = Node::builder("me", store()).backend(Vxlan::new()).require_encryption(true).build().unwrap_err();
    assert!(matches!(problem, Error::Build { .. }));
    assert!(problem.to_string().contains("the backend vxlan does not encrypt"), "{problem}");
}

#[tokio::test(start_paused = true)]
async fn invariant_10_a_blackhole_stands_behind_the_network_before_any_lease_is_known() {
    let (kernel, subnets) = (host(), store());
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    subnets.faults().fail_next(Call::Watch, 3, away.clone());
    subnets.faults().fail_next(Call::Acquire, 3, away);
    let running = spawn(sealed(&kernel, &subnets)).await;
    eventually("the guard stands", || kernel.dump().contains(BLACKHOLE)).await;
    let status = running.overlay.status().borrow().clone();
    assert!(!status.is_ready() && !kernel.dump().contains("flannel.7"), "nothing else does yet: {status}");
    running.until(Status::is_ready).await;
    assert!(kernel.dump().contains(BLACKHOLE) && kernel.dump().contains("flannel.7"));
}

#[tokio::test(start_paused = true)]
async fn invariant_10_what_another_backend_left_is_taken_away_at_once_without_waiting_for_leases() {
    // A node of VXLAN that is killed and started anew with encryption, while the store is away and gives no lease; and flannel's host-gw.
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    start(&kernel, &subnets).await.kill(&kernel).await;
    let via = NextHop::Gateway { device: dev("eth0"), address: "10.240.0.9".parse().unwrap(), onlink: false };
    kernel.ip_route_add(KernelRoute::boot("10.42.9.0/24".parse().unwrap(), via)).unwrap();
    assert!(kernel.dump().contains("route 10.42.1.0/24 via 10.42.1.0 dev flannel.1"));
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    subnets.faults().fail_next(Call::Acquire, usize::MAX, away);
    let running = spawn(sealed(&kernel, &subnets)).await;
    eventually("the old way is gone", || !kernel.dump().contains("flannel.1 ")).await;
    assert!(!kernel.dump().contains("10.42.1.0/24"), "{}", kernel.dump());
    eventually("so are flannel's routes over the underlay, once that is known", || {
        !kernel.dump().contains("10.42.9.0/24")
    })
    .await;
    let peers = running.overlay.status().borrow().condition(ConditionKind::Peers);
    assert!(kernel.dump().contains(BLACKHOLE) && peers.message.contains("503"), "{peers:?}");
}

#[tokio::test(start_paused = true)]
async fn invariant_10_whatever_is_deleted_behind_our_back_the_blackhole_stands_and_comes_back() {
    let (kernel, subnets) = (host(), store());
    let _running = running(&kernel, &subnets).await;
    let whole = kernel.dump();
    assert!(whole.contains(BLACKHOLE), "{whole}");
    kernel.link_del(&dev("flannel.7")).unwrap();
    assert!(kernel.dump().contains(BLACKHOLE), "while the device is away");
    eventually("all is back", || kernel.dump() == whole).await;
    kernel.ip_route_del("10.42.0.0/16".parse().unwrap(), None).unwrap();
    eventually("the blackhole too", || kernel.dump() == whole).await;
}

#[tokio::test(start_paused = true)]
async fn invariant_10_a_rule_drops_what_leaves_by_another_device_whatever_the_policy_and_goes_with_the_state() {
    const DROP: &str = "ip daddr 10.42.0.0/16 drop";
    let (kernel, subnets) = (host(), store());
    let running = running(&kernel, &subnets).await;
    let rules = kernel.dump();
    assert!(rules.contains("oifname \"flannel.7\" return") && rules.contains(DROP), "{rules}");
    running.overlay.set_masquerade(MasqueradePolicy::off()).await.unwrap();
    assert!(kernel.dump().contains(DROP), "no policy takes it away: {}", kernel.dump());
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean() && !kernel.dump().contains("drop"), "{report:?}");
    let kernel = host();
    let _plain = start(&kernel, &store()).await;
    assert!(kernel.dump().contains("masquerade") && !kernel.dump().contains("drop"), "only where it is required");
}

#[tokio::test(start_paused = true)]
async fn invariant_10_the_rule_stands_as_soon_as_the_lease_is_held_while_no_other_lease_is_known() {
    let (kernel, subnets) = (host(), store());
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    subnets.faults().fail_next(Call::Watch, usize::MAX, away);
    let running = spawn(sealed(&kernel, &subnets)).await;
    eventually("the rule", || kernel.dump().contains("ip daddr 10.42.0.0/16 drop")).await;
    assert!(kernel.dump().contains(BLACKHOLE) && !kernel.dump().contains("flannel.7 vxlan"), "{}", kernel.dump());
    assert!(!running.overlay.status().borrow().is_ready());
}

#[tokio::test(start_paused = true)]
async fn with_encryption_required_a_network_of_the_hosts_own_inside_the_cluster_network_is_left_alone() {
    let (kernel, subnets) = (host(), store());
    kernel.link_add(&dev("virbr0"), "bridge", 1500).unwrap();
    kernel.addr_add(&dev("virbr0"), "10.42.77.1/24".parse().unwrap()).unwrap();
    kernel.link_up(&dev("virbr0")).unwrap();
    let _running = running(&kernel, &subnets).await;
    let rules = kernel.dump();
    let own = rules.find("ip daddr 10.42.77.0/24 return").expect("what goes there passes");
    assert!(own < rules.find("ip daddr 10.42.0.0/16 drop").unwrap(), "{rules}");
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_offers_no_encryption_is_unreachable_and_named() {
    let (kernel, subnets) = (host(), store());
    let running = running(&kernel, &subnets).await;
    subnets.faults().inject(claim("plain", 5, "10.42.5.0/24", "10.240.0.5", "02:00:00:00:00:05"));
    let status = running.until(|s| s.peers.unreachable == 1).await;
    let state = &status.troubled[0].families[0].state;
    assert_eq!(status.troubled[0].node, name("plain"));
    assert!(matches!(state, PeerState::Unreachable { reason } if reason.contains("encryption is required")), "{state}");
    assert!(!kernel.dump().contains("10.42.5.0/24"));
}

#[tokio::test(start_paused = true)]
async fn the_blackhole_outlives_a_stop_and_goes_with_all_else_when_the_state_is_removed() {
    let (kernel, subnets) = (host(), store());
    let first = running(&kernel, &subnets).await;
    first.overlay.shutdown(Shutdown::Keep).await.unwrap();
    assert!(kernel.dump().contains(BLACKHOLE));
    kernel.restart();
    kernel.take_writes();
    let second = running(&kernel, &subnets).await;
    assert_eq!(kernel.take_writes().len(), 0, "a restart writes nothing");
    let report = second.overlay.shutdown(Shutdown::Leave).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert!(!kernel.dump().contains("proto 112"), "{}", kernel.dump());
}

#[tokio::test(start_paused = true)]
async fn invariant_10_a_route_around_the_network_by_no_one_device_takes_no_blackhole_away() {
    // As the netlink driver tells a blackhole of somebody else's, and a route with several ways: of no device, and without a gateway.
    let (kernel, subnets) = (host(), store());
    kernel.ip_route_add(KernelRoute::boot("10.0.0.0/8".parse().unwrap(), NextHop::Blackhole)).unwrap();
    let running = running(&kernel, &subnets).await;
    assert!(kernel.dump().contains(BLACKHOLE), "{}", kernel.dump());
    assert!(running.overlay.status().borrow().conflicts.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_cluster_network_that_the_host_uses_itself_gets_no_blackhole() {
    let (kernel, subnets) = (host(), store());
    kernel.link_add(&dev("lan0"), "", 1500).unwrap();
    kernel.link_up(&dev("lan0")).unwrap();
    kernel.addr_add(&dev("lan0"), "10.42.0.9/15".parse().unwrap()).unwrap();
    let via = NextHop::Gateway { device: dev("eth0"), address: "10.240.0.9".parse().unwrap(), onlink: false };
    kernel.ip_route_add(KernelRoute::boot("10.42.7.0/24".parse().unwrap(), via)).unwrap();
    let running = spawn(sealed(&kernel, &subnets)).await;
    running.until(|s| !s.conflicts.is_empty()).await;
    assert!(!kernel.dump().contains("blackhole"), "{}", kernel.dump());
    assert!(
        kernel.dump().contains("route 10.42.7.0/24 via 10.240.0.9"),
        "a family that is left alone: {}",
        kernel.dump()
    );
}
