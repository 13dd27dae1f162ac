//! What the engine wants of the kernel: leases and this node's view, taken over into the desired objects unit by unit.
//!
//! Who may claim what is admission's to say, which objects that means is the backends' and [`super::wish`]'s; here it is only kept, with what
//! became of the peers that are not wanted. It never touches the kernel.

use super::Engine;
use super::report::addresses;
use super::wish::{self, View};
use crate::admission::{Admission, Policy, Refusal, Verdict, VerdictChange};
use crate::lease::LeaseEvent;
use crate::masquerade::MasqueradePolicy;
use crate::plan::{Key, Link, Object, Unit};
use crate::status::PeerState;
use crate::types::{Family, NodeName};

impl Engine {
    pub(super) fn peers(&mut self, event: LeaseEvent) {
        let Some(admission) = &mut self.admission else {
            // The set must be whole before anything is judged; until this node is known, events are folded into it.
            fold(&mut self.snapshot, event);
            return;
        };
        let verdicts = match event {
            LeaseEvent::Snapshot(leases) => {
                self.whole = true;
                self.compare = true;
                admission.snapshot(leases)
            }
            LeaseEvent::Upsert(lease) => admission.upsert(lease),
            LeaseEvent::Remove(node) => admission.remove(&node),
            LeaseEvent::Own(_) => Vec::new(),
        };
        self.judge(verdicts);
    }

    /// Takes verdicts over into the wish.
    fn judge(&mut self, verdicts: Vec<VerdictChange>) {
        for VerdictChange { node, family, verdict } in verdicts {
            self.want_peer(node, family, verdict);
        }
    }

    fn want_peer(&mut self, node: NodeName, family: Family, verdict: Option<Verdict>) {
        let unit = Unit::Peer(node.clone(), family);
        let (objects, aside) = match verdict {
            None => (Vec::new(), None),
            Some(Verdict::Pending) => (Vec::new(), Some(PeerState::Pending)),
            Some(Verdict::Refused(Refusal::NoCommonBackend { theirs, .. })) if self.settings.require_encryption => {
                let reason = format!("encryption is required here, and it offers {theirs}");
                (Vec::new(), Some(PeerState::Unreachable { reason }))
            }
            Some(Verdict::Refused(refusal)) => {
                // Once: a lease that goes on changing must not fill the log.
                let before = self.aside.get(&(node.clone(), family));
                if !matches!(before, Some(PeerState::Refused(_))) {
                    tracing::warn!(peer = %node, %family, %refusal, "a peer is kept out");
                }
                (Vec::new(), Some(PeerState::Refused(refusal)))
            }
            Some(Verdict::Admitted { backend, peer }) => {
                let view = self.view.as_ref().and_then(|v| v.nodes.get(backend)?.as_ref());
                let view = view.filter(|v| v.offer.endpoint(family).is_some());
                match view.zip(self.settings.backends.get(backend)).map(|(view, backend)| backend.peer(view, &peer)) {
                    Some(Ok(objects)) => (objects, None),
                    Some(Err(unreachable)) => (Vec::new(), Some(PeerState::Unreachable { reason: unreachable.reason })),
                    None => {
                        let trouble = self.view.as_ref().and_then(|v| v.trouble(family)).map(ToString::to_string);
                        let reason = trouble.unwrap_or_else(|| format!("this node has no {family} way out by it"));
                        (Vec::new(), Some(PeerState::Unreachable { reason }))
                    }
                }
            }
        };
        match aside {
            Some(state) => self.aside.insert((node, family), state),
            None => self.aside.remove(&(node, family)),
        };
        self.want(unit, objects);
    }

    /// Every peer again: what a backend wants of it may depend on this node.
    fn want_all_peers(&mut self) {
        let Some(admission) = &self.admission else { return };
        let verdicts: Vec<(NodeName, Family, Option<Verdict>)> = admission
            .peers()
            .flat_map(|(lease, v4, v6)| {
                [(lease.node.clone(), Family::V4, v4.cloned()), (lease.node.clone(), Family::V6, v6.cloned())]
            })
            .filter(|(.., verdict)| matches!(verdict, Some(Verdict::Admitted { .. })))
            .collect();
        for (node, family, verdict) in verdicts {
            self.want_peer(node, family, verdict);
        }
    }

    pub(super) fn want_guards(&mut self) {
        let known = self.scope.as_ref().zip(self.host.as_ref()).filter(|_| self.settings.require_encryption);
        let guards = known.map(|(scope, host)| wish::guards(scope, host)).unwrap_or_default();
        for (unit, objects) in guards {
            self.want(unit, objects);
        }
    }

    fn want(&mut self, unit: Unit, objects: Vec<Object>) {
        if self.desired.unit(&unit) == objects {
            return;
        }
        // A new wish is not to blame for what became of the old one.
        self.failures.remove(&unit);
        let before = self.desired.set(unit.clone(), objects);
        self.changed.push((unit, before));
    }

    /// Brings the view of this node, and all that follows from it, up to date with lease, host and devices.
    pub(super) fn refresh_view(&mut self) {
        if !std::mem::take(&mut self.view_stale) {
            return;
        }
        let (Some(network), Some(host), Some(lease)) = (&self.control.network, &self.host, &self.control.lease) else {
            return;
        };
        let devices: Vec<Link> = self
            .scope
            .iter()
            .flat_map(|scope| &scope.devices)
            .filter_map(|device| match self.picture.get(&Key::Link(device.clone())) {
                Some((Object::Link(link), _)) => Some(link.clone()),
                _ => None,
            })
            .collect();
        let sysctls = self.observed_sysctls();
        let seen = wish::Seen { networks: network.networks(), lease, host, devices: &devices, sysctls: &sysctls };
        match wish::view(&self.settings, &seen, self.view.as_ref()) {
            Ok(view) => {
                self.no_view = None;
                self.adopt_view(view);
            }
            // What is in the kernel stays: an underlay that is away for a moment comes back to a network that stands.
            Err(error) => {
                if self.no_view.as_ref() != Some(&error) {
                    tracing::warn!(%error, "this node cannot take part now");
                }
                self.no_view = Some(error);
            }
        }
    }

    fn adopt_view(&mut self, view: View) {
        if self.view.as_ref() == Some(&view) {
            return;
        }
        let before = self.view.as_ref();
        let underlay = &view.underlay;
        if before.is_none_or(|old| {
            (&old.underlay.device, &old.underlay.addresses) != (&underlay.device, &underlay.addresses)
        }) {
            let addresses = addresses(underlay);
            tracing::info!(device = %underlay.device, %addresses, mtu = %view.pod_mtu, why = view.why, "the underlay");
        }
        for (family, trouble) in &view.troubles {
            if before.is_none_or(|old| old.trouble(*family) != Some(trouble)) {
                tracing::warn!(%family, %trouble, "this node cannot take part in one family now");
            }
        }
        let nodes_changed = before.is_none_or(|old| old.nodes != view.nodes);
        // Whatever waits for another try may have waited for this.
        if before.is_some_and(|old| old.underlay != view.underlay) {
            let now = self.settings.clock.now();
            self.failures.values_mut().for_each(|failure| failure.retry_at = now);
        }
        let policy = view.policy.clone();
        let units = wish::node_units(&self.settings, &self.masquerade, &view);
        self.programmed.retain(|family| view.families.contains(family));
        self.view = Some(view);
        for (unit, objects) in units {
            self.want(unit, objects);
        }
        self.set_policy(policy);
        if nodes_changed {
            self.want_all_peers();
        }
        self.compare = true;
    }

    /// The firewall rules of a new policy.
    pub(super) fn set_masquerade(&mut self, policy: MasqueradePolicy) {
        if let Some(view) = &self.view {
            for (unit, objects) in wish::node_units(&self.settings, &policy, view) {
                self.want(unit, objects);
            }
        }
        self.masquerade = policy;
    }

    fn set_policy(&mut self, policy: Policy) {
        match &mut self.admission {
            Some(admission) => {
                let verdicts = admission.set_policy(policy);
                self.judge(verdicts);
            }
            None => {
                self.admission = Some(Admission::new(policy, self.settings.backends.clone()));
                if let Some(event) = self.snapshot.take() {
                    self.peers(event);
                }
            }
        }
    }
}

/// Adds an event to what is known before admission begins: always a whole snapshot, or nothing.
fn fold(known: &mut Option<LeaseEvent>, event: LeaseEvent) {
    match (known, event) {
        (known, event @ LeaseEvent::Snapshot(_)) => *known = Some(event),
        (Some(LeaseEvent::Snapshot(leases)), LeaseEvent::Upsert(lease)) => {
            leases.retain(|l| l.node != lease.node);
            leases.push(lease);
        }
        (Some(LeaseEvent::Snapshot(leases)), LeaseEvent::Remove(node)) => leases.retain(|l| l.node != node),
        _ => {}
    }
}
