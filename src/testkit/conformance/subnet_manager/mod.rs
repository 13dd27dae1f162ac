//! The suite for stores of leases: what the engine relies on, asked of the [`SubnetManager`](crate::subnet::SubnetManager)s of
//! several nodes of one store. It knows nothing of how a store keeps leases; a [`Fixture`] makes empty ones.
//!
//! A store that assigns subnets, as Kubernetes does, says how a node gets its own:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! use std::sync::Arc;
//! use podnet::config::NetworkConfig;
//! use podnet::subnet::SubnetManager;
//! use podnet::subnet::memory::MemorySubnets;
//! use podnet::testkit::conformance::subnet_manager::{self, Fixture, Store};
//! use podnet::types::{NodeName, Stack};
//!
//! #[derive(Debug)]
//! struct Mine;
//!
//! #[async_trait::async_trait]
//! impl Fixture for Mine {
//!     async fn store(&self) -> Result<Box<dyn Store>, String> {
//!         let network = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse().unwrap())).unwrap();
//!         Ok(Box::new(MyStore(MemorySubnets::assigned(network))))
//!     }
//! }
//!
//! #[derive(Debug)]
//! struct MyStore(MemorySubnets);
//!
//! #[async_trait::async_trait]
//! impl Store for MyStore {
//!     async fn manager(&self, _: &NodeName) -> Result<Arc<dyn SubnetManager>, String> {
//!         Ok(Arc::new(self.0.clone()))
//!     }
//!     fn assigns(&self) -> bool {
//!         true
//!     }
//!     async fn admit(&self, node: &NodeName, number: u8) -> Result<(), String> {
//!         self.0.assign(node, Stack::V4(format!("10.42.{number}.0/24").parse().unwrap()));
//!         Ok(())
//!     }
//! }
//!
//! let report = subnet_manager::check(&Mine).await;
//! report.assert_ok();
//! println!("{report}");
//! # }
//! ```

mod fixture;
mod stage;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use futures::future::join_all;

use super::{Findings, Report, Rule, cut, ensure};
use crate::admission::overlap;
use crate::lease::{Lease, LeaseEvent, Offer, Precedence};
use crate::subnet::{OwnedLease, SubnetError};
use crate::types::{Family, NodeName};

pub use fixture::{Allocating, Fixture, NODES, Store};
use stage::{Member, Stage};

rules! {
    /// What a store of leases must keep to.
    NETWORK = "network-is-stable": "The cluster network is the same whenever and by whichever node it is asked.";
    WAITS = "unknown-node-waits": "Where subnets are assigned, acquiring without one is NotAssigned or OutOfSubnets, and can be tried again.";
    OWN = "lease-is-the-askers": "A lease that is acquired bears the asker's name, subnets inside the network, and no offers of somebody else.";
    IDEMPOTENT = "acquire-is-idempotent": "Acquiring what is held gives the same lease, with what was published.";
    DISJOINT = "subnets-are-disjoint": "Nodes that acquire at the same time get subnets that do not overlap.";
    BYTES = "offers-are-kept-to-the-byte": "What was published is answered, and told to others, to the byte and in its order.";
    REPLACES = "publish-replaces": "Publishing replaces all offers: none remains of what was published before. Doing it again changes nothing.";
    NOT_HELD = "not-held-is-said": "Publishing and renewing without a lease is NotHeld: where nothing was acquired, or assigned, and after a release that ends the lease.";
    RENEWS = "renew-keeps": "Renewing changes nothing of a lease, and leaves it no shorter.";
    RELEASES = "release-is-idempotent": "Releasing is success, twice too and without a lease; what was published is gone, and the lease can be acquired anew.";
    SNAPSHOT = "watch-starts-with-a-snapshot": "The first event of a watch is a snapshot of every lease that others hold, with its offers.";
    TOLD = "changes-are-told": "What others acquire, publish and release is told to a watch, by the owner's name, within the deadline.";
    SAME_NAME = "a-change-keeps-the-name": "A changed offer is told as the same node's, which never seems gone in between.";
    APART = "watches-are-independent": "Two watches of one node hear the same; ending one leaves the other.";
    RECOVERS = "a-cut-is-told": "A watch that was cut tells a whole snapshot again, or ends, and the next one begins with one; nothing that changed meanwhile is lost.";
    WHOLE = "dropped-calls-leave-nothing-half": "A call whose future was dropped has happened or has not; it can be called again.";
    PRECEDENCE = "precedence-is-stable": "A lease keeps its precedence while it is held, no two leases share one, and all watches see the same.";
}

/// Asks all rules of stores that the fixture makes, each trial of a new one.
///
/// Must be called inside a tokio runtime with time enabled. It waits no longer than [`Fixture::patience`] for anything.
pub async fn check(fixture: &dyn Fixture) -> Report {
    let mut suite = Suite { fixture, findings: Findings::new(format!("subnet manager {fixture:?}"), RULES) };
    suite.trial(NETWORK, "three nodes ask", network).await;
    suite.trial(OWN, "two nodes acquire", own).await;
    suite.trial(IDEMPOTENT, "acquired again after publishing", idempotent).await;
    suite.trial(DISJOINT, "eight nodes acquire at once", disjoint).await;
    suite.trial(BYTES, "offers with odd data", bytes).await;
    suite.trial(REPLACES, "two offers, then one, then none", replaces).await;
    suite.trial(NOT_HELD, "before, and after a release", not_held).await;
    suite.trial(RENEWS, "renewed after publishing", renews).await;
    suite.trial(RELEASES, "released twice and acquired anew", releases).await;
    suite.trial(SNAPSHOT, "a watch that begins late", snapshot).await;
    suite.trial(TOLD, "another node comes, publishes and goes", told).await;
    suite.trial(SAME_NAME, "an offer that changes ten times", same_name).await;
    suite.trial(APART, "two watches, of which one ends", apart).await;
    suite.trial(PRECEDENCE, "three nodes, and all that they do", precedence).await;
    for (what, call) in [
        ("a dropped acquire", Dropped::Acquire),
        ("a dropped publish", Dropped::Publish),
        ("a dropped renew", Dropped::Renew),
        ("a dropped release", Dropped::Release),
        ("a dropped watch", Dropped::Watch),
    ] {
        suite.trial(WHOLE, what, |stage| whole(stage, call)).await;
    }
    suite.waits().await;
    suite.recovers().await;
    suite.findings.report()
}

struct Suite<'a> {
    fixture: &'a dyn Fixture,
    findings: Findings,
}

impl Suite<'_> {
    /// A trial in a new store.
    async fn trial<F: Future<Output = Result<(), String>>>(
        &mut self,
        rule: Rule,
        scenario: &str,
        trial: impl FnOnce(Stage) -> F,
    ) {
        let outcome = async { trial(Stage::new(self.fixture).await?).await };
        // Each wait has a deadline; this is for a manager that never answers.
        let patience = self.fixture.patience().saturating_mul(10);
        let outcome = tokio::time::timeout(patience, outcome).await;
        let outcome = outcome.unwrap_or_else(|_| Err(format!("a call did not return within {patience:?}")));
        self.findings.check(rule, scenario, outcome);
    }

    async fn waits(&mut self) {
        match Stage::new(self.fixture).await {
            Ok(stage) if !stage.store.assigns() => {
                self.findings.leave_out(WAITS, "this store gives subnets away by itself");
            }
            _ => self.trial(WAITS, "acquired before it was assigned", waits).await,
        }
    }

    async fn recovers(&mut self) {
        let cut = async { Stage::new(self.fixture).await?.store.cut_watches().await }.await;
        match cut {
            Err(why) => self.findings.leave_out(RECOVERS, why),
            Ok(()) => self.trial(RECOVERS, "another node changes while the watch is cut", recovers).await,
        }
    }
}

async fn network(mut stage: Stage) -> Result<(), String> {
    let mut all = Vec::new();
    for _ in 0..3 {
        let member = stage.member().await?;
        all.push(member.network().await?);
        all.push(member.network().await?);
    }
    let first = all.first().cloned();
    all.iter()
        .try_for_each(|other| ensure(first.as_ref() == Some(other), || format!("it was {first:?}, and then {other:?}")))
}

async fn waits(mut stage: Stage) -> Result<(), String> {
    let member = stage.stranger().await?;
    match member.manager.acquire(&member.request()).await {
        Err(error @ (SubnetError::NotAssigned { .. } | SubnetError::OutOfSubnets { .. })) => {
            ensure(error.is_retryable(), || format!("{error} is said to be beyond a retry"))?;
        }
        other => return Err(format!("acquire answers {other:?}")),
    }
    stage.admit(&member).await?;
    member.acquire().await.map(drop)
}

async fn own(mut stage: Stage) -> Result<(), String> {
    let first = stage.member().await?;
    first.acquire().await?;
    first.publish(&first.offers(1)).await?;
    let second = stage.member().await?;
    let lease = second.acquire().await?.lease;
    ensure(lease.node == second.name, || format!("{} acquired a lease of {}", second.name, lease.node))?;
    ensure(lease.offers.is_empty(), || format!("nothing was published, and it has {:?}", lease.offers))?;
    let networks = second.network().await?.networks();
    for family in lease.subnets.families() {
        let network = match family {
            Family::V4 => networks.v4().map(|n| (*n).into()),
            Family::V6 => networks.v6().map(|n| (*n).into()),
        };
        let subnet = lease.subnet(family);
        let inside = subnet.zip(network).is_some_and(|(s, n)| overlap(s, n) && s.prefix() >= n.prefix());
        ensure(inside, || format!("{subnet:?} is not inside {network:?}"))?;
    }
    Ok(())
}

fn equal(what: &str, expected: &Lease, seen: &Lease) -> Result<(), String> {
    ensure(expected == seen, || format!("{what}: the lease was {expected:?},\nand is {seen:?}"))
}

async fn idempotent(mut stage: Stage) -> Result<(), String> {
    let member = stage.member().await?;
    let lease = member.acquire().await?.lease;
    equal("acquired twice", &lease, &member.acquire().await?.lease)?;
    let lease = member.publish(&member.offers(1)).await?.lease;
    equal("acquired again after publishing", &lease, &member.acquire().await?.lease)?;
    // Another process of the same node.
    let again = stage.again(&member).await?;
    equal("acquired by another client of the node", &lease, &again.acquire().await?.lease)
}

async fn disjoint(mut stage: Stage) -> Result<(), String> {
    let mut members = Vec::new();
    for _ in 0..8 {
        members.push(stage.member().await?);
    }
    let all = join_all(members.iter().map(Member::acquire)).await;
    let leases: Vec<Lease> = all.into_iter().map(|owned| Ok(owned?.lease)).collect::<Result<_, String>>()?;
    disjoint_leases(&leases)
}

fn disjoint_leases(leases: &[Lease]) -> Result<(), String> {
    for (number, one) in leases.iter().enumerate() {
        for other in leases.iter().skip(number + 1) {
            for family in Family::BOTH {
                let meet = one.subnet(family).zip(other.subnet(family)).is_some_and(|(a, b)| overlap(a, b));
                ensure(!meet, || format!("{one:?}\nand {other:?} overlap"))?;
            }
        }
    }
    Ok(())
}

async fn bytes(mut stage: Stage) -> Result<(), String> {
    let (member, other) = (stage.member().await?, stage.member().await?);
    member.acquire().await?;
    let mut watch = other.watch().await?;
    for offers in member.odd_offers() {
        let owned = member.publish(&offers).await?;
        same_offers("the answer", &offers, &owned)?;
        same_offers("renewed", &offers, &member.renew().await?)?;
        watch.until("the offers as they were published", |seen| seen.offers(&member.name) == Some(&offers)).await?;
    }
    Ok(())
}

fn same_offers(what: &str, offers: &[Offer], owned: &OwnedLease) -> Result<(), String> {
    let seen = &owned.lease.offers;
    ensure(seen == offers, || format!("{what}: published was {offers:?},\nit has {seen:?}"))
}

async fn replaces(mut stage: Stage) -> Result<(), String> {
    let (member, other) = (stage.member().await?, stage.member().await?);
    member.acquire().await?;
    let mut watch = other.watch().await?;
    let two = member.offers(1);
    let one = vec![member.offer("second", 2)];
    for offers in [two, one, Vec::new()] {
        let first = member.publish(&offers).await?;
        same_offers("the answer", &offers, &first)?;
        equal("published twice", &first.lease, &member.publish(&offers).await?.lease)?;
        same_offers("acquired again", &offers, &member.acquire().await?)?;
        watch.until("what is published now", |seen| seen.offers(&member.name) == Some(&offers)).await?;
    }
    Ok(())
}

async fn not_held(mut stage: Stage) -> Result<(), String> {
    let member = stage.stranger().await?;
    says_not_held("before anything else", &member).await?;
    stage.admit(&member).await?;
    if !stage.store.holds_while_assigned() {
        says_not_held("before the first lease", &member).await?;
        member.acquire().await?;
        member.publish(&member.offers(1)).await?;
        member.release().await?;
        says_not_held("after a release", &member).await?;
    }
    Ok(())
}

async fn says_not_held(when: &str, member: &Member) -> Result<(), String> {
    let publish = member.manager.publish(&member.name, &member.offers(1)).await;
    let renew = member.manager.renew(&member.name).await;
    for (call, answer) in [("publish", publish), ("renew", renew)] {
        match answer {
            Err(SubnetError::NotHeld { node, .. }) if node == member.name => {}
            other => return Err(format!("{when}, {call} answers {other:?}")),
        }
    }
    Ok(())
}

async fn renews(mut stage: Stage) -> Result<(), String> {
    let member = stage.member().await?;
    member.acquire().await?;
    let before = member.publish(&member.offers(1)).await?;
    let after = member.renew().await?;
    equal("renewed", &before.lease, &after.lease)?;
    let shorter = match (before.remaining, after.remaining) {
        (Some(before), Some(after)) => after < before,
        (None, Some(_)) => true,
        (_, None) => false,
    };
    ensure(!shorter, || format!("{:?} remained before, {:?} after", before.remaining, after.remaining))?;
    ensure(after.remaining != Some(Duration::ZERO), || "nothing remains of it".to_owned())
}

async fn releases(mut stage: Stage) -> Result<(), String> {
    let (member, other) = (stage.member().await?, stage.member().await?);
    member.release().await.map_err(|e| format!("without a lease: {e}"))?;
    member.acquire().await?;
    member.publish(&member.offers(1)).await?;
    member.release().await?;
    member.release().await.map_err(|e| format!("the second time: {e}"))?;
    let mut watch = other.watch().await?;
    watch.until("the lease is gone", |seen| stage.is_gone(seen, &member.name)).await?;
    let lease = member.acquire().await.map_err(|e| format!("after a release: {e}"))?.lease;
    watch.until("the lease is there anew", |seen| seen.leases.contains_key(&member.name)).await?;
    ensure(lease.offers.is_empty(), || format!("offers of the lease before are there: {:?}", lease.offers))
}

async fn snapshot(mut stage: Stage) -> Result<(), String> {
    let mut others = BTreeMap::new();
    for number in 0..3 {
        let member = stage.member().await?;
        member.acquire().await?;
        let lease = member.publish(&member.offers(number)).await?.lease;
        others.insert(member.name, lease);
    }
    let watcher = stage.member().await?;
    for when in ["before it has a lease", "with a lease of its own"] {
        let mut watch = watcher.watch().await?;
        match watch.next().await? {
            LeaseEvent::Snapshot(leases) => {
                let seen: BTreeMap<_, _> = leases.iter().map(|lease| (lease.node.clone(), lease.clone())).collect();
                let twice = || format!("{when}: a node is in it twice: {leases:?}");
                ensure(seen.len() == leases.len(), twice)?;
                let seen: BTreeMap<_, _> = seen.into_iter().filter(|(node, _)| *node != watcher.name).collect();
                ensure(seen == others, || format!("{when}: others hold {others:?},\nit tells {seen:?}"))?;
            }
            other => return Err(format!("{when}: it begins with {other:?}")),
        }
        watcher.acquire().await?;
    }
    Ok(())
}

async fn told(mut stage: Stage) -> Result<(), String> {
    let (watcher, other) = (stage.member().await?, stage.member().await?);
    watcher.acquire().await?;
    let mut watch = watcher.watch().await?;
    watch.next().await?;
    for round in 1..3 {
        let lease = other.acquire().await?.lease;
        let there = |lease: Lease| move |seen: &stage::Seen| seen.leases.get(&lease.node) == Some(&lease);
        watch.until("another node acquired", there(lease)).await?;
        let lease = other.publish(&other.offers(round)).await?.lease;
        watch.until("another node published", there(lease)).await?;
        let lease = other.publish(&other.offers(round + 10)).await?.lease;
        watch.until("another node published something else", there(lease)).await?;
        other.release().await?;
        watch.until("another node released", |seen| stage.is_gone(seen, &other.name)).await?;
    }
    Ok(())
}

async fn same_name(mut stage: Stage) -> Result<(), String> {
    let (watcher, other) = (stage.member().await?, stage.member().await?);
    other.acquire().await?;
    other.publish(&other.offers(0)).await?;
    let mut watch = watcher.watch().await?;
    watch.next().await?;
    for round in 1..=10 {
        let lease = other.publish(&other.offers(round)).await?.lease;
        watch.until("the changed offer", |seen| seen.leases.get(&other.name) == Some(&lease)).await?;
    }
    ensure(!watch.seen.removed.contains(&other.name), || format!("it told that {} was gone", other.name))?;
    let names: Vec<&NodeName> = watch.seen.leases.keys().filter(|name| **name != watcher.name).collect();
    ensure(names == [&other.name], || format!("the store has one other node, and it tells of {names:?}"))
}

async fn apart(mut stage: Stage) -> Result<(), String> {
    let (watcher, other) = (stage.member().await?, stage.member().await?);
    let mut first = watcher.watch().await?;
    first.next().await?;
    other.acquire().await?;
    let mut second = watcher.watch().await?;
    let begins = second.next().await?;
    ensure(matches!(begins, LeaseEvent::Snapshot(_)), || format!("the second watch begins with {begins:?}"))?;
    let lease = other.publish(&other.offers(1)).await?.lease;
    for watch in [&mut first, &mut second] {
        watch.until("another node published", |seen| seen.leases.get(&other.name) == Some(&lease)).await?;
    }
    drop(first);
    let lease = other.publish(&other.offers(2)).await?.lease;
    let heard =
        second.until("a change after the other watch ended", |seen| seen.leases.get(&other.name) == Some(&lease));
    heard.await
}

async fn recovers(mut stage: Stage) -> Result<(), String> {
    let (watcher, other, leaver) = (stage.member().await?, stage.member().await?, stage.member().await?);
    leaver.acquire().await?;
    leaver.publish(&leaver.offers(1)).await?;
    other.acquire().await?;
    let mut watch = watcher.watch().await?;
    watch.until("both nodes", |seen| !stage.is_gone(seen, &leaver.name)).await?;
    stage.store.cut_watches().await?;
    leaver.release().await?;
    let lease = other.publish(&other.offers(1)).await?.lease;
    let now = |seen: &stage::Seen| seen.leases.get(&other.name) == Some(&lease) && stage.is_gone(seen, &leaver.name);
    if watch.until_end(now).await? {
        // It ended, as it may.
        watch = watcher.watch().await?;
        let begins = watch.next().await?;
        ensure(matches!(begins, LeaseEvent::Snapshot(_)), || format!("the next watch begins with {begins:?}"))?;
    }
    watch.until("what changed meanwhile", now).await?;
    let lease = other.publish(&other.offers(2)).await?.lease;
    watch.until("what changed after the cut", |seen| seen.leases.get(&other.name) == Some(&lease)).await
}

#[derive(Debug, Clone, Copy)]
enum Dropped {
    Acquire,
    Publish,
    Renew,
    Release,
    Watch,
}

/// The most polls after which a call is dropped.
const POLLS: usize = 24;

async fn whole(mut stage: Stage, call: Dropped) -> Result<(), String> {
    let witness = stage.member().await?;
    let mut member = stage.member().await?;
    let mut leases = Vec::new();
    for polls in 0..POLLS {
        if matches!(call, Dropped::Acquire) {
            if stage.is_full() {
                break;
            }
            member = stage.member().await?;
        } else {
            member.acquire().await?;
        }
        let (old, new) = (member.offers(1), member.offers(2));
        if !matches!(call, Dropped::Acquire) {
            member.publish(&old).await?;
        }
        let (manager, name) = (&member.manager, &member.name);
        let ended = match call {
            Dropped::Acquire => cut(manager.acquire(&member.request()), polls).await.is_some(),
            Dropped::Publish => cut(manager.publish(name, &new), polls).await.is_some(),
            Dropped::Renew => cut(manager.renew(name), polls).await.is_some(),
            Dropped::Release => cut(manager.release(name), polls).await.is_some(),
            Dropped::Watch => cut(manager.watch(name), polls).await.is_some(),
        };
        let at = |e: String| format!("dropped after {polls} polls: {e}");
        // What others see is one or the other.
        let mut watch = witness.watch().await?;
        watch.next().await?;
        let seen = watch.seen.leases.get(name).map(|lease| lease.offers.clone());
        let possible = match call {
            Dropped::Acquire => seen.is_none() || seen == Some(Vec::new()),
            Dropped::Publish => seen.as_ref() == Some(&old) || seen.as_ref() == Some(&new),
            Dropped::Release => stage.is_gone(&watch.seen, name) || seen.as_ref() == Some(&old),
            Dropped::Renew | Dropped::Watch => seen.as_ref() == Some(&old),
        };
        ensure(possible, || at(format!("others see {seen:?}")))?;
        // And it can be called again.
        match call {
            Dropped::Acquire => leases.push(member.acquire().await.map_err(at)?.lease),
            Dropped::Publish => {
                let owned = member.publish(&new).await.map_err(at)?;
                same_offers("published again", &new, &owned).map_err(at)?;
            }
            Dropped::Renew => same_offers("renewed again", &old, &member.renew().await.map_err(at)?).map_err(at)?,
            Dropped::Release => {
                member.release().await.map_err(at)?;
                let answer = member.manager.renew(name).await;
                let gone = match &answer {
                    Err(SubnetError::NotHeld { .. }) => true,
                    Ok(owned) => stage.store.holds_while_assigned() && owned.lease.offers.is_empty(),
                    Err(_) => false,
                };
                ensure(gone, || at(format!("released again, and renew answers {answer:?}")))?;
            }
            Dropped::Watch => drop(member.watch().await.map_err(at)?.next().await.map_err(at)?),
        }
        if ended {
            break;
        }
    }
    disjoint_leases(&leases)
}

async fn precedence(mut stage: Stage) -> Result<(), String> {
    let members = [stage.member().await?, stage.member().await?, stage.member().await?];
    let mut known: BTreeMap<NodeName, Precedence> = BTreeMap::new();
    for member in &members {
        known.insert(member.name.clone(), member.acquire().await?.lease.precedence);
    }
    // In another order than they came.
    for round in 0..2 {
        for member in members.iter().rev() {
            let before = known.get(&member.name);
            for (what, owned) in [
                ("published", member.publish(&member.offers(round)).await?),
                ("renewed", member.renew().await?),
                ("acquired again", member.acquire().await?),
            ] {
                let now = &owned.lease.precedence;
                let moved = || format!("{what}: the precedence of {} was {before:?}, and is {now:?}", member.name);
                ensure(before == Some(now), moved)?;
            }
        }
    }
    let mut distinct: Vec<&Precedence> = known.values().collect();
    distinct.sort();
    distinct.dedup();
    ensure(distinct.len() == known.len(), || format!("two nodes share one: {known:?}"))?;
    for member in &members {
        let mut watch = member.watch().await?;
        let others = known.iter().filter(|(name, _)| **name != member.name);
        let others: BTreeMap<_, _> = others.map(|(name, precedence)| (name.clone(), precedence.clone())).collect();
        watch.next().await?;
        let seen = watch.seen.leases.iter().filter(|(name, _)| **name != member.name);
        let seen: BTreeMap<_, _> = seen.map(|(name, lease)| (name.clone(), lease.precedence.clone())).collect();
        ensure(seen == others, || format!("{} is told {seen:?},\nthe holders were {others:?}", member.name))?;
    }
    Ok(())
}
