//! A whole node at work in a bed, and how long it took to bring its peers in.

use std::sync::Arc;
use std::time::Duration;

use podnet::backend::Backend;
use podnet::config::NetworkConfig;
use podnet::lease::Lease;
use podnet::status::Status;
use podnet::subnet::memory::MemorySubnets;
use podnet::types::Stack;
use podnet::underlay::UnderlayChoice;
use podnet::{HostSetting, Node, Overlay, Shutdown};
use tokio::task::JoinHandle;

use crate::Trouble;
use crate::bed::{Bed, UNDERLAY};
use crate::figures::{Cost, Start};
use crate::peers::{NETWORK, OWN_SUBNET};
use crate::stamped::Stamped;

/// How long anything may take.
const DEADLINE: Duration = Duration::from_secs(300);
/// The name of this node.
const NODE: &str = "rke-52b280-0";

/// A store in which all of these hold leases, and this node's subnet is assigned.
pub fn store(leases: impl IntoIterator<Item = Result<Lease, Trouble>>) -> Result<Stamped, Trouble> {
    let store = MemorySubnets::assigned(NetworkConfig::new(Stack::V4(NETWORK.parse()?))?);
    store.assign(&NODE.parse()?, Stack::V4(OWN_SUBNET.parse()?));
    for lease in leases {
        store.faults().inject(lease?);
    }
    Ok(Stamped::new(store))
}

/// A node at work.
#[derive(Debug)]
pub struct Running {
    /// The overlay.
    pub overlay: Arc<dyn Overlay>,
    task: JoinHandle<()>,
    stamped: Stamped,
    begun: Start,
    ended: std::cell::Cell<Option<Start>>,
}

impl Running {
    /// Starts a node with this backend.
    pub async fn start(bed: &Bed, stamped: &Stamped, backend: impl Backend) -> Result<Self, Trouble> {
        let node = Node::builder(NODE, stamped.clone())
            .backend(backend)
            .underlay(UnderlayChoice::Device(UNDERLAY.parse()?))
            .network_namespace(bed.namespace()?)
            .bridge_netfilter(HostSetting::Ignore)
            .build()?;
        let begun = Start::now();
        let (overlay, runner) = node.start().await?;
        let task = tokio::spawn(runner);
        Ok(Running { overlay, task, stamped: stamped.clone(), begun, ended: std::cell::Cell::new(None) })
    }

    /// Its status now.
    pub fn status(&self) -> Arc<Status> {
        Arc::clone(&self.overlay.status().borrow())
    }

    /// Waits until this many peers, and no others, are in the kernel, and the node is ready.
    pub async fn connected(&self, count: usize) -> Result<(), Trouble> {
        let mut status = self.overlay.status();
        let reached = |s: &Arc<Status>| s.peers.connected == count && s.peers.total == count;
        let waited = tokio::time::timeout(DEADLINE, status.wait_for(reached)).await.is_ok_and(|s| s.is_ok());
        self.ended.set(Some(Start::now()));
        if !waited {
            return Err(format!("{count} peers did not connect:\n{}", self.status()).into());
        }
        if !tokio::time::timeout(DEADLINE, status.wait_for(|s| s.is_ready())).await.is_ok_and(|s| s.is_ok()) {
            return Err(format!("the node did not become ready:\n{}", self.status()).into());
        }
        Ok(())
    }

    /// How long it took from the snapshot, and from the start, until the peers were connected.
    pub fn took(&self) -> Result<(Cost, Cost), Trouble> {
        let ended = self.ended.get().ok_or("nothing was waited for")?;
        let snapshot = self.stamped.snapshot().ok_or("there was no snapshot")?;
        Ok((ended.since(snapshot), ended.since(self.begun)))
    }

    /// Ends it, and says so if that was not clean.
    pub async fn stop(self, how: Shutdown) -> Result<(), Trouble> {
        let report = self.overlay.shutdown(how).await?;
        self.task.await?;
        if report.is_clean() {
            Ok(())
        } else {
            Err(format!("the node did not end cleanly: {:?}", report.failed).into())
        }
    }
}
