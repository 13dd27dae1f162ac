//! [`Overlay`]: what an embedder holds. Subnet management, routing, masquerade, and a life.

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use crate::error::Error;
use crate::lease::Lease;
use crate::masquerade::MasqueradePolicy;
use crate::plan::Plan;
use crate::status::{PeerStatus, Report, RouteInForce, Status};

/// How an overlay ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shutdown {
    /// Stop working and leave everything as it is: pods go on talking. For a restart or an upgrade.
    Keep,
    /// Take away everything of ours from the kernel; the lease stays held.
    RemoveState,
    /// Give the lease back, then take away everything of ours. For a node that leaves the cluster.
    Leave,
}

/// The pod network of this node.
///
/// [`Node::start`](crate::Node::start) returns one as `Arc<dyn Overlay>`; tests of embedders use `testkit::MockOverlay`.
/// All methods may be called from any task. Each is cancel safe: dropping its future withdraws the question;
/// what the engine has begun is finished all the same.
///
/// # Errors
///
/// Every method but `status` answers [`Error::Stopped`] after a shutdown and when the runner was dropped. While the runner
/// exists and nobody polls it they wait.
#[cfg_attr(feature = "testkit", mockall::automock)]
#[async_trait]
pub trait Overlay: Debug + Send + Sync + 'static {
    /// This node's lease.
    ///
    /// # Errors
    /// [`Error::NotReady`] while none is held.
    async fn lease(&self) -> Result<Lease, Error>;

    /// Every other node that holds a lease, by name, and how it is reached or why not; with WireGuard also when a session was last
    /// agreed on, where that can be read within 2 s. Empty until leases are known.
    async fn peers(&self) -> Result<Vec<PeerStatus>, Error>;

    /// What would be changed now, against a new look at the kernel. Touches nothing.
    ///
    /// # Errors
    /// [`Error::NotReady`] while lease, underlay or peers are not known; [`Error::Driver`] if the kernel cannot be read.
    async fn plan(&self) -> Result<Plan, Error>;

    /// Looks at the kernel anew and makes it as it should be, without regard to back-off.
    ///
    /// # Errors
    /// As for `plan`. Steps that fail are not an error here: the report names them.
    async fn reconcile(&self) -> Result<Report, Error>;

    /// The routes of ours in the kernel, by destination, as last observed or acknowledged.
    async fn routes(&self) -> Result<Vec<RouteInForce>, Error>;

    /// The masquerade policy in force.
    async fn masquerade(&self) -> Result<MasqueradePolicy, Error>;

    /// Changes the masquerade policy while running: one transaction a family, no moment without rules. Before this node is
    /// known the policy is kept for later, and the report is empty. What fails is in the report.
    async fn set_masquerade(&self, policy: MasqueradePolicy) -> Result<Report, Error>;

    /// How the overlay is, now and whenever that changes. A change of the counters alone wakes nobody.
    fn status(&self) -> watch::Receiver<Arc<Status>>;

    /// Ends the overlay; the runner returns after it. What could not be taken away, and a lease that could not be given back,
    /// is in the report. After the answer another overlay can start at once.
    ///
    /// # Errors
    /// [`Error::NotReady`] for `RemoveState` and `Leave` while the cluster network is not known: nothing is done, and the
    /// overlay works on.
    async fn shutdown(&self, how: Shutdown) -> Result<Report, Error>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<T: Overlay + ?Sized> Overlay for $pointer<T> {
            async fn lease(&self) -> Result<Lease, Error> {
                (**self).lease().await
            }
            async fn peers(&self) -> Result<Vec<PeerStatus>, Error> {
                (**self).peers().await
            }
            async fn plan(&self) -> Result<Plan, Error> {
                (**self).plan().await
            }
            async fn reconcile(&self) -> Result<Report, Error> {
                (**self).reconcile().await
            }
            async fn routes(&self) -> Result<Vec<RouteInForce>, Error> {
                (**self).routes().await
            }
            async fn masquerade(&self) -> Result<MasqueradePolicy, Error> {
                (**self).masquerade().await
            }
            async fn set_masquerade(&self, policy: MasqueradePolicy) -> Result<Report, Error> {
                (**self).set_masquerade(policy).await
            }
            fn status(&self) -> watch::Receiver<Arc<Status>> {
                (**self).status()
            }
            async fn shutdown(&self, how: Shutdown) -> Result<Report, Error> {
                (**self).shutdown(how).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);
