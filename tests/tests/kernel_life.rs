//! The life of an overlay on a real kernel: a second one beside it, dropped and killed at any moment, restarted over a thousand peers,
//! removed without a trace, with fewer rights, and many in one process.

use std::sync::Arc;

use podnet::driver::NetworkNamespace;
use podnet::masquerade::MasqueradePolicy;
use podnet::status::Status;
use podnet::{Error, Node, NodeBuilder, Shutdown};
use podnet_lab::cluster::UNDERLAY_INTERFACE;
use podnet_lab::{Host, Route};
use podnet_tests::real::eye::{Dump, Eye};
use podnet_tests::real::monitor::Monitor;
use podnet_tests::real::privilege::{Opener, with_only};
use podnet_tests::real::stopwatch::Stopwatch;
use podnet_tests::real::{
    Cluster, DEVICE, Doomed, SOON, STATIC, Way, assert_same, builder, connected, dual, lone_host, many, namespace, turn,
};
use podnet_tests::{Running, spawn};
use podnet_vxlan::Vxlan;
use rustix::thread::CapabilitySet;

async fn start(host: &Host, peers: u16) -> Running {
    let running = spawn(builder("me", host.netns(), many(peers))).await;
    running.until(connected(peers.into())).await;
    running
}

/// What a clean start makes.
async fn reference(peers: u16) -> Dump {
    let host = lone_host("reference").await;
    let _running = start(&host, peers).await;
    Eye::on(host.netns()).settled().ours()
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_41_a_second_overlay_in_a_namespace_is_refused_and_the_first_is_undisturbed() {
    let host = lone_host("two").await;
    let first = start(&host, 3).await;
    let eye = Eye::on(host.netns());
    let (before, steps) = (eye.settled(), first.steps());
    let monitor = Monitor::on(host.netns(), host.link(DEVICE).await.unwrap().index);
    let second = builder("me", host.netns(), many(3)).build().unwrap().start().await.unwrap_err();
    assert!(matches!(second, Error::AlreadyRunning { .. }) && second.is_retryable(), "{second:?}");
    assert!(second.to_string().contains("another podnet overlay works in this network namespace"), "{second}");
    assert_same(&before, &eye.settled());
    assert_eq!((monitor.events(), first.steps()), (vec![], steps));
    assert!(first.overlay.reconcile().await.unwrap().is_clean());
    first.abort().await;
    let third = start(&host, 3).await;
    assert_same(&before, &eye.settled());
    assert_eq!((monitor.events(), third.steps()), (vec![], 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_40_a_runner_dropped_at_any_poll_leaves_no_socket_and_the_next_start_converges() {
    let whole = reference(3).await;
    let host = lone_host("dropped").await;
    let eye = Eye::on(host.netns());
    let idle = eye.sockets();
    let mut polls = 0;
    loop {
        let subnets = many(3);
        let node = builder("me", host.netns(), subnets.clone()).build().unwrap();
        let (overlay, runner) = node.start().await.unwrap();
        let mut status = overlay.status();
        let doomed = tokio::spawn(Doomed::after(polls, runner));
        // Until it is dropped, or has lived to its end.
        let finished = tokio::select! {
            ended = status.wait_for(|s| connected(3)(s)) => ended.is_ok(),
        };
        doomed.abort();
        let _ = doomed.await;
        assert_eq!(overlay.reconcile().await.unwrap_err(), Error::Stopped);
        podnet_lab::wait_until("its sockets are closed", SOON * 10, || async { Ok(eye.sockets() == idle) })
            .await
            .unwrap_or_else(|e| panic!("after {polls} polls {:?} instead of {idle:?}: {e}", eye.sockets()));

        let running = spawn(builder("me", host.netns(), subnets)).await;
        running.until(connected(3)).await;
        assert!(eye.sockets().0 > idle.0 && eye.sockets().1 == 1, "{:?}", eye.sockets());
        assert_same(&whole, &eye.settled().ours());
        let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert!(eye.settled().ours().lines().is_empty());
        drop(running);
        podnet_lab::wait_until("its sockets are closed", SOON * 10, || async { Ok(eye.sockets() == idle) })
            .await
            .unwrap();
        if finished {
            break;
        }
        polls += 1;
    }
    println!("it was dropped {polls} times");
    assert!(polls > 5, "it was dropped {polls} times");
}

/// Node `me` with three peers of two families.
fn of_two_families(way: Way, host: &Host) -> NodeBuilder {
    way.on(Node::builder("me", dual::store(way.kind(), 3)).network_namespace(namespace(host.netns())))
}

/// Waits until all of its peers are there, and what the kernel brings to an IPv6 address a moment later.
async fn whole(way: Way, running: &Running, eye: &Eye) -> Dump {
    running.until(connected(3)).await;
    if way != Way::HostGw {
        eye.until_has(&["route 2001:db8:40ff:ffff::/128", "table 255 Local"]);
    }
    eye.settled()
}

/// One after another on one host: dropped at its first poll, at its second, and so on to the end, each followed by a start that must
/// make the whole state, and by a removal that must leave nothing.
async fn dropped_at_any_poll(way: Way) {
    let host = dual::host("dropped").await;
    let eye = Eye::on(host.netns());
    let (before, idle) = (eye.settled(), eye.sockets());
    let closed = || podnet_lab::wait_until("its sockets are closed", SOON * 10, || async { Ok(eye.sockets() == idle) });
    let mut reference: Option<Dump> = None;
    for polls in 0.. {
        let (overlay, runner) = of_two_families(way, &host).build().unwrap().start().await.unwrap();
        let mut status = overlay.status();
        let doomed = tokio::spawn(Doomed::after(polls, runner));
        let finished = status.wait_for(|s| connected(3)(s)).await.is_ok();
        doomed.abort();
        assert!(doomed.await.is_ok() || finished);
        closed().await.unwrap();

        let running = spawn(of_two_families(way, &host)).await;
        let now = whole(way, &running, &eye).await;
        assert_same(reference.get_or_insert_with(|| now.clone()), &now);
        let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        drop(running);
        closed().await.unwrap();
        assert_same(&before, &eye.settled());
        if finished {
            // Without a device of its own a node waits for little.
            assert!(polls > 1, "{way:?}: it was dropped {polls} times");
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_17_and_40_host_gw_dropped_at_any_poll_is_made_whole_by_the_next_start() {
    let _turn = turn().await;
    dropped_at_any_poll(Way::HostGw).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_17_and_40_two_families_dropped_at_any_poll_are_made_whole_by_the_next_start() {
    let _turn = turn().await;
    dropped_at_any_poll(Way::Vxlan).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_41_and_42_by_every_way_a_second_overlay_is_refused_and_removal_takes_exactly_what_is_ours() {
    let _turn = turn().await;
    for way in Way::ALL {
        let host = dual::host("shared").await;
        // What a careless removal would take along: an operator's own routes, to networks of the cluster too.
        let operators = [
            Route::via("10.64.200.0/24".parse().unwrap(), [10, 240, 0, 9].into(), UNDERLAY_INTERFACE),
            Route::via(
                "2001:db8:4000:c8::/64".parse().unwrap(),
                "2001:db8:240::9".parse().unwrap(),
                UNDERLAY_INTERFACE,
            ),
        ];
        for route in operators {
            host.add_route(&Route { protocol: STATIC, ..route }).await.unwrap();
        }
        let eye = Eye::on(host.netns());
        let before = eye.settled();
        let first = spawn(of_two_families(way, &host)).await;
        let (whole, steps) = (whole(way, &first, &eye).await, first.steps());
        assert_same(&before, &whole.foreign());
        for other in Way::ALL {
            let second = of_two_families(other, &host).build().unwrap().start().await.unwrap_err();
            assert!(matches!(second, Error::AlreadyRunning { .. }), "{other:?} beside {way:?}: {second:?}");
        }
        assert!(first.overlay.reconcile().await.unwrap().is_clean());
        assert_same(&whole, &eye.settled());
        assert_eq!(first.steps(), steps);

        let report = first.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_same(&before, &eye.settled());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_17_killed_at_random_moments_of_the_bring_up_the_next_start_makes_the_exact_state() {
    let whole = reference(200).await;
    // A fixed seed: a failure can be looked at again.
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut unfinished, mut kills) = (0, 0);
    // Those that had finished show nothing.
    while kills < 16 || unfinished < 3 {
        assert!(kills < 60, "only {unfinished} of {kills} were killed before they had finished");
        let host = lone_host("killed").await;
        let subnets = many(200);
        for _ in 0..2 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let node = builder("me", host.netns(), subnets.clone()).build().unwrap();
            let (_overlay, runner) = node.start().await.unwrap();
            // The device is there, and then some more looks at it.
            let moment = async {
                podnet_lab::wait_until("the device", SOON * 10, || host.has_link(DEVICE)).await.unwrap();
                for _ in 0..seed >> 33 & 0x1f {
                    host.has_link(DEVICE).await.unwrap();
                }
            };
            let runner = tokio::spawn(runner);
            moment.await;
            runner.abort();
            assert!(runner.await.unwrap_err().is_cancelled());
            let left = Eye::on(host.netns()).settled().ours();
            kills += 1;
            unfinished += usize::from(left != whole);
        }
        let running = spawn(builder("me", host.netns(), subnets)).await;
        running.until(connected(200)).await;
        assert_same(&whole, &Eye::on(host.netns()).settled().ours());
    }
    println!("{unfinished} of {kills} were killed before they had finished");
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_18_a_restart_over_a_thousand_peers_writes_nothing() {
    let host = lone_host("restart").await;
    let subnets = many(1000);
    let running = spawn(builder("me", host.netns(), subnets.clone())).await;
    running.until(connected(1000)).await;
    let eye = Eye::on(host.netns());
    let whole = eye.settled();
    assert_eq!(whole.with(&["route", "proto 112", "nhid"]).len(), 1000);
    assert_eq!(whole.with(&["nexthop proto 112"]).len(), 1000);
    assert_eq!(whole.with(&["neighbour Inet dev flannel.1"]).len(), 1000);
    assert_eq!(whole.with(&["neighbour Bridge dev flannel.1"]).len(), 1000);
    running.abort().await;
    let monitor = Monitor::on(host.netns(), host.link(DEVICE).await.unwrap().index);
    let again = spawn(builder("me", host.netns(), subnets)).await;
    again.until(connected(1000)).await;
    assert!(again.overlay.reconcile().await.unwrap().failed.is_empty());
    // By the kernel's word: a write that changes nothing makes no event.
    assert_eq!((monitor.events(), again.changing_steps()), (vec![], 0));
    assert_same(&whole, &eye.settled());
}

#[tokio::test(flavor = "multi_thread")]
async fn fault_42_after_remove_state_nothing_of_ours_is_left_and_all_else_is_as_before() {
    // With plain routes, with nexthop objects, and with objects that were left by a change from the one to the other.
    for (peers, fewer) in [(3, None), (300, None), (300, Some(50))] {
        let host = lone_host("removed").await;
        host.set_sysctl("net.ipv4.ip_forward", "0").unwrap();
        let eye = Eye::on(host.netns());
        let before = eye.settled();
        let subnets = many(peers);
        let running = spawn(builder("me", host.netns(), subnets.clone())).await;
        running.until(connected(peers.into())).await;
        if let Some(fewer) = fewer {
            (fewer..peers).for_each(|n| subnets.faults().revoke(&podnet_tests::name(&format!("node-{n}"))));
            running.until(connected(fewer.into())).await;
            let now = eye.settled();
            assert_eq!(now.with(&["route", "proto 112"]).len(), usize::from(fewer));
            let (named, objects) = (now.with(&["route", "proto 112", "nhid"]).len(), now.with(&["nexthop"]).len());
            assert_eq!(named, objects, "no nexthop object is left that no route names");
        }
        let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.kept_settings, ["net/ipv4/ip_forward = 1"]);
        assert_same(&before, &eye.settled());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_gives_the_lease_back_and_keeping_leaves_the_pods_talking() {
    let cluster = Cluster::running(2).await;
    let whole = cluster.eye(0).settled();
    cluster.overlay(0).overlay.shutdown(Shutdown::Keep).await.unwrap();
    assert_same(&whole, &cluster.eye(0).settled());
    cluster.assert_pods_talk().await;

    cluster.overlay(1).overlay.shutdown(Shutdown::Leave).await.unwrap();
    assert!(cluster.subnets.leases().iter().all(|l| l.node.as_str() != "rke-52b280-1"));
    assert!(cluster.eye(1).settled().ours().lines().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_namespace_of_which_only_sockets_are_given_cap_net_admin_is_enough() {
    let cluster = Cluster::bare(2).await;
    // The other node is an ordinary one.
    let other = spawn(cluster.builder(1)).await;
    let opener = Opener::of(cluster.host(0).netns());
    let subnets = cluster.subnets.clone();
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = with_only(CapabilitySet::NET_ADMIN, None, move || async move {
        let node = Node::builder("rke-52b280-0", subnets).backend(Vxlan::new());
        let running = spawn(node.network_namespace(NetworkNamespace::Sockets(Arc::new(opener)))).await;
        let status = running.until(connected(1)).await;
        ready.send((status, running.overlay.clone())).unwrap();
        stopped.await.unwrap();
    });
    let (status, overlay) = is_ready.await.unwrap();
    let warned = |s: &Status| s.warnings.iter().any(|w| w.to_string().contains("ip_forward"));
    assert!(warned(&status), "{status}");
    assert_eq!(cluster.host(0).sysctl("net.ipv4.ip_forward").unwrap(), "0", "the host's to set");
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "1").unwrap();
    other.until(connected(1)).await;
    cluster.assert_pods_talk().await;
    // The lock is in the namespace that the sockets are of.
    let second = cluster.builder(0).build().unwrap().start().await.unwrap_err();
    assert!(matches!(second, Error::AlreadyRunning { .. }), "{second}");
    cluster.host(0).delete_route(&cluster.route_to(1)).await.unwrap();
    let watch = Stopwatch::start(cluster.host(0).netns());
    cluster.eye(0).until_has(&["route 10.42.1.0/24 proto 112"]);
    watch.assert_soon();
    overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(cluster.eye(0).settled().ours().lines().is_empty());
    stop.send(()).unwrap();
    thread.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn case_24_as_nobody_with_cap_net_admin_alone_all_of_it_works_sysctls_too() {
    let cluster = Cluster::bare(2).await;
    let other = spawn(cluster.builder(1)).await;
    cluster.host(0).set_sysctl("net.ipv4.ip_forward", "0").unwrap();
    let before = cluster.eye(0).settled();
    let subnets = cluster.subnets.clone();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let thread = with_only(CapabilitySet::NET_ADMIN, Some(cluster.host(0).netns()), move || async move {
        let running = spawn(Node::builder("rke-52b280-0", subnets).backend(Vxlan::new())).await;
        running.until(connected(1)).await;
        ready.send(running.overlay.clone()).unwrap();
        stopped.await.unwrap();
    });
    let overlay = is_ready.await.unwrap();
    other.until(connected(1)).await;
    assert_eq!(cluster.host(0).sysctl("net.ipv4.ip_forward").unwrap(), "1");
    cluster.assert_pods_talk().await;
    cluster.host(0).delete_link(DEVICE).await.unwrap();
    let watch = Stopwatch::start(cluster.host(0).netns());
    cluster.eye(0).until_has(&["route 10.42.1.0/24 proto 112"]);
    watch.assert_soon();
    cluster.assert_pods_talk().await;
    let report = overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_same(&before, &cluster.eye(0).settled());
    stop.send(()).unwrap();
    thread.join().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_nodes_of_a_thousand_peers_in_one_process_and_a_policy_changed_while_they_run() {
    let (a, b) = tokio::join!(lone_host("a"), lone_host("b"));
    let (first, second) = tokio::join!(start(&a, 1000), start(&b, 1000));
    let (eye_a, eye_b) = (Eye::on(a.netns()), Eye::on(b.netns()));
    let (before, others) = (eye_a.settled(), eye_b.settled());
    assert_same(&before.ours(), &others.ours());
    let monitor_a = Monitor::on(a.netns(), a.link(DEVICE).await.unwrap().index);
    let monitor_b = Monitor::on(b.netns(), b.link(DEVICE).await.unwrap().index);

    let policy = MasqueradePolicy::default().never_masquerade(["192.168.0.0/16".parse().unwrap()]);
    let report = first.overlay.set_masquerade(policy.clone()).await.unwrap();
    assert!(report.is_clean() && report.steps == 1, "{report:?}");
    assert_eq!(first.overlay.masquerade().await.unwrap(), policy);
    let changed = eye_a.settled();
    assert!(changed != before && changed.has(&["nft ip podnet set"]), "{}", before.difference(&changed));
    let events = monitor_a.events();
    assert!(events.iter().all(|e| e.starts_with("nftables")), "{events:?}");
    assert_eq!(events.iter().filter(|e| e.ends_with(" 0xa0f")).count(), 1, "one transaction: {events:?}");

    first.overlay.set_masquerade(MasqueradePolicy::off()).await.unwrap();
    assert!(!eye_a.dump().has(&["nft ip podnet"]));
    first.overlay.set_masquerade(MasqueradePolicy::default()).await.unwrap();
    assert_same(&before, &eye_a.settled());
    assert_eq!((monitor_b.events(), second.steps()), (vec![], second.steps()));
    assert_same(&others, &eye_b.settled());
}
