//! The lab judged by itself: each part shown to work, and to notice when something does not.
//!
//! They need the right to make network namespaces: run them as root, or `unshare -Urn cargo test -p podnet-examples`.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use rtnetlink::LinkVxlan;

use crate::cluster::{DOCKER_BRIDGE, GATEWAY, OUTSIDE, UNDERLAY_INTERFACE, v4};
use crate::probe::dns::{KUBERNETES, KUBERNETES_SERVICE};
use crate::probe::{
    Capture, Direction, DnsServer, EchoServer, PingOptions, PingStream, SteadyStream, Transport, dns_query, ping,
    ping_all, seen_as, tcp_throughput,
};
use crate::services::{self, DNS_SERVICE, Service};
use crate::{Host, Lab, LabSpec, Netns, Node, Route, Underlay, wait_until};

const SOON: Duration = Duration::from_secs(5);
const OVERLAY_MTU: u32 = 1410;
const VXLAN: &str = "flannel.1";

async fn lab(spec: LabSpec) -> Lab {
    let mtu = spec.mtu() - 50;
    let mut lab = Lab::build(spec).await.unwrap();
    lab.attach_pods(mtu).await.unwrap();
    lab
}

fn one_node() -> LabSpec {
    LabSpec { nodes: 1, ..LabSpec::default() }
}

/// Flannel's layout by hand, with the pod network's own addresses: what podnet is to do. No masquerade.
async fn connect_by_hand(lab: &Lab) {
    let mac = |index: usize| [0x02, 0x42, 0, 0, 0, index as u8];
    let vtep = |index: usize| lab.spec().subnet(index).network();
    for node in lab.nodes() {
        let host = node.host();
        let lower = host.link(UNDERLAY_INTERFACE).await.unwrap().index;
        let device = LinkVxlan::new(VXLAN, 1)
            .dev(lower)
            .local(node.address())
            .port(8472)
            .learning(false)
            .address(mac(node.index()).to_vec())
            .mtu(lab.spec().mtu() - 50)
            .build();
        host.handle().link().add(device).execute().await.unwrap();
        host.add_address(VXLAN, v4(vtep(node.index()), 32)).await.unwrap();
        host.set_up(VXLAN).await.unwrap();
        for peer in lab.nodes().iter().filter(|peer| peer.index() != node.index()) {
            let gateway = IpAddr::from(vtep(peer.index()));
            host.add_neighbour(VXLAN, gateway, mac(peer.index())).await.unwrap();
            host.add_fdb(VXLAN, mac(peer.index()), peer.address().into()).await.unwrap();
            let route = Route::via(lab.spec().subnet(peer.index()).into(), gateway, VXLAN).onlink();
            host.add_route(&route).await.unwrap();
        }
    }
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
    // A veth end goes when the namespace of the other end goes.
    wait_until("the wire is gone", SOON, || async { Ok(!outer.has_link("wire").await?) }).await.unwrap();
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
    let lab = lab(LabSpec { nodes: 2, ..LabSpec::default() }).await;
    let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
    assert!(answers(a.netns(), b.address()).await);
    assert!(answers(b.netns(), a.address()).await);
    let far = &lab.nodes()[1].pods()[0];
    assert!(is_silent(a.netns(), far.address()).await, "nothing connects the nodes' pods yet");
}

async fn nodes_reach_each_other_and_outside(underlay: Underlay) {
    let lab = Lab::build(LabSpec { underlay, ..LabSpec::default() }).await.unwrap();
    let mut pairs = Vec::new();
    for node in lab.nodes() {
        let others = lab.nodes().iter().filter(|other| other.index() != node.index());
        pairs.extend(others.map(|other| (node.netns().clone(), other.address().into())));
        pairs.push((node.netns().clone(), GATEWAY.into()));
        pairs.push((node.netns().clone(), OUTSIDE.into()));
        pairs.push((lab.outside().netns().clone(), node.address().into()));
    }
    for (report, (from, to)) in ping_all(pairs.clone(), PingOptions::default()).await.unwrap().iter().zip(pairs) {
        assert!(report.all_answered(), "{} to {to}: {report:?}", from.name());
    }
    // A packet of the underlay's MTU passes, and one byte more does not.
    let node = &lab.nodes()[0];
    let full = PingOptions { ip_length: lab.spec().mtu() as usize, dont_fragment: true, ..PingOptions::default() };
    assert!(ping(node.netns(), lab.nodes()[1].address().into(), full).await.unwrap().all_answered());
    let over = PingOptions { ip_length: full.ip_length + 1, ..full };
    let report = ping(node.netns(), lab.nodes()[1].address().into(), over).await.unwrap();
    assert_eq!((report.received, report.too_big.is_some()), (0, true), "{report:?}");
}

#[tokio::test]
async fn nodes_on_the_gcp_underlay_reach_each_other_and_outside() {
    nodes_reach_each_other_and_outside(Underlay::Gcp).await;
}

#[tokio::test]
async fn nodes_on_the_lan_underlay_reach_each_other_and_outside() {
    nodes_reach_each_other_and_outside(Underlay::Lan).await;
}

#[tokio::test]
async fn a_gcp_node_has_the_interfaces_and_routes_of_the_article() {
    let lab = lab(LabSpec::default()).await;
    let node = &lab.nodes()[2];
    assert_eq!(node.name(), "rke-52b280-2");
    assert_eq!(
        node.host().addresses(UNDERLAY_INTERFACE).await.unwrap().iter().filter(|a| a.is_ipv4()).collect::<Vec<_>>(),
        [&v4(Ipv4Addr::new(10, 240, 0, 103), 32)]
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
    assert!(node.host().link(DOCKER_BRIDGE).await.unwrap().up);
}

#[tokio::test]
async fn outside_has_no_way_back_to_a_pod() {
    let lab = lab(one_node()).await;
    let pod = &lab.nodes()[0].pods()[0];
    let capture = Capture::start(lab.outside(), "eth0").await.unwrap();
    assert!(is_silent(pod.netns(), OUTSIDE).await);
    // The question arrived, under the pod's own address; only the answer was lost.
    capture
        .wait_for(SOON, |frame| frame.ipv4.is_some_and(|ip| ip.source == pod.address() && ip.destination == OUTSIDE))
        .await
        .unwrap();
}

#[tokio::test]
async fn a_lab_of_three_nodes_and_six_pods_stands_within_two_seconds() {
    let start = Instant::now();
    let lab = lab(LabSpec::default()).await;
    let took = start.elapsed();
    assert_eq!(lab.pods().count(), 6);
    println!("built in {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn a_lab_of_no_nodes_or_eleven_is_refused() {
    for nodes in [0, 11] {
        assert!(Lab::build(LabSpec { nodes, ..LabSpec::default() }).await.is_err());
    }
}

#[tokio::test]
async fn a_detached_pod_is_gone_and_the_others_stay() {
    let mut lab = lab(one_node()).await;
    let address = lab.nodes()[0].pods()[0].address();
    let node: &mut Node = &mut lab.nodes_mut()[0];
    node.detach_pod(address).await.unwrap();
    assert!(node.detach_pod(address).await.is_err(), "twice is an error");
    let left = node.pods()[0].clone();
    assert!(is_silent(node.netns(), address).await);
    assert!(answers(node.netns(), left.address()).await);

    // Its address is not given to the next pod.
    let network = crate::PodNetwork {
        subnet: "10.42.0.0/24".parse().unwrap(),
        cluster: "10.42.0.0/16".parse().unwrap(),
        mtu: OVERLAY_MTU,
    };
    node.attach_pods(&network, 1).await.unwrap();
    let addresses: Vec<_> = node.pods().iter().map(|pod| pod.address().octets()[3]).collect();
    assert_eq!(addresses, [3, 4]);
    assert!(node.attach_pods(&network, 251).await.is_err(), "a /24 has room for 253");
    node.detach_all().await.unwrap();
    assert!(!node.host().has_link("cni0").await.unwrap());
}

#[tokio::test]
async fn the_capture_sees_a_known_packet_with_its_addresses_and_length() {
    let lab = Lab::build(LabSpec { nodes: 2, ..LabSpec::default() }).await.unwrap();
    let [a, b] = lab.nodes() else { panic!("two nodes") };
    let capture = Capture::start(a.host(), UNDERLAY_INTERFACE).await.unwrap();
    let options = PingOptions { ip_length: 777, dont_fragment: true, ..PingOptions::default() };
    assert!(ping(a.netns(), b.address().into(), options).await.unwrap().all_answered());
    let question = capture.wait_for(SOON, |frame| frame.is_icmp() && frame.direction == Direction::Out).await.unwrap();
    let ip = question.ipv4.unwrap();
    assert_eq!((ip.source, ip.destination, ip.total_length, ip.dont_fragment), (a.address(), b.address(), 777, true));
    assert_eq!(question.length, 777 + 14);
    assert_eq!(Some(question.source_mac), a.host().link(UNDERLAY_INTERFACE).await.unwrap().mac);
    let answer = capture.wait_for(SOON, |frame| frame.is_icmp() && frame.direction == Direction::In).await.unwrap();
    assert_eq!(answer.ipv4.unwrap().source, b.address());
    assert_eq!(capture.report().fragments, 0);
}

#[tokio::test]
async fn the_capture_counts_fragments() {
    let lab = Lab::build(LabSpec { nodes: 2, ..LabSpec::default() }).await.unwrap();
    let [a, b] = lab.nodes() else { panic!("two nodes") };
    let capture = Capture::start(a.host(), UNDERLAY_INTERFACE).await.unwrap();
    let options = PingOptions { ip_length: 3000, ..PingOptions::default() };
    assert!(ping(a.netns(), b.address().into(), options).await.unwrap().all_answered());
    capture
        .wait_for(SOON, |frame| {
            frame.ipv4.is_some_and(|ip| ip.is_fragment() && !ip.more_fragments) && frame.direction == Direction::In
        })
        .await
        .unwrap();
    assert_eq!(capture.report().fragments, 6, "three each way");
}

#[tokio::test]
async fn dns_answers_at_the_service_address_from_a_pod_of_the_same_node() {
    let lab = lab(one_node()).await;
    let node = &lab.nodes()[0];
    let [server_pod, client] = node.pods() else { panic!("two pods") };
    let _server = DnsServer::start(server_pod.netns(), (server_pod.ip(), 53).into()).unwrap();
    services::publish(node.host(), &[Service::dns(server_pod.address())]).unwrap();
    assert_eq!(services::tables(node.host()).unwrap(), ["ip lab-services"]);
    for transport in [Transport::Udp, Transport::Tcp] {
        // From the other pod, from the DNS pod itself, and from the node.
        for from in [client.netns(), server_pod.netns(), node.netns()] {
            let answer = dns_query(from, (DNS_SERVICE, 53).into(), KUBERNETES, transport, SOON).await.unwrap();
            assert_eq!(answer.addresses, [KUBERNETES_SERVICE], "{transport:?} from {}", from.name());
        }
    }
    let unknown =
        dns_query(client.netns(), (DNS_SERVICE, 53).into(), "nowhere.example", Transport::Udp, SOON).await.unwrap();
    assert_eq!((unknown.exists, unknown.addresses), (false, vec![]));

    // Publishing again replaces; deleting leaves nothing.
    services::publish(node.host(), &[]).unwrap();
    assert!(
        dns_query(client.netns(), (DNS_SERVICE, 53).into(), KUBERNETES, Transport::Udp, Duration::from_millis(300))
            .await
            .is_err()
    );
    services::delete_table(node.host(), "ip lab-services").unwrap();
    assert!(services::tables(node.host()).unwrap().is_empty());
    assert!(services::delete_table(node.host(), "ip lab-services").unwrap_err().is_absent());
}

#[tokio::test]
async fn an_echo_server_tells_the_address_that_it_sees() {
    let lab = lab(one_node()).await;
    let [a, b] = lab.nodes()[0].pods() else { panic!("two pods") };
    let server = EchoServer::start(b.netns(), (b.ip(), 7).into()).unwrap();
    for transport in [Transport::Udp, Transport::Tcp] {
        assert_eq!(seen_as(a.netns(), server.address(), transport, SOON).await.unwrap().ip(), a.ip());
    }
    drop(server);
    wait_until("nobody listens", SOON, || async { Ok(a.netns().tcp_connect((b.ip(), 7).into()).await.is_err()) })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_hand_made_flannel_network_carries_packets_of_1410_bytes_and_not_of_1411() {
    let lab = lab(LabSpec::default()).await;
    connect_by_hand(&lab).await;

    // Every pod reaches every pod.
    let mut pairs = Vec::new();
    for from in lab.pods() {
        pairs.extend(lab.pods().filter(|to| to.address() != from.address()).map(|to| (from.netns().clone(), to.ip())));
    }
    assert_eq!(pairs.len(), 30);
    let options = PingOptions { count: 3, ..PingOptions::default() };
    for (report, (from, to)) in ping_all(pairs.clone(), options).await.unwrap().iter().zip(&pairs) {
        assert!(report.all_answered(), "{} to {to}: {report:?}", from.name());
    }

    // The narrowest place is flannel.1, and it says so itself.
    let node = &lab.nodes()[0];
    let (from, to) = (&node.pods()[0], &lab.nodes()[2].pods()[1]);
    node.raise_pod_mtu(from, 1500).await.unwrap();
    assert_eq!(node.host().link("cni0").await.unwrap().mtu, OVERLAY_MTU, "the bridge keeps its MTU");
    let capture = Capture::start(lab.fabric(), &lab.fabric_port(0)).await.unwrap();
    let fits = PingOptions { ip_length: 1410, dont_fragment: true, ..PingOptions::default() };
    let report = ping(from.netns(), to.ip(), fits).await.unwrap();
    assert!(report.all_answered(), "{report:?}");
    let over = PingOptions { ip_length: 1411, ..fits };
    let report = ping(from.netns(), to.ip(), over).await.unwrap();
    assert_eq!(report.received, 0);
    let too_big = report.too_big.expect("the node says that it is too big");
    assert_eq!((too_big.by, too_big.mtu), (Some(Ipv4Addr::new(10, 42, 0, 1)), 1410));

    // On the wire: VXLAN, 50 bytes more than the inner packet, not one fragment.
    let is_it = |frame: &crate::probe::Frame| {
        frame
            .vxlan
            .is_some_and(|vxlan| vxlan.ipv4.is_some_and(|ip| ip.source == from.address() && ip.total_length == 1410))
    };
    let frame = capture.wait_for(SOON, is_it).await.unwrap();
    let (ip, udp, vxlan) = (frame.ipv4.unwrap(), frame.udp.unwrap(), frame.vxlan.unwrap());
    assert_eq!((ip.source, ip.destination, ip.total_length), (node.address(), lab.nodes()[2].address(), 1460));
    assert_eq!((udp.destination, vxlan.vni), (8472, 1));
    assert_eq!((vxlan.source_mac, vxlan.destination_mac), ([2, 0x42, 0, 0, 0, 0], [2, 0x42, 0, 0, 0, 2]));
    let seen = capture.report();
    assert_eq!(seen.fragments, 0);
    assert!(seen.vxlan().all(|(_, inner)| inner.ipv4.is_none_or(|ip| ip.total_length <= 1410)));

    // The peer sees the pod, not the node.
    let server = EchoServer::start(to.netns(), (to.ip(), 7).into()).unwrap();
    assert_eq!(seen_as(from.netns(), server.address(), Transport::Tcp, SOON).await.unwrap().ip(), from.ip());

    // And the service address is answered by a pod of another node, over both protocols.
    let dns_pod = &lab.nodes()[1].pods()[0];
    let _server = DnsServer::start(dns_pod.netns(), (dns_pod.ip(), 53).into()).unwrap();
    services::publish(node.host(), &[Service::dns(dns_pod.address())]).unwrap();
    for transport in [Transport::Udp, Transport::Tcp] {
        let answer = dns_query(from.netns(), (DNS_SERVICE, 53).into(), KUBERNETES, transport, SOON).await.unwrap();
        assert_eq!(answer.addresses, [KUBERNETES_SERVICE]);
    }
}

#[tokio::test]
async fn streams_notice_a_cut_and_go_on_after_it() {
    let lab = lab(LabSpec { nodes: 2, ..LabSpec::default() }).await;
    connect_by_hand(&lab).await;
    let (node, a, b) = (&lab.nodes()[0], &lab.nodes()[0].pods()[0], &lab.nodes()[1].pods()[0]);
    let there = PingStream::start(a.netns(), b.ip(), PingOptions::default()).await.unwrap();
    let back = PingStream::start(b.netns(), a.ip(), PingOptions::default()).await.unwrap();
    let tcp = SteadyStream::start(a.netns(), b.netns(), b.ip(), Some(20_000_000)).await.unwrap();

    let route = Route::via(IpNetwork::V4(lab.spec().subnet(1)), lab.spec().subnet(1).network().into(), VXLAN).onlink();
    node.host().delete_route(&route).await.unwrap();
    assert!(is_silent(a.netns(), b.address()).await);
    node.host().add_route(&route).await.unwrap();
    assert!(answers(a.netns(), b.address()).await);

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
    let onlink = Route::via("10.42.1.0/24".parse().unwrap(), Ipv4Addr::new(10, 42, 1, 0).into(), VXLAN).onlink();
    assert_eq!(onlink.to_string(), "10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink");
}
