//! What was there before podnet on a real kernel: flannel's own work taken over with no packet lost, devices that do not fit, devices
//! of others, and a cluster of which one half is flannel's.

use std::time::Duration;

use ipnetwork::IpNetwork;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, Offer, Precedence};
use podnet::status::{ConditionKind, ConditionState, PeerState, Phase, Status};
use podnet::types::{Family, Stack};
use podnet_lab::Host;
use podnet_lab::probe::{PingOptions, PingStream};
use podnet_tests::real::flannel::{flannels_device, flannels_peer};
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::{Cluster, DEVICE, assert_same, connected, lone_host, many, nft};
use podnet_tests::{name, real, spawn};
use rtnetlink::LinkBridge;

/// The MAC that flannel drew on a node.
fn flannels_mac(index: usize) -> [u8; 6] {
    [0x6e, 0x11, 0x22, 0x33, 0x44, u8::try_from(index).unwrap()]
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// A whole node as flannel leaves it, its nftables included, with peers.
async fn flannels_node(cluster: &Cluster, index: usize) {
    let node = &cluster.lab.nodes()[index];
    let (host, spec) = (node.host(), cluster.lab.spec());
    let address = node.addresses().v4().unwrap().octets();
    flannels_device(host, flannels_mac(index), address, (1, 8472), spec.mtu() - 50).await;
    host.add_address(DEVICE, IpNetwork::from(spec.subnet(index, Family::V4).unwrap().network())).await.unwrap();
    host.set_up(DEVICE).await.unwrap();
    for peer in cluster.lab.nodes().iter().filter(|peer| peer.index() != index) {
        let subnet = spec.subnet(peer.index(), Family::V4).unwrap();
        flannels_peer(host, subnet, flannels_mac(peer.index()), peer.ip()).await;
    }
    let (table, pods) = ("flannel-ipv4", [10, 42]);
    let rule = |chain: &str, source| {
        nft::rule(
            nft::IPV4,
            table,
            chain,
            &[&nft::within(source, pods, [0xff, 0xff])[..], &[nft::verdict(nft::ACCEPT)]].concat(),
        )
    };
    nft::commit(
        host.netns(),
        &[
            nft::table(nft::IPV4, table),
            nft::chain(nft::IPV4, table, "forward", "filter", (nft::FORWARD, 0, nft::ACCEPT)),
            nft::chain(nft::IPV4, table, "postrtg", "nat", (nft::POSTROUTING, 100, nft::ACCEPT)),
            rule("forward", true),
            rule("forward", false),
            rule("postrtg", false),
        ],
    );
}

/// The lease as flannel publishes it.
fn flannels_lease(cluster: &Cluster, index: usize) -> Lease {
    let node = &cluster.lab.nodes()[index];
    let data = format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, text(flannels_mac(index)));
    Lease {
        node: name(node.name()),
        subnets: cluster.lab.spec().subnets(index),
        offers: vec![Offer {
            backend: BackendKind::of("vxlan"),
            endpoints: Stack::V4(Endpoint {
                public_ip: *node.addresses().v4().unwrap(),
                data: BackendData::from_text(&data).unwrap(),
            }),
        }],
        precedence: Precedence { since: u64::try_from(index).unwrap(), identity: node.name().to_owned() },
    }
}

/// A cluster that flannel runs.
async fn flannels_cluster(nodes: usize) -> Cluster {
    let cluster = Cluster::bare(nodes).await;
    for index in 0..nodes {
        flannels_node(&cluster, index).await;
        cluster.subnets.faults().inject(flannels_lease(&cluster, index));
    }
    cluster.assert_pods_talk().await;
    cluster
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_a_cluster_of_flannels_is_taken_over_node_by_node_with_no_packet_lost() {
    let mut cluster = flannels_cluster(2).await;
    for index in 0..2 {
        // A peer that left while flannel was not looking, and an operator's own route.
        let gone = "10.42.9.0/24".parse().unwrap();
        flannels_peer(cluster.host(index), gone, [2, 0, 0, 0, 0, 9], [10, 240, 0, 109].into()).await;
        cluster.add_operators_route(index, 1 - index).await;
    }
    let before: Vec<_> = (0..2).map(|index| cluster.eye(index).settled()).collect();
    let devices = [0, 1].map(|index| cluster.host(index).clone());
    let indexes = [devices[0].link(DEVICE).await.unwrap().index, devices[1].link(DEVICE).await.unwrap().index];
    let (a, b) = (cluster.lab.nodes()[0].pods()[0].clone(), cluster.lab.nodes()[1].pods()[0].clone());
    let there = PingStream::start(a.netns(), b.ip(), PingOptions::default()).await.unwrap();
    let back = PingStream::start(b.netns(), a.ip(), PingOptions::default()).await.unwrap();
    for index in 0..2 {
        cluster.start(index).await;
        cluster.overlay(index).until(connected(1)).await;
        // Not to wait for anything: some pings, one a ms, shall go over what was just taken over.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for stream in [there, back] {
        let report = stream.stop().await.unwrap();
        assert!(report.sent > 20 && report.lost == 0, "{report:?}");
    }
    for index in 0..2 {
        let (peer, now) = (1 - index, cluster.eye(index).settled());
        assert_eq!(devices[index].link(DEVICE).await.unwrap().index, indexes[index], "the same device");
        assert!(now.has(&["link flannel.1 up", "IfAlias(\"podnet\")"]), "{now:#?}");
        assert!(now.has(&[&format!("route 10.42.{peer}.0/24 proto 112"), "dev flannel.1"]), "{now:#?}");
        assert!(now.has(&["neighbour Inet dev flannel.1", &text(flannels_mac(peer))]), "peers keep flannel's MAC");
        for left in
            ["10.42.9.0", "02:00:00:00:00:09", "flannel-ipv4", "proto 3 table 254 Unicast Universe dev flannel.1"]
        {
            assert!(!now.has(&[left]), "flannel's {left} is still there: {:#?}", now.with(&[left]));
        }
        let others = |dump: &real::eye::Dump| {
            let lines = dump.foreign();
            lines.lines().iter().filter(|l| !l.contains("flannel-ipv4")).cloned().collect::<Vec<_>>()
        };
        assert_eq!(others(&before[index]), others(&now));
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_a_table_of_flannels_masquerades_until_ours_does_in_one_transaction() {
    let mut cluster = flannels_cluster(1).await;
    let netns = cluster.host(0).netns().clone();
    let monitor = Monitor::on(&netns, cluster.host(0).link(DEVICE).await.unwrap().index);
    cluster.start(0).await;
    let nftables: Vec<String> = monitor.events().into_iter().filter(|e| e.starts_with("nftables")).collect();
    // NFT_MSG_NEWGEN ends each transaction.
    assert_eq!(nftables.iter().filter(|e| e.ends_with(" 0xa0f")).count(), 1, "{nftables:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_08_a_device_of_the_wrong_vni_port_or_address_is_put_right_and_replaced_only_where_it_must_be() {
    let reference = {
        let host = lone_host("reference").await;
        let _running = ready(&host).await;
        real::eye::Eye::on(host.netns()).settled()
    };
    for ((vni, port), local, made_anew) in [
        ((2, 8472), [10, 240, 0, 103], true),
        ((1, 4789), [10, 240, 0, 103], true),
        ((1, 8472), [10, 240, 0, 99], false),
    ] {
        let host = lone_host("wrong").await;
        // The MAC that podnet would draw, so that the two can be compared.
        let mac = reference.mac(DEVICE);
        flannels_device(&host, mac, local, (vni, port), 1400).await;
        host.set_up(DEVICE).await.unwrap();
        let index = host.link(DEVICE).await.unwrap().index;
        let monitor = Monitor::on(host.netns(), index);
        let _running = ready(&host).await;
        let now = real::eye::Eye::on(host.netns()).settled();
        assert_same(&reference.ours(), &now.ours());
        let deleted = monitor.events().iter().filter(|e| *e == "DelLink").count();
        assert_eq!(deleted, usize::from(made_anew), "VNI {vni}, port {port}, local {local:?}");
        assert_eq!(host.link(DEVICE).await.unwrap().index != index, made_anew);
    }
}

async fn ready(host: &Host) -> podnet_tests::Running {
    let running = spawn(real::builder("me", host.netns(), many(3))).await;
    running.until(connected(3)).await;
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_08_a_bridge_of_that_name_is_a_conflict_that_names_both_and_is_not_touched() {
    let host = lone_host("bridge").await;
    host.handle().link().add(LinkBridge::new(DEVICE).build()).execute().await.unwrap();
    host.add_address(DEVICE, "192.168.5.1/24".parse().unwrap()).await.unwrap();
    host.set_up(DEVICE).await.unwrap();
    let eye = real::eye::Eye::on(host.netns());
    let links = |dump: &real::eye::Dump| dump.with(&["flannel.1"]).join("\n");
    let before = eye.settled();
    let running = spawn(real::builder("me", host.netns(), many(3))).await;
    let failed = |s: &Status| s.condition(ConditionKind::Kernel).state == ConditionState::Failed;
    let status = running.until(failed).await;
    let told = status.condition(ConditionKind::Kernel).message;
    assert!(told.contains("link flannel.1") && told.contains("bridge"), "{told}");
    assert_eq!((status.peers.connected, status.phase), (0, Phase::Starting), "{status}");
    assert_eq!(status.condition(ConditionKind::Published).state, ConditionState::Waiting, "{status}");
    let peers = running.overlay.peers().await.unwrap();
    assert!(peers.iter().all(|p| matches!(p.families[0].state, PeerState::Unreachable { .. })), "{peers:?}");
    running.overlay.reconcile().await.unwrap();
    assert_eq!(links(&before), links(&eye.settled()));
    assert!(!eye.dump().has(&["proto 112"]));
    // When it goes, podnet takes its place.
    host.delete_link(DEVICE).await.unwrap();
    running.until(connected(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_adoption_what_flannel_left_is_reported_and_stays_as_it_is() {
    let cluster = flannels_cluster(2).await;
    let before = cluster.eye(0).settled();
    let running = spawn(cluster.builder(0).adopt_flannel(false)).await;
    let failed = |s: &Status| s.condition(ConditionKind::Kernel).state == ConditionState::Failed;
    let status = running.until(failed).await;
    assert!(status.to_string().contains("flannel.1") && status.to_string().contains("flannel-ipv4"), "{status}");
    running.overlay.reconcile().await.unwrap();
    let after = cluster.eye(0).settled();
    let theirs = |dump: &real::eye::Dump| {
        dump.lines().iter().filter(|l| !l.contains("nft ip podnet")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(theirs(&before), theirs(&after));
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_of_flannels_and_nodes_of_podnets_are_one_cluster() {
    let mut cluster = Cluster::bare(3).await;
    // Flannel on node 0: its lease is in the store, podnet on the others.
    cluster.subnets.faults().inject(flannels_lease(&cluster, 0));
    for index in [1, 2] {
        cluster.start(index).await;
    }
    let leases = cluster.subnets.leases();
    // What flannel reads of podnet's leases is what it needs to program a peer.
    let node = cluster.lab.nodes()[0].host();
    flannels_device(node, flannels_mac(0), [10, 240, 0, 101], (1, 8472), 1410).await;
    node.add_address(DEVICE, "10.42.0.0/32".parse().unwrap()).await.unwrap();
    node.set_up(DEVICE).await.unwrap();
    for lease in leases.iter().filter(|l| l.node.as_str() != "rke-52b280-0") {
        let offer = lease.offers.iter().find(|o| o.backend == BackendKind::of("vxlan")).unwrap();
        let endpoint = offer.endpoints.v4().unwrap();
        let json = endpoint.data.as_str();
        // The compact form of Go, from which flannel cuts the MAC out of the text.
        assert!(json.starts_with(r#"{"VNI":1,"VtepMAC":""#) && json.ends_with(r#""}"#), "{json}");
        let mac: Vec<u8> = json[20..37].split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        let subnet = IpNetwork::from(*lease.subnets.v4().unwrap());
        flannels_peer(node, subnet, mac.try_into().unwrap(), endpoint.public_ip.into()).await;
    }
    for index in [1, 2] {
        cluster.overlay(index).until(connected(2)).await;
    }
    cluster.assert_pods_talk().await;
}
