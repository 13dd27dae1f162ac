//! Which nexthop objects of ours there are and which routes name them, because the IPv4 FIB puts all routes over one device
//! into one hash chain unless each gateway is an object of its own. Bookkeeping only: no I/O.
//!
//! A nexthop object is never given up while the kernel may have a route on it: what is not known for sure counts as used
//! until the next whole observation.

use std::collections::{HashMap, HashSet};

use ipnetwork::Ipv4Network;

use super::nexthop::{RawNexthop, Via};
use super::{NEXTHOP_BASE, PROTOCOL};

/// Above how many IPv4 gateway routes new ones name an object.
pub(super) const MANY: usize = 256;
/// Below how many new ones are plain again.
pub(super) const FEW: usize = 128;

/// An IPv4 route: destination and metric.
pub(super) type RouteKey = (Ipv4Network, u32);

#[derive(Debug)]
struct Entry {
    via: Option<Via>,
    users: usize,
    /// Somebody else's route or a request without an answer may use it.
    held: bool,
}

/// The nexthop objects of ours.
#[derive(Debug, Default)]
pub(super) struct Nexthops {
    entries: HashMap<u32, Entry>,
    by_via: HashMap<Via, u32>,
    /// Others' objects, so far as they are where ours would go.
    taken: HashSet<u32>,
    /// Our IPv4 gateway routes, each with the object that it names.
    routes: HashMap<RouteKey, Option<u32>>,
    /// Objects that may have no user: looked at when they are asked for, so that what is in use costs nothing.
    idle: Vec<u32>,
    next: u32,
    /// New routes name objects.
    on: bool,
    unsupported: bool,
    /// Whether the kernel's objects were ever listed, and nothing happened since that makes the list doubtful.
    learnt: bool,
    /// Requests are under way whose answers are not taken in yet.
    busy: bool,
}

impl Nexthops {
    /// Takes over a whole observation: all nexthop objects (`None`: this kernel has none), our IPv4 gateway routes with the
    /// object that each names, and the objects that others' routes name.
    pub(super) fn observe<'a>(
        &mut self,
        objects: Option<impl IntoIterator<Item = &'a RawNexthop>>,
        routes: impl IntoIterator<Item = (RouteKey, Option<u32>)>,
        held: impl IntoIterator<Item = u32>,
    ) {
        self.entries.clear();
        self.routes.clear();
        self.unsupported = objects.is_none();
        self.busy = false;
        self.list(objects.into_iter().flatten());
        self.entries.values_mut().for_each(|entry| entry.held = false);
        for (key, id) in routes {
            self.route_is(key, id);
        }
        for id in held {
            self.doubt(id);
        }
        // What a killed run made for routes that it did not come to.
        self.idle = self.entries.iter().filter(|(_, entry)| entry.users == 0).map(|(id, _)| *id).collect();
    }

    /// Requests begin. If those before never ended, because their future was dropped, routes may be there that were not
    /// heard of: all objects count as used.
    pub(super) fn begin(&mut self) {
        if self.busy {
            self.entries.values_mut().for_each(|entry| entry.held = true);
            self.learnt = false;
        }
        self.busy = true;
    }

    /// All answers are taken in.
    pub(super) fn end(&mut self) {
        self.busy = false;
    }

    /// Takes over a list of all nexthop objects alone: what was not known of counts as used.
    pub(super) fn list<'a>(&mut self, objects: impl IntoIterator<Item = &'a RawNexthop>) {
        self.by_via.clear();
        self.taken.clear();
        let mut before = std::mem::take(&mut self.entries);
        for object in objects {
            if object.protocol != PROTOCOL {
                self.taken.insert(object.id);
                continue;
            }
            let via = object.via();
            let (users, held) = match before.remove(&object.id) {
                Some(entry) => (entry.users, entry.held),
                None => (0, true),
            };
            self.entries.insert(object.id, Entry { via, users, held });
            if let Some(via) = via {
                self.by_via.insert(via, object.id);
            }
        }
        self.learnt = true;
    }

    /// Whether the kernel must be asked for its objects before one is used.
    pub(super) fn must_list(&self) -> bool {
        !self.learnt
    }

    /// This kernel has no nexthop objects.
    pub(super) fn unsupported(&mut self) {
        self.unsupported = true;
    }

    /// What is known may be wrong: somebody else deleted an object, say.
    pub(super) fn distrust(&mut self) {
        self.learnt = false;
    }

    /// Decides whether new routes name objects, given the IPv4 gateway routes that are about to be made.
    pub(super) fn decide<'a>(&mut self, coming: impl Iterator<Item = &'a RouteKey>) {
        let new: HashSet<&RouteKey> = coming.filter(|key| !self.routes.contains_key(*key)).collect();
        let total = self.routes.len() + new.len();
        if total > MANY {
            self.on = true;
        } else if total < FEW {
            self.on = false;
        }
    }

    /// Whether new routes name objects.
    pub(super) fn on(&self) -> bool {
        self.on && !self.unsupported
    }

    /// The object for a gateway.
    pub(super) fn find(&self, via: Via) -> Option<u32> {
        self.by_via.get(&via).copied()
    }

    /// An id for a new object; it is not offered again.
    pub(super) fn reserve(&mut self) -> u32 {
        loop {
            let id = NEXTHOP_BASE.saturating_add(self.next);
            // 2^28 ids, then from the beginning.
            self.next = (self.next + 1) & 0x0fff_ffff;
            if !self.entries.contains_key(&id) && !self.taken.contains(&id) {
                return id;
            }
        }
    }

    /// The kernel has this object now.
    pub(super) fn created(&mut self, id: u32, via: Via) {
        self.entries.insert(id, Entry { via: Some(via), users: 0, held: false });
        self.by_via.insert(via, id);
        self.idle.push(id);
    }

    /// This id is somebody else's.
    pub(super) fn refused(&mut self, id: u32) {
        self.taken.insert(id);
    }

    /// A route of ours is there and names this object, or none.
    pub(super) fn route_is(&mut self, key: RouteKey, id: Option<u32>) {
        let before = self.routes.insert(key, id).flatten();
        if before == id {
            return;
        }
        self.release(before);
        if let Some(entry) = id.and_then(|id| self.entries.get_mut(&id)) {
            entry.users += 1;
        }
    }

    /// A route of ours is gone, or leads elsewhere than to an IPv4 gateway.
    pub(super) fn route_gone(&mut self, key: &RouteKey) {
        let before = self.routes.remove(key).flatten();
        self.release(before);
    }

    fn release(&mut self, id: Option<u32>) {
        if let Some(entry) = id.and_then(|id| self.entries.get_mut(&id)) {
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 {
                self.idle.extend(id);
            }
        }
    }

    /// The kernel may have a route on this object that we do not know of: it stays until the next observation.
    pub(super) fn doubt(&mut self, id: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.held = true;
        }
    }

    /// A device is gone, and with it its objects and their routes.
    pub(super) fn device_gone(&mut self, index: u32) {
        let dead: HashSet<u32> = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.via.is_some_and(|via| via.index == index))
            .map(|(id, _)| *id)
            .collect();
        self.entries.retain(|id, _| !dead.contains(id));
        self.by_via.retain(|via, _| via.index != index);
        self.routes.retain(|_, id| id.is_none_or(|id| !dead.contains(&id)));
    }

    /// The objects on a device and our routes that name them, in order.
    pub(super) fn on_device(&self, index: u32) -> (Vec<RouteKey>, Vec<u32>) {
        let here = |entry: &Entry| entry.via.is_some_and(|via| via.index == index);
        let mut ids: Vec<u32> = self.entries.iter().filter(|(_, entry)| here(entry)).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        let named = |id: &Option<u32>| id.and_then(|id| self.entries.get(&id)).is_some_and(here);
        let mut routes: Vec<RouteKey> = self.routes.iter().filter(|(_, id)| named(id)).map(|(key, _)| *key).collect();
        routes.sort_unstable();
        (routes, ids)
    }

    /// The objects that nothing uses, lowest first. They are told once: what stays all the same is found by the next observation.
    pub(super) fn unused(&mut self) -> Vec<u32> {
        let mut unused = std::mem::take(&mut self.idle);
        unused.retain(|id| self.entries.get(id).is_some_and(|entry| entry.users == 0 && !entry.held));
        unused.sort_unstable();
        unused.dedup();
        unused
    }

    /// An object is gone.
    pub(super) fn deleted(&mut self, id: u32) {
        if let Some(via) = self.entries.remove(&id).and_then(|entry| entry.via)
            && self.by_via.get(&via) == Some(&id)
        {
            self.by_via.remove(&via);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn via(n: u8) -> Via {
        Via { index: 3, gateway: [10, 42, n, 0].into(), onlink: true }
    }

    fn key(n: u8) -> RouteKey {
        (Ipv4Network::new([10, 42, n, 0].into(), 24).unwrap(), 0)
    }

    fn keys(count: usize) -> Vec<RouteKey> {
        (0..count).map(|i| (Ipv4Network::new(u32::try_from(i << 8).unwrap().into(), 24).unwrap(), 0)).collect()
    }

    fn object(id: u32, protocol: u8, n: u8) -> RawNexthop {
        RawNexthop { id, protocol, index: Some(3), gateway: Some([10, 42, n, 0].into()), onlink: true }
    }

    #[test]
    fn objects_come_with_many_routes_and_go_with_few_not_in_between() {
        let mut pool = Nexthops::default();
        pool.decide(keys(MANY).iter());
        assert!(!pool.on());
        pool.decide(keys(MANY + 1).iter());
        assert!(pool.on());
        pool.decide(keys(FEW).iter());
        assert!(pool.on(), "in between it stays as it was");
        pool.decide(keys(FEW - 1).iter());
        assert!(!pool.on());
    }

    #[test]
    fn an_object_is_unused_only_when_its_last_route_is_gone() {
        let mut pool = Nexthops::default();
        let id = pool.reserve();
        pool.created(id, via(1));
        pool.route_is(key(1), Some(id));
        pool.route_is(key(2), Some(id));
        pool.route_is(key(2), Some(id));
        pool.route_gone(&key(1));
        assert!(pool.unused().is_empty());
        pool.route_is(key(2), None);
        assert_eq!(pool.unused(), [id]);
        pool.deleted(id);
        assert_eq!((pool.find(via(1)), pool.unused()), (None, vec![]));
    }

    #[test]
    fn what_is_doubtful_or_was_not_known_of_counts_as_used_until_the_next_observation() {
        let mut pool = Nexthops::default();
        pool.list(&[object(NEXTHOP_BASE, PROTOCOL, 1)]);
        assert!(pool.unused().is_empty());
        pool.observe(Some(&[object(NEXTHOP_BASE, PROTOCOL, 1)]), [], []);
        assert_eq!(pool.unused(), [NEXTHOP_BASE]);
        pool.doubt(NEXTHOP_BASE);
        assert!(pool.unused().is_empty());
        pool.observe(Some(&[object(NEXTHOP_BASE, PROTOCOL, 1)]), [], [NEXTHOP_BASE]);
        assert!(pool.unused().is_empty(), "a foreign route names it");
    }

    #[test]
    fn after_requests_whose_end_was_never_seen_every_object_counts_as_used() {
        let mut pool = Nexthops::default();
        pool.begin();
        pool.created(NEXTHOP_BASE, via(1));
        pool.begin();
        assert!(pool.must_list() && pool.unused().is_empty());
        pool.end();
        pool.begin();
        pool.created(NEXTHOP_BASE + 1, via(2));
        assert_eq!(pool.unused(), [NEXTHOP_BASE + 1]);
    }

    #[test]
    fn an_id_of_somebody_else_is_passed_over() {
        let mut pool = Nexthops::default();
        pool.list(&[object(NEXTHOP_BASE, 196, 1), object(NEXTHOP_BASE + 1, PROTOCOL, 2)]);
        assert_eq!(pool.find(via(1)), None);
        assert_eq!(pool.find(via(2)), Some(NEXTHOP_BASE + 1));
        assert_eq!(pool.reserve(), NEXTHOP_BASE + 2);
    }

    #[test]
    fn what_was_on_a_device_goes_with_it() {
        let mut pool = Nexthops::default();
        pool.observe(Some(&[object(NEXTHOP_BASE, PROTOCOL, 1)]), [(key(1), Some(NEXTHOP_BASE)), (key(2), None)], []);
        assert_eq!(
            pool.on_device(3),
            (vec![key(1)], vec![NEXTHOP_BASE]),
            "a plain route goes with the device by itself"
        );
        assert_eq!(pool.on_device(4), (vec![], vec![]));
        pool.device_gone(3);
        assert!(pool.unused().is_empty() && pool.find(via(1)).is_none());
        pool.decide(keys(0).iter());
        assert!(!pool.routes.contains_key(&key(1)));
    }
}
