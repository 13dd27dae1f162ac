//! The engine's end: nothing done, everything of ours taken away, or the lease given back as well.
//!
//! The network itself never needs it: dropping the engine leaves the kernel as it is.

use std::collections::BTreeSet;

use super::Engine;
use crate::overlay::Shutdown;
use crate::plan::{Desired, Domain, Prune, SysctlName, Unit, diff};
use crate::status::Report;
use crate::types::Family;

impl Engine {
    pub(super) async fn shut_down(&mut self, how: Shutdown) -> Result<Report, crate::Error> {
        if how == Shutdown::Keep {
            return Ok(Report::default());
        }
        if self.scope.is_none() {
            let reason = "the cluster network is not known yet, so that nothing can be told to be ours";
            return Err(crate::Error::NotReady { reason: reason.to_owned() });
        }
        // Peers first: they stop sending before the way is gone.
        let released = if how == Shutdown::Leave { self.control.release().await } else { Ok(()) };
        let mut report = self.remove_state().await;
        // What was set on a device of ours went with it.
        let ours = |name: &SysctlName| {
            let device =
                |device| self.scope.as_ref().is_some_and(|s| s.devices.contains(device) || s.served.contains(device));
            name.device().is_some_and(device)
        };
        let kept = self.settings_made.iter().filter(|(name, _)| !ours(name));
        report.kept_settings = kept.map(|(name, value)| format!("{name} = {value}")).collect();
        report.lease_kept = released.err().map(|error| error.to_string());
        Ok(report)
    }

    /// Plans towards nothing, and looks again: what is still there is reported.
    async fn remove_state(&mut self) -> Report {
        self.desired = Desired::new();
        self.changed.clear();
        self.failures.clear();
        self.aside.clear();
        // A domain that cannot be read is named below and keeps no other from being cleaned.
        let _ = self.look_at_all().await;
        let mut plan = diff(&self.desired, &self.picture, Prune::Yes);
        self.leave_unseen(&mut plan);
        let mut report = self.apply(plan).await;
        let _ = self.look_at_all().await;
        let refused: BTreeSet<Unit> = report.failed.iter().map(|(unit, _)| unit.clone()).collect();
        for left in diff(&self.desired, &self.picture, Prune::Yes).units {
            if !refused.contains(&left.unit) {
                report.failed.push((left.unit, "it is still there".to_owned()));
            }
        }
        for (domain, error) in &self.unseen {
            let unit = match domain {
                Domain::Firewall => Unit::Firewall(Family::V4),
                Domain::Sysctl => Unit::Host(Family::V4),
                _ => Unit::Node(Family::V4),
            };
            report.failed.push((unit, format!("{domain} could not be read: {error}")));
        }
        report
    }
}
