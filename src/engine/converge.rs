//! From the difference to the kernel: what is done of it now, what is left out and why, and what became of each unit.
//!
//! A unit that failed waits by itself ([`super::backoff`]); nothing is done where the kernel could not be read, where something of others is in
//! the way, or on ground that does not stand.

use std::collections::BTreeSet;
use std::time::Duration;

use super::sight::{LOOK_AGAIN, MOST_PATIENCE};
use super::{Engine, Failure, apply, backoff, wish};
use crate::clock::Moment;
use crate::driver::DriverError;
use crate::plan::{Domain, Key, Object, Plan, Prune, Step, Unit, diff, diff_units};
use crate::status::Report;
use crate::types::{DeviceName, Family};

/// Repairs of one object that follow each other faster than this are a fight.
const FIGHT: Duration = Duration::from_secs(2);
/// Objects of a repair that are remembered for that.
const REMEMBERED: usize = 64;

impl Engine {
    /// Makes the kernel as it should be. Units that wait for another try are left out unless `forced`.
    pub(super) async fn converge(&mut self, forced: bool) -> Report {
        let begun = self.settings.clock.now();
        let news = !self.changed.is_empty() || self.programmed.is_empty();
        let Some(mut plan) = self.difference() else { return Report::default() };
        let now = self.settings.clock.now();
        self.leave_blocked(&mut plan);
        self.leave_unseen(&mut plan);
        if !forced {
            plan.units.retain(|u| self.failures.get(&u.unit).is_none_or(|f| now >= f.retry_at));
        }
        self.leave_on_conflicts(&mut plan);
        self.leave_groundless(&mut plan);
        if !plan.is_empty() && !news && self.failures.is_empty() {
            let steps = plan.steps().count();
            self.counters.repaired += u64::try_from(steps).unwrap_or(0);
            let first = plan.steps().next().map(Step::to_string).unwrap_or_default();
            // The same again, soon after: somebody undoes it.
            let keys: BTreeSet<Key> = plan.steps().map(Step::key).take(REMEMBERED).collect();
            let again = now.saturating_sub(self.repaired_at) < FIGHT && !self.repaired.is_disjoint(&keys);
            self.fights = if again { self.fights.saturating_add(1) } else { 0 };
            self.repaired = keys;
            self.repaired_at = now;
            if self.fights <= MOST_PATIENCE {
                tracing::info!(steps, first, "something changed the kernel behind our back: repairing");
            }
        }
        let report = self.apply(plan).await;
        self.counters.reconciles += 1;
        self.counters.reconciling += self.settings.clock.now().saturating_sub(begun);
        // What was left out of the plan has had its turn too.
        for failure in self.failures.values_mut().filter(|f| now >= f.retry_at) {
            failure.retry_at = now + LOOK_AGAIN;
        }
        let standing: Vec<Family> = Family::BOTH.into_iter().filter(|family| self.stands(*family)).collect();
        self.programmed.extend(standing);
        self.running |= !self.programmed.is_empty();
        report
    }

    /// Before anything else is known: nothing of the cluster networks may follow the default route, and what an earlier
    /// configuration left must not carry it in plain text. No lease can want any of that, so that none is waited for. Nor does the
    /// seal among the firewall rules need more than this node's own lease.
    pub(super) async fn stand_guard(&mut self) {
        let (Some(scope), Some(host)) = (&self.scope, &self.host) else { return };
        if self.unseen.contains_key(&Domain::Netlink) {
            return;
        }
        let now = self.settings.clock.now();
        let stale = wish::stale(scope, host, &self.picture);
        let rules = self.view.is_some().then_some(Unit::Firewall as fn(Family) -> Unit);
        let guards = [Some(Unit::Guard as fn(Family) -> Unit), rules].into_iter().flatten();
        let guards: Vec<(Unit, Vec<Object>)> =
            guards.flat_map(|unit| Family::BOTH.map(|family| (unit(family), Vec::new()))).collect();
        let mut plan = diff_units(&self.desired, &self.picture, &guards);
        plan.units.extend(stale);
        self.leave_blocked(&mut plan);
        self.leave_unseen(&mut plan);
        plan.units.retain(|u| self.failures.get(&u.unit).is_none_or(|f| now >= f.retry_at));
        self.apply(plan).await;
    }

    /// The difference as it is now. With `compare` of everything, else of the units that changed.
    fn difference(&mut self) -> Option<Plan> {
        let changed = std::mem::take(&mut self.changed);
        let plan = if std::mem::take(&mut self.compare) {
            let plan = diff(&self.desired, &self.picture, if self.whole { Prune::Yes } else { Prune::No });
            self.conflicts = plan.conflicts.iter().map(|c| (c.object.clone(), c.clone())).collect();
            let planned: BTreeSet<&Unit> = plan.units.iter().map(|u| &u.unit).collect();
            self.failures.retain(|unit, _| planned.contains(unit));
            plan
        } else if changed.is_empty() {
            return None;
        } else {
            let plan = diff_units(&self.desired, &self.picture, &changed);
            self.conflicts.retain(|key, _| self.desired.owner(key).is_some());
            self.conflicts.extend(plan.conflicts.iter().map(|c| (c.object.clone(), c.clone())));
            let planned: BTreeSet<&Unit> = plan.units.iter().map(|u| &u.unit).collect();
            for (unit, _) in &changed {
                if !planned.contains(unit) {
                    self.failures.remove(unit);
                }
            }
            plan
        };
        Some(plan)
    }

    /// Takes out of a plan what must not be touched because the host itself uses those networks, and what is left of a family
    /// that cannot work now: when it can, it comes back to what stood.
    pub(super) fn leave_blocked(&self, plan: &mut Plan) {
        let Some(view) = self.view.as_ref() else { return };
        let idle = |family: Family| !view.families.contains(&family) && view.trouble(family).is_some();
        if view.blocking.is_empty() && view.troubles.is_empty() {
            return;
        }
        plan.units.retain(|u| match &u.unit {
            Unit::Guard(family)
            | Unit::Host(family)
            | Unit::Node(family)
            | Unit::Devices(family)
            | Unit::Firewall(family)
            | Unit::Peer(_, family) => !view.is_blocked(*family),
            Unit::Leftover(key) => {
                let families = self.families_of(key);
                !families.iter().any(|family| view.is_blocked(*family) || idle(*family))
            }
        });
        plan.conflicts.extend(view.blocking.iter().map(|(_, c)| c.clone()));
    }

    /// The families that an object serves: both where it cannot be told.
    fn families_of(&self, key: &Key) -> Vec<Family> {
        match key {
            Key::Address(_, network) | Key::Route(network, _) => vec![Family::of(network.ip())],
            Key::Neighbour(_, address) | Key::Fdb(.., address) => vec![Family::of(*address)],
            Key::Ruleset(family) => vec![*family],
            Key::Link(name) => {
                let has = |family: &Family| {
                    let mut devices = self.settings.backends.iter().flat_map(|b| b.devices(*family));
                    devices.any(|device| device.name == *name)
                };
                let served: Vec<Family> = Family::BOTH.into_iter().filter(has).collect();
                if served.is_empty() { Family::BOTH.to_vec() } else { served }
            }
            Key::Sysctl(_) | Key::Custom(..) => Family::BOTH.to_vec(),
        }
    }

    /// Takes out of a plan what would be done blindly: in a domain that could not be read.
    pub(super) fn leave_unseen(&self, plan: &mut Plan) {
        if !self.unseen.is_empty() {
            plan.units.retain(|u| !u.steps.iter().any(|step| self.unseen.contains_key(&step.key().domain())));
        }
    }

    /// Takes out of a plan the peers of a family whose device is still waiting for its next try: one trouble, not one a peer.
    fn leave_groundless(&self, plan: &mut Plan) {
        let waiting: Vec<Family> = Family::BOTH
            .into_iter()
            .filter(|family| {
                let ground = Unit::Node(*family);
                self.failures.contains_key(&ground) && !plan.units.iter().any(|u| u.unit == ground)
            })
            .collect();
        plan.units.retain(|u| !matches!(&u.unit, Unit::Peer(_, family) if waiting.contains(family)));
    }

    /// Takes out of a plan what peers need of a backend's own driver whose device is somebody else's, or does not answer: it would be on that.
    pub(super) fn leave_on_conflicts(&self, plan: &mut Plan) {
        let in_the_way =
            |key: &Key| self.conflicts.contains_key(key) || plan.conflicts.iter().any(|c| c.object == *key);
        let mut taken: Vec<(Family, Domain)> = Vec::new();
        for family in Family::BOTH {
            let objects = self.desired.unit(&Unit::Node(family)).iter();
            let devices = objects.filter(|object| object.makes().is_some()).map(Object::key).filter(in_the_way);
            let own = devices.map(|key| key.domain()).filter(|domain| matches!(domain, Domain::Custom(_)));
            taken.extend(own.map(|domain| (family, domain)));
        }
        plan.units.retain(|u| match &u.unit {
            Unit::Peer(_, family) => !u
                .steps
                .iter()
                .any(|step| taken.iter().any(|(of, domain)| of == family && step.key().domain() == *domain)),
            _ => true,
        });
    }

    pub(super) async fn apply(&mut self, plan: Plan) -> Report {
        let mut report = Report { conflicts: plan.conflicts, ..Report::default() };
        if plan.units.is_empty() {
            return report;
        }
        for applied in apply::apply(&self.drivers, plan.units).await {
            for step in applied.plan.steps.iter().take(applied.done) {
                self.picture.acknowledge(step);
                self.counters.done(step);
                if let Some(Object::Sysctl(sysctl)) = step.outcome() {
                    self.settings_made.insert(sysctl.name.clone(), sysctl.value.clone());
                }
                report.steps += 1;
                if report.done.len() < 1000 {
                    report.done.push(step.to_string());
                }
            }
            self.view_stale |= matches!(applied.plan.unit, Unit::Node(_));
            let unit = applied.plan.unit;
            match applied.failed {
                None => {
                    self.failures.remove(&unit);
                }
                Some(error) => {
                    self.counters.failed(applied.plan.steps.get(applied.done));
                    report.failed.push((unit.clone(), error.to_string()));
                    self.fail(unit, error);
                }
            }
        }
        report
    }

    fn fail(&mut self, unit: Unit, error: DriverError) {
        let now = self.settings.clock.now();
        let attempts = self.failures.get(&unit).map_or(0, |f| f.attempts).saturating_add(1);
        if attempts == 1 {
            tracing::warn!(%unit, %error, "the kernel refused a step; it is tried again");
        }
        let wait = if error.is_retryable() { attempts } else { u32::MAX };
        let wait = backoff::wait(wait, &format!("{}/{unit}", self.settings.node));
        let retry_at = now + if wait < LOOK_AGAIN { wait } else { whole_seconds(now + wait).saturating_sub(now) };
        self.failures.insert(unit, Failure { error, attempts, retry_at });
    }

    /// Nothing is changed before this node and the whole set of leases are known.
    pub(super) fn may_touch(&self) -> bool {
        self.whole && self.view.is_some() && self.counters.checks > 0
    }

    /// This node's devices of a family are in the kernel as peers are told: nothing of them failed, and nothing of others is in
    /// the way.
    pub(super) fn stands(&self, family: Family) -> bool {
        let ground = Unit::Node(family);
        !self.unseen.contains_key(&Domain::Netlink)
            && self.view.as_ref().is_some_and(|v| v.families.contains(&family) && !v.is_blocked(family))
            && !self.failures.contains_key(&ground)
            && !self.conflicts.keys().any(|key| self.concerns(key, &ground))
    }

    /// Whether something in the way of an object holds up a unit: it wants the object itself, or something on that device, which
    /// an own driver makes and no unit names.
    pub(super) fn concerns(&self, key: &Key, unit: &Unit) -> bool {
        let on_it = |device: &DeviceName| self.desired.unit(unit).iter().any(|o| o.device() == Some(device));
        self.desired.owner(key) == Some(unit) || matches!(key, Key::Link(device) if on_it(device))
    }
}

/// The next whole second, so that many units that wait long are tried together, after one look.
fn whole_seconds(moment: Moment) -> Moment {
    Moment::from_secs(moment.as_secs().saturating_add(1))
}
