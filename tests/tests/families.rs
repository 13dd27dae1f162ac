//! Two families as equals: each works, fails, is published and comes back by itself. On the fake kernel, in paused time; the
//! kernel's own part is in `tests/kernel_families.rs`.

use std::time::Duration;

use podnet::config::NetworkConfig;
use podnet::driver::Errno;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::plan::{Key, NextHop, SysctlName};
use podnet::status::{ConditionState, PeerState, Status};
use podnet::subnet::memory::MemorySubnets;
use podnet::testkit::kernel::{FakeKernel, KernelRoute};
use podnet::types::{DeviceName, Family, Stack};
use podnet_tests::{Running, builder, eventually, host, name, spawn};

const UNDERLAY_V6: &str = "2001:db8:240::103/64";

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn networks() -> NetworkConfig {
    NetworkConfig::new(Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap())).unwrap()
}

/// A store of two families in which node `me` has the second subnets.
fn store() -> MemorySubnets {
    let subnets = MemorySubnets::assigned(networks());
    subnets.assign(&name("me"), Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap()));
    subnets
}

/// The host of the other tests with an IPv6 address.
fn dual_host() -> FakeKernel {
    let kernel = host();
    kernel.addr_add(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    kernel
}

/// A peer of two families.
fn peer(number: u8) -> Lease {
    let data = |half: u8| {
        BackendData::from_text(&format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{half:02x}:{number:02x}"}}"#)).unwrap()
    };
    Lease {
        node: name(&format!("node-{number}")),
        subnets: Stack::Dual(
            format!("10.42.{number}.0/24").parse().unwrap(),
            format!("2001:db8:42:{number:x}::/64").parse().unwrap(),
        ),
        offers: vec![Offer {
            backend: BackendKind::of("vxlan"),
            endpoints: Stack::Dual(
                Endpoint { public_ip: [10, 240, 0, number].into(), data: data(4) },
                Endpoint { public_ip: format!("2001:db8:240::{number:x}").parse().unwrap(), data: data(6) },
            ),
        }],
        precedence: Precedence { since: 1_000_000 + u64::from(number), identity: number.to_string() },
    }
}

async fn cluster() -> (FakeKernel, MemorySubnets, Running) {
    let (kernel, subnets) = (dual_host(), store());
    [1, 3].into_iter().for_each(|number| subnets.faults().inject(peer(number)));
    let running = spawn(builder(&kernel, subnets.clone())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 2).await;
    kernel.take_writes();
    (kernel, subnets, running)
}

/// What of a dump belongs to one family; links and what has no address in it belong to neither.
fn of_family(kernel: &FakeKernel, family: Family) -> Vec<String> {
    let v6 = family == Family::V6;
    let mark = |line: &str| if v6 { line.contains("2001:db8") || line.contains("v6") } else { line.contains("10.42.") };
    kernel.dump().lines().filter(|line| mark(line) && line.contains("flannel")).map(str::to_owned).collect()
}

fn published(subnets: &MemorySubnets) -> Option<Lease> {
    subnets.leases().into_iter().find(|lease| lease.node == name("me"))
}

fn families_published(subnets: &MemorySubnets) -> Vec<Family> {
    published(subnets).map(|l| l.offers.iter().flat_map(|o| o.endpoints.families()).collect()).unwrap_or_default()
}

fn family(status: &Status, family: Family) -> (ConditionState, String) {
    let found = status.families.iter().find(|f| f.family == family).expect("the lease has the family");
    (found.state, found.message.clone())
}

#[tokio::test(start_paused = true)]
async fn a_node_of_two_families_has_flannels_two_devices_and_pods_get_the_lesser_mtu() {
    let (kernel, subnets, running) = cluster().await;
    let dump = kernel.dump();
    for line in [
        "link flannel.1 ",
        "mtu 1450",
        "link flannel-v6.1 ",
        "local 2001:db8:240::103",
        "mtu 1430",
        "address 2001:db8:42:2::/128 dev flannel-v6.1",
        "route 2001:db8:42:1::/64 via 2001:db8:42:1:: dev flannel-v6.1 onlink",
        "sysctl net/ipv6/conf/flannel.1/accept_ra = 0",
        "sysctl net/ipv6/conf/flannel-v6.1/accept_ra = 0",
        "sysctl net/ipv6/conf/all/forwarding = 1",
        "ip6 saddr 2001:db8:42::/56 ip6 daddr != ff00::/8 masquerade",
    ] {
        assert!(dump.contains(line), "{line} is missing from\n{dump}");
    }
    let status = running.overlay.status().borrow().clone();
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1430);
    let endpoints = published(&subnets).unwrap().offers.remove(0).endpoints;
    let mac = |data: &BackendData| data.as_str().to_owned();
    assert_ne!(mac(&endpoints.v4().unwrap().data), mac(&endpoints.v6().unwrap().data), "each device has its own MAC");
    assert_eq!(family(&status, Family::V6), (ConditionState::Met, "2001:db8:42:2::/64 at 2001:db8:240::103".into()));
}

#[tokio::test(start_paused = true)]
async fn a_cluster_of_ipv6_alone_has_nothing_of_ipv4() {
    let kernel = FakeKernel::node(UNDERLAY_V6.parse().unwrap());
    let gateway = NextHop::Gateway { device: dev("eth0"), address: "2001:db8:240::1".parse().unwrap(), onlink: false };
    kernel.ip_route_add(KernelRoute::boot("::/0".parse().unwrap(), gateway)).unwrap();
    let network = NetworkConfig::new(Stack::V6("2001:db8:42::/56".parse().unwrap())).unwrap();
    let subnets = MemorySubnets::assigned(network);
    subnets.assign(&name("me"), Stack::V6("2001:db8:42:2::/64".parse().unwrap()));
    let Lease { subnets: Stack::Dual(_, v6), offers, .. } = peer(1) else { panic!("of two families") };
    let endpoints = Stack::V6(offers[0].endpoints.v6().unwrap().clone());
    let offers = vec![Offer { endpoints, ..offers[0].clone() }];
    subnets.faults().inject(Lease { subnets: Stack::V6(v6), offers, ..peer(1) });
    let running = spawn(builder(&kernel, subnets.clone())).await;
    let status = running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1430);
    assert!(!status.is_ready_in(Family::V4));
    assert_eq!(families_published(&subnets), [Family::V6]);
    let dump = kernel.dump();
    assert!(dump.contains("route 2001:db8:42:1::/64 via 2001:db8:42:1:: dev flannel-v6.1"), "{dump}");
    assert!(!dump.contains("flannel.1") && !dump.contains("table ip ") && dump.contains("ip_forward = 0"), "{dump}");
}

#[tokio::test(start_paused = true)]
async fn invariant_09_a_peer_that_is_broken_in_one_family_works_in_the_other() {
    let (kernel, subnets, running) = cluster().await;
    // One is refused in IPv6, one fails in the kernel in IPv4, one has said nothing of IPv6.
    let Stack::Dual(v4, _) = peer(7).subnets else { panic!("of two families") };
    subnets.faults().inject(Lease { subnets: Stack::Dual(v4, "2001:db8:42:2::/64".parse().unwrap()), ..peer(7) });
    let bad = Key::Route("10.42.8.0/24".parse().unwrap(), 0);
    kernel.faults().fail_keys(move |key| *key == bad, Errno::INVAL, None);
    subnets.faults().inject(peer(8));
    let mut silent = peer(9);
    silent.offers[0].endpoints = Stack::V4(silent.offers[0].endpoints.v4().unwrap().clone());
    subnets.faults().inject(silent);
    let status = running.until(|s| s.peers.total == 5 && s.troubled.len() == 3).await;
    assert!(status.is_ready(), "the trouble of peers is not this node's: {status}");
    let dump = kernel.dump();
    for works in ["route 10.42.7.0/24", "route 2001:db8:42:8::/64", "route 10.42.9.0/24"] {
        assert!(dump.contains(works), "{works} is missing from\n{dump}");
    }
    for broken in ["route 2001:db8:42:7::/64", "route 10.42.8.0/24", "route 2001:db8:42:9::/64"] {
        assert!(!dump.contains(broken), "{broken} should not be in\n{dump}");
    }
    let state = |node: &str, family: Family| {
        let peer = status.troubled.iter().find(|p| p.node == name(node)).unwrap();
        peer.families.iter().find(|f| f.family == family).unwrap().state.clone()
    };
    assert!(matches!(state("node-7", Family::V6), PeerState::Refused(_)), "{status}");
    assert!(matches!(state("node-7", Family::V4), PeerState::Connected { .. }), "{status}");
    assert!(matches!(state("node-8", Family::V4), PeerState::Failing { .. }), "{status}");
    assert!(matches!(state("node-8", Family::V6), PeerState::Connected { .. }), "{status}");
    assert!(!matches!(state("node-9", Family::V6), PeerState::Connected { .. }), "{status}");
}

#[tokio::test(start_paused = true)]
async fn invariant_09_a_family_that_fails_on_this_node_leaves_the_other_published_and_comes_by_itself() {
    for (broken, works, device) in [(Family::V6, Family::V4, "flannel-v6.1"), (Family::V4, Family::V6, "flannel.1")] {
        let (kernel, subnets) = (dual_host(), store());
        subnets.faults().inject(peer(1));
        kernel.link_add(&dev(device), "bridge", 1500).unwrap();
        let running = spawn(builder(&kernel, subnets.clone())).await;
        let status = running.until(|s| s.is_ready_in(works)).await;
        eventually("one family is published", || families_published(&subnets) == [works]).await;
        assert!(!status.is_ready() && !status.is_ready_in(broken), "{status}");
        assert_eq!(family(&status, broken).0, ConditionState::Failed, "{status}");
        assert!(family(&status, broken).1.contains(device), "{status}");
        kernel.link_del(&dev(device)).unwrap();
        running.until(Status::is_ready).await;
        eventually("both are", || families_published(&subnets) == Family::BOTH).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_family_whose_address_is_away_is_kept_as_it_was_and_goes_on_with_its_peers() {
    let (kernel, subnets, running) = cluster().await;
    let before = of_family(&kernel, Family::V6);
    kernel.addr_del(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    let status = running.until(|s| !s.is_ready()).await;
    assert!(status.is_ready_in(Family::V4), "{status}");
    assert!(family(&status, Family::V6).1.contains("kept as it was with 2001:db8:240::103"), "{status}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(of_family(&kernel, Family::V6), before);
    assert_eq!(families_published(&subnets), Family::BOTH, "peers still know the address");
    subnets.faults().revoke(&name("node-1"));
    eventually("a peer that goes is taken away", || !kernel.dump().contains("2001:db8:42:1::")).await;
    kernel.addr_add(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn another_address_of_one_family_is_published_and_the_other_is_not_touched() {
    let (kernel, subnets, running) = cluster().await;
    let before = of_family(&kernel, Family::V4);
    kernel.addr_add(&dev("eth0"), "2001:db8:240::99/64".parse().unwrap()).unwrap();
    kernel.addr_del(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    let now = || published(&subnets).and_then(|l| l.offers[0].endpoints.v6().map(|e| e.public_ip.to_string()));
    eventually("the new address is published", || now().as_deref() == Some("2001:db8:240::99")).await;
    assert!(kernel.dump().contains("local 2001:db8:240::99"), "{}", kernel.dump());
    assert_eq!(of_family(&kernel, Family::V4), before);
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_restart_while_one_family_has_no_address_deletes_nothing_of_it() {
    let (kernel, subnets, running) = cluster().await;
    let before = of_family(&kernel, Family::V6);
    running.kill(&kernel).await;
    kernel.addr_del(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    let running = spawn(builder(&kernel, subnets.clone())).await;
    running.until(|s| s.is_ready_in(Family::V4)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(of_family(&kernel, Family::V6), before);
    kernel.addr_add(&dev("eth0"), UNDERLAY_V6.parse().unwrap()).unwrap();
    running.until(Status::is_ready).await;
    assert_eq!(of_family(&kernel, Family::V6), before);
}

#[tokio::test(start_paused = true)]
async fn an_underlay_too_narrow_for_ipv6_keeps_ipv4_and_says_so() {
    let (kernel, subnets) = (dual_host(), store());
    subnets.faults().inject(peer(1));
    kernel.link_set_mtu(&dev("eth0"), 1300).unwrap();
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.is_ready_in(Family::V4)).await;
    assert!(family(&status, Family::V6).1.contains("1280"), "{status}");
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1250);
    kernel.link_set_mtu(&dev("eth0"), 1500).unwrap();
    let status = running.until(Status::is_ready).await;
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1430);
}

#[tokio::test(start_paused = true)]
async fn an_own_subnet_that_no_peer_can_accept_costs_its_family_alone() {
    let (kernel, subnets) = (dual_host(), store());
    subnets.faults().inject(peer(1));
    subnets.assign(&name("me"), Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:77::/64".parse().unwrap()));
    let running = spawn(builder(&kernel, subnets.clone())).await;
    let status = running.until(|s| s.is_ready_in(Family::V4)).await;
    assert!(family(&status, Family::V6).1.contains("outside the cluster network"), "{status}");
    assert!(!kernel.dump().contains("flannel-v6.1"));
    subnets.assign(&name("me"), Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap()));
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn the_underlay_goes_on_listening_to_routers_when_forwarding_is_switched_on() {
    let (kernel, subnets) = (dual_host(), store());
    let accept_ra = SysctlName::accept_ra(&dev("eth0"));
    assert_eq!(kernel.sysctl_value(&accept_ra).as_deref(), Some("1"));
    let running = spawn(builder(&kernel, subnets)).await;
    running.until(Status::is_ready).await;
    let writes: Vec<String> = kernel.writes().iter().map(ToString::to_string).filter(|w| w.contains("ipv6")).collect();
    assert_eq!(
        writes[..2],
        ["sysctl net/ipv6/conf/eth0/accept_ra = 2", "sysctl net/ipv6/conf/all/forwarding = 1"],
        "in this order: the kernel forgets what routers announced at the second"
    );
    // Who had forwarding on before, has settled what the underlay listens to.
    let (kernel, subnets) = (dual_host(), store());
    kernel.sysctl_set(&SysctlName::forwarding(Family::V6), "1").unwrap();
    let running = spawn(builder(&kernel, subnets)).await;
    running.until(Status::is_ready).await;
    assert_eq!(kernel.sysctl_value(&accept_ra).as_deref(), Some("1"));
}

#[tokio::test(start_paused = true)]
async fn advertisements_that_somebody_lets_in_on_our_device_are_shut_out_again() {
    let (kernel, _subnets, _running) = cluster().await;
    let name = SysctlName::accept_ra(&dev("flannel-v6.1"));
    kernel.sysctl_set(&name, "2").unwrap();
    // Nobody tells of this one: the full check finds it.
    eventually("it is 0 again", || kernel.sysctl_value(&name).as_deref() == Some("0")).await;
}

#[tokio::test(start_paused = true)]
async fn removing_the_state_takes_both_families_away_and_a_restart_writes_nothing() {
    let before = dual_host().foreign_dump();
    let (kernel, subnets, running) = cluster().await;
    running.kill(&kernel).await;
    let running = spawn(builder(&kernel, subnets)).await;
    running.until(Status::is_ready).await;
    assert_eq!(kernel.take_writes().len(), 0);
    let report = running.overlay.shutdown(podnet::Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    let without_settings = |dump: String| -> Vec<String> {
        dump.lines()
            .filter(|line| !line.contains("forward") && !line.contains("accept_ra"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(without_settings(kernel.dump()), without_settings(before));
}
