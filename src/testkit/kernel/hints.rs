//! What listeners get to hear of the fake kernel, and how hints are lost, held back and doubled on their way.
//!
//! An event becomes the hints that a driver would make of it, in the scope of each listener. It never decides what happened.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use futures::StreamExt;
use futures::stream::poll_fn;

use super::PROTOCOL_OURS;
use super::ownership::seen;
use super::state::{Event, KernelRoute, Told};
use crate::driver::{Change, ChangeStream, Scope};
use crate::plan::{Address, Domain, Fdb, Key, Neighbour, Object};

/// One listener.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) domain: Domain,
    pub(super) scope: Scope,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Change>,
    capacity: usize,
    /// What did not fit became one `Unknown`, which is in the queue.
    overrun: bool,
    ended: bool,
    dropped: bool,
    waker: Option<Waker>,
}

/// Tells the queue that nobody reads it any more.
struct Reader(Arc<Mutex<Queue>>);

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).dropped = true;
    }
}

impl Listener {
    pub(super) fn new(domain: Domain, scope: Scope, capacity: usize) -> (Listener, ChangeStream) {
        let queue = Arc::new(Mutex::new(Queue { capacity: capacity.max(1), ..Queue::default() }));
        let reader = Reader(Arc::clone(&queue));
        let stream = poll_fn(move |cx| {
            let mut queue = reader.0.lock().unwrap_or_else(PoisonError::into_inner);
            match queue.waiting.pop_front() {
                Some(hint) => {
                    queue.overrun = queue.overrun && hint != Change::Unknown;
                    Poll::Ready(Some(hint))
                }
                None if queue.ended => Poll::Ready(None),
                None => {
                    queue.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        });
        (Listener { domain, scope, queue }, stream.boxed())
    }

    pub(super) fn push(&self, hint: Change) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.overrun {
            return;
        }
        // The last place is the overrun's.
        if queue.waiting.len() + 1 < queue.capacity {
            queue.waiting.push_back(hint);
        } else {
            queue.overrun = true;
            queue.waiting.push_back(Change::Unknown);
        }
        if let Some(waker) = queue.waker.take() {
            waker.wake();
        }
    }

    pub(super) fn end(&self) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.ended = true;
        if let Some(waker) = queue.waker.take() {
            waker.wake();
        }
    }

    pub(super) fn is_gone(&self) -> bool {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.dropped || queue.ended
    }

    /// The hints that a driver would make of an event.
    pub(super) fn hints(&self, event: &Event) -> Vec<Change> {
        match (&self.domain, event) {
            (Domain::Firewall, Event::Table(family, true)) => vec![Change::Gone(Key::Ruleset(*family))],
            (Domain::Firewall, Event::Table(_, false)) => vec![Change::Domain(Domain::Firewall)],
            (Domain::Sysctl, Event::Forwarding) => vec![Change::Domain(Domain::Sysctl)],
            (Domain::Netlink, event) => self.netlink_hints(event),
            _ => Vec::new(),
        }
    }

    fn netlink_hints(&self, event: &Event) -> Vec<Change> {
        let ours = |device| self.scope.devices.contains(device) || self.scope.served.contains(device);
        let there = |object: Object, present: &bool| {
            vec![if *present { Change::Present(object) } else { Change::Gone(object.key()) }]
        };
        match event {
            Event::Link(name) if ours(name) => vec![Change::Device(name.clone())],
            Event::Link(name) => vec![Change::Link(name.clone())],
            Event::Address(device, address, present) if ours(device) => {
                if !self.scope.holds(*address) {
                    return Vec::new();
                }
                there(Object::Address(Address { device: device.clone(), address: *address }), present)
            }
            Event::Address(..) => vec![Change::Host],
            Event::Neighbour(device, address, mac, present) if ours(device) => {
                there(Object::Neighbour(Neighbour { device: device.clone(), address: *address, mac: *mac }), present)
            }
            Event::Fdb(device, mac, remote, told) if ours(device) => {
                let entry = Object::Fdb(Fdb { device: device.clone(), mac: *mac, remote: *remote });
                let mut hints = there(entry, &(*told != Told::Gone));
                if *told == Told::Replaced {
                    // Of the remote before nothing is told.
                    hints.push(Change::Device(device.clone()));
                }
                hints
            }
            Event::Route(route, told) => self.route_hints(route, *told),
            Event::Neighbour(..) | Event::Fdb(..) | Event::Table(..) | Event::Forwarding => Vec::new(),
        }
    }

    fn route_hints(&self, route: &KernelRoute, told: Told) -> Vec<Change> {
        let key = Key::Route(route.destination, route.metric);
        if route.protocol == PROTOCOL_OURS {
            let present = told != Told::Gone;
            return vec![if present { Change::Present(Object::Route(route.plain())) } else { Change::Gone(key) }];
        }
        let mut hints = Vec::new();
        if told == Told::Replaced && self.scope.holds(route.destination) {
            // It may have taken the place of ours.
            hints.push(Change::Gone(key));
        }
        if self.scope.shows(&seen(route)) {
            hints.push(Change::Host);
        }
        hints
    }
}
