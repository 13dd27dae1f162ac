//! What the store knows, and how it changes: one synchronous state behind one lock that is never held
//! over an await. Every entry first lets go of the leases whose time is over.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};

use super::faults::{Call, Plan};
use super::watch::Watcher;
use super::{MemorySubnets, default_clock};
use crate::clock::{Clock, Moment};
use crate::config::{NetworkConfig, SubnetRange};
use crate::lease::{Lease, LeaseEvent, Offer, OwnLease, Precedence};
use crate::subnet::allocation::{Taken, allocate, fits};
use crate::subnet::random::Random;
use crate::subnet::{LeaseRequest, OwnedLease, SubnetError};
use crate::types::{NodeName, Stack};

type Subnets = Stack<Ipv4Network, Ipv6Network>;
type Ranges = Stack<SubnetRange<Ipv4Addr>, SubnetRange<Ipv6Addr>>;

/// The state and its lock.
pub(super) struct Shared(Mutex<State>);

impl Shared {
    pub(super) fn new(state: State) -> Self {
        Shared(Mutex::new(state))
    }

    /// The state as of now. A panic of another holder does not spread: every change is whole before anything can panic.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.expire();
        state
    }

    /// The state for a call of the trait, which a test may have planned to fail.
    pub(super) fn call(&self, call: Call) -> Result<MutexGuard<'_, State>, SubnetError> {
        let mut state = self.lock();
        match state.plan.failure(call) {
            Some(error) => Err(error),
            None => Ok(state),
        }
    }
}

pub(super) struct State {
    pub(super) config: NetworkConfig,
    ranges: Option<Ranges>,
    pub(super) term: Duration,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Random,
    /// Each node's own subnets, and when it came.
    assigned: BTreeMap<NodeName, (Subnets, u64)>,
    held: BTreeMap<NodeName, Held>,
    /// Who of the held expires when: the same as in `held`, by time.
    expiries: BTreeSet<(Moment, NodeName)>,
    /// The subnets of everything in `assigned` and `held`, for allocation.
    taken: Taken,
    came: u64,
    pub(super) watchers: BTreeMap<u64, Watcher>,
    watched: u64,
    pub(super) plan: Plan,
}

struct Held {
    lease: Lease,
    expires: Option<Moment>,
}

impl State {
    pub(super) fn new(config: NetworkConfig, ranges: Option<Ranges>) -> Self {
        State {
            config,
            ranges,
            term: MemorySubnets::TERM,
            clock: default_clock(),
            random: Random::new(),
            assigned: BTreeMap::new(),
            held: BTreeMap::new(),
            expiries: BTreeSet::new(),
            taken: Taken::default(),
            came: 0,
            watchers: BTreeMap::new(),
            watched: 0,
            plan: Plan::default(),
        }
    }

    // The calls of the trait.

    pub(super) fn acquire(&mut self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        let node = &request.node;
        let (subnets, since, expires) = match (self.assigned.get(node), &self.ranges) {
            (Some((subnets, since)), _) => (*subnets, Some(*since), None),
            (None, None) => return Err(SubnetError::NotAssigned { node: node.clone() }),
            (None, Some(ranges)) => {
                let own = self.held.get(node).map(|h| h.lease.subnets);
                let subnets = match own.filter(|own| fits(ranges, own)) {
                    Some(kept) => kept,
                    None => {
                        // A lease of its own that does not fit is no obstacle to a new one.
                        own.iter().for_each(|own| self.taken.remove(own));
                        let random = &mut self.random;
                        let new = allocate(ranges, request.previous.as_ref(), &self.taken, |n| random.below(n));
                        own.iter().for_each(|own| self.taken.insert(own));
                        new?
                    }
                };
                (subnets, None, Some(self.clock.now().saturating_add(self.term)))
            }
        };
        let before = self.held.get(node).map(|h| h.lease.clone());
        let lease = match &before {
            Some(lease) => Lease { subnets, ..lease.clone() },
            None => {
                let since = since.unwrap_or_else(|| self.next_comer());
                let precedence = Precedence { since, identity: node.to_string() };
                Lease { node: node.clone(), subnets, offers: Vec::new(), precedence }
            }
        };
        // Whoever acquires knows best: what was still to be told of an earlier loss is out of date.
        for watcher in self.watchers.values_mut().filter(|w| w.node() == node) {
            watcher.forget_own();
        }
        let owned = self.put(lease.clone(), expires);
        if before.as_ref() != Some(&lease) {
            self.announce(node, None, LeaseEvent::Upsert(lease));
        }
        Ok(owned)
    }

    pub(super) fn publish(&mut self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        let Some(held) = self.held.get_mut(node) else { return Err(not_held(node)) };
        let changed = held.lease.offers != offers;
        if changed {
            held.lease.offers = offers.to_vec();
        }
        let (lease, expires) = (held.lease.clone(), held.expires);
        if changed {
            self.announce(node, None, LeaseEvent::Upsert(lease.clone()));
        }
        Ok(OwnedLease { lease, remaining: self.remaining(expires) })
    }

    pub(super) fn renew(&mut self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        let Some(held) = self.held.get(node) else { return Err(not_held(node)) };
        let (lease, expires) = (held.lease.clone(), held.expires);
        let expires = expires.map(|_| self.clock.now().saturating_add(self.term));
        Ok(self.put(lease, expires))
    }

    pub(super) fn release(&mut self, node: &NodeName) {
        self.remove(node, None);
    }

    // What the embedder decides.

    pub(super) fn assign(&mut self, node: &NodeName, subnets: Subnets) {
        let since = match self.assigned.get(node) {
            Some((_, since)) => *since,
            None => self.next_comer(),
        };
        self.taken.insert(&subnets);
        if let Some((before, _)) = self.assigned.insert(node.clone(), (subnets, since)) {
            self.taken.remove(&before);
        }
        let Some(held) = self.held.get(node) else { return };
        let changed = held.lease.subnets != subnets;
        let lease = Lease { subnets, ..held.lease.clone() };
        self.put(lease.clone(), None);
        if changed {
            self.announce(node, Some(OwnLease::Changed(lease.clone())), LeaseEvent::Upsert(lease));
        }
    }

    pub(super) fn unassign(&mut self, node: &NodeName) {
        if let Some((subnets, _)) = self.assigned.remove(node) {
            self.taken.remove(&subnets);
            self.remove(node, Some("its assignment was withdrawn"));
        }
    }

    pub(super) fn leases(&self) -> Vec<Lease> {
        self.held.values().map(|h| h.lease.clone()).collect()
    }

    // What tests do to it.

    /// Puts a lease there as it is, under its own name, whatever it says.
    pub(super) fn inject(&mut self, lease: Lease) {
        let node = lease.node.clone();
        let expires = self.held.get(&node).and_then(|h| h.expires);
        self.put(lease.clone(), expires);
        self.announce(&node, Some(OwnLease::Changed(lease.clone())), LeaseEvent::Upsert(lease));
    }

    /// Takes a lease away. `lost` is what its owner is told; `None`: it knows.
    pub(super) fn remove(&mut self, node: &NodeName, lost: Option<&str>) {
        let Some(held) = self.held.remove(node) else { return };
        self.taken.remove(&held.lease.subnets);
        if let Some(moment) = held.expires {
            self.expiries.remove(&(moment, node.clone()));
        }
        self.announce(node, lost.map(|why| OwnLease::Lost(why.into())), LeaseEvent::Remove(node.clone()));
    }

    // Time.

    fn expire(&mut self) {
        // Without terms there is no need to ask the clock.
        if self.expiries.is_empty() {
            return;
        }
        let now = self.clock.now();
        while let Some((moment, node)) = self.expiries.first().cloned()
            && moment <= now
        {
            tracing::info!(%node, "lease expired");
            self.expiries.pop_first();
            self.remove(&node, Some("it expired without having been renewed"));
        }
    }

    /// Whether what is kept twice agrees.
    #[cfg(test)]
    pub(super) fn is_consistent(&self) -> bool {
        let held = self.held.values().map(|h| &h.lease.subnets);
        let expiries = self.held.iter().filter_map(|(node, h)| Some((h.expires?, node.clone())));
        self.taken == held.chain(self.assigned.values().map(|(subnets, _)| subnets)).collect()
            && self.expiries == expiries.collect()
    }

    pub(super) fn next_expiry(&self) -> Option<Moment> {
        self.expiries.first().map(|(moment, _)| *moment)
    }

    fn remaining(&self, expires: Option<Moment>) -> Option<Duration> {
        expires.map(|moment| moment.saturating_sub(self.clock.now()))
    }

    // Changing and telling.

    fn put(&mut self, lease: Lease, expires: Option<Moment>) -> OwnedLease {
        let node = lease.node.clone();
        let owned = OwnedLease { lease: lease.clone(), remaining: self.remaining(expires) };
        self.taken.insert(&lease.subnets);
        if let Some(before) = self.held.insert(node.clone(), Held { lease, expires }) {
            self.taken.remove(&before.lease.subnets);
            if let Some(moment) = before.expires {
                self.expiries.remove(&(moment, node.clone()));
            }
        }
        if let Some(moment) = expires {
            self.expiries.insert((moment, node));
            if self.next_expiry() == Some(moment) {
                // Watches sleep until the first expiry, which is an earlier one now.
                self.watchers.values().for_each(Watcher::wake);
            }
        }
        owned
    }

    /// Tells the owner's watches the one thing and everybody else's the other.
    fn announce(&mut self, owner: &NodeName, own: Option<OwnLease>, others: LeaseEvent) {
        let disturbance = self.plan.disturbance();
        let now = self.clock.now();
        for watcher in self.watchers.values_mut() {
            let event = if watcher.node() != owner {
                others.clone()
            } else if let Some(own) = &own {
                LeaseEvent::Own(own.clone())
            } else {
                continue;
            };
            watcher.push(event, disturbance, now);
        }
    }

    pub(super) fn register(&mut self, watcher: Watcher) -> u64 {
        self.watched += 1;
        self.watchers.insert(self.watched, watcher);
        self.watched
    }

    fn next_comer(&mut self) -> u64 {
        self.came += 1;
        self.came
    }
}

fn not_held(node: &NodeName) -> SubnetError {
    let reason = "it was never acquired, or it expired or was taken away since; acquire it anew";
    SubnetError::NotHeld { node: node.clone(), reason: reason.into() }
}
