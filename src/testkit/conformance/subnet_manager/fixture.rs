//! What the author of a store brings: empty stores, and what only he knows how to do to one. Nothing here asks a rule.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::subnet::SubnetManager;
use crate::types::NodeName;

/// How many nodes a trial has at most.
pub const NODES: u8 = 16;

/// Makes stores for the suite.
#[async_trait]
pub trait Fixture: fmt::Debug + Send + Sync {
    /// A new store in which nobody holds anything. Each trial asks for one; those of earlier trials are dropped.
    ///
    /// # Errors
    /// Why there is none; every rule is reported as broken then.
    async fn store(&self) -> Result<Box<dyn Store>, String>;

    /// How long the suite waits for a change to arrive, ten seconds unless said otherwise: more than the store takes at its
    /// slowest. A good store is never waited for so long.
    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
}

/// One store, as whoever runs it sees it.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync {
    /// The subnet manager that a node's process would have, by a client of its own where that matters. Asked for one node several
    /// times, it is as if the process had been restarted.
    async fn manager(&self, node: &NodeName) -> Result<Arc<dyn SubnetManager>, String>;

    /// Whether a node must be [admitted](Self::admit) before it can acquire; else the store gives subnets away by itself.
    fn assigns(&self) -> bool {
        false
    }

    /// Whether a lease lasts as long as its assignment, as where the assignment is all there is: a release takes back what was
    /// published, and the node still holds its subnets. Else a release ends the lease.
    fn holds_while_assigned(&self) -> bool {
        false
    }

    /// Gives a node what it needs to be able to acquire: an object in the store, a podCIDR of its own. `number` differs for each node
    /// and is below [`NODES`].
    async fn admit(&self, node: &NodeName, number: u8) -> Result<(), String> {
        let _ = (node, number);
        Ok(())
    }

    /// Cuts every watch, as a lost connection or a compaction does.
    ///
    /// # Errors
    /// Why it cannot be done; the rule about it is reported as not tried, with this reason.
    async fn cut_watches(&self) -> Result<(), String> {
        Err("the fixture knows no way to cut a watch: see `Store::cut_watches`".to_owned())
    }
}

/// The fixture of a store that gives subnets away by itself, and whose clones are handles of one store.
///
/// ```
/// use podnet::config::NetworkConfig;
/// use podnet::subnet::memory::MemorySubnets;
/// use podnet::testkit::conformance::subnet_manager::Allocating;
/// use podnet::types::Stack;
///
/// let network = NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?;
/// let fixture = Allocating::new(move || MemorySubnets::allocating(network.clone()).expect("a network of some size"));
/// # let _ = fixture;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Allocating<F> {
    make: F,
}

impl<F, M> Allocating<F>
where
    F: Fn() -> M + Send + Sync,
    M: SubnetManager + Clone,
{
    /// `make` makes an empty store.
    pub fn new(make: F) -> Self {
        Allocating { make }
    }
}

impl<F> fmt::Debug for Allocating<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Allocating").finish_non_exhaustive()
    }
}

#[async_trait]
impl<F, M> Fixture for Allocating<F>
where
    F: Fn() -> M + Send + Sync,
    M: SubnetManager + Clone,
{
    async fn store(&self) -> Result<Box<dyn Store>, String> {
        Ok(Box::new(Handles((self.make)())))
    }
}

/// A store of which clones are handles.
#[derive(Debug)]
struct Handles<M>(M);

#[async_trait]
impl<M: SubnetManager + Clone> Store for Handles<M> {
    async fn manager(&self, _: &NodeName) -> Result<Arc<dyn SubnetManager>, String> {
        Ok(Arc::new(self.0.clone()))
    }
}
