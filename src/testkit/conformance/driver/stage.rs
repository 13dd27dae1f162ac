//! A world under trial: building what is wanted there, comparing what is seen, converging. The means of the trials.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Fixture, Samples, World, ensure, is_setting};
use crate::driver::{Driver, Observed};
use crate::plan::{Desired, Fit, Key, Object, Owner, Picture, Plan, Prune, Step, Unit, UnitPlan, diff};

/// A new world, a driver in it, and what it is to make.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) world: Box<dyn World>,
    pub(super) driver: Arc<dyn Driver>,
    pub(super) samples: Samples,
    pub(super) patience: Duration,
}

/// How often a difference may be applied until there is none.
const ROUNDS: usize = 5;

impl Stage {
    pub(super) async fn new(fixture: &dyn Fixture) -> Result<Self, String> {
        let world = fixture.world().await.map_err(|e| format!("the fixture makes no world: {e}"))?;
        let (driver, samples) = (world.driver().await, world.samples());
        Ok(Stage { world, driver, samples, patience: fixture.patience() })
    }

    /// All samples, in the order in which they are made.
    pub(super) fn objects(&self) -> impl DoubleEndedIterator<Item = &Object> {
        self.samples.ground.iter().chain(&self.samples.units).flat_map(|(_, objects)| objects)
    }

    pub(super) async fn observe(&self) -> Result<Observed, String> {
        self.driver.observe(&self.samples.scope).await.map_err(|e| format!("observe: {e}"))
    }

    /// Applies; everything must be done.
    pub(super) async fn apply(&self, units: &[UnitPlan]) -> Result<(), String> {
        let results = self.driver.apply(units).await;
        let one_each = results.len() == units.len();
        ensure(one_each, || format!("of {} units there are {} results", units.len(), results.len()))?;
        for (unit, result) in units.iter().zip(results) {
            let (done, all) = (result.done, unit.steps.len());
            if let Some(error) = result.failed {
                return Err(format!("unit {}: {done} of {all} steps, then: {error}", unit.unit));
            }
            ensure(done == all, || format!("unit {}: {done} of {all} steps, and no error", unit.unit))?;
        }
        Ok(())
    }

    /// Applies in stages, as the engine does.
    pub(super) async fn apply_stages(&self, units: &[UnitPlan]) -> Result<(), String> {
        let is_ground = |plan: &UnitPlan| self.samples.ground.iter().any(|(unit, _)| *unit == plan.unit);
        let (ground, rest): (Vec<UnitPlan>, Vec<UnitPlan>) = units.iter().cloned().partition(is_ground);
        self.apply(&ground).await?;
        self.apply(&rest).await
    }

    pub(super) async fn lay_ground(&self) -> Result<(), String> {
        self.apply(&self.samples.ground.iter().map(plan_of).collect::<Vec<_>>()).await
    }

    /// Creates all samples.
    pub(super) async fn build(&self) -> Result<(), String> {
        self.lay_ground().await?;
        self.apply(&self.samples.units.iter().map(plan_of).collect::<Vec<_>>()).await
    }

    /// The samples as a wish.
    pub(super) fn desired(&self) -> Desired {
        let mut desired = Desired::new();
        for (unit, objects) in self.samples.ground.iter().chain(&self.samples.units) {
            desired.set(unit.clone(), objects.clone());
        }
        desired
    }

    /// What is to be done, by what is seen now.
    pub(super) async fn difference(&self, desired: &Desired) -> Result<Plan, String> {
        let seen = self.observe().await?;
        let mut picture = Picture::new();
        picture.observe(&self.driver.domain(), seen.objects, seen.conflicts);
        Ok(diff(desired, &picture, Prune::Yes))
    }

    /// Observes and applies the difference until there is none.
    pub(super) async fn converge(&self) -> Result<(), String> {
        self.towards(&self.desired()).await?;
        whole(&self.observe().await?, self.objects())?;
        // A driver that believes itself is asked by one that remembers nothing.
        let seen = self.world.driver().await.observe(&self.samples.scope).await;
        let seen = seen.map_err(|e| format!("observe by a new driver: {e}"))?;
        whole(&seen, self.objects()).map_err(|e| format!("seen by a new driver: {e}"))
    }

    /// Takes away all that is ours; settings are set to something else, by others.
    pub(super) async fn clear(&self) -> Result<(), String> {
        for object in self.objects().filter(|object| is_setting(object)) {
            self.world.remove(object).await?;
        }
        self.towards(&Desired::new()).await
    }

    async fn towards(&self, desired: &Desired) -> Result<(), String> {
        let mut last = String::new();
        for _ in 0..ROUNDS {
            let plan = self.difference(desired).await?;
            if plan.is_empty() && plan.conflicts.is_empty() {
                return Ok(());
            }
            let applied = self.apply_stages(&plan.units).await;
            last = format!("{plan}{}", applied.err().unwrap_or_default());
        }
        Err(format!("after {ROUNDS} rounds of observing and applying there is still to do:\n{last}"))
    }
}

pub(super) fn plan_of((unit, objects): &(Unit, Vec<Object>)) -> UnitPlan {
    UnitPlan { unit: unit.clone(), steps: objects.iter().cloned().map(Step::Create).collect() }
}

pub(super) fn delete(object: &Object) -> UnitPlan {
    UnitPlan { unit: Unit::Leftover(object.key()), steps: vec![Step::Delete(object.clone())] }
}

fn fits(seen: &Object, wanted: &Object) -> bool {
    match (seen, wanted) {
        // What a wish leaves open an observation tells.
        (Object::Link(seen), Object::Link(wanted)) => seen.fit(wanted) == Fit::Same,
        _ => seen == wanted,
    }
}

/// Whether an object is observed with this value, as ours.
pub(super) fn is_there(seen: &Observed, object: &Object) -> bool {
    seen.objects.iter().any(|(other, owner)| fits(other, object) && *owner == Owner::Ours)
}

/// Whether all of these are observed, each with its value and as ours.
pub(super) fn whole<'a>(seen: &Observed, wanted: impl Iterator<Item = &'a Object>) -> Result<(), String> {
    for object in wanted {
        let key = object.key();
        match seen.objects.iter().find(|(other, _)| other.key() == key) {
            None => return Err(format!("{object} is not observed")),
            Some((other, owner)) => {
                ensure(fits(other, object), || format!("wanted is {object},\nobserved {other}"))?;
                ensure(*owner == Owner::Ours, || format!("{object} is observed as {owner:?}"))?;
            }
        }
    }
    Ok(())
}

fn by_key(seen: &Observed) -> BTreeMap<Key, (&Object, Owner)> {
    seen.objects.iter().map(|(object, owner)| (object.key(), (object, *owner))).collect()
}

/// Whether two observations tell the same of ours and of what is in its way, in whatever order.
pub(super) fn same(before: &Observed, after: &Observed) -> Result<(), String> {
    let (old, new) = (by_key(before), by_key(after));
    let differs = old.iter().find(|(key, value)| new.get(key) != Some(value));
    ensure(differs.is_none(), || {
        let now = differs.and_then(|(key, _)| new.get(key));
        format!("observed was {differs:?},\nnow it is {now:?}")
    })?;
    let more = new.iter().find(|(key, _)| !old.contains_key(key));
    ensure(more.is_none(), || format!("observed is also {more:?}"))?;
    let conflicts = |seen: &Observed| seen.conflicts.iter().cloned().collect::<std::collections::BTreeSet<_>>();
    let (old, new) = (conflicts(before), conflicts(after));
    ensure(old == new, || format!("in the way was {old:?},\nnow {new:?}"))
}
