//! Trouble that a fresh eye found a way into: each test is a state from which the engine once did not recover, or
//! in which it said what was not so. On the fake kernel, in paused time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::StreamExt;
use podnet::config::NetworkConfig;
use podnet::driver::{ChangeStream, Driver, DriverError, Errno, Observed, PeerSession, Scope, UnitResult};
use podnet::lease::{BackendData, LeaseEvent, Offer};
use podnet::plan::{Domain, Key, UnitPlan};
use podnet::status::{ConditionKind, ConditionState, PeerState, Phase, Status};
use podnet::subnet::memory::{Call, MemorySubnets};
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::types::{DeviceName, Family, NodeName, Stack};
use podnet::{Error, Node, Shutdown};
use podnet_tests::{builder, claim, eventually, host, name, peer, spawn, start, store};
use podnet_vxlan::Vxlan;
use rustix::time::{ClockId, clock_gettime};

fn dev(name: &str) -> DeviceName {
    name.parse().unwrap()
}

fn away() -> SubnetError {
    SubnetError::Unavailable { attempted: "ask the store".into(), reason: "503".into() }
}

#[tokio::test(start_paused = true)]
async fn questions_for_the_plan_do_not_hide_drift_from_the_repair() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let running = start(&kernel, &subnets).await;
    let whole = kernel.dump();
    kernel.ip_route_del("10.42.1.0/24".parse().unwrap(), None).unwrap();
    assert!(!running.overlay.plan().await.unwrap().is_empty());
    let took = eventually("the route is back", || kernel.dump() == whole).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn hints_about_one_domain_do_not_put_off_the_check_of_the_others() {
    let (kernel, subnets) = (host(), store());
    let _running = start(&kernel, &subnets).await;
    let whole = kernel.dump();
    kernel.faults().lose_hints(|hint| matches!(hint, podnet::driver::Change::Gone(Key::Ruleset(_))));
    kernel.nft_delete_table(Family::V4).unwrap();
    let begun = tokio::time::Instant::now();
    let mut number = 1;
    while !kernel.dump().contains("masquerade") {
        assert!(begun.elapsed() < Duration::from_secs(15), "the firewall was not looked at");
        // A busy host: addresses come and go.
        let address = format!("192.168.7.{number}/32").parse().unwrap();
        kernel.addr_add(&dev("docker0"), address).unwrap();
        tokio::time::sleep(Duration::from_secs(1)).await;
        kernel.addr_del(&dev("docker0"), address).unwrap();
        number += 1;
    }
    eventually("all is as before", || kernel.dump() == whole).await;
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_always_fails_does_not_keep_the_lease_from_being_renewed() {
    let config = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
    let subnets = MemorySubnets::allocating(config).unwrap().with_term(Duration::from_secs(300));
    let kernel = host();
    let running = start(&kernel, &subnets).await;
    let held = running.overlay.lease().await.unwrap().precedence;
    subnets.faults().fail_next(Call::Watch, usize::MAX, away());
    subnets.faults().cut_watches(away());
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(running.overlay.lease().await.unwrap().precedence, held, "it never expired");
}

#[tokio::test(start_paused = true)]
async fn a_publication_that_failed_once_is_repeated_whatever_peers_do_meanwhile() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().fail_next(Call::Publish, 1, away());
    let running = spawn(builder(&kernel, subnets.clone())).await;
    running.until(|s| s.condition(ConditionKind::Published).state == ConditionState::Failed).await;
    subnets.faults().inject(peer(1));
    let begun = tokio::time::Instant::now();
    running.until(Status::is_ready).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

/// A store that is not quite itself, around one that is.
#[derive(Debug)]
struct Odd {
    inner: MemorySubnets,
    rewrites: bool,
    breaks: bool,
    publications: Arc<AtomicUsize>,
    watches: Arc<AtomicUsize>,
}

impl Odd {
    fn around(inner: MemorySubnets) -> Self {
        Odd { inner, rewrites: false, breaks: false, publications: Arc::default(), watches: Arc::default() }
    }

    fn rewrite(&self, mut owned: OwnedLease) -> OwnedLease {
        for offer in owned.lease.offers.iter_mut().filter(|_| self.rewrites) {
            if let Stack::V4(endpoint) = &mut offer.endpoints {
                let spaced = endpoint.data.as_str().replace(':', ": ");
                endpoint.data = BackendData::from_text(&spaced).unwrap();
            }
        }
        owned
    }
}

#[async_trait::async_trait]
impl SubnetManager for Odd {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.inner.network().await
    }
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.inner.acquire(request).await.map(|owned| self.rewrite(owned))
    }
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.publications.fetch_add(1, Ordering::Relaxed);
        self.inner.publish(node, offers).await.map(|owned| self.rewrite(owned))
    }
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.inner.renew(node).await
    }
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.inner.release(node).await
    }
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        self.watches.fetch_add(1, Ordering::Relaxed);
        let watch = self.inner.watch(node).await?;
        Ok(if self.breaks { watch.take(1).boxed() } else { watch })
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_gives_other_offers_back_is_not_published_to_in_a_loop() {
    let (kernel, odd) = (host(), Odd { rewrites: true, ..Odd::around(store()) });
    let publications = Arc::clone(&odd.publications);
    let running = spawn(builder(&kernel, odd)).await;
    let failed = |s: &Status| s.condition(ConditionKind::Published).message.contains("to the byte");
    running.until(failed).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let times = publications.load(Ordering::Relaxed);
    assert!(times < 60, "{times} publications in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_opens_and_breaks_is_asked_for_with_growing_patience() {
    let (kernel, odd) = (host(), Odd { breaks: true, ..Odd::around(store()) });
    let watches = Arc::clone(&odd.watches);
    let running = spawn(builder(&kernel, odd)).await;
    running.until(Status::is_ready).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    let times = watches.load(Ordering::Relaxed);
    assert!((10..80).contains(&times), "{times} watches in ten minutes");
}

#[tokio::test(start_paused = true)]
async fn a_firewall_that_cannot_be_read_does_not_keep_the_rest_from_being_taken_away() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let running = start(&kernel, &subnets).await;
    let broken = DriverError::Io { attempted: "dump nftables".into(), reason: "broken".into() };
    kernel.faults().fail_observe(Domain::Firewall, u32::MAX, broken);
    let report = running.overlay.shutdown(Shutdown::RemoveState).await.unwrap();
    assert!(!kernel.dump().contains("flannel.1 vxlan"), "{}", kernel.dump());
    assert!(!report.is_clean() && report.failed.iter().any(|(_, why)| why.contains("broken")), "{report:?}");
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_cannot_be_given_back_is_in_the_report_and_the_kernel_is_clean() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    subnets.faults().fail_next(Call::Release, 1, away());
    let report = running.overlay.shutdown(Shutdown::Leave).await.unwrap();
    assert!(report.lease_kept.as_deref().is_some_and(|why| why.contains("503")) && !report.is_clean(), "{report:?}");
    assert!(!kernel.dump().contains("flannel.1 vxlan"));
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_told_to_be_ours_is_not_said_to_be_removed() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().fail_next(Call::Network, 3, away());
    let running = spawn(builder(&kernel, subnets.clone())).await;
    let answer = running.overlay.shutdown(Shutdown::RemoveState).await;
    assert!(matches!(answer, Err(Error::NotReady { .. })), "{answer:?}");
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_runner_that_was_dropped_is_not_ready_any_more() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    let status = running.overlay.status();
    running.task.abort();
    eventually("it is told", || status.borrow().phase == Phase::Stopped).await;
    assert!(!status.borrow().is_ready());
    assert!(matches!(running.overlay.lease().await, Err(Error::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn after_the_answer_to_a_shutdown_nothing_of_the_old_overlay_is_left_that_could_refuse_a_new_one() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    running.overlay.shutdown(Shutdown::Keep).await.unwrap();
    assert_eq!(running.overlay.status().borrow().phase, Phase::Stopped);
}

#[test]
fn a_check_period_that_no_clock_can_hold_is_refused() {
    let refused = Node::builder("me", store()).backend(Vxlan::new()).check_period(Duration::MAX).build().unwrap_err();
    assert!(refused.to_string().contains("10 s to a day"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_term_that_no_clock_can_hold_is_no_panic() {
    let config = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
    let subnets = MemorySubnets::allocating(config).unwrap().with_term(Duration::MAX);
    let kernel = host();
    let running = start(&kernel, &subnets).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert!(running.overlay.status().borrow().is_ready());
}

#[tokio::test(start_paused = true)]
async fn an_own_subnet_that_every_peer_must_refuse_is_refused_here_too() {
    for (subnet, word) in [("10.99.2.0/24", "outside"), ("10.42.2.7/24", "host bits"), ("10.42.2.6/31", "too small")] {
        let (kernel, subnets) = (host(), store());
        subnets.assign(&name("me"), Stack::V4(subnet.parse().unwrap()));
        let running = spawn(builder(&kernel, subnets.clone())).await;
        let status = running.until(|s| s.condition(ConditionKind::Underlay).state == ConditionState::Failed).await;
        assert!(status.to_string().contains(word), "{subnet}: {status}");
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(kernel.take_writes().len(), 0, "{subnet}");
        subnets.assign(&name("me"), Stack::V4("10.42.2.0/24".parse().unwrap()));
        running.until(Status::is_ready).await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_its_device_a_node_calls_no_peer_connected() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let running = start(&kernel, &subnets).await;
    kernel.faults().deny();
    kernel.link_del(&dev("flannel.1")).unwrap();
    let status = running.until(|s| s.peers.connected == 0).await;
    assert!(!status.is_ready());
    let peers = running.overlay.peers().await.unwrap();
    assert!(matches!(peers[0].families[0].state, PeerState::Unreachable { .. }), "{peers:?}");
    kernel.faults().permit();
    running.until(|s| s.peers.connected == 1 && s.is_ready()).await;
}

#[tokio::test(start_paused = true)]
async fn a_node_with_one_family_of_two_reaches_its_peers_in_that_one() {
    let networks = Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap());
    let (kernel, subnets) = (host(), MemorySubnets::assigned(NetworkConfig::new(networks).unwrap()));
    let own = Stack::Dual("10.42.2.0/24".parse().unwrap(), "2001:db8:42:2::/64".parse().unwrap());
    subnets.assign(&name("me"), own);
    let mut dual = peer(1);
    dual.subnets = Stack::Dual("10.42.1.0/24".parse().unwrap(), "2001:db8:42:1::/64".parse().unwrap());
    subnets.faults().inject(dual);
    let running = spawn(builder(&kernel, subnets)).await;
    let status = running.until(|s| s.is_ready_in(Family::V4) && s.peers.total == 1).await;
    assert_eq!((status.peers.connected, status.peers.failing), (1, 0), "{status}");
    assert!(!status.is_ready() && !status.is_ready_in(Family::V6), "the lease promises two families: {status}");
    assert!(status.to_string().contains("IPv6 Failed: the underlay eth0 has no IPv6 address"), "{status}");
}

#[tokio::test(start_paused = true)]
async fn a_corrected_lease_does_not_wait_for_the_back_off_of_the_wrong_one() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    let bad = Key::Route("10.42.7.0/24".parse().unwrap(), 0);
    kernel.faults().fail_keys(move |key| *key == bad, Errno::INVAL, None);
    subnets.faults().inject(peer(7));
    running.until(|s| s.peers.failing == 1).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    subnets.faults().inject(claim("node-7", 7, "10.42.8.0/24", "10.240.0.7", "02:00:00:00:00:07"));
    let begun = tokio::time::Instant::now();
    running.until(|s| s.peers.connected == 1).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn many_peers_that_fail_for_long_do_not_keep_the_engine_looking() {
    let (kernel, subnets) = (host(), store());
    kernel.faults().fail_keys(|key| matches!(key, Key::Route(..)), Errno::INVAL, None);
    for number in 10..210 {
        subnets.faults().inject(peer(number));
    }
    let running = spawn(builder(&kernel, subnets.clone())).await;
    // One has this node's own address and is refused.
    running.until(|s| s.peers.failing == 199).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    let before = running.overlay.status().borrow().counters.checks;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let looks = running.overlay.status().borrow().counters.checks - before;
    assert!(looks <= 65, "{looks} looks in a minute");
}

#[tokio::test(start_paused = true)]
async fn somebody_who_undoes_every_repair_is_met_with_patience() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let running = start(&kernel, &subnets).await;
    kernel.take_writes();
    let until = tokio::time::Instant::now() + Duration::from_secs(60);
    while tokio::time::Instant::now() < until {
        let _ = kernel.ip_route_del("10.42.1.0/24".parse().unwrap(), None);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let repairs = kernel.take_writes().len();
    assert!((60..400).contains(&repairs), "{repairs} repairs in a minute");
    running.until(Status::is_ready).await;
}

#[tokio::test(start_paused = true)]
async fn a_question_whose_asker_went_away_is_withdrawn() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    // The engine has no turn between the question and its end.
    let question = running.overlay.shutdown(Shutdown::RemoveState);
    assert!(futures::FutureExt::now_or_never(question).is_none());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(running.overlay.status().borrow().is_ready(), "nobody shut it down");
    assert!(kernel.dump().contains("flannel.1 vxlan"));
}

#[test]
fn claims_that_meet_are_judged_in_linear_time_when_they_go_too() {
    use podnet::admission::{Admission, Policy};
    let policy = Policy {
        node: name("me"),
        networks: Stack::V4("10.42.0.0/16".parse().unwrap()),
        own_subnets: Stack::V4("10.42.255.0/24".parse().unwrap()),
        own_addresses: Default::default(),
        own_claims: Default::default(),
        reserved: Vec::new(),
    };
    let time = |count: u32| {
        let mut admission = Admission::new(policy.clone(), vec![Arc::new(Vxlan::new())]);
        let leases = (0..count)
            .map(|i| claim(&format!("node-{i}"), i.into(), "10.42.0.0/17", "10.240.0.9", "02:00:00:00:00:09"));
        admission.snapshot(leases.collect());
        // What others do on this machine meanwhile does not count.
        let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
        let begun = now();
        admission.snapshot(Vec::new());
        now() - begun
    };
    let (small, large) = (time(500), time(5000));
    assert!(
        large < small.max(Duration::from_millis(2)) * 50,
        "ten times the claims took {large:?} instead of {small:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_event_that_names_the_own_node_changes_nothing() {
    let (kernel, subnets) = (host(), store());
    let running = start(&kernel, &subnets).await;
    let mut stream = subnets.watch(&name("other")).await.unwrap();
    let snapshot = stream.next().await.unwrap().unwrap();
    assert!(matches!(snapshot, LeaseEvent::Snapshot(leases) if leases.len() == 1));
    assert_eq!(running.overlay.peers().await.unwrap().len(), 0, "the own lease is no peer");
}

/// The fake's netlink driver, whose tunnels never tell how they are.
#[derive(Debug)]
struct Wedged<D>(D);

#[async_trait::async_trait]
impl<D: Driver> Driver for Wedged<D> {
    fn domain(&self) -> Domain {
        self.0.domain()
    }
    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.0.observe(scope).await
    }
    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        self.0.apply(units).await
    }
    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.0.changes(scope).await
    }
    async fn sessions(&self) -> Result<Vec<PeerSession>, DriverError> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn peers_are_told_also_where_a_tunnel_does_not_answer() {
    let (kernel, subnets) = (host(), store());
    subnets.faults().inject(peer(1));
    let node = Node::builder("me", subnets).backend(Vxlan::new()).driver(Wedged(kernel.netlink()));
    let running = spawn(node.driver(kernel.sysctl()).driver(kernel.firewall())).await;
    running.until(|s| s.peers.connected == 1).await;
    let begun = tokio::time::Instant::now();
    let peers = running.overlay.peers().await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((peers.len(), &peers[0].families[0].session), (1, &None));
}
