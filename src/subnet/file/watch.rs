//! One watch: it looks at the file when told to, and slowly without being told, and says what became different. It runs no
//! task: looking and waiting happen while it is polled, and it holds one look's events at most.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use tokio::time::{Instant, sleep, sleep_until};

use super::Inner;
use super::notices::{self, Folders, Notice, Notices};
use super::state::{Cluster, Told};
use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent, OwnLease};
use crate::subnet::SubnetError;
use crate::types::NodeName;

/// Between two looks without being told.
const POLL: Duration = Duration::from_secs(5);
/// How long a file is broken before it counts as broken: an editor may still be writing.
const SETTLE: Duration = Duration::from_millis(500);
/// Between two times that a node is told that somebody else wrote its offers: it writes its own again, and so would
/// another process that has the same name.
const QUARREL: Duration = POLL;
/// Lets a burst of events become one look.
const BURST: Duration = Duration::from_millis(10);

/// What one look found.
struct Found {
    now: Result<Arc<Cluster>, SubnetError>,
    good: Option<Arc<Cluster>>,
    told: Option<Told>,
    network: Option<NetworkConfig>,
    folders: Folders,
    names: Vec<OsString>,
}

pub(super) struct Watch {
    inner: Arc<Inner>,
    node: NodeName,
    notices: Option<Notices>,
    folders: Folders,
    names: Vec<OsString>,
    next_look: Instant,
    queue: VecDeque<Result<LeaseEvent, SubnetError>>,
    /// What was told of all nodes, our own included.
    known: Arc<Cluster>,
    /// The network that the watcher works with.
    network: Option<NetworkConfig>,
    /// What our own node takes its lease to be, and the last call that told it so.
    own: Option<Lease>,
    own_call: u64,
    offers_told: Option<Instant>,
    broken_since: Option<Instant>,
    /// The problem that was told and is not over.
    standing: Option<SubnetError>,
}

impl Watch {
    /// Begins with a snapshot of the file, or of the last good one.
    pub(super) async fn begin(inner: Arc<Inner>, node: NodeName) -> Result<Self, SubnetError> {
        let (notices, folders) = match notices::subscribe() {
            Ok((notices, folders)) => (Some(notices), folders),
            Err(error) => {
                tracing::info!(
                    %error, path = %inner.path.display(),
                    "no notice of changes to the file can be had: it is looked at every {} s (see fs.inotify.max_user_instances)",
                    POLL.as_secs()
                );
                (None, Folders::default())
            }
        };
        let found = look(&inner, &node, folders, false).await?;
        let known = match (&found.now, &found.good) {
            (Ok(now), _) => Arc::clone(now),
            (Err(_), Some(good)) => Arc::clone(good),
            (Err(error), None) => return Err(error.clone()),
        };
        let mut watch = Watch {
            queue: VecDeque::from([Ok(snapshot(&known))]),
            own: known.leases.get(&node).cloned(),
            own_call: 0,
            offers_told: None,
            inner,
            node,
            notices,
            folders: Folders::default(),
            names: Vec::new(),
            next_look: Instant::now(),
            known,
            network: None,
            broken_since: None,
            standing: None,
        };
        watch.take(found);
        Ok(watch)
    }

    /// As where the kernel has no notices.
    #[cfg(test)]
    pub(super) fn deafen(&mut self) {
        self.notices = None;
    }

    pub(super) fn into_stream(self) -> impl Stream<Item = Result<LeaseEvent, SubnetError>> {
        stream::unfold(self, |mut watch| async move {
            let item = watch.next().await;
            Some((item, watch))
        })
    }

    async fn next(&mut self) -> Result<LeaseEvent, SubnetError> {
        loop {
            if let Some(item) = self.queue.pop_front() {
                return item;
            }
            let again = self.wait().await;
            match look(&self.inner, &self.node, std::mem::take(&mut self.folders), again).await {
                Ok(found) => self.take(found),
                Err(error) => {
                    // The runtime is going down.
                    self.next_look = Instant::now() + POLL;
                    return Err(error);
                }
            }
        }
    }

    /// Waits for the next look. Whether the file must be read then although it seems to be the same.
    async fn wait(&mut self) -> bool {
        let notice = async {
            match &self.notices {
                Some(notices) => notices.next(&self.names).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            notice = notice => match notice {
                Ok(notice) => {
                    sleep(BURST).await;
                    notice == Notice::File
                }
                Err(error) => {
                    tracing::info!(%error, path = %self.inner.path.display(), "no more notices of changes to the file");
                    self.notices = None;
                    false
                }
            },
            () = sleep_until(self.next_look) => false,
        }
    }

    fn take(&mut self, found: Found) {
        let now = Instant::now();
        self.folders = found.folders;
        self.names = found.names;
        self.next_look = now + POLL;
        self.network = found.network.or(self.network.take()).or_else(|| Some(self.known.network.clone()));
        if let Some((call, lease)) = found.told
            && call > self.own_call
        {
            self.own_call = call;
            self.own = lease;
        }
        match found.now {
            Ok(cluster) => self.compare(cluster),
            Err(error) => {
                let since = *self.broken_since.get_or_insert(now);
                if now.saturating_duration_since(since) < SETTLE {
                    self.next_look = since + SETTLE;
                } else if self.standing.as_ref() != Some(&error) {
                    self.standing = Some(error.clone());
                    self.queue.push_back(Err(error));
                }
            }
        }
    }

    fn compare(&mut self, cluster: Arc<Cluster>) {
        self.broken_since = None;
        let before = std::mem::replace(&mut self.known, cluster);
        let problem = self.network_changed();
        if self.standing.is_some() && self.standing != problem {
            // Whoever heard of the problem hears that it is over, though nothing else may be new.
            self.queue.push_back(Ok(snapshot(&self.known)));
        } else {
            self.queue.extend(differences(&before.leases, &self.known.leases, &self.node).map(Ok));
        }
        if let Some(own) = self.own_change() {
            self.queue.push_back(Ok(LeaseEvent::Own(own)));
        }
        if let Some(problem) = &problem
            && (self.standing.as_ref() != Some(problem) || !self.queue.is_empty())
        {
            // Last, and after every event anew: an event alone would say that all is well.
            self.queue.push_back(Err(problem.clone()));
        }
        self.standing = problem;
    }

    fn network_changed(&self) -> Option<SubnetError> {
        let running = self.network.as_ref().filter(|network| **network != self.known.network)?;
        let networks = running.networks();
        let networks = networks.v4().map(ToString::to_string).into_iter().chain(networks.v6().map(ToString::to_string));
        let networks = networks.collect::<Vec<_>>().join(" and ");
        Some(SubnetError::Invalid {
            object: format!("network in {}", self.inner.path.display()),
            reason: format!(
                "it is not the one that this node runs with ({networks}, backend {}): \
                 restart the node's network to take the new one, or put the old one back",
                running.backend_type()
            ),
        })
    }

    fn own_change(&mut self) -> Option<OwnLease> {
        let own = self.own.as_ref()?;
        let Some(lease) = self.known.leases.get(&self.node) else {
            self.own = None;
            return Some(OwnLease::Lost(format!("it is no longer listed in {}", self.inner.path.display())));
        };
        if lease.subnets == own.subnets {
            if lease.offers == own.offers {
                return None;
            }
            let now = Instant::now();
            if let Some(again) = self.offers_told.map(|told| told + QUARREL)
                && now < again
            {
                self.next_look = self.next_look.min(again);
                return None;
            }
            self.offers_told = Some(now);
        }
        self.own = Some(lease.clone());
        Some(OwnLease::Changed(lease.clone()))
    }
}

async fn look(inner: &Arc<Inner>, node: &NodeName, mut folders: Folders, again: bool) -> Result<Found, SubnetError> {
    let node = node.clone();
    inner
        .with_state("watch", move |path, state| {
            // First the notices, then the look: what happens in between is noticed.
            let names = folders.follow(path);
            let now = state.look(path, again);
            Ok(Found {
                now,
                good: state.good.clone(),
                told: state.told(&node),
                network: state.network.clone(),
                folders,
                names,
            })
        })
        .await
}

/// All leases, the oldest first.
fn snapshot(cluster: &Cluster) -> LeaseEvent {
    let mut leases: Vec<Lease> = cluster.leases.values().cloned().collect();
    leases.sort_by(|a, b| a.precedence.cmp(&b.precedence));
    LeaseEvent::Snapshot(leases)
}

/// What became different for everyone but `own`.
fn differences<'a>(
    before: &'a BTreeMap<NodeName, Lease>,
    now: &'a BTreeMap<NodeName, Lease>,
    own: &'a NodeName,
) -> impl Iterator<Item = LeaseEvent> + use<'a> {
    let gone = before.keys().filter(|node| !now.contains_key(*node)).cloned().map(|node| (node, None));
    let news = now.iter().filter(|(node, lease)| before.get(*node) != Some(*lease));
    let news = news.map(|(node, lease)| (node.clone(), Some(lease.clone())));
    gone.chain(news).filter(move |(node, _)| node != own).map(|(node, lease)| match lease {
        Some(lease) => LeaseEvent::Upsert(lease),
        None => LeaseEvent::Remove(node),
    })
}
