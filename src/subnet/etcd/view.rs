//! From keys to leases of nodes, and from changed keys to what became different. Pure. It gives nodes their names and judges no
//! claim: where two keys say the same address both are told, and admission lets the older one in.

use std::collections::{BTreeMap, BTreeSet};

use ipnetwork::{Ipv4Network, Ipv6Network};

use super::client::{Change, Kv};
use super::own::{OwnKeys, precedence};
use super::value::{Identity, Value};
use crate::flannel::subnet_key;
use crate::lease::{Lease, LeaseEvent};
use crate::types::{NodeName, Stack};

/// The most keys of which a watch keeps account: more is no network but an attack or a mistake.
const MAX_KEYS: usize = 1 << 16;

/// A key that is a lease.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) subnets: Stack<Ipv4Network, Ipv6Network>,
    pub(super) value: Value,
    pub(super) create_revision: i64,
    /// It is kept for a node and not in use: it has no etcd lease and offers nothing.
    idle: bool,
}

/// What a key says; `Err` says why it is no lease.
pub(super) fn read(kv: &Kv) -> Result<Entry, String> {
    let subnets = subnet_key::parse(&kv.key).ok_or("its key says no subnet")?;
    let value = Value::decode(&kv.value)?;
    let idle = kv.lease == 0 && value.offers.is_empty();
    Ok(Entry { subnets, value, create_revision: kv.create_revision, idle })
}

/// All leases as one node is told them.
#[derive(Debug)]
pub(super) struct View {
    node: NodeName,
    keys: BTreeMap<String, Entry>,
    /// The keys of each address, the oldest first.
    groups: BTreeMap<Identity, BTreeSet<(i64, String)>>,
    told: BTreeMap<Identity, BTreeMap<NodeName, Lease>>,
    /// The node's own keys, of which nothing is told here.
    own: OwnKeys,
    /// Keys that were passed over.
    pub(super) unreadable: u64,
}

impl View {
    pub(super) fn new(node: NodeName, kvs: Vec<Kv>, own: OwnKeys) -> Self {
        let mut view = View {
            node,
            keys: BTreeMap::new(),
            groups: BTreeMap::new(),
            told: BTreeMap::new(),
            own: OwnKeys::new(),
            unreadable: 0,
        };
        // The differences from nothing.
        view.apply(kvs.into_iter().map(Change::Put).collect(), own);
        view
    }

    /// All leases, the oldest first.
    pub(super) fn leases(&self) -> Vec<Lease> {
        let mut leases: Vec<Lease> = self.told.values().flat_map(BTreeMap::values).cloned().collect();
        leases.sort_by(|a, b| a.precedence.cmp(&b.precedence));
        leases
    }

    /// Takes changes in, and says what became different.
    pub(super) fn apply(&mut self, changes: Vec<Change>, own: OwnKeys) -> Vec<LeaseEvent> {
        let mut touched = BTreeSet::new();
        for change in changes {
            let (key, entry) = match change {
                Change::Put(kv) => {
                    let entry = read(&kv).inspect_err(|reason| self.pass_over(&kv.key, reason)).ok();
                    (kv.key, entry)
                }
                Change::Delete { key, .. } => (key, None),
            };
            touched.extend(self.put(key, entry));
        }
        for key in self.own.keys().chain(own.keys()).filter(|key| self.own.get(*key) != own.get(*key)) {
            touched.extend(self.keys.get(key).map(|entry| entry.value.identity()));
        }
        self.own = own;
        touched.into_iter().flat_map(|identity| self.tell(identity)).collect()
    }

    /// Which addresses this touches.
    fn put(&mut self, key: String, entry: Option<Entry>) -> Vec<Identity> {
        let mut touched = Vec::new();
        if let Some(old) = self.keys.remove(&key) {
            let identity = old.value.identity();
            if let Some(group) = self.groups.get_mut(&identity) {
                group.remove(&(old.create_revision, key.clone()));
                if group.is_empty() {
                    self.groups.remove(&identity);
                }
            }
            touched.push(identity);
        }
        let Some(entry) = entry else { return touched };
        if self.keys.len() >= MAX_KEYS {
            self.pass_over(&key, "there are too many keys");
            return touched;
        }
        let identity = entry.value.identity();
        self.groups.entry(identity).or_default().insert((entry.create_revision, key.clone()));
        self.keys.insert(key, entry);
        touched.push(identity);
        touched
    }

    fn is_own(&self, key: &str, entry: &Entry) -> bool {
        match self.own.get(key) {
            None => false,
            Some(None) => true,
            Some(Some((created, identity))) => entry.create_revision == *created && entry.value.identity() == *identity,
        }
    }

    fn pass_over(&mut self, key: &str, reason: &str) {
        self.unreadable += 1;
        tracing::debug!(key, reason, "a key in etcd is passed over");
    }

    /// The leases of one address as they should be told, and what is different from what was told.
    fn tell(&mut self, identity: Identity) -> Vec<LeaseEvent> {
        let mut now = BTreeMap::new();
        let keys = self.groups.get(&identity).into_iter().flatten();
        let entries = keys.filter_map(|(_, key)| Some((key, self.keys.get(key)?)));
        let mut entries: Vec<_> = entries.filter(|(key, entry)| !self.is_own(key, entry)).collect();
        // A reservation that is not in use leaves the name to the lease that is.
        entries.sort_by_key(|(_, entry)| entry.idle);
        for (key, entry) in entries {
            let plain = identity.to_string().parse::<NodeName>();
            let name = plain.ok().filter(|name| *name != self.node && !now.contains_key(name));
            let name = name.or_else(|| format!("{identity}+{}", text(&entry.subnets)).parse().ok());
            // Two keys of one address and one subnet: the older one counts.
            let Some(name) = name.filter(|name| !now.contains_key(name)) else { continue };
            let lease = Lease {
                node: name.clone(),
                subnets: entry.subnets,
                offers: entry.value.offers.clone(),
                precedence: precedence(entry.create_revision, key),
            };
            now.insert(name, lease);
        }
        let before = self.told.remove(&identity).unwrap_or_default();
        let gone = before.keys().filter(|name| !now.contains_key(*name)).cloned().map(LeaseEvent::Remove);
        let news = now.iter().filter(|(name, lease)| before.get(*name) != Some(*lease));
        let events = gone.chain(news.map(|(_, lease)| LeaseEvent::Upsert(lease.clone()))).collect();
        if !now.is_empty() {
            self.told.insert(identity, now);
        }
        events
    }
}

fn text(subnets: &Stack<Ipv4Network, Ipv6Network>) -> String {
    match subnets {
        Stack::V4(v4) => v4.to_string(),
        Stack::V6(v6) => v6.to_string(),
        Stack::Dual(v4, v6) => format!("{v4}+{v6}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(subnet: u8) -> String {
        format!("/coreos.com/network/subnets/10.5.{subnet}.0-24")
    }

    fn put(subnet: u8, address: u8, created: i64) -> Change {
        let value =
            format!(r#"{{"PublicIP":"10.240.0.{address}","BackendType":"vxlan","BackendData":{{"VNI":{created}}}}}"#);
        let kv =
            Kv { key: key(subnet), value: value.into(), create_revision: created, mod_revision: created, lease: 1 };
        Change::Put(kv)
    }

    fn delete(subnet: u8) -> Change {
        Change::Delete { key: key(subnet), revision: 0 }
    }

    fn view() -> View {
        View::new("me".parse().unwrap(), Vec::new(), none())
    }

    fn none() -> OwnKeys {
        OwnKeys::new()
    }

    fn own(subnet: u8) -> OwnKeys {
        OwnKeys::from([(key(subnet), None)])
    }

    /// `name subnet` of what is there now, `-name` of what is gone.
    fn said(events: Vec<LeaseEvent>) -> Vec<String> {
        let say = |event| match event {
            LeaseEvent::Upsert(lease) => format!("{} {}", lease.node, text(&lease.subnets)),
            LeaseEvent::Remove(node) => format!("-{node}"),
            other => panic!("{other:?}"),
        };
        events.into_iter().map(say).collect()
    }

    #[test]
    fn a_node_is_called_by_its_address_and_keeps_the_name_when_its_subnet_changes() {
        let mut view = view();
        assert_eq!(said(view.apply(vec![put(1, 101, 5)], none())), ["10.240.0.101 10.5.1.0/24"]);
        assert_eq!(said(view.apply(vec![put(1, 101, 5)], none())), [""; 0], "a renewal is no news");
        assert_eq!(said(view.apply(vec![delete(1), put(2, 101, 6)], none())), ["10.240.0.101 10.5.2.0/24"]);
        assert_eq!(said(view.apply(vec![put(2, 102, 6)], none())), ["-10.240.0.101", "10.240.0.102 10.5.2.0/24"]);
        assert_eq!(said(view.apply(vec![delete(2)], none())), ["-10.240.0.102"]);
        assert!(view.leases().is_empty());
    }

    #[test]
    fn of_two_keys_of_one_address_the_older_has_the_name_and_the_younger_is_told_apart() {
        let mut view = view();
        view.apply(vec![put(1, 101, 5)], none());
        assert_eq!(said(view.apply(vec![put(2, 101, 9)], none())), ["10.240.0.101+10.5.2.0/24 10.5.2.0/24"]);
        // Older than both, though it came last.
        assert_eq!(
            said(view.apply(vec![put(3, 101, 2)], none())),
            ["10.240.0.101 10.5.3.0/24", "10.240.0.101+10.5.1.0/24 10.5.1.0/24"]
        );
        assert_eq!(
            said(view.apply(vec![delete(3)], none())),
            ["-10.240.0.101+10.5.1.0/24", "10.240.0.101 10.5.1.0/24"]
        );
    }

    #[test]
    fn a_nodes_own_key_is_never_told_and_one_that_it_lost_is() {
        let mut view = view();
        assert_eq!(said(view.apply(vec![put(1, 103, 5), put(2, 101, 6)], own(1))), ["10.240.0.101 10.5.2.0/24"]);
        assert_eq!(said(view.apply(Vec::new(), none())), ["10.240.0.103 10.5.1.0/24"]);
        assert_eq!(said(view.apply(Vec::new(), own(1))), ["-10.240.0.103"]);
        let mut called_by_address = View::new("10.240.0.103".parse().unwrap(), Vec::new(), none());
        let events = called_by_address.apply(vec![put(1, 103, 5)], none());
        assert_eq!(said(events), ["10.240.0.103+10.5.1.0/24 10.5.1.0/24"], "nobody else gets the watcher's name");
    }

    #[test]
    fn a_key_that_was_the_nodes_own_is_told_once_it_is_anothers() {
        let before = || OwnKeys::from([(key(1), Some((5, [10, 240, 0, 103].into())))]);
        let mut view = view();
        view.apply(vec![put(1, 103, 5)], own(1));
        assert_eq!(said(view.apply(Vec::new(), before())), [""; 0], "released, and its end is still to be read");
        assert_eq!(said(view.apply(vec![delete(1)], before())), [""; 0]);
        assert_eq!(said(view.apply(vec![put(1, 101, 8)], before())), ["10.240.0.101 10.5.1.0/24"], "created anew");
        view.apply(vec![delete(1), put(1, 103, 5)], own(1));
        assert_eq!(said(view.apply(vec![put(1, 102, 5)], before())), ["10.240.0.102 10.5.1.0/24"], "overwritten");
    }

    #[test]
    fn what_is_no_lease_is_passed_over_and_counted() {
        let mut view = view();
        let odd = |key: &str, value: &str| {
            Change::Put(Kv { key: key.into(), value: value.into(), create_revision: 1, mod_revision: 1, lease: 0 })
        };
        let changes = vec![odd("/n/subnets/x", "{}"), odd(&key(1), "no"), odd(&key(2), "{}"), put(3, 101, 4)];
        assert_eq!(said(view.apply(changes, none())), ["10.240.0.101 10.5.3.0/24"]);
        assert_eq!(view.unreadable, 3);
        assert_eq!(said(view.apply(vec![odd(&key(3), "broken now")], none())), ["-10.240.0.101"]);
    }

    proptest! {
        /// Whatever the order: what was told adds up to what a new view tells.
        #[test]
        fn differences_add_up(
            steps in prop::collection::vec((0..6_u8, 0..3_u8, any::<bool>(), prop::option::of(0..6_u8)), 0..40),
        ) {
            let mut view = view();
            let mut keys: BTreeMap<u8, (u8, i64)> = BTreeMap::new();
            let mut believed: BTreeMap<NodeName, Lease> = BTreeMap::new();
            let mut own = none();
            for (now, (subnet, address, delete_it, own_subnet)) in (1..).zip(steps) {
                let change = if delete_it {
                    keys.remove(&subnet);
                    delete(subnet)
                } else {
                    let created = keys.get(&subnet).map_or(now, |(_, created)| *created);
                    keys.insert(subnet, (address, created));
                    put(subnet, address, created)
                };
                own = own_subnet.map(|subnet| (key(subnet), None)).into_iter().collect();
                for event in view.apply(vec![change], own.clone()) {
                    match event {
                        LeaseEvent::Upsert(lease) => drop(believed.insert(lease.node.clone(), lease)),
                        LeaseEvent::Remove(node) => prop_assert!(believed.remove(&node).is_some()),
                        other => panic!("{other:?}"),
                    }
                }
            }
            let all = keys.iter().filter_map(|(subnet, (address, created))| match put(*subnet, *address, *created) {
                Change::Put(kv) => Some(kv),
                Change::Delete { .. } => None,
            });
            let fresh = View::new("me".parse().unwrap(), all.collect(), own);
            let mut believed: Vec<Lease> = believed.into_values().collect();
            believed.sort_by(|a, b| a.precedence.cmp(&b.precedence));
            prop_assert_eq!(believed, fresh.leases());
        }
    }
}
