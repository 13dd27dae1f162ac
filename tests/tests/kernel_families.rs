//! Both families on a real kernel: IPv6's own objects healed as IPv4's are, each family untouched by what befalls the other, and
//! host-gw's routes over the underlay. One host with many peers that nobody answers for; pods that talk are in the demo.

use podnet::driver::netlink::PROTOCOL;
use podnet::lease::BackendData;
use podnet::status::Status;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{Family, Stack};
use podnet::{HostSetting, Shutdown};
use podnet_host_gw::HostGw;
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::{Host, Route};
use podnet_tests::real::dual::{self, builder, peer, store, wide_link};
use podnet_tests::real::eye::{Dump, Eye};
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::stopwatch::Stopwatch;
use podnet_tests::real::{assert_same, connected, heals, turn};
use podnet_tests::{Running, name, spawn};
use podnet_vxlan::Vxlan;

const DEVICE_V6: &str = "flannel-v6.1";

async fn vxlan(host: &Host, peers: u16) -> (MemorySubnets, Running) {
    let subnets = store("vxlan", peers);
    let running = spawn(builder(host, &subnets, Vxlan::new())).await;
    running.until(connected(usize::from(peers))).await;
    Eye::on(host.netns()).until_has(&["route 2001:db8:40ff:ffff::/128", "table 255 Local"]);
    (subnets, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_podnet_programs_in_ipv6_is_what_flannel_would() {
    let _turn = turn().await;
    let host = dual::host("six").await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let (_subnets, running) = vxlan(&host, 2).await;
    let after = eye.settled();
    assert_same(&before, &after.foreign());
    for parts in [
        &["link flannel-v6.1 up", "Id(1)", "Local6(2001:db8:240::103)", "underlay ens4", "Port(8472)", "Mtu(1430)"][..],
        &["address dev flannel-v6.1 /128", "2001:db8:40ff:ffff::"],
        &["neighbour Inet6 dev flannel-v6.1", "to 2001:db8:4000:1::"],
        &["neighbour Bridge dev flannel-v6.1", "to 2001:db8:240::1:1"],
        &["route 2001:db8:4000:1::/64 proto 112 table 254", "via 2001:db8:4000:1::", "onlink", "1024"],
        &["link flannel.1 up", "Mtu(1450)"],
        &["nft ip6 podnet"],
    ] {
        assert!(after.has(parts), "{parts:?} is missing from {after:#?}");
    }
    for device in ["flannel.1", DEVICE_V6] {
        let path = format!("/proc/sys/net/ipv6/conf/{device}/accept_ra");
        let value = host.netns().run(move || std::fs::read_to_string(path)).unwrap().unwrap();
        assert_eq!(value.trim(), "0", "{device} listens to no router");
    }
    assert!(after.with(&["flannel-v6.1", "fe80"]).is_empty(), "no link-local address");
    assert_eq!(running.overlay.status().borrow().pod_mtu.unwrap().bytes(), 1430);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_01_to_07_in_ipv6_each_object_is_back_within_a_second_and_ipv4_is_not_touched() {
    let _turn = turn().await;
    let host = dual::host("healed").await;
    let (_subnets, running) = vxlan(&host, 3).await;
    let eye = Eye::on(host.netns());
    let of_v4 = Monitor::on(host.netns(), host.link("flannel.1").await.unwrap().index);
    let subnet = "2001:db8:4000:1::/64".parse().unwrap();
    let route = Route {
        protocol: PROTOCOL,
        metric: Some(1024),
        ..Route::via(subnet, "2001:db8:4000:1::".parse().unwrap(), DEVICE_V6).onlink()
    };
    let vtep = "2001:db8:4000:1::".parse().unwrap();
    heals(&eye, &running, async { host.delete_route(&route).await.unwrap() }).await;
    heals(&eye, &running, async { host.delete_neighbour(DEVICE_V6, vtep).await.unwrap() }).await;
    heals(&eye, &running, async {
        host.delete_fdb(DEVICE_V6, [2, 0, 0, 6, 0, 1]).await.unwrap();
    })
    .await;
    heals(&eye, &running, async {
        host.set_down(DEVICE_V6).await.unwrap();
        host.set_up(DEVICE_V6).await.unwrap();
    })
    .await;
    heals(&eye, &running, async { host.delete_link(DEVICE_V6).await.unwrap() }).await;
    heals(&eye, &running, async { host.set_mtu(DEVICE_V6, 1300).await.unwrap() }).await;
    let own = "2001:db8:40ff:ffff::/128".parse().unwrap();
    heals(&eye, &running, async { host.delete_address(DEVICE_V6, own).await.unwrap() }).await;
    assert_eq!(of_v4.events(), Vec::<String>::new(), "nothing of IPv4 was written");
    running.until(connected(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_12_and_13_in_ipv6_another_address_and_lost_rules_are_followed_within_a_second() {
    let _turn = turn().await;
    let host = dual::host("moved").await;
    let (subnets, running) = vxlan(&host, 3).await;
    let eye = Eye::on(host.netns());
    heals(&eye, &running, async { podnet_lab::firewall::delete_table(&host, "ip6 podnet").unwrap() }).await;
    let watch = Stopwatch::start(host.netns());
    host.add_address(UNDERLAY_INTERFACE, "2001:db8:240::99/64".parse().unwrap()).await.unwrap();
    host.delete_address(UNDERLAY_INTERFACE, "2001:db8:240::103/64".parse().unwrap()).await.unwrap();
    eye.until_has(&["link flannel-v6.1", "Local6(2001:db8:240::99)"]);
    watch.assert_soon();
    podnet_tests::eventually("it is published", || published_v6(&subnets) == "2001:db8:240::99").await;
    running.until(connected(3)).await;
}

/// What this node published of IPv6.
fn published_v6(subnets: &MemorySubnets) -> String {
    let own = subnets.leases().into_iter().find(|l| l.node == name("me")).unwrap();
    own.offers[0].endpoints.v6().unwrap().public_ip.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_12_a_deprecated_ipv6_address_gives_way_to_another_and_stays_where_there_is_none() {
    let _turn = turn().await;
    let host = dual::host("deprecated").await;
    let (subnets, running) = vxlan(&host, 3).await;
    let eye = Eye::on(host.netns());
    let of_v4 = Monitor::on(host.netns(), host.link("flannel.1").await.unwrap().index);
    let (old, new) = ("2001:db8:240::103/64".parse().unwrap(), "2001:db8:240::99/64".parse().unwrap());
    // The only one: it is what there is, and it works.
    let (whole, steps) = (eye.settled(), running.steps());
    host.deprecate_address(UNDERLAY_INTERFACE, old).await.unwrap();
    running.overlay.reconcile().await.unwrap();
    assert_same(&whole, &eye.settled());
    assert_eq!((published_v6(&subnets).as_str(), running.steps()), ("2001:db8:240::103", steps));

    let watch = Stopwatch::start(host.netns());
    host.add_address(UNDERLAY_INTERFACE, new).await.unwrap();
    eye.until_has(&["link flannel-v6.1", "Local6(2001:db8:240::99)"]);
    watch.assert_soon();
    podnet_tests::eventually("it is published", || published_v6(&subnets) == "2001:db8:240::99").await;

    // The other way round: a good one is there already when the one in use is deprecated.
    host.delete_address(UNDERLAY_INTERFACE, old).await.unwrap();
    host.add_address(UNDERLAY_INTERFACE, old).await.unwrap();
    let watch = Stopwatch::start(host.netns());
    host.deprecate_address(UNDERLAY_INTERFACE, new).await.unwrap();
    eye.until_has(&["link flannel-v6.1", "Local6(2001:db8:240::103)"]);
    watch.assert_soon();
    podnet_tests::eventually("it is published", || published_v6(&subnets) == "2001:db8:240::103").await;
    running.until(connected(3)).await;
    assert_eq!(of_v4.events(), Vec::<String>::new(), "IPv4 was not touched");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_34_another_mac_of_a_peer_replaces_its_neighbours_and_forwarding_entries_and_touches_no_route() {
    let _turn = turn().await;
    let host = dual::host("remade").await;
    let (subnets, running) = vxlan(&host, 3).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled();
    let mut monitors = Vec::new();
    for device in ["flannel.1", DEVICE_V6] {
        monitors.push(Monitor::on(host.netns(), host.link(device).await.unwrap().index));
    }
    // As peer 1's, in another's place: the last byte of each MAC is 9.
    let mut lease = peer("vxlan", 1);
    let Stack::Dual(v4, v6) = &mut lease.offers[0].endpoints else { panic!("both families") };
    for data in [&mut v4.data, &mut v6.data] {
        *data = BackendData::from_text(&data.as_str().replace(":01\"}", ":09\"}")).unwrap();
    }
    let watch = Stopwatch::start(host.netns());
    subnets.faults().inject(lease);
    let wanted = Dump::of(whole.lines().iter().map(|line| match line.starts_with("neighbour") {
        true => {
            line.replace("02:00:00:04:00:01", "02:00:00:04:00:09").replace("02:00:00:06:00:01", "02:00:00:06:00:09")
        }
        false => line.clone(),
    }));
    assert_eq!(whole.difference(&wanted).lines().count(), 8, "two entries of each family, before and after");
    eye.until("the entries are others", |now| *now == wanted, &wanted);
    watch.assert_soon();
    for monitor in monitors {
        let events = monitor.events();
        assert!(events.iter().all(|e| e.contains("Neighbour ")), "neither routes nor devices: {events:?}");
        // A neighbour replaced, a forwarding entry made and one deleted.
        assert_eq!(events.len(), 3, "{events:?}");
    }
    running.until(connected(3)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_underlay_that_loses_its_ipv6_keeps_ipv4_and_all_of_ipv6_comes_back_with_it() {
    let _turn = turn().await;
    let host = dual::host("halved").await;
    let (_subnets, running) = vxlan(&host, 3).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled();
    host.delete_address(UNDERLAY_INTERFACE, "2001:db8:240::103/64".parse().unwrap()).await.unwrap();
    let status = running.until(|s| !s.is_ready_in(Family::V6)).await;
    assert!(status.is_ready_in(Family::V4), "{status}");
    assert_same(&whole.ours(), &eye.settled().ours());
    host.add_address(UNDERLAY_INTERFACE, "2001:db8:240::103/64".parse().unwrap()).await.unwrap();
    running.until(Status::is_ready).await;
    assert_same(&whole.ours(), &eye.settled().ours());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_18_and_42_a_restart_over_a_thousand_peers_of_two_families_writes_nothing_and_removal_leaves_nothing() {
    let _turn = turn().await;
    let host = dual::host("thousand").await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let (subnets, running) = vxlan(&host, 1000).await;
    let whole = eye.settled();
    assert_eq!(whole.with(&["route ", " proto 112 "]).len(), 2000);
    let monitors = [
        Monitor::on(host.netns(), host.link("flannel.1").await.unwrap().index),
        Monitor::on(host.netns(), host.link(DEVICE_V6).await.unwrap().index),
    ];
    running.abort().await;
    let running = spawn(builder(&host, &subnets, Vxlan::new())).await;
    running.until(connected(1000)).await;
    for monitor in monitors {
        assert_eq!(monitor.events(), Vec::<String>::new());
    }
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_same(&before, &eye.settled());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_underlay_keeps_what_routers_announced_when_forwarding_is_switched_on() {
    let _turn = turn().await;
    let host = dual::host("listening").await;
    host.set_sysctl("net.ipv6.conf.all.forwarding", "0").unwrap();
    let accept_ra = || host.sysctl(&format!("net.ipv6.conf.{UNDERLAY_INTERFACE}.accept_ra")).unwrap();
    host.set_sysctl(&format!("net.ipv6.conf.{UNDERLAY_INTERFACE}.accept_ra"), "1").unwrap();
    let (_subnets, running) = vxlan(&host, 1).await;
    assert_eq!((accept_ra().as_str(), host.sysctl("net.ipv6.conf.all.forwarding").unwrap().as_str()), ("2", "1"));
    drop(running);

    let host = dual::host("left-alone").await;
    host.set_sysctl("net.ipv6.conf.all.forwarding", "0").unwrap();
    host.set_sysctl(&format!("net.ipv6.conf.{UNDERLAY_INTERFACE}.accept_ra"), "1").unwrap();
    let subnets = store("vxlan", 1);
    let node = builder(&host, &subnets, Vxlan::new()).router_advertisements(HostSetting::Ignore);
    spawn(node).await.until(connected(1)).await;
    assert_eq!(host.sysctl(&format!("net.ipv6.conf.{UNDERLAY_INTERFACE}.accept_ra")).unwrap(), "1");
}

async fn host_gw(host: &Host, peers: u16) -> (MemorySubnets, Running) {
    let subnets = store("host-gw", peers);
    let running = spawn(builder(host, &subnets, HostGw::new())).await;
    running.until(connected(usize::from(peers))).await;
    (subnets, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn host_gw_routes_over_the_underlay_in_both_families_and_changes_nothing_else() {
    let _turn = turn().await;
    let host = dual::host("routed").await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let (_subnets, running) = host_gw(&host, 2).await;
    let after = eye.settled();
    assert_same(&before, &after.foreign());
    for parts in [
        &["route 10.64.1.0/24 proto 112 table 254", "via 10.240.1.1", "ens4"][..],
        &["route 2001:db8:4000:1::/64 proto 112 table 254", "via 2001:db8:240::1:1", "ens4"],
    ] {
        assert!(after.has(parts), "{parts:?} is missing from {after:#?}");
    }
    assert!(after.with(&["proto 112", "onlink"]).is_empty(), "never forced");
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_same(&before, &eye.settled());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_10_host_gw_routes_are_back_within_a_second_of_the_underlays_link() {
    let _turn = turn().await;
    let host = dual::host("flapped").await;
    let (_subnets, running) = host_gw(&host, 300).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled().ours();
    assert_eq!(whole.with(&["nexthop proto 112"]).len(), 300, "an object for each IPv4 gateway");
    for _ in 0..2 {
        host.set_down(UNDERLAY_INTERFACE).await.unwrap();
        running.until(|s| s.peers.connected == 0 && s.to_string().contains("ens4 is down")).await;
        host.set_up(UNDERLAY_INTERFACE).await.unwrap();
        let watch = Stopwatch::start(host.netns());
        // The host gives back what went with the link: routes of its own, and IPv6 addresses. Nobody brings the default routes.
        host.add_route(&wide_link()).await.unwrap();
        host.add_address(UNDERLAY_INTERFACE, "2001:db8:240::103/64".parse().unwrap()).await.unwrap();
        eye.until("the routes are back", |now| now.ours() == whole, &whole);
        watch.assert_soon();
    }
    running.until(|s| s.peers.connected == 300).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_01_to_03_with_host_gw_a_route_is_back_within_a_second() {
    let _turn = turn().await;
    let host = dual::host("undone").await;
    let (_subnets, running) = host_gw(&host, 3).await;
    let eye = Eye::on(host.netns());
    let v4 = Route::via("10.64.1.0/24".parse().unwrap(), [10, 240, 1, 1].into(), UNDERLAY_INTERFACE);
    let v6 = Route {
        metric: Some(1024),
        ..Route::via("2001:db8:4000:1::/64".parse().unwrap(), "2001:db8:240::1:1".parse().unwrap(), UNDERLAY_INTERFACE)
    };
    for route in [v4.clone(), v6] {
        let ours = Route { protocol: PROTOCOL, ..route };
        heals(&eye, &running, async { host.delete_route(&ours).await.unwrap() }).await;
    }
    // What an operator or a flannel that is still there writes: protocol boot, another gateway.
    let wrong = Route { gateway: Some([10, 240, 1, 2].into()), ..v4 };
    heals(&eye, &running, async { host.replace_route(&wrong).await.unwrap() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_flannels_host_gw_routes_are_taken_over_with_no_moment_without_them() {
    let _turn = turn().await;
    let host = dual::host("taken-over").await;
    let eye = Eye::on(host.netns());
    let boot = |subnet: &str, gateway: [u8; 4]| Route::via(subnet.parse().unwrap(), gateway.into(), UNDERLAY_INTERFACE);
    host.add_route(&boot("10.64.1.0/24", [10, 240, 1, 1])).await.unwrap();
    host.add_route(&boot("10.64.9.0/24", [10, 240, 1, 9])).await.unwrap();
    let monitor = Monitor::on(host.netns(), host.link(UNDERLAY_INTERFACE).await.unwrap().index);
    let subnets = store("host-gw", 0);
    subnets.faults().inject(peer("host-gw", 1));
    let running = spawn(builder(&host, &subnets, HostGw::new())).await;
    running.until(connected(1)).await;
    eye.until_lacks(&["route 10.64.9.0/24"]);
    let events: Vec<String> = monitor.events().into_iter().filter(|e| e.contains("10.64.")).collect();
    assert_eq!(events, ["NewRoute 10.64.1.0/24", "DelRoute 10.64.9.0/24"], "replaced, never deleted");
    assert!(eye.dump().has(&["route 10.64.1.0/24 proto 112"]));
}
