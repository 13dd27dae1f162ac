//! A store of leases that notes when it handed out a snapshot: from there on convergence is podnet's own time.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures::StreamExt;
use podnet::config::NetworkConfig;
use podnet::lease::{LeaseEvent, Offer};
use podnet::subnet::memory::MemorySubnets;
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::types::NodeName;

use crate::figures::Start;

/// [`MemorySubnets`] with a stopwatch. Clones share both.
#[derive(Debug, Clone)]
pub struct Stamped {
    /// The store.
    pub store: MemorySubnets,
    snapshot: Arc<Mutex<Option<Start>>>,
}

impl Stamped {
    /// Over this store.
    pub fn new(store: MemorySubnets) -> Self {
        Stamped { store, snapshot: Arc::default() }
    }

    /// When the last snapshot was handed out.
    pub fn snapshot(&self) -> Option<Start> {
        *self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SubnetManager for Stamped {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.network().await
    }
    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.store.acquire(request).await
    }
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.store.publish(node, offers).await
    }
    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.store.renew(node).await
    }
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.store.release(node).await
    }
    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        let stamp = Arc::clone(&self.snapshot);
        let watch = self.store.watch(node).await?.inspect(move |event| {
            if matches!(event, Ok(LeaseEvent::Snapshot(_))) {
                *stamp.lock().unwrap_or_else(PoisonError::into_inner) = Some(Start::now());
            }
        });
        Ok(watch.boxed())
    }
}
