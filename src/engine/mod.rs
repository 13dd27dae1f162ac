//! The engine joins leases, pure parts and drivers. It is the only task that changes the kernel.
//!
//! One loop: wait for something (a lease event, a hint from the kernel, a command, a moment), look at the kernel where it
//! may have moved, work out the difference, apply it, say how things are. It holds no opinion on what is wanted (backends
//! and masquerade do) and knows no kernel interface (drivers do).

mod apply;
mod backoff;
mod command;
mod control;
mod report;
mod wish;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::SelectAll;
use futures::{FutureExt, StreamExt};
use ipnetwork::{Ipv4Network, Ipv6Network};
use tokio::sync::{mpsc, watch};

pub(crate) use self::command::Handle;
use self::command::{Command, Farewell};
use self::control::{Control, Happened};
use self::wish::{NoView, View};
use crate::admission::{Admission, Policy, Refusal, Reserved, Verdict, VerdictChange};
use crate::backend::{Backend, Underlay};
use crate::clock::{Clock, Moment};
use crate::driver::{Change, ChangeStream, Driver, DriverError, HostView, Scope};
use crate::lease::LeaseEvent;
use crate::masquerade::MasqueradePolicy;
use crate::node::HostSetting;
use crate::overlay::Shutdown;
use crate::plan::{
    Conflict, Desired, Domain, Fit, Key, Link, Object, Picture, Plan, Prune, Step, Sysctl, SysctlName, Unit, diff,
    diff_units,
};
use crate::status::{Counters, PeerState, Phase, Report, Status};
use crate::subnet::{LeaseRequest, SubnetManager};
use crate::types::{DeviceName, Family, NodeName, Stack};
use crate::underlay::UnderlayChoice;

/// Hints are collected this long before the kernel is looked at, so that a flush is one look.
const COLLECT: Duration = Duration::from_millis(20);
/// A look at the kernel is followed by a rest of this many times its length, so that a storm of hints costs a quarter of
/// a core at most; the full check rests [`CHECK_REST`] times its length: 0.2 % of a core.
const HINT_REST: u32 = 3;
const CHECK_REST: u32 = 500;
/// Hints are collected at most 2 to this power times longer while somebody works against us: 640 ms.
const MOST_PATIENCE: u32 = 5;
/// Repairs of one object that follow each other faster than this are a fight.
const FIGHT: Duration = Duration::from_secs(2);
/// Objects of a repair that are remembered for that.
const REMEMBERED: usize = 64;
/// How long after a look that failed the next one follows.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long after a driver's hints ended they are asked for again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// Lease events and hints that are taken in before the kernel is next touched.
const BURST: usize = 4096;

/// What the embedder decided.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) node: NodeName,
    pub(crate) manager: Arc<dyn SubnetManager>,
    pub(crate) backends: Vec<Arc<dyn Backend>>,
    pub(crate) underlay: UnderlayChoice,
    pub(crate) reserved: Vec<Reserved>,
    pub(crate) previous: Option<Stack<Ipv4Network, Ipv6Network>>,
    pub(crate) adopt: bool,
    pub(crate) forwarding: HostSetting,
    pub(crate) bridge_netfilter: HostSetting,
    pub(crate) router_advertisements: HostSetting,
    pub(crate) public: Option<Stack<Ipv4Addr, Ipv6Addr>>,
    pub(crate) require_encryption: bool,
    pub(crate) check_period: Duration,
    pub(crate) renew_margin: Duration,
    pub(crate) clock: Arc<dyn Clock>,
}

/// Why a unit could not be completed, and when it is tried again.
#[derive(Debug, Clone)]
struct Failure {
    error: DriverError,
    attempts: u32,
    retry_at: Moment,
}

pub(crate) struct Engine {
    settings: Settings,
    masquerade: MasqueradePolicy,
    drivers: Vec<Arc<dyn Driver>>,
    commands: mpsc::Receiver<Command>,
    status: watch::Sender<Arc<Status>>,
    control: Control,
    scope: Option<Scope>,
    changes: SelectAll<ChangeStream>,
    /// When to ask drivers for their hints again, after a stream ended.
    listen_at: Option<Moment>,
    host: Option<HostView>,
    warnings: BTreeMap<Domain, Vec<Conflict>>,
    view: Option<View>,
    /// Lease, host or devices changed since the view was made.
    view_stale: bool,
    no_view: Option<NoView>,
    admission: Option<Admission>,
    /// Leases that came before admission could begin.
    snapshot: Option<LeaseEvent>,
    /// The first whole snapshot has been seen: what is not wanted may be deleted.
    whole: bool,
    desired: Desired,
    picture: Picture,
    /// Peers that are not wanted in the kernel, and why.
    aside: BTreeMap<(NodeName, Family), PeerState>,
    failures: BTreeMap<Unit, Failure>,
    conflicts: BTreeMap<Key, Conflict>,
    /// Units whose wish changed, with what they wanted before.
    changed: Vec<(Unit, Vec<Object>)>,
    /// Everything is to be compared.
    compare: bool,
    /// Domains whose picture may be out of date, and when to look.
    stale: BTreeSet<Domain>,
    look_at: Moment,
    check_at: Moment,
    /// When the last round of work began.
    round_at: Moment,
    /// Domains whose last look failed, and why: nothing is changed there.
    unseen: BTreeMap<Domain, DriverError>,
    /// Domains of which a part could not be read: that part is a conflict.
    unread: BTreeSet<Domain>,
    /// When those are tried again.
    look_again_at: Option<Moment>,
    /// Settings of the host that this run changed: they stay.
    settings_made: BTreeMap<SysctlName, String>,
    /// How many repairs of the same objects have followed each other closely; which the last one was, and when.
    fights: u32,
    repaired: BTreeSet<Key>,
    repaired_at: Moment,
    /// The families in which this node's own objects were all in the kernel once.
    programmed: BTreeSet<Family>,
    running: bool,
    counters: Counters,
}

impl Drop for Engine {
    /// However it ends, nobody is told that it works any more.
    fn drop(&mut self) {
        self.status.send_modify(|status| {
            let stopped = Status { phase: Phase::Stopped, ..(**status).clone() };
            *status = Arc::new(stopped);
        });
    }
}

impl Engine {
    pub(crate) fn new(
        settings: Settings,
        masquerade: MasqueradePolicy,
        drivers: Vec<Arc<dyn Driver>>,
        commands: mpsc::Receiver<Command>,
        status: watch::Sender<Arc<Status>>,
    ) -> Self {
        let (node, manager) = (settings.node.clone(), Arc::clone(&settings.manager));
        let control = Control::new(node, manager, Arc::clone(&settings.clock), settings.renew_margin);
        let now = settings.clock.now();
        Engine {
            masquerade,
            drivers,
            commands,
            status,
            control,
            scope: None,
            changes: SelectAll::new(),
            listen_at: None,
            host: None,
            warnings: BTreeMap::new(),
            view: None,
            view_stale: false,
            no_view: None,
            admission: None,
            snapshot: None,
            whole: false,
            desired: Desired::new(),
            picture: Picture::new(),
            aside: BTreeMap::new(),
            failures: BTreeMap::new(),
            conflicts: BTreeMap::new(),
            changed: Vec::new(),
            compare: false,
            stale: BTreeSet::new(),
            look_at: now,
            check_at: now,
            round_at: now,
            unseen: BTreeMap::new(),
            unread: BTreeSet::new(),
            look_again_at: None,
            settings_made: BTreeMap::new(),
            fights: 0,
            repaired: BTreeSet::new(),
            repaired_at: Moment::ZERO,
            programmed: BTreeSet::new(),
            running: false,
            counters: Counters::default(),
            settings,
        }
    }

    /// Works until a shutdown.
    pub(crate) async fn run(mut self) -> Farewell {
        loop {
            self.work().await;
            self.begin_job();
            self.tell();
            let Some(command) = self.wait().await.filter(|command| !command.is_withdrawn()) else { continue };
            match command {
                Command::Shutdown(how, reply) => match self.shut_down(how).await {
                    Ok(report) => return Farewell { reply, report },
                    // Nothing was done: it works on.
                    Err(error) => {
                        let _ = reply.send(Err(error));
                    }
                },
                command => self.answer(command).await,
            }
        }
    }

    /// Waits for the next thing to do. Only commands are handed back; everything else is noted.
    async fn wait(&mut self) -> Option<Command> {
        let clock = Arc::clone(&self.settings.clock);
        let until = self.next_moment();
        let mut asked = None;
        tokio::select! {
            Some(command) = self.commands.recv() => asked = Some(command),
            happened = self.control.next() => self.note(happened),
            Some(change) = self.changes.next(), if !self.changes.is_empty() => self.hint(change),
            () = clock.sleep_until(until) => {}
        }
        self.take_what_is_ready();
        asked
    }

    /// Takes in what else has come, so that a burst is one round; neither source can starve the other.
    fn take_what_is_ready(&mut self) {
        for _ in 0..BURST {
            let Some(happened) = self.control.ready_event() else { break };
            self.note(happened);
        }
        for _ in 0..BURST {
            let Some(change) = self.changes.next().now_or_never().flatten() else { break };
            self.hint(change);
        }
    }

    fn next_moment(&self) -> Moment {
        let retry = self.failures.values().map(|f| f.retry_at).filter(|moment| *moment > self.round_at).min();
        let look = (!self.stale.is_empty()).then_some(self.look_at);
        let known = self.scope.is_some();
        let check = known.then_some(self.check_at);
        // What was due when the last round began has had its turn: if nothing came of it, something else must happen first.
        [
            self.control.due(self.round_at),
            retry.filter(|_| known),
            look.filter(|_| known),
            check,
            self.listen_at,
            self.look_again_at,
        ]
        .into_iter()
        .flatten()
        .filter(|moment| *moment > self.round_at)
        .min()
        .unwrap_or_else(|| self.settings.clock.now() + self.settings.check_period)
    }

    /// Does everything that is due.
    async fn work(&mut self) {
        let now = self.settings.clock.now();
        self.round_at = now;
        if self.scope.is_none() {
            self.open_scope().await;
        }
        if self.listen_at.is_some_and(|at| now >= at) {
            self.listen().await;
            // What happened while nobody listened.
            self.stale.extend(self.drivers.iter().map(|d| d.domain()));
        } else if self.scope.is_some() && self.changes.len() < self.drivers.len() && self.listen_at.is_none() {
            self.listen_at = Some(now + LISTEN_AGAIN);
        }
        let Some(_) = &self.scope else { return };
        // The kernel may hold something else than the picture, which may be why it refused: a look before the next try.
        let check = now >= self.check_at;
        if check || self.failures.values().any(|f| now >= f.retry_at) {
            self.stale.extend(self.drivers.iter().map(|d| d.domain()));
        }
        if self.look_again_at.is_some_and(|at| now >= at) {
            self.stale.extend(self.unseen.keys().chain(&self.unread).cloned());
        }
        if !self.stale.is_empty() && (check || now >= self.look_at) {
            self.look().await;
        }
        self.refresh().await;
        self.want_guards();
        if self.may_touch() {
            self.converge(false).await;
        } else if self.settings.require_encryption {
            self.stand_guard().await;
        }
    }

    /// Before anything else is known: nothing of the cluster networks may follow the default route, and what an earlier
    /// configuration left must not carry it in plain text. No lease can want any of that, so that none is waited for. Nor does the
    /// seal among the firewall rules need more than this node's own lease.
    async fn stand_guard(&mut self) {
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

    /// Brings this node's view up to date. Where that makes other things of the kernel ours to look at, it looks at them first.
    async fn refresh(&mut self) {
        self.refresh_view();
        let Some(network) = &self.control.network else { return };
        let networks = network.networks();
        let underlay = self.underlay_device(&networks);
        if underlay.is_some() && self.scope.as_ref().is_none_or(|scope| scope.underlay != underlay) {
            self.scope = Some(wish::scope(&self.settings, networks, underlay.as_ref()));
            self.listen().await;
            self.stale.extend(self.drivers.iter().map(|d| d.domain()));
            self.look().await;
            self.refresh_view();
        }
    }

    /// The underlay's device, also before this node has a lease: what flannel left over it is found by that.
    fn underlay_device(&self, networks: &Stack<Ipv4Network, Ipv6Network>) -> Option<DeviceName> {
        if let Some(view) = &self.view {
            return Some(view.underlay.device.clone());
        }
        let families: Vec<Family> = networks.families().collect();
        let chosen = wish::choose(&self.settings, self.host.as_ref()?, &families, None);
        chosen.ok().map(|(underlay, _)| underlay.device)
    }

    fn want_guards(&mut self) {
        let known = self.scope.as_ref().zip(self.host.as_ref()).filter(|_| self.settings.require_encryption);
        let guards = known.map(|(scope, host)| wish::guards(scope, host)).unwrap_or_default();
        for (unit, objects) in guards {
            self.want(unit, objects);
        }
    }

    /// The scope follows from the network; without it nothing can be looked at.
    async fn open_scope(&mut self) {
        let Some(network) = &self.control.network else { return };
        self.scope = Some(wish::scope(&self.settings, network.networks(), None));
        self.listen().await;
        self.stale.extend(self.drivers.iter().map(|d| d.domain()));
    }

    /// Asks every driver for its hints, before the first look: what changes after the look is not missed.
    async fn listen(&mut self) {
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
    async fn look(&mut self) {
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

    /// A hint: look again unless it says what the picture shows already, as the echo of our own steps does.
    fn hint(&mut self, change: Change) {
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

    fn note(&mut self, happened: Happened) {
        match happened {
            Happened::Network | Happened::Lease | Happened::Published => self.view_stale = true,
            Happened::Watching | Happened::Trouble => {}
            Happened::Peers(event) => {
                self.counters.events += 1;
                self.peers(event);
            }
        }
    }

    fn peers(&mut self, event: LeaseEvent) {
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
    fn refresh_view(&mut self) {
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

    /// Nothing is changed before this node and the whole set of leases are known.
    fn may_touch(&self) -> bool {
        self.whole && self.view.is_some() && self.counters.checks > 0
    }

    /// This node's devices of a family are in the kernel as peers are told: nothing of them failed, and nothing of others is in
    /// the way.
    fn stands(&self, family: Family) -> bool {
        let ground = Unit::Node(family);
        !self.unseen.contains_key(&Domain::Netlink)
            && self.view.as_ref().is_some_and(|v| v.families.contains(&family) && !v.is_blocked(family))
            && !self.failures.contains_key(&ground)
            && !self.conflicts.keys().any(|key| self.concerns(key, &ground))
    }

    /// Whether something in the way of an object holds up a unit: it wants the object itself, or something on that device, which
    /// an own driver makes and no unit names.
    fn concerns(&self, key: &Key, unit: &Unit) -> bool {
        let on_it = |device: &DeviceName| self.desired.unit(unit).iter().any(|o| o.device() == Some(device));
        self.desired.owner(key) == Some(unit) || matches!(key, Key::Link(device) if on_it(device))
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

    /// Makes the kernel as it should be. Units that wait for another try are left out unless `forced`.
    async fn converge(&mut self, forced: bool) -> Report {
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

    /// Takes out of a plan what must not be touched because the host itself uses those networks, and what is left of a family
    /// that cannot work now: when it can, it comes back to what stood.
    fn leave_blocked(&self, plan: &mut Plan) {
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
    fn leave_unseen(&self, plan: &mut Plan) {
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
    fn leave_on_conflicts(&self, plan: &mut Plan) {
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

    async fn apply(&mut self, plan: Plan) -> Report {
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

    /// Starts a job with the store when one is due: the kernel first, the announcement after.
    fn begin_job(&mut self) {
        let request = self.lease_request();
        let ready = |family: Family| self.programmed.contains(&family) && self.stands(family);
        let known = self.view.as_ref().filter(|_| self.no_view.is_none()).zip(self.control.lease.as_ref());
        let any = Family::BOTH.into_iter().any(ready);
        let offers = known.filter(|_| any).map(|(view, lease)| view.offers(lease, ready));
        self.control.begin(request, offers);
    }

    fn lease_request(&mut self) -> Option<LeaseRequest> {
        let (network, host) = (self.control.network.as_ref()?, self.host.as_ref()?);
        let families: Vec<Family> = network.networks().families().collect();
        match wish::choose(&self.settings, host, &families, self.view.as_ref().map(|v| &v.underlay)) {
            Ok((underlay, _)) => {
                if self.control.lease.is_none() {
                    self.no_view = None;
                }
                Some(LeaseRequest {
                    node: self.settings.node.clone(),
                    underlay: wish::public(&self.settings, &underlay),
                    previous: self.view.as_ref().map(|v| v.policy.own_subnets).or(self.settings.previous),
                })
            }
            Err(error) => {
                self.no_view = Some(NoView::Underlay(error));
                None
            }
        }
    }

    /// The sysctls as they were last seen.
    fn observed_sysctls(&self) -> Vec<Sysctl> {
        let names = self.scope.iter().flat_map(|s| &s.sysctls);
        names
            .filter_map(|name| match self.picture.get(&Key::Sysctl(name.clone())) {
                Some((Object::Sysctl(sysctl), _)) => Some(sysctl.clone()),
                _ => None,
            })
            .collect()
    }

    /// Looks at everything now.
    async fn look_at_all(&mut self) -> Result<(), crate::Error> {
        self.stale.extend(self.drivers.iter().map(|d| d.domain()));
        self.look().await;
        self.unseen.values().next().cloned().map_or(Ok(()), |error| Err(error.into()))
    }

    async fn shut_down(&mut self, how: Shutdown) -> Result<Report, crate::Error> {
        if how == Shutdown::Keep {
            return Ok(Report::default());
        }
        if self.scope.is_none() {
            let reason = "the cluster network is not known yet, so that nothing can be told to be ours";
            return Err(crate::Error::NotReady { reason: reason.to_owned() });
        }
        // Peers first: they stop sending before the way is gone.
        let released = if how == Shutdown::Leave { self.control.release().await } else { Ok(()) };
        let mut report = self.remove_state().await;
        // What was set on a device of ours went with it.
        let ours = |name: &SysctlName| {
            let device =
                |device| self.scope.as_ref().is_some_and(|s| s.devices.contains(device) || s.served.contains(device));
            name.device().is_some_and(device)
        };
        let kept = self.settings_made.iter().filter(|(name, _)| !ours(name));
        report.kept_settings = kept.map(|(name, value)| format!("{name} = {value}")).collect();
        report.lease_kept = released.err().map(|error| error.to_string());
        Ok(report)
    }

    /// Plans towards nothing, and looks again: what is still there is reported.
    async fn remove_state(&mut self) -> Report {
        self.desired = Desired::new();
        self.changed.clear();
        self.failures.clear();
        self.aside.clear();
        // A domain that cannot be read is named below and keeps no other from being cleaned.
        let _ = self.look_at_all().await;
        let mut plan = diff(&self.desired, &self.picture, Prune::Yes);
        self.leave_unseen(&mut plan);
        let mut report = self.apply(plan).await;
        let _ = self.look_at_all().await;
        let refused: BTreeSet<Unit> = report.failed.iter().map(|(unit, _)| unit.clone()).collect();
        for left in diff(&self.desired, &self.picture, Prune::Yes).units {
            if !refused.contains(&left.unit) {
                report.failed.push((left.unit, "it is still there".to_owned()));
            }
        }
        for (domain, error) in &self.unseen {
            let unit = match domain {
                Domain::Firewall => Unit::Firewall(Family::V4),
                Domain::Sysctl => Unit::Host(Family::V4),
                _ => Unit::Node(Family::V4),
            };
            report.failed.push((unit, format!("{domain} could not be read: {error}")));
        }
        report
    }
}

/// The addresses of an underlay, for people.
fn addresses(underlay: &Underlay) -> String {
    let list: Vec<String> = Family::BOTH.iter().filter_map(|f| underlay.address(*f)).map(|a| a.to_string()).collect();
    list.join(" ")
}

/// The next whole second, so that many units that wait long are tried together, after one look.
fn whole_seconds(moment: Moment) -> Moment {
    Moment::from_secs(moment.as_secs().saturating_add(1))
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
