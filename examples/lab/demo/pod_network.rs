//! podnet on one node: all that the demo asks of the library, and the part that an embedder would copy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use podnet::driver::NetworkNamespace;
use podnet::status::{PeerCounts, Report};
use podnet::subnet::memory::MemorySubnets;
use podnet::types::Family;
use podnet::{Overlay, Shutdown};

use super::wireguard::Seat;
use super::{DemoError, DemoSpec, service_network};
use crate::probe::AbortOnDrop;
use crate::{LabError, Node};

/// How long an overlay may take to become ready. Seen: some 10 ms.
const READY: Duration = Duration::from_secs(10);
/// How long a runner may take to return after a shutdown.
const STOPPED: Duration = Duration::from_secs(5);

/// An overlay and the task that does its work.
#[derive(Debug)]
pub struct PodNetwork {
    node: String,
    overlay: Arc<dyn Overlay>,
    runner: AbortOnDrop<()>,
    spec: DemoSpec,
    seat: Option<Arc<Seat>>,
}

impl PodNetwork {
    /// Brings podnet up on a node, in the node's network namespace. It is ready some time later: [`PodNetwork::wait_ready`].
    pub(super) async fn start(
        node: &Node,
        subnets: &MemorySubnets,
        spec: DemoSpec,
        seat: Option<Arc<Seat>>,
    ) -> Result<Self, DemoError> {
        let namespace = node
            .netns()
            .fd()
            .try_clone_to_owned()
            .map_err(|source| LabError::Io { what: format!("duplicating the namespace of {}", node.name()), source })?;
        let fails = |source| DemoError::Podnet { node: node.name().to_owned(), source };
        let namespace = NetworkNamespace::File(Arc::new(namespace));
        let builder = spec.backend.on(podnet::Node::builder(node.name(), subnets.clone()), seat.as_deref())?;
        let mut builder = spec.masquerade.on(builder.network_namespace(namespace))?;
        for family in node.addresses().families() {
            let network = service_network(family);
            let parsed = network.parse().map_err(|e| LabError::Invalid(format!("{network}: {e}")))?;
            builder = builder.reserve(parsed, "the service network");
        }
        let (overlay, runner) = builder.build().map_err(fails)?.start().await.map_err(fails)?;
        Ok(Self { node: node.name().to_owned(), overlay, runner: AbortOnDrop(tokio::spawn(runner)), spec, seat })
    }

    /// The overlay's device of a family on this node, where it has one.
    pub fn device(&self, family: Family) -> Option<&str> {
        match &self.seat {
            Some(seat) => Some(seat.device(family)),
            None => self.spec.backend.device(family),
        }
    }

    /// The handle.
    pub fn overlay(&self) -> &dyn Overlay {
        &*self.overlay
    }

    /// Puts the node's name before an error of podnet.
    pub fn fails(&self, source: podnet::Error) -> DemoError {
        DemoError::Podnet { node: self.node.clone(), source }
    }

    /// Waits until podnet says that this node is ready and that all of `peers` others are connected, or all of them unreachable; returns how long that
    /// took.
    pub async fn wait_ready(&self, peers: usize, reachable: bool) -> Result<Duration, DemoError> {
        let start = Instant::now();
        let mut status = self.overlay.status();
        let counted = |counts: PeerCounts| if reachable { counts.connected } else { counts.unreachable };
        let ready = status.wait_for(|status| status.is_ready() && counted(status.peers) == peers);
        match tokio::time::timeout(READY, ready).await {
            Ok(Ok(_)) => return Ok(start.elapsed()),
            Ok(Err(_)) => {
                return Err(DemoError::Runner { node: self.node.clone(), what: "ended by itself".to_owned() });
            }
            Err(_) => {}
        }
        let status = self.overlay.status().borrow().to_string();
        Err(DemoError::NotReady { node: self.node.clone(), after: READY, status })
    }

    /// Stops podnet and waits until its task has returned.
    pub async fn stop(mut self, how: Shutdown) -> Result<Report, DemoError> {
        let report = self.overlay.shutdown(how).await.map_err(|error| self.fails(error))?;
        let problem = match tokio::time::timeout(STOPPED, &mut self.runner.0).await {
            Ok(Ok(())) => return Ok(report),
            Ok(Err(error)) => format!("did not end well: {error}"),
            Err(_) => format!("did not return within {STOPPED:?} after a shutdown"),
        };
        Err(DemoError::Runner { node: self.node, what: problem })
    }
}
