//! How long this node's lease lasts, overheard between the library and the store: the status does not say it, and whoever watches a
//! cluster wants to know before it ends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use podnet::config::NetworkConfig;
use podnet::lease::Offer;
use podnet::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use podnet::types::NodeName;

/// When the lease ends, as the store said last.
#[derive(Debug, Default)]
pub(crate) struct Term(Mutex<Option<Instant>>);

impl Term {
    /// What is left of it; `None` while there is none, and for one without end.
    pub(crate) fn left(&self) -> Option<Duration> {
        let ends = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ends.map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn note(&self, owned: Result<OwnedLease, SubnetError>) -> Result<OwnedLease, SubnetError> {
        let ends = match &owned {
            Ok(owned) => owned.remaining.and_then(|left| Instant::now().checked_add(left)),
            Err(SubnetError::NotHeld { .. }) => None,
            Err(_) => return owned,
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = ends;
        owned
    }
}

/// A store that is listened to.
#[derive(Debug)]
pub(crate) struct Overheard {
    pub(crate) store: Arc<dyn SubnetManager>,
    pub(crate) term: Arc<Term>,
}

#[async_trait]
impl SubnetManager for Overheard {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        self.store.network().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        self.term.note(self.store.acquire(request).await)
    }

    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        self.term.note(self.store.publish(node, offers).await)
    }

    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        self.term.note(self.store.renew(node).await)
    }

    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        self.store.release(node).await
    }

    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        self.store.watch(node).await
    }
}
