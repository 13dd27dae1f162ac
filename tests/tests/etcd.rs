//! Leases in a real etcd: who gets which, what stands in etcd then, and how it is kept, renewed, lost and given back.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use podnet::flannel::subnet_key;
use podnet::lease::{BackendData, BackendKind, Endpoint, Lease, LeaseEvent, Offer};
use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
use podnet::subnet::{LeaseRequest, SubnetError, SubnetManager};
use podnet::types::Stack;
use podnet_tests::name;
use podnet_tests::real::etcd::{Etcd, Eye, missing};

const TERM: Duration = Duration::from_secs(24 * 60 * 60);

/// A prefix of its own in the etcd that tests share.
struct Stage {
    etcd: Arc<Etcd>,
    prefix: String,
    eye: Eye,
}

impl Stage {
    async fn new(test: &str, config: &str) -> Option<Stage> {
        if missing(test) {
            return None;
        }
        let etcd = Etcd::shared().await;
        let mut eye = etcd.eye().await;
        let prefix = format!("/{test}");
        eye.put(&format!("{prefix}/config"), config, None).await;
        Some(Stage { etcd, prefix, eye })
    }

    fn options(&self) -> EtcdOptions {
        self.etcd.options(&self.prefix)
    }

    /// A store as a new process has it.
    fn store(&self) -> EtcdSubnets {
        self.etcd.store(&self.prefix)
    }

    fn key(&self, subnet: &str) -> String {
        format!("{}/subnets/{subnet}", self.prefix)
    }

    fn subnets(&self) -> String {
        format!("{}/subnets", self.prefix)
    }
}

const CONFIG: &str = r#"{"Network":"10.42.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn request(number: u8) -> LeaseRequest {
    let underlay = Stack::V4([10, 240, 0, number].into());
    LeaseRequest { node: name(&format!("node-{number}")), underlay, previous: None }
}

fn dual(number: u8) -> LeaseRequest {
    let v6 = format!("2001:db8:240::{number:x}").parse().unwrap();
    LeaseRequest { underlay: Stack::Dual([10, 240, 0, number].into(), v6), ..request(number) }
}

fn offer(number: u8, vni: u8) -> Offer {
    let data = BackendData::from_text(&format!(r#"{{"VNI":{vni},"VtepMAC":"02:00:00:00:00:{number:02x}"}}"#)).unwrap();
    let endpoints = Stack::V4(Endpoint { public_ip: [10, 240, 0, number].into(), data });
    Offer { backend: BackendKind::of("vxlan"), endpoints }
}

fn subnet(lease: &Lease) -> String {
    lease.subnets.v4().unwrap().to_string()
}

fn not_held<T: std::fmt::Debug>(answer: Result<T, SubnetError>) -> String {
    match answer {
        Err(SubnetError::NotHeld { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_lease_is_written_as_flannel_writes_it() {
    let Some(mut stage) = Stage::new("written_as_flannel", CONFIG).await else { return };
    let store = stage.store();
    let owned = store.acquire(&request(1)).await.unwrap();
    let Lease { node, offers, .. } = &owned.lease;
    assert_eq!((node, offers.len()), (&name("node-1"), 0));
    assert!(owned.remaining.unwrap() > TERM - Duration::from_secs(60) && owned.remaining.unwrap() <= TERM);
    let shown = stage.eye.only(&stage.subnets()).await;
    assert_eq!(shown.key, stage.key(&subnet_key::format(&owned.lease.subnets).unwrap()));
    assert_eq!(shown.value, r#"{"PublicIP":"10.240.0.1","PublicIPv6":null}"#);

    let published = store.publish(node, &[offer(1, 1)]).await.unwrap();
    assert_eq!(published.lease, Lease { offers: vec![offer(1, 1)], ..owned.lease.clone() });
    let now = stage.eye.only(&stage.subnets()).await;
    assert_eq!(
        now.value,
        r#"{"PublicIP":"10.240.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#
    );
    assert_eq!((&now.key, now.lease), (&shown.key, shown.lease), "with the etcd lease that it had");
    let ttl = stage.eye.0.lease_time_to_live(now.lease, None).await.unwrap();
    assert_eq!(ttl.granted_ttl(), 86_400);

    store.publish(node, &[offer(1, 1)]).await.unwrap();
    assert_eq!(stage.eye.only(&stage.subnets()).await, now, "published again: nothing is written");
}

#[tokio::test]
async fn both_families_stand_in_one_key() {
    let config = r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
    let Some(mut stage) = Stage::new("both_families", config).await else { return };
    let owned = stage.store().acquire(&dual(1)).await.unwrap();
    let shown = stage.eye.only(&stage.subnets()).await;
    assert_eq!(subnet_key::parse(&shown.key), Some(owned.lease.subnets));
    assert!(owned.lease.subnets.v6().unwrap().to_string().starts_with("fc00:0:0:"));
    assert_eq!(shown.value, r#"{"PublicIP":"10.240.0.1","PublicIPv6":"2001:db8:240::1"}"#);
}

#[tokio::test]
async fn the_configuration_is_flannels_and_what_is_wrong_with_it_is_said() {
    let Some(mut stage) = Stage::new("configuration", r#"{"Network":"10.3.0.0/22"}"#).await else { return };
    let config = stage.store().network().await.unwrap();
    let range = config.allocation().and_then(|a| a.v4()).unwrap();
    assert_eq!(range.to_string(), "10.3.1.0/24 to 10.3.3.0/24", "flannel's defaults");
    let key = format!("{}/config", stage.prefix);
    for (value, part) in [
        ("{", "not JSON"),
        (r#"{"Network":"10.3.0.0/29"}"#, "/28"),
        (r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#, "begin with an IPv4 subnet"),
    ] {
        stage.eye.put(&key, value, None).await;
        let error = stage.store().network().await.unwrap_err();
        assert!(!error.is_retryable() && error.to_string().contains(&key), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(stage.store().acquire(&request(1)).await.unwrap_err(), error);
    }
    stage.eye.delete(&key).await;
    let error = stage.store().network().await.unwrap_err();
    assert!(error.is_retryable() && error.to_string().contains("there is no such key"), "{error}");
}

#[tokio::test]
async fn a_node_that_comes_back_gets_its_lease_by_its_address_with_what_it_published() {
    let Some(mut stage) = Stage::new("comes_back", CONFIG).await else { return };
    let store = stage.store();
    store.acquire(&request(1)).await.unwrap();
    let published = store.publish(&name("node-1"), &[offer(1, 1)]).await.unwrap();
    let before = stage.eye.only(&stage.subnets()).await;
    // Crashed; it may even have another name now, and wish for another subnet.
    let again = LeaseRequest {
        node: name("renamed"),
        previous: Some(Stack::V4("10.42.77.0/24".parse().unwrap())),
        ..request(1)
    };
    let owned = stage.store().acquire(&again).await.unwrap();
    assert_eq!(owned.lease, Lease { node: name("renamed"), ..published.lease });
    assert_eq!(stage.eye.only(&stage.subnets()).await, before, "the same etcd lease: nothing was written");
}

#[tokio::test]
async fn a_node_whose_ipv4_is_away_gets_its_lease_by_its_ipv6_and_is_the_same_node_once_it_is_back() {
    let config = r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/56","Backend":{"Type":"vxlan"}}"#;
    let Some(mut stage) = Stage::new("ipv6_first", config).await else { return };
    let held = stage.store().acquire(&dual(1)).await.unwrap().lease;
    let Stack::Dual(v4, v6) = dual(1).underlay else { unreachable!("it has both") };
    let v6_alone = LeaseRequest { underlay: Stack::V6(v6), ..dual(1) };
    let store = stage.store();
    assert_eq!(store.acquire(&v6_alone).await.unwrap().lease.subnets, held.subnets);
    // What it can say meanwhile, and what it says then.
    let data = || BackendData::from_text(r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#).unwrap();
    let (of_v4, of_v6) = (Endpoint { public_ip: v4, data: data() }, Endpoint { public_ip: v6, data: data() });
    let kind = BackendKind::of("vxlan");
    let meanwhile = Offer { backend: kind.clone(), endpoints: Stack::V6(of_v6.clone()) };
    store.publish(&held.node, &[meanwhile]).await.unwrap();
    store.renew(&held.node).await.unwrap();
    let whole = Offer { backend: kind, endpoints: Stack::Dual(of_v4, of_v6) };
    store.publish(&held.node, &[whole]).await.unwrap();
    assert_eq!(stage.store().acquire(&dual(1)).await.unwrap().lease.subnets, held.subnets);
    assert_eq!(stage.eye.list(&stage.subnets()).await.len(), 1);
    // By IPv6 only where one has no IPv4: who says another one is another node.
    let other = LeaseRequest { underlay: Stack::Dual([10, 240, 0, 9].into(), v6), ..dual(9) };
    assert_ne!(stage.store().acquire(&other).await.unwrap().lease.subnets, held.subnets);
}

#[tokio::test]
async fn a_prefix_may_have_what_separates_the_families_in_a_key() {
    let Some(mut stage) = Stage::new("one&two", CONFIG).await else { return };
    let first = stage.store().acquire(&request(1)).await.unwrap().lease.subnets;
    assert_ne!(stage.store().acquire(&request(2)).await.unwrap().lease.subnets, first);
    assert_eq!(stage.eye.list(&stage.subnets()).await.len(), 2);
}

#[tokio::test]
async fn flannels_lease_is_taken_over_and_extended_to_our_term() {
    let Some(mut stage) = Stage::new("taken_over", CONFIG).await else { return };
    let value = r#"{"PublicIP":"10.240.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#;
    stage.eye.put(&stage.key("10.42.7.0-24"), value, Some(600)).await;
    let before = stage.eye.only(&stage.subnets()).await;
    let owned = stage.store().acquire(&request(1)).await.unwrap();
    assert_eq!((subnet(&owned.lease).as_str(), &owned.lease.offers[..]), ("10.42.7.0/24", &[offer(1, 1)][..]));
    assert!(owned.remaining.unwrap() > Duration::from_secs(80_000), "{owned:?}");
    let after = stage.eye.only(&stage.subnets()).await;
    assert_eq!(after.value, before.value);
    assert_ne!(after.lease, before.lease);
}

#[tokio::test]
async fn the_previous_subnet_is_kept_where_it_is_free_and_fits() {
    let Some(mut stage) = Stage::new("previous", CONFIG).await else { return };
    let previous =
        |number, subnet: &str| LeaseRequest { previous: Some(Stack::V4(subnet.parse().unwrap())), ..request(number) };
    let store = stage.store();
    let first = store.acquire(&previous(1, "10.42.77.0/24")).await.unwrap();
    assert_eq!(subnet(&first.lease), "10.42.77.0/24");
    let second = store.acquire(&previous(2, "10.42.77.0/24")).await.unwrap();
    assert_ne!(subnet(&second.lease), "10.42.77.0/24", "it is another's");
    for (number, outside) in [(3, "10.42.0.0/24"), (4, "10.43.1.0/24"), (5, "10.42.80.0/25")] {
        let owned = store.acquire(&previous(number, outside)).await.unwrap();
        assert_ne!(subnet(&owned.lease), outside);
    }
    assert_eq!(stage.eye.list(&stage.subnets()).await.len(), 5);
}

#[tokio::test]
async fn a_lease_that_no_longer_fits_the_network_is_replaced_at_once() {
    let Some(mut stage) = Stage::new("changed_network", CONFIG).await else { return };
    let old = stage.store().acquire(&request(1)).await.unwrap();
    stage.eye.put(&format!("{}/config", stage.prefix), r#"{"Network":"10.99.0.0/16"}"#, None).await;
    let new = stage.store().acquire(&request(1)).await.unwrap();
    assert!(subnet(&new.lease).starts_with("10.99."), "{new:?}");
    assert_ne!(old.lease.precedence, new.lease.precedence);
    assert_eq!(stage.eye.only(&stage.subnets()).await.key, stage.key(&subnet_key::format(&new.lease.subnets).unwrap()));
    // And the same subnet with one family more.
    let both = r#"{"Network":"10.99.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#;
    stage.eye.put(&format!("{}/config", stage.prefix), both, None).await;
    let previous = Some(new.lease.subnets);
    let dual = stage.store().acquire(&LeaseRequest { previous, ..dual(1) }).await.unwrap();
    assert_eq!(dual.lease.subnets.v4(), new.lease.subnets.v4());
    assert!(dual.lease.subnets.v6().is_some());
    assert_eq!(stage.eye.list(&stage.subnets()).await.len(), 1);
}

#[tokio::test]
async fn a_reservation_stays_for_ever() {
    let Some(mut stage) = Stage::new("reservation", CONFIG).await else { return };
    let key = stage.key("10.42.9.0-24");
    stage.eye.put(&key, r#"{"PublicIP":"10.240.0.1"}"#, None).await;
    let store = stage.store();
    let owned = store.acquire(&request(1)).await.unwrap();
    assert_eq!((subnet(&owned.lease).as_str(), owned.remaining), ("10.42.9.0/24", None));
    assert_eq!(store.publish(&name("node-1"), &[offer(1, 1)]).await.unwrap().remaining, None);
    assert_eq!(store.renew(&name("node-1")).await.unwrap().remaining, None);
    assert_eq!(stage.eye.only(&key).await.lease, 0);
    store.release(&name("node-1")).await.unwrap();
    let shown = stage.eye.only(&key).await;
    assert_eq!((shown.value.as_str(), shown.lease), (r#"{"PublicIP":"10.240.0.1","PublicIPv6":null}"#, 0));
    assert_eq!(subnet(&stage.store().acquire(&request(1)).await.unwrap().lease), "10.42.9.0/24");
}

#[tokio::test]
async fn a_reservation_that_does_not_fit_the_network_stays_unused_and_is_taken_once_it_fits() {
    let Some(mut stage) = Stage::new("unfit_reservation", CONFIG).await else { return };
    let key = stage.key("10.42.9.0-24");
    stage.eye.put(&key, r#"{"PublicIP":"10.240.0.1"}"#, None).await;
    let node = name("node-1");
    let store = stage.store();
    store.acquire(&request(1)).await.unwrap();
    store.publish(&node, &[offer(1, 1)]).await.unwrap();

    // Somebody's mistake: while it lasts the node has another subnet, and the reserved one leads nowhere.
    stage.eye.put(&format!("{}/config", stage.prefix), r#"{"Network":"10.99.0.0/16"}"#, None).await;
    let store = stage.store();
    let elsewhere = store.acquire(&request(1)).await.unwrap();
    assert!(subnet(&elsewhere.lease).starts_with("10.99."), "{elsewhere:?}");
    store.publish(&node, &[offer(1, 1)]).await.unwrap();
    let kept = stage.eye.only(&key).await;
    assert_eq!((kept.value.as_str(), kept.lease), (r#"{"PublicIP":"10.240.0.1","PublicIPv6":null}"#, 0));
    let mut told = store.watch(&name("node-2")).await.unwrap();
    let Some(Ok(LeaseEvent::Snapshot(leases))) = told.next().await else { panic!("a snapshot") };
    let told: Vec<_> = leases.iter().map(|lease| (lease.node.as_str(), subnet(lease), lease.offers.len())).collect();
    assert!(told.contains(&("10.240.0.1", subnet(&elsewhere.lease), 1)), "the name is the living one's: {told:?}");
    assert!(told.contains(&("10.240.0.1+10.42.9.0/24", "10.42.9.0/24".to_owned(), 0)), "{told:?}");
    assert_eq!(told.len(), 2);
    // A restart is no third.
    assert_eq!(stage.store().acquire(&request(1)).await.unwrap().lease.subnets, elsewhere.lease.subnets);

    stage.eye.put(&format!("{}/config", stage.prefix), CONFIG, None).await;
    let back = stage.store().acquire(&request(1)).await.unwrap();
    assert_eq!((subnet(&back.lease).as_str(), back.remaining), ("10.42.9.0/24", None));

    // With a family more it does not fit, and no other key may take its subnet.
    let both = r#"{"Network":"10.42.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#;
    stage.eye.put(&format!("{}/config", stage.prefix), both, None).await;
    let previous = Some(back.lease.subnets);
    let dual = stage.store().acquire(&LeaseRequest { previous, ..dual(1) }).await.unwrap();
    assert_ne!(dual.lease.subnets.v4(), back.lease.subnets.v4());
    assert_eq!(stage.eye.only(&key).await.lease, 0);
}

#[tokio::test]
async fn a_key_that_cannot_be_read_takes_its_subnet_all_the_same_and_a_full_range_is_said() {
    let Some(mut stage) = Stage::new("full", r#"{"Network":"10.3.0.0/22"}"#).await else { return };
    stage.eye.put(&stage.key("10.3.1.0-24"), "not ours to read", None).await;
    stage.eye.put(&stage.key("10.3.2.128-25"), r#"{"PublicIP":"10.240.0.9"}"#, None).await;
    stage.eye.put(&stage.key("what is this"), "", None).await;
    let store = stage.store();
    assert_eq!(subnet(&store.acquire(&request(1)).await.unwrap().lease), "10.3.3.0/24");
    let error = store.acquire(&request(2)).await.unwrap_err();
    assert!(matches!(&error, SubnetError::OutOfSubnets { total: 3, .. }), "{error}");
    store.release(&name("node-1")).await.unwrap();
    assert_eq!(subnet(&store.acquire(&request(2)).await.unwrap().lease), "10.3.3.0/24");
}

#[tokio::test]
async fn renewing_keeps_the_etcd_lease_and_its_whole_term() {
    let Some(mut stage) = Stage::new("renewing", CONFIG).await else { return };
    let store = EtcdSubnets::new(stage.options().term(Duration::from_secs(60))).unwrap();
    let node = name("node-1");
    assert!(store.renew(&node).await.is_err());
    store.acquire(&request(1)).await.unwrap();
    let before = stage.eye.only(&stage.subnets()).await;
    // Some of it is gone: the server counts in whole seconds.
    while ttl(&mut stage.eye, before.lease).await >= 57 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let owned = store.renew(&node).await.unwrap();
    assert!(ttl(&mut stage.eye, before.lease).await >= 57);
    assert!(owned.remaining.unwrap() > Duration::from_secs(56));
    let after = stage.eye.only(&stage.subnets()).await;
    assert_eq!((after.lease, after.mod_revision), (before.lease, before.mod_revision));
}

#[tokio::test]
async fn a_lease_that_is_gone_is_said_by_every_call_and_can_be_acquired_anew() {
    let Some(mut stage) = Stage::new("gone", CONFIG).await else { return };
    let (store, node) = (stage.store(), name("node-1"));
    store.acquire(&request(1)).await.unwrap();
    let key = stage.eye.only(&stage.subnets()).await;
    stage.eye.0.lease_revoke(key.lease).await.unwrap();
    let reason = not_held(store.publish(&node, &[offer(1, 1)]).await);
    assert!(reason.contains(&key.key) && reason.contains("gone"), "{reason}");
    not_held(store.renew(&node).await);
    assert_eq!(stage.eye.list(&stage.subnets()).await, [], "nothing came back by itself");
    let owned = store.acquire(&request(1)).await.unwrap();
    let key = stage.eye.only(&stage.subnets()).await;
    stage.eye.delete(&key.key).await;
    assert!(not_held(store.renew(&node).await).contains("gone"));
    let again = store.acquire(&LeaseRequest { previous: Some(owned.lease.subnets), ..request(1) }).await.unwrap();
    assert_eq!(again.lease.subnets, owned.lease.subnets);
}

#[tokio::test]
async fn case_30_a_key_that_another_identity_overwrote_is_reported_and_not_fought_over() {
    let Some(mut stage) = Stage::new("overwritten", CONFIG).await else { return };
    let (store, node) = (stage.store(), name("node-1"));
    for attempt in ["publish", "renew", "release"] {
        store.acquire(&request(1)).await.unwrap();
        let all = stage.eye.list(&stage.subnets()).await;
        let mine = all.into_iter().find(|shown| shown.value.contains("10.240.0.1\"")).unwrap();
        stage.eye.put(&mine.key, r#"{"PublicIP":"10.240.0.66","BackendType":"vxlan"}"#, Some(600)).await;
        let theirs = stage.eye.only(&mine.key).await;
        if attempt == "release" {
            store.release(&node).await.unwrap();
        } else {
            let answer =
                if attempt == "renew" { store.renew(&node).await } else { store.publish(&node, &[offer(1, 1)]).await };
            assert!(not_held(answer).contains("overwritten by 10.240.0.66"));
        }
        assert_eq!(stage.eye.only(&mine.key).await, theirs);
        let again = store.acquire(&request(1)).await.unwrap();
        assert_ne!(Some(again.lease.subnets), subnet_key::parse(&mine.key), "another subnet: that one is taken");
        store.release(&node).await.unwrap();
    }
}

#[tokio::test]
async fn what_another_process_of_the_node_wrote_is_taken_over() {
    let Some(mut stage) = Stage::new("another_process", CONFIG).await else { return };
    let (store, node) = (stage.store(), name("node-1"));
    store.acquire(&request(1)).await.unwrap();
    let key = stage.eye.only(&stage.subnets()).await.key;
    // flannel renews: a new etcd lease, and a plain put.
    stage.eye.put(&key, r#"{"PublicIP":"10.240.0.1","PublicIPv6":null,"BackendType":"host-gw"}"#, Some(600)).await;
    let lease = stage.eye.only(&key).await.lease;
    let renewed = store.renew(&node).await.unwrap();
    assert_eq!(renewed.lease.offers[0].backend.as_str(), "host-gw");
    assert!(renewed.remaining.unwrap() <= Duration::from_secs(600), "what that etcd lease lasts");
    store.publish(&node, &[offer(1, 2)]).await.unwrap();
    let shown = stage.eye.only(&key).await;
    assert!(shown.value.contains(r#""VNI":2"#));
    assert_eq!(shown.lease, lease);
}

#[tokio::test]
async fn releasing_deletes_the_key_and_is_success_twice() {
    let Some(mut stage) = Stage::new("releasing", CONFIG).await else { return };
    let (store, node) = (stage.store(), name("node-1"));
    store.release(&node).await.unwrap();
    store.acquire(&request(1)).await.unwrap();
    store.release(&node).await.unwrap();
    assert_eq!(stage.eye.list(&stage.subnets()).await, []);
    store.release(&node).await.unwrap();
    not_held(store.publish(&node, &[]).await);
}

/// Seconds that are left of an etcd lease.
async fn ttl(eye: &mut Eye, lease: i64) -> i64 {
    eye.0.lease_time_to_live(lease, None).await.unwrap().ttl()
}
