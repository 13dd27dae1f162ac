use std::collections::{BTreeMap, BTreeSet};

use futures::FutureExt;
use proptest::prelude::*;

use super::watch::CAPACITY;
use super::*;
use crate::clock::Clock;
use crate::lease::{BackendData, BackendKind, Endpoint, LeaseEvent, OwnLease, Precedence};
use crate::testkit::manual_clock::ManualClock;

const HOUR: Duration = Duration::from_secs(3600);

fn name(n: usize) -> NodeName {
    format!("rke-52b280-{n}").parse().unwrap()
}

fn subnet(n: usize) -> Stack<Ipv4Network, Ipv6Network> {
    Stack::V4(format!("10.42.{n}.0/24").parse().unwrap())
}

fn request(n: usize) -> LeaseRequest {
    LeaseRequest { node: name(n), underlay: Stack::V4([10, 240, 0, 101].into()), previous: None }
}

fn offer(port: u16) -> Offer {
    let data = BackendData::from_text(&format!(r#"{{"Port":{port}}}"#)).unwrap();
    let endpoints = Stack::V4(Endpoint { public_ip: [10, 240, 0, 101].into(), data });
    Offer { backend: BackendKind::of("vxlan"), endpoints }
}

fn config(network: &str) -> NetworkConfig {
    NetworkConfig::new(Stack::V4(network.parse().unwrap())).unwrap()
}

fn assigned(nodes: usize) -> MemorySubnets {
    let store = MemorySubnets::assigned(config("10.42.0.0/16"));
    (0..nodes).for_each(|n| store.assign(&name(n), subnet(n)));
    store
}

fn allocating(network: &str, clock: &ManualClock) -> MemorySubnets {
    MemorySubnets::allocating(config(network)).unwrap().with_clock(Arc::new(clock.clone())).with_seed(1)
}

fn lease(n: usize, subnets: Stack<Ipv4Network, Ipv6Network>) -> Lease {
    let precedence = Precedence { since: 0, identity: "hostile".into() };
    Lease { node: name(n), subnets, offers: vec![offer(1)], precedence }
}

fn unavailable() -> SubnetError {
    SubnetError::Unavailable { attempted: "watch leases".into(), reason: "connection reset".into() }
}

/// What a watch tells now; `Err` items as they are. Nothing may still be on its way.
fn told(watch: &mut LeaseStream) -> Vec<Result<LeaseEvent, SubnetError>> {
    std::iter::from_fn(|| watch.next().now_or_never().flatten()).collect()
}

fn events(watch: &mut LeaseStream) -> Vec<LeaseEvent> {
    told(watch).into_iter().map(Result::unwrap).collect()
}

/// What a test waits for comes, or the test fails.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), what).await.expect("within ten seconds")
}

#[tokio::test]
async fn a_watch_begins_with_a_snapshot_and_then_tells_what_others_do() {
    let store = assigned(3);
    let mut watch = store.watch(&name(0)).await.unwrap();
    store.acquire(&request(0)).await.unwrap();
    let mine = store.acquire(&request(1)).await.unwrap().lease;
    assert!(
        matches!(&events(&mut watch)[..], [LeaseEvent::Snapshot(all)] if all.len() == 2),
        "made when it is asked for"
    );

    let published = store.publish(&name(1), &[offer(8472)]).await.unwrap().lease;
    assert_eq!(published, Lease { offers: vec![offer(8472)], ..mine });
    store.publish(&name(1), &[offer(8472)]).await.unwrap();
    store.publish(&name(0), &[offer(8472)]).await.unwrap();
    store.release(&name(1)).await.unwrap();
    store.release(&name(1)).await.unwrap();
    assert_eq!(
        events(&mut watch),
        [LeaseEvent::Upsert(published), LeaseEvent::Remove(name(1))],
        "once each, and not of its own"
    );
}

#[tokio::test]
async fn an_assigned_node_has_its_subnets_for_ever_and_others_none() {
    let store = assigned(1);
    let owned = store.acquire(&request(0)).await.unwrap();
    assert_eq!((owned.lease.subnets, owned.remaining), (subnet(0), None));
    assert_eq!(store.acquire(&request(0)).await.unwrap(), owned, "idempotent");
    assert_eq!(store.renew(&name(0)).await.unwrap(), owned);
    let error = store.acquire(&request(1)).await.unwrap_err();
    assert_eq!(error, SubnetError::NotAssigned { node: name(1) });
    assert!(matches!(store.renew(&name(1)).await, Err(SubnetError::NotHeld { .. })));
    assert!(matches!(store.publish(&name(1), &[]).await, Err(SubnetError::NotHeld { .. })));
}

#[tokio::test]
async fn a_changed_assignment_reaches_its_owner_and_its_peers() {
    let store = assigned(2);
    let before = store.acquire(&request(0)).await.unwrap().lease;
    let (mut own, mut peer) = (store.watch(&name(0)).await.unwrap(), store.watch(&name(1)).await.unwrap());
    events(&mut own);
    events(&mut peer);
    store.assign(&name(0), subnet(9));
    let after = Lease { subnets: subnet(9), ..before };
    assert_eq!(events(&mut own), [LeaseEvent::Own(OwnLease::Changed(after.clone()))]);
    assert_eq!(events(&mut peer), [LeaseEvent::Upsert(after)], "its precedence stays");
    store.assign(&name(0), subnet(9));
    assert_eq!(events(&mut own), []);
    store.unassign(&name(0));
    assert!(matches!(&events(&mut own)[..], [LeaseEvent::Own(OwnLease::Lost(_))]));
    assert_eq!(events(&mut peer), [LeaseEvent::Remove(name(0))]);
    assert!(matches!(store.acquire(&request(0)).await, Err(SubnetError::NotAssigned { .. })));
}

#[tokio::test]
async fn allocated_subnets_never_overlap_until_none_is_left() {
    let clock = ManualClock::new();
    let store = allocating("10.42.0.0/22", &clock);
    store.assign(&name(7), subnet(2));
    let (a, b) = (store.acquire(&request(0)).await.unwrap(), store.acquire(&request(1)).await.unwrap());
    let got: BTreeSet<_> = [a.lease.subnets, b.lease.subnets].into();
    assert_eq!(got, [subnet(1), subnet(3)].into(), "10.42.0.0/24 is skipped, 10.42.2.0/24 reserved");
    assert!(a.lease.precedence < b.lease.precedence);
    assert_eq!(a.remaining, Some(MemorySubnets::TERM));
    let error = store.acquire(&request(2)).await.unwrap_err();
    assert_eq!(error, SubnetError::OutOfSubnets { total: 3, range: "10.42.1.0/24 to 10.42.3.0/24".into() });
    assert!(error.is_retryable());
    assert_eq!(store.acquire(&request(7)).await.unwrap().remaining, None, "a reservation has no term");
    store.release(&name(0)).await.unwrap();
    assert_eq!(store.acquire(&request(2)).await.unwrap().lease.subnets, a.lease.subnets);
}

#[tokio::test]
async fn a_previous_subnet_is_kept_if_it_is_free() {
    let clock = ManualClock::new();
    let store = allocating("10.42.0.0/16", &clock);
    let previous = |n| LeaseRequest { previous: Some(subnet(77)), ..request(n) };
    assert_eq!(store.acquire(&previous(0)).await.unwrap().lease.subnets, subnet(77));
    assert_ne!(store.acquire(&previous(1)).await.unwrap().lease.subnets, subnet(77));
}

#[tokio::test]
async fn a_lease_that_is_not_renewed_expires_for_all_who_only_watch() {
    let clock = ManualClock::new();
    let store = allocating("10.42.0.0/16", &clock);
    let (mut own, mut peer) = (store.watch(&name(0)).await.unwrap(), store.watch(&name(1)).await.unwrap());
    events(&mut own);
    events(&mut peer);
    // Both sleep before the lease that will expire is there.
    let own = tokio::spawn(async move { own.next().await });
    let peer = tokio::spawn(async move { (peer.next().await, peer.next().await) });
    tokio::task::yield_now().await;
    let owned = store.acquire(&request(0)).await.unwrap();
    soon(clock.wait_for_sleepers(2)).await;
    clock.advance(MemorySubnets::TERM);
    let Some(Ok(LeaseEvent::Own(OwnLease::Lost(why)))) = soon(own).await.unwrap() else { panic!("the owner is told") };
    assert!(why.contains("expired"), "{why}");
    let told = soon(peer).await.unwrap();
    assert_eq!(told, (Some(Ok(LeaseEvent::Upsert(owned.lease))), Some(Ok(LeaseEvent::Remove(name(0))))));
    assert_eq!(clock.sleepers(), 0, "nothing is left to wait for");
}

#[tokio::test]
async fn renewal_and_acquisition_extend_a_lease_by_its_full_term() {
    let clock = ManualClock::new();
    let store = allocating("10.42.0.0/16", &clock).with_term(10 * HOUR);
    let first = store.acquire(&request(0)).await.unwrap();
    clock.advance(9 * HOUR);
    assert_eq!(store.renew(&name(0)).await.unwrap(), first);
    clock.advance(9 * HOUR);
    assert_eq!(store.publish(&name(0), &[]).await.unwrap().remaining, Some(HOUR), "publishing does not");
    assert_eq!(store.acquire(&request(0)).await.unwrap(), first);
    clock.advance(10 * HOUR);
    assert!(matches!(store.renew(&name(0)).await, Err(SubnetError::NotHeld { .. })));
    let again = store.acquire(&LeaseRequest { previous: Some(first.lease.subnets), ..request(0) }).await.unwrap();
    assert_eq!(again.lease.subnets, first.lease.subnets);
    assert!(again.lease.precedence > first.lease.precedence, "who lost it comes anew");
}

#[tokio::test]
async fn an_owner_that_has_acquired_again_is_not_told_of_the_loss_before() {
    let clock = ManualClock::new();
    let store = allocating("10.42.0.0/16", &clock);
    store.acquire(&request(0)).await.unwrap();
    let mut watch = store.watch(&name(0)).await.unwrap();
    events(&mut watch);
    clock.advance(MemorySubnets::TERM);
    store.acquire(&request(0)).await.unwrap();
    assert_eq!(events(&mut watch), []);
}

#[tokio::test]
async fn a_watch_that_falls_behind_gets_a_snapshot_and_its_own_news() {
    let store = assigned(3);
    store.acquire(&request(0)).await.unwrap();
    store.acquire(&request(1)).await.unwrap();
    let mut watch = store.watch(&name(0)).await.unwrap();
    events(&mut watch);
    store.assign(&name(0), subnet(100));
    for i in 0..3 * CAPACITY {
        store.publish(&name(1), &[offer(i as u16 % 2)]).await.unwrap();
    }
    store.assign(&name(0), subnet(101));
    let held = store.leases();
    assert_eq!(
        events(&mut watch),
        [LeaseEvent::Snapshot(held.clone()), LeaseEvent::Own(OwnLease::Changed(held[0].clone()))]
    );
    store.release(&name(1)).await.unwrap();
    assert_eq!(events(&mut watch), [LeaseEvent::Remove(name(1))], "and goes on");
}

#[tokio::test]
async fn a_dropped_watch_leaves_nothing_behind() {
    let store = assigned(1);
    let watch = store.watch(&name(0)).await.unwrap();
    assert_eq!(store.shared.lock().watchers.len(), 1);
    drop(watch);
    assert_eq!(store.shared.lock().watchers.len(), 0);
}

#[tokio::test]
async fn cut_watches_give_the_error_and_end() {
    let store = assigned(2);
    let mut watch = store.watch(&name(0)).await.unwrap();
    events(&mut watch);
    store.acquire(&request(1)).await.unwrap();
    store.faults().cut_watches(unavailable());
    store.acquire(&request(0)).await.unwrap();
    assert_eq!(told(&mut watch), [Err(unavailable())]);
    assert_eq!(watch.next().await, None);
    let mut watch = store.watch(&name(0)).await.unwrap();
    assert_eq!(events(&mut watch), [LeaseEvent::Snapshot(store.leases())]);
}

#[tokio::test]
async fn planned_failures_change_nothing_and_end() {
    let store = assigned(1);
    let faults = store.faults();
    faults.fail_next(Call::Acquire, 2, unavailable());
    for _ in 0..2 {
        assert_eq!(store.acquire(&request(0)).await, Err(unavailable()));
        assert_eq!(store.leases(), []);
    }
    store.acquire(&request(0)).await.unwrap();
    for call in [Call::Network, Call::Publish, Call::Renew, Call::Release, Call::Watch] {
        faults.fail_next(call, 1, unavailable());
    }
    assert_eq!(store.network().await, Err(unavailable()));
    assert_eq!(store.publish(&name(0), &[]).await, Err(unavailable()));
    assert_eq!(store.renew(&name(0)).await, Err(unavailable()));
    assert_eq!(store.release(&name(0)).await, Err(unavailable()));
    assert_eq!(store.watch(&name(0)).await.err(), Some(unavailable()));
    assert_eq!(store.network().await.unwrap(), config("10.42.0.0/16"));
}

#[tokio::test]
async fn changes_can_be_dropped_doubled_reordered_and_delayed() {
    let clock = ManualClock::new();
    let store = assigned(9).with_clock(Arc::new(clock.clone()));
    let faults = store.faults();
    let mut watch = store.watch(&name(0)).await.unwrap();
    events(&mut watch);
    let who = |events: Vec<LeaseEvent>| -> Vec<usize> {
        let number = |lease: &Lease| (1..9).find(|n| name(*n) == lease.node).unwrap();
        events.iter().map(|e| if let LeaseEvent::Upsert(lease) = e { number(lease) } else { panic!("{e:?}") }).collect()
    };
    faults.disturb_next(1, Disturbance::Drop);
    faults.disturb_next(1, Disturbance::Duplicate);
    faults.disturb_next(1, Disturbance::Reorder);
    for n in 1..=5 {
        store.acquire(&request(n)).await.unwrap();
    }
    assert_eq!(who(events(&mut watch)), [2, 2, 4, 3, 5]);

    faults.disturb_next(1, Disturbance::Delay(HOUR));
    store.acquire(&request(6)).await.unwrap();
    store.acquire(&request(7)).await.unwrap();
    assert_eq!(events(&mut watch), []);
    let late = tokio::spawn(async move { (watch.next().await, watch) });
    soon(clock.wait_for_sleepers(1)).await;
    clock.advance(HOUR);
    let (first, mut watch) = soon(late).await.unwrap();
    assert_eq!(who(vec![first.unwrap().unwrap()]), [6]);
    assert_eq!(who(events(&mut watch)), [7]);
}

#[tokio::test]
async fn a_lease_can_be_overwritten_revoked_and_invented() {
    let store = assigned(3);
    let faults = store.faults();
    store.acquire(&request(0)).await.unwrap();
    let (mut own, mut peer) = (store.watch(&name(0)).await.unwrap(), store.watch(&name(1)).await.unwrap());
    events(&mut own);
    events(&mut peer);

    let thief = lease(2, subnet(0));
    faults.overwrite(&name(0), thief.clone());
    assert!(
        matches!(&events(&mut own)[..], [LeaseEvent::Own(OwnLease::Lost(why)), LeaseEvent::Upsert(_)] if why.contains(name(2).as_str()))
    );
    assert_eq!(events(&mut peer), [LeaseEvent::Remove(name(0)), LeaseEvent::Upsert(thief)]);

    store.acquire(&request(0)).await.unwrap();
    faults.revoke(&name(0));
    assert!(matches!(&events(&mut own)[..], [LeaseEvent::Own(OwnLease::Lost(_))]));
    assert!(matches!(store.renew(&name(0)).await, Err(SubnetError::NotHeld { .. })));

    store.acquire(&request(0)).await.unwrap();
    let forged = lease(0, Stack::V4("0.0.0.0/0".parse().unwrap()));
    faults.inject(forged.clone());
    assert_eq!(events(&mut own), [LeaseEvent::Own(OwnLease::Changed(forged))]);
    assert_eq!(store.acquire(&request(0)).await.unwrap().lease.subnets, subnet(0), "the assignment still counts");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_nodes_share_one_store() {
    let clock = ManualClock::new();
    let store: Arc<dyn SubnetManager> = Arc::new(allocating("10.0.0.0/8", &clock));
    let nodes: Vec<_> = (0..1000)
        .map(|n| {
            tokio::spawn({
                let store = Arc::clone(&store);
                async move { store.acquire(&request(n)).await.unwrap().lease.subnets }
            })
        })
        .collect();
    let mut subnets = BTreeSet::new();
    for node in nodes {
        assert!(subnets.insert(node.await.unwrap()), "given twice");
    }
}

/// A node that follows a watch: what it believes of the others.
struct Follower {
    node: usize,
    watch: LeaseStream,
    believes: BTreeMap<NodeName, Lease>,
}

impl Follower {
    fn catch_up(&mut self) {
        for event in events(&mut self.watch) {
            match event {
                LeaseEvent::Snapshot(all) => self.believes = all.into_iter().map(|l| (l.node.clone(), l)).collect(),
                LeaseEvent::Upsert(lease) => {
                    self.believes.insert(lease.node.clone(), lease);
                }
                LeaseEvent::Remove(node) => {
                    self.believes.remove(&node);
                }
                LeaseEvent::Own(_) => {}
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Acquire(usize),
    Publish(usize, u16),
    Renew(usize),
    Release(usize),
    Assign(usize, usize),
    Unassign(usize),
    Inject(usize, usize),
    Revoke(usize),
    Overwrite(usize, usize),
    Storm(usize),
    Advance(u32),
    Cut,
    CatchUp(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..4_usize;
    prop_oneof![
        4 => n.clone().prop_map(Step::Acquire),
        2 => (n.clone(), 0..3_u16).prop_map(|(n, port)| Step::Publish(n, port)),
        1 => n.clone().prop_map(Step::Renew),
        1 => n.clone().prop_map(Step::Release),
        1 => (n.clone(), 0..9_usize).prop_map(|(n, s)| Step::Assign(n, s)),
        1 => n.clone().prop_map(Step::Unassign),
        1 => (n.clone(), 0..9_usize).prop_map(|(n, s)| Step::Inject(n, s)),
        1 => n.clone().prop_map(Step::Revoke),
        1 => (n.clone(), n.clone()).prop_map(|(a, b)| Step::Overwrite(a, b)),
        1 => n.clone().prop_map(Step::Storm),
        2 => (0..30_u32).prop_map(Step::Advance),
        1 => Just(Step::Cut),
        2 => n.prop_map(Step::CatchUp),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever happens, and however slowly they read: who has read everything believes what is true.
    #[test]
    fn followers_end_up_with_what_is_held(steps in prop::collection::vec(step(), 0..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let clock = ManualClock::new();
            let store = allocating("10.42.0.0/21", &clock);
            let mut followers = Vec::new();
            for node in 0..4 {
                followers.push(Follower { node, watch: store.watch(&name(node)).await.unwrap(), believes: BTreeMap::new() });
            }
            for step in steps {
                match step {
                    Step::Acquire(n) => {
                        if let Ok(owned) = store.acquire(&request(n)).await {
                            assert!(store.leases().contains(&owned.lease));
                        }
                    }
                    Step::Publish(n, port) => drop(store.publish(&name(n), &[offer(port)]).await),
                    Step::Renew(n) => drop(store.renew(&name(n)).await),
                    Step::Release(n) => store.release(&name(n)).await.unwrap(),
                    Step::Assign(n, s) => store.assign(&name(n), subnet(s)),
                    Step::Unassign(n) => store.unassign(&name(n)),
                    Step::Inject(n, s) => store.faults().inject(lease(n, subnet(s))),
                    Step::Revoke(n) => store.faults().revoke(&name(n)),
                    Step::Overwrite(a, b) => store.faults().overwrite(&name(a), lease(b, subnet(a))),
                    Step::Storm(n) => {
                        for i in 0..=CAPACITY {
                            let _ = store.publish(&name(n), &[offer(i as u16 % 2)]).await;
                        }
                    }
                    Step::Advance(hours) => clock.advance(hours * HOUR),
                    Step::Cut => {
                        store.faults().cut_watches(unavailable());
                        for follower in &mut followers {
                            assert_eq!(told(&mut follower.watch), [Err(unavailable())]);
                            follower.watch = store.watch(&name(follower.node)).await.unwrap();
                        }
                    }
                    Step::CatchUp(n) => followers[n].catch_up(),
                }
                let state = store.shared.lock();
                let (held, now) = (state.leases(), clock.now());
                assert!(state.next_expiry().is_none_or(|moment| moment > now));
                assert!(state.is_consistent());
                drop(state);
                assert!(held.len() <= 4);
            }
            for follower in &mut followers {
                follower.catch_up();
                let me = name(follower.node);
                let truth: Vec<_> = store.leases().into_iter().filter(|l| l.node != me).collect();
                let belief: Vec<_> = follower.believes.values().filter(|l| l.node != me).cloned().collect();
                assert_eq!(belief, truth, "as node {} sees it", follower.node);
            }
        });
    }
}
