//! The engine joins leases, pure parts and drivers. It is the only task that changes the kernel.
//!
//! One loop: wait for something (a lease event, a hint from the kernel, a command, a moment), look at the kernel where it
//! may have moved, work out the difference, apply it, say how things are. It holds no opinion on what is wanted (backends
//! and masquerade do) and knows no kernel interface (drivers do).
//!
//! This file is the loop and all that the engine remembers. [`control`] speaks with the store, [`sight`] looks at the kernel, [`want`] keeps what
//! is wanted of it (by the pure [`wish`]), [`converge`] makes it so, [`report`] says how things are.

mod apply;
mod backoff;
mod command;
mod control;
mod converge;
mod report;
mod shutdown;
mod sight;
mod want;
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
use crate::admission::{Admission, Reserved};
use crate::backend::Backend;
use crate::clock::{Clock, Moment};
use crate::driver::{ChangeStream, Driver, DriverError, HostView, Scope};
use crate::lease::LeaseEvent;
use crate::masquerade::MasqueradePolicy;
use crate::node::HostSetting;
use crate::plan::{Conflict, Desired, Domain, Key, Object, Picture, SysctlName, Unit};
use crate::status::{Counters, PeerState, Phase, Status};
use crate::subnet::{LeaseRequest, SubnetManager};
use crate::types::{DeviceName, Family, NodeName, Stack};
use crate::underlay::UnderlayChoice;

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
            self.distrust_all();
        } else if self.scope.is_some() && self.changes.len() < self.drivers.len() && self.listen_at.is_none() {
            self.listen_at = Some(now + LISTEN_AGAIN);
        }
        let Some(_) = &self.scope else { return };
        // The kernel may hold something else than the picture, which may be why it refused: a look before the next try.
        let check = now >= self.check_at;
        if check || self.failures.values().any(|f| now >= f.retry_at) {
            self.distrust_all();
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

    /// Brings this node's view up to date. Where that makes other things of the kernel ours to look at, it looks at them first.
    async fn refresh(&mut self) {
        self.refresh_view();
        let Some(network) = &self.control.network else { return };
        let networks = network.networks();
        let underlay = self.underlay_device(&networks);
        if underlay.is_some() && self.scope.as_ref().is_none_or(|scope| scope.underlay != underlay) {
            self.scope = Some(wish::scope(&self.settings, networks, underlay.as_ref()));
            self.listen().await;
            self.distrust_all();
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

    /// The scope follows from the network; without it nothing can be looked at.
    async fn open_scope(&mut self) {
        let Some(network) = &self.control.network else { return };
        self.scope = Some(wish::scope(&self.settings, network.networks(), None));
        self.listen().await;
        self.distrust_all();
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
}
