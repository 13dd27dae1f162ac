//! The driver of the domain `wireguard`: podnet's steps become a difference of whole devices, and what is there is told in the words of
//! [`crate::object`]. It knows nothing of leases and decides nothing but one thing: whether the place where WireGuard found a peer by
//! itself is kept.
//!
//! A peer that moves is followed by WireGuard: its endpoint on the device is then another than it published, and a better one. It is told
//! as the published one, so that it is no drift, until another is published. After a restart nobody remembers what was published
//! when, so that only a live session vouches for the other place.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream;
use ipnetwork::IpNetwork;
use podnet::driver::{
    ChangeStream, Driver, DriverError, Errno, NetworkNamespace, Observed, PeerSession, Scope, SessionState, UnitResult,
};
use podnet::plan::{Conflict, Domain, Object, Owner, Step, UnitPlan};
use podnet::types::DeviceName;

use crate::device::{Changes, Link, PeerState, State, WireGuardDevices};
use crate::keys::PublicKey;
use crate::object::{self, Item, Peer, Tunnel};
use crate::session;

/// A read that fails after longer than this was waiting for a daemon: it is not waited for at every look.
const SLOW: Duration = Duration::from_secs(1);
/// How long such a device is left alone, twice as long each time.
const LEFT_ALONE: Duration = Duration::from_secs(1);
const LEFT_ALONE_AT_MOST: Duration = Duration::from_secs(60);

/// The driver. It opens nothing before it is first asked.
#[derive(Debug)]
pub(crate) struct WireGuardDriver {
    namespace: NetworkNamespace,
    devices: Arc<dyn WireGuardDevices>,
    /// One at a time observes or changes, also where whoever asked has gone away.
    memory: Arc<Mutex<Memory>>,
}

/// What the driver knows beside what is there. All of it may be lost.
#[derive(Debug, Clone, Default)]
struct Memory {
    /// Which endpoints peers were given, by device and key.
    told: BTreeMap<(DeviceName, PublicKey), Told>,
    /// Devices that were last seen unmarked and to be taken over.
    adoptable: BTreeSet<DeviceName>,
    /// Devices whose daemon did not answer, and when it is asked again.
    silent: BTreeMap<DeviceName, Silence>,
}

/// A daemon that did not answer in time.
#[derive(Debug, Clone)]
struct Silence {
    until: Instant,
    wait: Duration,
    error: DriverError,
}

/// What the device was told of a peer's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    endpoint: SocketAddr,
    /// It is what the peer published; otherwise what the device had when it was first seen.
    published: bool,
    /// The device was found with another one, and was not told this: for as long as the session lives that was found with it.
    on_trust: bool,
    /// When this was noted.
    since: Instant,
}

impl Memory {
    /// Whether this is a device without a mark that was last seen as one to be taken over, and still is.
    fn takes_over(&self, name: &DeviceName, link: &Link) -> bool {
        self.adoptable.contains(name) && link.is_wireguard() && link.alias.is_empty()
    }

    /// Reads a device, unless its daemon did not answer a short while ago.
    fn read(&mut self, devices: &dyn WireGuardDevices, name: &DeviceName, link: &Link) -> Result<State, DriverError> {
        let begun = Instant::now();
        let before = self.silent.remove(name);
        if let Some(silence) = before.as_ref().filter(|silence| begun < silence.until) {
            let error = silence.error.clone();
            self.silent.extend(before.map(|silence| (name.clone(), silence)));
            return Err(error);
        }
        let outcome = devices.read(link);
        if let Err(error) = &outcome
            && begun.elapsed() >= SLOW
        {
            let wait = before.map_or(LEFT_ALONE, |silence| (silence.wait * 2).min(LEFT_ALONE_AT_MOST));
            let silence = Silence { until: Instant::now() + wait, wait, error: error.clone() };
            self.silent.insert(name.clone(), silence);
        }
        outcome
    }

    /// The endpoint by which a peer is to be told: the one that was given where WireGuard may have learnt another since.
    fn endpoint(&mut self, device: &DeviceName, key: PublicKey, peer: &PeerState) -> Option<SocketAddr> {
        let is = peer.endpoint?;
        let first = || Told { endpoint: is, published: false, on_trust: false, since: Instant::now() };
        let told = self.told.entry((device.clone(), key)).or_insert_with(first);
        told.on_trust &= told.endpoint != is;
        match session::state(peer.last_handshake) {
            // Without a session nothing can have been learnt: somebody set it.
            SessionState::Never => Some(is),
            SessionState::Stale if told.on_trust => Some(is),
            SessionState::Stale | SessionState::Live => Some(told.endpoint),
        }
    }

    /// The endpoint that a device should have when this one is published: the one that it has, or this one.
    fn settle(
        &mut self,
        device: &DeviceName,
        key: PublicKey,
        is: Option<&PeerState>,
        published: SocketAddr,
    ) -> SocketAddr {
        let key = (device.clone(), key);
        let told = self.told.get(&key).copied();
        let state = is.map_or(SessionState::Never, |peer| session::state(peer.last_handshake));
        let keeps = match told {
            _ if state == SessionState::Never => false,
            Some(told) if told.published => {
                told.endpoint == published && !(told.on_trust && state == SessionState::Stale)
            }
            // A restart: what was published before is not known. Whoever was not told anything for so long since had what it published.
            _ => state == SessionState::Live && told.is_none_or(|told| told.since.elapsed() < session::SESSION),
        };
        let now = is.and_then(|peer| peer.endpoint).filter(|_| keeps);
        let on_trust = now.is_some() && told.is_none_or(|told| told.on_trust || !told.published);
        self.told.insert(key, Told { endpoint: published, published: true, on_trust, since: Instant::now() });
        now.unwrap_or(published)
    }
}

type Inside<T> = Box<dyn FnOnce(&dyn WireGuardDevices, &mut Memory) -> Result<T, DriverError> + Send>;

impl WireGuardDriver {
    pub(crate) fn new(namespace: NetworkNamespace, devices: Arc<dyn WireGuardDevices>) -> Self {
        WireGuardDriver { namespace, devices, memory: Arc::default() }
    }

    /// Works on a thread that may block, in the network namespace; one such work after the other.
    async fn inside<T: Send + 'static>(&self, work: Inside<T>) -> Result<T, DriverError> {
        let memory = Arc::clone(&self.memory);
        self.beside(move |devices| work(devices, &mut memory.lock().unwrap_or_else(PoisonError::into_inner))).await
    }

    /// The same, whatever else is at work.
    async fn beside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn WireGuardDevices) -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (namespace, devices) = (self.namespace.clone(), Arc::clone(&self.devices));
        let broken = |reason: String| DriverError::Io { attempted: "work on WireGuard devices".to_owned(), reason };
        let blocking = tokio::task::spawn_blocking(move || namespace.run(move || Ok(work(&*devices))));
        blocking.await.map_err(|e| broken(e.to_string()))?.map_err(|e| broken(e.to_string()))?
    }
}

#[async_trait]
impl Driver for WireGuardDriver {
    fn domain(&self) -> Domain {
        object::domain()
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        let scope = scope.clone();
        self.inside(Box::new(move |devices, memory| observe(devices, memory, &scope))).await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        let (owned, count) = (units.to_vec(), units.len());
        match self.inside(Box::new(move |devices, memory| Ok(apply(devices, memory, &owned)))).await {
            Ok(results) => results,
            Err(error) => vec![UnitResult { done: 0, failed: Some(error) }; count],
        }
    }

    /// Never yields: the kernel tells nothing of peers. That a device changed, podnet's netlink driver tells, since the backend names it
    /// among its devices.
    async fn changes(&self, _: &Scope) -> Result<ChangeStream, DriverError> {
        Ok(stream::pending().boxed())
    }

    async fn sessions(&self) -> Result<Vec<PeerSession>, DriverError> {
        self.beside(|devices| {
            let mut sessions = Vec::new();
            let mut failed = None;
            for link in devices.list()?.iter().filter(|link| link.is_ours()) {
                let Ok(device) = link.name.parse::<DeviceName>() else { continue };
                match devices.read(link) {
                    Ok(state) => {
                        sessions.extend(state.peers.iter().flat_map(|(key, peer)| session::of(&device, *key, peer)));
                    }
                    // The other device may be well.
                    Err(error) => failed = Some(error),
                }
            }
            failed.filter(|_| sessions.is_empty()).map_or(Ok(sessions), Err)
        })
        .await
    }
}

const ADVICE: &str = "it is not a WireGuard device with the alias podnet: delete or rename it, or allow what flannel left to be taken \
                      over if it is that";

const UNREADABLE: &str = "its peers stay as they are meanwhile; if it does not come back by itself, end its daemon: the device is then made anew";

/// Whose a device is; `None` for somebody else's. flannel's bears its name and no mark.
fn owner(link: &Link, scope: &Scope) -> Option<Owner> {
    let named = scope.served.iter().any(|name| name.as_str() == link.name);
    if link.is_ours() && (link.alias == podnet::driver::netlink::ALIAS || named) {
        Some(Owner::Ours)
    } else if scope.adopt && named && link.is_wireguard() && link.alias.is_empty() {
        Some(Owner::Adoptable)
    } else {
        None
    }
}

fn observe(devices: &dyn WireGuardDevices, memory: &mut Memory, scope: &Scope) -> Result<Observed, DriverError> {
    let mut observed = Observed::default();
    let (mut known, mut unread) = (BTreeMap::new(), BTreeSet::new());
    memory.adoptable.clear();
    for link in devices.list()? {
        let Ok(name) = link.name.parse::<DeviceName>() else { continue };
        let wanted = scope.served.contains(&name);
        let Some(owner) = owner(&link, scope) else {
            if wanted && !link.is_deserted() {
                observed.conflicts.push(Conflict {
                    object: object::device_key(&name),
                    with: link.describe(),
                    advice: ADVICE.to_owned(),
                });
            }
            continue;
        };
        if owner == Owner::Adoptable {
            memory.adoptable.insert(name.clone());
        }
        let tunnel = |public_key, port| {
            let tunnel = Tunnel { public_key, port, mtu: link.mtu, up: link.up };
            (Item::Device(name.clone(), tunnel).object(), owner)
        };
        // What is on a leftover goes with it.
        if !wanted {
            observed.objects.push(tunnel(None, 0));
            continue;
        }
        let state = match memory.read(devices, &name, &link) {
            Ok(state) => state,
            // The other device may be well, and this one can still be deleted.
            Err(error) => {
                observed.objects.push(tunnel(None, 0));
                observed.conflicts.push(Conflict {
                    object: object::device_key(&name),
                    with: error.to_string(),
                    advice: UNREADABLE.to_owned(),
                });
                observed.unread = Some(error);
                unread.insert(name);
                continue;
            }
        };
        observed.objects.push(tunnel(state.public_key, state.port));
        for (key, peer) in &state.peers {
            let told = Peer {
                public_key: *key,
                endpoint: memory.endpoint(&name, *key, peer),
                keepalive: peer.keepalive,
                psk: peer.psk,
            };
            if peer.allowed.is_empty() {
                observed.objects.push((Item::Idle(name.clone(), *key).object(), Owner::Ours));
            }
            let subnets = peer.allowed.iter().map(|subnet| Item::Peer(name.clone(), *subnet, told.clone()));
            observed.objects.extend(subnets.map(|item| (item.object(), Owner::Ours)));
        }
        known.insert(name, state);
    }
    memory.silent.retain(|device, _| unread.contains(device));
    memory.told.retain(|(device, key), _| {
        unread.contains(device) || known.get(device).is_some_and(|state: &State| state.peers.contains_key(key))
    });
    Ok(observed)
}

fn apply(devices: &dyn WireGuardDevices, memory: &mut Memory, units: &[UnitPlan]) -> Vec<UnitResult> {
    let mut results = vec![UnitResult::default(); units.len()];
    let mut batch = Vec::new();
    for (unit, result) in units.iter().zip(&mut results) {
        let mut part = Part { steps: parse(unit, &mut result.failed), result };
        // A device first, then what is on it: one after the other.
        if part.steps.iter().any(|step| matches!(step.item, Item::Device(..))) {
            part.one_by_one(devices, memory);
        } else {
            batch.push(part);
        }
    }
    // One device after the other: what is wrong with one keeps nothing off the other.
    let mut devices_of: BTreeMap<Option<DeviceName>, Vec<Part<'_>>> = BTreeMap::new();
    for part in batch {
        devices_of.entry(part.steps.first().map(|step| step.item.device().clone())).or_default().push(part);
    }
    devices_of.values_mut().for_each(|parts| together(devices, memory, parts));
    results
}

/// A unit on its way. Its result holds from the beginning what is wrong with the first step that cannot be read, if there is one: it
/// stands when all before it was done.
struct Part<'a> {
    steps: Vec<Parsed>,
    result: &'a mut UnitResult,
}

impl Part<'_> {
    fn one_by_one(&mut self, devices: &dyn WireGuardDevices, memory: &mut Memory) {
        for step in &self.steps {
            if !self.result.note(one(devices, memory, step)) {
                break;
            }
        }
    }
}

/// A step with its object read.
#[derive(Debug)]
struct Parsed {
    item: Item,
    /// It is to be gone.
    delete: bool,
}

/// The steps of a unit, up to the first that cannot be read.
fn parse(unit: &UnitPlan, failed: &mut Option<DriverError>) -> Vec<Parsed> {
    let mut parsed = Vec::with_capacity(unit.steps.len());
    for step in &unit.steps {
        let (object, delete): (&Object, bool) = match step {
            Step::Create(to) | Step::Replace { to, .. } | Step::Remake { to, .. } => (to, false),
            Step::Delete(object) => (object, true),
        };
        match Item::of(object) {
            Ok(item) => parsed.push(Parsed { item, delete }),
            Err(detail) => {
                let attempted = format!("read a step for {}", object.key());
                *failed = Some(DriverError::Unsupported { attempted, detail });
                break;
            }
        }
    }
    parsed
}

/// All units in one change of each device; where that is refused, in halves, so that one that cannot be keeps no other out.
fn together(devices: &dyn WireGuardDevices, memory: &mut Memory, parts: &mut [Part<'_>]) {
    if parts.is_empty() {
        return;
    }
    let steps = parts.iter().flat_map(|part| &part.steps);
    match change_peers(devices, memory, steps) {
        Ok(()) => parts.iter_mut().for_each(|part| part.result.done = part.steps.len()),
        Err(Trouble::OfDevice(error)) => {
            parts.iter_mut().filter(|part| !part.steps.is_empty()).for_each(|part| {
                part.result.failed = Some(error.clone());
            });
        }
        Err(Trouble::OfPeers(error)) => match parts {
            [part] if part.steps.len() == 1 => part.result.failed = Some(error),
            [part] => part.one_by_one(devices, memory),
            _ => {
                let (first, second) = parts.split_at_mut(parts.len() / 2);
                together(devices, memory, first);
                together(devices, memory, second);
            }
        },
    }
}

/// What a refusal is about.
enum Trouble {
    /// The device: it holds for all its peers.
    OfDevice(DriverError),
    /// Something among what was to be changed.
    OfPeers(DriverError),
}

fn one(devices: &dyn WireGuardDevices, memory: &mut Memory, step: &Parsed) -> Result<(), DriverError> {
    match &step.item {
        Item::Device(name, _) if step.delete => match devices.find(name)? {
            Some(link) if link.is_ours() || link.is_deserted() || memory.takes_over(name, &link) => {
                devices.delete(&link)
            }
            _ => Ok(()),
        },
        Item::Device(name, tunnel) => make(devices, memory, name, tunnel),
        Item::Peer(..) | Item::Idle(..) => change_peers(devices, memory, [step]).map_err(|trouble| match trouble {
            Trouble::OfDevice(error) | Trouble::OfPeers(error) => error,
        }),
    }
}

/// Makes a device be there as wanted.
fn make(
    devices: &dyn WireGuardDevices,
    memory: &Memory,
    name: &DeviceName,
    wanted: &Tunnel,
) -> Result<(), DriverError> {
    let attempted = || format!("make WireGuard device {name}");
    if wanted.public_key != Some(devices.own_key()) {
        let detail = "it is wanted with another key than this node's private one".to_owned();
        return Err(DriverError::Unsupported { attempted: attempted(), detail });
    }
    let mut there = devices.find(name)?;
    if let Some(deserted) = there.take_if(|link| link.is_deserted()) {
        devices.delete(&deserted)?;
    }
    let link = match there {
        Some(link) if link.is_ours() || memory.takes_over(name, &link) => link,
        Some(foreign) => {
            return Err(DriverError::InTheWay {
                attempted: attempted(),
                with: foreign.describe(),
                advice: ADVICE.to_owned(),
            });
        }
        None => {
            devices.create(name)?;
            devices.find(name)?.ok_or_else(|| DriverError::Io {
                attempted: attempted(),
                reason: "somebody deleted or renamed it at once".to_owned(),
            })?
        }
    };
    devices.set_up(&link, wanted.port, wanted.mtu)
}

/// A device's peers on their way from what they are to what they shall be.
struct Work {
    link: Link,
    is: State,
    to: State,
    owners: BTreeMap<IpNetwork, PublicKey>,
    /// Peers that lost a subnet: who has none at the end goes.
    losers: BTreeSet<PublicKey>,
}

impl Work {
    fn on(devices: &dyn WireGuardDevices, memory: &mut Memory, name: &DeviceName) -> Result<Option<Work>, DriverError> {
        let Some(link) = devices.find(name)?.filter(Link::is_ours) else { return Ok(None) };
        let is = memory.read(devices, name, &link)?;
        let subnets = is.peers.iter().flat_map(|(key, peer)| peer.allowed.iter().map(|subnet| (*subnet, *key)));
        Ok(Some(Work { link, to: is.clone(), owners: subnets.collect(), is, losers: BTreeSet::new() }))
    }

    fn give(&mut self, memory: &mut Memory, device: &DeviceName, subnet: IpNetwork, peer: &Peer) {
        let key = peer.public_key;
        if let Some(before) = self.owners.insert(subnet, key).filter(|before| *before != key) {
            self.take(subnet, before);
        }
        let is = self.to.peers.get(&key);
        let endpoint = peer.endpoint.map(|published| memory.settle(device, key, is, published));
        let entry = self.to.peers.entry(key).or_default();
        entry.endpoint = endpoint.or(entry.endpoint);
        entry.keepalive = peer.keepalive;
        entry.psk = peer.psk;
        entry.allowed.insert(subnet);
    }

    /// Takes a subnet from a peer, which may be given another by a later step.
    fn take(&mut self, subnet: IpNetwork, key: PublicKey) {
        let Some(peer) = self.to.peers.get_mut(&key) else { return };
        peer.allowed.remove(&subnet);
        self.losers.insert(key);
    }

    /// One that has no subnet is no peer any more.
    fn forget_idle(&mut self, memory: &mut Memory, device: &DeviceName) {
        for key in std::mem::take(&mut self.losers) {
            if self.to.peers.get(&key).is_some_and(|peer| peer.allowed.is_empty()) {
                self.to.peers.remove(&key);
                memory.told.remove(&(device.clone(), key));
            }
        }
    }
}

/// Reads each device that the steps are about, works out what it shall be, and changes the difference.
fn change_peers<'a>(
    devices: &dyn WireGuardDevices,
    memory: &mut Memory,
    steps: impl IntoIterator<Item = &'a Parsed>,
) -> Result<(), Trouble> {
    let mut works: BTreeMap<DeviceName, Option<Work>> = BTreeMap::new();
    let mut after = memory.clone();
    for step in steps {
        let device = step.item.device();
        if !works.contains_key(device) {
            works.insert(device.clone(), Work::on(devices, memory, device).map_err(Trouble::OfDevice)?);
        }
        match (works.get_mut(device).and_then(Option::as_mut), &step.item) {
            (Some(work), Item::Peer(_, subnet, peer)) if !step.delete => work.give(&mut after, device, *subnet, peer),
            (Some(work), Item::Peer(_, subnet, peer)) => {
                work.owners.remove(subnet);
                work.take(*subnet, peer.public_key);
            }
            (Some(work), Item::Idle(_, key)) => {
                work.losers.insert(*key);
            }
            (Some(_), Item::Device(..)) => {}
            (None, _) if step.delete => {}
            (None, _) => {
                return Err(Trouble::OfDevice(DriverError::Refused {
                    attempted: format!("change peers of {device}"),
                    errno: Errno::NODEV,
                    detail: "no WireGuard device of ours has this name now".to_owned(),
                }));
            }
        }
    }
    for (device, work) in works.iter_mut().filter_map(|(device, work)| Some((device, work.as_mut()?))) {
        work.forget_idle(&mut after, device);
        let changes = Changes::between(&work.is, &work.to);
        if !changes.is_empty() {
            devices.change(&work.link, &changes).map_err(|error| match error {
                // No refusal: nobody answered.
                DriverError::Io { .. } => Trouble::OfDevice(error),
                error => Trouble::OfPeers(error),
            })?;
        }
    }
    after.silent = std::mem::take(&mut memory.silent);
    *memory = after;
    Ok(())
}

#[cfg(test)]
mod tests;
