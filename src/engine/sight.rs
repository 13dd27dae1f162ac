//! The engine's eyes: when the kernel is looked at, and what is taken over from a look.
//!
//! Drivers' hints say where something may have moved, a check looks everywhere. It decides only what is looked at and when, never what is done
//! about it: what it costs is bounded here (invariant 13).

use std::time::Duration;

use futures::StreamExt;
use futures::stream::SelectAll;

use super::{Engine, backoff};
use crate::driver::Change;
use crate::plan::{Domain, Fit, Key, Object, Sysctl};
use crate::types::DeviceName;

/// Hints are collected this long before the kernel is looked at, so that a flush is one look.
pub(super) const COLLECT: Duration = Duration::from_millis(20);
/// A look at the kernel is followed by a rest of this many times its length, so that a storm of hints costs a quarter of
/// a core at most; the full check rests [`CHECK_REST`] times its length: 0.2 % of a core.
const HINT_REST: u32 = 3;
const CHECK_REST: u32 = 500;
/// Hints are collected at most 2 to this power times longer while somebody works against us: 640 ms.
pub(super) const MOST_PATIENCE: u32 = 5;
/// How long after a look that failed the next one follows.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Engine {
    /// All may have moved.
    pub(super) fn distrust_all(&mut self) {
        self.stale.extend(self.drivers.iter().map(|d| d.domain()));
    }

    /// Asks every driver for its hints, before the first look: what changes after the look is not missed.
    pub(super) async fn listen(&mut self) {
        let Some(scope) = &self.scope else { return };
        self.changes = SelectAll::new();
        self.listen_at = None;
        for driver in &self.drivers {
            match driver.changes(scope).await {
                Ok(stream) => {
                    // A stream that ended says so as the last thing it says.
                    self.changes.push(stream.chain(futures::stream::once(async { Change::Unknown })).boxed());
                }
                Err(error) => {
                    tracing::warn!(%error, "the kernel's notifications of {} cannot be heard; checks go on", driver.domain());
                    self.listen_at = Some(self.settings.clock.now() + self.settings.check_period);
                }
            }
        }
    }

    /// Looks at the domains that may have moved. The picture of a domain moves as a whole or not at all, but for what a driver names as a
    /// conflict because it could not read it.
    pub(super) async fn look(&mut self) {
        let Some(scope) = self.scope.clone() else { return };
        // Looks that failed are rested from, and put no check off; what was spent waiting for somebody who does not answer is no work.
        let (mut took, mut in_vain) = (Duration::ZERO, Duration::ZERO);
        let whole = self.drivers.iter().all(|d| self.stale.contains(&d.domain()));
        let mut looked_again = false;
        for driver in self.drivers.clone() {
            let domain = driver.domain();
            if !self.stale.contains(&domain) {
                continue;
            }
            looked_again |= self.unseen.contains_key(&domain) || self.unread.contains(&domain);
            self.unread.remove(&domain);
            let begun = self.settings.clock.now();
            let outcome = driver.observe(&scope).await;
            let spent = self.settings.clock.now().saturating_sub(begun);
            match outcome {
                Ok(observed) => {
                    match observed.unread {
                        None => took += spent,
                        Some(_) => drop(self.unread.insert(domain.clone())),
                    }
                    self.stale.remove(&domain);
                    self.unseen.remove(&domain);
                    self.picture.observe(&domain, observed.objects, observed.conflicts);
                    self.warnings.insert(domain, observed.warnings);
                    if let Some(host) = observed.host {
                        self.host = Some(host);
                    }
                }
                Err(error) => {
                    in_vain += spent;
                    self.stale.remove(&domain);
                    if self.unseen.get(&domain) != Some(&error) {
                        tracing::warn!(%error, %domain, "the kernel could not be read; it is tried again");
                    }
                    self.unseen.insert(domain, error);
                }
            }
        }
        let now = self.settings.clock.now();
        self.counters.last_check = took;
        self.look_at = now + (took + in_vain) * HINT_REST;
        // A look at some domains is no check of the others.
        if whole {
            self.counters.checks += 1;
            let salt = u32::try_from(self.counters.checks & 0xffff).unwrap_or(0);
            let spread = 1.0 + 0.2 * backoff::fraction(salt, self.settings.node.as_str());
            self.check_at = now + self.settings.check_period.mul_f64(spread).max(took * CHECK_REST);
        }
        if self.unseen.is_empty() && self.unread.is_empty() {
            self.look_again_at = None;
        } else if looked_again || self.look_again_at.is_none() {
            self.look_again_at = Some(now + LOOK_AGAIN);
        }
        self.view_stale = true;
        self.compare = true;
    }

    /// Looks at everything now.
    pub(super) async fn look_at_all(&mut self) -> Result<(), crate::Error> {
        self.distrust_all();
        self.look().await;
        self.unseen.values().next().cloned().map_or(Ok(()), |error| Err(error.into()))
    }

    /// A hint: look again unless it says what the picture shows already, as the echo of our own steps does.
    pub(super) fn hint(&mut self, change: Change) {
        let domains: Vec<Domain> = match change {
            Change::Present(object) => {
                let key = object.key();
                let known = self.picture.get(&key).is_some_and(|(is, _)| match (is, &object) {
                    (Object::Link(a), Object::Link(b)) => b.fit(a) == Fit::Same,
                    (a, b) => a == b,
                });
                if known { vec![] } else { vec![key.domain()] }
            }
            Change::Gone(key) if self.picture.get(&key).is_none() => vec![],
            Change::Gone(key) => vec![key.domain()],
            Change::Link(device) if !self.matters(&device) => vec![],
            // A device that a backend's own driver made is that driver's to look at, too; and its settings are new with it.
            Change::Device(device) if self.scope.as_ref().is_some_and(|s| s.served.contains(&device)) => {
                let custom = self.drivers.iter().map(|d| d.domain()).filter(|d| matches!(d, Domain::Custom(_)));
                custom.chain([Domain::Netlink, Domain::Sysctl]).collect()
            }
            Change::Device(_) | Change::Link(_) | Change::Host => vec![Domain::Netlink],
            Change::Domain(domain) => vec![domain],
            Change::Unknown => self.drivers.iter().map(|d| d.domain()).collect(),
        };
        if domains.is_empty() {
            return;
        }
        if self.stale.is_empty() {
            // Against somebody who undoes what we do, again and again, with growing patience.
            let collect = COLLECT * 2_u32.pow(self.fights.min(MOST_PATIENCE));
            self.look_at = self.look_at.max(self.settings.clock.now() + collect);
        }
        self.stale.extend(domains);
    }

    /// Whether a device that is not ours can have a part in the underlay or in a conflict. Pods come and go with devices
    /// that have none: looking at everything each time would cost more than the pod.
    fn matters(&self, device: &DeviceName) -> bool {
        let (Some(view), Some(host), None) = (&self.view, &self.host, &self.no_view) else { return true };
        view.underlay.device == *device
            || host.addresses.iter().any(|a| a.device == *device)
            || host.routes.iter().any(|r| r.device.as_ref() == Some(device))
            || !self.conflicts.is_empty()
    }

    /// The sysctls as they were last seen.
    pub(super) fn observed_sysctls(&self) -> Vec<Sysctl> {
        let names = self.scope.iter().flat_map(|s| &s.sysctls);
        names
            .filter_map(|name| match self.picture.get(&Key::Sysctl(name.clone())) {
                Some((Object::Sysctl(sysctl), _)) => Some(sysctl.clone()),
                _ => None,
            })
            .collect()
    }
}
