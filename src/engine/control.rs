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
/// The least time between two renewals.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);

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
    Published(Result<OwnedLease, SubnetError>, Vec<Offer>),
    Renewed(Result<OwnedLease, SubnetError>),
}

/// One kind of work with the store: its own back-off, so that what fails for ever holds up nothing else.
#[derive(Debug, Default)]
struct Lane {
    attempts: u32,
    not_before: Moment,
    trouble: Option<SubnetError>,
    /// Since when it has worked: what breaks soon after it began did not really work.
    since: Option<Moment>,
}

impl Lane {
    fn is_due(&self, now: Moment) -> bool {
        now >= self.not_before
    }

    fn works(&mut self, now: Moment) {
        self.trouble = None;
        self.since = Some(now);
    }

    fn fail(&mut self, now: Moment, seed: &str, error: SubnetError) {
        let lasted = self.since.take().is_some_and(|since| now.saturating_sub(since) > backoff::LONGEST);
        self.attempts = if lasted { 1 } else { self.attempts.saturating_add(1) };
        self.not_before = now.saturating_add(backoff::wait(self.attempts, seed));
        self.trouble = Some(error);
    }
}

pub(super) struct Control {
    node: NodeName,
    manager: Arc<dyn SubnetManager>,
    clock: Arc<dyn Clock>,
    /// How long before its end the lease is renewed.
    margin: Duration,
    pub(super) network: Option<NetworkConfig>,
    pub(super) lease: Option<Lease>,
    expires: Option<Moment>,
    renew_at: Option<Moment>,
    watch: Option<LeaseStream>,
    job: Option<BoxFuture<'static, Answer>>,
    /// Network, acquisition and renewal.
    holding: Lane,
    watching: Lane,
    publishing: Lane,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("lease", &self.lease).field("trouble", &self.trouble()).finish_non_exhaustive()
    }
}

fn overdue() -> SubnetError {
    SubnetError::Unavailable {
        attempted: "ask the store of leases".to_owned(),
        reason: format!("no answer within {} s", DEADLINE.as_secs()),
    }
}

impl Control {
    pub(super) fn new(
        node: NodeName,
        manager: Arc<dyn SubnetManager>,
        clock: Arc<dyn Clock>,
        margin: Duration,
    ) -> Self {
        Control {
            node,
            manager,
            clock,
            margin,
            network: None,
            lease: None,
            expires: None,
            renew_at: None,
            watch: None,
            job: None,
            holding: Lane::default(),
            watching: Lane::default(),
            publishing: Lane::default(),
        }
    }

    /// What is left of the lease; `None` without one, and for one without end.
    pub(super) fn lease_left(&self) -> Option<Duration> {
        self.expires.map(|at| at.saturating_sub(self.clock.now()))
    }

    pub(super) fn is_watching(&self) -> bool {
        self.watch.is_some()
    }

    /// What the store said last, where it has not worked since: of the lease, else of the watch, else of publishing.
    pub(super) fn trouble(&self) -> Option<&SubnetError> {
        [&self.holding, &self.watching, &self.publishing].into_iter().find_map(|lane| lane.trouble.as_ref())
    }

    /// When after `now` `begin` should be called again although nothing happened.
    pub(super) fn due(&self, now: Moment) -> Option<Moment> {
        if self.job.is_some() {
            return None;
        }
        let lanes = [&self.holding, &self.watching, &self.publishing].map(|lane| Some(lane.not_before));
        lanes.into_iter().chain([self.renew_at, self.expires]).flatten().filter(|moment| *moment > now).min()
    }

    /// Starts the next job, if there is one and none runs: `request` once the underlay is known, `offers` once the kernel
    /// is ready for what they promise.
    pub(super) fn begin(&mut self, request: Option<LeaseRequest>, offers: Option<Vec<Offer>>) {
        let now = self.clock.now();
        if self.job.is_some() {
            return;
        }
        if self.expires.is_some_and(|at| now >= at) {
            let words = self.holding.trouble.as_ref().map(|e| format!(": {e}")).unwrap_or_default();
            self.lose(format!("it expired before it could be renewed{words}"));
        }
        let manager = Arc::clone(&self.manager);
        let node = self.node.clone();
        let holding = self.holding.is_due(now);
        let held = self.lease.is_some();
        // After a failure also where the watch said since that the store has them: publishing is what ends the trouble.
        let failed = self.publishing.trouble.is_some();
        let news = offers.filter(|o| self.lease.as_ref().is_some_and(|l| failed || l.offers != *o));
        // Each with what it is taken for where it takes too long: all are idempotent.
        let (job, late) = if self.network.is_none() && holding {
            (async move { Answer::Network(manager.network().await) }.boxed(), Answer::Network(Err(overdue())))
        } else if let (None, Some(request), true) = (&self.lease, request, holding) {
            (async move { Answer::Acquired(manager.acquire(&request).await) }.boxed(), Answer::Acquired(Err(overdue())))
        } else if held && holding && self.renew_at.is_some_and(|at| now >= at) {
            (async move { Answer::Renewed(manager.renew(&node).await) }.boxed(), Answer::Renewed(Err(overdue())))
        } else if held && self.watch.is_none() && self.watching.is_due(now) {
            (async move { Answer::Watching(manager.watch(&node).await) }.boxed(), Answer::Watching(Err(overdue())))
        } else if let Some(offers) = news.filter(|_| self.publishing.is_due(now)) {
            let late = Answer::Published(Err(overdue()), Vec::new());
            (async move { Answer::Published(manager.publish(&node, &offers).await, offers) }.boxed(), late)
        } else {
            return;
        };
        let clock = Arc::clone(&self.clock);
        let deadline = now.saturating_add(DEADLINE);
        self.job = Some(
            async move {
                tokio::select! {
                    biased;
                    answer = job => answer,
                    () = clock.sleep_until(deadline) => late,
                }
            }
            .boxed(),
        );
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
        let now = self.clock.now();
        let seed = |lane: &str| format!("{}/{lane}", self.node);
        match answer {
            Answer::Network(Ok(network)) => {
                self.network = Some(network);
                self.holding.works(now);
                Happened::Network
            }
            Answer::Acquired(Ok(owned)) | Answer::Renewed(Ok(owned)) => {
                self.holding.works(now);
                self.hold(owned)
            }
            Answer::Published(Ok(owned), sent) => {
                self.publishing.works(now);
                if owned.lease.offers != sent {
                    // Were it published again at once, so would it for ever.
                    let error = SubnetError::Invalid {
                        object: format!("what the store holds as the offers of {}", self.node),
                        reason: "it is not what was published, to the byte".to_owned(),
                    };
                    tracing::warn!(%error, "published");
                    self.publishing.since = None;
                    self.publishing.fail(now, &seed("publish"), error);
                }
                self.hold(owned);
                Happened::Published
            }
            Answer::Watching(Ok(watch)) => {
                self.watch = Some(watch);
                self.watching.since = Some(now);
                Happened::Watching
            }
            Answer::Acquired(Err(SubnetError::NotHeld { reason, .. }))
            | Answer::Published(Err(SubnetError::NotHeld { reason, .. }), _)
            | Answer::Renewed(Err(SubnetError::NotHeld { reason, .. }))
                if self.lease.is_some() =>
            {
                self.lose(reason);
                Happened::Lease
            }
            Answer::Published(Err(error), _) => {
                self.publishing.fail(now, &seed("publish"), error);
                Happened::Trouble
            }
            Answer::Watching(Err(error)) => {
                self.watching.fail(now, &seed("watch"), error);
                Happened::Trouble
            }
            Answer::Network(Err(error)) | Answer::Acquired(Err(error)) | Answer::Renewed(Err(error)) => {
                self.holding.since = None;
                self.holding.fail(now, &seed("lease"), error);
                Happened::Trouble
            }
        }
    }

    fn follow(&mut self, event: Option<Result<LeaseEvent, SubnetError>>) -> Happened {
        match event {
            Some(Ok(LeaseEvent::Own(OwnLease::Changed(lease)))) => {
                self.lease = Some(lease);
                // Whoever wrote it may have given it another end, or the first one.
                self.renew_at = Some(self.clock.now());
                Happened::Lease
            }
            Some(Ok(LeaseEvent::Own(OwnLease::Lost(reason)))) => {
                self.lose(reason);
                Happened::Lease
            }
            Some(Ok(event)) => {
                self.watching.trouble = None;
                Happened::Peers(event)
            }
            Some(Err(error)) => {
                if self.watching.attempts == 0 {
                    tracing::warn!(%error, "the watch of leases failed");
                }
                self.watching.trouble = Some(error);
                Happened::Trouble
            }
            None => {
                self.watch = None;
                let ended = || SubnetError::Unavailable {
                    attempted: "watch the leases".to_owned(),
                    reason: "the stream ended".to_owned(),
                };
                let error = self.watching.trouble.take().unwrap_or_else(ended);
                self.watching.fail(self.clock.now(), &format!("{}/watch", self.node), error);
                Happened::Trouble
            }
        }
    }

    fn hold(&mut self, owned: OwnedLease) -> Happened {
        let now = self.clock.now();
        self.expires = owned.remaining.map(|left| now.saturating_add(left));
        self.renew_at = owned.remaining.map(|left| {
            // Close to the term it would be renewed all the time.
            let margin = if self.margin < left { self.margin.min(left / 20 * 19) } else { left / 3 };
            // However short the term, the store is not asked in a loop.
            now.saturating_add((left - margin).max(SHORTEST_RENEWAL))
        });
        self.lease = Some(owned.lease);
        Happened::Lease
    }

    /// The lease is gone. The kernel is left as it is: the network must not fall with the store.
    fn lose(&mut self, reason: String) {
        tracing::warn!(node = %self.node, %reason, "this node lost its lease and asks for it again");
        self.lease = None;
        self.expires = None;
        self.renew_at = None;
        let error = SubnetError::NotHeld { node: self.node.clone(), reason };
        self.holding.fail(self.clock.now(), &format!("{}/lease", self.node), error);
    }

    /// Gives the lease back.
    pub(super) async fn release(&mut self) -> Result<(), SubnetError> {
        self.job = None;
        self.watch = None;
        let deadline = self.clock.now().saturating_add(DEADLINE);
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
