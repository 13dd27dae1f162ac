//! Harm done to a real kernel by somebody else, and its repair within a second: each fault on a node of a small cluster, with what is
//! not podnet's as it was, and pods that talk afterwards.

use futures::future::try_join_all;
use podnet::HostSetting;
use podnet::driver::netlink::NEXTHOP_BASE;
use podnet::status::Status;
use podnet_lab::cluster::{GATEWAY, UNDERLAY_INTERFACE};
use podnet_lab::host::End;
use podnet_lab::probe::{PingOptions, ping};
use podnet_lab::{Host, Route, veth};
use podnet_tests::real::eye::{Dump, Eye};
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::stopwatch::Stopwatch;
use podnet_tests::real::{
    Cluster, DEVICE, SOON, STATIC, assert_same, builder, connected, heals, lone_host, many, nft, peer, slower, turn,
};
use podnet_tests::{claim, name, spawn};

/// Two nodes, with an operator's own route over the device of the first.
async fn cluster() -> Cluster {
    let cluster = Cluster::running(2).await;
    cluster.add_operators_route(0, 1).await;
    cluster
}

async fn monitor(host: &Host) -> Monitor {
    Monitor::on(host.netns(), host.link(DEVICE).await.unwrap().index)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_podnet_programs_is_what_flannel_would_and_nothing_else_changes() {
    let mut cluster = Cluster::bare(2).await;
    let before = cluster.eye(0).settled();
    cluster.start_all().await;
    let after = cluster.eye(0).settled();
    assert_same(&before, &after.foreign());
    let ours = after.ours();
    for parts in [
        &[
            "link flannel.1 up",
            "Id(1)",
            "Local(10.240.0.101)",
            "underlay ens4",
            "Port(8472)",
            "Learning(false)",
            "Mtu(1410)",
        ][..],
        &["address dev flannel.1 /32", "10.42.0.0"],
        &["neighbour Inet dev flannel.1", "to 10.42.1.0"],
        &["neighbour Bridge dev flannel.1", "to 10.240.0.102"],
        &["route 10.42.1.0/24 proto 112 table 254", "via 10.42.1.0", "onlink"],
    ] {
        assert!(ours.has(parts), "{parts:?} is missing from {ours:#?}");
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_01_a_deleted_route_is_back_within_a_second_and_nothing_else_is_written() {
    let cluster = cluster().await;
    let monitor = monitor(cluster.host(0)).await;
    cluster.heals(0, async { cluster.host(0).delete_route(&cluster.route_to(1)).await.unwrap() }).await;
    assert_eq!(monitor.events(), ["DelRoute 10.42.1.0/24", "NewRoute 10.42.1.0/24"]);
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_02_flushed_routes_are_back_within_a_second() {
    let cluster = Cluster::running(3).await;
    cluster
        .heals(0, async {
            for peer in [1, 2] {
                cluster.host(0).delete_route(&cluster.route_to(peer)).await.unwrap();
            }
        })
        .await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_a_route_replaced_by_one_with_another_gateway_is_corrected_within_a_second() {
    let cluster = cluster().await;
    // As `ip route replace` does it (protocol boot), and under our own number.
    for protocol in [3, podnet::driver::netlink::PROTOCOL] {
        let wrong = Route { gateway: Some([10, 42, 9, 0].into()), protocol, ..cluster.route_to(1) };
        cluster.heals(0, async { cluster.host(0).replace_route(&wrong).await.unwrap() }).await;
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_03_a_foreign_route_in_the_way_is_named_left_alone_and_followed_when_it_goes() {
    let cluster = cluster().await;
    let whole = cluster.eye(0).settled();
    let subnet = "10.42.1.0/24".parse().unwrap();
    for (foreign, device) in [
        (Route::via(subnet, GATEWAY.into(), UNDERLAY_INTERFACE).onlink(), "ens4"),
        // Without a gateway, it reads as a network that the host is connected to.
        (Route::onto(subnet, "docker0"), "docker0"),
    ] {
        let foreign = Route { protocol: STATIC, ..foreign };
        cluster.host(0).replace_route(&foreign).await.unwrap();
        let status = cluster.overlay(0).until(|s| s.peers.connected == 0 && s.troubled.len() == 1).await;
        let trouble = status.troubled[0].families[0].state.to_string();
        assert!(trouble.contains("10.42.1.0/24") && trouble.contains(device), "{trouble}");
        assert!(status.is_ready(), "one peer's trouble is not this node's: {status}");
        assert!(cluster.eye(0).dump().has(&["route 10.42.1.0/24 proto 4", device]));
        let watch = Stopwatch::start(cluster.host(0).netns());
        cluster.host(0).delete_route(&foreign).await.unwrap();
        cluster.eye(0).until("ours is back", |now| *now == whole, &whole);
        watch.assert_soon();
        cluster.overlay(0).until(connected(1)).await;
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_04_a_deleted_neighbour_is_back_within_a_second() {
    let cluster = cluster().await;
    cluster.heals(0, async { cluster.host(0).delete_neighbour(DEVICE, [10, 42, 1, 0].into()).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_05_a_deleted_and_a_moved_forwarding_entry_are_put_right_within_a_second() {
    let cluster = cluster().await;
    let mac = cluster.eye(1).dump().mac(DEVICE);
    cluster.heals(0, async { cluster.host(0).delete_fdb(DEVICE, mac).await.unwrap() }).await;
    let elsewhere = [10, 240, 0, 66].into();
    cluster.heals(0, async { cluster.host(0).add_fdb(DEVICE, mac, elsewhere).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_entries_on_our_device_are_removed_and_an_operators_route_stays() {
    let cluster = cluster().await;
    let stray = [2, 0, 0, 0, 0, 99];
    cluster.heals(0, async { cluster.host(0).add_fdb(DEVICE, stray, [10, 240, 0, 66].into()).await.unwrap() }).await;
    cluster
        .heals(0, async { cluster.host(0).add_neighbour(DEVICE, [10, 42, 99, 0].into(), stray).await.unwrap() })
        .await;
    assert!(cluster.eye(0).dump().has(&["route 192.168.77.0/24 proto 4", "flannel.1"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_06_a_device_that_goes_down_and_up_gets_its_routes_and_neighbours_back_within_a_second() {
    let cluster = Cluster::running(2).await;
    cluster
        .heals(0, async {
            cluster.host(0).set_down(DEVICE).await.unwrap();
            cluster.host(0).set_up(DEVICE).await.unwrap();
        })
        .await;
    cluster.assert_pods_talk().await;
    // And one that somebody only sets down.
    cluster.heals(0, async { cluster.host(0).set_down(DEVICE).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_07_a_deleted_device_is_back_within_a_second_with_the_same_mac_and_peers_change_nothing() {
    let cluster = Cluster::running(2).await;
    let peer = monitor(cluster.host(1)).await;
    cluster.heals(0, async { cluster.host(0).delete_link(DEVICE).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
    assert_eq!(peer.events(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_02_06_07_with_nexthop_objects_too_everything_is_back_within_a_second() {
    let _turn = turn().await;
    let host = lone_host("large").await;
    let subnets = many(300);
    let running = spawn(builder("me", host.netns(), subnets.clone())).await;
    running.until(connected(300)).await;
    let eye = Eye::on(host.netns());
    assert_eq!(eye.settled().with(&["nexthop proto 112"]).len(), 300);
    heals(&eye, &running, async { nft::delete_nexthop(host.netns(), NEXTHOP_BASE + 7) }).await;
    let mut routes = host.routes().await.unwrap();
    routes.retain(|r| r.nexthop_id.is_some());
    heals(&eye, &running, async {
        // At once: one after the other they would take the most part of the second, on a busy machine.
        try_join_all(routes.iter().map(|route| host.delete_route(route))).await.unwrap();
    })
    .await;
    heals(&eye, &running, async {
        host.set_down(DEVICE).await.unwrap();
        host.set_up(DEVICE).await.unwrap();
    })
    .await;
    heals(&eye, &running, async { host.delete_link(DEVICE).await.unwrap() }).await;
    // An operator's plain route in the place of one of ours.
    let plain = Route::via("10.64.9.0/24".parse().unwrap(), [10, 64, 9, 0].into(), DEVICE).onlink();
    heals(&eye, &running, async { host.replace_route(&plain).await.unwrap() }).await;
    running.until(connected(300)).await;
    assert!(running.overlay.reconcile().await.unwrap().done.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_33_a_node_made_again_with_another_subnet_mac_and_address_leaves_nothing_behind() {
    let host = lone_host("renewed").await;
    let subnets = many(300);
    let running = spawn(builder("me", host.netns(), subnets.clone())).await;
    running.until(connected(300)).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled();
    let again = claim("node-7", 9999, "10.70.7.0/24", "10.240.77.7", "02:00:00:00:77:07");
    subnets.faults().inject(again);
    eye.until_has(&["route 10.70.7.0/24 proto 112"]);
    for left in ["10.64.7.0", "02:00:00:00:00:07", "10.240.1.7"] {
        eye.until_lacks(&["flannel.1", &format!("{left} ")]);
        eye.until("no line ends with it", |now| !now.lines().iter().any(|l| l.ends_with(left)), &whole);
    }
    subnets.faults().inject(peer(7));
    eye.until("all is as before", |now| *now == whole, &whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_32_two_nodes_that_swap_their_addresses_end_exactly_swapped() {
    let host = lone_host("swapped").await;
    let subnets = many(3);
    let running = spawn(builder("me", host.netns(), subnets.clone())).await;
    running.until(connected(3)).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled();
    let at = |number: u16, address: &str| {
        let mac = format!("02:00:00:00:00:{number:02x}");
        claim(&format!("node-{number}"), number.into(), &format!("10.64.{number}.0/24"), address, &mac)
    };
    subnets.faults().inject(at(1, "10.240.1.2"));
    subnets.faults().inject(at(2, "10.240.1.1"));
    // A node's route is the last that comes back.
    let swapped = |now: &Dump| {
        now.has(&["02:00:00:00:00:01 to 10.240.1.2"])
            && now.has(&["02:00:00:00:00:02 to 10.240.1.1"])
            && now.with(&["neighbour Bridge dev flannel.1"]).len() == 3
            && now.lines().len() == whole.lines().len()
    };
    eye.until("the two are swapped, and nothing else is there", swapped, &whole);
    running.until(connected(3)).await;
    assert!(swapped(&eye.settled()));
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_09_the_mtu_is_put_back_and_follows_the_underlay() {
    let cluster = cluster().await;
    cluster.heals(0, async { cluster.host(0).set_mtu(DEVICE, 1300).await.unwrap() }).await;
    let watch = Stopwatch::start(cluster.host(0).netns());
    cluster.host(0).set_mtu(UNDERLAY_INTERFACE, 1400).await.unwrap();
    cluster.eye(0).until_has(&["link flannel.1", "Mtu(1350)"]);
    watch.assert_soon();
    let status = cluster.overlay(0).until(|s| s.pod_mtu.is_some_and(|mtu| mtu.bytes() == 1350)).await;
    assert!(status.is_ready(), "{status}");
    cluster.host(0).set_mtu(UNDERLAY_INTERFACE, 1460).await.unwrap();
    cluster.eye(0).until_has(&["link flannel.1", "Mtu(1410)"]);
    cluster.assert_pods_talk().await;
}

/// What a DHCP client does when the link is there again.
async fn readdress(host: &Host, address: [u8; 4]) {
    let gateway = "10.240.0.1/32".parse().unwrap();
    let present = host.addresses(UNDERLAY_INTERFACE).await.unwrap();
    let wanted = ipnetwork::IpNetwork::new(address.into(), 32).unwrap();
    if !present.contains(&wanted) {
        host.add_address(UNDERLAY_INTERFACE, wanted).await.unwrap();
    }
    host.add_route(&Route::onto(gateway, UNDERLAY_INTERFACE).from_dhcp(address.into(), 100)).await.unwrap();
    let default = Route::via("0.0.0.0/0".parse().unwrap(), GATEWAY.into(), UNDERLAY_INTERFACE);
    host.add_route(&default.from_dhcp(address.into(), 100)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_an_underlay_that_goes_down_and_up_finds_the_overlay_untouched() {
    let cluster = cluster().await;
    let (eye, host) = (cluster.eye(0), cluster.host(0));
    let whole = eye.settled();
    let monitor = monitor(host).await;
    host.set_down(UNDERLAY_INTERFACE).await.unwrap();
    eye.until_lacks(&["route default", "ens4"]);
    cluster.overlay(0).until(|s| !s.is_ready()).await;
    assert_same(&whole.ours(), &eye.dump().ours());
    host.set_up(UNDERLAY_INTERFACE).await.unwrap();
    let watch = Stopwatch::start(host.netns());
    readdress(host, [10, 240, 0, 101]).await;
    cluster.overlay(0).until(Status::is_ready).await;
    watch.assert_soon();
    eye.until("all is as before", |now| *now == whole, &whole);
    let ours: Vec<String> =
        monitor.events().into_iter().filter(|e| !e.ends_with(" /0") && !e.contains("10.240.0.")).collect();
    assert_eq!(ours, Vec::<String>::new(), "nothing of ours was written");
    // The wire takes packets a moment after it has its carrier.
    host.wait_running(UNDERLAY_INTERFACE, slower(SOON * 10)).await.unwrap();
    let port = cluster.lab.fabric_port(0);
    cluster.lab.fabric().wait_running(&port, slower(SOON * 10)).await.unwrap();
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_11_an_underlay_that_is_deleted_and_made_again_gets_its_overlay_back_within_a_second() {
    let cluster = Cluster::running(2).await;
    let (eye, host) = (cluster.eye(0), cluster.host(0));
    let whole = eye.settled();
    let (index, port) = (host.link(UNDERLAY_INTERFACE).await.unwrap().index, cluster.lab.fabric_port(0));
    host.delete_link(UNDERLAY_INTERFACE).await.unwrap();
    eye.until_lacks(&["link flannel.1"]);
    veth(End::new(host, UNDERLAY_INTERFACE), End::new(cluster.lab.fabric(), &port), 1460).await.unwrap();
    assert_ne!(host.link(UNDERLAY_INTERFACE).await.unwrap().index, index);
    cluster.lab.fabric().add_address(&port, "10.240.0.1/32".parse().unwrap()).await.unwrap();
    let to_node = Route { source: Some(GATEWAY.into()), ..Route::onto("10.240.0.101/32".parse().unwrap(), &port) };
    cluster.lab.fabric().add_route(&to_node).await.unwrap();
    let watch = Stopwatch::start(host.netns());
    readdress(host, [10, 240, 0, 101]).await;
    let ours = whole.ours();
    eye.until("the overlay is back", |now| now.ours() == ours, &ours);
    watch.assert_soon();
    cluster.overlay(0).until(connected(1)).await;
    host.wait_running(UNDERLAY_INTERFACE, slower(SOON * 10)).await.unwrap();
    cluster.lab.fabric().wait_running(&port, slower(SOON * 10)).await.unwrap();
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_a_new_underlay_address_is_followed_by_the_device_the_lease_and_every_peer() {
    let mut cluster = Cluster::lan(3).await;
    cluster.start_all().await;
    let host = cluster.host(0);
    let index = host.link(DEVICE).await.unwrap().index;
    let watch = Stopwatch::start(host.netns());
    host.delete_address(UNDERLAY_INTERFACE, "10.240.0.101/24".parse().unwrap()).await.unwrap();
    host.add_address(UNDERLAY_INTERFACE, "10.240.0.201/24".parse().unwrap()).await.unwrap();
    let default = Route::via("0.0.0.0/0".parse().unwrap(), GATEWAY.into(), UNDERLAY_INTERFACE);
    host.add_route(&default.from_dhcp([10, 240, 0, 201].into(), 100)).await.unwrap();
    cluster.eye(0).until_has(&["link flannel.1", "Local(10.240.0.201)"]);
    for peer in [1, 2] {
        cluster.eye(peer).until_has(&["neighbour Bridge dev flannel.1", "to 10.240.0.201"]);
        cluster.eye(peer).until_lacks(&["neighbour Bridge dev flannel.1", "to 10.240.0.101"]);
    }
    watch.assert_soon();
    assert_eq!(host.link(DEVICE).await.unwrap().index, index, "altered in place, not made anew");
    let lease = cluster.subnets.leases().into_iter().find(|l| l.node == name("rke-52b280-0")).unwrap();
    assert_eq!(lease.offers[0].endpoints.v4().unwrap().public_ip.octets(), [10, 240, 0, 201]);
    for node in 0..3 {
        cluster.overlay(node).until(connected(2)).await;
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_13_a_deleted_table_and_a_flushed_ruleset_are_back_within_a_second() {
    let cluster = cluster().await;
    let netns = cluster.host(0).netns();
    cluster.heals(0, async { nft::commit(netns, &[nft::delete_table(nft::IPV4, Some("podnet"))]) }).await;

    let (eye, ours) = (cluster.eye(0), cluster.eye(0).settled().ours());
    let watch = Stopwatch::start(cluster.host(0).netns());
    nft::commit(netns, &[nft::delete_table(nft::ALL, None)]);
    eye.until("our table is back", |now| now.ours() == ours, &ours);
    watch.assert_soon();
    assert!(!eye.dump().has(&["nft ip lab-services"]), "what others had there is theirs to bring back");
    assert_masqueraded(&cluster).await;
}

/// The world outside answers a pod: it would not if it saw the pod's own address.
async fn assert_masqueraded(cluster: &Cluster) {
    let pod = &cluster.lab.nodes()[0].pods()[0];
    let outside = podnet_lab::cluster::OUTSIDE.into();
    assert!(ping(pod.netns(), outside, PingOptions::default()).await.unwrap().all_answered());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_14_a_deleted_rule_and_a_changed_order_are_put_right_within_a_second() {
    let cluster = cluster().await;
    let netns = cluster.host(0).netns();
    let rules = nft::rules(netns, nft::IPV4, "podnet");
    assert!(rules.len() >= 6, "{rules:?}");
    // The one that masquerades pods to the outside.
    let rule = &rules[rules.len() - 2];
    cluster.heals(0, async { nft::commit(netns, &[nft::delete_rule(nft::IPV4, "podnet", rule)]) }).await;
    assert_masqueraded(&cluster).await;

    let rules = nft::rules(netns, nft::IPV4, "podnet");
    let first = rules.iter().find(|r| r.chain == rules[rules.len() - 1].chain).unwrap();
    let moved = [nft::delete_rule(nft::IPV4, "podnet", first), nft::append_rule(nft::IPV4, "podnet", first)];
    cluster.heals(0, async { nft::commit(netns, &moved) }).await;

    // Somebody's own rule in our table goes too: the table is ours as a whole.
    let chain = &rules[0].chain;
    let added = nft::rule(nft::IPV4, "podnet", chain, &[nft::verdict(nft::DROP)]);
    cluster.heals(0, async { nft::commit(netns, &[added]) }).await;
    cluster.assert_pods_talk().await;
    assert_masqueraded(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_16_forwarding_that_is_switched_off_is_on_again_within_a_second() {
    let cluster = cluster().await;
    let host = cluster.host(0);
    let watch = Stopwatch::start(host.netns());
    host.set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    podnet_lab::wait_until("forwarding is on again", SOON * 10, || async {
        Ok(host.sysctl("net.ipv4.ip_forward")? == "1")
    })
    .await
    .unwrap();
    watch.assert_soon();
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_16_forwarding_is_only_reported_where_that_was_asked_for() {
    let cluster = Cluster::bare(1).await;
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    let running = spawn(cluster.builder(0).ip_forward(HostSetting::Report)).await;
    let told = |s: &Status| s.is_ready() && s.warnings.iter().any(|w| w.with.contains("ip_forward = 0"));
    running.until(told).await;
    assert_eq!(cluster.host(0).sysctl("net.ipv4.ip_forward").unwrap(), "0");
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    running.until(|s| !s.warnings.iter().any(|w| w.with.contains("ip_forward"))).await;
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    running.until(told).await;
}
