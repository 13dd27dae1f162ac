//! The WireGuard backend through the whole engine on real devices: the kernel's where it has WireGuard, else those of wireguard-go, or
//! of boringtun where `PODNET_TEST_BORINGTUN` names it. What is told of devices and peers is compared with what `wg` says, which shares
//! no code with it.
//!
//! Where there is neither, or no `wg`, each test says so and shows nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use podnet::driver::SessionState;
use podnet::lease::{BackendData, Endpoint, Lease, Offer, Precedence};
use podnet::masquerade::MasqueradePolicy;
use podnet::status::Status;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::{Family, Stack};
use podnet::{Node, Shutdown};
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::probe::{Capture, PingOptions, ping};
use podnet_lab::{LabSpec, Route, wait_until};
use podnet_tests::real::standstill::stand_still;
use podnet_tests::real::wireguard::{
    Cluster, PATIENCE, Seat, daemon, is_boringtun, shown_own_key, skipped, wg, wg_set,
};
use podnet_tests::real::{SOON, assert_same, connected, heals, is_healed, lone_host, namespace, network, slower};
use podnet_tests::{name, skipping, spawn};
use podnet_wireguard::{KIND, Mode, PresharedKey, PrivateKey, WireGuard};
use rustix::process::{Pid, Signal, kill_process};

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_three_nodes_talk_in_both_families_and_the_underlay_sees_wireguard_alone() {
    if skipped("pods talk").await {
        return;
    }
    let mut cluster = Cluster::of(3, Stack::Dual((), ()), |_, backend| backend.keepalive(25)).await;
    let capture = Capture::start(cluster.host(0), UNDERLAY_INTERFACE).await.unwrap();
    cluster.start_all().await;
    cluster.assert_pods_talk().await;

    // As flannel sets it up, by the word of wg and of the kernel.
    let seat = &cluster.seats[0];
    let (own, port, peers) = wg(cluster.netns(0), &seat.device);
    let key = shown_own_key(&cluster.key(0));
    assert_eq!((own, port.as_str(), peers.len()), (key.clone(), "51820", 2));
    let first = &peers[&cluster.key(1).to_string()];
    let address = cluster.lab.nodes()[1].ip_in(Family::V4).unwrap();
    assert_eq!((first.allowed.as_str(), first.keepalive.as_str()), ("10.42.1.0/24", "25"));
    assert_eq!(first.endpoint, SocketAddr::new(address, 51_820).to_string());
    let (own, port, peers) = wg(cluster.netns(0), &seat.device_v6);
    assert_eq!((own, port.as_str(), peers.len()), (key, "51821", 2));
    assert_eq!(peers[&cluster.key(2).to_string()].allowed, "2001:db8:42:2::/64");
    let now = cluster.eye(0).settled();
    for parts in [
        &[format!("link {} up", seat.device), "Mtu(1380)".to_owned(), "podnet".to_owned()][..],
        &[format!("address dev {} /32", seat.device), "10.42.0.0".to_owned()],
        &["route 10.42.0.0/16 proto 112 table 254".to_owned(), seat.device.clone()],
        &[format!("address dev {} /128", seat.device_v6), "2001:db8:42::".to_owned()],
        &["route 2001:db8:42::/56 proto 112 table 254".to_owned(), seat.device_v6.clone()],
    ] {
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        assert!(now.has(&parts), "{parts:?} is missing: {:#?}", now.lines());
    }
    let leases = cluster.subnets.leases();
    let offer = leases[0].offer(&KIND).unwrap();
    assert_eq!(
        offer.endpoint(Family::V6).unwrap().data.as_str(),
        format!(r#"{{"PublicKey":"{}","Port":51821}}"#, cluster.key(0))
    );
    assert_eq!(cluster.node(0).overlay.status().borrow().pod_mtu.unwrap().bytes(), 1380);

    // The largest packet passes whole.
    for family in Family::BOTH {
        let to = cluster.pod(2).ip_in(family).unwrap();
        let whole = PingOptions { ip_length: 1380, dont_fragment: true, ..PingOptions::default() };
        assert!(ping(cluster.pod(0).netns(), to, whole).await.unwrap().all_answered());
    }

    // What is on the underlay between nodes: UDP of these ports, and no address of a pod.
    let report = capture.report();
    let nodes: Vec<_> = cluster.lab.nodes().iter().flat_map(|n| Family::BOTH.map(|f| n.ip_in(f).unwrap())).collect();
    let (mut v4, mut v6) = (0, 0);
    for frame in report.frames.iter() {
        let Some(ip) = &frame.ip else { continue };
        for address in [ip.source, ip.destination] {
            let pod = cluster.lab.spec().families().any(|f| {
                let network = LabSpec::usual_networks(Stack::Dual((), ()));
                match f {
                    Family::V4 => {
                        network.v4().is_some_and(|n| matches!(address, std::net::IpAddr::V4(a) if n.contains(a)))
                    }
                    Family::V6 => {
                        network.v6().is_some_and(|n| matches!(address, std::net::IpAddr::V6(a) if n.contains(a)))
                    }
                }
            });
            assert!(!pod, "a pod's address on the underlay: {frame:?}");
        }
        if !(nodes.contains(&ip.source) && nodes.contains(&ip.destination)) || frame.is_icmp() {
            continue;
        }
        let udp = frame.udp.as_ref().unwrap_or_else(|| panic!("no UDP: {frame:?}"));
        let port = if ip.source.is_ipv4() { 51_820 } else { 51_821 };
        assert_eq!((udp.source, udp.destination), (port, port), "{frame:?}");
        if ip.source.is_ipv4() { v4 += 1 } else { v6 += 1 }
    }
    assert!(v4 > 20 && v6 > 20 && report.fragments == 0, "{v4} and {v6}, {} fragments", report.fragments);

    let counters = cluster.node(0).overlay.status().borrow().counters;
    assert!(counters.by_kind.custom.done >= 6 && !counters.reconciling.is_zero(), "{counters:?}");
    // And how each peer is, by podnet's own word.
    let peers = cluster.node(0).overlay.peers().await.unwrap();
    let sessions: Vec<_> = peers.iter().flat_map(|peer| &peer.families).map(|of| of.session.clone().unwrap()).collect();
    assert_eq!(sessions.len(), 4);
    for peer in &sessions {
        assert!(peer.state == SessionState::Live && peer.received > 300 && peer.sent > 300, "{peer}");
        let (_, _, shown) = wg(cluster.netns(0), peer.device.as_str());
        let shown = &shown[&peer.identity];
        assert_eq!(peer.endpoint.unwrap().to_string(), shown.endpoint);
        assert_eq!(peer.subnet.to_string(), shown.allowed);
        let moment = peer.last_handshake.unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
        assert!(moment == shown.handshake || is_boringtun(), "{moment}, {shown:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_10_with_encryption_required_pods_talk_and_without_the_device_nothing_leaves() {
    if skipped("encryption required").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::V4(()), |_, backend| backend).await;
    for index in 0..2 {
        cluster.running[index] = Some(spawn(cluster.builder(index).require_encryption(true)).await);
    }
    for index in 0..2 {
        cluster.node(index).until(connected(1)).await;
    }
    cluster.assert_pods_talk().await;
    // Nobody repairs it, and the device goes: the packets go nowhere, and not out by the default route.
    cluster.running[0].take().unwrap().abort().await;
    let capture = Capture::start(cluster.host(0), UNDERLAY_INTERFACE).await.unwrap();
    cluster.host(0).delete_link(&cluster.seats[0].device).await.unwrap();
    assert_eq!(cluster.answered(0, 1, Family::V4).await, 0);
    let pod = cluster.pod(1).ip();
    assert!(capture.report().frames.iter().all(|frame| frame.ip.as_ref().is_none_or(|ip| ip.destination != pod)));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_device_carries_both_families_over_one_in_the_other_modes() {
    if skipped("the other modes").await {
        return;
    }
    for (mode, outer) in [(Mode::Ipv4, Family::V4), (Mode::Ipv6, Family::V6), (Mode::Auto, Family::V6)] {
        let mut cluster = Cluster::of(2, Stack::Dual((), ()), |_, backend| backend.mode(mode)).await;
        cluster.start_all().await;
        cluster.assert_pods_talk().await;
        let (_, port, peers) = wg(cluster.netns(0), &cluster.seats[0].device);
        assert_eq!((port.as_str(), peers.len()), ("51820", 1));
        let peer = &peers[&cluster.key(1).to_string()];
        let address = cluster.lab.nodes()[1].ip_in(outer).unwrap();
        assert_eq!(peer.endpoint, SocketAddr::new(address, 51_820).to_string(), "{mode:?}");
        let mut allowed: Vec<&str> = peer.allowed.split(',').collect();
        allowed.sort_unstable();
        assert_eq!(allowed, ["10.42.1.0/24", "2001:db8:42:1::/64"]);
        assert!(!cluster.host(0).has_link(&cluster.seats[0].device_v6).await.unwrap());
        // A check finds nothing to do.
        assert!(cluster.node(0).overlay.reconcile().await.unwrap().done.is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_ipv6_alone_works_in_every_mode_and_leaves_the_default_route() {
    if skipped("IPv6 alone").await {
        return;
    }
    for mode in [Mode::Separate, Mode::Auto, Mode::Ipv4] {
        let mut cluster = Cluster::of(2, Stack::V6(()), |_, backend| backend.mode(mode)).await;
        let before = cluster.eye(0).settled();
        cluster.start_all().await;
        cluster.assert_pods_talk().await;
        let defaults = |dump: &podnet_tests::real::eye::Dump| {
            dump.with(&["/0 "]).into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(defaults(&before), defaults(&cluster.eye(0).settled()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_36_whatever_befalls_the_device_is_repaired_within_a_second_and_pods_talk_again() {
    if skipped("healing").await {
        return;
    }
    let cluster = Cluster::running(2, Stack::V4(())).await;
    let (host, eye, running) = (cluster.host(0), cluster.eye(0), cluster.node(0));
    let device = cluster.seats[0].device.clone();
    // In user space a program is started for it, which takes what the machine has left: the quickest of three counts.
    let mut took = Vec::new();
    while took.len() < 3 && took.iter().all(|took| *took >= slower(SOON)) {
        let healed = is_healed(&eye, running, async { host.delete_link(&device).await.unwrap() }).await;
        let (all, lost) = healed.stop();
        took.push(all.saturating_sub(lost));
        cluster.assert_pods_talk().await;
    }
    assert!(took.last().is_some_and(|took| *took < slower(SOON)), "{took:?}");
    heals(&eye, running, async { host.set_down(&device).await.unwrap() }).await;
    cluster.assert_pods_talk().await;
    heals(&eye, running, async { host.set_mtu(&device, 1280).await.unwrap() }).await;
    heals(&eye, running, async {
        host.delete_address(&device, "10.42.0.0/32".parse().unwrap()).await.unwrap();
    })
    .await;
    cluster.assert_pods_talk().await;

    // The kernel tells nothing of peers: a check finds them.
    let (key, before) = (cluster.key(1).to_string(), wg(cluster.netns(0), &device));
    let stranger = PrivateKey::generate().public_key().to_string();
    for harm in [
        &["peer", &key, "remove"][..],
        &["peer", &key, "allowed-ips", "10.42.1.0/24,0.0.0.0/0"],
        &["peer", &key, "persistent-keepalive", "7"],
        // The kernel gives a subnet silently to whoever is set last.
        &["peer", &stranger, "allowed-ips", "10.42.1.0/24"],
        &["listen-port", "51999"],
    ] {
        if is_boringtun() && harm[1] == key && harm[2] != "remove" {
            // A change of a peer that it has would break the daemon.
            continue;
        }
        wg_set(cluster.netns(0), &device, harm);
        let plan = running.overlay.plan().await.unwrap();
        assert!(!plan.is_empty(), "{harm:?}");
        let report = running.overlay.reconcile().await.unwrap();
        assert!(report.is_clean(), "{harm:?}: {report:?}");
        let now = wg(cluster.netns(0), &device);
        assert_eq!((&now.0, &now.1), (&before.0, &before.1), "{harm:?}");
        assert_eq!(now.2.keys().collect::<Vec<_>>(), [&key], "{harm:?}");
        let (is, was) = (&now.2[&key], &before.2[&key]);
        assert_eq!(
            (&is.allowed, &is.endpoint, &is.keepalive),
            (&was.allowed, &was.endpoint, &was.keepalive),
            "{harm:?}"
        );
    }
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_35_a_new_key_replaces_the_old_peer_and_touches_no_other() {
    if skipped("a new key").await {
        return;
    }
    let mut cluster = Cluster::running(3, Stack::V4(())).await;
    cluster.assert_pods_talk().await;
    let device = cluster.seats[0].device.clone();
    let (old, other) = (cluster.key(1).to_string(), cluster.key(2).to_string());
    let before = wg(cluster.netns(0), &device).2;
    cluster.running[1].take().unwrap().abort().await;
    cluster.seats[1].again(PrivateKey::generate(), |backend| backend);
    cluster.start(1).await;
    let new = cluster.key(1).to_string();
    wait_until("node 0 has the new key", PATIENCE, || async { Ok(wg(cluster.netns(0), &device).2.contains_key(&new)) })
        .await
        .unwrap();
    cluster.assert_pods_talk().await;
    let after = wg(cluster.netns(0), &device).2;
    assert!(!after.contains_key(&old) && after.len() == 2, "{after:?}");
    assert_eq!(after[&other], before[&other], "not even its session was touched");
    assert_eq!(after[&new].allowed, "10.42.1.0/24");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_35_another_pre_shared_key_keeps_a_node_out_and_it_shows_and_others_talk_on() {
    if skipped("another pre-shared key").await {
        return;
    }
    let psk = |byte: u8| PresharedKey::from_bytes([byte; 32]).unwrap();
    let with = |index: usize, backend: WireGuard| backend.preshared_key(psk(if index == 2 { 8 } else { 7 }));
    let mut cluster = Cluster::of(3, Stack::V4(()), with).await;
    cluster.start_all().await;
    cluster.assert_talk(0, 1).await;
    assert_eq!(cluster.answered(0, 2, Family::V4).await, 0);
    let sessions = || async {
        let peers = cluster.node(0).overlay.peers().await.unwrap();
        let sessions = peers.into_iter().flat_map(|peer| peer.families).filter_map(|of| of.session);
        sessions.map(|session| (session.identity, session.state)).collect::<BTreeMap<_, _>>()
    };
    let now = sessions().await;
    let of = |index: usize| now[&cluster.key(index).to_string()];
    assert_eq!((of(1), of(2)), (SessionState::Live, SessionState::Never));

    // The right one: it comes in.
    let device = cluster.seats[0].device.clone();
    let before = wg(cluster.netns(0), &device).2[&cluster.key(1).to_string()].clone();
    cluster.running[2].take().unwrap().abort().await;
    let key = PrivateKey::generate();
    cluster.seats[2].again(key, |backend| backend.preshared_key(psk(7)));
    cluster.start(2).await;
    cluster.assert_talk(0, 2).await;
    assert_eq!(wg(cluster.netns(0), &device).2[&cluster.key(1).to_string()], before);
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_17_a_restart_and_a_kill_write_nothing_and_pods_talk_all_the_time() {
    if skipped("restart").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::Dual((), ()), |_, backend| backend).await;
    let keys = [PrivateKey::generate(), PrivateKey::generate()];
    for (index, key) in keys.iter().enumerate() {
        cluster.seats[index].again(key.clone(), |backend| backend);
    }
    cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let eye = cluster.eye(0);
    let whole = eye.settled();
    let device = cluster.seats[0].device.clone();
    let peers = wg(cluster.netns(0), &device);
    for kill in [false, true] {
        let running = cluster.running[0].take().unwrap();
        if kill {
            running.abort().await;
        } else {
            running.overlay.shutdown(Shutdown::Keep).await.unwrap();
            drop(running);
        }
        assert_eq!(cluster.answered(1, 0, Family::V4).await, 3, "nobody is needed for that");
        cluster.seats[0].again(keys[0].clone(), |backend| backend);
        cluster.start(0).await;
        assert_eq!(cluster.node(0).steps(), 0, "it finds all as it should be");
        assert_same(&whole, &eye.settled());
        assert_eq!(wg(cluster.netns(0), &device), peers, "sessions go on");
        assert_eq!(cluster.answered(1, 0, Family::V6).await, 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_remove_state_no_device_no_route_and_no_daemon_is_left() {
    if skipped("removal").await {
        return;
    }
    let mut cluster = Cluster::of(2, Stack::Dual((), ()), |_, backend| backend).await;
    let before = cluster.eye(0).settled();
    cluster.start_all().await;
    cluster.assert_pods_talk().await;
    let running = cluster.running[0].take().unwrap();
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_same(&before, &cluster.eye(0).settled());
    assert!(!cluster.seats[0].has_daemon());
    // Its ports are free.
    for (family, port) in [(Family::V4, 51_820), (Family::V6, 51_821)] {
        let address = cluster.lab.nodes()[0].ip_in(family).unwrap();
        let free = async || Ok(cluster.netns(0).udp_socket(SocketAddr::new(address, port)).is_ok());
        wait_until("its ports are free", PATIENCE, free).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_36_what_is_in_the_way_is_named_and_left_alone_and_once_it_is_gone_the_node_is_ready() {
    if skipped("conflicts").await {
        return;
    }
    let cluster = Cluster::of(1, Stack::V4(()), |_, backend| backend).await;
    let (host, device, eye) = (cluster.host(0), cluster.seats[0].device.clone(), cluster.eye(0));
    host.add_bridge(&device, None).await.unwrap();
    let address = cluster.lab.nodes()[0].ip();
    let squatter = cluster.netns(0).udp_socket(SocketAddr::new(address, 51_820)).unwrap();
    let with_bridge = eye.settled();

    let running = spawn(cluster.builder(0)).await;
    let named =
        |status: &Status| status.conflicts.iter().any(|c| c.to_string().contains(&format!("link {device} (bridge")));
    assert!(!running.until(named).await.is_ready());
    assert_eq!(with_bridge.with(&[&device]), eye.settled().with(&[&device]), "it is as it was");

    host.delete_link(&device).await.unwrap();
    let status = running.until(|status| status.to_string().contains("UDP port 51820")).await;
    let text = status.to_string();
    assert!(!status.is_ready() && text.contains("Address already in use") && text.contains("ss -ulpn"), "{text}");

    if !is_boringtun() {
        // As where somebody is quicker by a moment: the kernel says that it cannot, wireguard-go does not.
        let _ = host.set_up(&device).await;
    }
    drop(squatter);
    running.until(connected(0)).await;
    assert_eq!(wg(cluster.netns(0), &device).1, "51820");
    if is_boringtun() {
        // It keeps a port for a while after it was told another.
        return;
    }

    // And later, when somebody has moved the device to another port and taken its own.
    let squatter = std::cell::RefCell::new(None);
    wait_until("the port to be taken", PATIENCE, || async {
        // Unless a check was quicker and has put it back.
        wg_set(cluster.netns(0), &device, &["listen-port", "51999"]);
        *squatter.borrow_mut() = cluster.netns(0).udp_socket(SocketAddr::new(address, 51_820)).ok();
        Ok(squatter.borrow().is_some())
    })
    .await
    .unwrap();
    let report = running.overlay.reconcile().await.unwrap();
    assert!(format!("{report:?}").contains("UDP port 51820"), "{report:?}");
    drop(squatter);
    let back = async || Ok(wg(cluster.netns(0), &device).1 == "51820");
    wait_until("its own port again", PATIENCE, back).await.unwrap();
}

/// A process that stands still, and goes on when this goes.
struct Frozen(Pid);

impl Frozen {
    fn new(pid: Pid) -> Frozen {
        stand_still(pid);
        Frozen(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_09_a_daemon_that_stands_still_is_named_and_the_other_family_and_all_else_goes_on() {
    if skipped("a daemon that stands still").await {
        return;
    }
    let cluster = Cluster::running(2, Stack::Dual((), ())).await;
    let (host, seat, node) = (cluster.host(0), &cluster.seats[0], cluster.node(0));
    if !seat.has_daemon() {
        skipping("a daemon that stands still", "the kernel has WireGuard, and nobody else is needed");
        return;
    }
    cluster.assert_pods_talk().await;
    let frozen = Frozen::new(daemon(&seat.device));
    let key = PrivateKey::generate().public_key();
    let data = || BackendData::from_text(&format!(r#"{{"PublicKey":"{key}","Port":51820}}"#)).unwrap();
    cluster.subnets.faults().inject(Lease {
        node: name("third"),
        subnets: Stack::Dual("10.42.77.0/24".parse().unwrap(), "2001:db8:42:77::/64".parse().unwrap()),
        offers: vec![Offer {
            backend: KIND,
            endpoints: Stack::Dual(
                Endpoint { public_ip: "10.241.0.77".parse().unwrap(), data: data() },
                Endpoint { public_ip: "2001:db8:f1::77".parse().unwrap(), data: data() },
            ),
        }],
        precedence: Precedence { since: 77, identity: "third".to_owned() },
    });
    let has = |device: &str| wg(cluster.netns(0), device).2.contains_key(&key.to_string());
    wait_until("the peer in IPv6", PATIENCE, || async { Ok(has(&seat.device_v6)) }).await.unwrap();
    let named = |status: &Status| {
        status.conflicts.iter().any(|c| c.object.to_string().contains(&seat.device) && c.with.contains("not answer"))
    };
    let status = node.until(named).await;
    assert!(!status.is_ready_in(Family::V4) && status.is_ready_in(Family::V6), "{status}");
    // Once it is known, nobody waits for it.
    let own = |routes: Vec<Route>| routes.into_iter().find(|route| route.destination.to_string() == "2001:db8:42::/56");
    let route = own(host.routes_in(Family::V6).await.unwrap()).unwrap();
    let begun = Instant::now();
    host.delete_route(&route).await.unwrap();
    let there = async || Ok(own(host.routes_in(Family::V6).await?).is_some());
    wait_until("the route of IPv6", PATIENCE, there).await.unwrap();
    println!("a route of the other family was back after {:?}", begun.elapsed());

    drop(frozen);
    wait_until("the peer in IPv4", 3 * PATIENCE, || async { Ok(has(&seat.device)) }).await.unwrap();
    node.until(|status| status.is_ready() && status.conflicts.is_empty()).await;
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn case_18_a_member_speaks_for_its_own_pods_alone() {
    if skipped("forged sources").await {
        return;
    }
    let mut cluster = Cluster::running(3, Stack::V4(())).await;
    // Nothing on node 1 makes its packets honest.
    let node = cluster.running[1].take().unwrap();
    node.overlay.set_masquerade(MasqueradePolicy::off()).await.unwrap();
    cluster.running[1] = Some(node);
    cluster.assert_pods_talk().await;
    let target = SocketAddr::new(cluster.pod(0).ip(), 7000);
    let listener = cluster.pod(0).netns().udp_socket(target).unwrap();
    let lo = cluster.host(1);
    lo.set_up("lo").await.unwrap();
    // Node 1 has a true key, and sends as: a pod of node 2, a pod of the receiver's own node, a pod of nobody's.
    for forged in [cluster.pod(2).ip(), "10.42.0.77".parse().unwrap(), "10.42.200.9".parse().unwrap()] {
        lo.add_address("lo", ipnetwork::IpNetwork::from(forged)).await.unwrap();
        let socket = cluster.netns(1).udp_socket(SocketAddr::new(forged, 7000)).unwrap();
        socket.send_to(b"forged", target).await.unwrap();
    }
    let truth = cluster.pod(1).netns().udp_socket(SocketAddr::new(cluster.pod(1).ip(), 7000)).unwrap();
    truth.send_to(b"true", target).await.unwrap();
    let mut buffer = [0; 64];
    let (length, from) = tokio::time::timeout(PATIENCE, listener.recv_from(&mut buffer)).await.unwrap().unwrap();
    // One device, one session: what was sent first would have come first.
    assert_eq!((&buffer[..length], from.ip()), (&b"true"[..], cluster.pod(1).ip()));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_peer_was_found_stays_and_a_new_published_place_is_taken() {
    if skipped("roaming").await {
        return;
    }
    let cluster = Cluster::running(2, Stack::V4(())).await;
    cluster.assert_pods_talk().await;
    let (device, key) = (cluster.seats[0].device.clone(), cluster.key(1).to_string());
    let published = wg(cluster.netns(0), &device).2[&key].endpoint.clone();
    // Node 1 listens elsewhere now, and says so by speaking alone.
    let moved = cluster.netns(1).clone();
    cluster.node(1).overlay.shutdown(Shutdown::Keep).await.unwrap();
    wg_set(&moved, &cluster.seats[1].device, &["listen-port", "51999"]);
    cluster.assert_talk(1, 0).await;
    let learnt = wg(cluster.netns(0), &device).2[&key].endpoint.clone();
    assert!(learnt.ends_with(":51999") && learnt != published, "{learnt}");
    // A check keeps it.
    assert!(cluster.node(0).overlay.reconcile().await.unwrap().done.is_empty());
    assert_eq!(wg(cluster.netns(0), &device).2[&key].endpoint, learnt);
    // Another port is published: that is taken.
    let node = name(cluster.lab.nodes()[1].name());
    let mut lease = cluster.subnets.leases().into_iter().find(|lease| lease.node == node).unwrap();
    let data = BackendData::from_text(&format!(r#"{{"PublicKey":"{key}","Port":51998}}"#)).unwrap();
    let public_ip = lease.offers[0].endpoints.v4().unwrap().public_ip;
    lease.offers[0].endpoints = Stack::V4(Endpoint { public_ip, data });
    cluster.subnets.faults().inject(lease);
    wait_until("the new place", PATIENCE, || async {
        Ok(wg(cluster.netns(0), &device).2[&key].endpoint.ends_with(":51998"))
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_behind_one_translated_address_are_reached_where_they_speak_from() {
    if skipped("behind one address").await {
        return;
    }
    let mut cluster = Cluster::of(3, Stack::V4(()), |_, backend| backend.keepalive(1)).await;
    // Nobody listens there: nodes 1 and 2 can be found by what they send alone.
    let translated = "203.0.113.77".parse().unwrap();
    for index in 0..3 {
        let mut builder = cluster.builder(index);
        if index > 0 {
            builder = builder.public_addresses(Stack::V4(translated));
        }
        cluster.running[index] = Some(spawn(builder).await);
    }
    for index in 0..3 {
        cluster.node(index).until(connected(2)).await;
    }
    for other in [1, 2] {
        cluster.assert_talk(0, other).await;
        cluster.assert_talk(other, 0).await;
    }
    // A check leaves them where they are, and knows nothing to do.
    assert!(cluster.node(0).overlay.reconcile().await.unwrap().done.is_empty());
    let (_, _, peers) = wg(cluster.netns(0), &cluster.seats[0].device);
    for other in [1, 2] {
        let at = SocketAddr::new(cluster.lab.nodes()[other].ip(), 51_820).to_string();
        assert_eq!(peers[&cluster.key(other).to_string()].endpoint, at);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_18_a_restart_over_a_thousand_peers_writes_nothing() {
    if skipped("a thousand peers").await {
        return;
    }
    let host = lone_host("thousand").await;
    let subnets = MemorySubnets::assigned(network("10.64.0.0/10"));
    subnets.assign(&name("me"), Stack::V4("10.127.255.0/24".parse().unwrap()));
    for number in 0..1000_u16 {
        let [high, low] = number.to_be_bytes();
        let key = PrivateKey::generate().public_key();
        let data = BackendData::from_text(&format!(r#"{{"PublicKey":"{key}","Port":51820}}"#)).unwrap();
        subnets.faults().inject(Lease {
            node: name(&format!("node-{number}")),
            subnets: Stack::V4(format!("10.{}.{low}.0/24", 64 + high).parse().unwrap()),
            offers: vec![Offer {
                backend: KIND,
                endpoints: Stack::V4(Endpoint { public_ip: [10, 241, high, low].into(), data }),
            }],
            precedence: Precedence { since: number.into(), identity: number.to_string() },
        });
    }
    let key = PrivateKey::generate();
    let mut seat = Seat::new(key.clone());
    let node = |seat: &Seat| {
        Node::builder("me", subnets.clone()).backend(seat.backend.clone()).network_namespace(namespace(host.netns()))
    };
    let running = spawn(node(&seat)).await;
    running.until(connected(1000)).await;
    let before = wg(host.netns(), &seat.device);
    assert_eq!(before.2.len(), 1000);
    assert!(running.overlay.reconcile().await.unwrap().is_clean());
    let begun = std::time::Instant::now();
    assert!(running.overlay.reconcile().await.unwrap().done.is_empty());
    let took = begun.elapsed();
    running.abort().await;
    seat.again(key, |backend| backend);
    let running = spawn(node(&seat)).await;
    running.until(connected(1000)).await;
    assert_eq!(running.steps(), 0);
    assert_eq!(wg(host.netns(), &seat.device), before);
    println!("a check of a node with 1000 WireGuard peers takes {took:?}");
    assert!(running.overlay.shutdown(Shutdown::RemoveState).await.unwrap().is_clean());
}
