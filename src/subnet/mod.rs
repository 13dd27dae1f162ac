//! Who holds which subnet: the trait behind which Kubernetes, etcd, a file or memory stands.
//!
//! A subnet manager is a store of leases and nothing else. It never touches the kernel, never judges
//! another node's claim (that is [admission](crate::admission)) and keeps no opinion about backends.

pub mod allocation;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod file;
pub mod memory;
mod random;

use std::fmt::Debug;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use ipnetwork::{Ipv4Network, Ipv6Network};

use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent, Offer};
use crate::types::{NodeName, Stack};

/// The stream that [`SubnetManager::watch`] returns.
pub type LeaseStream = BoxStream<'static, Result<LeaseEvent, SubnetError>>;

/// What a node asks for when it acquires its lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRequest {
    /// Who asks.
    pub node: NodeName,
    /// Where it stands on the underlay: a store without node names (etcd) knows a node by this.
    pub underlay: Stack<Ipv4Addr, Ipv6Addr>,
    /// The subnets that it had before, kept where they are free and fit.
    pub previous: Option<Stack<Ipv4Network, Ipv6Network>>,
}

/// A lease as its own holder sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedLease {
    /// The lease.
    pub lease: Lease,
    /// How long it lasts from now unless renewed; `None`: for ever, as a podCIDR does.
    pub remaining: Option<Duration>,
}

/// A store of leases, as one node uses it.
///
/// # Contract
///
/// - Every method may be called again after a failure or after its future was dropped; none leaves half a result.
/// - `watch` starts with a whole [`LeaseEvent::Snapshot`]. After anything that may have lost an event (compaction,
///   410 Gone, a lost connection) it sends another. An `Err` item says what went wrong and whether a retry can help;
///   the stream may go on after it, and its end means: call `watch` again.
/// - A manager may include the watcher's own lease in snapshots; the engine tells it by name.
/// - An identity that changes its subnet, key, MAC or address sends `Upsert` under the same node name.
#[cfg_attr(feature = "testkit", mockall::automock)]
#[async_trait]
pub trait SubnetManager: Debug + Send + Sync + 'static {
    /// The network that subnets are cut from. Cancel safe.
    async fn network(&self) -> Result<NetworkConfig, SubnetError>;

    /// This node's lease: the one it holds already, or a new one. Idempotent; cancel safe.
    ///
    /// # Errors
    /// [`SubnetError::NotAssigned`] or [`SubnetError::OutOfSubnets`] while there is none to have; all are tried again.
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError>;

    /// Tells peers how this node is reached: replaces all offers of the node's lease. Idempotent; cancel safe.
    ///
    /// # Errors
    /// [`SubnetError::NotHeld`] makes the engine give the lease up and acquire again; all others are tried again.
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError>;

    /// Extends the lease by its full term. For a lease without a term this only checks that it is still held. No
    /// `Own(Changed)` follows from it: the engine answers that with a renewal. Cancel safe.
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError>;

    /// Gives the lease back; where subnets are assigned, the assignment stays, and what is given back is how the node is
    /// reached. Releasing what is not held is success. Cancel safe.
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError>;

    /// All leases, then their changes, as `node` sees them. Cancel safe; dropping the stream ends the watch.
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<T: SubnetManager + ?Sized> SubnetManager for $pointer<T> {
            async fn network(&self) -> Result<NetworkConfig, SubnetError> {
                (**self).network().await
            }
            async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
                (**self).acquire(request).await
            }
            async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
                (**self).publish(node, offers).await
            }
            async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
                (**self).renew(node).await
            }
            async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
                (**self).release(node).await
            }
            async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
                (**self).watch(node).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

/// Why a subnet manager could not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SubnetError {
    /// The store could not be asked, or did not answer. A retry can help.
    #[error("{attempted}: {reason}")]
    Unavailable {
        /// What was attempted, on which object.
        attempted: String,
        /// What the store or the transport said.
        reason: String,
    },
    /// No subnet has been assigned to this node yet. A retry can help.
    #[error(
        "node {node} has no subnet yet: it waits until one is assigned (in Kubernetes: spec.podCIDR; in a file: its entry under nodes)"
    )]
    NotAssigned {
        /// The node.
        node: NodeName,
    },
    /// Every subnet of the range is taken. A retry helps only when another node leaves.
    #[error("out of subnets: all {total} of {range} are leased; enlarge the network or shorten the subnets")]
    OutOfSubnets {
        /// How many subnets the range holds.
        total: u128,
        /// First and last subnet, as text.
        range: String,
    },
    /// The lease is not held: it was never acquired, expired, or went to another. `acquire` starts anew.
    #[error("node {node} holds no lease: {reason}")]
    NotHeld {
        /// The node.
        node: NodeName,
        /// Why not.
        reason: String,
    },
    /// What the store holds or was given makes no sense. No retry helps until somebody changes it.
    #[error("{object} is not valid: {reason}")]
    Invalid {
        /// What was read.
        object: String,
        /// What is wrong with it, and what is allowed.
        reason: String,
    },
}

impl SubnetError {
    /// Whether the same call can succeed later without anyone changing the configuration.
    pub fn is_retryable(&self) -> bool {
        !matches!(self, SubnetError::Invalid { .. })
    }
}
