//! What each node of this process holds in etcd, as far as this process knows: shared between its calls and its watches. One
//! synchronous state behind one lock that is never held over an await; it asks etcd nothing.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnetwork::{Ipv4Network, Ipv6Network};
use tokio::sync::watch;
use tokio::time::Instant;

use super::client::{Kv, Listing};
use super::value::{Identity, Value, identity, same_node};
use crate::lease::{Lease, Offer, OwnLease, Precedence};
use crate::subnet::{OwnedLease, SubnetError};
use crate::types::{NodeName, Stack};

/// A key that is this node's.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) key: String,
    pub(super) subnets: Stack<Ipv4Network, Ipv6Network>,
    pub(super) underlay: Stack<Ipv4Addr, Ipv6Addr>,
    pub(super) offers: Vec<Offer>,
    /// The value as it stands in etcd.
    pub(super) text: String,
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    /// The etcd lease; 0 for a reservation.
    pub(super) lease: i64,
    /// When the etcd lease ends, reckoned from before it was asked for; `None` for a reservation.
    pub(super) expires: Option<Instant>,
}

impl Held {
    pub(super) fn lease_of(&self, node: &NodeName) -> Lease {
        Lease {
            node: node.clone(),
            subnets: self.subnets,
            offers: self.offers.clone(),
            precedence: precedence(self.create_revision, &self.key),
        }
    }

    pub(super) fn owned(&self, node: &NodeName) -> OwnedLease {
        OwnedLease { lease: self.lease_of(node), remaining: self.remaining() }
    }

    fn remaining(&self) -> Option<Duration> {
        self.expires.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// Takes over what the same node wrote elsewhere: another process of it, or flannel.
    fn adopt(&mut self, kv: &Kv, value: Value, text: String) {
        self.underlay = value.underlay;
        self.offers = value.offers;
        self.text = text;
        self.create_revision = kv.create_revision;
        self.mod_revision = kv.mod_revision;
        self.lease = kv.lease;
        if kv.lease == 0 {
            self.expires = None;
        }
    }
}

/// The keys that are a node's own: for a key that it held before, only as it was then (when it was created, and its address), since
/// somebody else may have it now.
pub(super) type OwnKeys = BTreeMap<String, Option<(i64, Identity)>>;

/// Who came first is who created the key first.
pub(super) fn precedence(create_revision: i64, key: &str) -> Precedence {
    Precedence { since: u64::try_from(create_revision).unwrap_or(0), identity: key.to_owned() }
}

#[derive(Debug, Default)]
struct Own {
    held: Option<Held>,
    /// The key that it held before: a watch may still have to read of its end.
    before: Option<Held>,
    /// The key that a transaction under way creates, if it can.
    claiming: Option<String>,
    /// The value that a transaction under way writes.
    writing: Option<String>,
    /// The node gives its key back.
    releasing: bool,
}

impl Own {
    fn put(&mut self, held: Held) {
        match &mut self.held {
            // A watch has seen more meanwhile.
            Some(now) if now.key == held.key && now.mod_revision > held.mod_revision => {
                if now.lease == held.lease {
                    now.expires = held.expires;
                }
            }
            Some(now) if now.key == held.key => *now = held,
            now => {
                if let Some(before) = now.replace(held) {
                    self.before = Some(before);
                }
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct Owners {
    nodes: Mutex<BTreeMap<NodeName, Own>>,
    changed: watch::Sender<()>,
}

impl Owners {
    pub(super) fn new() -> Self {
        Owners { nodes: Mutex::default(), changed: watch::Sender::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeName, Own>> {
        // Every change is whole before anything could panic.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Learns of changes of what is held.
    pub(super) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// The keys of a node: the one it holds, the one that it is about to create, and the one that it held before.
    pub(super) fn keys(&self, node: &NodeName) -> OwnKeys {
        let nodes = self.lock();
        let Some(own) = nodes.get(node) else { return OwnKeys::new() };
        let before = own.before.iter().map(|h| (h.key.clone(), Some((h.create_revision, identity(&h.underlay)))));
        let now = own.held.iter().map(|h| h.key.clone()).chain(own.claiming.clone()).map(|key| (key, None));
        before.chain(now).collect()
    }

    pub(super) fn held(&self, node: &NodeName) -> Result<Held, SubnetError> {
        let held = self.lock().get(node).and_then(|own| own.held.clone());
        held.ok_or_else(|| {
            let reason = "it was never acquired, or it expired or was taken away since; acquire it anew";
            SubnetError::NotHeld { node: node.clone(), reason: reason.to_owned() }
        })
    }

    /// The node has acquired this.
    pub(super) fn hold(&self, node: &NodeName, held: Held) -> OwnedLease {
        let owned = held.owned(node);
        let mut nodes = self.lock();
        let own = nodes.entry(node.clone()).or_default();
        own.put(held);
        own.releasing = false;
        drop(nodes);
        self.changed.send_replace(());
        owned
    }

    /// What the node holds stands like this now.
    ///
    /// # Errors
    /// A watch has seen meanwhile that it holds it no more.
    pub(super) fn keep(&self, node: &NodeName, held: Held) -> Result<OwnedLease, SubnetError> {
        let owned = held.owned(node);
        let mut nodes = self.lock();
        let own = nodes.get_mut(node).filter(|own| own.held.as_ref().is_some_and(|now| now.key == held.key));
        let Some(own) = own else {
            let reason = format!("its key {} in etcd was lost a moment ago", held.key);
            return Err(SubnetError::NotHeld { node: node.clone(), reason });
        };
        own.put(held);
        Ok(owned)
    }

    /// Says that a key is about to be created, until what is returned is dropped.
    pub(super) fn claim<'a>(&'a self, node: &'a NodeName, key: &str) -> Intent<'a> {
        self.lock().entry(node.clone()).or_default().claiming = Some(key.to_owned());
        Intent { owners: self, node }
    }

    /// Says that a value is about to be written, until what is returned is dropped.
    pub(super) fn write<'a>(&'a self, node: &'a NodeName, text: &str) -> Intent<'a> {
        self.lock().entry(node.clone()).or_default().writing = Some(text.to_owned());
        Intent { owners: self, node }
    }

    /// From now on the key's end is no news.
    pub(super) fn release(&self, node: &NodeName) {
        if let Some(own) = self.lock().get_mut(node) {
            own.releasing = true;
        }
    }

    pub(super) fn forget(&self, node: &NodeName) {
        self.lose(self.lock(), node);
        if let Some(own) = self.lock().get_mut(node) {
            own.releasing = false;
        }
    }

    /// What stands under a key now. What that means for the node, if it is the node's key and later than what is known.
    pub(super) fn see(&self, node: &NodeName, kv: &Kv) -> Option<OwnLease> {
        // Another value at one revision is another history.
        self.take_in(node, kv, |held| {
            held.mod_revision < kv.mod_revision
                || (held.mod_revision == kv.mod_revision && held.text.as_bytes() != kv.value.as_slice())
        })
    }

    /// As [`see`](Self::see), of what etcd answered just now: true whatever its revision. Revisions go back where etcd was restored
    /// from a copy.
    pub(super) fn see_now(&self, node: &NodeName, kv: &Kv) -> Option<OwnLease> {
        self.take_in(node, kv, |_| true)
    }

    fn take_in(&self, node: &NodeName, kv: &Kv, is_news: impl Fn(&Held) -> bool) -> Option<OwnLease> {
        let mut nodes = self.lock();
        let own = nodes.get_mut(node)?;
        let held = own.held.as_mut().filter(|held| held.key == kv.key && is_news(held))?;
        let value = Value::decode(&kv.value);
        let text = String::from_utf8_lossy(&kv.value).into_owned();
        let ours = text == held.text || own.writing.as_ref() == Some(&text);
        let reason = match value {
            Ok(value) if ours || same_node(&value.underlay, &held.underlay) => {
                held.adopt(kv, value, text);
                return (!ours && !own.releasing).then(|| OwnLease::Changed(held.lease_of(node)));
            }
            Ok(value) => format!("its key {} in etcd was overwritten by {}", held.key, value.identity()),
            Err(error) => format!("its key {} in etcd was overwritten with what is no lease: {error}", held.key),
        };
        Some(OwnLease::Lost(reason)).filter(|_| self.lose(nodes, node))
    }

    /// A key was gone at a revision.
    pub(super) fn see_gone(&self, node: &NodeName, key: &str, revision: i64) -> Option<OwnLease> {
        let mut nodes = self.lock();
        let own = nodes.get_mut(node)?;
        let held = own.held.as_ref().filter(|held| held.key == key && held.mod_revision <= revision)?;
        let reason = format!("its key {} is gone from etcd: it expired, or somebody deleted it", held.key);
        Some(OwnLease::Lost(reason)).filter(|_| self.lose(nodes, node))
    }

    /// The node holds nothing any more. Whether that is news.
    fn lose(&self, mut nodes: MutexGuard<'_, BTreeMap<NodeName, Own>>, node: &NodeName) -> bool {
        let news = nodes.get_mut(node).is_some_and(|own| {
            own.before = own.held.take().or(own.before.take());
            !own.releasing
        });
        drop(nodes);
        self.changed.send_replace(());
        news
    }

    /// All keys as they were at a revision. `went_back`: etcd has forgotten revisions that the node saw before it asked, so that no revision
    /// says what is later.
    pub(super) fn see_all(&self, node: &NodeName, listing: &Listing, went_back: bool) -> Option<OwnLease> {
        let key = self.held(node).ok()?.key;
        match listing.kvs.iter().find(|kv| kv.key == key) {
            Some(kv) if went_back => self.see_now(node, kv),
            Some(kv) => self.see(node, kv),
            None => self.see_gone(node, &key, if went_back { i64::MAX } else { listing.revision }),
        }
    }
}

/// Something is under way. It ends however the call ends, dropped too.
#[derive(Debug)]
pub(super) struct Intent<'a> {
    owners: &'a Owners,
    node: &'a NodeName,
}

impl Drop for Intent<'_> {
    fn drop(&mut self) {
        if let Some(own) = self.owners.lock().get_mut(self.node) {
            own.claiming = None;
            own.writing = None;
        }
        self.owners.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_value_at_the_revision_that_ours_had_is_another_history() {
        let (owners, node): (_, NodeName) = (Owners::new(), "me".parse().unwrap());
        let underlay = Stack::V4(Ipv4Addr::new(10, 240, 0, 1));
        let text = Value::encode(&underlay, &[]).unwrap();
        let held = Held {
            key: "/p/subnets/10.42.1.0-24".to_owned(),
            subnets: Stack::V4("10.42.1.0/24".parse().unwrap()),
            underlay,
            offers: Vec::new(),
            text: text.clone(),
            create_revision: 7,
            mod_revision: 7,
            lease: 1,
            expires: None,
        };
        let listing = |value: &str| {
            let (key, value) = (held.key.clone(), value.as_bytes().to_vec());
            Listing { revision: 7, kvs: vec![Kv { key, value, create_revision: 7, mod_revision: 7, lease: 1 }] }
        };
        owners.hold(&node, held.clone());
        assert_eq!(owners.see_all(&node, &listing(&text), false), None);
        let theirs = listing(r#"{"PublicIP":"10.240.0.66"}"#);
        assert!(matches!(owners.see_all(&node, &theirs, false), Some(OwnLease::Lost(_))));
    }
}
