//! One watch: a bounded queue that the store fills and a stream that empties it. A watch that falls
//! behind loses its queue and gets a snapshot; what concerns its own lease is kept.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::Stream;
use futures::stream;
use tokio::sync::Notify;

use super::faults::Disturbance;
use super::state::Shared;
use crate::clock::{Clock, Moment};
use crate::lease::{LeaseEvent, OwnLease};
use crate::subnet::SubnetError;
use crate::types::NodeName;

/// Events that wait for one watch; with more, a snapshot is the shorter way.
pub(super) const CAPACITY: usize = 1024;

pub(super) struct Watcher {
    node: NodeName,
    wake: Arc<Notify>,
    phase: Phase,
    queue: VecDeque<Queued>,
    /// An event that a planned fault lets the next one overtake.
    overtaken: Option<LeaseEvent>,
    /// What happened to the own lease while a snapshot was due.
    own: Option<OwnLease>,
}

struct Queued {
    ready: Moment,
    event: LeaseEvent,
}

enum Phase {
    /// The next item is a snapshot, made when it is asked for.
    SnapshotDue,
    Following,
    Cut(SubnetError),
    Ended,
}

impl Watcher {
    pub(super) fn node(&self) -> &NodeName {
        &self.node
    }

    pub(super) fn wake(&self) {
        // Keeps a permit where nobody waits yet: no wake is lost.
        self.wake.notify_one();
    }

    pub(super) fn push(&mut self, event: LeaseEvent, disturbance: Option<Disturbance>, now: Moment) {
        match self.phase {
            Phase::Following => {}
            Phase::SnapshotDue => {
                // The snapshot will tell of everything but this.
                if let LeaseEvent::Own(own) = event {
                    self.own = Some(own);
                }
                return;
            }
            Phase::Cut(_) | Phase::Ended => return,
        }
        match disturbance {
            Some(Disturbance::Drop) => return,
            Some(Disturbance::Reorder) if self.overtaken.is_none() => {
                self.overtaken = Some(event);
                return;
            }
            Some(Disturbance::Duplicate) => {
                self.queue.push_back(Queued { ready: now, event: event.clone() });
                self.queue.push_back(Queued { ready: now, event });
            }
            Some(Disturbance::Delay(by)) => self.queue.push_back(Queued { ready: now.saturating_add(by), event }),
            Some(Disturbance::Reorder) | None => self.queue.push_back(Queued { ready: now, event }),
        }
        if let Some(event) = self.overtaken.take() {
            self.queue.push_back(Queued { ready: now, event });
        }
        if self.queue.len() > CAPACITY {
            tracing::debug!(node = %self.node, "a watch of leases fell behind: it gets a snapshot");
            self.own = self.queue.drain(..).rev().find_map(|q| match q.event {
                LeaseEvent::Own(own) => Some(own),
                _ => None,
            });
            self.overtaken = None;
            self.phase = Phase::SnapshotDue;
        }
        self.wake();
    }

    pub(super) fn forget_own(&mut self) {
        self.own = None;
        self.queue.retain(|q| !matches!(q.event, LeaseEvent::Own(_)));
        self.overtaken.take_if(|e| matches!(e, LeaseEvent::Own(_)));
    }

    pub(super) fn cut(&mut self, error: SubnetError) {
        if !matches!(self.phase, Phase::Ended) {
            self.phase = Phase::Cut(error);
            self.queue.clear();
            self.own = None;
            self.overtaken = None;
            self.wake();
        }
    }
}

/// The watch of one node. It begins with a snapshot and ends only when it is cut.
pub(super) fn subscribe(
    shared: &Arc<Shared>,
    node: &NodeName,
) -> impl Stream<Item = Result<LeaseEvent, SubnetError>> + use<> {
    let wake = Arc::new(Notify::new());
    let watcher = Watcher {
        node: node.clone(),
        wake: Arc::clone(&wake),
        phase: Phase::SnapshotDue,
        queue: VecDeque::new(),
        overtaken: None,
        own: None,
    };
    let id = shared.lock().register(watcher);
    let subscription = Subscription { shared: Arc::clone(shared), id, wake };
    stream::unfold(subscription, |subscription| async move {
        let item = subscription.next().await?;
        Some((item, subscription))
    })
}

struct Subscription {
    shared: Arc<Shared>,
    id: u64,
    wake: Arc<Notify>,
}

enum Step {
    Item(Result<LeaseEvent, SubnetError>),
    End,
    Wait(Option<(Arc<dyn Clock>, Moment)>),
}

impl Subscription {
    async fn next(&self) -> Option<Result<LeaseEvent, SubnetError>> {
        loop {
            match self.step() {
                Step::Item(item) => return Some(item),
                Step::End => return None,
                Step::Wait(None) => self.wake.notified().await,
                Step::Wait(Some((clock, moment))) => {
                    tokio::select! {
                        () = self.wake.notified() => {}
                        () = clock.sleep_until(moment) => {}
                    }
                }
            }
        }
    }

    fn step(&self) -> Step {
        let mut guard = self.shared.lock();
        let state = &mut *guard;
        let next_expiry = state.next_expiry();
        let Some(watcher) = state.watchers.get_mut(&self.id) else { return Step::End };
        let until = match std::mem::replace(&mut watcher.phase, Phase::Following) {
            Phase::SnapshotDue => {
                if let Some(own) = watcher.own.take() {
                    watcher.queue.push_back(Queued { ready: Moment::ZERO, event: LeaseEvent::Own(own) });
                }
                return Step::Item(Ok(LeaseEvent::Snapshot(state.leases())));
            }
            Phase::Cut(error) => {
                watcher.phase = Phase::Ended;
                return Step::Item(Err(error));
            }
            Phase::Ended => {
                watcher.phase = Phase::Ended;
                return Step::End;
            }
            Phase::Following => match watcher.queue.front() {
                Some(first) if first.ready > state.clock.now() => {
                    Some(next_expiry.map_or(first.ready, |e| e.min(first.ready)))
                }
                Some(_) => match watcher.queue.pop_front() {
                    Some(first) => return Step::Item(Ok(first.event)),
                    None => next_expiry,
                },
                None => next_expiry,
            },
        };
        Step::Wait(until.map(|moment| (Arc::clone(&state.clock), moment)))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.lock().watchers.remove(&self.id);
    }
}
