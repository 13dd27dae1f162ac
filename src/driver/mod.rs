//! Drivers make the kernel hold the objects of one [domain](crate::plan::Domain), and tell what is there.
//!
//! A driver knows nothing of leases, peers or policy. It is handed steps, not wishes: what to do was decided by
//! [`diff`](fn@crate::plan::diff), and the engine is the only caller of [`Driver::apply`].

mod error;
pub mod firewall;
mod host;
pub mod iptables;
#[cfg(test)]
mod isolated;
mod namespace;
pub mod netlink;
pub mod nftables;
mod notifications;
mod scope;
mod session;
pub mod sysctl;

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use futures::stream::BoxStream;

pub use error::{DriverError, Errno};
pub use host::{HostAddress, HostLink, HostRoute, HostView};
pub use namespace::{NetworkNamespace, SocketSource};
pub(crate) use scope::OnLink;
pub use scope::{Scope, SeenRoute};
pub use session::{PeerSession, SessionState};

use crate::plan::{Conflict, Domain, Key, Object, Owner, UnitPlan};
use crate::types::DeviceName;

/// The stream that [`Driver::changes`] returns.
pub type ChangeStream = BoxStream<'static, Change>;

/// Everything that a driver found.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// What is ours, or is to be taken over.
    pub objects: Vec<(Object, Owner)>,
    /// What of others stands in the way of something of ours, or undoes it.
    pub conflicts: Vec<Conflict>,
    /// What of others does not keep ours out of the kernel, but hampers it or stands beside it: reported, and no
    /// reason to hold anything back.
    pub warnings: Vec<Conflict>,
    /// What the host has beside; from the netlink driver alone.
    pub host: Option<HostView>,
    /// Why a part of the domain could not be read, where the rest could: what it is, `conflicts` name. It is looked at again soon, and
    /// the time of this look does not count, since it was spent waiting.
    pub unread: Option<DriverError>,
}

/// A hint that the kernel's state moved. Hints can be lost, late and double: they say when to look, not what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// An object in the scope of ours is there, with this value.
    Present(Object),
    /// An object of ours is gone.
    Gone(Key),
    /// Something of a device of ours changed, or of something that ours depend on: look again.
    Device(DeviceName),
    /// A device that is not ours came, went, or changed its state, name or MTU.
    Link(DeviceName),
    /// Addresses or routes of the host changed: the underlay may be another.
    Host,
    /// Something in a domain moved, or hints about that domain alone were lost: observe it again.
    Domain(Domain),
    /// Hints were lost (`ENOBUFS`), or cannot say what happened: look at everything.
    Unknown,
}

/// How far the steps of one unit got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnitResult {
    /// How many of its steps the kernel acknowledged, from the first on.
    pub done: usize,
    /// Why the next one failed; `None` when all were done.
    pub failed: Option<DriverError>,
}

impl UnitResult {
    /// Notes how the next step went, and says whether the unit goes on: it ends at its first failure. For a driver that does one
    /// step after the other:
    ///
    /// ```
    /// use podnet::driver::{DriverError, UnitResult};
    /// use podnet::plan::{Step, UnitPlan};
    ///
    /// async fn one_by_one(unit: &UnitPlan, step: impl AsyncFn(&Step) -> Result<(), DriverError>) -> UnitResult {
    ///     let mut result = UnitResult::default();
    ///     for next in &unit.steps {
    ///         if !result.note(step(next).await) {
    ///             break;
    ///         }
    ///     }
    ///     result
    /// }
    /// ```
    #[must_use = "a step after one that failed must not be done"]
    pub fn note(&mut self, outcome: Result<(), DriverError>) -> bool {
        match outcome {
            Ok(()) => self.done += 1,
            Err(error) => self.failed = Some(error),
        }
        self.failed.is_none()
    }
}

/// One domain of the kernel.
///
/// # Contract
///
/// - `observe` is whole or an error: an interrupted dump is repeated, never handed on. Where the kernel does not tell of
///   it, as with neighbours and forwarding entries, one that a list left out leads to a needless step, which changes
///   nothing. Whoever waits for others (a daemon behind a device) may leave out what is on an object that could not be
///   read, tells that object as a conflict, and why in [`Observed::unread`].
/// - `apply` returns one result for each unit, in order. Units are independent; the steps of one unit are done in
///   order and end at its first failure. Deleting what is absent is success; creating what is there with the wanted
///   value is success if it is ours.
/// - Dropping the future of `apply` may leave steps done that nobody heard of: the caller observes again.
/// - A step is never applied to what is not ours: where that comes out only in the kernel's answer (`EEXIST`), the
///   step fails.
#[async_trait]
pub trait Driver: Debug + Send + Sync + 'static {
    /// The domain that it serves.
    fn domain(&self) -> Domain;

    /// All that is ours in the domain, and what stands in its way. Cancel safe.
    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError>;

    /// Does the steps of these units, in batches. Not cancel safe in the sense above.
    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult>;

    /// Hints from now on. The stream is bounded: what does not fit becomes one [`Change::Unknown`]. It ends only when the
    /// driver cannot listen any more; the caller may ask again. A domain of which the kernel tells nothing
    /// returns a stream that never yields.
    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError>;

    /// What tunnels of this domain tell of their peers now, one for each subnet; none where there is nothing to tell. Asked for
    /// when somebody asks for the peers, also while `apply` is at work, and given up after 2 s. Cancel safe.
    async fn sessions(&self) -> Result<Vec<PeerSession>, DriverError> {
        Ok(Vec::new())
    }
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<T: Driver + ?Sized> Driver for $pointer<T> {
            fn domain(&self) -> Domain {
                (**self).domain()
            }
            async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
                (**self).observe(scope).await
            }
            async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
                (**self).apply(units).await
            }
            async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
                (**self).changes(scope).await
            }
            async fn sessions(&self) -> Result<Vec<PeerSession>, DriverError> {
                (**self).sessions().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);
