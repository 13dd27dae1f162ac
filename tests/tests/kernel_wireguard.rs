//! What encryption is worth where the kernel does it: nothing of a pod in plain text on the underlay whatever is broken, no packet lost over
//! a restart, whole packets up to the MTU, and peers that move. On wireguard-go where the kernel has no WireGuard.
//!
//! Captures are the witness here, and the one that must find nothing is shown to find something once podnet's guard is gone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use futures::TryStreamExt as _;
use netlink_packet_route::route::{RouteHeader, RouteMessage, RouteProtocol, RouteType};
use podnet::Shutdown;
use podnet::subnet::SubnetError;
use podnet::subnet::memory::Call;
use podnet::types::{Family, Stack};
use podnet_lab::cluster::{UNDERLAY_INTERFACE, gateway};
use podnet_lab::probe::{Capture, Frame, PingOptions, PingStream, ping};
use podnet_lab::{Families, Host, LabSpec, Netns, Route, Underlay, wait_until};
use podnet_tests::real::flannel::{flannels_device, flannels_peer};
use podnet_tests::real::nft::{IPV4, IPV6, commit, delete_table, rules};
use podnet_tests::real::wireguard::{Cluster, PATIENCE, is_boringtun, skipped, wg, wg_set};
use podnet_tests::real::{self, DEVICE, connected, slower};
use podnet_tests::{Running, skipping, spawn};
use rtnetlink::{LinkWireguard, RouteMessageBuilder};
use tokio::task::JoinHandle;

/// Datagrams from a pod to another, one a millisecond, whether they arrive or not. They end with this.
struct Chatter(JoinHandle<()>);

impl Chatter {
    fn start(from: (&Netns, IpAddr), to: IpAddr) -> Chatter {
        let socket = from.0.udp_socket(SocketAddr::new(from.1, 7001)).unwrap();
        Chatter(tokio::spawn(async move {
            let mut ticks = tokio::time::interval(slower(Duration::from_millis(1)));
            loop {
                ticks.tick().await;
                // That nobody can be reached is what is looked at.
                let _ = socket.send_to(b"a secret", SocketAddr::new(to, 7001)).await;
            }
        }))
    }
}

impl Drop for Chatter {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A frame with an address of the cluster network outside: a packet of a pod that is not encrypted.
fn is_plain(frame: &Frame) -> bool {
    let pods = LabSpec::usual_networks(Stack::Dual((), ()));
    let inside = |address| match address {
        IpAddr::V4(a) => pods.v4().is_some_and(|network| network.contains(a)),
        IpAddr::V6(a) => pods.v6().is_some_and(|network| network.contains(a)),
    };
    frame.vxlan.is_some() || frame.ip.is_some_and(|ip| inside(ip.source) || inside(ip.destination))
}

fn is_sealed(frame: &Frame) -> bool {
    frame.udp.is_some_and(|udp| udp.source == udp.destination && [51_820, 51_821].contains(&udp.source))
}

async fn start_encrypted(cluster: &mut Cluster, index: usize) {
    cluster.running[index] = Some(spawn(cluster.builder(index).require_encryption(true)).await);
}

/// Two nodes on which encryption is required, and that know each other.
async fn encrypted(families: Families) -> Cluster {
    let mut cluster = Cluster::of(2, families, |_, backend| backend).await;
    for index in 0..2 {
        start_encrypted(&mut cluster, index).await;
    }
    for index in 0..2 {
        cluster.node(index).until(connected(1)).await;
    }
    cluster
}

/// In every family of the cluster.
fn chatter(cluster: &Cluster) -> Vec<Chatter> {
    let start = |family| {
        let [from, to] = [0, 1].map(|index| cluster.pod(index).ip_in(family).unwrap());
        Chatter::start((cluster.pod(0).netns(), from), to)
    };
    cluster.lab.spec().families().map(start).collect()
}

async fn assert_no_answer(cluster: &Cluster) {
    for family in cluster.lab.spec().families() {
        let to = cluster.pod(1).ip_in(family).unwrap();
        let options = PingOptions { count: 20, ..PingOptions::default() };
        assert_eq!(ping(cluster.pod(0).netns(), to, options).await.unwrap().received, 0, "{family}");
    }
}

/// As a DHCP client does when the link is there again.
async fn give_routes_of_the_underlay(host: &Host, source: IpAddr) {
    let gateway = gateway(Family::V4);
    let onto = Route::onto(gateway.into(), UNDERLAY_INTERFACE).from_dhcp(source, 100);
    host.add_route(&onto).await.unwrap();
    let default = Route::via("0.0.0.0/0".parse().unwrap(), gateway, UNDERLAY_INTERFACE);
    host.add_route(&default.from_dhcp(source, 100)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_no_packet_of_a_pod_is_on_the_underlay_in_plain_text_whatever_is_broken() {
    if skipped("nothing in plain text").await {
        return;
    }
    let mut cluster = encrypted(Stack::Dual((), ())).await;
    cluster.assert_pods_talk().await;
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, |f| is_plain(f) || is_sealed(f)).await.unwrap();
    let _chatter = chatter(&cluster);
    let host = cluster.host(0).clone();
    let devices = [cluster.seats[0].device.clone(), cluster.seats[0].device_v6.clone()];
    let address = cluster.lab.nodes()[0].ip();
    for _ in 0..3 {
        for device in &devices {
            host.delete_link(device).await.unwrap();
        }
        cluster.assert_talk(0, 1).await;
        for device in &devices {
            host.set_down(device).await.unwrap();
        }
        cluster.assert_talk(0, 1).await;
        // Flushed routes, podnet's and the underlay's. Those of the pods' bridge are others'; the guard is next.
        for route in of_main(&host).await.into_iter().filter(|r| r.header.protocol != RouteProtocol::Kernel) {
            if !is_guard(&route) {
                // Some go with others.
                let _ = host.handle().route().del(route).execute().await;
            }
        }
        give_routes_of_the_underlay(&host, address).await;
        cluster.node(0).until(connected(1)).await;
        cluster.assert_talk(0, 1).await;
        delete_guard(&host).await;
        cluster.eye(0).until_has(&["route 10.42.0.0/16 proto 112", "BlackHole"]);
    }
    // A killed process, and its device goes too: nobody is there to repair it, and the guard stands.
    cluster.running[0].take().unwrap().abort().await;
    for device in &devices {
        host.delete_link(device).await.unwrap();
    }
    assert_no_answer(&cluster).await;
    let report = capture.report();
    let plain: Vec<&Frame> = report.frames.iter().filter(|f| is_plain(f)).collect();
    assert!(plain.is_empty(), "{} packets, the first is {:?}", plain.len(), plain[0]);
    assert!(report.frames.iter().filter(|f| is_sealed(f)).count() > 50, "it saw little");

    // The same capture sees them once both guards are gone.
    delete_guard(&host).await;
    commit(cluster.netns(0), &[delete_table(IPV4, Some("podnet"))]);
    let leaked = capture.wait_for(PATIENCE, is_plain).await.unwrap();
    assert_eq!(leaked.ip.unwrap().destination, cluster.pod(1).ip());
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_what_flushes_the_guard_with_the_route_that_it_guards_lets_nothing_out_in_plain_text() {
    if skipped("flushed in one stroke").await {
        return;
    }
    let cluster = encrypted(Stack::Dual((), ())).await;
    cluster.assert_pods_talk().await;
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, |f| is_plain(f) || is_sealed(f)).await.unwrap();
    let _chatter = chatter(&cluster);
    let host = cluster.host(0).clone();
    for _ in 0..10 {
        // As `ip route flush proto 112` and `ip -6` do; the default routes stay, and would take what they find.
        let all = [of_main(&host).await, of_main_v6(&host).await].concat();
        let mut ours: Vec<RouteMessage> = all.into_iter().filter(|r| u8::from(r.header.protocol) == 112).collect();
        ours.sort_by_key(|route| !is_guard(route));
        assert!(ours.len() > 3, "guards and routes of the networks: {ours:?}");
        for route in ours {
            let _ = host.handle().route().del(route).execute().await;
        }
        cluster.eye(0).until_has(&["route 10.42.0.0/16 proto 112", "BlackHole"]);
        cluster.eye(0).until_has(&["route 2001:db8:42::/56 proto 112", "BlackHole"]);
        cluster.assert_talk(0, 1).await;
        // And what flushes the rules finds the routes in place.
        commit(cluster.netns(0), &[delete_table(IPV4, Some("podnet")), delete_table(IPV6, Some("podnet"))]);
        let seals = |family| rules(cluster.netns(0), family, "podnet").iter().any(|rule| rule.chain == "seal");
        let sealed = async || Ok(seals(IPV4) && seals(IPV6));
        wait_until("the seal to be back", PATIENCE, sealed).await.unwrap();
    }
    let report = capture.report();
    let plain: Vec<&Frame> = report.frames.iter().filter(|f| is_plain(f)).collect();
    assert!(plain.is_empty(), "{} packets, the first is {:?}", plain.len(), plain[0]);
    assert!(report.frames.iter().filter(|f| is_sealed(f)).count() > 50, "it saw little");
}

fn is_guard(route: &RouteMessage) -> bool {
    route.header.kind == RouteType::BlackHole
}

async fn delete_guard(host: &Host) {
    for route in of_main(host).await.into_iter().filter(is_guard) {
        host.handle().route().del(route).execute().await.unwrap();
    }
}

async fn of_main_v6(host: &Host) -> Vec<RouteMessage> {
    let any = RouteMessageBuilder::<Ipv6Addr>::new().build();
    let all: Vec<RouteMessage> = host.handle().route().get(any).execute().try_collect().await.unwrap();
    all.into_iter().filter(|route| route.header.table == RouteHeader::RT_TABLE_MAIN).collect()
}

/// The IPv4 routes of the main table, in the order in which the kernel tells them.
async fn of_main(host: &Host) -> Vec<RouteMessage> {
    let any = RouteMessageBuilder::<Ipv4Addr>::new().build();
    let all: Vec<RouteMessage> = host.handle().route().get(any).execute().try_collect().await.unwrap();
    all.into_iter().filter(|route| route.header.table == RouteHeader::RT_TABLE_MAIN).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_nothing_leaves_in_plain_text_before_the_overlay_is_up() {
    if skipped("before it is up").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::Dual((), ()), |_, backend| backend).await;
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    cluster.subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    cluster.subnets.faults().fail_next(Call::Acquire, usize::MAX, away.clone());
    start_encrypted(&mut cluster, 0).await;
    cluster.eye(0).until_has(&["route 10.42.0.0/16 proto 112", "BlackHole"]);
    cluster.eye(0).until_has(&["route 2001:db8:42::/56 proto 112", "BlackHole"]);
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, |f| is_plain(f) || is_sealed(f)).await.unwrap();
    let _chatter = chatter(&cluster);
    assert_no_answer(&cluster).await;
    assert!(!cluster.node(0).overlay.status().borrow().is_ready());
    // And while it comes up.
    cluster.subnets.faults().fail_next(Call::Watch, 0, away.clone());
    cluster.subnets.faults().fail_next(Call::Acquire, 0, away);
    start_encrypted(&mut cluster, 1).await;
    cluster.node(0).until(connected(1)).await;
    cluster.assert_talk(0, 1).await;
    let report = capture.report();
    let plain = report.frames.iter().find(|f| is_plain(f));
    assert!(plain.is_none() && !report.frames.is_empty(), "{plain:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_what_an_unencrypted_overlay_left_is_gone_before_the_first_packet_is_sealed() {
    if skipped("after VXLAN").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::V4(()), |_, backend| backend).await;
    let mut vxlan: Vec<Running> = Vec::new();
    for node in cluster.lab.nodes() {
        vxlan.push(spawn(real::builder(node.name(), node.netns(), cluster.subnets.clone())).await);
    }
    for running in vxlan {
        running.until(connected(1)).await;
        running.abort().await;
    }
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, is_plain).await.unwrap();
    let _chatter = chatter(&cluster);
    capture.wait_for(PATIENCE, |f| f.vxlan.is_some()).await.unwrap();

    // While nobody knows of any lease yet.
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    cluster.subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    start_encrypted(&mut cluster, 0).await;
    cluster.eye(0).until_lacks(&[&format!("link {DEVICE} ")]);
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, |f| is_plain(f) || is_sealed(f)).await.unwrap();
    cluster.subnets.faults().fail_next(Call::Watch, 0, away);
    start_encrypted(&mut cluster, 1).await;
    for index in 0..2 {
        cluster.node(index).until(connected(1)).await;
    }
    cluster.assert_talk(0, 1).await;
    let report = capture.report();
    let plain = report.frames.iter().find(|f| is_plain(f) && f.direction == podnet_lab::probe::Direction::Out);
    assert!(plain.is_none() && report.frames.iter().any(is_sealed), "{plain:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_flannels_own_vxlan_is_taken_down_while_no_lease_is_known() {
    if skipped("after flannel's VXLAN").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::V4(()), |_, backend| backend).await;
    let macs = [[2, 0, 0, 0, 1, 0], [2, 0, 0, 0, 1, 1]];
    let spec = cluster.lab.spec().clone();
    for (index, mac) in macs.into_iter().enumerate() {
        let host = cluster.host(index);
        let IpAddr::V4(local) = cluster.lab.nodes()[index].ip() else { unreachable!() };
        flannels_device(host, mac, local.octets(), (1, 8472), spec.mtu() - 50).await;
        let own = spec.subnets(index).v4().copied().unwrap().network();
        host.add_address(DEVICE, ipnetwork::IpNetwork::from(IpAddr::from(own))).await.unwrap();
        host.set_up(DEVICE).await.unwrap();
        let other = 1 - index;
        let subnet = spec.subnets(other).v4().copied().unwrap();
        flannels_peer(host, subnet.into(), macs[other], cluster.lab.nodes()[other].ip()).await;
    }
    cluster.assert_talk(0, 1).await;
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    cluster.subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    cluster.subnets.faults().fail_next(Call::Acquire, usize::MAX, away);
    start_encrypted(&mut cluster, 0).await;
    cluster.eye(0).until_lacks(&[&format!("link {DEVICE} ")]);
    cluster.eye(0).until_has(&["route 10.42.0.0/16 proto 112", "BlackHole"]);
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, is_plain).await.unwrap();
    assert_eq!(cluster.answered(0, 1, Family::V4).await, 0);
    let report = capture.report();
    assert!(report.frames.is_empty(), "{:?}", report.frames.first());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_19_flannels_wireguard_is_taken_over_with_its_session_and_guarded_from_the_start() {
    if skipped("flannel's device").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::V4(()), |_, backend| backend).await;
    // As flannel leaves it when it is killed. It has the kernel's alone.
    let (host, device) = (cluster.host(0).clone(), cluster.seats[0].device.clone());
    if host.handle().link().add(LinkWireguard::new(&device).build()).execute().await.is_err() {
        let reason = "the kernel has no WireGuard, and flannel uses no other";
        skipping("flannel's device", reason);
        return;
    }
    let private = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
    cluster.seats[0].again(private.parse().unwrap(), |backend| backend);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("wgkey");
    std::fs::write(&file, private).unwrap();
    let endpoint = SocketAddr::new(cluster.lab.nodes()[1].ip(), 51_820).to_string();
    let peer = cluster.key(1).to_string();
    let file = file.to_str().unwrap();
    let configured = ["listen-port", "51820", "private-key", file, "peer", &peer, "endpoint", &endpoint];
    wg_set(cluster.netns(0), &device, &[&configured[..], &["allowed-ips", "10.42.1.0/24"]].concat());
    host.add_address(&device, "10.42.0.0/32".parse().unwrap()).await.unwrap();
    host.set_mtu(&device, 1380).await.unwrap();
    host.set_up(&device).await.unwrap();
    host.add_route(&Route::onto("10.42.0.0/16".parse().unwrap(), &device)).await.unwrap();
    let index = host.link(&device).await.unwrap().index;

    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "503".into() };
    cluster.subnets.faults().fail_next(Call::Watch, usize::MAX, away.clone());
    start_encrypted(&mut cluster, 0).await;
    cluster.eye(0).until_has(&["route 10.42.0.0/16 proto 112", "BlackHole"]);
    let conflicts = cluster.node(0).overlay.status().borrow().conflicts.clone();
    assert!(conflicts.is_empty(), "{conflicts:?}");
    cluster.subnets.faults().fail_next(Call::Watch, 0, away);
    start_encrypted(&mut cluster, 1).await;
    for index in 0..2 {
        cluster.node(index).until(connected(1)).await;
    }
    cluster.assert_talk(0, 1).await;
    assert_eq!(host.link(&device).await.unwrap().index, index, "it is the same device");
    let now = cluster.eye(0).settled();
    assert!(now.has(&[&format!("link {device} up"), "podnet"]), "{:#?}", now.lines());
    let ways = now.with(&["route 10.42.0.0/16", &device]);
    assert!(ways.len() == 1 && ways[0].contains("proto 112"), "{ways:?}");
    assert_eq!(wg(cluster.netns(0), &device).2.keys().collect::<Vec<_>>(), [&peer]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_17_pings_over_a_kill_and_a_restart_are_all_answered() {
    if skipped("pings over a restart").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::V4(()), |_, backend| backend).await;
    let keys = [(); 2].map(|()| podnet_wireguard::PrivateKey::generate());
    for (index, key) in keys.iter().enumerate() {
        cluster.seats[index].again(key.clone(), |backend| backend);
    }
    cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let device = cluster.seats[0].device.clone();
    let before = wg(cluster.netns(0), &device).2[&cluster.key(1).to_string()].clone();
    assert!(before.handshake > 0 || is_boringtun(), "{before:?}");
    // A daemon in user space has short queues, and after a pause of the machine all pings that were due come at once.
    let every = if cluster.seats[0].has_daemon() { 10 } else { 1 };
    let options = PingOptions {
        interval: slower(Duration::from_millis(every)),
        timeout: slower(Duration::from_secs(1)),
        ..PingOptions::default()
    };
    let there = PingStream::start(cluster.pod(0).netns(), cluster.pod(1).ip(), options).await.unwrap();
    let back = PingStream::start(cluster.pod(1).netns(), cluster.pod(0).ip(), options).await.unwrap();
    for kill in [true, false] {
        let running = cluster.running[0].take().unwrap();
        if kill {
            running.abort().await;
        } else {
            running.overlay.shutdown(Shutdown::Keep).await.unwrap();
        }
        cluster.seats[0].again(keys[0].clone(), |backend| backend);
        cluster.start(0).await;
        cluster.assert_talk(0, 1).await;
    }
    // Not a wait for a state: traffic has to run for some time to be measured.
    tokio::time::sleep(slower(Duration::from_millis(200))).await;
    for stream in [there, back] {
        let report = stream.stop().await.unwrap();
        assert!(report.sent > 20 && report.lost == 0, "{report:?}");
    }
    let after = wg(cluster.netns(0), &device).2[&cluster.key(1).to_string()].clone();
    assert_eq!(after, before, "not even a new handshake");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_packet_of_the_mtu_passes_whole_and_one_byte_more_is_refused() {
    if skipped("the MTU").await {
        return;
    }
    let cluster = Cluster::running(2, Stack::V4(())).await;
    cluster.assert_pods_talk().await;
    let capture = Capture::of(cluster.host(0), UNDERLAY_INTERFACE, is_sealed).await.unwrap();
    let of = |ip_length| PingOptions {
        ip_length,
        dont_fragment: true,
        timeout: slower(Duration::from_secs(1)),
        ..PingOptions::default()
    };
    let whole = ping(cluster.netns(0), cluster.pod(1).ip(), of(1380)).await.unwrap();
    assert!(whole.all_answered(), "{whole:?}");
    let larger = ping(cluster.netns(0), cluster.pod(1).ip(), of(1381)).await.unwrap();
    assert!(larger.received == 0 && larger.too_big.is_some_and(|refusal| refusal.by.is_none()), "{larger:?}");
    // 20 of IPv4, 8 of UDP, 32 of WireGuard around 1380 bytes that are rounded up to the MTU at most: one packet of 1440 bytes.
    let is_it = |frame: &podnet_lab::probe::Frame| frame.ip.is_some_and(|ip| ip.total_length == 1440);
    capture.wait_for(PATIENCE, is_it).await.unwrap();
    let report = capture.report();
    let longest = report.frames.iter().filter_map(|f| f.ip).map(|ip| ip.total_length).max();
    assert_eq!((longest, report.fragments), (Some(1440), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_whose_address_changes_unannounced_is_followed_and_not_put_back() {
    if skipped("another address").await {
        return;
    }
    let spec = LabSpec { nodes: 2, underlay: Underlay::Lan, ..LabSpec::default() };
    let mut cluster = Cluster::on(spec, |_, backend| backend).await;
    cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let (device, key) = (cluster.seats[0].device.clone(), cluster.key(1).to_string());
    let endpoint = || wg(cluster.netns(0), &device).2[&key].endpoint.clone();
    let published = endpoint();
    // Nobody on node 1 tells anyone.
    cluster.node(1).overlay.shutdown(Shutdown::Keep).await.unwrap();
    let (host, old) = (cluster.host(1), cluster.lab.nodes()[1].ip());
    host.delete_address(UNDERLAY_INTERFACE, ipnetwork::IpNetwork::new(old, 24).unwrap()).await.unwrap();
    host.add_address(UNDERLAY_INTERFACE, "10.240.0.231/24".parse().unwrap()).await.unwrap();
    cluster.assert_talk(1, 0).await;
    assert_eq!(endpoint(), "10.240.0.231:51820", "it was {published}");
    cluster.assert_talk(0, 1).await;
    for _ in 0..3 {
        assert!(cluster.node(0).overlay.reconcile().await.unwrap().done.is_empty());
    }
    assert_eq!(endpoint(), "10.240.0.231:51820");
    assert!(cluster.node(0).overlay.status().borrow().is_ready());
    cluster.assert_talk(0, 1).await;
}
