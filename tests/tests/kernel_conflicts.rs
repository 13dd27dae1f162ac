//! What a real host holds against an overlay, and what is said of it: missing rights, namespaces, devices and addresses; networks in use;
//! firewalls that drop; and leases of other nodes that lie.

use podnet::Error;
use podnet::driver::NetworkNamespace;
use podnet::lease::Lease;
use podnet::status::{ConditionKind, ConditionState, Status};
use podnet::underlay::UnderlayChoice;
use podnet::{Node, subnet::memory::MemorySubnets};
use podnet_lab::cluster::{DOCKER_BRIDGE, UNDERLAY_INTERFACE};
use podnet_lab::{Host, Route};
use podnet_tests::real::eye::Eye;
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::privilege::with_only;
use podnet_tests::real::stopwatch::Stopwatch;
use podnet_tests::real::{
    Cluster, DEVICE, SOON, STATIC, assert_same, builder, connected, lone_host, many, network, nft, peer, slower,
};
use podnet_tests::{claim, name, spawn};
use podnet_vxlan::Vxlan;
use rustix::thread::CapabilitySet;

// ---- rights, namespaces, devices ----

#[tokio::test(flavor = "multi_thread")]
async fn without_cap_net_admin_one_error_says_so_and_nothing_is_changed() {
    let host = lone_host("powerless").await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let thread = with_only(CapabilitySet::empty(), Some(host.netns()), || async {
        match Node::builder("me", many(3)).backend(Vxlan::new()).build().unwrap().start().await {
            Err(error) => (error.to_string(), 1),
            Ok((overlay, runner)) => {
                let task = tokio::spawn(runner);
                let mut status = overlay.status();
                let failed = |s: &Status| s.condition(ConditionKind::Kernel).state == ConditionState::Failed;
                let seen = status.wait_for(|s| failed(s)).await.unwrap().clone();
                task.abort();
                (seen.to_string(), seen.to_string().matches("CAP_NET_ADMIN").count())
            }
        }
    });
    let (told, times) = thread.join().unwrap();
    assert!(told.contains("CAP_NET_ADMIN") && times == 1, "said {times} times:\n{told}");
    assert_same(&before, &eye.settled());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_not_there_or_is_none_is_named_at_the_start() {
    for (path, word) in [("/run/netns/there-is-none-such", "No such file"), ("/proc/self/status", "Invalid argument")] {
        let node = Node::builder("me", many(1)).backend(Vxlan::new());
        let node = node.network_namespace(NetworkNamespace::Path(path.into())).build().unwrap();
        let error = node.start().await.unwrap_err();
        assert!(matches!(error, Error::Driver(_)), "{error:?}");
        let told = error.to_string();
        assert!(told.contains(word) && (told.contains(path) || word == "Invalid argument"), "{told}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_may_not_be_entered_is_refused_with_the_capability_that_it_takes() {
    let netns = podnet_lab::Netns::new("closed").unwrap();
    let namespace = podnet_tests::real::namespace(&netns);
    let thread = with_only(CapabilitySet::NET_ADMIN, None, move || async move {
        let node = Node::builder("me", many(1)).backend(Vxlan::new());
        node.network_namespace(namespace).build().unwrap().start().await.unwrap_err().to_string()
    });
    let told = thread.join().unwrap();
    assert!(told.contains("CAP_SYS_ADMIN"), "{told}");
}

async fn underlay_trouble(choice: UnderlayChoice) -> String {
    let host = lone_host("lost").await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let running = spawn(builder("me", host.netns(), many(3)).underlay(choice)).await;
    let failed = |s: &Status| s.condition(ConditionKind::Underlay).state == ConditionState::Failed;
    let status = running.until(failed).await;
    assert_same(&before, &eye.settled());
    status.condition(ConditionKind::Underlay).message
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_interface_or_address_is_an_error_that_names_it_and_what_exists() {
    let told = underlay_trouble(UnderlayChoice::Device("eth7".parse().unwrap())).await;
    assert!(["eth7", "ens4 10.240.0.103", "docker0 172.17.0.1"].iter().all(|part| told.contains(part)), "{told}");
    let told = underlay_trouble(UnderlayChoice::Address([192, 0, 2, 7].into())).await;
    assert!(["192.0.2.7", "ens4 10.240.0.103", "docker0 172.17.0.1"].iter().all(|part| told.contains(part)), "{told}");
    // There, but without an address.
    let told = underlay_trouble(UnderlayChoice::Device("lo".parse().unwrap())).await;
    assert!(told.contains("lo") && told.contains("ens4 10.240.0.103"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interface_that_comes_later_is_taken_when_it_comes() {
    let host = Host::new("late").unwrap();
    let running = spawn(builder("me", host.netns(), many(3))).await;
    running.until(|s| s.condition(ConditionKind::Underlay).state == ConditionState::Failed).await;
    host.add_bridge(UNDERLAY_INTERFACE, Some(1500)).await.unwrap();
    host.add_address(UNDERLAY_INTERFACE, "10.240.0.103/24".parse().unwrap()).await.unwrap();
    let default = Route::via("0.0.0.0/0".parse().unwrap(), [10, 240, 0, 1].into(), UNDERLAY_INTERFACE);
    host.add_route(&default).await.unwrap();
    running.until(connected(3)).await;
}

// ---- networks in use ----

/// A store of this cluster network in which node `me` has the first /24 that is given, and one peer.
fn store(cluster: &str, own: &str, peers: &str) -> MemorySubnets {
    let subnets = MemorySubnets::assigned(network(cluster));
    subnets.assign(&name("me"), podnet::types::Stack::V4(own.parse().unwrap()));
    subnets.faults().inject(claim("node-1", 1, peers, "10.240.0.104", "02:00:00:00:00:01"));
    subnets
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_network_that_the_host_uses_is_a_conflict_that_names_both_and_nothing_is_touched() {
    for (cluster, own, peers, with) in [
        ("10.240.0.0/16", "10.240.7.0/24", "10.240.8.0/24", ["10.240.0.103", "ens4"]),
        ("172.17.0.0/16", "172.17.7.0/24", "172.17.8.0/24", ["172.17.0.0/16", DOCKER_BRIDGE]),
        ("172.16.0.0/12", "172.17.7.0/24", "172.20.8.0/24", ["172.17.0.0/16", DOCKER_BRIDGE]),
        ("192.168.0.0/16", "192.168.7.0/24", "192.168.8.0/24", ["192.168.0.0/16", "lan0"]),
    ] {
        let host = lone_host("overlap").await;
        host.add_bridge("lan0", None).await.unwrap();
        host.add_address("lan0", "192.168.1.1/16".parse().unwrap()).await.unwrap();
        let eye = Eye::on(host.netns());
        let before = eye.settled();
        let subnets = store(cluster, own, peers);
        let running = spawn(builder("me", host.netns(), subnets.clone())).await;
        let stopped = |s: &Status| {
            s.condition(ConditionKind::Kernel).state == ConditionState::Failed
                && s.condition(ConditionKind::Peers).state == ConditionState::Met
        };
        let status = running.until(stopped).await;
        let told = status.condition(ConditionKind::Kernel).message;
        assert!(told.contains(cluster) && with.iter().all(|part| told.contains(part)), "{cluster}: {told}");
        assert_eq!(status.peers.connected, 0, "{status}");
        running.overlay.reconcile().await.unwrap();
        assert_same(&before, &eye.settled());
        let own = subnets.leases().into_iter().find(|l| l.node == name("me"));
        assert!(own.is_none_or(|lease| lease.offers.is_empty()), "peers are not sent to a node that cannot take part");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_that_comes_while_the_overlay_runs_takes_nothing_away_and_goes_when_it_goes() {
    let cluster = Cluster::running(2).await;
    let whole = cluster.eye(0).settled();
    let address = "10.42.77.1/16".parse().unwrap();
    cluster.host(0).add_address(DOCKER_BRIDGE, address).await.unwrap();
    cluster.overlay(0).until(|s| s.condition(ConditionKind::Kernel).state == ConditionState::Failed).await;
    assert_same(&whole.ours(), &cluster.eye(0).settled().ours());
    cluster.host(0).delete_address(DOCKER_BRIDGE, address).await.unwrap();
    cluster.overlay(0).until(connected(1)).await;
    assert_same(&whole, &cluster.eye(0).settled());
    cluster.assert_pods_talk().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_route_to_a_peer_is_a_conflict_of_that_peer_alone() {
    let host = lone_host("taken").await;
    let foreign = Route::via("10.64.1.0/24".parse().unwrap(), [10, 240, 0, 9].into(), UNDERLAY_INTERFACE);
    host.add_route(&Route { protocol: STATIC, ..foreign }).await.unwrap();
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let running = spawn(builder("me", host.netns(), many(3))).await;
    let status = running.until(|s| s.is_ready() && s.peers.connected == 2 && s.troubled.len() == 1).await;
    let told = status.to_string();
    assert!(told.contains("node-1") && told.contains("10.64.1.0/24 via 10.240.0.9 dev ens4 proto static"), "{told}");
    assert_same(&before, &eye.settled().foreign());
    assert!(eye.dump().has(&["route 10.64.0.0/24 proto 112"]) && eye.dump().has(&["route 10.64.2.0/24 proto 112"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_of_our_name_that_is_somebody_elses_is_a_conflict_and_is_not_touched() {
    let host = lone_host("table").await;
    nft::commit(
        host.netns(),
        &[
            nft::table(nft::IPV4, "podnet"),
            nft::chain(nft::IPV4, "podnet", "mine", "filter", (nft::FORWARD, 5, nft::ACCEPT)),
        ],
    );
    let eye = Eye::on(host.netns());
    let before = eye.settled().with(&["nft"]).join("\n");
    let running = spawn(builder("me", host.netns(), many(3))).await;
    let failed = |s: &Status| s.condition(ConditionKind::Kernel).state == ConditionState::Failed;
    let told = running.until(failed).await.to_string();
    assert!(told.contains("the nftables table ip podnet"), "{told}");
    running.overlay.reconcile().await.unwrap();
    assert_eq!(before, eye.settled().with(&["nft"]).join("\n"));
    nft::commit(host.netns(), &[nft::delete_table(nft::IPV4, Some("podnet"))]);
    running.until(connected(3)).await;
}

// ---- firewalls ----

#[tokio::test(flavor = "multi_thread")]
async fn fault_15_a_chain_that_drops_forwarded_packets_is_named_in_the_status_until_it_goes() {
    let host = lone_host("firewall").await;
    let running = spawn(builder("me", host.netns(), many(3))).await;
    running.until(connected(3)).await;
    let eye = Eye::on(host.netns());
    let ours = eye.settled().ours();
    // Each change is noticed at once: one of them at the full check alone would take ten seconds.
    let began = std::time::Instant::now();
    for (family, table, chain, policy, rules, words) in [
        // Docker, through iptables-nft.
        (nft::IPV4, "filter", "FORWARD", nft::DROP, vec![], ["chain FORWARD", "table ip filter", "policy drop"]),
        // firewalld's last word.
        (
            nft::INET,
            "firewalld",
            "filter_FORWARD",
            nft::ACCEPT,
            vec![nft::reject()],
            ["chain filter_FORWARD", "table inet firewalld", "policy accept"],
        ),
    ] {
        let mut steps =
            vec![nft::table(family, table), nft::chain(family, table, chain, "filter", (nft::FORWARD, 0, policy))];
        if !rules.is_empty() {
            steps.push(nft::rule(family, table, chain, &rules));
        }
        nft::commit(host.netns(), &steps);
        let status = running.until(|s| s.warnings.iter().any(|w| w.with.contains(chain))).await;
        let warning = status.warnings.iter().find(|w| w.with.contains(chain)).unwrap();
        assert!(words.iter().all(|word| warning.with.contains(word)), "{warning}");
        assert!(status.is_ready(), "a warning holds nothing back: {status}");
        nft::commit(host.netns(), &[nft::delete_table(family, Some(table))]);
        running.until(|s| !s.warnings.iter().any(|w| w.with.contains(chain))).await;
    }
    // One that lets the pods through before it drops the rest is nobody's trouble.
    let docker = |rules: &[Vec<Vec<u8>>]| {
        let rules = rules.iter().map(|rule| nft::rule(nft::IPV4, "filter", "FORWARD", rule));
        let chain = nft::chain(nft::IPV4, "filter", "FORWARD", "filter", (nft::FORWARD, 0, nft::DROP));
        [
            nft::table(nft::IPV4, "filter"),
            nft::delete_table(nft::IPV4, Some("filter")),
            nft::table(nft::IPV4, "filter"),
            chain,
        ]
        .into_iter()
        .chain(rules)
        .collect::<Vec<_>>()
    };
    nft::commit(host.netns(), &docker(&[]));
    running.until(|s| s.warnings.iter().any(|w| w.with.contains("FORWARD"))).await;
    let pods = |source| [&nft::within(source, [10, 64], [0xff, 0xc0])[..], &[nft::verdict(nft::ACCEPT)]].concat();
    nft::commit(host.netns(), &docker(&[pods(true), pods(false)]));
    running.until(|s| !s.warnings.iter().any(|w| w.with.contains("FORWARD"))).await;
    assert!(began.elapsed() < slower(SOON * 9), "warnings came late: {:?}", began.elapsed());
    assert_same(&ours, &eye.settled().ours());
}

// ---- leases that lie ----

/// Leases that no node may have, beside 20 honest ones: 10.64.0.0/24 to 10.64.19.0/24, at 10.240.1.0 to 10.240.1.19.
fn hostile() -> Vec<(&'static str, Lease)> {
    let lie = |what, subnet: &str, address: &str, mac: &str| (what, claim(what, 1_000_000, subnet, address, mac));
    let [subnet, address, mac] = ["10.66.0.0/24", "10.240.9.9", "02:00:00:00:99:99"];
    vec![
        lie("case-01-everything", "0.0.0.0/0", address, mac),
        lie("case-01-half-of-it", "128.0.0.0/1", address, mac),
        lie("case-02-services", "10.43.0.0/16", address, mac),
        lie("case-03-same-subnet", "10.64.5.0/24", address, mac),
        lie("case-04-more-specific", "10.64.5.128/25", address, mac),
        lie("case-04-wider", "10.64.4.0/22", address, mac),
        lie("case-05-our-own", "10.127.255.0/24", address, mac),
        lie("case-05-inside-our-own", "10.127.255.128/25", address, mac),
        lie("case-07-host-bits", "10.66.9.7/24", address, mac),
        lie("case-08-loopback", subnet, "127.0.0.1", mac),
        lie("case-08-unspecified", subnet, "0.0.0.0", mac),
        lie("case-08-broadcast", subnet, "255.255.255.255", mac),
        lie("case-08-multicast", subnet, "224.0.0.1", mac),
        lie("case-08-ours", subnet, "10.240.0.103", mac),
        lie("case-09-anothers-address", subnet, "10.240.1.5", mac),
        lie("case-11-multicast-mac", subnet, address, "01:00:5e:00:00:01"),
        lie("case-11-broadcast-mac", subnet, address, "ff:ff:ff:ff:ff:ff"),
        lie("case-11-zero-mac", subnet, address, "00:00:00:00:00:00"),
        lie("case-11-anothers-mac", subnet, address, "02:00:00:00:00:05"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn case_01_to_11_hostile_leases_change_nothing_in_the_kernel_and_are_counted() {
    let host = lone_host("attacked").await;
    let subnets = many(20);
    let running = spawn(builder("me", host.netns(), subnets.clone())).await;
    running.until(connected(20)).await;
    let eye = Eye::on(host.netns());
    let before = eye.settled();
    let monitor = Monitor::on(host.netns(), host.link(DEVICE).await.unwrap().index);
    let lies = hostile();
    for (_, lease) in &lies {
        subnets.faults().inject(lease.clone());
    }
    let total = 20 + lies.len();
    let status = running.until(|s| s.peers.total == total).await;
    assert_eq!((status.peers.refused, status.peers.connected), (lies.len(), 20), "{status}");
    assert!(status.is_ready(), "{status}");
    for (node, _) in &lies {
        assert!(status.troubled.iter().any(|p| p.node.as_str() == *node), "{node} is not named: {status}");
    }
    running.overlay.reconcile().await.unwrap();
    assert_same(&before, &eye.settled());
    assert_eq!(monitor.events(), Vec::<String>::new());

    // Nor at a start with all of them there.
    running.abort().await;
    let again = spawn(builder("me", host.netns(), subnets.clone())).await;
    again.until(|s| s.is_ready() && s.peers.refused == lies.len()).await;
    assert_same(&before, &eye.settled());
    assert_eq!(monitor.events(), Vec::<String>::new());

    // When the honest holder leaves, the claim to the same subnet comes in, and nothing else.
    subnets.faults().revoke(&name("node-5"));
    eye.until_has(&["neighbour Bridge dev flannel.1", "to 10.240.9.9"]);
    assert!(eye.dump().has(&["route 10.64.5.0/24 proto 112"]));
    subnets.faults().revoke(&name("case-03-same-subnet"));
    eye.until_lacks(&["route 10.64.5.0/24 proto 112"]);
    subnets.faults().inject(peer(5));
}

// ---- offload ----

#[tokio::test(flavor = "multi_thread")]
async fn checksum_offload_that_is_switched_off_is_seen_off_from_outside_and_stays_so() {
    let host = lone_host("offload").await;
    let feature = || podnet_tests::real::eye::tx_checksum_offload(host.netns(), DEVICE);
    let running = spawn(
        Node::builder("me", many(1))
            .backend(Vxlan::new())
            .network_namespace(podnet_tests::real::namespace(host.netns())),
    )
    .await;
    running.until(connected(1)).await;
    assert_eq!(feature(), Some(true), "the kernel's default");
    running.abort().await;
    let off = || Vxlan::new().tx_checksum_offload(false);
    let running = spawn(
        Node::builder("me", many(1)).backend(off()).network_namespace(podnet_tests::real::namespace(host.netns())),
    )
    .await;
    running.until(connected(1)).await;
    assert_eq!(feature(), Some(false));
    assert!(running.overlay.reconcile().await.unwrap().done.is_empty());
    host.delete_link(DEVICE).await.unwrap();
    let watch = Stopwatch::start(host.netns());
    podnet_lab::wait_until("it is off again", podnet_tests::real::SOON * 10, || async { Ok(feature() == Some(false)) })
        .await
        .unwrap();
    watch.assert_soon();
}
