//! What befalls the underlay of a real cluster while pods talk over it: one Ethernet, both families, by every way that packets can take
//! from node to node. The network below is the host's to bring back; all that stands on it is podnet's.

use std::time::Duration;

use podnet::Error;
use podnet::lease::Endpoint;
use podnet::status::{ConditionKind, ConditionState, Phase, Status};
use podnet::types::{Family, Stack};
use podnet_lab::cluster::{GATEWAY, GATEWAY_V6, UNDERLAY_INTERFACE};
use podnet_lab::demo::breakage::HostConfiguration;
use podnet_lab::families::everything;
use podnet_lab::host::End;
use podnet_lab::probe::{PingOptions, PingStream};
use podnet_lab::{Families, Host, LabSpec, Route, Underlay, veth};
use podnet_tests::real::stopwatch::Stopwatch;
use podnet_tests::real::{Cluster, DUAL, SOON, STATIC, Way, assert_same, connected, nft, slower};
use podnet_tests::{name, spawn};

/// The ways that put routes onto the underlay itself.
const DIRECT: [Way; 2] = [Way::VxlanDirect, Way::HostGw];

/// An operator's own route to a node's address, by way of the router.
fn detours(cluster: &Cluster, to: usize) -> [Route; 2] {
    let node = &cluster.lab.nodes()[to];
    let via = |family, gateway| Route {
        protocol: STATIC,
        ..Route::via(node.ip_in(family).unwrap().into(), gateway, UNDERLAY_INTERFACE)
    };
    [via(Family::V4, GATEWAY.into()), Route { metric: Some(1024), ..via(Family::V6, GATEWAY_V6.into()) }]
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_with_direct_routing_a_detour_puts_a_peer_into_the_tunnel_and_back_with_no_packet_lost() {
    let cluster = Cluster::talking(Way::VxlanDirect, DUAL, 2).await;
    let (host, eye) = (cluster.host(0), cluster.eye(0));
    let whole = eye.settled();
    assert!(whole.with(&["route 10.42.1.0/24 proto 112", "dev ens4"]).len() == 1, "{whole:#?}");
    let mut streams = Vec::new();
    for (from, to) in [(0, 1), (1, 0)] {
        for family in Family::BOTH {
            let [from, to] = [from, to].map(|node| &cluster.lab.nodes()[node].pods()[0]);
            let stream = PingStream::start(from.netns(), to.ip_in(family).unwrap(), PingOptions::default()).await;
            streams.push(stream.unwrap());
        }
    }
    for _ in 0..3 {
        for detour in detours(&cluster, 1) {
            host.add_route(&detour).await.unwrap();
        }
        eye.until_has(&["route 10.42.1.0/24 proto 112", "dev flannel.1"]);
        eye.until_has(&["route 2001:db8:42:1::/64 proto 112", "dev flannel-v6.1"]);
        cluster.overlay(0).until(connected(1)).await;
        // Not to wait for anything: some pings, one a ms, shall go each way.
        tokio::time::sleep(Duration::from_millis(30)).await;
        for detour in detours(&cluster, 1) {
            host.delete_route(&detour).await.unwrap();
        }
        eye.until("the direct routes are back", |now| *now == whole, &whole);
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    for stream in streams {
        let report = stream.stop().await.unwrap();
        assert!(report.sent > 100 && report.lost == 0, "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_with_host_gw_a_detour_makes_a_peer_unreachable_in_its_family_until_it_goes() {
    let cluster = Cluster::talking(Way::HostGw, DUAL, 2).await;
    let (host, eye) = (cluster.host(0), cluster.eye(0));
    let whole = eye.settled();
    let [detour, _] = detours(&cluster, 1);
    host.add_route(&detour).await.unwrap();
    let status = cluster.overlay(0).until(|s| s.troubled.len() == 1).await;
    assert!(status.to_string().contains("it is behind the gateway 10.240.0.1"), "{status}");
    eye.until_lacks(&["route 10.42.1.0/24 proto 112"]);
    assert!(eye.dump().has(&["route 2001:db8:42:1::/64 proto 112"]), "the other family is not touched");
    let watch = Stopwatch::start(host.netns());
    host.delete_route(&detour).await.unwrap();
    eye.until("the route is back", |now| *now == whole, &whole);
    watch.assert_soon();
    cluster.overlay(0).until(connected(1)).await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_09_the_mtu_of_pods_follows_the_underlay_down_and_up() {
    for way in DIRECT {
        let cluster = Cluster::talking(way, DUAL, 2).await;
        let (host, eye) = (cluster.host(0), cluster.eye(0));
        let whole = eye.settled();
        for mtu in [1400, 1500] {
            let watch = Stopwatch::start(host.netns());
            host.set_mtu(UNDERLAY_INTERFACE, mtu).await.unwrap();
            let wanted = way.pod_mtu(mtu, &DUAL);
            let status = cluster.overlay(0).until(|s| s.pod_mtu.is_some_and(|m| m.bytes() == wanted)).await;
            watch.assert_soon();
            assert!(status.is_ready(), "{status}");
            cluster.assert_pods_talk().await;
        }
        eye.until("all is as before", |now| *now == whole, &whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_all_is_back_within_a_second_of_what_the_host_gives_back_to_a_link_that_was_down() {
    for way in DIRECT {
        let cluster = Cluster::talking(way, DUAL, 2).await;
        let (host, eye) = (cluster.host(0), cluster.eye(0));
        let whole = eye.settled();
        let configuration = HostConfiguration::of(host).await.unwrap();
        host.set_down(UNDERLAY_INTERFACE).await.unwrap();
        cluster.overlay(0).until(|s| !s.is_ready()).await;
        host.set_up(UNDERLAY_INTERFACE).await.unwrap();
        let watch = Stopwatch::start(host.netns());
        configuration.restore(host).await.unwrap();
        eye.until("all is as before", |now| *now == whole, &whole);
        watch.assert_soon();
        cluster.overlay(0).until(connected(1)).await;
        cluster.until_pods_talk().await;
        cluster.assert_pods_talk().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_11_all_is_back_within_a_second_on_an_underlay_that_was_deleted_and_made_again() {
    for way in DIRECT {
        let cluster = Cluster::talking(way, DUAL, 2).await;
        let (host, eye, fabric) = (cluster.host(0), cluster.eye(0), cluster.lab.fabric());
        let whole = eye.settled().ours();
        let configuration = HostConfiguration::of(host).await.unwrap();
        let (before, port) = (host.link(UNDERLAY_INTERFACE).await.unwrap(), cluster.lab.fabric_port(0));
        host.delete_link(UNDERLAY_INTERFACE).await.unwrap();
        let failed = |s: &Status| !s.is_ready() && s.condition(ConditionKind::Underlay).state == ConditionState::Failed;
        cluster.overlay(0).until(failed).await;
        // The same card: an IPv6 neighbour goes on sending to another one's address for half a minute, whoever routes.
        let card = End { mac: before.mac, ..End::new(host, UNDERLAY_INTERFACE) };
        veth(card, End::new(fabric, &port), cluster.lab.spec().mtu()).await.unwrap();
        fabric.add_port("lan", &port, false).await.unwrap();
        assert_ne!(host.link(UNDERLAY_INTERFACE).await.unwrap().index, before.index);
        let watch = Stopwatch::start(host.netns());
        configuration.restore(host).await.unwrap();
        eye.until("the overlay is back", |now| now.ours() == whole, &whole);
        watch.assert_soon();
        cluster.overlay(0).until(connected(1)).await;
        cluster.until_pods_talk().await;
        cluster.assert_pods_talk().await;
    }
}

/// Other addresses of both families for the host, with what belongs to them.
async fn renumber(host: &Host) {
    for (family, old, new, gateway) in [
        (Family::V4, "10.240.0.101/24", "10.240.0.201/24", GATEWAY.into()),
        (Family::V6, "2001:db8:240::101/64", "2001:db8:240::201/64", GATEWAY_V6.into()),
    ] {
        host.delete_address(UNDERLAY_INTERFACE, old.parse().unwrap()).await.unwrap();
        host.add_address(UNDERLAY_INTERFACE, new.parse().unwrap()).await.unwrap();
        let default = Route::via(everything(family), gateway, UNDERLAY_INTERFACE);
        host.replace_route(&Route { metric: Some(100), ..default }).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_other_underlay_addresses_are_published_and_every_peer_follows_within_a_second() {
    for way in DIRECT {
        let cluster = Cluster::talking(way, DUAL, 3).await;
        let watch = Stopwatch::start(cluster.host(0).netns());
        renumber(cluster.host(0)).await;
        for peer in [1, 2] {
            cluster.eye(peer).until_has(&["route 10.42.0.0/24 proto 112", "via 10.240.0.201", "dev ens4"]);
            cluster.eye(peer).until_has(&["route 2001:db8:42::/64 proto 112", "via 2001:db8:240::201", "dev ens4"]);
            assert!(!cluster.eye(peer).dump().has(&["proto 112", "via 10.240.0.101 "]), "nothing leads to the old one");
        }
        watch.assert_soon();
        for node in 0..3 {
            cluster.overlay(node).until(connected(2)).await;
        }
        let lease = cluster.subnets.leases().into_iter().find(|l| l.node == name("rke-52b280-0")).unwrap();
        let published = |endpoint: &Endpoint<_>| endpoint.public_ip;
        let endpoints = &lease.offers[0].endpoints;
        assert_eq!(endpoints.v4().map(published), Some([10, 240, 0, 201].into()));
        assert_eq!(endpoints.v6().unwrap().public_ip.to_string(), "2001:db8:240::201");
        if way == Way::VxlanDirect {
            let now = cluster.eye(0).settled();
            assert!(now.has(&["link flannel.1", "Local(10.240.0.201)"]), "{now:#?}");
            assert!(now.has(&["link flannel-v6.1", "Local6(2001:db8:240::201)"]), "{now:#?}");
        }
        cluster.until_pods_talk().await;
        cluster.assert_pods_talk().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_37_on_an_underlay_that_loses_a_third_pods_get_through_and_podnet_works_as_ever() {
    for way in [Way::Vxlan, Way::HostGw] {
        let cluster = Cluster::talking(way, DUAL, 2).await;
        let fabric = cluster.lab.fabric().netns();
        let whole = [0, 1].map(|node| cluster.eye(node).settled());
        let steps = [0, 1].map(|node| cluster.overlay(node).steps());
        let lossy = [&nft::chance(30)[..], &[nft::verdict(nft::DROP)]].concat();
        nft::commit(
            fabric,
            &[
                nft::table(nft::BRIDGE, "loss"),
                nft::chain(nft::BRIDGE, "loss", "forward", "filter", (nft::FORWARD, 0, nft::ACCEPT)),
                nft::rule(nft::BRIDGE, "loss", "forward", &lossy),
            ],
        );
        let many = PingOptions { count: 100, timeout: Duration::from_millis(100), ..PingOptions::default() };
        for (from, to, report) in cluster.ping_pods(many).await {
            assert!(report.lost > 0, "nothing was lost from {from} to {to}: {report:?}");
        }
        cluster.until_pods_talk().await;
        for node in [0, 1] {
            cluster.overlay(node).overlay.reconcile().await.unwrap();
            assert_same(&whole[node], &cluster.eye(node).settled());
            assert_eq!(cluster.overlay(node).steps(), steps[node]);
        }
        nft::commit(fabric, &[nft::delete_table(nft::BRIDGE, Some("loss"))]);
        cluster.until_pods_talk().await;
        cluster.assert_pods_talk().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_38_pods_talk_again_within_two_seconds_after_a_partition_and_nothing_was_withdrawn_in_it() {
    for way in Way::ALL {
        let mut cluster = Cluster::talking(way, DUAL, 3).await;
        let port = cluster.lab.fabric_port(0);
        let whole = [0, 1, 2].map(|node| cluster.eye(node).settled());
        cluster.lab.fabric().set_down(&port).await.unwrap();
        let parted = PingOptions { timeout: slower(Duration::from_secs(1)), ..PingOptions::default() };
        for (from, to, report) in cluster.ping_pods(parted).await {
            let across = from.contains("-0-pod")
                || to.to_string().starts_with("10.42.0.")
                || to.to_string().starts_with("2001:db8:42::");
            assert_eq!(report.received, u64::from(!across), "{from} to {to}");
        }
        for (node, before) in whole.iter().enumerate() {
            cluster.overlay(node).overlay.reconcile().await.unwrap();
            assert_same(before, &cluster.eye(node).settled());
        }
        // One that starts anew meanwhile takes nothing away either.
        cluster.overlays[0].take().unwrap().abort().await;
        cluster.overlays[0] = Some(spawn(cluster.builder(0)).await);
        cluster.overlay(0).until(|s| s.peers.total == 2).await;
        cluster.overlay(0).overlay.reconcile().await.unwrap();
        assert_same(&whole[0], &cluster.eye(0).settled());

        let watch = Stopwatch::start(cluster.host(0).netns());
        cluster.lab.fabric().set_up(&port).await.unwrap();
        cluster.until_pods_talk().await;
        watch.assert_within(SOON * 2);
        cluster.overlay(0).until(connected(2)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_any_underlay_waits_says_what_is_missing_and_comes_up_with_it() {
    for (way, families) in
        [(Way::Vxlan, Stack::V4(())), (Way::HostGw, Stack::V6(())), (Way::VxlanDirect, DUAL), (Way::HostGw, DUAL)]
    {
        let mut cluster = Cluster::of(way, lan(families)).await;
        cluster.start(1).await;
        let host = cluster.host(0);
        let configuration = HostConfiguration::of(host).await.unwrap();
        host.set_down(UNDERLAY_INTERFACE).await.unwrap();
        for address in host.addresses(UNDERLAY_INTERFACE).await.unwrap() {
            host.delete_address(UNDERLAY_INTERFACE, address).await.unwrap();
        }
        let eye = cluster.eye(0);
        let before = eye.settled();
        let running = spawn(cluster.builder(0)).await;
        let failed = |s: &Status| s.condition(ConditionKind::Underlay).state == ConditionState::Failed;
        let status = running.until(failed).await;
        let family = if families == Stack::V6(()) { Family::V6 } else { Family::V4 };
        let told = status.condition(ConditionKind::Underlay).message;
        assert!(told.contains(&format!("no {family} default route")) && told.contains("ens4"), "{told}");
        assert_eq!(status.phase, Phase::Starting, "{status}");
        assert!(matches!(running.overlay.reconcile().await, Err(Error::NotReady { .. })));
        assert_same(&before, &eye.settled());
        let own = cluster.subnets.leases().into_iter().find(|l| l.node == name("rke-52b280-0"));
        assert!(own.is_none_or(|lease| lease.offers.is_empty()), "nothing is promised to peers");

        host.set_up(UNDERLAY_INTERFACE).await.unwrap();
        configuration.restore(host).await.unwrap();
        running.until(connected(1)).await;
        cluster.overlay(1).until(connected(1)).await;
        cluster.until_pods_talk().await;
        cluster.assert_pods_talk().await;
    }
}

/// One Ethernet with a pod on each of two nodes.
fn lan(families: Families) -> LabSpec {
    let networks = LabSpec::usual_networks(families);
    LabSpec { nodes: 2, pods_per_node: 1, underlay: Underlay::Lan, networks, ..LabSpec::default() }
}
