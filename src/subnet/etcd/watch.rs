//! One watch: a snapshot, then what changes from its revision on, and a new snapshot after anything that may have lost a change.
//! It runs no task: etcd is asked while it is polled, and it holds one answer's events at most.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, sleep_until};

use super::Inner;
use super::client::{Change, Changes, Listing, Told};
use super::view::View;
use crate::lease::{LeaseEvent, OwnLease};
use crate::subnet::SubnetError;
use crate::types::NodeName;

/// Between two times that a node is told that somebody else wrote its offers: it writes its own again, and so would another process
/// that has the same address.
const QUARREL: Duration = Duration::from_secs(5);
/// A watch that breaks sooner did not really work.
const WORKED: Duration = Duration::from_secs(5);
/// So many such breaks, and the watch ends: the next one begins after the watcher's back-off.
const BREAKS: u32 = 3;
/// The longest pause before a new snapshot, so that the watchers of a member that stopped do not all come at once.
const SPREAD: Duration = Duration::from_millis(200);

pub(super) struct Watch {
    inner: Arc<Inner>,
    node: NodeName,
    view: View,
    /// The revision of the snapshot. The watch begins with it once more, and not after it: etcd 3.4 was seen to lose a deletion at the very
    /// revision that was compacted to, and to say nothing (etcd issue 18089).
    from: i64,
    changes: Option<Changes>,
    opened: Instant,
    breaks: u32,
    queue: VecDeque<Result<LeaseEvent, SubnetError>>,
    own: Receiver<()>,
    own_told: Option<Instant>,
    /// When to tell the node what stands in its key now.
    own_due: Option<Instant>,
    ended: bool,
}

enum Woken {
    Told(Result<Told, SubnetError>),
    Own,
    Due,
}

impl Watch {
    /// Begins with a snapshot.
    pub(super) async fn begin(inner: Arc<Inner>, node: NodeName) -> Result<Self, SubnetError> {
        let own = inner.owners.subscribe();
        let mut watch = Watch {
            view: View::new(node.clone(), Vec::new(), Default::default()),
            inner,
            node,
            from: 0,
            changes: None,
            opened: Instant::now(),
            breaks: 0,
            queue: VecDeque::new(),
            own,
            own_told: None,
            own_due: None,
            ended: false,
        };
        let (listing, went_back) = watch.inner.listing(&watch.node).await?;
        watch.snapshot(listing, went_back);
        Ok(watch)
    }

    pub(super) fn into_stream(self) -> impl Stream<Item = Result<LeaseEvent, SubnetError>> {
        stream::unfold(self, |mut watch| async move {
            let item = watch.next().await?;
            Some((item, watch))
        })
    }

    async fn next(&mut self) -> Option<Result<LeaseEvent, SubnetError>> {
        loop {
            if let Some(item) = self.queue.pop_front() {
                return Some(item);
            }
            if self.ended {
                return None;
            }
            match self.wait().await {
                Woken::Told(Ok(Told::Changes(changes))) => self.take(changes),
                Woken::Told(Ok(Told::Compacted)) => {
                    tracing::debug!(node = %self.node, "etcd has forgotten changes since the snapshot: a new one is taken");
                    self.again(None).await;
                }
                Woken::Told(Err(error)) => self.again(Some(error)).await,
                Woken::Own => self.differ(Vec::new()),
                Woken::Due => {
                    self.own_due = None;
                    if let Ok(held) = self.inner.owners.held(&self.node) {
                        self.tell_own(OwnLease::Changed(held.lease_of(&self.node)));
                    }
                }
            }
        }
    }

    async fn wait(&mut self) -> Woken {
        let changes = match &mut self.changes {
            Some(changes) => changes,
            None => match self.inner.etcd.watch(&self.inner.subnets, self.from).await {
                Ok(changes) => {
                    self.opened = Instant::now();
                    self.changes.insert(changes)
                }
                Err(error) => return Woken::Told(Err(error)),
            },
        };
        let due = self.own_due;
        let due = async move {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            told = changes.next() => Woken::Told(told),
            // The sender lives in `inner`.
            _ = self.own.changed() => Woken::Own,
            () = due => Woken::Due,
        }
    }

    fn take(&mut self, changes: Vec<Change>) {
        let mut own = Vec::new();
        for change in &changes {
            let owners = &self.inner.owners;
            own.extend(match change {
                Change::Put(kv) => owners.see(&self.node, kv),
                Change::Delete { key, revision } => owners.see_gone(&self.node, key, *revision),
            });
        }
        self.differ(changes);
        own.into_iter().for_each(|own| self.tell_own(own));
    }

    fn differ(&mut self, changes: Vec<Change>) {
        let before = self.view.unreadable;
        let events = self.view.apply(changes, self.inner.owners.keys(&self.node));
        self.inner.count_unreadable(self.view.unreadable - before);
        self.queue.extend(events.into_iter().map(Ok));
    }

    fn tell_own(&mut self, own: OwnLease) {
        if let OwnLease::Changed(_) = &own {
            let now = Instant::now();
            if let Some(again) = self.own_told.map(|told| told + QUARREL)
                && now < again
            {
                self.own_due = Some(again);
                return;
            }
            self.own_told = Some(now);
        }
        self.queue.push_back(Ok(LeaseEvent::Own(own)));
    }

    /// A new snapshot, after the watch broke or etcd forgot what it needs. Without one the watch ends.
    async fn again(&mut self, broke: Option<SubnetError>) {
        self.changes = None;
        self.breaks = if self.opened.elapsed() < WORKED { self.breaks + 1 } else { 1 };
        // Of one that cannot be opened any more, too.
        self.opened = Instant::now();
        if let Some(error) = broke {
            tracing::debug!(node = %self.node, %error, "the watch of leases broke: a new snapshot is taken");
            if self.breaks > BREAKS {
                self.end(error);
                return;
            }
            sleep(self.inner.up_to(SPREAD)).await;
        } else if self.breaks > BREAKS {
            // Compacted faster than one can read.
            sleep(SPREAD).await;
        }
        match self.inner.list(&self.node).await {
            Ok((listing, went_back)) => self.snapshot(listing, went_back),
            Err(error) => self.end(error),
        }
    }

    fn end(&mut self, error: SubnetError) {
        self.ended = true;
        self.queue.push_back(Err(error));
    }

    fn snapshot(&mut self, listing: Listing, went_back: bool) {
        let own = self.inner.owners.see_all(&self.node, &listing, went_back);
        self.from = listing.revision;
        self.own.mark_unchanged();
        self.view = View::new(self.node.clone(), listing.kvs, self.inner.owners.keys(&self.node));
        self.inner.count_unreadable(self.view.unreadable);
        self.queue.push_back(Ok(LeaseEvent::Snapshot(self.view.leases())));
        if let Some(own) = own {
            self.tell_own(own);
        }
    }
}
