//! Leases in a JSON file, for a small cluster without a datastore. It allocates no subnets: the file says who has which.
//! It never judges what the file claims (admission does), and never changes more of it than a node's own offers.

mod disk;
mod format;
mod notices;
mod state;
#[cfg(test)]
mod tests;
mod watch;

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::{LeaseRequest, LeaseStream, OwnedLease, SubnetError, SubnetManager};
use crate::config::NetworkConfig;
use crate::lease::{Lease, Offer};
use crate::types::NodeName;
use disk::Lock;
use format::Document;
use state::{State, invalid, unreadable};
use watch::Watch;

/// A store of leases in a JSON file. Clones are handles of the same store, and any number of stores may use one file.
///
/// ```json
/// {
///   "network": {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}},
///   "nodes": {
///     "rke-52b280-1": {
///       "subnet": "10.42.1.0/24",
///       "reached": [{"PublicIP": "10.240.0.102", "BackendType": "vxlan",
///                    "BackendData": {"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}}]
///     },
///     "rke-52b280-2": {"subnet": "10.42.2.0/24"}
///   }
/// }
/// ```
///
/// - `network` is what a net-conf.json of flannel says ([`NetConf::for_assigned_subnets`](crate::config::NetConf)).
/// - `nodes` are at most 4 096, by name. Each has a `subnet`, an `ipv6Subnet` or both, and the ways in which it is
///   `reached`, best first: flannel's [lease attributes](crate::flannel::lease_attrs). Without `reached` the node has a
///   subnet, and peers wait until it says more.
/// - Who stands further up is the older: of two nodes that claim the same, the upper one has it. A new node belongs at the
///   end.
/// - Any other key, and a key that is there twice, is an error. All errors are named at once, with line and column. The
///   file has at most 4 MiB.
///
/// There are two kinds of use:
///
/// - [`shared`](FileSubnets::shared): the nodes write how they are reached into one file that all of them have, on one
///   machine or a shared file system.
/// - [`read_only`](FileSubnets::read_only): something else hands the file to every node (configuration management, a
///   ConfigMap). A node whose entry does not say how it is reached fails to publish, and the error has the text to put there.
///
/// # When the file changes
///
/// A watch looks when the kernel says that something happened in the folder of the file (or of the link that leads to
/// it), and every 5 s without being told, since a network file system has no such notices. It sends what became different
/// and nothing else.
///
/// A file that is broken or gone changes nothing: the last good one counts, and the watch says what is wrong, once for each
/// problem and when it has lasted half a second, since an editor may still be writing. When that is over, the watch sends a
/// new snapshot. Only a store that has not seen a good file yet has nothing to go on with.
///
/// A store needs a tokio runtime with I/O and time.
///
/// A running node keeps its network: if `network` changes, the watch says that a restart is needed, and goes on with the
/// nodes.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use futures::StreamExt;
/// use podnet::lease::LeaseEvent;
/// use podnet::subnet::file::FileSubnets;
/// use podnet::subnet::{LeaseRequest, SubnetManager};
/// use podnet::types::Stack;
///
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("cluster.json");
/// std::fs::write(
///     &path,
///     r#"{
///         "network": {"Network": "10.42.0.0/16", "Backend": {"Type": "vxlan"}},
///         "nodes": {"rke-52b280-1": {"subnet": "10.42.1.0/24"}}
///     }"#,
/// )?;
/// let store = FileSubnets::shared(&path);
/// let node = "rke-52b280-1".parse()?;
/// let request = LeaseRequest { node, underlay: Stack::V4("10.240.0.102".parse()?), previous: None };
/// let owned = store.acquire(&request).await?;
/// assert_eq!(owned.lease.subnets, Stack::V4("10.42.1.0/24".parse()?));
///
/// let mut watch = store.watch(&request.node).await?;
/// assert_eq!(watch.next().await, Some(Ok(LeaseEvent::Snapshot(vec![owned.lease]))));
/// let text = std::fs::read_to_string(&path)?;
/// std::fs::write(&path, text.replace(r#""nodes": {"#, r#""nodes": {"new": {"subnet": "10.42.7.0/24"}, "#))?;
/// let Some(Ok(LeaseEvent::Upsert(new))) = watch.next().await else { panic!("a new node") };
/// assert_eq!(new.node.as_str(), "new");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct FileSubnets {
    inner: Arc<Inner>,
    publishing: Publishing,
}

/// What publishing does.
#[derive(Debug, Clone, Copy)]
enum Publishing {
    Writes,
    Compares,
}

struct Inner {
    path: PathBuf,
    /// Held by the one thread that works with the file. Others wait without a thread: should a network file system never
    /// answer, it holds up one of the runtime's threads and no more.
    state: Arc<Mutex<State>>,
    /// Whose turn it is to ask for the lock of the file: within a process, first come, first served.
    turn: Mutex<()>,
}

impl FileSubnets {
    /// A store whose nodes write how they are reached into the file. Nothing is opened yet.
    ///
    /// A write changes the value of the node's own `reached` and no other byte. The new text is written beside the file, synced,
    /// and renamed into its place, with the old one's mode and, where this process may, its owner; a link stays and what it
    /// leads to is replaced. So the process must be able to write in the folder. Writers exclude each other by `flock` on a
    /// file beside it (`.cluster.json.lock`), which stays there empty. A person's editor does not ask for that lock: what is
    /// saved with an old state of the file loses what nodes wrote since, and they write it again as their watch tells them.
    pub fn shared(path: impl Into<PathBuf>) -> Self {
        Self::new(path.into(), Publishing::Writes)
    }

    /// A store that never writes. Nothing is opened yet.
    ///
    /// Publishing succeeds if the file says already what is to be published, and is else [`SubnetError::Invalid`] with the
    /// entry that the file should have for the node. Releasing does nothing: the entry stays.
    pub fn read_only(path: impl Into<PathBuf>) -> Self {
        Self::new(path.into(), Publishing::Compares)
    }

    fn new(path: PathBuf, publishing: Publishing) -> Self {
        FileSubnets { inner: Arc::new(Inner { path, state: Arc::default(), turn: Mutex::new(()) }), publishing }
    }

    /// Writes a node's offers into the file, unless they are there, and says the lease that is in it then. `None`: the
    /// node is not listed. `then` remembers what the node knows of it.
    async fn write(
        &self,
        node: &NodeName,
        offers: &[Offer],
        then: fn(&mut State, &NodeName, &Lease),
    ) -> Result<Option<Lease>, SubnetError> {
        let text = self.offers_text(node, offers)?;
        let _turn = self.inner.turn.lock().await;
        let (real, lock) = self.inner.lock().await?;
        let (node, offers) = (node.clone(), offers.to_vec());
        let write = move |path: &Path, state: &mut State| {
            let content = disk::read(&real).map_err(|error| unreadable(path, error))?;
            let document = Document::read(&content.text).map_err(|reason| invalid(path, reason))?;
            let Some(entry) = document.entry(&node) else { return Ok(None) };
            if entry.offers != offers {
                let new = entry.with_reached(&content.text, &text).unwrap_or_default();
                // What is written is read first: a file that nobody can read must not come from here.
                let says = |new: &str| Document::read(new).ok()?.entry(&node).map(|entry| entry.offers == offers);
                if new.len() > format::MAX_BYTES || says(&new) != Some(true) {
                    let reason = "the file could not be read again with what this node wants to publish in it";
                    return Err(invalid(path, reason.to_owned()));
                }
                disk::replace(&real, &new, &lock).map_err(|error| unwritable(path, &error))?;
            }
            let cluster = state.look(path, true)?;
            let lease = cluster.leases.get(&node).cloned();
            lease.iter().for_each(|lease| then(state, &node, lease));
            Ok(lease)
        };
        self.inner.with_state("write", write).await
    }

    /// Offers as text, or why they cannot be said.
    fn offers_text(&self, node: &NodeName, offers: &[Offer]) -> Result<String, SubnetError> {
        let object = || format!("what node {node} wants to publish in {}", self.inner.path.display());
        format::offers(offers).map_err(|reason| SubnetError::Invalid { object: object(), reason })
    }

    /// Remembers what a node is told of its lease, and says it.
    async fn told(
        &self,
        node: &NodeName,
        find: impl FnOnce(&Path, &mut State) -> Result<Lease, SubnetError> + Send + 'static,
    ) -> Result<OwnedLease, SubnetError> {
        let node = node.clone();
        let lease = self.inner.with_state("read", move |path, state| {
            let lease = find(path, state)?;
            state.tell(&node, Some(lease.clone()));
            Ok(lease)
        });
        Ok(OwnedLease { lease: lease.await?, remaining: None })
    }
}

impl Inner {
    /// Runs `work` on a thread that may block. If nobody waits for it any more it runs to its end.
    async fn with_state<T: Send + 'static>(
        self: &Arc<Self>,
        attempted: &str,
        work: impl FnOnce(&Path, &mut State) -> Result<T, SubnetError> + Send + 'static,
    ) -> Result<T, SubnetError> {
        let mut state = Arc::clone(&self.state).lock_owned().await;
        let inner = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&inner.path, &mut state));
        done.await.unwrap_or_else(|error| {
            let attempted = format!("{attempted} {}", self.path.display());
            Err(SubnetError::Unavailable { attempted, reason: error.to_string() })
        })
    }

    /// Waits for the lock of the file, which other processes may hold, and says which file it is.
    async fn lock(self: &Arc<Self>) -> Result<(PathBuf, Lock), SubnetError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        const BETWEEN: Duration = Duration::from_millis(10);
        let begun = Instant::now();
        loop {
            let lock = self.with_state("lock", |path, _| {
                let real = disk::real(path).map_err(|error| unreadable(path, error.into()))?;
                let lock = disk::try_lock(&real).map_err(|error| unwritable(path, &error))?;
                Ok(lock.map(|lock| (real, lock)))
            });
            if let Some(lock) = lock.await? {
                return Ok(lock);
            }
            if begun.elapsed() >= PATIENCE {
                return Err(SubnetError::Unavailable {
                    attempted: format!("lock {} for writing", self.path.display()),
                    reason: format!("another process has held the .lock file beside it for {} s", PATIENCE.as_secs()),
                });
            }
            sleep(BETWEEN).await;
        }
    }
}

impl fmt::Debug for FileSubnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FileSubnets { inner, publishing } = self;
        f.debug_struct("FileSubnets").field("path", &inner.path).field("publishing", publishing).finish_non_exhaustive()
    }
}

#[async_trait]
impl SubnetManager for FileSubnets {
    async fn network(&self) -> Result<NetworkConfig, SubnetError> {
        let read = |path: &Path, state: &mut State| {
            let network = state.last_good(path)?.network.clone();
            state.network = Some(network.clone());
            Ok(network)
        };
        self.inner.with_state("read", read).await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<OwnedLease, SubnetError> {
        let node = request.node.clone();
        let find = move |path: &Path, state: &mut State| {
            let cluster = state.last_good(path)?;
            cluster.leases.get(&node).cloned().ok_or(SubnetError::NotAssigned { node })
        };
        self.told(&request.node, find).await
    }

    /// Writes into the file, or compares with it: see [`shared`](FileSubnets::shared) and
    /// [`read_only`](FileSubnets::read_only). Unlike the other calls it needs the file to be good now.
    async fn publish(&self, node: &NodeName, offers: &[Offer]) -> Result<OwnedLease, SubnetError> {
        let wanted = match self.publishing {
            Publishing::Writes => {
                let lease = self.write(node, offers, |state, node, lease| state.tell(node, Some(lease.clone())));
                let lease = lease.await?.ok_or_else(|| not_listed(&self.inner.path, node))?;
                return Ok(OwnedLease { lease, remaining: None });
            }
            Publishing::Compares => self.offers_text(node, offers)?,
        };
        let (node_name, offers) = (node.clone(), offers.to_vec());
        let compare = move |path: &Path, state: &mut State| {
            let cluster = state.look(path, false)?;
            let lease = cluster.leases.get(&node_name).ok_or_else(|| not_listed(path, &node_name))?;
            if lease.offers == offers {
                return Ok(lease.clone());
            }
            Err(SubnetError::Invalid {
                object: format!("nodes.{node_name} in {}", path.display()),
                reason: format!(
                    "it is not how the node is reached; put in its place: {}",
                    format::entry_text(&node_name, &lease.subnets, &wanted)
                ),
            })
        };
        self.told(node, compare).await
    }

    async fn renew(&self, node: &NodeName) -> Result<OwnedLease, SubnetError> {
        let name = node.clone();
        let find = move |path: &Path, state: &mut State| {
            let cluster = state.last_good(path)?;
            cluster.leases.get(&name).cloned().ok_or_else(|| not_listed(path, &name))
        };
        self.told(node, find).await
    }

    /// Takes this node's `reached` out of the file; its subnets stay assigned. A read-only store does nothing.
    async fn release(&self, node: &NodeName) -> Result<(), SubnetError> {
        if let Publishing::Writes = self.publishing {
            self.write(node, &[], |state, node, _| state.tell(node, None)).await?;
        }
        let node = node.clone();
        let forget = move |_: &Path, state: &mut State| {
            state.tell(&node, None);
            Ok(())
        };
        self.inner.with_state("release", forget).await
    }

    async fn watch(&self, node: &NodeName) -> Result<LeaseStream, SubnetError> {
        let watch = Watch::begin(Arc::clone(&self.inner), node.clone()).await?;
        // Fused: it never ends, but whoever polls it need not know.
        Ok(watch.into_stream().fuse().boxed())
    }
}

fn not_listed(path: &Path, node: &NodeName) -> SubnetError {
    SubnetError::NotHeld { node: node.clone(), reason: format!("it is not listed in {}", path.display()) }
}

fn unwritable(path: &Path, error: &io::Error) -> SubnetError {
    let advice = match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "; let this process write in the folder, or use the file read-only"
        }
        ErrorKind::ResourceBusy => "; it seems to be mounted: mount its folder instead, or use the file read-only",
        _ => "",
    };
    SubnetError::Unavailable { attempted: format!("write {}", path.display()), reason: format!("{error}{advice}") }
}
