//! Three members of a real etcd, of which some stop, freeze and come back while nodes use them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use podnet::flannel::subnet_key;
use podnet::lease::{BackendData, BackendKind, Endpoint, LeaseEvent, Offer, OwnLease};
use podnet::subnet::{LeaseRequest, SubnetManager};
use podnet::types::Stack;
use podnet_tests::name;
use podnet_tests::real::etcd::{Etcd, missing};
use tokio::sync::Barrier;
use tokio::time::{Instant, timeout};

/// What anything may take while members stop and start on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(90);

fn request(number: u8) -> LeaseRequest {
    let underlay = Stack::V4([10, 240, 0, number].into());
    LeaseRequest { node: name(&format!("node-{number}")), underlay, previous: None }
}

/// As the engine does: again until it works.
async fn insist<T, E: std::fmt::Display, F: Future<Output = Result<T, E>>>(call: impl Fn() -> F) -> T {
    let begun = Instant::now();
    loop {
        match call().await {
            Ok(done) => return done,
            Err(error) => assert!(begun.elapsed() < PATIENCE, "still: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Who owned which subnet when, from all that ever happened to the keys: no subnet has two owners, none is taken over.
fn assert_no_subnet_ever_had_two_owners(history: &[(String, Option<String>)]) {
    let owner = |value: &str| value.split('"').nth(3).map(str::to_owned).expect("an address");
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    for (key, value) in history {
        let subnets = subnet_key::parse(key).expect("a lease");
        match value {
            None => drop(owners.remove(key)),
            Some(value) => {
                let before = owners.insert(key.clone(), owner(value));
                assert!(before.is_none_or(|before| before == owner(value)), "{key} was taken over: {history:?}");
                let overlapping = owners.keys().filter(|other| {
                    let other = subnet_key::parse(other).expect("a lease");
                    let v4 = other
                        .v4()
                        .zip(subnets.v4())
                        .is_some_and(|(a, b)| a.contains(b.network()) || b.contains(a.network()));
                    let v6 = other
                        .v6()
                        .zip(subnets.v6())
                        .is_some_and(|(a, b)| a.contains(b.network()) || b.contains(a.network()));
                    v4 || v6
                });
                assert_eq!(overlapping.count(), 1, "{key} overlaps another: {owners:?}");
            }
        }
    }
}

/// So many nodes ask at the same instant, of a network that holds few more subnets, while members stop, freeze and come back.
async fn race(test: &str, config: &str, nodes: u8, v6: bool) {
    if missing(test) {
        return;
    }
    let mut etcd = Etcd::three().await;
    let mut eye = etcd.eye().await;
    let prefix = format!("/{test}");
    eye.put(&format!("{prefix}/config"), config, None).await;
    let barrier = Arc::new(Barrier::new(usize::from(nodes) + 1));
    let done = Arc::new(AtomicBool::new(false));
    let racing: Vec<_> = (1..=nodes)
        .map(|number| {
            let (store, barrier) = (etcd.store(&prefix), Arc::clone(&barrier));
            let mut request = request(number);
            if let (true, Stack::V4(v4)) = (v6, request.underlay) {
                request.underlay = Stack::Dual(v4, format!("2001:db8::{number:x}").parse().unwrap());
            }
            tokio::spawn(async move {
                barrier.wait().await;
                let owned = insist(|| store.acquire(&request)).await;
                // And once more around: given back and acquired anew.
                insist(|| store.release(&request.node)).await;
                let again = insist(|| store.acquire(&request)).await;
                let renewed = insist(|| store.renew(&request.node)).await;
                assert_eq!(again.lease, renewed.lease);
                (owned, again)
            })
        })
        .collect();
    barrier.wait().await;
    let ended = Arc::clone(&done);
    let members = tokio::spawn(async move {
        let mut number = 0;
        while !ended.load(Ordering::Relaxed) {
            etcd.stop(number);
            tokio::time::sleep(Duration::from_millis(300)).await;
            etcd.start_member(number);
            etcd.wait().await;
            number = (number + 1) % 3;
            etcd.freeze(number);
            tokio::time::sleep(Duration::from_millis(300)).await;
            etcd.thaw(number);
            etcd.wait().await;
        }
        etcd
    });
    let all = timeout(PATIENCE, futures::future::join_all(racing)).await.expect("nobody waits for ever");
    done.store(true, Ordering::Relaxed);
    let etcd = members.await.expect("the members are up");
    let held: BTreeSet<_> = all.into_iter().map(|node| node.expect("it got one").1.lease.subnets).collect();
    assert_eq!(held.len(), usize::from(nodes));
    let history = etcd.eye().await.history(&format!("{prefix}/subnets")).await;
    assert!(history.len() >= usize::from(nodes) * 3, "{}", history.len());
    assert_no_subnet_ever_had_two_owners(&history);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_28_fifty_nodes_race_for_subnets_while_members_stop_and_no_subnet_ever_has_two_owners() {
    race("race", r#"{"Network":"10.42.0.0/18"}"#, 50, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_with_both_families() {
    let config = r#"{"Network":"10.42.0.0/19","EnableIPv6":true,"IPv6Network":"fc00::/59"}"#;
    race("race-dual", config, 20, true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fault_26_a_member_that_stops_and_a_leader_that_freezes_cost_a_watch_nothing_but_a_snapshot() {
    if missing("members") {
        return;
    }
    let mut etcd = Etcd::three().await;
    let mut eye = etcd.eye().await;
    let prefix = "/members";
    eye.put(&format!("{prefix}/config"), r#"{"Network":"10.42.0.0/16"}"#, None).await;
    let (me, other) = (etcd.store(prefix), etcd.store(prefix));
    let (mine, asked) = (name("node-1"), request(2));
    me.acquire(&request(1)).await.unwrap();
    let theirs = other.acquire(&asked).await.unwrap().lease;
    let mut watch = me.watch(&mine).await.unwrap();
    let mut believed = None;
    for (number, freeze) in [(0, false), (1, true), (2, false), (0, true), (1, false)] {
        if freeze {
            etcd.freeze(number);
        } else {
            etcd.stop(number);
        }
        // A change while it is away, which the watch must tell however it learns of it.
        let previous = believed.take().unwrap_or_else(|| theirs.clone());
        insist(|| other.release(&asked.node)).await;
        let lease = insist(|| other.acquire(&asked)).await.lease;
        assert_ne!(lease.precedence, previous.precedence);
        let told = async {
            loop {
                let seen = match watch.next().await {
                    Some(Ok(LeaseEvent::Snapshot(all))) => all.into_iter().next(),
                    Some(Ok(LeaseEvent::Upsert(lease))) => Some(lease),
                    Some(Ok(LeaseEvent::Remove(node))) => {
                        assert_eq!(node, name("10.240.0.2"));
                        None
                    }
                    Some(Err(_)) => None,
                    // As the engine does.
                    None => {
                        watch = insist(|| me.watch(&mine)).await;
                        None
                    }
                    Some(Ok(other)) => panic!("{other:?}"),
                };
                if seen.as_ref().is_some_and(|seen| seen.precedence == lease.precedence) {
                    return;
                }
            }
        };
        timeout(PATIENCE, told).await.expect("the change is told");
        assert_eq!(insist(|| me.renew(&mine)).await.lease.node, mine, "the lease is kept");
        believed = Some(lease);
        if freeze {
            etcd.thaw(number);
        } else {
            etcd.start_member(number);
        }
        etcd.wait().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_a_restored_etcd_does_not_have_is_lost_at_once_though_its_revisions_went_back() {
    if missing("restored") {
        return;
    }
    let mut etcd = Etcd::single().await;
    let mut eye = etcd.eye().await;
    let prefix = "/restored";
    eye.put(&format!("{prefix}/config"), r#"{"Network":"10.42.0.0/16"}"#, None).await;
    let (store, asked) = (etcd.store(prefix), request(1));
    store.acquire(&request(2)).await.unwrap();
    etcd.stop(0);
    let copy = etcd.copy_of_data(0);
    etcd.start_member(0);
    etcd.wait().await;
    insist(|| store.acquire(&asked)).await;
    // As the engine does: somebody listens all the time.
    let (told, mut own) = tokio::sync::mpsc::unbounded_channel();
    let (watcher, node) = (store.clone(), asked.node.clone());
    let watching = tokio::spawn(async move {
        loop {
            let mut watch = insist(|| watcher.watch(&node)).await;
            while let Some(event) = watch.next().await {
                if let Ok(LeaseEvent::Own(own)) = event {
                    told.send(own).unwrap();
                }
            }
        }
    });
    // Our key is not there any more, or another's: at the very revision that ours had, or at an older one.
    for (writes, taken) in [(0, true), (0, false), (3, true)] {
        let held = insist(|| store.acquire(&asked)).await.lease;
        for number in 1..=writes {
            let data = BackendData::from_text(&format!(r#"{{"VNI":{number}}}"#)).unwrap();
            let endpoints = Stack::V4(Endpoint { public_ip: [10, 240, 0, 1].into(), data });
            let offer = Offer { backend: BackendKind::of("vxlan"), endpoints };
            insist(|| store.publish(&asked.node, std::slice::from_ref(&offer))).await;
        }
        etcd.stop(0);
        etcd.put_back(0, &copy);
        etcd.start_member(0);
        etcd.wait().await;
        if taken {
            let key = format!("{prefix}/subnets/{}", subnet_key::format(&held.subnets).unwrap());
            etcd.eye().await.put(&key, r#"{"PublicIP":"10.240.0.66"}"#, Some(600)).await;
        }
        let told = timeout(PATIENCE, own.recv()).await.unwrap_or_else(|_| panic!("{writes} {taken}: the loss is told"));
        assert!(matches!(told, Some(OwnLease::Lost(_))), "{told:?}");
    }
    watching.abort();
}
