//! Takes a plan through the drivers: in stages, so that nothing is put on a device that is not there yet, and within a
//! stage in batches for each domain. Decides nothing.

use std::sync::Arc;

use crate::driver::{Driver, DriverError};
use crate::plan::{Domain, Step, Unit, UnitPlan};
use crate::types::Family;

/// What became of the steps of a unit.
#[derive(Debug)]
pub(super) struct Applied {
    pub(super) plan: UnitPlan,
    /// How many of its steps were acknowledged.
    pub(super) done: usize,
    pub(super) failed: Option<DriverError>,
}

impl Applied {
    fn next(&self) -> Option<&Step> {
        if self.failed.is_some() { None } else { self.plan.steps.get(self.done) }
    }

    /// The next steps as far as one driver can do them.
    fn run(&self) -> Option<(Domain, UnitPlan)> {
        let domain = self.next()?.key().domain();
        let rest = self.plan.steps.iter().skip(self.done);
        let steps = rest.take_while(|step| step.key().domain() == domain).cloned().collect();
        Some((domain, UnitPlan { unit: self.plan.unit.clone(), steps }))
    }
}

/// Applies units stage by stage. A unit that must be left out because what it stands on failed is not in the answer.
pub(super) async fn apply(drivers: &[Arc<dyn Driver>], units: Vec<UnitPlan>) -> Vec<Applied> {
    let mut stages: [Vec<UnitPlan>; 3] = Default::default();
    for unit in units {
        let [ground, peers, leftovers] = &mut stages;
        match unit.unit {
            Unit::Host(_) | Unit::Node(_) => ground.push(unit),
            Unit::Firewall(_) | Unit::Peer(..) => peers.push(unit),
            Unit::Leftover(_) => leftovers.push(unit),
        }
    }
    let mut all: Vec<Applied> = Vec::new();
    for stage in stages {
        let broken: Vec<Family> = all
            .iter()
            .filter(|a| a.failed.is_some())
            .filter_map(|a| if let Unit::Node(family) = a.plan.unit { Some(family) } else { None })
            .collect();
        let stands = |unit: &Unit| !matches!(unit, Unit::Peer(_, family) if broken.contains(family));
        all.extend(apply_stage(drivers, stage.into_iter().filter(|u| stands(&u.unit)).collect()).await);
    }
    all
}

async fn apply_stage(drivers: &[Arc<dyn Driver>], units: Vec<UnitPlan>) -> Vec<Applied> {
    let mut all: Vec<Applied> = units.into_iter().map(|plan| Applied { plan, done: 0, failed: None }).collect();
    // Each round takes every unit to the end of its run of steps in one domain.
    while let Some(domain) = all.iter().find_map(|a| a.next().map(|step| step.key().domain())) {
        let mut places = Vec::new();
        let mut batch = Vec::new();
        for (place, applied) in all.iter().enumerate() {
            if let Some((_, unit)) = applied.run().filter(|(d, _)| *d == domain) {
                places.push(place);
                batch.push(unit);
            }
        }
        let results = match drivers.iter().find(|d| d.domain() == domain) {
            Some(driver) => driver.apply(&batch).await.into_iter().map(|r| (r.done, r.failed)).collect(),
            None => Vec::new(),
        };
        let mut results = results.into_iter();
        for (place, unit) in places.into_iter().zip(&batch) {
            let Some(applied) = all.get_mut(place) else { continue };
            let (done, failed) = results.next().unwrap_or_else(|| (0, Some(no_answer(&domain))));
            applied.done += done.min(unit.steps.len());
            // A driver that neither did all nor says why must not be asked for ever.
            applied.failed = failed.or_else(|| (done < unit.steps.len()).then(|| no_answer(&domain)));
        }
    }
    all
}

fn no_answer(domain: &Domain) -> DriverError {
    DriverError::Unsupported {
        attempted: format!("apply steps of the domain {domain}"),
        detail: "no driver serves it, or the driver gave no result".to_owned(),
    }
}
