//! Leases in etcd, as flannel keeps them there: its keys, its values, its term, so that a node of podnet and a node of flannel share
//! one cluster. It never overwrites another node's key and never judges what others claim (admission does).

mod client;
mod hold;
mod options;
mod own;
mod value;
mod view;
mod watch;

use std::fmt;
#[cfg(feature = "testkit")]
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use tokio::time::Instant;

use super::random::Random;
use super::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use crate::config::{NetConf, NetworkConfig};
use crate::lease::Offer;
use crate::types::NodeName;
#[cfg(feature = "testkit")]
use crate::types::Stack;
use client::{Etcd, Listing};
use own::Owners;
use watch::Watch;

pub use options::{EtcdOptions, EtcdOptionsError, EtcdTls};

/// What a value under a lease's key says, as a store reads it: where the node is, and how it is reached. For whoever tests with values that
/// somebody else wrote.
///
/// # Errors
///
/// Why it is no lease.
#[cfg(feature = "testkit")]
pub fn read_value(bytes: &[u8]) -> Result<(Stack<Ipv4Addr, Ipv6Addr>, Vec<Offer>), String> {
    value::Value::decode(bytes).map(|value| (value.underlay, value.offers))
}

/// The value that says this, as a store writes it.
///
/// # Errors
///
/// What could not be read again: too much, or an offer of no backend.
#[cfg(feature = "testkit")]
pub fn write_value(underlay: &Stack<Ipv4Addr, Ipv6Addr>, offers: &[Offer]) -> Result<String, String> {
    value::Value::encode(underlay, offers)
}

/// A store of leases in etcd (3.4 or later, API v3). Clones are handles of the same store.
///
/// - `PREFIX/config` holds flannel's configuration, by the rules of [`NetConf::for_allocation`].
/// - `PREFIX/subnets/10.5.34.0-24` (`10.5.34.0-24&fc00:0:0:5::-64` with both families) is a lease: its value is flannel's
///   [lease attributes](crate::flannel::lease_attrs), and it ends with the etcd lease that it is attached to. Such a key says no
///   IPv6 subnet alone: a network of IPv6 alone is [`SubnetError::Invalid`].
/// - A key without an etcd lease is a reservation: it is the node's whose address it says, and it stays. One that does not fit the
///   configuration (another range, a family more) is not used: the node gets another subnet while that is so.
///
/// flannel's value says one way to reach a node. Where a node publishes several, the first is written as flannel writes it and the
/// others stand under a key, `OtherOffers`, that flannel passes over.
///
/// # Who is who
///
/// etcd knows no node names. A node is its address on the underlay: `PublicIP`, or `PublicIPv6` where there is no `PublicIP` (a node whose IPv4
/// is away for a moment finds its own key by its IPv6).
/// Other nodes are told by that address as their name, and this node by its own. If two keys say one address, the key that was created
/// first bears the name (a reservation that is not in use comes last), the others are called `ADDRESS+SUBNET`, and [admission](crate::admission) lets the oldest in. A lease's
/// precedence is the revision in which its key was created. So two nodes must not have one address, as in flannel: behind one
/// translated address they would take each other's lease for their own.
///
/// A node that comes back gets its lease by its address, with what was published in it; else its previous subnet, if that is free; else
/// one of the first hundred free ones. What it gets is created in a transaction that fails if another node was quicker, and is then
/// tried again. A key of its own that does not fit the network any more is deleted in the same transaction.
///
/// Nothing of another node is ever overwritten: each write says which revision it replaces. A node whose key is gone, or says another
/// address, has lost its lease and is told so. The key of this node that another process of it wrote (flannel, say) is taken
/// over, and what this process publishes is written again, at most every 5 s.
///
/// # When etcd is away
///
/// Each request is asked of the next member where one does not answer within the [deadline](EtcdOptions::deadline). A watch that
/// breaks (a member stops, the leader changes without another, changes were compacted away, a connection is silent for 10 s) takes a new
/// snapshot from any member that answers. If none does, it says so and ends. Listing is one request, however many leases there are.
///
/// What cannot be read as a lease is passed over with a debug line, and [counted](EtcdSubnets::counters); the subnet that its key says
/// is given to nobody all the same.
///
/// A store needs a tokio runtime with I/O and time.
///
/// ```
/// use podnet::subnet::etcd::{EtcdOptions, EtcdSubnets};
///
/// let options = EtcdOptions::new(["http://127.0.0.1:2379"]);
/// let refused = EtcdSubnets::new(options.clone()).unwrap_err();
/// assert!(refused.to_string().contains("without TLS, which must be asked for"));
/// let store = EtcdSubnets::new(options.allow_plain_http(true))?;
/// # Ok::<(), podnet::subnet::etcd::EtcdOptionsError>(())
/// ```
#[derive(Clone)]
pub struct EtcdSubnets {
    inner: Arc<Inner>,
}

/// What a store has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct EtcdCounters {
    /// Requests to etcd, repeated ones too.
    pub requests: u64,
    /// Keys and values that were passed over since they are no leases; each time that they were seen.
    pub unreadable: u64,
}

/// How long what was listed may be asked about.
const FRESH: Duration = Duration::from_secs(10);

struct Inner {
    etcd: Etcd,
    /// `PREFIX/config`.
    config: String,
    /// `PREFIX/subnets`, as flannel lists and watches it.
    subnets: String,
    term: Duration,
    /// What `network` answered last: what the node runs with.
    network: Mutex<Option<NetworkConfig>>,
    owners: Owners,
    /// What a node acquired its lease with, for the watch that it begins next.
    listed: Mutex<Option<Listed>>,
    random: Mutex<Random>,
    unreadable: AtomicU64,
}

struct Listed {
    node: NodeName,
    /// The node's key.
    key: String,
    listing: Listing,
    at: Instant,
}

impl EtcdSubnets {
    /// A store. Nothing is connected yet.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the options. Certificates are looked at with the first request.
    pub fn new(options: EtcdOptions) -> Result<Self, EtcdOptionsError> {
        let options = options.checked()?;
        let inner = Inner {
            etcd: Etcd::new(&options),
            config: format!("{}/config", options.prefix),
            subnets: format!("{}/subnets", options.prefix),
            term: options.term,
            network: Mutex::default(),
            owners: Owners::new(),
            listed: Mutex::default(),
            random: Mutex::new(Random::new()),
            unreadable: AtomicU64::new(0),
        };
        Ok(EtcdSubnets { inner: Arc::new(inner) })
    }

    /// What this store has done so far.
    pub fn counters(&self) -> EtcdCounters {
        EtcdCounters { requests: self.inner.etcd.requests(), unreadable: self.inner.unreadable.load(Ordering::Relaxed) }
    }
}

impl Inner {
    fn known_network(&self) -> Option<NetworkConfig> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn read_network(&self) -> Result<NetworkConfig, SubnetError> {
        let Some(kv) = self.etcd.get(&self.config).await? else {
            return Err(SubnetError::Unavailable {
                attempted: format!("read {}", self.config),
                reason: r#"there is no such key in etcd; put the network's configuration there, such as {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}}"#
                    .to_owned(),
            });
        };
        let text = std::str::from_utf8(&kv.value).map_err(|e| self.invalid_config(format!("it is not text ({e})")))?;
        let network = NetConf::from_json(text).and_then(NetConf::for_allocation);
        let network = network.map_err(|e| self.invalid_config(e.to_string()))?;
        if network.networks().v4().is_none() {
            let reason = "it has no IPv4 network, and flannel's keys in etcd begin with an IPv4 subnet; \
                 enable both families, or use another store";
            return Err(self.invalid_config(reason.to_owned()));
        }
        *self.network.lock().unwrap_or_else(PoisonError::into_inner) = Some(network.clone());
        Ok(network)
    }

    fn invalid_config(&self, reason: String) -> SubnetError {
        SubnetError::Invalid { object: format!("{} in etcd", self.config), reason }
    }

    /// A random time up to a limit.
    fn up_to(&self, limit: Duration) -> Duration {
        let millis = usize::try_from(limit.as_millis()).unwrap_or(usize::MAX);
        let chosen = self.random.lock().unwrap_or_else(PoisonError::into_inner).below(millis.saturating_add(1));
        Duration::from_millis(u64::try_from(chosen).unwrap_or(0))
    }

    /// All leases. A node that has just acquired its own has read them for that, and where nobody has written since they are not read again:
    /// one list serves its start, however long it is.
    async fn listing(&self, node: &NodeName) -> Result<(Listing, bool), SubnetError> {
        let listed = self.listed.lock().unwrap_or_else(PoisonError::into_inner).take();
        let fresh = listed.filter(|l| l.node == *node && l.at.elapsed() < FRESH);
        if let Some((Listed { key, listing, .. }, held)) = fresh.zip(self.owners.held(node).ok())
            && held.key == key
        {
            let was_there = listing.kvs.iter().any(|kv| kv.key == key);
            let own = (&*key, held.mod_revision);
            let count = self.etcd.count_unless_written_since(&self.subnets, own, listing.revision).await?;
            if count == Some(listing.kvs.len() + usize::from(!was_there)) {
                return Ok((listing, false));
            }
        }
        self.list(node).await
    }

    /// All leases, and whether etcd's revisions have gone back since the node wrote its own: it was restored from a copy.
    async fn list(&self, node: &NodeName) -> Result<(Listing, bool), SubnetError> {
        let before = self.owners.held(node).ok().map(|held| held.mod_revision);
        let listing = self.etcd.list(&self.subnets).await?;
        let went_back = before.is_some_and(|before| listing.revision < before);
        Ok((listing, went_back))
    }

    fn count_unreadable(&self, more: u64) {
        self.unreadable.fetch_add(more, Ordering::Relaxed);
    }
}

impl fmt::Debug for EtcdSubnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdSubnets")
            .field("etcd", &self.inner.etcd)
            .field("subnets", &self.inner.subnets)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl SubnetManager for EtcdSubnets {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.inner.read_network().await
    }

    /// From the ranges of the configuration that [`network`](SubnetManager::network) answered last, so that a node runs with one
    /// configuration at a time.
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.inner.acquire(request).await
    }

    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.inner.publish(node, offers).await
    }

    /// Keeps the etcd lease that the key has; only where that is gone the key gets a new one.
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.inner.renew(node).await
    }

    /// Deletes the node's key. A reservation stays, without a way to reach the node.
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.inner.release(node).await
    }

    /// The node's own lease is in no snapshot.
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        let watch = Watch::begin(Arc::clone(&self.inner), node.clone()).await?;
        // Fused: a stream that is polled after its end must not panic.
        Ok(watch.into_stream().fuse().boxed())
    }
}
