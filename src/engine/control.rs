//! The life of this node's lease: which network, acquire, watch, publish, renew. One job for the store at a time, each
//! with a deadline and a back-off, and none of them ever holds up the repair of the kernel.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};

use super::backoff;
use crate::clock::{Clock, Moment};
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent, Offer, OwnLease};
use crate::subnet::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use crate::types::NodeName;

/// How long the store may take for one answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// A lease is renewed when this is left of it, or a third of its term if that is less.
const MARGIN: Duration = Duration::from_secs(3600);

/// What the store, or the lack of its answer, changed.
#[derive(Debug)]
pub(super) enum Happened {
    /// The network is known.
    Network,
    /// This node's lease is another one, or known for the first time.
    Lease,
    /// Something about peers.
    Peers(LeaseEvent),
    /// Peers know how this node is reached.
    Published,
    /// The watch is open; its snapshot follows.
    Watching,
    /// A job failed, or the watch ended: it is tried again.
    Trouble,
}

enum Answer {
    Network(Result<NetworkConfig, SubnetError>),
    Acquired(Result<OwnedLease, SubnetError>),
    Watching(Result<LeaseStream, SubnetError>),
    Published(Result<OwnedLease, SubnetError>),
    Renewed(Result<OwnedLease, SubnetError>),
}

pub(super) struct Control {
    node: NodeName,
    manager: Arc<dyn SubnetManager>,
    clock: Arc<dyn Clock>,
    pub(super) network: Option<NetworkConfig>,
    pub(super) lease: Option<Lease>,
    expires: Option<Moment>,
    renew_at: Option<Moment>,
    watch: Option<LeaseStream>,
    job: Option<BoxFuture<'static, Answer>>,
    attempts: u32,
    not_before: Moment,
    /// What the last job, or the watch, said; cleared by success.
    pub(super) trouble: Option<SubnetError>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("lease", &self.lease).field("trouble", &self.trouble).finish_non_exhaustive()
    }
}

impl Control {
    pub(super) fn new(node: NodeName, manager: Arc<dyn SubnetManager>, clock: Arc<dyn Clock>) -> Self {
        Control {
            node,
            manager,
            clock,
            network: None,
            lease: None,
            expires: None,
            renew_at: None,
            watch: None,
            job: None,
            attempts: 0,
            not_before: Moment::ZERO,
            trouble: None,
        }
    }

    pub(super) fn is_watching(&self) -> bool {
        self.watch.is_some()
    }

    /// When `begin` should be called again although nothing happened.
    pub(super) fn due(&self) -> Option<Moment> {
        if self.job.is_some() {
            return None;
        }
        let retry = self.trouble.as_ref().map(|_| self.not_before);
        [retry, self.renew_at, self.expires].into_iter().flatten().min()
    }

    /// Starts the next job, if there is one and none runs: `request` once the underlay is known, `offers` once the kernel
    /// is ready for what they promise.
    pub(super) fn begin(&mut self, request: Option<LeaseRequest>, offers: Option<Vec<Offer>>) {
        let now = self.clock.now();
        if self.job.is_some() || now < self.not_before {
            return;
        }
        let manager = Arc::clone(&self.manager);
        let node = self.node.clone();
        if self.expires.is_some_and(|at| now >= at) {
            self.lose(format!("it expired before it could be renewed{}", self.last_words()));
        }
        let job = if self.network.is_none() {
            async move { Answer::Network(manager.network().await) }.boxed()
        } else if let (None, Some(request)) = (&self.lease, request) {
            async move { Answer::Acquired(manager.acquire(&request).await) }.boxed()
        } else if self.lease.is_some() && self.watch.is_none() {
            async move { Answer::Watching(manager.watch(&node).await) }.boxed()
        } else if let Some(offers) = offers.filter(|o| self.lease.as_ref().is_some_and(|l| l.offers != *o)) {
            async move { Answer::Published(manager.publish(&node, &offers).await) }.boxed()
        } else if self.lease.is_some() && self.renew_at.is_some_and(|at| now >= at) {
            async move { Answer::Renewed(manager.renew(&node).await) }.boxed()
        } else {
            return;
        };
        let clock = Arc::clone(&self.clock);
        let deadline = now + DEADLINE;
        let overdue = self.overdue();
        self.job = Some(
            async move {
                tokio::select! {
                    biased;
                    answer = job => answer,
                    () = clock.sleep_until(deadline) => overdue,
                }
            }
            .boxed(),
        );
    }

    /// What a job that took too long is taken for. Which job it was does not matter: each is idempotent.
    fn overdue(&self) -> Answer {
        Answer::Renewed(Err(SubnetError::Unavailable {
            attempted: "ask the store of leases".to_owned(),
            reason: format!("no answer within {} s", DEADLINE.as_secs()),
        }))
    }

    fn last_words(&self) -> String {
        self.trouble.as_ref().map(|e| format!(": {e}")).unwrap_or_default()
    }

    /// Waits for the store. Cancel safe: jobs and the watch live in `self`.
    pub(super) async fn next(&mut self) -> Happened {
        let job = async {
            match &mut self.job {
                Some(job) => job.await,
                None => std::future::pending().await,
            }
        };
        let watch = async {
            match &mut self.watch {
                Some(watch) => watch.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            answer = job => {
                self.job = None;
                self.take(answer)
            }
            event = watch => self.follow(event),
        }
    }

    /// A further event of the watch that is there already.
    pub(super) fn ready_event(&mut self) -> Option<Happened> {
        let event = self.watch.as_mut()?.next().now_or_never()?;
        Some(self.follow(event))
    }

    fn take(&mut self, answer: Answer) -> Happened {
        let outcome = match answer {
            Answer::Network(Ok(network)) => {
                self.network = Some(network);
                Ok(Happened::Network)
            }
            Answer::Acquired(Ok(owned)) | Answer::Renewed(Ok(owned)) => Ok(self.hold(owned)),
            Answer::Published(Ok(owned)) => {
                self.hold(owned);
                Ok(Happened::Published)
            }
            Answer::Watching(Ok(watch)) => {
                self.watch = Some(watch);
                Ok(Happened::Watching)
            }
            Answer::Network(Err(e))
            | Answer::Acquired(Err(e))
            | Answer::Published(Err(e))
            | Answer::Renewed(Err(e))
            | Answer::Watching(Err(e)) => Err(e),
        };
        match outcome {
            Ok(happened) => {
                self.attempts = 0;
                self.not_before = Moment::ZERO;
                self.trouble = None;
                happened
            }
            Err(SubnetError::NotHeld { reason, .. }) if self.lease.is_some() => {
                self.lose(reason);
                Happened::Lease
            }
            Err(error) => {
                self.fail(error);
                Happened::Trouble
            }
        }
    }

    fn follow(&mut self, event: Option<Result<LeaseEvent, SubnetError>>) -> Happened {
        match event {
            Some(Ok(LeaseEvent::Own(OwnLease::Changed(lease)))) => {
                self.lease = Some(lease);
                Happened::Lease
            }
            Some(Ok(LeaseEvent::Own(OwnLease::Lost(reason)))) => {
                self.lose(reason);
                Happened::Lease
            }
            Some(Ok(event)) => {
                if self.lease.is_some() {
                    self.trouble = None;
                }
                Happened::Peers(event)
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "the watch of leases failed");
                self.fail(error);
                Happened::Trouble
            }
            None => {
                self.watch = None;
                if self.trouble.is_none() {
                    self.fail(SubnetError::Unavailable {
                        attempted: "watch the leases".to_owned(),
                        reason: "the stream ended".to_owned(),
                    });
                }
                Happened::Trouble
            }
        }
    }

    fn hold(&mut self, owned: OwnedLease) -> Happened {
        let now = self.clock.now();
        self.expires = owned.remaining.map(|left| now + left);
        self.renew_at = owned.remaining.map(|left| now + (left - MARGIN.min(left / 3)));
        self.lease = Some(owned.lease);
        Happened::Lease
    }

    /// The lease is gone. The kernel is left as it is: the network must not fall with the store.
    fn lose(&mut self, reason: String) {
        tracing::warn!(node = %self.node, %reason, "this node lost its lease and asks for it again");
        self.lease = None;
        self.expires = None;
        self.renew_at = None;
        self.fail(SubnetError::NotHeld { node: self.node.clone(), reason });
    }

    fn fail(&mut self, error: SubnetError) {
        self.attempts = self.attempts.saturating_add(1);
        self.not_before = self.clock.now() + backoff::wait(self.attempts, &format!("{}/store", self.node));
        if self.renew_at.is_some_and(|at| at < self.not_before) {
            self.renew_at = Some(self.not_before);
        }
        self.trouble = Some(error);
    }

    /// Gives the lease back.
    pub(super) async fn release(&mut self) -> Result<(), SubnetError> {
        self.job = None;
        self.watch = None;
        let deadline = self.clock.now() + DEADLINE;
        tokio::select! {
            biased;
            done = self.manager.release(&self.node) => done,
            () = self.clock.sleep_until(deadline) => Err(SubnetError::Unavailable {
                attempted: format!("release the lease of {}", self.node),
                reason: format!("no answer within {} s", DEADLINE.as_secs()),
            }),
        }
    }
}
