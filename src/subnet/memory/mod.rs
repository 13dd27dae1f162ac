//! Leases in the memory of this process: what an embedder uses that runs all its nodes in one process,
//! or that knows the subnets from elsewhere and hands them over; and what tests use, faults included.
//! It keeps nothing on disk, runs no task and starts no thread: leases expire when somebody looks.

mod faults;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use ipnetwork::{Ipv4Network, Ipv6Network};

use super::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use crate::clock::{Clock, SystemClock};
use crate::config::{ConfigError, NetworkConfig};
use crate::lease::{Lease, Offer};
use crate::types::{NodeName, Stack};
use state::{Shared, State};

pub use faults::{Call, Disturbance, Faults};

/// A store of leases in memory, shared by the overlays of one process. Clones are handles of the same store.
///
/// A node's subnets are **assigned** ([`assign`](MemorySubnets::assign)) and then its own for ever, as a podCIDR is; or,
/// in a store made with [`allocating`](MemorySubnets::allocating), **allocated** by flannel's rule for a term, 24 hours,
/// that the node renews. An assignment in an allocating store is a reservation: nobody else is given those subnets.
///
/// A node's precedence is the order in which the nodes came (were assigned to, or first acquired).
///
/// Each watch queues at most 1 024 events; who reads too slowly gets a new snapshot in their place.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use podnet::config::NetworkConfig;
/// use podnet::subnet::memory::MemorySubnets;
/// use podnet::subnet::{LeaseRequest, SubnetManager};
/// use podnet::types::Stack;
///
/// let store = MemorySubnets::assigned(NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?);
/// let node = "rke-52b280-1".parse()?;
/// store.assign(&node, Stack::V4("10.42.1.0/24".parse()?));
///
/// let request = LeaseRequest { node, underlay: Stack::V4("10.240.0.102".parse()?), previous: None };
/// let owned = store.acquire(&request).await?;
/// assert_eq!(owned.lease.subnets, Stack::V4("10.42.1.0/24".parse()?));
/// assert_eq!(owned.remaining, None, "for ever");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemorySubnets {
    shared: Arc<Shared>,
}

impl MemorySubnets {
    /// How long an allocated lease lasts unless renewed, by default: flannel's 24 hours.
    pub const TERM: Duration = Duration::from_secs(24 * 60 * 60);

    /// A store in which every node's subnets are assigned. Ranges in the configuration are not looked at.
    pub fn assigned(config: NetworkConfig) -> Self {
        Self::new(State::new(config, None))
    }

    /// A store that allocates from the configuration's ranges; from flannel's default ones if it has none.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use podnet::config::NetConf;
    /// use podnet::subnet::memory::MemorySubnets;
    /// use podnet::subnet::{LeaseRequest, SubnetManager};
    /// use podnet::types::Stack;
    ///
    /// let config = NetConf::from_json(r#"{"Network":"10.42.0.0/16","SubnetLen":26}"#)?.for_allocation()?;
    /// let store = MemorySubnets::allocating(config)?;
    /// let underlay = Stack::V4("10.240.0.102".parse()?);
    /// let request = LeaseRequest { node: "rke-52b280-1".parse()?, underlay, previous: None };
    /// let owned = store.acquire(&request).await?;
    /// assert_eq!(owned.lease.subnets.v4().map(|s| s.prefix()), Some(26));
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    ///
    /// There are no ranges in the configuration, and its network is too small for the default ones.
    pub fn allocating(config: NetworkConfig) -> Result<Self, ConfigError> {
        let config = if config.allocation().is_some() { config } else { config.allocating(None, None)? };
        let ranges = config.allocation().copied();
        Ok(Self::new(State::new(config, ranges)))
    }

    fn new(state: State) -> Self {
        MemorySubnets { shared: Arc::new(Shared::new(state)) }
    }

    /// Lets allocated leases last so long, at least a second. For leases given from now on.
    pub fn with_term(self, term: Duration) -> Self {
        self.shared.lock().term = term.max(Duration::from_secs(1));
        self
    }

    /// Takes another clock than the system's. Only before the first lease is given: moments of two clocks do not compare.
    pub fn with_clock(self, clock: Arc<dyn Clock>) -> Self {
        self.shared.lock().clock = clock;
        self
    }

    /// Makes the choice of subnets repeatable. Without a seed it is a matter of chance.
    pub fn with_seed(self, seed: u64) -> Self {
        self.shared.lock().random.seed(seed);
        self
    }

    /// Says which subnets are a node's own, from now on and until said otherwise. A node that holds a lease already is told
    /// of the change (`Own(Changed)`), its peers get an `Upsert`.
    ///
    /// The store does not judge whether the subnets lie in the network or overlap another's: admission does.
    pub fn assign(&self, node: &NodeName, subnets: Stack<Ipv4Network, Ipv6Network>) {
        self.shared.lock().assign(node, subnets);
    }

    /// Withdraws an assignment. A node that holds the lease loses it (`Own(Lost)`). Without an assignment this does nothing.
    pub fn unassign(&self, node: &NodeName) {
        self.shared.lock().unassign(node);
    }

    /// All leases that are held now, in the order of the nodes' names.
    pub fn leases(&self) -> Vec<Lease> {
        self.shared.lock().leases()
    }

    /// Makes this store misbehave, for tests.
    pub fn faults(&self) -> Faults {
        Faults { shared: Arc::clone(&self.shared) }
    }
}

impl fmt::Debug for MemorySubnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemorySubnets").finish_non_exhaustive()
    }
}

#[async_trait]
impl SubnetManager for MemorySubnets {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        Ok(self.shared.call(Call::Network)?.config.clone())
    }

    /// Renews the lease too, as flannel does when it finds its own lease.
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.shared.call(Call::Acquire)?.acquire(request)
    }

    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.shared.call(Call::Publish)?.publish(node, offers)
    }

    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.shared.call(Call::Renew)?.renew(node)
    }

    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.shared.call(Call::Release)?.release(node);
        Ok(())
    }

    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        drop(self.shared.call(Call::Watch)?);
        // Fused: a stream that is polled after its end must not panic.
        Ok(watch::subscribe(&self.shared, node).fuse().boxed())
    }
}

fn default_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}
