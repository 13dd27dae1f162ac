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

    /// The next steps as far as they are this domain's: where those are all, as with a peer, they are lent and not copied.
    fn lend(&mut self, domain: &Domain) -> Option<UnitPlan> {
        self.next().filter(|step| step.key().domain() == *domain)?;
        let in_domain = |step: &&Step| step.key().domain() == *domain;
        let steps = if self.done == 0 && self.plan.steps.iter().all(|step| in_domain(&step)) {
            std::mem::take(&mut self.plan.steps)
        } else {
            self.plan.steps.iter().skip(self.done).take_while(in_domain).cloned().collect()
        };
        Some(UnitPlan { unit: self.plan.unit.clone(), steps })
    }

    /// Takes back what was lent, with how it went.
    fn take_back(&mut self, unit: UnitPlan, done: usize, failed: Option<DriverError>, domain: &Domain) {
        let asked = unit.steps.len();
        if self.plan.steps.is_empty() {
            self.plan.steps = unit.steps;
        }
        self.done += done.min(asked);
        // A driver that neither did all nor says why must not be asked for ever.
        self.failed = failed.or_else(|| (done < asked).then(|| no_answer(domain)));
    }
}

/// Applies units stage by stage. A unit that must be left out because what it stands on failed is not in the answer.
pub(super) async fn apply(drivers: &[Arc<dyn Driver>], units: Vec<UnitPlan>) -> Vec<Applied> {
    let mut stages: [Vec<UnitPlan>; 3] = Default::default();
    for unit in units {
        let [ground, peers, leftovers] = &mut stages;
        match unit.unit {
            Unit::Guard(_) | Unit::Host(_) | Unit::Node(_) => ground.push(unit),
            Unit::Devices(_) | Unit::Firewall(_) | Unit::Peer(..) => peers.push(unit),
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
        for (place, applied) in all.iter_mut().enumerate() {
            if let Some(unit) = applied.lend(&domain) {
                places.push(place);
                batch.push(unit);
            }
        }
        let results = match drivers.iter().find(|d| d.domain() == domain) {
            Some(driver) => driver.apply(&batch).await.into_iter().map(|r| (r.done, r.failed)).collect(),
            None => Vec::new(),
        };
        let mut results = results.into_iter();
        for (place, unit) in places.into_iter().zip(batch) {
            let (done, failed) = results.next().unwrap_or_else(|| (0, Some(no_answer(&domain))));
            if let Some(applied) = all.get_mut(place) {
                applied.take_back(unit, done, failed, &domain);
            }
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
