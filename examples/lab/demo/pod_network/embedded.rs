//! podnet in this process: all that the demo asks of the library, and the part that an embedder would copy.

use std::sync::Arc;
use std::time::Duration;

use podnet::driver::NetworkNamespace;
use podnet::status::{PeerCounts, PeerStatus, Report};
use podnet::subnet::memory::MemorySubnets;
use podnet::types::Family;
use podnet::{Overlay, Shutdown};

use super::{Ending, Granted, READY, Removed};
use crate::demo::wireguard::Seat;
use crate::demo::{DemoError, DemoSpec, service_network};
use crate::probe::AbortOnDrop;
use crate::{LabError, Node};

/// How long a runner may take to return after a shutdown.
const STOPPED: Duration = Duration::from_secs(5);

/// An overlay and the task that does its work.
#[derive(Debug)]
pub struct Embedded {
    node: String,
    overlay: Arc<dyn Overlay>,
    runner: AbortOnDrop<()>,
    spec: DemoSpec,
    seat: Option<Arc<Seat>>,
}

impl Embedded {
    /// Brings podnet up on a node, in the node's network namespace. It is ready some time later.
    pub(in crate::demo) async fn start(
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

    fn fails(&self, source: podnet::Error) -> DemoError {
        DemoError::Podnet { node: self.node.clone(), source }
    }

    pub(super) async fn wait_ready(&self, peers: usize, reachable: bool) -> Result<(), DemoError> {
        let mut status = self.overlay.status();
        let counted = |counts: PeerCounts| if reachable { counts.connected } else { counts.unreachable };
        let ready = status.wait_for(|status| status.is_ready() && counted(status.peers) == peers);
        match tokio::time::timeout(READY, ready).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(_)) => {
                return Err(DemoError::Runner { node: self.node.clone(), what: "ended by itself".to_owned() });
            }
            Err(_) => {}
        }
        let status = self.overlay.status().borrow().to_string();
        Err(DemoError::NotReady { node: self.node.clone(), after: READY, status })
    }

    pub(super) fn granted(&self) -> Result<Granted, DemoError> {
        let status = self.overlay.status().borrow().clone();
        let granted = status.subnets.zip(status.pod_mtu);
        let granted = granted.map(|(subnets, mtu)| Granted { subnets, mtu: mtu.bytes() });
        let says_nothing = || LabError::Invalid(format!("podnet on {} tells no subnet and MTU for pods", self.node));
        Ok(granted.ok_or_else(says_nothing)?)
    }

    pub(super) async fn plan(&self) -> Result<Vec<String>, DemoError> {
        let plan = self.overlay.plan().await.map_err(|error| self.fails(error))?;
        Ok(plan.steps().map(ToString::to_string).collect())
    }

    pub(super) fn troubled(&self, family: Family) -> Vec<(String, String)> {
        let status = self.overlay.status().borrow().clone();
        let of_family = |peer: &PeerStatus| {
            let states = peer.families.iter().filter(|state| state.family == family);
            states.map(|state| (peer.node.to_string(), state.state.to_string())).collect::<Vec<_>>()
        };
        status.troubled.iter().flat_map(of_family).collect()
    }

    pub(super) async fn end(mut self, how: Ending) -> Result<Removed, DemoError> {
        let how = match how {
            Ending::Stop => Shutdown::Keep,
            Ending::Remove => Shutdown::RemoveState,
            Ending::Kill => {
                return Err(LabError::Invalid("what is in this process cannot be killed alone".to_owned()).into());
            }
        };
        let report = self.overlay.shutdown(how).await.map_err(|error| self.fails(error))?;
        let problem = match tokio::time::timeout(STOPPED, &mut self.runner.0).await {
            Ok(Ok(())) => return Ok(told(report)),
            Ok(Err(error)) => format!("did not end well: {error}"),
            Err(_) => format!("did not return within {STOPPED:?} after a shutdown"),
        };
        Err(DemoError::Runner { node: self.node, what: problem })
    }
}

fn told(report: Report) -> Removed {
    let failed = report.failed.iter().map(|(unit, why)| format!("{unit:?}: {why}"));
    let troubles = failed.chain(report.conflicts.iter().map(ToString::to_string)).collect();
    Removed { steps: report.steps, troubles, kept: report.kept_settings }
}
