//! Says how things are: the engine's state as a [`Status`], published only when it changed.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Engine, View, wish};
use crate::admission::Verdict;
use crate::backend::Underlay;
use crate::error::Error;
use crate::lease::Lease;
use crate::plan::Unit;
use crate::status::{
    Condition, ConditionKind, ConditionState, FamilyStatus, PeerCounts, PeerFamily, PeerState, PeerStatus, Phase,
    Status,
};
use crate::types::{Family, NodeName};

/// How many peers in trouble, and how many conflicts, a status names.
const NAMED: usize = 32;

impl Engine {
    /// What is missing before the kernel may be touched.
    pub(super) fn not_ready(&self) -> Option<Error> {
        let waiting = [self.lease_condition(), self.underlay_condition(), self.peers_condition()]
            .into_iter()
            .find(|c| c.state != ConditionState::Met)
            .filter(|_| !self.may_touch());
        match waiting {
            Some(condition) => Some(Error::NotReady { reason: condition.message }),
            None if self.may_touch() => None,
            None => Some(Error::NotReady { reason: "the kernel has not been read yet".to_owned() }),
        }
    }

    /// Brings the status up to date, and wakes those who watch it if more than counters changed.
    pub(super) fn tell(&self) {
        let status = self.status_now(if self.running { Phase::Running } else { Phase::Starting });
        self.status.send_if_modified(|old| {
            // Counters alone are no news: who looks sees them, nobody is woken for them.
            let same = Status { counters: status.counters, lease_left: status.lease_left, ..(**old).clone() };
            let news = same != status;
            *old = Arc::new(status);
            news
        });
    }

    fn status_now(&self, phase: Phase) -> Status {
        // What keeps this node itself out comes first.
        let blocking = self.view.iter().flat_map(|v| v.blocking.iter().map(|(_, c)| c));
        let mut conflicts: Vec<_> = blocking.chain(self.conflicts.values()).cloned().collect();
        let more_conflicts = conflicts.len().saturating_sub(NAMED);
        conflicts.truncate(NAMED);
        let mut warnings: Vec<_> = self.warnings.values().flatten().cloned().collect();
        if let Some(view) = &self.view {
            warnings.extend(view.shadowing.iter().cloned());
            warnings.extend(wish::missing_settings(&self.settings, view, &self.observed_sysctls()));
        }
        let troubled = self.troubled();
        Status {
            node: self.settings.node.clone(),
            phase,
            subnets: self.control.lease.as_ref().map(|l| l.subnets),
            networks: self.control.network.as_ref().map(|n| n.networks()),
            pod_mtu: self.view.as_ref().map(|v| v.pod_mtu),
            conditions: vec![
                self.lease_condition(),
                self.underlay_condition(),
                self.peers_condition(),
                self.kernel_condition(),
                self.published_condition(),
            ],
            peers: self.count(&troubled),
            troubled: self.name(&troubled),
            conflicts,
            more_conflicts,
            warnings,
            families: self.families(&troubled),
            lease_left: self.control.lease_left(),
            counters: self.counters,
        }
    }

    fn lease_condition(&self) -> Condition {
        let kind = ConditionKind::Lease;
        match (&self.control.lease, self.control.trouble()) {
            (Some(lease), None) => met(kind, subnets(lease)),
            (Some(lease), Some(trouble)) => {
                met(kind, format!("{}; the store is in trouble: {trouble}", subnets(lease)))
            }
            (None, Some(trouble)) => failed(kind, trouble.to_string()),
            (None, None) if self.no_view.is_some() => waiting(kind, "needs the underlay first"),
            (None, None) => waiting(kind, "asking the store of leases"),
        }
    }

    fn underlay_condition(&self) -> Condition {
        let kind = ConditionKind::Underlay;
        match (&self.no_view, &self.view) {
            (Some(error), _) => failed(kind, error.to_string()),
            (None, Some(view)) => {
                let u = &view.underlay;
                let found = format!("{} {} mtu {}: {}", u.device, addresses(u), u.mtu, view.why);
                if u.up { met(kind, found) } else { failed(kind, format!("{} is down ({found})", u.device)) }
            }
            (None, None) => waiting(kind, "needs this node's lease first"),
        }
    }

    fn peers_condition(&self) -> Condition {
        let kind = ConditionKind::Peers;
        let known = self.admission.as_ref().map_or(0, crate::admission::Admission::len);
        match (self.whole, self.control.is_watching(), self.control.trouble()) {
            (true, true, _) => met(kind, format!("{known} peers known")),
            (true, false, trouble) => {
                let why = trouble.map(|t| format!(" ({t})")).unwrap_or_default();
                met(kind, format!("{known} peers known; the store is not being watched now{why}"))
            }
            (false, _, Some(trouble)) => failed(kind, trouble.to_string()),
            (false, _, None) => waiting(kind, "waiting for the first whole snapshot of leases"),
        }
    }

    fn kernel_condition(&self) -> Condition {
        let kind = ConditionKind::Kernel;
        if let Some(error) = self.unseen.values().next() {
            return failed(kind, error.to_string());
        }
        if let Some((_, conflict)) = self.view.iter().flat_map(|v| &v.blocking).next() {
            return failed(kind, conflict.to_string());
        }
        let own = |unit: &Unit| {
            matches!(unit, Unit::Guard(_) | Unit::Host(_) | Unit::Node(_) | Unit::Devices(_) | Unit::Firewall(_))
        };
        if let Some((unit, failure)) = self.failures.iter().find(|(unit, _)| own(unit)) {
            return failed(kind, format!("{unit}: {}", failure.error));
        }
        let stops_us = self.conflicts.values().find(|c| self.desired.owner(&c.object).is_none_or(own));
        match stops_us {
            Some(conflict) => failed(kind, conflict.to_string()),
            None if !self.programmed.is_empty() => met(kind, format!("{} objects in place", self.desired.len())),
            None => waiting(kind, "needs this node and its peers to be known first"),
        }
    }

    fn published_condition(&self) -> Condition {
        let kind = ConditionKind::Published;
        let (Some(lease), Some(view)) = (&self.control.lease, &self.view) else {
            return waiting(kind, "needs this node's lease first");
        };
        let offers = view.offers(lease, |_| true);
        if lease.offers == offers {
            let kinds: Vec<&str> = offers.iter().map(|o| o.backend.as_str()).collect();
            return met(kind, format!("peers know how to reach this node: {}", kinds.join(", ")));
        }
        match self.control.trouble() {
            Some(trouble) => failed(kind, trouble.to_string()),
            None => waiting(kind, "the kernel comes first"),
        }
    }

    /// Each family of the lease by itself.
    fn families(&self, troubled: &BTreeSet<&NodeName>) -> Vec<FamilyStatus> {
        let (Some(lease), Some(network)) = (&self.control.lease, &self.control.network) else { return Vec::new() };
        let networks = network.networks();
        let held = networks.families().filter(|family| lease.subnets.has(*family));
        held.map(|family| {
            let (state, message) = self.family(lease, family);
            let peers = self.admission.as_ref().map_or(0, |admission| admission.count(family));
            let lost = troubled.iter().filter(|node| self.trouble_of(node, family).is_some()).count();
            let connected = if self.no_ground(family).is_none() { peers.saturating_sub(lost) } else { 0 };
            FamilyStatus { family, state, message, peers, connected }
        })
        .collect()
    }

    fn family(&self, lease: &Lease, family: Family) -> (ConditionState, String) {
        let Some(view) = &self.view else {
            let why = self.no_view.as_ref().map(ToString::to_string);
            let state = if why.is_some() { ConditionState::Failed } else { ConditionState::Waiting };
            return (state, why.unwrap_or_else(|| "this node is not known yet".to_owned()));
        };
        if let Some(trouble) = view.trouble(family) {
            return (ConditionState::Failed, trouble.to_string());
        }
        let own = [Unit::Guard(family), Unit::Host(family), Unit::Devices(family), Unit::Firewall(family)];
        if let Some(failure) = own.iter().find_map(|unit| self.failures.get(unit)) {
            return (ConditionState::Failed, failure.error.to_string());
        }
        let in_the_way =
            self.conflicts.values().find(|c| self.desired.owner(&c.object).is_some_and(|u| own.contains(u)));
        if let Some(conflict) = in_the_way {
            return (ConditionState::Failed, conflict.to_string());
        }
        if let Some(missing) = self.no_ground(family) {
            return missing;
        }
        let published = view.offers(lease, |_| true).iter().all(|offer| {
            let known = lease.offer(&offer.backend).and_then(|known| known.endpoint(family));
            known == offer.endpoint(family)
        });
        let addresses = view.underlay.address(family).map(|a| a.to_string()).unwrap_or_default();
        match published {
            true => {
                let subnet = lease.subnet(family).map(|n| n.to_string()).unwrap_or_default();
                (ConditionState::Met, format!("{subnet} at {addresses}"))
            }
            false => (ConditionState::Waiting, "peers have not been told yet how this node is reached".to_owned()),
        }
    }

    /// Every peer that does not work in some family.
    fn troubled(&self) -> BTreeSet<&NodeName> {
        let failing =
            self.failures.keys().filter_map(|unit| if let Unit::Peer(node, _) = unit { Some(node) } else { None });
        let kept_out = self.conflicts.keys().filter_map(|key| match self.desired.owner(key)? {
            Unit::Peer(node, _) => Some(node),
            _ => None,
        });
        self.aside.keys().map(|(node, _)| node).chain(failing).chain(kept_out).collect()
    }

    fn count(&self, troubled: &BTreeSet<&NodeName>) -> PeerCounts {
        let total = self.admission.as_ref().map_or(0, crate::admission::Admission::len);
        let mut counts = PeerCounts { total, ..PeerCounts::default() };
        for node in troubled {
            let states: Vec<PeerState> = Family::BOTH.iter().filter_map(|f| self.trouble_of(node, *f)).collect();
            let has = |pick: fn(&PeerState) -> bool| states.iter().any(pick);
            if has(|s| matches!(s, PeerState::Failing { .. })) {
                counts.failing += 1;
            } else if has(|s| matches!(s, PeerState::Refused(_))) {
                counts.refused += 1;
            } else if has(|s| matches!(s, PeerState::Unreachable { .. })) {
                counts.unreachable += 1;
            } else {
                counts.pending += 1;
            }
        }
        let stands = |view: &View| view.families.iter().all(|family| self.no_ground(*family).is_none());
        if self.view.as_ref().is_some_and(stands) {
            counts.connected = total.saturating_sub(troubled.len());
        }
        counts
    }

    fn name(&self, troubled: &BTreeSet<&NodeName>) -> Vec<PeerStatus> {
        let Some(admission) = &self.admission else { return Vec::new() };
        troubled.iter().take(NAMED).filter_map(|node| self.peer_status(admission.lease(node)?)).collect()
    }

    pub(super) fn peer_list(&self) -> Vec<PeerStatus> {
        let Some(admission) = &self.admission else { return Vec::new() };
        admission.peers().filter_map(|(lease, ..)| self.peer_status(lease)).collect()
    }

    fn peer_status(&self, lease: &Lease) -> Option<PeerStatus> {
        let admission = self.admission.as_ref()?;
        let families = Family::BOTH
            .into_iter()
            .filter_map(|family| {
                let subnet = lease.subnet(family)?;
                let verdict = admission.verdict(&lease.node, family)?;
                let cut_off = || self.no_ground(family).map(|(_, reason)| PeerState::Unreachable { reason });
                let state = self.trouble_of(&lease.node, family).or_else(cut_off);
                let state = state.or_else(|| self.connected(verdict));
                Some(PeerFamily { family, subnet, state: state.unwrap_or(PeerState::Pending), session: None })
            })
            .collect();
        Some(PeerStatus { node: lease.node.clone(), precedence: lease.precedence.clone(), families })
    }

    /// Why this node itself is not in its network in a family, so that no peer can be reached.
    fn no_ground(&self, family: Family) -> Option<(ConditionState, String)> {
        let ground = Unit::Node(family);
        let blocking = self.view.iter().flat_map(|view| &view.blocking).find(|(of, _)| *of == family);
        let in_the_way = || self.conflicts.iter().find(|(key, _)| self.concerns(key, &ground));
        let conflict = blocking.map(|(_, conflict)| conflict).or_else(|| in_the_way().map(|(_, conflict)| conflict));
        if let Some(conflict) = conflict {
            return Some((ConditionState::Failed, conflict.to_string()));
        }
        if let Some(failure) = self.failures.get(&ground) {
            return Some((ConditionState::Failed, failure.error.to_string()));
        }
        if self.programmed.contains(&family) {
            return None;
        }
        Some(match self.view.as_ref().and_then(|view| view.trouble(family)) {
            Some(trouble) => (ConditionState::Failed, trouble.to_string()),
            None => (ConditionState::Waiting, "this node is not programmed yet".to_owned()),
        })
    }

    fn connected(&self, verdict: &Verdict) -> Option<PeerState> {
        self.way(verdict).map(|(backend, address)| PeerState::Connected { backend, address })
    }

    fn trouble_of(&self, node: &NodeName, family: Family) -> Option<PeerState> {
        let unit = Unit::Peer(node.clone(), family);
        if let Some(failure) = self.failures.get(&unit) {
            return Some(PeerState::Failing { error: failure.error.to_string(), attempts: failure.attempts });
        }
        if let Some(state) = self.aside.get(&(node.clone(), family)) {
            return Some(state.clone());
        }
        let keys = self.desired.unit(&unit).iter().map(crate::plan::Object::key);
        let conflict = keys.filter(|_| !self.conflicts.is_empty()).find_map(|key| self.conflicts.get(&key).cloned());
        conflict.map(|c| PeerState::Failing { error: c.to_string(), attempts: 0 })
    }
}

/// The addresses of an underlay, for people.
pub(super) fn addresses(underlay: &Underlay) -> String {
    let list: Vec<String> = Family::BOTH.iter().filter_map(|f| underlay.address(*f)).map(|a| a.to_string()).collect();
    list.join(" ")
}

fn subnets(lease: &Lease) -> String {
    let list: Vec<String> = Family::BOTH.iter().filter_map(|f| lease.subnet(*f)).map(|n| n.to_string()).collect();
    list.join(" ")
}

fn met(kind: ConditionKind, message: impl Into<String>) -> Condition {
    Condition { kind, state: ConditionState::Met, message: message.into() }
}

fn waiting(kind: ConditionKind, message: impl Into<String>) -> Condition {
    Condition { kind, state: ConditionState::Waiting, message: message.into() }
}

fn failed(kind: ConditionKind, message: impl Into<String>) -> Condition {
    Condition { kind, state: ConditionState::Failed, message: message.into() }
}
