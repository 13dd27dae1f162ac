//! Our own store passes, in both of its modes; and a good store that is broken in one thing breaks the rule of that thing.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use ipnetwork::{Ipv4Network, Ipv6Network};

use super::*;
use crate::config::NetworkConfig;
use crate::lease::BackendData;
use crate::subnet::file::FileSubnets;
use crate::subnet::memory::MemorySubnets;
use crate::subnet::{LeaseRequest, LeaseStream, SubnetManager};
use crate::types::Stack;

fn network() -> NetworkConfig {
    NetworkConfig::new(networks()).unwrap()
}

fn networks() -> Stack<Ipv4Network, Ipv6Network> {
    Stack::Dual("10.42.0.0/16".parse().unwrap(), "2001:db8:42::/56".parse().unwrap())
}

fn unavailable() -> SubnetError {
    SubnetError::Unavailable { attempted: "watch the leases".into(), reason: "connection reset".into() }
}

/// Stores that assign, of a kind with this fault.
struct Assigning(Fault);

impl fmt::Debug for Assigning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

#[async_trait]
impl Fixture for Assigning {
    async fn store(&self) -> Result<Box<dyn Store>, String> {
        let inner = MemorySubnets::assigned(network());
        let (shared, fault) = (Arc::default(), self.0);
        Ok(Box::new(Faulty { inner, fault, shared }))
    }
    fn patience(&self) -> Duration {
        Duration::from_secs(1)
    }
}

#[tokio::test(start_paused = true)]
async fn the_store_in_memory_conforms_when_it_assigns_subnets() {
    let report = check(&Assigning(Fault::Nothing)).await;
    report.assert_ok();
    assert!(report.untried().is_empty(), "{report}");
}

#[tokio::test(start_paused = true)]
async fn the_store_in_memory_conforms_when_it_allocates_subnets() {
    let report = check(&Allocating::new(|| MemorySubnets::allocating(network()).unwrap())).await;
    report.assert_ok();
    let untried: Vec<Rule> = report.untried().iter().map(|untried| untried.rule).collect();
    assert_eq!(untried, [WAITS, RECOVERS], "{report}");
}

/// Files that all nodes write into.
#[derive(Debug)]
struct Files;

#[async_trait]
impl Fixture for Files {
    async fn store(&self) -> Result<Box<dyn Store>, String> {
        let folder = tempfile::tempdir().unwrap();
        let network = r#"{"Network": "10.42.0.0/16", "EnableIPv6": true, "IPv6Network": "2001:db8:42::/56"}"#;
        let text = format!("{{\n  \"network\": {network},\n  \"nodes\": {{\n  }}\n}}\n");
        std::fs::write(folder.path().join("cluster.json"), text).unwrap();
        Ok(Box::new(File(folder)))
    }
}

#[derive(Debug)]
struct File(tempfile::TempDir);

#[async_trait]
impl Store for File {
    async fn manager(&self, _: &NodeName) -> Result<Arc<dyn SubnetManager>, String> {
        Ok(Arc::new(FileSubnets::shared(self.0.path().join("cluster.json"))))
    }

    fn assigns(&self) -> bool {
        true
    }

    fn holds_while_assigned(&self) -> bool {
        true
    }

    async fn admit(&self, node: &NodeName, number: u8) -> Result<(), String> {
        let path = self.0.path().join("cluster.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let before = text.strip_suffix("\n  }\n}\n").ok_or("the end of the file is another")?;
        let comma = if before.ends_with('{') { "" } else { "," };
        let entry =
            format!(r#""{node}": {{"subnet": "10.42.{number}.0/24", "ipv6Subnet": "2001:db8:42:{number:x}::/64"}}"#);
        let new = self.0.path().join("new");
        std::fs::write(&new, format!("{before}{comma}\n    {entry}\n  }}\n}}\n")).unwrap();
        std::fs::rename(new, path).map_err(|e| e.to_string())
    }
}

#[tokio::test]
async fn the_store_in_a_file_conforms() {
    let report = check(&Files).await;
    report.assert_ok();
    let untried: Vec<Rule> = report.untried().iter().map(|untried| untried.rule).collect();
    assert_eq!(untried, [RECOVERS], "{report}");
}

/// What is wrong with a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    NetworkAtRandom,
    WaitsForEver,
    SaysInvalid,
    ForgetsOffersOnAcquire,
    OneSubnetForAll,
    SortsOffers,
    WritesJsonAnew,
    AddsOffers,
    PublishesUnheld,
    RenewsToNothing,
    ReleasesOnce,
    ReleasesNothing,
    NoSnapshot,
    EmptySnapshot,
    DeafWatch,
    RemovesBeforeItChanges,
    OneWatchAtATime,
    ForgetsWhatACutMissed,
    PublishesInTwoSteps,
    ReleaseHoldsALock,
    YoungerWithEachPublish,
    OnePrecedence,
    OwnerUnknown,
}

#[derive(Debug, Default)]
struct Shared {
    asked: AtomicU64,
    released: AtomicBool,
    locked: AtomicBool,
    watches: Mutex<Vec<Arc<AtomicBool>>>,
    cut: AtomicBool,
}

/// The store in memory with a fault.
#[derive(Debug, Clone)]
struct Faulty {
    inner: MemorySubnets,
    fault: Fault,
    shared: Arc<Shared>,
}

impl Faulty {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn told(&self, mut lease: Lease) -> Lease {
        match self.fault {
            Fault::YoungerWithEachPublish => {
                lease.precedence.since += self.shared.asked.fetch_add(1, Ordering::Relaxed);
            }
            Fault::OnePrecedence => lease.precedence = Precedence { since: 1, identity: "node".into() },
            Fault::OneSubnetForAll => lease.subnets = Stack::V4("10.42.7.0/24".parse().unwrap()),
            Fault::OwnerUnknown => lease.node = "somebody".parse().unwrap(),
            _ => {}
        }
        lease
    }

    fn owned(&self, owned: OwnedLease) -> OwnedLease {
        OwnedLease { lease: self.told(owned.lease), ..owned }
    }

    fn bent(&self, node: &NodeName, offers: &[Offer]) -> Vec<Offer> {
        let mut offers = offers.to_vec();
        match self.fault {
            Fault::SortsOffers => offers.sort_by(|a, b| a.backend.cmp(&b.backend)),
            Fault::AddsOffers => {
                let before = self.inner.leases().into_iter().find(|lease| lease.node == *node);
                let before = before.map(|lease| lease.offers).unwrap_or_default();
                let new = |offer: &Offer| !offers.iter().any(|o| o.backend == offer.backend);
                let kept: Vec<Offer> = before.into_iter().filter(new).collect();
                offers.extend(kept);
            }
            Fault::WritesJsonAnew => {
                for offer in &mut offers {
                    if let Stack::Dual(v4, _) = &mut offer.endpoints {
                        let value: serde_json::Value = v4.data.decode().unwrap();
                        v4.data = BackendData::encode(&value).unwrap();
                    }
                }
            }
            _ => {}
        }
        offers
    }
}

async fn once_more() {
    tokio::task::yield_now().await;
}

#[async_trait]
impl SubnetManager for Faulty {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        let asked = self.shared.asked.fetch_add(1, Ordering::Relaxed);
        match self.fault {
            Fault::NetworkAtRandom if asked.is_multiple_of(2) => {
                Ok(NetworkConfig::new(Stack::V4("10.43.0.0/16".parse().unwrap())).unwrap())
            }
            _ => self.inner.network().await,
        }
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        match self.inner.acquire(request).await {
            Err(SubnetError::NotAssigned { .. }) if self.is(Fault::WaitsForEver) => std::future::pending().await,
            Err(SubnetError::NotAssigned { .. }) if self.is(Fault::SaysInvalid) => {
                Err(SubnetError::Invalid { object: "the node".into(), reason: "it has no subnet".into() })
            }
            Ok(_) if self.is(Fault::ForgetsOffersOnAcquire) => {
                self.inner.publish(&request.node, &[]).await.map(|owned| self.owned(owned))
            }
            other => other.map(|owned| self.owned(owned)),
        }
    }

    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        if self.is(Fault::PublishesInTwoSteps) {
            self.inner.publish(node, offers.get(..1).unwrap_or_default()).await?;
            once_more().await;
        }
        if self.is(Fault::RemovesBeforeItChanges) {
            self.inner.release(node).await?;
            let underlay = Stack::V4([10, 240, 0, 101].into());
            self.inner.acquire(&LeaseRequest { node: node.clone(), underlay, previous: None }).await?;
        }
        let offers = self.bent(node, offers);
        match self.inner.publish(node, &offers).await {
            Err(SubnetError::NotHeld { .. }) if self.is(Fault::PublishesUnheld) => {
                let underlay = Stack::V4([10, 240, 0, 101].into());
                let owned = self.inner.acquire(&LeaseRequest { node: node.clone(), underlay, previous: None }).await;
                owned.map(|owned| self.owned(owned))
            }
            other => other.map(|owned| self.owned(owned)),
        }
    }

    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        let owned = self.inner.renew(node).await?;
        let remaining = if self.is(Fault::RenewsToNothing) { Some(Duration::ZERO) } else { owned.remaining };
        Ok(OwnedLease { remaining, ..self.owned(owned) })
    }

    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        match self.fault {
            Fault::ReleasesNothing => return Ok(()),
            Fault::ReleasesOnce if self.shared.released.swap(true, Ordering::Relaxed) => {
                return Err(SubnetError::NotHeld { node: node.clone(), reason: "it was released".into() });
            }
            Fault::ReleaseHoldsALock => {
                if self.shared.locked.swap(true, Ordering::Relaxed) {
                    return Err(unavailable());
                }
                once_more().await;
                self.shared.locked.store(false, Ordering::Relaxed);
            }
            _ => {}
        }
        self.inner.release(node).await
    }

    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        let faulty = self.clone();
        let stream = self.inner.watch(node).await?;
        let events = stream.map(move |item| {
            item.map(|event| match event {
                LeaseEvent::Snapshot(_) if faulty.is(Fault::EmptySnapshot) => LeaseEvent::Snapshot(Vec::new()),
                LeaseEvent::Snapshot(leases) => {
                    LeaseEvent::Snapshot(leases.into_iter().map(|lease| faulty.told(lease)).collect())
                }
                LeaseEvent::Upsert(lease) => LeaseEvent::Upsert(faulty.told(lease)),
                other => other,
            })
        });
        Ok(match self.fault {
            Fault::NoSnapshot => events.skip(1).boxed(),
            Fault::DeafWatch => events.take(1).chain(stream::pending()).boxed(),
            Fault::OneWatchAtATime => {
                let live = Arc::new(AtomicBool::new(true));
                let mut watches = self.shared.watches.lock().unwrap();
                watches.drain(..).for_each(|other| other.store(false, Ordering::Relaxed));
                watches.push(Arc::clone(&live));
                events.filter(move |_| std::future::ready(live.load(Ordering::Relaxed))).boxed()
            }
            Fault::ForgetsWhatACutMissed => {
                let shared = Arc::clone(&self.shared);
                events.filter(move |_| std::future::ready(!shared.cut.load(Ordering::Relaxed))).boxed()
            }
            _ => events.boxed(),
        })
    }
}

#[async_trait]
impl Store for Faulty {
    async fn manager(&self, _: &NodeName) -> Result<Arc<dyn SubnetManager>, String> {
        Ok(Arc::new(self.clone()))
    }

    fn assigns(&self) -> bool {
        true
    }

    async fn admit(&self, node: &NodeName, number: u8) -> Result<(), String> {
        let v4 = format!("10.42.{number}.0/24").parse().unwrap();
        self.inner.assign(node, Stack::Dual(v4, format!("2001:db8:42:{number:x}::/64").parse().unwrap()));
        Ok(())
    }

    async fn cut_watches(&self) -> Result<(), String> {
        self.shared.cut.store(true, Ordering::Relaxed);
        if !self.is(Fault::ForgetsWhatACutMissed) {
            self.inner.faults().cut_watches(unavailable());
        }
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn each_rule_is_broken_by_a_store_that_breaks_it() {
    let faults = [
        (Fault::NetworkAtRandom, NETWORK),
        (Fault::WaitsForEver, WAITS),
        (Fault::SaysInvalid, WAITS),
        (Fault::OwnerUnknown, OWN),
        (Fault::ForgetsOffersOnAcquire, IDEMPOTENT),
        (Fault::OneSubnetForAll, DISJOINT),
        (Fault::SortsOffers, BYTES),
        (Fault::WritesJsonAnew, BYTES),
        (Fault::AddsOffers, REPLACES),
        (Fault::PublishesUnheld, NOT_HELD),
        (Fault::RenewsToNothing, RENEWS),
        (Fault::ReleasesOnce, RELEASES),
        (Fault::ReleasesNothing, RELEASES),
        (Fault::NoSnapshot, SNAPSHOT),
        (Fault::EmptySnapshot, SNAPSHOT),
        (Fault::DeafWatch, TOLD),
        (Fault::RemovesBeforeItChanges, SAME_NAME),
        (Fault::OneWatchAtATime, APART),
        (Fault::ForgetsWhatACutMissed, RECOVERS),
        (Fault::PublishesInTwoSteps, WHOLE),
        (Fault::ReleaseHoldsALock, WHOLE),
        (Fault::YoungerWithEachPublish, PRECEDENCE),
        (Fault::OnePrecedence, PRECEDENCE),
    ];
    for (fault, rule) in faults {
        let report = check(&Assigning(fault)).await;
        let violation = report.violations_of(rule.name).next();
        assert!(violation.is_some_and(|v| !v.detail.is_empty()), "{fault:?} should break {rule}: {report}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fixture_that_makes_no_store_breaks_every_rule_and_says_why() {
    #[derive(Debug)]
    struct Nothing;
    #[async_trait]
    impl Fixture for Nothing {
        async fn store(&self) -> Result<Box<dyn Store>, String> {
            Err("no server is there".to_owned())
        }
    }
    let report = check(&Nothing).await;
    assert!(report.passed().is_empty() && report.to_string().contains("no server is there"), "{report}");
}
