//! The lab judged by itself: each part shown to work, and to notice when something does not.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-examples`.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use rtnetlink::LinkVxlan;

use crate::cluster::{DOCKER_BRIDGE, UNDERLAY_INTERFACE, gateway, outside};
use crate::probe::dns::{KUBERNETES, kubernetes_service};
use crate::probe::{
    Capture, Chatter, Direction, DnsServer, EchoServer, PingOptions, PingStream, SteadyStream, Transport, dns_query,
    ping, ping_all, seen_as, tcp_throughput,
};
use crate::services::{self, Service, dns_service};
use crate::{Families, Family, Host, Lab, LabSpec, Netns, Node, Route, Stack, Underlay, firewall, wait_until};

const SOON: Duration = Duration::from_secs(5);
const VXLAN: &str = "flannel.1";
const V4: Families = Stack::V4(());
const V6: Families = Stack::V6(());
const DUAL: Families = Stack::Dual((), ());

/// MTU of the overlay's device: VXLAN takes 50 bytes over IPv4, 70 over IPv6.
fn device_mtu(spec: &LabSpec, family: Family) -> u32 {
    spec.mtu() - if family == Family::V4 { 50 } else { 70 }
}

async fn lab(spec: LabSpec) -> Lab {
    let mtu = spec.families().map(|family| device_mtu(&spec, family)).min().unwrap();
    let mut lab = Lab::build(spec).await.unwrap();
    lab.attach_pods(mtu).await.unwrap();
    lab
}

fn spec(nodes: usize, families: Families) -> LabSpec {
    LabSpec { nodes, networks: LabSpec::usual_networks(families), ..LabSpec::default() }
}

fn one_node() -> LabSpec {
    spec(1, V4)
}

fn vxlan(family: Family) -> &'static str {
    match family {
        Family::V4 => VXLAN,
        Family::V6 => "flannel-v6.1",
    }
}

/// Flannel's layout by hand, with the pod network's own addresses: what podnet is to do. No masquerade.
async fn connect_by_hand(lab: &Lab) {
    let mac = |index: usize| [0x02, 0x42, 0, 0, 0, index as u8];
    for family in lab.spec().families() {
        let (name, vtep) = (vxlan(family), |index| lab.spec().subnet(index, family).unwrap().network());
        for node in lab.nodes() {
            let host = node.host();
            let lower = host.link(UNDERLAY_INTERFACE).await.unwrap().index;
            let device = LinkVxlan::new(name, 1).dev(lower).port(8472).learning(false);
            let device = match node.ip_in(family).unwrap() {
                IpAddr::V4(local) => device.local(local),
                IpAddr::V6(local) => device.local6(local),
            };
            let device = device.address(mac(node.index()).to_vec()).mtu(device_mtu(lab.spec(), family)).build();
            host.handle().link().add(device).execute().await.unwrap();
            host.add_address(name, vtep(node.index()).into()).await.unwrap();
            host.set_up(name).await.unwrap();
            for peer in lab.nodes().iter().filter(|peer| peer.index() != node.index()) {
                let gateway = vtep(peer.index());
                host.add_neighbour(name, gateway, mac(peer.index())).await.unwrap();
                host.add_fdb(name, mac(peer.index()), peer.ip_in(family).unwrap()).await.unwrap();
                host.add_route(&by_hand(lab, peer.index(), family)).await.unwrap();
            }
        }
    }
}

/// The route to a node's pods.
fn by_hand(lab: &Lab, to: usize, family: Family) -> Route {
    let subnet = lab.spec().subnet(to, family).unwrap();
    Route::via(subnet, subnet.network(), vxlan(family)).onlink()
}

async fn answers(from: &Netns, to: impl Into<IpAddr>) -> bool {
    ping(from, to.into(), PingOptions::default()).await.unwrap().all_answered()
}

async fn is_silent(from: &Netns, to: impl Into<IpAddr>) -> bool {
    let options = PingOptions { timeout: Duration::from_millis(300), ..PingOptions::default() };
    ping(from, to.into(), options).await.unwrap().received == 0
}

#[tokio::test]
async fn a_new_namespace_has_lo_up_and_nothing_else() {
    let host = Host::new("empty").unwrap();
    let links = host.links().await.unwrap();
    let names: Vec<_> = links.iter().map(|link| (link.name.as_str(), link.up)).collect();
    // Some machines give every namespace tunnel devices (sit0, tunl0), which are down.
    assert!(names.contains(&("lo", true)), "{names:?}");
    assert!(names.iter().filter(|(_, up)| *up).count() == 1, "{names:?}");
    assert!(answers(host.netns(), Ipv4Addr::LOCALHOST).await);
}

#[test]
fn a_thread_that_uses_a_namespace_stays_in_its_own() {
    let this = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let before = this();
    let netns = Netns::new("elsewhere").unwrap();
    let there = netns.run(this).unwrap();
    assert_ne!(there, before);
    assert_eq!(this(), before);
    // And the path that other processes are given leads to it.
    assert_eq!(std::fs::read_link(netns.path()).unwrap(), there);
}

#[tokio::test]
async fn a_namespace_is_gone_with_its_last_handle() {
    let outer = Host::new("outer").unwrap();
    let inner = Host::new("inner").unwrap();
    crate::veth(crate::host::End::new(&outer, "wire"), crate::host::End::new(&inner, "wire"), 1500).await.unwrap();
    assert!(outer.has_link("wire").await.unwrap());
    drop(inner);
    // A veth end goes when the namespace of the other end goes, and those of the whole machine go in turn.
    wait_until("the wire is gone", SOON * 12, || async { Ok(!outer.has_link("wire").await?) }).await.unwrap();
}

#[tokio::test]
async fn a_task_spawned_in_a_namespace_opens_its_sockets_there() {
    let netns = Netns::new("task").unwrap();
    let here = netns.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    let task = netns
        .spawn(|| async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:5353").await.unwrap();
            (listener, std::fs::read_link("/proc/thread-self/ns/net").unwrap())
        })
        .unwrap();
    let (_listener, there) = task.join().await.unwrap();
    assert_eq!(here, there);
    netns.tcp_connect("127.0.0.1:5353".parse().unwrap()).await.unwrap();
}

#[tokio::test]
async fn a_cancelled_task_in_a_namespace_lets_go_of_it() {
    let netns = Netns::new("cancelled").unwrap();
    let (alive, gone) = tokio::sync::oneshot::channel::<()>();
    let task = netns.spawn(move || async move {
        let _alive = alive;
        std::future::pending::<()>().await;
    });
    drop(task);
    assert!(tokio::time::timeout(SOON, gone).await.unwrap().is_err());
}

#[tokio::test]
async fn pods_of_one_node_reach_each_other_and_no_pod_of_another_node() {
    let lab = lab(spec(2, DUAL)).await;
    for family in Family::BOTH {
        let ip = |node: usize, pod: usize| lab.nodes()[node].pods()[pod].ip_in(family).unwrap();
        let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
        assert!(answers(a.netns(), ip(0, 1)).await);
        assert!(answers(b.netns(), ip(0, 0)).await);
        assert!(is_silent(a.netns(), ip(1, 0)).await, "nothing connects the nodes' pods yet");
    }
}

async fn nodes_reach_each_other_and_outside(underlay: Underlay, families: Families) {
    let lab = Lab::build(LabSpec { underlay, ..spec(3, families) }).await.unwrap();
    let mut pairs = Vec::new();
    for (node, family) in lab.nodes().iter().flat_map(|node| families.families().map(move |family| (node, family))) {
        let others = lab.nodes().iter().filter(|other| other.index() != node.index());
        pairs.extend(others.map(|other| (node.netns().clone(), other.ip_in(family).unwrap())));
        pairs.push((node.netns().clone(), gateway(family)));
        pairs.push((node.netns().clone(), outside(family)));
        pairs.push((lab.outside().netns().clone(), node.ip_in(family).unwrap()));
    }
    // The first packet of each: nothing is still getting ready.
    for (report, (from, to)) in ping_all(pairs.clone(), PingOptions::default()).await.unwrap().iter().zip(pairs) {
        assert!(report.all_answered(), "{} to {to}: {report:?}", from.name());
    }
    // A packet of the underlay's MTU passes, and one byte more does not.
    for family in families.families() {
        let (node, to) = (&lab.nodes()[0], lab.nodes()[1].ip_in(family).unwrap());
        let full = PingOptions { ip_length: lab.spec().mtu() as usize, dont_fragment: true, ..PingOptions::default() };
        assert!(ping(node.netns(), to, full).await.unwrap().all_answered());
        let over = PingOptions { ip_length: full.ip_length + 1, ..full };
        let report = ping(node.netns(), to, over).await.unwrap();
        assert_eq!((report.received, report.too_big.is_some()), (0, true), "{report:?}");
    }
}

#[tokio::test]
async fn nodes_on_the_gcp_underlay_reach_each_other_and_outside() {
    for families in [V4, V6, DUAL] {
        nodes_reach_each_other_and_outside(Underlay::Gcp, families).await;
    }
}

#[tokio::test]
async fn nodes_on_the_lan_underlay_reach_each_other_and_outside() {
    for families in [V4, V6, DUAL] {
        nodes_reach_each_other_and_outside(Underlay::Lan, families).await;
    }
}

#[tokio::test]
async fn an_ipv6_cluster_has_nothing_of_ipv4_but_docker0() {
    for underlay in [Underlay::Gcp, Underlay::Lan] {
        let lab = lab(LabSpec { underlay, ..spec(2, V6) }).await;
        let pods = lab.pods().map(|pod| pod.host().clone());
        let hosts = lab.nodes().iter().map(|node| node.host().clone()).chain(pods);
        for host in hosts.chain([lab.fabric().clone(), lab.outside().clone()]) {
            let routes = host.routes().await.unwrap();
            assert!(routes.iter().all(|route| route.device == DOCKER_BRIDGE), "{}: {routes:?}", host.name());
            for link in host.links().await.unwrap().iter().filter(|link| ![DOCKER_BRIDGE, "lo"].contains(&&*link.name))
            {
                let addresses = host.addresses(&link.name).await.unwrap();
                assert!(addresses.iter().all(|address| address.is_ipv6()), "{}: {addresses:?}", host.name());
            }
        }
    }
}

#[tokio::test]
async fn a_gcp_node_has_the_interfaces_and_routes_of_the_article() {
    let lab = lab(LabSpec::default()).await;
    let node = &lab.nodes()[2];
    assert_eq!(node.name(), "rke-52b280-2");
    assert_eq!(
        node.host().addresses(UNDERLAY_INTERFACE).await.unwrap().iter().filter(|a| a.is_ipv4()).collect::<Vec<_>>(),
        [&IpNetwork::from(IpAddr::from([10, 240, 0, 103]))]
    );
    assert_eq!(node.host().link(UNDERLAY_INTERFACE).await.unwrap().mtu, 1460);
    assert_eq!(node.host().link("cni0").await.unwrap().mtu, 1410);
    let mut routes: Vec<_> = node.host().routes().await.unwrap().iter().map(Route::to_string).collect();
    routes.sort();
    assert_eq!(
        routes,
        [
            "10.240.0.1 dev ens4 proto dhcp scope link src 10.240.0.103 metric 100",
            "10.42.2.0/24 dev cni0 proto kernel scope link src 10.42.2.1",
            "172.17.0.0/16 dev docker0 proto kernel scope link src 172.17.0.1",
            "default via 10.240.0.1 dev ens4 proto dhcp src 10.240.0.103 metric 100",
        ]
    );
    let pod: Vec<_> = node.pods()[1].host().routes().await.unwrap().iter().map(Route::to_string).collect();
    assert_eq!(
        pod,
        [
            "default via 10.42.2.1 dev eth0",
            "10.42.0.0/16 via 10.42.2.1 dev eth0",
            "10.42.2.0/24 dev eth0 proto kernel scope link src 10.42.2.3"
        ]
    );
    let mac = node.pods()[1].host().link("eth0").await.unwrap().mac;
    assert_eq!(mac, Some([0x0a, 0x58, 10, 42, 2, 3]));
    assert!(node.host().link(DOCKER_BRIDGE).await.unwrap().up);
}

#[tokio::test]
async fn a_gcp_node_has_the_same_in_ipv6() {
    let lab = lab(spec(3, V6)).await;
    let node = &lab.nodes()[2];
    let routes = |host: &Host| {
        let host = host.clone();
        async move {
            let routes = host.routes_in(Family::V6).await.unwrap();
            let mut routes: Vec<_> = routes.iter().map(Route::to_string).collect();
            routes.sort();
            routes
        }
    };
    assert_eq!(
        routes(node.host()).await,
        [
            "2001:db8:240::1 dev ens4 proto static src 2001:db8:240::103 metric 1024",
            "2001:db8:240::103 dev ens4 proto kernel metric 256",
            "2001:db8:42:2::/64 dev cni0 proto kernel metric 256",
            "default via 2001:db8:240::1 dev ens4 proto static src 2001:db8:240::103 metric 1024",
        ]
    );
    assert_eq!(
        routes(node.pods()[1].host()).await,
        [
            "2001:db8:42:2::/64 dev eth0 proto kernel metric 256",
            "2001:db8:42::/56 via 2001:db8:42:2::1 dev eth0 metric 1024",
            "default via 2001:db8:42:2::1 dev eth0 metric 1024",
        ]
    );
    assert_eq!(node.pods()[1].ip(), "2001:db8:42:2::3".parse::<IpAddr>().unwrap());
}

#[tokio::test]
async fn outside_has_no_way_back_to_a_pod() {
    let lab = lab(spec(1, DUAL)).await;
    let pod = &lab.nodes()[0].pods()[0];
    let capture = Capture::start(lab.outside(), "eth0").await.unwrap();
    for family in Family::BOTH {
        let (from, to) = (pod.ip_in(family).unwrap(), outside(family));
        assert!(is_silent(pod.netns(), to).await);
        // The question arrived, under the pod's own address; only the answer was lost.
        capture.wait_for(SOON, |frame| frame.is_between(from, to)).await.unwrap();
    }
}

#[tokio::test]
async fn a_lab_of_three_nodes_and_six_pods_stands_within_two_seconds() {
    // The quickest of five, at most: what others do on this machine meanwhile is not the lab's.
    let mut took = Vec::new();
    while took.len() < 5 && took.iter().all(|took| *took >= Duration::from_secs(2)) {
        let start = Instant::now();
        let lab = lab(LabSpec::default()).await;
        took.push(start.elapsed());
        assert_eq!(lab.pods().count(), 6);
    }
    println!("built in {took:?}");
    assert!(took.last().is_some_and(|took| *took < Duration::from_secs(2)), "{took:?}");
}

#[tokio::test]
async fn a_lab_of_no_nodes_or_eleven_is_refused() {
    for nodes in [0, 11] {
        assert!(Lab::build(LabSpec { nodes, ..LabSpec::default() }).await.is_err());
    }
}

#[tokio::test]
async fn a_cluster_network_without_room_for_ten_nodes_is_refused() {
    let v6 = Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/61".parse().unwrap());
    for networks in [Stack::V4("10.42.0.0/21".parse().unwrap()), v6] {
        assert!(Lab::build(LabSpec { networks, ..LabSpec::default() }).await.is_err());
    }
}

#[tokio::test]
async fn a_detached_pod_is_gone_and_the_others_stay() {
    let mut lab = lab(one_node()).await;
    let gone = lab.nodes()[0].pods()[0].addresses();
    let node: &mut Node = &mut lab.nodes_mut()[0];
    node.detach_pod(gone).await.unwrap();
    assert!(node.detach_pod(gone).await.is_err(), "twice is an error");
    let left = node.pods()[0].clone();
    assert!(is_silent(node.netns(), *gone.v4().unwrap()).await);
    assert!(answers(node.netns(), left.ip()).await);

    // Its address is not given to the next pod.
    let network = crate::PodNetwork {
        subnets: Stack::V4("10.42.0.0/24".parse().unwrap()),
        clusters: Stack::V4("10.42.0.0/16".parse().unwrap()),
        mtu: 1410,
    };
    node.attach_pods(&network, 1).await.unwrap();
    let addresses: Vec<_> = node.pods().iter().map(|pod| pod.ip().to_string()).collect();
    assert_eq!(addresses, ["10.42.0.3", "10.42.0.4"]);
    assert!(node.attach_pods(&network, 251).await.is_err(), "a /24 has room for 253");
    node.detach_all().await.unwrap();
    assert!(!node.host().has_link("cni0").await.unwrap());
}

#[tokio::test]
async fn the_capture_sees_a_known_packet_with_its_addresses_and_length() {
    let lab = Lab::build(spec(2, DUAL)).await.unwrap();
    for family in Family::BOTH {
        let [a, b] = lab.nodes() else { panic!("two nodes") };
        let capture = Capture::start(a.host(), UNDERLAY_INTERFACE).await.unwrap();
        let (from, to) = (a.ip_in(family).unwrap(), b.ip_in(family).unwrap());
        let options = PingOptions { ip_length: 777, dont_fragment: true, ..PingOptions::default() };
        assert!(ping(a.netns(), to, options).await.unwrap().all_answered());
        let question = capture.wait_for(SOON, |frame| frame.is_between(from, to)).await.unwrap();
        let ip = question.ip.unwrap();
        assert_eq!((ip.total_length, ip.dont_fragment, ip.fragment, ip.extension_headers), (777, true, None, 0));
        assert_eq!((question.direction, question.length, question.is_icmp()), (Direction::Out, 777 + 14, true));
        assert_eq!(Some(question.source_mac), a.host().link(UNDERLAY_INTERFACE).await.unwrap().mac);
        let answer = capture.wait_for(SOON, |frame| frame.is_between(to, from)).await.unwrap();
        assert_eq!(answer.direction, Direction::In);
        assert_eq!(capture.report().fragments, 0);
    }
}

#[tokio::test]
async fn the_capture_counts_fragments() {
    let lab = Lab::build(spec(2, DUAL)).await.unwrap();
    for family in Family::BOTH {
        let [a, b] = lab.nodes() else { panic!("two nodes") };
        let capture = Capture::start(a.host(), UNDERLAY_INTERFACE).await.unwrap();
        let options = PingOptions { ip_length: 3000, ..PingOptions::default() };
        assert!(ping(a.netns(), b.ip_in(family).unwrap(), options).await.unwrap().all_answered());
        let last = capture
            .wait_for(SOON, |frame| {
                let fragment = frame.ip.and_then(|ip| ip.fragment);
                fragment.is_some_and(|part| part.offset > 0 && !part.more) && frame.direction == Direction::In
            })
            .await
            .unwrap();
        assert_eq!(last.ip.unwrap().extension_headers, if family == Family::V6 { 1 } else { 0 });
        assert_eq!(capture.report().fragments, 6, "three each way, {family}");
    }
}

#[tokio::test]
async fn dns_answers_at_the_service_address_from_a_pod_of_the_same_node() {
    let lab = lab(spec(1, DUAL)).await;
    let node = &lab.nodes()[0];
    let [server_pod, client] = node.pods() else { panic!("two pods") };
    let addresses = Family::BOTH.map(|family| server_pod.ip_in(family).unwrap());
    let _servers = addresses.map(|address| DnsServer::start(server_pod.netns(), (address, 53).into()).unwrap());
    services::publish(node.host(), &addresses.map(Service::dns)).unwrap();
    assert_eq!(firewall::tables(node.host()).unwrap(), ["ip lab-services", "ip6 lab-services"]);
    for family in Family::BOTH {
        let service = (dns_service(family), 53).into();
        for transport in [Transport::Udp, Transport::Tcp] {
            // From the other pod, from the DNS pod itself, and from the node.
            for from in [client.netns(), server_pod.netns(), node.netns()] {
                let answer = dns_query(from, service, KUBERNETES, transport, SOON).await.unwrap();
                assert_eq!(answer.addresses, [kubernetes_service(family)], "{transport:?} from {}", from.name());
            }
        }
        let unknown = dns_query(client.netns(), service, "nowhere.example", Transport::Udp, SOON).await.unwrap();
        assert_eq!((unknown.exists, unknown.addresses), (false, vec![]));
    }

    // Publishing again replaces.
    services::publish(node.host(), &[Service::dns(addresses[1])]).unwrap();
    assert_eq!(firewall::tables(node.host()).unwrap(), ["ip6 lab-services"]);
    let short = Duration::from_millis(300);
    let gone = (dns_service(Family::V4), 53).into();
    assert!(dns_query(client.netns(), gone, KUBERNETES, Transport::Udp, short).await.is_err());
    services::publish(node.host(), &[]).unwrap();
    assert!(firewall::tables(node.host()).unwrap().is_empty());
    assert!(firewall::delete_table(node.host(), "ip lab-services").unwrap_err().is_absent());
}

#[tokio::test]
async fn a_chain_is_listed_with_its_rules_until_it_is_emptied() {
    let host = Host::new("firewalled").unwrap();
    let backends = ["10.42.0.2", "2001:db8:42::2"].map(|address| Service::dns(address.parse::<IpAddr>().unwrap()));
    services::publish(&host, &backends).unwrap();
    let of = |family: &str| {
        [("prerouting", 2), ("output", 2), ("postrouting", 1)]
            .map(|(chain, rules)| format!("{family} lab-services {chain}: {rules}"))
    };
    assert_eq!(firewall::chains(&host).unwrap(), [of("ip"), of("ip6")].concat());
    firewall::flush_chain(&host, Family::V6, services::TABLE, "output").unwrap();
    let [prerouting, _, postrouting] = of("ip6");
    let left = [&of("ip")[..], &[prerouting, postrouting]].concat();
    assert_eq!(firewall::chains(&host).unwrap(), left, "an empty chain at a hook does nothing");
    assert!(firewall::flush_chain(&host, Family::V4, "nowhere", "output").unwrap_err().is_absent());
}

#[tokio::test]
async fn an_echo_server_tells_the_address_that_it_sees() {
    let lab = lab(spec(1, DUAL)).await;
    let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
    for family in Family::BOTH {
        let server = EchoServer::start(b.netns(), (b.ip_in(family).unwrap(), 7).into()).unwrap();
        let at = server.address();
        for transport in [Transport::Udp, Transport::Tcp] {
            let seen = seen_as(a.netns(), at, transport, SOON).await.unwrap();
            assert_eq!(seen.ip(), a.ip_in(family).unwrap());
        }
        drop(server);
        wait_until("nobody listens", SOON, || async { Ok(a.netns().tcp_connect(at).await.is_err()) }).await.unwrap();
    }
}

#[tokio::test]
async fn who_chattered_a_moment_ago_is_in_nobodys_way_and_both_are_heard() {
    let lab = lab(spec(1, DUAL)).await;
    let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
    for family in Family::BOTH {
        let ear = b.netns().udp_socket((b.ip_in(family).unwrap(), 0).into()).unwrap();
        let to = ear.local_addr().unwrap();
        let mut buffer = [0; 16];
        for said in [&b"first"[..], b"second"] {
            // The one before is dropped here, and its task has had no turn to end in.
            let _chatter = Chatter::start(a.netns(), to, said.to_vec()).unwrap();
            let heard = async {
                loop {
                    let length = ear.recv(&mut buffer).await.unwrap();
                    if &buffer[..length] == said {
                        break;
                    }
                }
            };
            tokio::time::timeout(SOON, heard).await.expect("it is heard");
        }
    }
}

#[tokio::test]
async fn a_hand_made_flannel_network_carries_packets_of_1410_bytes_and_not_of_1411() {
    a_hand_made_network_carries(V4, Family::V4, 1410).await;
}

#[tokio::test]
async fn a_hand_made_flannel_network_of_ipv6_carries_packets_of_1390_bytes_and_not_of_1391() {
    a_hand_made_network_carries(V6, Family::V6, 1390).await;
}

#[tokio::test]
async fn in_a_hand_made_network_of_both_families_the_narrower_one_is_the_measure() {
    for family in Family::BOTH {
        a_hand_made_network_carries(DUAL, family, 1390).await;
    }
}

async fn a_hand_made_network_carries(families: Families, family: Family, mtu: u16) {
    let lab = lab(spec(3, families)).await;
    connect_by_hand(&lab).await;

    // Every pod reaches every pod.
    let mut pairs = Vec::new();
    for from in lab.pods() {
        let others = lab.pods().filter(|to| to.name() != from.name());
        pairs.extend(others.map(|to| (from.netns().clone(), to.ip_in(family).unwrap())));
    }
    assert_eq!(pairs.len(), 30);
    let options = PingOptions { count: 3, ..PingOptions::default() };
    for (report, (from, to)) in ping_all(pairs.clone(), options).await.unwrap().iter().zip(&pairs) {
        assert!(report.all_answered(), "{} to {to}: {report:?}", from.name());
    }

    // The narrowest place is the overlay's device or, behind it, the far bridge; and the node there says so itself.
    let node = &lab.nodes()[0];
    let (from, to) = (&node.pods()[0], &lab.nodes()[2].pods()[1]);
    let (source, destination) = (from.ip_in(family).unwrap(), to.ip_in(family).unwrap());
    node.raise_pod_mtu(from, 1500).await.unwrap();
    assert_eq!(node.host().link("cni0").await.unwrap().mtu, u32::from(mtu), "the bridge keeps its MTU");
    let capture = Capture::start(lab.fabric(), &lab.fabric_port(0)).await.unwrap();
    let fits = PingOptions { ip_length: mtu.into(), dont_fragment: true, ..PingOptions::default() };
    let report = ping(from.netns(), destination, fits).await.unwrap();
    assert!(report.all_answered(), "{report:?}");
    let over = PingOptions { ip_length: fits.ip_length + 1, ..fits };
    let report = ping(from.netns(), destination, over).await.unwrap();
    assert_eq!(report.received, 0);
    let too_big = report.too_big.expect("a node says that it is too big");
    assert_eq!(too_big.mtu, u32::from(mtu));
    if device_mtu(lab.spec(), family) == too_big.mtu {
        let bridge = crate::families::nth(lab.spec().subnet(0, family).unwrap(), 1);
        assert_eq!(too_big.by, Some(bridge), "the pod's own node");
    }

    // On the wire: VXLAN, so many bytes more than the inner packet, not one fragment.
    let is_it = |frame: &crate::probe::Frame| {
        let inner = frame.vxlan.and_then(|vxlan| vxlan.ip);
        inner.is_some_and(|ip| ip.source == source && ip.total_length == mtu)
    };
    let frame = capture.wait_for(SOON, is_it).await.unwrap();
    let (ip, udp, inner) = (frame.ip.unwrap(), frame.udp.unwrap(), frame.vxlan.unwrap());
    let more = lab.spec().mtu() - device_mtu(lab.spec(), family);
    let ends = (node.ip_in(family).unwrap(), lab.nodes()[2].ip_in(family).unwrap());
    assert_eq!((ip.source, ip.destination, u32::from(ip.total_length)), (ends.0, ends.1, u32::from(mtu) + more));
    assert_eq!((udp.destination, inner.vni), (8472, 1));
    assert_eq!((inner.source_mac, inner.destination_mac), ([2, 0x42, 0, 0, 0, 0], [2, 0x42, 0, 0, 0, 2]));
    assert_eq!(capture.report().fragments, 0);

    // The peer sees the pod, not the node.
    let server = EchoServer::start(to.netns(), (destination, 7).into()).unwrap();
    assert_eq!(seen_as(from.netns(), server.address(), Transport::Tcp, SOON).await.unwrap().ip(), source);

    // And the service address is answered by a pod of another node, over both protocols.
    let dns_pod = &lab.nodes()[1].pods()[0];
    let at = dns_pod.ip_in(family).unwrap();
    let _server = DnsServer::start(dns_pod.netns(), (at, 53).into()).unwrap();
    services::publish(node.host(), &[Service::dns(at)]).unwrap();
    for transport in [Transport::Udp, Transport::Tcp] {
        let service = (dns_service(family), 53).into();
        let answer = dns_query(from.netns(), service, KUBERNETES, transport, SOON).await.unwrap();
        assert_eq!(answer.addresses, [kubernetes_service(family)]);
    }
}

#[tokio::test]
async fn streams_notice_a_cut_and_go_on_after_it() {
    streams_notice_a_cut(Family::V4).await;
}

#[tokio::test]
async fn streams_notice_a_cut_and_go_on_after_it_in_ipv6() {
    streams_notice_a_cut(Family::V6).await;
}

async fn streams_notice_a_cut(family: Family) {
    let lab = lab(spec(2, if family == Family::V4 { V4 } else { V6 })).await;
    connect_by_hand(&lab).await;
    let (node, a, b) = (&lab.nodes()[0], &lab.nodes()[0].pods()[0], &lab.nodes()[1].pods()[0]);
    let there = PingStream::start(a.netns(), b.ip(), PingOptions::default()).await.unwrap();
    let back = PingStream::start(b.netns(), a.ip(), PingOptions::default()).await.unwrap();
    let tcp = SteadyStream::start(a.netns(), b.netns(), b.ip(), Some(20_000_000)).await.unwrap();

    let route = by_hand(&lab, 1, family);
    node.host().delete_route(&route).await.unwrap();
    // Twice: who was held up through one of them makes up for its pings once the route is back.
    for _ in 0..2 {
        assert!(is_silent(a.netns(), b.ip()).await);
    }
    node.host().add_route(&route).await.unwrap();
    assert!(answers(a.netns(), b.ip()).await);

    for report in [there.stop().await.unwrap(), back.stop().await.unwrap()] {
        assert!(report.sent > 100 && report.lost > 50 && report.received > 0, "{report:?}");
        assert_eq!(report.sent, report.received + report.lost);
        assert!(report.longest_loss >= 50 && report.longest_gap_us > 200_000, "{report:?}");
    }
    let report = tcp.stop().await.unwrap();
    assert!(
        report.broken.is_none() && report.stalls >= 1 && report.longest_stall_us > 200_000 && report.bytes > 0,
        "{report:?}"
    );
}

#[tokio::test]
async fn an_undisturbed_ping_stream_loses_nothing() {
    let lab = lab(one_node()).await;
    let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
    let stream = PingStream::start(a.netns(), b.ip(), PingOptions::default()).await.unwrap();
    let throughput = tcp_throughput(a.netns(), b.netns(), b.ip(), Duration::from_millis(300)).await.unwrap();
    let report = stream.stop().await.unwrap();
    assert!(throughput.bytes > 1_000_000 && throughput.gbit_per_s > 0.0, "{throughput:?}");
    assert_eq!((report.lost, report.duplicated, report.too_big), (0, 0, None), "{report:?}");
    assert!(report.rtt_min_us <= report.rtt_avg_us && report.rtt_avg_us <= report.rtt_max_us);
}

#[tokio::test]
async fn sysctls_are_those_of_the_namespace() {
    let [a, b] = [Host::new("a").unwrap(), Host::new("b").unwrap()];
    a.set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    b.set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    assert_eq!(
        (a.sysctl("net.ipv4.ip_forward").unwrap(), b.sysctl("net.ipv4.ip_forward").unwrap()),
        ("1".into(), "0".into())
    );
    assert!(!a.set_sysctl_if_present("net.ipv4.no_such_thing", "1").unwrap());
}

#[test]
fn a_route_prints_as_ip_route_does() {
    let default = Route::via("0.0.0.0/0".parse().unwrap(), Ipv4Addr::new(10, 0, 0, 1).into(), "eth0");
    assert_eq!(default.to_string(), "default via 10.0.0.1 dev eth0");
    let default = Route::via("::/0".parse().unwrap(), "2001:db8::1".parse().unwrap(), "eth0");
    assert_eq!(default.to_string(), "default via 2001:db8::1 dev eth0");
    let onlink = Route::via("10.42.1.0/24".parse().unwrap(), Ipv4Addr::new(10, 42, 1, 0).into(), VXLAN).onlink();
    assert_eq!(onlink.to_string(), "10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink");
}
