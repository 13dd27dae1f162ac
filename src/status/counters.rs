//! What an overlay has done since it started, in numbers that never go down. Nothing is decided by them.

use std::time::Duration;

use serde::Serialize;

use crate::plan::{Object, Step};

/// Counters since the start; they never go down.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Counters {
    /// Steps that the kernel acknowledged.
    pub steps: u64,
    /// Steps that the kernel refused.
    pub failures: u64,
    /// The same, by the kind of object.
    pub by_kind: StepsByKind,
    /// Steps that became necessary because something changed behind our back.
    pub repaired: u64,
    /// Whole observations.
    pub checks: u64,
    /// Lease events.
    pub events: u64,
    /// How long the last observation took; serialised as `secs` and `nanos`.
    pub last_check: Duration,
    /// Rounds in which the kernel was compared with the wish and brought in line.
    pub reconciles: u64,
    /// How long those took together, the kernel's answers included, observations not.
    pub reconciling: Duration,
}

/// Steps of each kind of object.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StepsByKind {
    /// Network devices.
    pub link: StepCount,
    /// Addresses on them.
    pub address: StepCount,
    /// Neighbours.
    pub neighbour: StepCount,
    /// Forwarding entries.
    pub fdb: StepCount,
    /// Routes, with the nexthop objects that they need.
    pub route: StepCount,
    /// Settings under `/proc/sys`.
    pub sysctl: StepCount,
    /// Firewall rules of a family.
    pub ruleset: StepCount,
    /// Objects of a backend's own driver: WireGuard's devices and peers.
    pub custom: StepCount,
}

/// Steps of one kind, by result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StepCount {
    /// Acknowledged.
    pub done: u64,
    /// Refused.
    pub failed: u64,
}

impl StepsByKind {
    /// Each kind by its name, as in JSON and metrics.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, StepCount)> {
        let StepsByKind { link, address, neighbour, fdb, route, sysctl, ruleset, custom } = *self;
        [
            ("link", link),
            ("address", address),
            ("neighbour", neighbour),
            ("fdb", fdb),
            ("route", route),
            ("sysctl", sysctl),
            ("ruleset", ruleset),
            ("custom", custom),
        ]
        .into_iter()
    }

    fn of(&mut self, step: &Step) -> &mut StepCount {
        let (Step::Create(object)
        | Step::Delete(object)
        | Step::Replace { to: object, .. }
        | Step::Remake { to: object, .. }) = step;
        match object {
            Object::Link(_) => &mut self.link,
            Object::Address(_) => &mut self.address,
            Object::Neighbour(_) => &mut self.neighbour,
            Object::Fdb(_) => &mut self.fdb,
            Object::Route(_) => &mut self.route,
            Object::Sysctl(_) => &mut self.sysctl,
            Object::Ruleset(_) => &mut self.ruleset,
            Object::Custom(_) => &mut self.custom,
        }
    }
}

impl Counters {
    pub(crate) fn done(&mut self, step: &Step) {
        self.steps += 1;
        self.by_kind.of(step).done += 1;
    }

    /// `step` is the one that was refused, where there is one.
    pub(crate) fn failed(&mut self, step: Option<&Step>) {
        self.failures += 1;
        if let Some(step) = step {
            self.by_kind.of(step).failed += 1;
        }
    }
}
