//! What can go wrong with a store of leases, on demand: failing calls, cut watches, events that are lost,
//! doubled, late or out of order, and leases that nobody may claim. Each fault ends by itself.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::state::Shared;
use crate::lease::Lease;
use crate::subnet::SubnetError;
use crate::types::NodeName;

/// The methods of [`SubnetManager`](crate::subnet::SubnetManager).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Call {
    /// `network`.
    Network,
    /// `acquire`.
    Acquire,
    /// `publish`.
    Publish,
    /// `renew`.
    Renew,
    /// `release`.
    Release,
    /// `watch`: the call itself. What its stream suffers is [`Faults::cut_watches`] and [`Disturbance`].
    Watch,
}

/// What happens to a change on its way to every watch. A snapshot that is due is never disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disturbance {
    /// Nobody hears of it until the next snapshot.
    Drop,
    /// It comes twice.
    Duplicate,
    /// It comes after the change that follows it.
    Reorder,
    /// It, and with it everything behind it, comes so much later.
    Delay(Duration),
}

/// Makes a [`MemorySubnets`](super::MemorySubnets) misbehave. Clones are handles of the same store.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use podnet::config::NetworkConfig;
/// use podnet::subnet::memory::{Call, MemorySubnets};
/// use podnet::subnet::{SubnetError, SubnetManager};
/// use podnet::types::Stack;
///
/// let store = MemorySubnets::assigned(NetworkConfig::new(Stack::V4("10.42.0.0/16".parse()?))?);
/// let down = SubnetError::Unavailable { attempted: "read the network".into(), reason: "connection refused".into() };
/// store.faults().fail_next(Call::Network, 1, down.clone());
/// assert_eq!(store.network().await, Err(down));
/// assert!(store.network().await.is_ok());
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Faults {
    pub(super) shared: Arc<Shared>,
}

impl Faults {
    /// The next `times` calls of a method fail without having done anything. Replaces what was planned for that method.
    pub fn fail_next(&self, call: Call, times: usize, error: SubnetError) {
        self.shared.lock().plan.failures.insert(call, (times, error));
    }

    /// Ends every watch: each still gives the error, then ends. What they had not yet told is lost.
    pub fn cut_watches(&self, error: SubnetError) {
        let mut state = self.shared.lock();
        state.watchers.values_mut().for_each(|watcher| watcher.cut(error.clone()));
    }

    /// Disturbs the next `times` changes, after those that are already planned. A change is whatever makes watches tell
    /// something: a lease that comes, changes, goes or expires.
    pub fn disturb_next(&self, times: usize, disturbance: Disturbance) {
        self.shared.lock().plan.disturbances.push_back((times, disturbance));
    }

    /// Puts a lease into the store as it is, whatever it claims, in place of what its node held. Where the node is one that
    /// watches, it is told that its lease changed. A lease that is not there yet has no term.
    pub fn inject(&self, lease: Lease) {
        self.shared.lock().inject(lease);
    }

    /// Lets another identity overwrite a node's lease: the node loses it, the other one's lease is put in its place as it is.
    pub fn overwrite(&self, victim: &NodeName, by: Lease) {
        let mut state = self.shared.lock();
        if *victim != by.node {
            state.remove(victim, Some(&format!("it was taken by node {}", by.node)));
        }
        state.inject(by);
    }

    /// Takes a node's lease away. An assignment remains: the node can acquire again.
    pub fn revoke(&self, node: &NodeName) {
        self.shared.lock().remove(node, Some("it was revoked"));
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").finish_non_exhaustive()
    }
}

/// What is planned to go wrong.
#[derive(Default)]
pub(super) struct Plan {
    failures: BTreeMap<Call, (usize, SubnetError)>,
    disturbances: VecDeque<(usize, Disturbance)>,
}

impl Plan {
    pub(super) fn failure(&mut self, call: Call) -> Option<SubnetError> {
        let (times, error) = self.failures.get_mut(&call)?;
        *times = times.checked_sub(1)?;
        Some(error.clone())
    }

    pub(super) fn disturbance(&mut self) -> Option<Disturbance> {
        while let Some((times, disturbance)) = self.disturbances.front_mut() {
            if let Some(left) = times.checked_sub(1) {
                *times = left;
                return Some(*disturbance);
            }
            self.disturbances.pop_front();
        }
        None
    }
}
