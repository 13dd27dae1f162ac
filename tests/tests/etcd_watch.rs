//! What a watch of a real etcd tells: everything once, nothing that did not change, and a new snapshot after whatever may have lost
//! something. And a whole node over it.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, LeaseEvent, Offer, OwnLease};
use podnet::status::Status;
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
use podnet::subnet::{LeaseRequest, LeaseStream, SubnetError, SubnetManager};
use podnet::types::{NodeName, Stack};
use podnet_tests::real::etcd::{Etcd, Eye, Proxy, missing};
use podnet_tests::{builder, eventually, host, name, spawn};
use tokio::time::{Instant, timeout};

const CONFIG: &str = r#"{"Network":"10.64.0.0/10","Backend":{"Type":"vxlan"}}"#;
/// Of a store on a loaded machine.
const SOON: Duration = Duration::from_secs(20);

async fn configured(etcd: &Etcd, prefix: &str) -> Eye {
    let mut eye = etcd.eye().await;
    eye.put(&format!("{prefix}/config"), CONFIG, None).await;
    eye
}

fn request(number: u8) -> LeaseRequest {
    let underlay = Stack::V4([10, 240, 0, number].into());
    LeaseRequest { node: name(&format!("node-{number}")), underlay, previous: None }
}

fn address(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("10.240.{}.{low}", 128 + high)
}

fn offer(number: u8, vni: u8) -> Offer {
    let data = BackendData::from_text(&format!(r#"{{"VNI":{vni},"VtepMAC":"02:00:00:00:00:{number:02x}"}}"#)).unwrap();
    let endpoints = Stack::V4(Endpoint { public_ip: [10, 240, 0, number].into(), data });
    Offer { backend: BackendKind::of("vxlan"), endpoints }
}

/// The subnet of peer `number`: beyond the first hundred, of which nodes get theirs.
fn subnet(number: u16) -> String {
    let [high, low] = (number + 1000).to_be_bytes();
    format!("10.{}.{low}.0", 64 + high)
}

/// Peer `number` as flannel writes it: key and value.
fn peer(prefix: &str, number: u16) -> (String, String) {
    let [high, low] = number.to_be_bytes();
    let key = format!("{prefix}/subnets/{}-24", subnet(number));
    let value = format!(
        r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}}}"#,
        address(number)
    );
    (key, value)
}

async fn next(watch: &mut LeaseStream) -> LeaseEvent {
    let told = timeout(SOON, watch.next()).await.expect("something is told").expect("the watch goes on");
    told.expect("no trouble")
}

async fn snapshot(watch: &mut LeaseStream) -> Vec<Lease> {
    match next(watch).await {
        LeaseEvent::Snapshot(leases) => leases,
        other => panic!("{other:?}"),
    }
}

fn names(leases: &[Lease]) -> Vec<&str> {
    leases.iter().map(|lease| lease.node.as_str()).collect()
}

/// What a node believes after an event.
fn believe(believed: &mut BTreeMap<NodeName, Lease>, event: LeaseEvent) {
    match event {
        LeaseEvent::Snapshot(all) => *believed = all.into_iter().map(|l| (l.node.clone(), l)).collect(),
        LeaseEvent::Upsert(lease) => drop(believed.insert(lease.node.clone(), lease)),
        LeaseEvent::Remove(node) => assert!(believed.remove(&node).is_some(), "{node} was never told"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn others_come_change_and_expire_and_the_own_lease_is_never_told() {
    if missing("others_come") {
        return;
    }
    let (etcd, prefix) = (Etcd::shared().await, "/others");
    let mut eye = configured(&etcd, prefix).await;
    let (me, other) = (etcd.store(prefix), etcd.store(prefix));
    me.acquire(&request(1)).await.unwrap();
    other.acquire(&request(2)).await.unwrap();
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    assert_eq!(names(&snapshot(&mut watch).await), ["10.240.0.2"]);

    me.publish(&name("node-1"), &[offer(1, 1)]).await.unwrap();
    me.renew(&name("node-1")).await.unwrap();
    let theirs = other.publish(&name("node-2"), &[offer(2, 1)]).await.unwrap().lease;
    let told = Lease { node: name("10.240.0.2"), ..theirs };
    assert_eq!(next(&mut watch).await, LeaseEvent::Upsert(told.clone()));

    // A renewal as flannel does it is no change; an unreadable key is nobody's.
    let key = eye.list(&format!("{prefix}/subnets")).await.into_iter().find(|k| k.value.contains("0.2\"")).unwrap();
    eye.put(&key.key, &key.value, Some(600)).await;
    eye.put(&format!("{prefix}/subnets/nonsense"), "{", None).await;
    let (k, v) = peer(prefix, 7);
    let expiring = eye.0.lease_grant(600, None).await.unwrap().id();
    let options = etcd_client::PutOptions::new().with_lease(expiring);
    eye.0.put(k, v, Some(options)).await.unwrap();
    let LeaseEvent::Upsert(seventh) = next(&mut watch).await else { panic!("a new node") };
    assert_eq!(seventh.node.as_str(), address(7));
    assert_eq!(me.counters().unreadable, 1);

    // As an expiry does, sooner than the shortest.
    eye.0.lease_revoke(expiring).await.unwrap();
    assert_eq!(next(&mut watch).await, LeaseEvent::Remove(name(&address(7))));
    other.release(&name("node-2")).await.unwrap();
    assert_eq!(next(&mut watch).await, LeaseEvent::Remove(name("10.240.0.2")));
    me.release(&name("node-1")).await.unwrap();
    me.acquire(&request(1)).await.unwrap();
    other.acquire(&request(2)).await.unwrap();
    let LeaseEvent::Upsert(again) = next(&mut watch).await else { panic!("the other again") };
    assert_eq!(again.node.as_str(), "10.240.0.2");
}

#[tokio::test]
async fn an_etcd_lease_that_really_runs_out_is_told() {
    if missing("runs_out") {
        return;
    }
    let (etcd, prefix) = (Etcd::shared().await, "/runs-out");
    let mut eye = configured(&etcd, prefix).await;
    let me = EtcdSubnets::new(etcd.options(prefix).term(Duration::from_secs(10))).unwrap();
    me.acquire(&request(1)).await.unwrap();
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    snapshot(&mut watch).await;
    let (k, v) = peer(prefix, 7);
    eye.put(&k, &v, Some(2)).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Upsert(_)));
    assert_eq!(next(&mut watch).await, LeaseEvent::Remove(name(&address(7))));
    let LeaseEvent::Own(OwnLease::Lost(reason)) = next(&mut watch).await else { panic!("it was not renewed") };
    assert!(reason.contains("expired"), "{reason}");
    assert!(me.renew(&name("node-1")).await.is_err());
}

#[tokio::test]
async fn the_own_lease_overwritten_or_deleted_is_told_with_the_reason() {
    if missing("own_lost") {
        return;
    }
    let (etcd, prefix) = (Etcd::shared().await, "/own-lost");
    let mut eye = configured(&etcd, prefix).await;
    let (me, node) = (etcd.store(prefix), name("node-1"));
    me.acquire(&request(1)).await.unwrap();
    let mut watch = me.watch(&node).await.unwrap();
    assert!(snapshot(&mut watch).await.is_empty());
    let key = eye.only(&format!("{prefix}/subnets")).await.key;
    eye.put(&key, &peer(prefix, 7).1, Some(600)).await;
    let LeaseEvent::Upsert(thief) = next(&mut watch).await else { panic!("the thief is another node") };
    assert_eq!(thief.node.as_str(), address(7));
    let LeaseEvent::Own(OwnLease::Lost(reason)) = next(&mut watch).await else { panic!("it is lost") };
    assert!(reason.contains(&format!("overwritten by {}", address(7))), "{reason}");

    let second = me.acquire(&request(1)).await.unwrap();
    assert_ne!(second.lease.subnets, thief.subnets);
    let keys = eye.list(&format!("{prefix}/subnets")).await;
    eye.delete(&keys.into_iter().find(|k| k.key != key).unwrap().key).await;
    let LeaseEvent::Own(OwnLease::Lost(reason)) = next(&mut watch).await else { panic!("it is lost again") };
    assert!(reason.contains("gone"), "{reason}");

    // Another process of the node: told, so that the node writes its own again, and not in a loop.
    me.acquire(&request(1)).await.unwrap();
    let keys = eye.list(&format!("{prefix}/subnets")).await;
    let mine = keys.into_iter().find(|k| k.key != key).unwrap().key;
    let begun = Instant::now();
    for vni in [5, 6] {
        let value = format!(r#"{{"PublicIP":"10.240.0.1","BackendType":"vxlan","BackendData":{{"VNI":{vni}}}}}"#);
        eye.put(&mine, &value, Some(600)).await;
        let LeaseEvent::Own(OwnLease::Changed(lease)) = next(&mut watch).await else { panic!("it was changed") };
        assert!(lease.offers[0].endpoint(podnet::types::Family::V4).unwrap().data.as_str().contains(&vni.to_string()));
    }
    assert!(begun.elapsed() >= Duration::from_secs(5), "at most every 5 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_a_hundred_changes_loses_none() {
    if missing("burst") {
        return;
    }
    let (etcd, prefix) = (Etcd::shared().await, "/burst");
    let mut eye = configured(&etcd, prefix).await;
    let me = etcd.store(prefix);
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    let mut believed = BTreeMap::new();
    believe(&mut believed, next(&mut watch).await);
    let put = |number: u16| {
        let (client, (key, value)) = (eye.0.clone(), peer(prefix, number));
        async move { client.kv_client().put(key, value, None).await.unwrap() }
    };
    futures::future::join_all((0..100).map(put)).await;
    while believed.len() < 100 {
        believe(&mut believed, next(&mut watch).await);
    }
    for number in (0..100).step_by(2) {
        eye.delete(&peer(prefix, number).0).await;
    }
    while believed.len() > 50 {
        believe(&mut believed, next(&mut watch).await);
    }
    let expected: std::collections::BTreeSet<_> = (0..50).map(|n| name(&address(2 * n + 1))).collect();
    assert_eq!(believed.into_keys().collect::<std::collections::BTreeSet<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_that_start_in_the_same_instant_see_each_other() {
    if missing("same_instant") {
        return;
    }
    let etcd = Etcd::shared().await;
    for round in 0..10 {
        let prefix = format!("/instant-{round}");
        configured(&etcd, &prefix).await;
        let start = |number: u8, other: u8| {
            let store = etcd.store(&prefix);
            async move {
                store.acquire(&request(number)).await.unwrap();
                let mut watch = store.watch(&request(number).node).await.unwrap();
                store.publish(&request(number).node, &[offer(number, 1)]).await.unwrap();
                let mut believed = BTreeMap::new();
                let other = name(&format!("10.240.0.{other}"));
                while believed.get(&other).is_none_or(|lease: &Lease| lease.offers.is_empty()) {
                    believe(&mut believed, next(&mut watch).await);
                }
                assert_eq!(believed.len(), 1);
            }
        };
        tokio::join!(start(1, 2), start(2, 1));
    }
}

#[tokio::test]
async fn fault_26_changes_that_etcd_has_forgotten_are_made_good_by_a_new_snapshot() {
    if missing("forgotten") {
        return;
    }
    let (etcd, prefix) = (Etcd::single().await, "/forgotten");
    let mut eye = configured(&etcd, prefix).await;
    let (me, node) = (etcd.store(prefix), name("node-1"));
    me.acquire(&request(1)).await.unwrap();
    for number in [1, 2] {
        let (k, v) = peer(prefix, number);
        eye.put(&k, &v, None).await;
    }
    let mut watch = me.watch(&node).await.unwrap();
    assert_eq!(names(&snapshot(&mut watch).await), [address(1), address(2)]);
    // Nobody has asked for the changes yet.
    eye.delete(&peer(prefix, 1).0).await;
    let (k, v) = peer(prefix, 3);
    eye.put(&k, &v, None).await;
    eye.compact().await;
    assert_eq!(names(&snapshot(&mut watch).await), [address(2), address(3)]);

    // It follows now: a compaction is nothing to it.
    let (k, v) = peer(prefix, 4);
    eye.put(&k, &v, None).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Upsert(_)));
    eye.compact().await;
    eye.delete(&peer(prefix, 4).0).await;
    assert_eq!(next(&mut watch).await, LeaseEvent::Remove(name(&address(4))));
}

/// flannel's other two cases: a lease that is still the node's, and one that is not, where etcd has forgotten what happened to it.
#[tokio::test]
async fn what_happened_to_the_own_lease_is_told_also_where_etcd_has_forgotten_it() {
    if missing("own_forgotten") {
        return;
    }
    let (etcd, prefix) = (Etcd::single().await, "/own-forgotten");
    let mut eye = configured(&etcd, prefix).await;
    let (me, node) = (etcd.store(prefix), name("node-1"));
    for how in ["renewed", "deleted", "overwritten"] {
        let owned = me.acquire(&request(1)).await.unwrap();
        let key = format!("{prefix}/subnets/{}", podnet::flannel::subnet_key::format(&owned.lease.subnets).unwrap());
        let value = eye.only(&key).await.value;
        let mut watch = me.watch(&node).await.unwrap();
        assert!(snapshot(&mut watch).await.is_empty());
        // Nobody has asked for the changes yet.
        match how {
            "renewed" => drop(eye.put(&key, &value, Some(600)).await),
            "deleted" => eye.delete(&key).await,
            _ => drop(eye.put(&key, &peer(prefix, 7).1, Some(600)).await),
        }
        eye.put(&format!("{prefix}/subnets/nonsense"), "", None).await;
        eye.compact().await;
        let told = snapshot(&mut watch).await;
        if how == "renewed" {
            assert!(told.is_empty() && watch.next().now_or_never().is_none(), "{told:?}");
            assert!(me.renew(&node).await.is_ok());
            continue;
        }
        assert_eq!(names(&told), if how == "deleted" { vec![] } else { vec![address(7)] });
        let LeaseEvent::Own(OwnLease::Lost(reason)) = next(&mut watch).await else { panic!("it is lost: {how}") };
        assert!(reason.contains(if how == "deleted" { "gone" } else { "overwritten by" }), "{reason}");
        not_held(&me, &node).await;
    }
}

async fn not_held(store: &EtcdSubnets, node: &NodeName) {
    assert!(matches!(store.renew(node).await, Err(SubnetError::NotHeld { .. })));
}

#[tokio::test]
async fn fault_26_a_deletion_at_the_very_revision_that_is_compacted_to_is_told() {
    if missing("compacted_to") {
        return;
    }
    let (etcd, prefix) = (Etcd::single().await, "/compacted-to");
    let mut eye = configured(&etcd, prefix).await;
    let (k, v) = peer(prefix, 1);
    eye.put(&k, &v, None).await;
    let mut watch = etcd.store(prefix).watch(&name("node-1")).await.unwrap();
    assert_eq!(snapshot(&mut watch).await.len(), 1);
    eye.delete(&k).await;
    eye.compact().await;
    assert!(snapshot(&mut watch).await.is_empty());
}

#[tokio::test]
async fn a_cut_connection_with_changes_and_a_compaction_meanwhile_ends_in_what_is_true() {
    if missing("cut") {
        return;
    }
    let (mut etcd, prefix) = (Etcd::single().await, "/cut");
    let mut eye = configured(&etcd, prefix).await;
    let proxy = Proxy::to(etcd.address(0)).await;
    let options = EtcdOptions::new([proxy.endpoint()]).allow_plain_http(true).prefix(prefix);
    let me = EtcdSubnets::new(options).unwrap();
    me.acquire(&request(1)).await.unwrap();
    for number in [1, 2] {
        let (k, v) = peer(prefix, number);
        eye.put(&k, &v, None).await;
    }
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    snapshot(&mut watch).await;
    let (k, v) = peer(prefix, 3);
    eye.put(&k, &v, None).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Upsert(_)));

    proxy.cut();
    assert_eq!(snapshot(&mut watch).await.len(), 3, "the same as before");
    assert!(watch.next().now_or_never().is_none(), "and nothing more");

    proxy.cut();
    eye.delete(&peer(prefix, 3).0).await;
    eye.compact().await;
    let mut believed = BTreeMap::new();
    while believed.len() != 2 {
        let event = next(&mut watch).await;
        assert!(!matches!(event, LeaseEvent::Own(_)), "{event:?}");
        believe(&mut believed, event);
    }

    // The own key goes while the store is away: it is told after the snapshot.
    let all = eye.list(&format!("{prefix}/subnets")).await;
    let mine = all.into_iter().find(|k| k.value.contains("10.240.0.1\"")).unwrap();
    eye.delete(&mine.key).await;
    etcd.stop(0);
    let lost = async {
        loop {
            match watch.next().await {
                Some(Ok(LeaseEvent::Own(OwnLease::Lost(reason)))) => return Some(reason),
                Some(Ok(LeaseEvent::Snapshot(_)) | Err(_)) => {}
                Some(Ok(other)) => panic!("{other:?}"),
                None => return None,
            }
        }
    };
    // Told before etcd stopped, or not at all yet.
    if timeout(SOON, lost).await.expect("it ends").is_none() {
        etcd.start_member(0);
        etcd.wait().await;
        let mut watch = me.watch(&name("node-1")).await.unwrap();
        assert_eq!(snapshot(&mut watch).await.len(), 2);
        assert!(matches!(next(&mut watch).await, LeaseEvent::Own(OwnLease::Lost(_))));
    }
}

#[tokio::test]
async fn fault_22_a_store_that_is_away_is_said_and_a_frozen_one_is_noticed() {
    if missing("away") {
        return;
    }
    let (mut etcd, prefix) = (Etcd::single().await, "/away");
    let mut eye = configured(&etcd, prefix).await;
    let me = EtcdSubnets::new(etcd.options(prefix).deadline(Duration::from_secs(2))).unwrap();
    me.acquire(&request(1)).await.unwrap();
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    snapshot(&mut watch).await;
    let (k, v) = peer(prefix, 3);
    eye.put(&k, &v, None).await;
    assert!(matches!(next(&mut watch).await, LeaseEvent::Upsert(_)));

    etcd.freeze(0);
    let begun = Instant::now();
    let error = me.renew(&name("node-1")).await.unwrap_err();
    assert!(
        matches!(&error, SubnetError::Unavailable { .. }) && error.to_string().contains("no answer within 2s"),
        "{error}"
    );
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    // The watch hears nothing, and no end either.
    let told = timeout(Duration::from_secs(40), watch.next()).await.expect("silence is noticed");
    assert!(matches!(told, Some(Err(SubnetError::Unavailable { .. }))), "{told:?}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert_eq!(watch.next().await, None);
    assert!(me.watch(&name("node-1")).await.is_err());
    etcd.thaw(0);
    etcd.wait().await;
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    assert_eq!(snapshot(&mut watch).await.len(), 1);

    etcd.stop(0);
    let told = timeout(SOON, watch.next()).await.expect("it is said");
    let Some(Err(error)) = told else { panic!("{told:?}") };
    assert!(error.to_string().contains("refused") && error.is_retryable(), "{error}");
    assert_eq!(watch.next().await, None);
    etcd.start_member(0);
    etcd.wait().await;
    assert!(me.renew(&name("node-1")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_call_and_a_watch_end_at_once_when_they_are_dropped() {
    if missing("dropped") {
        return;
    }
    let (etcd, prefix) = (Etcd::single().await, "/dropped");
    configured(&etcd, prefix).await;
    let me = etcd.store(prefix);
    me.acquire(&request(1)).await.unwrap();
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    snapshot(&mut watch).await;
    assert!(watch.next().now_or_never().is_none());
    etcd.freeze(0);
    for call in 0..5 {
        let (store, node) = (me.clone(), name("node-1"));
        let task = tokio::spawn(async move {
            match call {
                0 => drop(store.network().await),
                1 => drop(store.acquire(&request(2)).await),
                2 => drop(store.publish(&node, &[offer(1, 1)]).await),
                3 => drop(store.renew(&node).await),
                _ => drop(store.watch(&node).await),
            }
        });
        tokio::task::yield_now().await;
        let begun = Instant::now();
        task.abort();
        assert!(
            timeout(Duration::from_millis(2500), task)
                .await
                .expect("sooner than a request is given up")
                .is_err_and(|e| e.is_cancelled())
        );
        assert!(begun.elapsed() < Duration::from_millis(2500));
    }
    drop(watch);
    etcd.thaw(0);
    assert!(me.renew(&name("node-1")).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_over_etcd_follows_a_burst_and_stays_as_it_was_while_etcd_is_away() {
    if missing("node") {
        return;
    }
    let (mut etcd, prefix) = (Etcd::single().await, "/node");
    let mut eye = configured(&etcd, prefix).await;
    let (store, kernel) = (etcd.store(prefix), host());
    let running = spawn(builder(&kernel, store.clone())).await;
    running.until(Status::is_ready).await;
    let own = eye.only(&format!("{prefix}/subnets")).await;
    assert!(own.value.starts_with(r#"{"PublicIP":"10.240.0.103","PublicIPv6":null,"BackendType":"vxlan","#), "{own:?}");

    let put = |number: u16| {
        let (client, (key, value)) = (eye.0.clone(), peer(prefix, number));
        async move { client.kv_client().put(key, value, None).await.unwrap() }
    };
    let numbers: Vec<u16> = (0..100).collect();
    futures::future::join_all(numbers.iter().copied().map(put)).await;
    running.until(|s| s.peers.connected == numbers.len()).await;
    let whole = kernel.dump();
    for number in &numbers {
        let subnet = subnet(*number);
        assert!(whole.contains(&format!("{subnet}/24 via {subnet} dev flannel.1 onlink")), "{subnet}\n{whole}");
    }

    etcd.stop(0);
    let troubled = |s: &Status| s.to_string().contains("refused");
    running.until(troubled).await;
    assert_eq!(kernel.dump(), whole, "the network stays as it was");
    etcd.start_member(0);
    etcd.wait().await;
    eye.delete(&peer(prefix, numbers[0]).0).await;
    running.until(|s| s.peers.total == numbers.len() - 1 && !troubled(s)).await;
    eventually("its route is gone", || !kernel.dump().contains(&format!("{}/24", subnet(numbers[0])))).await;

    // The node's own lease goes: it gets another, and nothing of the others is touched.
    eye.delete(&own.key).await;
    let begun = Instant::now();
    while !eye
        .list(&format!("{prefix}/subnets"))
        .await
        .iter()
        .any(|k| k.value.contains("10.240.0.103") && k.value.contains("vxlan"))
    {
        assert!(begun.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    running.until(|s| s.is_ready() && s.peers.connected == numbers.len() - 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_leases_are_one_request_and_all_become_routes() {
    if missing("five_thousand") {
        return;
    }
    let (etcd, prefix) = (Etcd::single().await, "/many");
    let eye = configured(&etcd, prefix).await;
    for hundred in 0..50_u16 {
        let puts: Vec<_> = (hundred * 100..hundred * 100 + 100)
            .map(|number| {
                let (key, value) = peer(prefix, number);
                etcd_client::TxnOp::put(key, value, None)
            })
            .collect();
        eye.0.kv_client().txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
    let me = etcd.store(prefix);
    me.network().await.unwrap();
    let before = me.counters().requests;
    let begun = Instant::now();
    let mut watch = me.watch(&name("node-1")).await.unwrap();
    assert_eq!(snapshot(&mut watch).await.len(), 5000);
    println!("listed and decoded 5 000 leases in {:?}", begun.elapsed());
    assert_eq!(me.counters().requests - before, 1);
    let begun = me.counters().requests;
    me.acquire(&request(1)).await.unwrap();
    assert_eq!(me.counters().requests - begun, 3, "a list, an etcd lease, a transaction");
    me.release(&name("node-1")).await.unwrap();

    let kernel = host();
    let store = etcd.store(prefix);
    let running = spawn(builder(&kernel, store.clone())).await;
    running.until(|s| s.is_ready() && s.peers.connected == 5000).await;
    let routes = kernel.dump().lines().filter(|line| line.contains("dev flannel.1 onlink")).count();
    assert_eq!(routes, 5000);
    let requests = store.counters().requests;
    assert!(requests <= 8, "network, acquire (3), count and watch, publish: {requests}");
}

/// The watch of a node that has just acquired its lease begins with what that listed, if it still holds.
#[tokio::test]
async fn whatever_happens_between_acquisition_and_watch_the_snapshot_is_what_is_there_then() {
    if missing("between") {
        return;
    }
    let etcd = Etcd::shared().await;
    for between in ["nothing", "one comes", "one changes", "one goes", "one goes and one comes", "the own is written"] {
        let prefix = format!("/{}", between.replace(' ', "-"));
        let mut eye = configured(&etcd, &prefix).await;
        for number in [1, 2, 3] {
            let (key, value) = peer(&prefix, number);
            eye.put(&key, &value, None).await;
        }
        // With a new key, and with the one that it has.
        for round in 0..2_u16 {
            let me = etcd.store(&prefix);
            let mine = me.acquire(&request(1)).await.unwrap().lease.subnets;
            let (next_key, next_value) = peer(&prefix, 4 + round);
            if between.contains("changes") {
                eye.put(&peer(&prefix, 1).0, &peer(&prefix, 100 + round).1, None).await;
            }
            if between.contains("goes") {
                eye.delete(&peer(&prefix, 2 + round).0).await;
            }
            if between.contains("comes") {
                eye.put(&next_key, &next_value, None).await;
            }
            if between.contains("own") {
                let key = format!("{prefix}/subnets/{}", podnet::flannel::subnet_key::format(&mine).unwrap());
                let value = format!(r#"{{"PublicIP":"10.240.0.1","PublicIPv6":null,"BackendType":"of-{round}"}}"#);
                eye.put(&key, &value, Some(600)).await;
            }
            let before = me.counters().requests;
            let mut watch = me.watch(&name("node-1")).await.unwrap();
            let asked = me.counters().requests - before;
            assert_eq!(asked, if between == "nothing" { 1 } else { 2 }, "{between}");
            let told = snapshot(&mut watch).await;
            let mut keys: Vec<String> =
                told.iter().map(|l| podnet::flannel::subnet_key::format(&l.subnets).unwrap()).collect();
            keys.push(podnet::flannel::subnet_key::format(&mine).unwrap());
            keys.sort();
            let listed = eye.list(&format!("{prefix}/subnets/")).await.into_iter();
            let listed: Vec<String> = listed.map(|k| k.key.rsplit('/').next().unwrap().to_owned()).collect();
            assert_eq!(keys, listed, "{between}");
            if between.contains("changes") {
                assert!(names(&told).contains(&address(100 + round).as_str()), "{told:?}");
            }
            if between.contains("own") {
                let LeaseEvent::Own(OwnLease::Changed(_)) = next(&mut watch).await else {
                    panic!("its own was written")
                };
            }
            // And the watch goes on from there.
            let (key, value) = peer(&prefix, 50 + round);
            eye.put(&key, &value, None).await;
            assert!(matches!(next(&mut watch).await, LeaseEvent::Upsert(l) if l.node.as_str() == address(50 + round)));
        }
    }
}

/// A term of a minute, of which the engine would let two thirds pass, and lets a twentieth.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_renews_its_lease_as_long_before_its_end_as_it_was_told() {
    if missing("margin") {
        return;
    }
    let (etcd, prefix) = (Etcd::shared().await, "/margin");
    configured(&etcd, prefix).await;
    let store = EtcdSubnets::new(etcd.options(prefix).term(Duration::from_secs(60))).unwrap();
    let kernel = host();
    let running = spawn(builder(&kernel, store.clone()).renew_margin(Duration::from_secs(58))).await;
    running.until(Status::is_ready).await;
    let (before, begun) = (store.counters().requests, Instant::now());
    // Two requests a renewal: whether the lease is ours still, and the renewal itself.
    eventually("two renewals", || store.counters().requests >= before + 4).await;
    assert!(begun.elapsed() >= Duration::from_secs(2), "not more often than said");
}
