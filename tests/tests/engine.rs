//! The engine on a fake kernel: what it makes, what it heals, what it survives. Time is paused, so that hours cost nothing;
//! the fake is held to the real kernel by the test `model`.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use podnet::config::NetworkConfig;
use podnet::driver::{ChangeStream, Driver, DriverError, Errno, Observed, Scope, UnitResult};
use podnet::lease::Offer;
use podnet::masquerade::MasqueradePolicy;
use podnet::plan::{Conflict, Domain, Key, SysctlName, UnitPlan};
use podnet::status::{ConditionKind, ConditionState, PeerState, Status};
use podnet::subnet::memory::{Call, MemorySubnets};
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::testkit::kernel::{Death, FakeKernel};
use podnet::types::{DeviceName, Family, NodeName, Stack};
use podnet::{Error, HostSetting, Node, Shutdown};
use podnet_tests::{Running, builder, claim, eventually, host, name, peer, spawn, start, store};
use podnet_vxlan::Vxlan;

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

/// A node with two peers, all in place.
async fn cluster() -> (FakeKernel, MemorySubnets, Running) {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(0));
    subnets.faults().inject(peer(1));
    let running = start(&kernel, &subnets).await;
    kernel.take_writes();
    (kernel, subnets, running)
}

/// Does something to the kernel and waits until it is as before; repairs are promised within a second.
async fn heals(kernel: &FakeKernel, harm: impl FnOnce(&FakeKernel)) -> Duration {
    let whole = kernel.dump();
    harm(kernel);
    assert_ne!(kernel.dump(), whole, "the harm is done");
    let took = eventually("the kernel is as before", || kernel.dump() == whole).await;
    assert!(took < Duration::from_secs(1), "it took {took:?}");
    took
}

#[tokio::test(start_paused = true)]
async fn a_node_and_its_peers_are_programmed_as_flannel_would() {
    let (kernel, subnets, running) = cluster().await;
    let dump = kernel.dump();
    for line in [
        "10.42.0.0/24 via 10.42.0.0 dev flannel.1 onlink",
        "10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink",
        "02:00:00:00:00:01",
        "10.42.2.0/32",
        "mtu 1450",
        "172.17.0.1/16",
    ] {
        assert!(dump.contains(line), "{line} is missing from\n{dump}");
    }
    let status = running.overlay.status().borrow().clone();
    assert_eq!((status.peers.total, status.peers.connected), (2, 2));
    assert_eq!(status.pod_mtu.unwrap().bytes(), 1450);
    let own = subnets.leases().into_iter().find(|l| l.node == name("me")).unwrap();
    assert_eq!(own.offers[0].endpoints.v4().unwrap().public_ip.to_string(), "10.240.0.103");
}

#[tokio::test(start_paused = true)]
async fn peers_come_change_and_go_each_at_its_own_cost() {
    let (kernel, subnets, running) = cluster().await;
    subnets.faults().inject(peer(7));
    eventually("the new peer's route", || kernel.dump().contains("10.42.7.0/24")).await;
    assert_eq!(kernel.take_writes().len(), 3, "a neighbour, a forwarding entry, a route");

    let moved = claim("node-7", 7, "10.42.7.0/24", "10.240.0.77", "02:00:00:00:00:07");
    subnets.faults().inject(moved);
    eventually("the new address", || kernel.dump().contains("10.240.0.77")).await;
    eventually("the old address is gone", || {
        !kernel.dump().contains("10.240.0.7\n") && !kernel.dump().contains("10.240.0.7 ")
    })
    .await;
    assert!(kernel.take_writes().len() <= 2);

    subnets.faults().revoke(&name("node-7"));
    eventually("the peer is gone", || !kernel.dump().contains("10.42.7.0")).await;
    assert_eq!(kernel.take_writes().len(), 3);
    running.until(|s| s.peers.total == 2).await;
}

#[tokio::test(start_paused = true)]
async fn fault_01_a_deleted_route_is_back_within_a_second_and_nothing_else_is_written() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| k.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap()).await;
    assert_eq!(kernel.take_writes().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn fault_02_flushed_routes_are_back_within_a_second() {
    let (kernel, _subnets, running) = cluster().await;
    heals(&kernel, |k| assert_eq!(k.flush_routes(&dev("flannel.1")), 2)).await;
    assert_eq!(kernel.take_writes().len(), 2);
    eventually("it was counted", || running.overlay.status().borrow().counters.repaired == 2).await;
}

#[tokio::test(start_paused = true)]
async fn fault_04_a_deleted_neighbour_is_back_within_a_second() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| k.neigh_del(&dev("flannel.1"), "10.42.1.0".parse().unwrap()).unwrap()).await;
    assert_eq!(kernel.take_writes().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn fault_05_a_deleted_and_a_moved_forwarding_entry_are_put_right_within_a_second() {
    let (kernel, _subnets, _running) = cluster().await;
    let (device, mac) = (dev("flannel.1"), "02:00:00:00:00:01".parse().unwrap());
    heals(&kernel, |k| k.fdb_del(&device, mac, None).unwrap()).await;
    assert_eq!(kernel.take_writes().len(), 1);
    heals(&kernel, |k| k.fdb_replace(&device, mac, "10.240.0.66".parse().unwrap()).unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn fault_06_a_device_that_goes_down_and_up_gets_its_routes_and_neighbours_back() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| {
        k.link_down(&dev("flannel.1")).unwrap();
        k.link_up(&dev("flannel.1")).unwrap();
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_device_that_somebody_sets_down_is_set_up_again() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| k.link_down(&dev("flannel.1")).unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn fault_07_a_deleted_device_comes_back_with_the_same_mac_and_all_peers() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| k.link_del(&dev("flannel.1")).unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn fault_09_the_mtu_follows_the_underlay_and_is_put_back_when_somebody_else_changes_it() {
    let (kernel, _subnets, running) = cluster().await;
    heals(&kernel, |k| k.link_set_mtu(&dev("flannel.1"), 1300).unwrap()).await;
    kernel.link_set_mtu(&dev("eth0"), 1400).unwrap();
    let status = running.until(|s| s.pod_mtu.is_some_and(|mtu| mtu.bytes() == 1350)).await;
    assert!(status.is_ready());
    eventually("the device follows", || kernel.dump().contains("mtu 1350")).await;
}

#[tokio::test(start_paused = true)]
async fn fault_11_an_underlay_that_is_deleted_and_made_again_gets_its_overlay_back() {
    let (kernel, _subnets, _running) = cluster().await;
    let flannel = |k: &FakeKernel| k.dump().lines().filter(|l| l.contains("flannel.1")).count();
    let before = flannel(&kernel);
    kernel.underlay_recreate(&dev("eth0")).unwrap();
    assert_eq!(flannel(&kernel), 0, "the device died with its underlay");
    kernel.addr_add(&dev("eth0"), "10.240.0.103/16".parse().unwrap()).ok();
    let next = podnet::plan::NextHop::Gateway {
        device: dev("eth0"),
        address: "10.240.255.254".parse().unwrap(),
        onlink: false,
    };
    let default = podnet::testkit::kernel::KernelRoute::boot("0.0.0.0/0".parse().unwrap(), next);
    kernel.ip_route_add(default).ok();
    let took = eventually("all is back", || flannel(&kernel) == before).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn fault_12_a_new_underlay_address_is_followed_by_the_device_and_published() {
    let (kernel, subnets, running) = cluster().await;
    // In this order: a second address of one network goes with the first.
    kernel.addr_del(&dev("eth0"), "10.240.0.103/16".parse().unwrap()).unwrap();
    kernel.addr_add(&dev("eth0"), "10.240.0.203/16".parse().unwrap()).unwrap();
    let next = podnet::plan::NextHop::Gateway {
        device: dev("eth0"),
        address: "10.240.255.254".parse().unwrap(),
        onlink: false,
    };
    kernel.ip_route_add(podnet::testkit::kernel::KernelRoute::boot("0.0.0.0/0".parse().unwrap(), next)).ok();
    eventually("the device follows", || kernel.dump().contains("local 10.240.0.203")).await;
    let published = || {
        let own = subnets.leases().into_iter().find(|l| l.node == name("me"));
        own.is_some_and(|l| l.offers[0].endpoints.v4().unwrap().public_ip.to_string() == "10.240.0.203")
    };
    eventually("peers are told", published).await;
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn fault_13_a_deleted_table_and_a_flushed_ruleset_are_back_within_a_second() {
    let (kernel, _subnets, _running) = cluster().await;
    heals(&kernel, |k| k.nft_delete_table(Family::V4).unwrap()).await;
    assert_eq!(kernel.take_writes().len(), 1, "one transaction");
    heals(&kernel, FakeKernel::nft_flush_ruleset).await;
}

#[tokio::test(start_paused = true)]
async fn fault_16_forwarding_that_is_switched_off_is_switched_on_again_or_reported() {
    let (kernel, subnets, running) = cluster().await;
    let forwarding = SysctlName::forwarding(Family::V4);
    heals(&kernel, |k| k.sysctl_set(&forwarding, "0").unwrap()).await;
    running.kill(&kernel).await;

    let reporting = spawn(builder(&kernel, subnets).ip_forward(HostSetting::Report)).await;
    reporting.until(Status::is_ready).await;
    kernel.sysctl_set(&forwarding, "0").unwrap();
    let status = reporting.until(|s| s.warnings.iter().any(|w| w.with.contains("ip_forward"))).await;
    assert!(status.to_string().contains("net/ipv4/ip_forward = 0"), "{status}");
    assert_eq!(kernel.sysctl_value(&forwarding).as_deref(), Some("0"));
}

#[tokio::test(start_paused = true)]
async fn fault_17_killed_at_any_write_the_next_start_converges_to_the_same_state() {
    let (whole, writes) = {
        let (kernel, subnets) = (host(), store());
        subnets.faults().inject(peer(0));
        subnets.faults().inject(peer(1));
        let _running = start(&kernel, &subnets).await;
        (kernel.dump(), kernel.writes().len())
    };
    assert!(writes >= 8, "there is something to be killed at: {writes}");
    for k in 1..=u64::try_from(writes).unwrap() {
        let (kernel, subnets) = (host(), store());
        subnets.faults().inject(peer(0));
        subnets.faults().inject(peer(1));
        kernel.faults().kill_at(k, Death::Hang);
        let doomed = spawn(builder(&kernel, subnets.clone())).await;
        eventually("it died", || kernel.writes().len() as u64 >= k).await;
        doomed.kill(&kernel).await;
        let _running = start(&kernel, &subnets).await;
        eventually("the state is whole", || kernel.dump() == whole).await;
    }
}

#[tokio::test(start_paused = true)]
async fn every_single_write_that_fails_once_is_made_up_for() {
    let (whole, writes) = {
        let (kernel, _subnets, _running) = cluster().await;
        (kernel.dump(), 9)
    };
    for errno in [Errno::BUSY, Errno::EXIST, Errno::NODEV, Errno::INVAL, Errno::NOBUFS, Errno::NETDOWN] {
        for k in 1..=writes {
            let (kernel, subnets) = (host(), store());
            subnets.faults().inject(peer(0));
            subnets.faults().inject(peer(1));
            kernel.faults().fail_write(k, errno);
            let running = start(&kernel, &subnets).await;
            eventually(&format!("write {k} refused with {errno} is made up for"), || kernel.dump() == whole).await;
            running.until(|s| s.peers.connected == 2 && s.peers.failing == 0).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn invariant_12_a_restart_over_an_unchanged_kernel_writes_nothing() {
    let (kernel, subnets, running) = cluster().await;
    running.kill(&kernel).await;
    let restarted = start(&kernel, &subnets).await;
    restarted.overlay.reconcile().await.unwrap();
    assert_eq!(kernel.take_writes().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn invariant_02_a_restart_deletes_nothing_before_it_has_seen_all_leases() {
    let (kernel, subnets, running) = cluster().await;
    running.kill(&kernel).await;
    let whole = kernel.dump();
    let unavailable = SubnetError::Unavailable { attempted: "watch".into(), reason: "the store is away".into() };
    subnets.faults().fail_next(podnet::subnet::memory::Call::Watch, 5, unavailable);
    let restarted = spawn(builder(&kernel, subnets.clone())).await;
    restarted.until(|s| s.condition(ConditionKind::Peers).state == ConditionState::Failed).await;
    assert_eq!(kernel.dump(), whole);
    assert_eq!(kernel.take_writes().len(), 0);
    restarted.until(Status::is_ready).await;
    assert_eq!(kernel.dump(), whole);
}

#[tokio::test(start_paused = true)]
async fn fault_20_with_the_store_away_the_network_stands_and_still_heals() {
    let (kernel, subnets, running) = cluster().await;
    let away = SubnetError::Unavailable { attempted: "watch".into(), reason: "the store is away".into() };
    subnets.faults().fail_next(podnet::subnet::memory::Call::Watch, 1000, away.clone());
    subnets.faults().cut_watches(away);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(kernel.take_writes().len(), 0, "ten minutes without the store change nothing");
    heals(&kernel, |k| k.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap()).await;
    let status = running.overlay.status().borrow().clone();
    assert!(status.condition(ConditionKind::Peers).message.contains("not being watched"), "{status}");
    subnets.faults().inject(peer(9));
    subnets.faults().fail_next(podnet::subnet::memory::Call::Watch, 0, SubnetError::NotAssigned { node: name("me") });
    eventually("what happened meanwhile is applied", || kernel.dump().contains("10.42.9.0/24")).await;
}

#[tokio::test(start_paused = true)]
async fn fault_24_a_removal_that_was_lost_with_the_connection_is_found_in_the_next_snapshot() {
    let (kernel, subnets, _running) = cluster().await;
    let cut = SubnetError::Unavailable { attempted: "watch".into(), reason: "connection reset".into() };
    subnets.faults().cut_watches(cut);
    subnets.faults().revoke(&name("node-1"));
    eventually("the peer is gone", || !kernel.dump().contains("10.42.1.0")).await;
    assert_eq!(kernel.take_writes().len(), 3, "and nothing else was touched");
}

#[tokio::test(start_paused = true)]
async fn invariant_07_what_no_hint_told_is_found_by_the_full_check() {
    let (kernel, _subnets, _running) = cluster().await;
    kernel.faults().lose_all_hints();
    let whole = kernel.dump();
    kernel.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap();
    let took = eventually("the check finds it", || kernel.dump() == whole).await;
    assert!(took <= Duration::from_secs(12), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn invariant_13_at_rest_nothing_is_written_and_checks_are_ten_seconds_apart() {
    let (kernel, _subnets, running) = cluster().await;
    let before = running.overlay.status().borrow().counters.checks;
    tokio::time::sleep(Duration::from_secs(1000)).await;
    let after = running.overlay.status().borrow().counters.checks;
    assert!((80..=101).contains(&(after - before)), "{} checks in 1000 s", after - before);
    assert_eq!(kernel.take_writes().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn invariant_13_checks_that_take_long_are_so_far_apart_that_they_take_a_500th_of_the_time() {
    let (kernel, _subnets, running) = cluster().await;
    let domains = u32::try_from(kernel.drivers().len()).unwrap();
    let check = Duration::from_millis(40) * domains;
    kernel.faults().slow_looks(check / domains);
    let checks = || running.overlay.status().borrow().counters.checks;
    // The first slow one comes ten seconds after a fast one.
    let before = checks();
    eventually("a slow check", || checks() > before).await;
    let (before, time) = (checks(), Duration::from_secs(10_000));
    tokio::time::sleep(time).await;
    let done = u32::try_from(checks() - before).unwrap();
    let share = (check * done).as_secs_f64() / time.as_secs_f64();
    assert!((0.0015..=0.002).contains(&share), "{done} checks, {share} of the time");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_somebody_else_wrote_is_renewed_at_once_since_its_end_may_be_another() {
    let (_kernel, subnets, running) = cluster().await;
    let away = SubnetError::Unavailable { attempted: "renew".into(), reason: "it was asked".into() };
    subnets.faults().fail_next(Call::Renew, 1, away);
    let own = subnets.leases().into_iter().find(|lease| lease.node == name("me")).unwrap();
    subnets.faults().inject(own);
    running.until(|s| s.condition(ConditionKind::Lease).message.contains("it was asked")).await;
    running.until(Status::is_ready).await;
}

/// A store that does not answer the first question about the others.
#[derive(Debug)]
struct Deaf(MemorySubnets, AtomicUsize);

#[async_trait]
impl SubnetManager for Deaf {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.0.network().await
    }
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.0.acquire(request).await
    }
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.0.publish(node, offers).await
    }
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.0.renew(node).await
    }
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.0.release(node).await
    }
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        match self.1.fetch_add(1, Ordering::Relaxed) {
            0 => std::future::pending().await,
            _ => self.0.watch(node).await,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_question_that_is_never_answered_is_asked_again_and_its_trouble_ends_with_an_answer() {
    let kernel = host();
    let running = spawn(builder(&kernel, Deaf(store(), AtomicUsize::new(0)))).await;
    running.until(|s| s.condition(ConditionKind::Peers).message.contains("no answer within 30 s")).await;
    let status = running.until(Status::is_ready).await;
    assert!(!status.to_string().contains("trouble"), "{status}");
}

/// A driver that waits, and then can read only a part of its domain, or nothing.
#[derive(Debug)]
struct Waiting {
    inner: Arc<dyn Driver>,
    looks: Arc<AtomicUsize>,
    in_vain: bool,
}

#[async_trait]
impl Driver for Waiting {
    fn domain(&self) -> Domain {
        self.inner.domain()
    }
    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.looks.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(3)).await;
        let unread = DriverError::Io { attempted: "read the rest".into(), reason: "no answer".into() };
        if self.in_vain {
            return Err(unread);
        }
        Ok(Observed { unread: Some(unread), ..self.inner.observe(scope).await? })
    }
    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        self.inner.apply(units).await
    }
    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.inner.changes(scope).await
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_is_looked_at_again_soon_and_waiting_for_it_puts_no_check_off() {
    let (kernel, subnets, looks) = (host(), store(), Arc::new(AtomicUsize::new(0)));
    subnets.faults().inject(peer(1));
    let firewall = Waiting { inner: kernel.firewall(), looks: Arc::clone(&looks), in_vain: false };
    let node = Node::builder("me", subnets.clone()).backend(Vxlan::new());
    let running = spawn(node.driver(kernel.sysctl()).driver(kernel.netlink()).driver(firewall)).await;
    running.until(|s| s.is_ready() && s.peers.connected == 1).await;
    let before = looks.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(looks.load(Ordering::Relaxed) - before >= 20, "every four seconds");
    kernel.faults().lose_all_hints();
    kernel.flush_routes(&dev("flannel.1"));
    let took = eventually("the check found it", || kernel.dump().contains("10.42.1.0/24 via")).await;
    assert!(took < Duration::from_secs(20), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn looks_that_fail_are_rested_from_however_many_hints_come() {
    let (kernel, subnets, looks) = (host(), store(), Arc::new(AtomicUsize::new(0)));
    let firewall = Waiting { inner: kernel.firewall(), looks: Arc::clone(&looks), in_vain: true };
    let node = Node::builder("me", subnets.clone()).backend(Vxlan::new());
    let running = spawn(node.driver(kernel.sysctl()).driver(kernel.netlink()).driver(firewall)).await;
    running.until(|s| s.condition(ConditionKind::Kernel).message.contains("no answer")).await;
    let before = looks.load(Ordering::Relaxed);
    for _ in 0..1000 {
        kernel.faults().overrun();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let looks = looks.load(Ordering::Relaxed) - before;
    assert!((6..=10).contains(&looks), "{looks} looks of three seconds in 100 s, with three times that between two");
}

#[tokio::test(start_paused = true)]
async fn fault_29_an_overrun_of_hints_leads_to_a_whole_look() {
    let (kernel, _subnets, _running) = cluster().await;
    kernel.faults().lose_all_hints();
    kernel.flush_routes(&dev("flannel.1"));
    kernel.faults().clear();
    kernel.faults().overrun();
    let took = eventually("it looked", || kernel.dump().contains("10.42.1.0/24 via")).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn hints_that_end_are_asked_for_again() {
    let (kernel, _subnets, _running) = cluster().await;
    kernel.faults().end_hints();
    tokio::time::sleep(Duration::from_secs(2)).await;
    heals(&kernel, |k| k.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn echoes_of_our_own_steps_cause_no_further_looks() {
    let (kernel, subnets, running) = cluster().await;
    kernel.faults().echo(true);
    let before = running.overlay.status().borrow().counters.checks;
    for number in 10..60 {
        subnets.faults().inject(peer(number));
    }
    running.until(|s| s.peers.connected == 52).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let looks = running.overlay.status().borrow().counters.checks - before;
    assert!(looks <= 2, "{looks} looks");
}

#[tokio::test(start_paused = true)]
async fn fault_31_without_the_capability_there_is_one_clear_error_and_no_spinning() {
    let (kernel, subnets) = (host(), store());
    for number in 10..40 {
        subnets.faults().inject(peer(number));
    }
    kernel.faults().deny();
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.condition(ConditionKind::Kernel).state == ConditionState::Failed).await;
    assert!(status.condition(ConditionKind::Kernel).message.contains("CAP_NET_ADMIN"), "{status}");
    assert_eq!(status.peers.failing, 0, "one error, not one a peer:\n{status}");
    kernel.take_writes();
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(kernel.take_writes().len() < 60, "it backs off");
    kernel.faults().permit();
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_kernel_that_cannot_be_read_is_no_reason_to_write() {
    let (kernel, _subnets, running) = cluster().await;
    let broken = podnet::driver::DriverError::Io { attempted: "dump routes".into(), reason: "socket closed".into() };
    kernel.faults().fail_observe(None, 5, broken);
    kernel.faults().overrun();
    let status = running.until(|s| !s.is_ready()).await;
    assert!(status.condition(ConditionKind::Kernel).message.contains("socket closed"), "{status}");
    assert_eq!(kernel.take_writes().len(), 0);
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn invariant_05_one_peer_that_the_kernel_refuses_holds_up_no_other() {
    let (kernel, subnets, running) = cluster().await;
    let bad = Key::Route("10.42.7.0/24".parse().unwrap(), 0);
    kernel.faults().fail_keys(move |key| *key == bad, Errno::INVAL, None);
    subnets.faults().inject(peer(7));
    subnets.faults().inject(peer(8));
    let status = running.until(|s| s.peers.failing == 1).await;
    assert_eq!(status.peers.connected, 3, "{status}");
    let state = &status.troubled[0].families[0].state;
    assert!(matches!(state, PeerState::Failing { error, .. } if error.contains("10.42.7.0/24")), "{state}");
    kernel.take_writes();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert!(kernel.take_writes().len() < 40, "it backs off");
    kernel.faults().clear();
    running.until(|s| s.peers.connected == 4).await;
}

#[tokio::test(start_paused = true)]
async fn a_foreign_device_of_our_name_is_a_conflict_and_nothing_is_touched() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    kernel.link_add(&dev("flannel.1"), "bridge", 1500).unwrap();
    let running =
        spawn(builder(&kernel, subnets).ip_forward(HostSetting::Report).masquerade(MasqueradePolicy::off())).await;
    let before = kernel.dump();
    let status = running.until(|s| !s.conflicts.is_empty()).await;
    assert!(!status.is_ready());
    let text = status.to_string();
    assert!(text.contains("flannel.1") && text.contains("bridge"), "{text}");
    assert_eq!(kernel.dump(), before);
    kernel.link_del(&dev("flannel.1")).unwrap();
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_device_of_ours_with_another_vni_or_name_is_taken_away() {
    let (kernel, subnets, running) = cluster().await;
    running.kill(&kernel).await;
    let before = kernel.dump();
    let drivers = [kernel.sysctl(), kernel.netlink(), kernel.firewall()];
    let other = podnet_vxlan::Vxlan::new().vni(7).unwrap();
    let mut node = podnet::Node::builder("me", subnets.clone()).backend(other);
    for driver in drivers {
        node = node.driver(driver);
    }
    let moved = spawn(node).await;
    moved.until(Status::is_ready).await;
    eventually("the device of the other VNI is gone", || !kernel.dump().contains("flannel.1 ")).await;
    assert!(kernel.dump().contains("flannel.7 "));
    moved.kill(&kernel).await;
    let _back = start(&kernel, &subnets).await;
    eventually("and back", || {
        kernel
            .dump()
            .lines()
            .filter(|l| !l.contains("accept_ra"))
            .eq(before.lines().filter(|l| !l.contains("accept_ra")))
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_foreign_route_in_the_way_keeps_one_peer_out_names_both_sides_and_is_not_touched() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    subnets.faults().inject(peer(3));
    let next =
        podnet::plan::NextHop::Gateway { device: dev("eth0"), address: "10.240.0.9".parse().unwrap(), onlink: false };
    let foreign = podnet::testkit::kernel::KernelRoute::boot("10.42.1.0/24".parse().unwrap(), next)
        .protocol(podnet::testkit::kernel::PROTOCOL_STATIC);
    kernel.ip_route_add(foreign.clone()).unwrap();
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.peers.connected == 1).await;
    assert!(status.is_ready(), "the node itself is well:\n{status}");
    assert!(status.to_string().contains("10.42.1.0/24") && status.to_string().contains("eth0"), "{status}");
    assert_eq!(kernel.routes_to("10.42.1.0/24".parse().unwrap()), [foreign]);
    kernel.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap();
    running.until(|s| s.peers.connected == 2 && s.conflicts.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_cluster_network_that_overlaps_the_underlay_or_a_bridge_is_a_conflict_and_nothing_is_touched() {
    for (address, device) in [("10.42.9.103/24", "eth0"), ("10.40.0.1/13", "docker0")] {
        let (kernel, subnets) = (host(), store());
        subnets.faults().inject(peer(1));
        kernel.addr_add(&dev(device), address.parse().unwrap()).unwrap();
        let before = kernel.dump();
        let running = spawn(builder(&kernel, subnets)).await;
        let status = running.until(|s| !s.conflicts.is_empty()).await;
        let text = status.to_string();
        assert!(text.contains("10.42.0.0/16") && text.contains(device), "{text}");
        assert!(!status.is_ready());
        assert_eq!(kernel.dump(), before, "{device}");
        kernel.addr_del(&dev(device), address.parse().unwrap()).unwrap();
        running.until(Status::is_ready).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_bridge_inside_the_cluster_network_keeps_out_only_the_peer_that_it_meets() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    subnets.faults().inject(peer(3));
    kernel.addr_add(&dev("docker0"), "10.42.3.1/24".parse().unwrap()).unwrap();
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.peers.connected == 1 && s.peers.refused == 1).await;
    assert!(status.to_string().contains("docker0"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_small_network_inside_a_peers_subnet_is_a_warning_and_cuts_nobody_off() {
    let (kernel, _subnets, running) = cluster().await;
    kernel.addr_add(&dev("docker0"), "10.42.1.65/26".parse().unwrap()).unwrap();
    let status = running.until(|s| s.to_string().contains("10.42.1.64/26")).await;
    assert_eq!(status.peers.connected, 2, "{status}");
    assert!(status.is_ready());
    assert_eq!(kernel.take_writes().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_pods_own_bridge_inside_this_nodes_subnet_is_no_conflict() {
    let (kernel, subnets) = (host(), store());
    kernel.link_add(&dev("cni0"), "bridge", 1450).unwrap();
    kernel.addr_add(&dev("cni0"), "10.42.2.1/24".parse().unwrap()).unwrap();
    kernel.link_up(&dev("cni0")).unwrap();
    let running = start(&kernel, &subnets).await;
    assert!(running.overlay.status().borrow().conflicts.is_empty());
}

#[tokio::test(start_paused = true)]
async fn fault_42_removing_the_state_leaves_what_is_foreign_as_it_was_and_names_what_stays() {
    let (kernel, subnets) = (host(), store());
    let before = kernel.dump();
    for number in 3..20 {
        subnets.faults().inject(peer(number));
    }
    let running = start(&kernel, &subnets).await;
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.kept_settings, ["net/ipv4/ip_forward = 1"]);
    let after = kernel.dump().replace("net/ipv4/ip_forward = 1", "net/ipv4/ip_forward = 0");
    assert_eq!(after, before.replace("net/ipv4/ip_forward = 1", "net/ipv4/ip_forward = 0"));
    assert!(matches!(running.overlay.peers().await, Err(Error::Stopped)));
    assert!(subnets.leases().iter().any(|l| l.node == name("me")), "the lease stays held");
}

#[tokio::test(start_paused = true)]
async fn leaving_gives_the_lease_back_too() {
    let (kernel, subnets, running) = cluster().await;
    running.overlay.shutdown(Shutdown::Leave).await.unwrap();
    assert!(!subnets.leases().iter().any(|l| l.node == name("me")));
    assert!(!kernel.dump().contains("flannel.1"));
}

#[tokio::test(start_paused = true)]
async fn keeping_touches_nothing_and_dropping_everything_does_neither() {
    let (kernel, subnets, running) = cluster().await;
    let whole = kernel.dump();
    running.overlay.shutdown(Shutdown::Keep).await.unwrap();
    assert_eq!(kernel.dump(), whole);
    let again = start(&kernel, &subnets).await;
    drop(again);
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(kernel.dump(), whole);
    assert_eq!(kernel.take_writes().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_plan_says_what_would_be_done_and_touches_nothing() {
    let (kernel, _subnets, running) = cluster().await;
    assert!(running.overlay.plan().await.unwrap().is_empty());
    kernel.faults().lose_all_hints();
    kernel.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap();
    let harmed = kernel.dump();
    let plan = running.overlay.plan().await.unwrap();
    assert!(plan.to_string().starts_with("create route 10.42.1.0/24 via 10.42.1.0 dev flannel.1 onlink"), "{plan}");
    assert_eq!(plan.steps().count(), 1, "{plan}");
    assert_eq!(kernel.dump(), harmed);
    let report = running.overlay.reconcile().await.unwrap();
    assert_eq!(report.steps, 1);
    assert!(running.overlay.plan().await.unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_masquerade_policy_is_changed_while_running_in_one_transaction() {
    let (kernel, _subnets, running) = cluster().await;
    let policy = MasqueradePolicy::default().never_masquerade(["192.168.0.0/16".parse().unwrap()]);
    let report = running.overlay.set_masquerade(policy.clone()).await.unwrap();
    assert_eq!((report.steps, kernel.take_writes().len()), (1, 1));
    assert_eq!(running.overlay.masquerade().await.unwrap(), policy);
    assert!(kernel.dump().contains("192.168.0.0/16"));
    running.overlay.set_masquerade(MasqueradePolicy::off()).await.unwrap();
    assert!(!kernel.dump().contains("masquerade"), "{}", kernel.dump());
}

#[tokio::test(start_paused = true)]
async fn chains_of_others_that_drop_are_named_in_the_status() {
    let (kernel, _subnets, running) = cluster().await;
    let docker = Conflict {
        object: Key::Ruleset(Family::V4),
        with: "chain ip filter FORWARD (policy drop)".into(),
        advice: "accept the cluster network there".into(),
    };
    kernel.nft_set_foreign_chains(Family::V4, vec![docker]);
    let status = running.until(|s| !s.warnings.is_empty() && s.to_string().contains("FORWARD")).await;
    assert!(status.is_ready(), "a warning stops nothing:\n{status}");
}

#[tokio::test(start_paused = true)]
async fn a_hostile_lease_leaves_the_kernel_of_honest_peers_as_it_is_and_is_named() {
    let (kernel, subnets, running) = cluster().await;
    let whole = kernel.dump();
    let hostile = [
        claim("mallory-1", 1, "0.0.0.0/0", "10.240.9.1", "02:00:00:00:99:01"),
        claim("mallory-2", 2, "10.42.1.128/25", "10.240.9.2", "02:00:00:00:99:02"),
        claim("mallory-3", 3, "10.42.2.0/24", "10.240.9.3", "02:00:00:00:99:03"),
        claim("mallory-4", 4, "10.42.50.0/24", "10.240.0.1", "02:00:00:00:99:04"),
        claim("mallory-5", 5, "10.42.51.0/24", "10.240.9.5", "02:00:00:00:00:01"),
        claim("mallory-6", 6, "10.42.52.0/24", "224.0.0.1", "02:00:00:00:99:06"),
    ];
    for lease in hostile {
        subnets.faults().inject(lease);
    }
    let status = running.until(|s| s.peers.total == 8).await;
    assert_eq!((status.peers.connected, status.peers.refused), (2, 6), "{status}");
    assert_eq!(kernel.dump(), whole);
    assert_eq!(kernel.take_writes().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_is_assigned_anew_is_followed() {
    let (kernel, subnets, running) = cluster().await;
    subnets.assign(&name("me"), Stack::V4("10.42.77.0/24".parse().unwrap()));
    eventually("the device has the new address", || kernel.dump().contains("10.42.77.0/32")).await;
    assert!(!kernel.dump().contains("10.42.2.0/32"));
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_without_an_assignment_waits_and_says_so() {
    let config = podnet::config::NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
    let (kernel, subnets) = (host(), MemorySubnets::assigned(config));
    let running = spawn(builder(&kernel, subnets.clone())).await;
    let status = running.until(|s| s.condition(ConditionKind::Lease).state == ConditionState::Failed).await;
    assert!(status.condition(ConditionKind::Lease).message.contains("podCIDR"), "{status}");
    assert!(matches!(running.overlay.lease().await, Err(Error::NotReady { .. })));
    assert!(matches!(running.overlay.plan().await, Err(Error::NotReady { .. })));
    assert_eq!(kernel.take_writes().len(), 0);
    subnets.assign(&name("me"), Stack::V4("10.42.2.0/24".parse().unwrap()));
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_is_missing_is_named_with_what_exists_and_waited_for() {
    let (kernel, subnets) = (host(), store());
    let choice = podnet::underlay::UnderlayChoice::Device(dev("ens4"));
    let running = spawn(builder(&kernel, subnets).underlay(choice)).await;
    let status = running.until(|s| s.condition(ConditionKind::Underlay).state == ConditionState::Failed).await;
    let message = status.condition(ConditionKind::Underlay).message;
    assert!(message.contains("ens4") && message.contains("eth0 10.240.0.103"), "{message}");
    // The lease waits for it, and comes first in the list: what failed is what is to be read.
    assert_eq!(status.condition(ConditionKind::Lease).state, ConditionState::Waiting);
    assert!(
        status.summary().starts_with(&format!("not ready: Underlay: {message}; 0 of 0 peers")),
        "{}",
        status.summary()
    );
    kernel.link_add(&dev("ens4"), "", 1460).unwrap();
    kernel.link_up(&dev("ens4")).unwrap();
    kernel.addr_add(&dev("ens4"), "10.250.0.3/24".parse().unwrap()).unwrap();
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_before_it_expires() {
    let config = podnet::config::NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
    let subnets = MemorySubnets::allocating(config).unwrap().with_term(Duration::from_secs(600));
    let kernel = host();
    let running = start(&kernel, &subnets).await;
    let first = running.overlay.lease().await.unwrap();
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    assert_eq!(running.overlay.lease().await.unwrap().subnets, first.subnets);
    assert!(running.overlay.status().borrow().is_ready());
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_renewed_at_the_margin_that_was_asked_for_and_the_status_says_what_is_left() {
    // What does not fit into the term is a third of it.
    for (margin, least) in [(50, 50), (400, 400), (3600, 200)] {
        let config = podnet::config::NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
        let subnets = MemorySubnets::allocating(config).unwrap().with_term(Duration::from_secs(600));
        let running = spawn(builder(&host(), subnets).renew_margin(Duration::from_secs(margin))).await;
        running.until(|s| s.is_ready()).await;
        let mut left = Vec::new();
        for _ in 0..600 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            left.push(running.overlay.status().borrow().lease_left.unwrap().as_secs());
        }
        // A status is at most a check period old.
        let (lowest, highest) = (left.iter().min().unwrap(), left.iter().max().unwrap());
        assert!((least..least + 25).contains(lowest) && (575..=600).contains(highest), "{lowest} to {highest}");
    }
    let problem = podnet::Node::builder("me", store()).renew_margin(Duration::ZERO).build().unwrap_err();
    assert!(problem.to_string().contains("a renewal margin of 0ns is given: 1 s to a day are allowed"), "{problem}");
}

#[tokio::test(start_paused = true)]
async fn steps_are_counted_by_kind_and_result_and_rounds_by_their_time() {
    let (kernel, subnets) = (host(), store());
    let bad = Key::Route("10.42.0.0/24".parse().unwrap(), 0);
    kernel.faults().fail_keys(move |key| *key == bad, Errno::INVAL, None);
    subnets.faults().inject(peer(0));
    subnets.faults().inject(peer(1));
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.peers.connected == 1 && s.peers.failing == 1).await;
    let counters = status.counters;
    let of =
        |kind: &str| counters.by_kind.iter().find(|(name, _)| *name == kind).map(|(_, c)| (c.done, c.failed)).unwrap();
    assert_eq!((of("link"), of("ruleset"), of("fdb"), of("neighbour")), ((1, 0), (1, 0), (2, 0), (2, 0)));
    let (routes, refused) = of("route");
    assert!(routes == 1 && refused >= 1, "{counters:?}");
    let all = counters.by_kind.iter().fold((0, 0), |(done, failed), (_, c)| (done + c.done, failed + c.failed));
    assert_eq!(all, (counters.steps, counters.failures));
    assert!(counters.reconciles >= 1, "{counters:?}");
}

#[tokio::test(start_paused = true)]
async fn fault_43_five_thousand_nodes_join_at_once_in_batches() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    for number in 0..5000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        // /28 subnets, so that all fit.
        let base = u32::from(std::net::Ipv4Addr::new(10, 42, 128, 0)) + number * 4;
        subnets.faults().inject(claim(
            &format!("node-{number}"),
            number.into(),
            &format!("{}/30", std::net::Ipv4Addr::from(base)),
            &format!("10.241.{high}.{low}"),
            &format!("02:00:00:01:{high:02x}:{low:02x}"),
        ));
    }
    let status = running.until(|s| s.peers.connected == 5000).await;
    assert_eq!(status.peers.total, 5000, "{status}");
    assert_eq!(running.overlay.routes().await.unwrap().len(), 5000);
}

#[tokio::test(start_paused = true)]
async fn a_firewall_that_cannot_be_read_takes_no_route_away_and_is_named() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let missing = podnet::driver::DriverError::Unsupported {
        attempted: "dump nftables".into(),
        detail: "the kernel has no nf_tables".into(),
    };
    kernel.faults().fail_observe(podnet::plan::Domain::Firewall, u32::MAX, missing);
    let running = spawn(builder(&kernel, subnets.clone())).await;
    let status = running.until(|s| s.peers.connected == 1).await;
    assert!(!status.is_ready());
    assert!(status.condition(ConditionKind::Kernel).message.contains("nf_tables"), "{status}");
    running.until(|s| s.condition(ConditionKind::Published).state == ConditionState::Met).await;
    heals(&kernel, |k| k.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap()).await;
}

#[tokio::test(start_paused = true)]
async fn while_its_device_is_in_conflict_a_node_promises_nothing_to_peers() {
    let (kernel, subnets) = (host(), store());
    kernel.link_add(&dev("flannel.1"), "bridge", 1500).unwrap();
    let running = spawn(builder(&kernel, subnets.clone())).await;
    running.until(|s| !s.conflicts.is_empty()).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let own = subnets.leases().into_iter().find(|l| l.node == name("me")).unwrap();
    assert!(own.offers.is_empty(), "nothing was published: {own:?}");
}

/// A clock that counts how often the engine goes to sleep on it.
#[derive(Debug)]
struct Counting(podnet::clock::SystemClock, std::sync::atomic::AtomicUsize);

#[async_trait::async_trait]
impl podnet::clock::Clock for Counting {
    fn now(&self) -> podnet::clock::Moment {
        self.0.now()
    }
    async fn sleep_until(&self, moment: podnet::clock::Moment) {
        self.1.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        self.0.sleep_until(moment).await;
    }
}

#[tokio::test(start_paused = true)]
async fn no_trouble_makes_the_engine_spin() {
    type Trouble = fn(&FakeKernel, &MemorySubnets);
    let troubles: [(&str, Trouble); 6] = [
        ("no underlay", |k, _| k.link_del(&dev("eth0")).unwrap()),
        ("no capability", |k, _| k.faults().deny()),
        ("nothing can be read", |k, _| {
            let broken = podnet::driver::DriverError::Io { attempted: "dump".into(), reason: "broken".into() };
            k.faults().fail_observe(None, u32::MAX, broken);
            k.faults().overrun();
        }),
        ("no hints", |k, _| {
            let broken = podnet::driver::DriverError::Io { attempted: "listen".into(), reason: "broken".into() };
            k.faults().fail_listen(None, u32::MAX, broken);
            k.faults().end_hints();
        }),
        ("the lease is lost and the store is away", |_, s| {
            use podnet::subnet::memory::Call;
            let away = SubnetError::Unavailable { attempted: "ask".into(), reason: "away".into() };
            for call in [Call::Acquire, Call::Watch, Call::Publish, Call::Renew, Call::Network] {
                s.faults().fail_next(call, usize::MAX, away.clone());
            }
            s.faults().revoke(&name("me"));
        }),
        ("the lease is lost and there is no underlay", |k, s| {
            k.link_del(&dev("eth0")).unwrap();
            s.unassign(&name("me"));
        }),
    ];
    for (what, trouble) in troubles {
        let (kernel, subnets) = (host(), store());
        subnets.faults().inject(peer(1));
        let clock = std::sync::Arc::new(Counting(podnet::clock::SystemClock::new(), 0.into()));
        let running = spawn(builder(&kernel, subnets.clone()).clock(clock.clone())).await;
        running.until(Status::is_ready).await;
        trouble(&kernel, &subnets);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let before = clock.1.load(std::sync::atomic::Ordering::Relaxed);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let rounds = clock.1.load(std::sync::atomic::Ordering::Relaxed) - before;
        assert!(rounds < 3000, "{what}: {rounds} rounds in ten minutes");
        assert!(
            !running.overlay.status().borrow().is_ready() || what == "no hints" || what == "no capability",
            "{what}"
        );
    }
}
