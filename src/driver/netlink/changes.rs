//! What the kernel tells of itself, as hints. A task of its own reads a multicast socket and ends with the stream; it keeps
//! names for the kernel's numbers and nothing else.
//!
//! The kernel is silent where routes die with their nexthop object or their device, and where a forwarding entry's remote is
//! replaced: there the hint is to look at the device again.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;

use futures::StreamExt;
use futures::stream;
use netlink_sys::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::address::{self, RawAddress};
use super::link;
use super::names::Names;
use super::neighbour::{self, RawNeighbour};
use super::nexthop;
use super::observe;
use super::requester::{Requester, enlarge, prepare, receive, watch};
use super::route::{self, RawRoute};
use super::wire::{Message, messages, number};
use super::{NETLINK_ROUTE, PROTOCOL};
use crate::driver::{Change, ChangeStream, DriverError, Errno, NetworkNamespace, OnLink, Scope};
use crate::plan::{Address, Key, Object};
use crate::types::{DeviceName, Family, MacAddr};

/// The receive queue that is asked for: some 4 000 events.
pub(super) const QUEUE: usize = 4 << 20;
/// The largest that is asked for after overruns.
const MAX_QUEUE: usize = 32 << 20;
/// Hints that wait to be taken; more become one [`Change::Unknown`].
const HINTS: usize = 1024;
/// Datagrams that are read at a stretch before the task yields.
const STRETCH: usize = 256;
/// An event is one message: a link's is about 2 KiB.
const BUFFER: usize = 32 * 1024;

/// `RTNLGRP_*`.
const GROUPS: [(u32, &str); 6] = [
    (1, "links"),
    (3, "neighbours"),
    (5, "IPv4 addresses"),
    (7, "IPv4 routes"),
    (9, "IPv6 addresses"),
    (11, "IPv6 routes"),
];
/// Kernels before 5.3 have no such group.
const RTNLGRP_NEXTHOP: u32 = 32;

/// Begins to listen, then learns the names: what changes in between is heard.
pub(super) async fn listen(
    namespace: &NetworkNamespace,
    scope: &Scope,
    own: Vec<u32>,
    queue: usize,
) -> Result<ChangeStream, DriverError> {
    let mut socket = namespace.netlink(NETLINK_ROUTE).map_err(failed("open a netlink socket"))?;
    prepare(&mut socket).map_err(failed("bind a netlink socket"))?;
    enlarge(&socket, queue);
    for (group, what) in GROUPS {
        socket.add_membership(group).map_err(failed(&format!("listen to changes of {what}")))?;
    }
    if let Err(error) = socket.add_membership(RTNLGRP_NEXTHOP) {
        tracing::debug!(%error, "this kernel does not tell of nexthop objects");
    }
    let requester = Requester::open(namespace, NETLINK_ROUTE).map_err(failed("open a netlink socket"))?;
    let socket = watch(socket).map_err(failed("wait for netlink events"))?;
    let mut ear = Ear {
        scope: scope.clone(),
        own,
        requester,
        names: Names::default(),
        remotes: HashMap::new(),
        on_link: OnLink::default(),
        congested: false,
    };
    ear.learn().await?;
    let (sender, receiver) = mpsc::channel(HINTS);
    let task = AbortOnDrop(tokio::spawn(ear.run(socket, queue, Outbox { sender, full: false })).abort_handle());
    Ok(stream::unfold((receiver, task), |(mut receiver, task)| async move {
        receiver.recv().await.map(|change| (change, (receiver, task)))
    })
    .boxed())
}

fn failed(attempted: &str) -> impl FnOnce(io::Error) -> DriverError {
    let attempted = attempted.to_owned();
    move |e| DriverError::Io { attempted, reason: e.to_string() }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The way to the listener: when it does not keep up, it is told so once there is room again.
struct Outbox {
    sender: mpsc::Sender<Change>,
    full: bool,
}

impl Outbox {
    fn send(&mut self, change: Change) {
        // While something was lost, `Unknown` comes first and covers this one too.
        if !self.full && self.sender.try_send(change).is_err() {
            self.full = true;
        }
    }

    /// Waits for room. Cancel safe.
    async fn tell_of_loss(&self) {
        match self.sender.reserve().await {
            Ok(permit) => permit.send(Change::Unknown),
            // Nobody listens any more; the task is about to end.
            Err(_) => std::future::pending().await,
        }
    }
}

struct Ear {
    scope: Scope,
    own: Vec<u32>,
    requester: Requester,
    names: Names,
    /// The remote that was last told for a MAC of a device of ours: to notice that it is another.
    remotes: HashMap<(u32, MacAddr), IpAddr>,
    /// The networks on a link: others' routes inside one are part of the host's view. One that went unheard, with its device, costs
    /// a look too many.
    on_link: OnLink,
    /// Events were lost, and the queue has not been empty since.
    congested: bool,
}

impl Ear {
    /// Learns all names anew.
    async fn learn(&mut self) -> Result<(), DriverError> {
        let requester = &mut self.requester;
        let links = observe::dump(requester, "links", link::dump(), link::decode).await?;
        let mut remotes = HashMap::new();
        for link in links.iter().filter(|link| observe::carries_ours(link, &self.scope)) {
            let fdb = observe::dump(requester, "forwarding entries", neighbour::dump_fdb(link.index), |message| {
                neighbour::decode(message).filter(|n| n.fdb && n.permanent && n.index == link.index)
            });
            remotes.extend(fdb.await?.into_iter().filter_map(|n| Some(((n.index, n.mac?), n.address))));
        }
        let nexthops = observe::nexthops(requester).await?.unwrap_or_default();
        self.names = Names::new(links, nexthops);
        self.remotes = remotes;
        let mut routes = observe::routes(&mut self.requester, Family::V4).await?;
        routes.extend(observe::routes(&mut self.requester, Family::V6).await?);
        let of_others = routes.iter().filter(|route| route.protocol != PROTOCOL);
        self.on_link = OnLink::of(of_others.map(|route| observe::seen(route, &self.names)));
        Ok(())
    }

    async fn run(mut self, socket: AsyncFd<Socket>, mut queue: usize, mut outbox: Outbox) {
        let mut buffer = vec![0; BUFFER];
        loop {
            tokio::select! {
                () = outbox.sender.closed() => return,
                () = outbox.tell_of_loss(), if outbox.full => {
                    outbox.full = false;
                    continue;
                }
                ready = socket.readable() => {
                    // Readiness is taken back by the read that finds nothing.
                    if ready.is_err() {
                        return;
                    }
                }
            }
            let outcome = match self.read(&socket, &mut buffer) {
                Ok(hints) if hints.lost => {
                    // Names may have changed unheard. A larger queue makes the next loss less likely.
                    queue = queue.saturating_mul(2).min(MAX_QUEUE);
                    enlarge(socket.get_ref(), queue);
                    tracing::debug!(queue, "netlink events were lost");
                    self.learn().await.map(|()| hints)
                }
                Ok(hints) => Ok(hints),
                Err(e) => Err(failed("read netlink events")(e)),
            };
            match outcome {
                Ok(hints) => hints.send(&mut outbox),
                Err(error) => {
                    tracing::warn!(%error, "listening to the kernel ends");
                    outbox.send(Change::Unknown);
                    return;
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Reads what is there, up to a stretch.
    fn read(&mut self, socket: &AsyncFd<Socket>, buffer: &mut [u8]) -> io::Result<Hints> {
        let mut hints = Hints::default();
        for _ in 0..STRETCH {
            match socket.try_io(Interest::READABLE, |socket| receive(socket, buffer)) {
                Ok(length) => self.take(buffer.get(..length).unwrap_or_default(), &mut hints),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    // After a loss the kernel drops what comes, and says nothing of it, until its queue has been emptied.
                    hints.lost |= std::mem::take(&mut self.congested);
                    break;
                }
                Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.0) => {
                    self.congested = true;
                    hints.lost = true;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(hints)
    }

    /// Turns a datagram into hints.
    fn take(&mut self, datagram: &[u8], hints: &mut Hints) {
        for message in messages(datagram) {
            let Ok(message) = message else {
                hints.lost = true;
                return;
            };
            // What names it, even when it is our own doing, is kept; the rest of our own doing is no news.
            let own = self.own.contains(&message.port);
            match message.kind {
                number::RTM_NEWLINK | number::RTM_DELLINK => self.link(&message, hints),
                number::RTM_NEWNEXTHOP | number::RTM_DELNEXTHOP => self.nexthop(&message, own, hints),
                number::RTM_NEWNEIGH | number::RTM_DELNEIGH if !own => self.neighbour(&message, hints),
                number::RTM_NEWADDR | number::RTM_DELADDR if !own => self.address(&message, hints),
                number::RTM_NEWROUTE | number::RTM_DELROUTE if !own => self.route(&message, hints),
                _ => {}
            }
        }
    }

    fn link(&mut self, message: &Message<'_>, hints: &mut Hints) {
        let Some(link) = link::decode(message) else { return };
        let gone = message.kind == number::RTM_DELLINK;
        let before = if gone {
            self.remotes.retain(|(index, _), _| *index != link.index);
            self.names.links.remove(&link.index)
        } else {
            self.names.links.insert(link.index, link.clone())
        };
        if !gone && before.as_ref() == Some(&link) {
            return;
        }
        // A device that is renamed concerns whoever wanted either name.
        for name in before.iter().chain([&link]).filter_map(|link| link.name.clone()) {
            let ours = self.scope.devices.contains(&name) || self.scope.served.contains(&name);
            let list = if ours { &mut hints.devices } else { &mut hints.links };
            list.insert(name);
        }
    }

    fn nexthop(&mut self, message: &Message<'_>, own: bool, hints: &mut Hints) {
        let Some(object) = nexthop::decode(message) else { return };
        let before = if message.kind == number::RTM_DELNEXTHOP {
            self.names.nexthops.remove(&object.id)
        } else {
            self.names.nexthops.insert(object.id, object.clone())
        };
        if own || !before.iter().chain([&object]).any(|object| object.protocol == PROTOCOL) {
            return;
        }
        match object.index.or(before.and_then(|object| object.index)).and_then(|index| self.names.device(index)) {
            Some(device) => {
                hints.devices.insert(device);
            }
            None => hints.lost = true,
        }
    }

    fn neighbour(&mut self, message: &Message<'_>, hints: &mut Hints) {
        let Some(raw) = neighbour::decode(message) else { return };
        let Some(device) = self.our_device(raw.index) else { return };
        let gone = message.kind == number::RTM_DELNEIGH;
        if raw.fdb {
            self.forwarding(&raw, device, gone, hints);
            return;
        }
        // One that is not permanent any more is gone for us.
        let object = observe::neighbour_object(&raw, &device).filter(|_| !gone && raw.permanent);
        hints.changes.push(match object {
            Some(object) => Change::Present(object),
            None => Change::Gone(Key::Neighbour(device, raw.address)),
        });
    }

    fn forwarding(&mut self, raw: &RawNeighbour, device: DeviceName, gone: bool, hints: &mut Hints) {
        let Some(mac) = raw.mac.filter(|_| raw.permanent) else { return };
        let place = (raw.index, mac);
        if gone {
            if self.remotes.get(&place) == Some(&raw.address) {
                self.remotes.remove(&place);
            }
            hints.changes.push(Change::Gone(Key::Fdb(device, mac, raw.address)));
            return;
        }
        let before = self.remotes.insert(place, raw.address);
        if before.is_some_and(|before| before != raw.address) {
            // Added beside the old remote, or put in its place: the kernel does not say which.
            hints.devices.insert(device.clone());
        }
        hints.changes.extend(observe::neighbour_object(raw, &device).map(Change::Present));
    }

    fn address(&mut self, message: &Message<'_>, hints: &mut Hints) {
        let Some(RawAddress { index, address, .. }) = address::decode(message) else { return };
        let Some(device) = self.our_device(index) else {
            hints.host = true;
            return;
        };
        if message.kind == number::RTM_DELADDR {
            // With the last address of a family the kernel drops the device's routes and neighbours in it.
            hints.devices.insert(device.clone());
        }
        if !self.scope.holds(address) {
            return;
        }
        hints.changes.push(if message.kind == number::RTM_NEWADDR {
            Change::Present(Object::Address(Address { device, address }))
        } else {
            Change::Gone(Key::Address(device, address))
        });
    }

    fn route(&mut self, message: &Message<'_>, hints: &mut Hints) {
        let Some(route) = route::decode(message) else { return };
        let gone = message.kind == number::RTM_DELROUTE;
        let key = Key::Route(route.destination, route.metric);
        if route.protocol != PROTOCOL {
            // It may have taken the place of ours.
            if !gone && message.flags & number::NLM_F_REPLACE != 0 && self.scope.holds(route.destination) {
                hints.changes.push(Change::Gone(key));
            }
            let seen = observe::seen(&route, &self.names);
            self.on_link.follow(&seen, gone);
            let shown = self.scope.shows(&seen) || self.on_link.holds(route.destination);
            hints.host |= observe::plain(&route) && shown;
            return;
        }
        if gone {
            hints.changes.push(Change::Gone(key));
            return;
        }
        if !self.known(&route) {
            hints.lost = true;
            return;
        }
        let object = observe::route_object(&route, &self.names);
        hints.changes.push(Change::Present(Object::Route(object)));
    }

    /// Whether the names of all that a route leads to are known.
    fn known(&self, route: &RawRoute) -> bool {
        route.nexthop.is_none_or(|id| self.names.nexthops.contains_key(&id))
            && route.hops.iter().filter_map(|hop| hop.index).all(|index| self.names.links.contains_key(&index))
    }

    /// The name of a device that is ours.
    fn our_device(&self, index: u32) -> Option<DeviceName> {
        let link = self.names.links.get(&index)?;
        link.name.clone().filter(|_| observe::carries_ours(link, &self.scope))
    }
}

/// What a stretch of events amounts to: each device is named once.
#[derive(Debug, Default)]
struct Hints {
    changes: Vec<Change>,
    devices: BTreeSet<DeviceName>,
    links: BTreeSet<DeviceName>,
    host: bool,
    lost: bool,
}

impl Hints {
    fn send(self, outbox: &mut Outbox) {
        if self.lost {
            outbox.send(Change::Unknown);
            return;
        }
        let devices = self.devices.into_iter().map(Change::Device);
        let links = self.links.into_iter().map(Change::Link);
        for change in self.changes.into_iter().chain(devices).chain(links).chain(self.host.then_some(Change::Host)) {
            outbox.send(change);
        }
    }
}
