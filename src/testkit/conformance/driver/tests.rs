//! The fake kernel's drivers pass; and a good driver that is broken in one thing breaks the rule of that thing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

use ipnetwork::IpNetwork;

use super::*;
use crate::driver::{Change, DriverError, Errno, Observed, Scope, UnitResult};
use crate::masquerade::MasqueradePolicy;
use crate::plan::{Conflict, Domain, Key, NextHop, Route};
use crate::testkit::kernel::{FakeKernel, KernelRoute, PROTOCOL_OURS, PROTOCOL_STATIC};
use crate::types::{DeviceName, Family};

fn device(name: &str) -> DeviceName {
    name.parse().unwrap()
}

/// A fake kernel by one of its drivers, which may have a fault.
#[derive(Clone, Copy)]
struct Fake(Which, Fault);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Netlink,
    Firewall,
    Sysctl,
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "of the fake kernel: {:?}", self.0)
    }
}

#[async_trait]
impl Fixture for Fake {
    async fn world(&self) -> Result<Box<dyn World>, String> {
        let kernel = FakeKernel::new();
        let eth0 = device("eth0");
        kernel.link_add(&eth0, "", 1500).unwrap();
        kernel.link_up(&eth0).unwrap();
        for address in ["192.168.7.1/24", "2001:db8:7::1/64"] {
            kernel.addr_add(&eth0, address.parse().unwrap()).unwrap();
        }
        // Somebody else's, inside what is ours and beside it.
        let boot = |destination: &str, gateway: &str| {
            let address = gateway.parse().unwrap();
            let next = NextHop::Gateway { device: device("eth0"), address, onlink: false };
            KernelRoute::boot(destination.parse().unwrap(), next).protocol(PROTOCOL_STATIC)
        };
        kernel.ip_route_add(boot("198.51.100.0/24", "192.168.7.77")).unwrap();
        Ok(Box::new(Kernel { kernel, which: self.0, fault: self.1 }))
    }
}

#[derive(Debug)]
struct Kernel {
    kernel: FakeKernel,
    which: Which,
    fault: Fault,
}

#[async_trait]
impl World for Kernel {
    async fn driver(&self) -> Arc<dyn Driver> {
        let inner = match self.which {
            Which::Netlink => self.kernel.netlink(),
            Which::Firewall => self.kernel.firewall(),
            Which::Sysctl => self.kernel.sysctl(),
        };
        match self.fault {
            Fault::Nothing => inner,
            fault => Arc::new(Faulty { inner, fault, kernel: self.kernel.clone(), mine: Mutex::default() }),
        }
    }

    fn samples(&self) -> Samples {
        match self.which {
            Which::Netlink => {
                Samples::netlink(&device("eth0"), [192, 168, 7, 1].into(), "2001:db8:7::1".parse().unwrap())
            }
            Which::Firewall => Samples::firewall(),
            Which::Sysctl => Samples::sysctl(),
        }
    }

    async fn remove(&self, object: &Object) -> Result<(), String> {
        let kernel = &self.kernel;
        let done = match object {
            Object::Link(o) => kernel.link_del(&o.name),
            Object::Address(o) => kernel.addr_del(&o.device, o.address),
            Object::Neighbour(o) => kernel.neigh_del(&o.device, o.address),
            Object::Fdb(o) => kernel.fdb_del(&o.device, o.mac, Some(o.remote)),
            Object::Route(o) => kernel.ip_route_del(o.destination, Some(o.metric)),
            Object::Ruleset(o) => kernel.nft_delete_table(o.family),
            Object::Sysctl(o) => kernel.sysctl_set(&o.name, "0"),
            Object::Custom(_) => Err(Errno::INVAL),
        };
        done.map_err(|e| e.to_string())
    }

    async fn obstruct(&self, object: &Object) -> Result<bool, String> {
        let kernel = &self.kernel;
        let done = match object {
            Object::Link(o) => kernel.link_add(&o.name, "dummy", 1500),
            Object::Route(o) => {
                let gateway = if o.destination.is_ipv4() { "192.168.7.78" } else { "2001:db8:7::78" };
                let address = gateway.parse().unwrap();
                let next = NextHop::Gateway { device: device("eth0"), address, onlink: false };
                let route = KernelRoute::boot(o.destination, next).protocol(PROTOCOL_STATIC);
                kernel.ip_route_add(route.metric(o.metric))
            }
            Object::Ruleset(o) => {
                let policy = MasqueradePolicy::default();
                let other = match o.family {
                    Family::V4 => policy.ruleset_v4("10.0.0.0/8".parse().unwrap(), "10.1.0.0/24".parse().unwrap()),
                    Family::V6 => policy.ruleset_v6("fd00::/16".parse().unwrap(), "fd00:1::/64".parse().unwrap()),
                };
                kernel.nft_put_table(other.unwrap(), false)
            }
            _ => return Ok(false),
        };
        done.map(|()| true).map_err(|e| e.to_string())
    }

    async fn foreign(&self) -> String {
        // The settings are what the sysctl driver is for.
        let ours = |line: &&str| self.which == Which::Sysctl && line.starts_with("sysctl ");
        self.kernel.foreign_dump().lines().filter(|line| !ours(line)).map(|line| format!("{line}\n")).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn the_drivers_of_the_fake_kernel_conform() {
    for which in [Which::Netlink, Which::Firewall, Which::Sysctl] {
        let report = check(&Fake(which, Fault::Nothing)).await;
        report.assert_ok();
        let untried: Vec<Rule> = report.untried().iter().map(|untried| untried.rule).collect();
        let expected: &[Rule] = if which == Which::Sysctl { &[CONFLICT, UNTOUCHED, OUTDATED] } else { &[] };
        assert_eq!(untried, expected, "{report}");
    }
}

/// What is wrong with a driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Nothing,
    SeesGhosts,
    SeesOtherDomains,
    OnlySays,
    ForgetsAResult,
    RefusesWhatIsThere,
    RefusesToDeleteNothing,
    NeverDeletes,
    GoesOnAfterAFailure,
    StopsEverything,
    PraisesStrangers,
    NeverReplaces,
    TellsByTheHour,
    ForgetsInANewProcess,
    HidesConflicts,
    TakesByForce,
    ReplacesUnseen,
    Deaf,
    StreamEnds,
    Remembers,
    RemembersWhatItBegan,
    ObserveHoldsALock,
    ClaimsTheHosts,
}

/// A driver of the fake kernel with a fault.
#[derive(Debug)]
struct Faulty {
    inner: Arc<dyn Driver>,
    fault: Fault,
    kernel: FakeKernel,
    mine: Mutex<Mine>,
}

#[derive(Debug, Default)]
struct Mine {
    observed: u32,
    locked: bool,
    made: BTreeMap<Key, Object>,
    begun: BTreeMap<Key, Object>,
}

impl Faulty {
    fn is(&self, fault: Fault) -> bool {
        self.fault == fault
    }

    fn ghost() -> Object {
        let next = NextHop::Blackhole;
        Object::Route(Route { destination: "10.42.66.0/24".parse().unwrap(), metric: 0, next })
    }
}

fn error(what: &str) -> DriverError {
    DriverError::Io { attempted: "a trial".to_owned(), reason: what.to_owned() }
}

#[async_trait]
impl Driver for Faulty {
    fn domain(&self) -> Domain {
        self.inner.domain()
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        if self.is(Fault::ObserveHoldsALock) {
            if std::mem::replace(&mut self.mine.lock().unwrap().locked, true) {
                return Err(error("another observation is under way"));
            }
            tokio::task::yield_now().await;
            self.mine.lock().unwrap().locked = false;
        }
        let mut seen = self.inner.observe(scope).await?;
        let mut mine = self.mine.lock().unwrap();
        mine.observed += 1;
        match self.fault {
            Fault::SeesGhosts => seen.objects.push((Faulty::ghost(), Owner::Ours)),
            Fault::SeesOtherDomains => seen.objects.push((anothers(), Owner::Ours)),
            Fault::TellsByTheHour if mine.observed.is_multiple_of(2) => {
                seen.objects.pop();
            }
            Fault::ForgetsInANewProcess => {
                seen.objects.retain(|(object, _)| mine.made.contains_key(&object.key()));
            }
            Fault::HidesConflicts => seen.conflicts.clear(),
            Fault::Remembers => {
                seen.objects = mine.made.values().map(|object| (object.clone(), Owner::Ours)).collect();
            }
            Fault::RemembersWhatItBegan => {
                let begun = mine.begun.values().filter(|o| !seen.objects.iter().any(|(s, _)| s.key() == o.key()));
                let begun: Vec<_> = begun.map(|object| (object.clone(), Owner::Ours)).collect();
                seen.objects.extend(begun);
            }
            Fault::ClaimsTheHosts => {
                let destination: IpNetwork = "198.51.100.0/24".parse().unwrap();
                let next = NextHop::Blackhole;
                seen.objects.push((Object::Route(Route { destination, metric: 0, next }), Owner::Ours));
            }
            _ => {}
        }
        Ok(seen)
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        if self.is(Fault::RemembersWhatItBegan) {
            let begin = |step: &Step| Some((step.key(), step.outcome()?.clone()));
            self.mine.lock().unwrap().begun.extend(units.iter().flat_map(|u| u.steps.iter().filter_map(begin)));
        }
        let seen = match self.fault {
            Fault::RefusesWhatIsThere | Fault::RefusesToDeleteNothing => {
                let world = Kernel { kernel: self.kernel.clone(), which: Which::Netlink, fault: Fault::Nothing };
                self.inner.observe(&world.samples().scope).await.unwrap_or_default()
            }
            _ => Observed::default(),
        };
        let is_seen = |key: &Key| seen.objects.iter().any(|(object, _)| object.key() == *key);
        let mut results = Vec::new();
        for unit in units {
            let mut result = UnitResult { done: 0, failed: None };
            for step in &unit.steps {
                let there = is_seen(&step.key());
                let refused = match (self.fault, step) {
                    (Fault::RefusesWhatIsThere, Step::Create(_)) => there,
                    (Fault::RefusesToDeleteNothing, Step::Delete(_)) => !there,
                    (Fault::StopsEverything, _) => results.iter().any(|other: &UnitResult| other.failed.is_some()),
                    _ => false,
                };
                let only_said = match (self.fault, step) {
                    (Fault::OnlySays, _) | (Fault::NeverDeletes, Step::Delete(_)) => true,
                    (Fault::NeverReplaces, Step::Replace { .. }) => true,
                    (Fault::PraisesStrangers, step) => step.key().domain() != self.domain(),
                    _ => false,
                };
                if self.is(Fault::TakesByForce)
                    && let Step::Create(Object::Link(link)) = step
                {
                    let _ = self.kernel.link_del(&link.name);
                }
                if self.is(Fault::ReplacesUnseen)
                    && let Step::Replace { to: Object::Route(route), .. } = step
                {
                    let ours = KernelRoute::boot(route.destination, route.next.clone()).protocol(PROTOCOL_OURS);
                    let _ = self.kernel.ip_route_replace(ours.metric(route.metric));
                }
                let plan = UnitPlan { unit: unit.unit.clone(), steps: vec![step.clone()] };
                let failed = match (refused, only_said) {
                    (true, _) => Some(error("refused")),
                    (_, true) => None,
                    _ => self.inner.apply(&[plan]).await.into_iter().next().and_then(|result| result.failed),
                };
                match failed {
                    Some(error) if self.is(Fault::GoesOnAfterAFailure) => result.failed = Some(error),
                    Some(error) => {
                        result.failed = Some(error);
                        break;
                    }
                    None => {
                        result.done += 1;
                        let mut mine = self.mine.lock().unwrap();
                        mine.made.remove(&step.key());
                        mine.begun.remove(&step.key());
                        mine.made.extend(step.outcome().map(|object| (object.key(), object.clone())));
                    }
                }
            }
            results.push(result);
        }
        if self.is(Fault::ForgetsAResult) {
            results.pop();
        }
        results
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        let inner = self.inner.changes(scope).await?;
        Ok(match self.fault {
            Fault::Deaf => Box::pin(futures::stream::pending::<Change>()),
            Fault::StreamEnds => Box::pin(inner.take(1)),
            _ => inner,
        })
    }
}

#[tokio::test(start_paused = true)]
async fn each_rule_is_broken_by_a_driver_that_breaks_it() {
    let faults = [
        (Fault::SeesGhosts, EMPTY),
        (Fault::SeesOtherDomains, DOMAIN),
        (Fault::OnlySays, CREATES),
        (Fault::ForgetsAResult, RESULTS),
        (Fault::RefusesWhatIsThere, TWICE),
        (Fault::RefusesToDeleteNothing, ABSENT),
        (Fault::NeverDeletes, REMOVES),
        (Fault::GoesOnAfterAFailure, ENDS),
        (Fault::StopsEverything, OTHERS),
        (Fault::PraisesStrangers, UNSERVED),
        (Fault::NeverReplaces, ALTERS),
        (Fault::TellsByTheHour, STABLE),
        (Fault::ForgetsInANewProcess, RESTART),
        (Fault::HidesConflicts, CONFLICT),
        (Fault::TakesByForce, UNTOUCHED),
        (Fault::ReplacesUnseen, OUTDATED),
        (Fault::Deaf, HINTS),
        (Fault::StreamEnds, HINTS),
        (Fault::Remembers, REPAIRS),
        (Fault::RemembersWhatItBegan, DROPPED),
        (Fault::ObserveHoldsALock, CANCELS),
        (Fault::ClaimsTheHosts, SCOPED),
    ];
    for (fault, rule) in faults {
        let report = check(&Fake(Which::Netlink, fault)).await;
        let violation = report.violations_of(rule.name).next();
        assert!(violation.is_some_and(|v| !v.detail.is_empty()), "{fault:?} should break {rule}: {report}");
    }
}

#[test]
fn conflicts_are_compared_with_their_words() {
    let conflict = |with: &str| Conflict { object: anothers().key(), with: with.to_owned(), advice: String::new() };
    let seen = |with| Observed { conflicts: vec![conflict(with)], ..Observed::default() };
    assert!(stage::same(&seen("a"), &seen("a")).is_ok());
    assert!(stage::same(&seen("a"), &seen("b")).is_err());
}
