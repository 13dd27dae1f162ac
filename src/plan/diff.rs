//! The difference between wish and picture, as steps: pure, deterministic, and empty once applied.
//!
//! It decides order (make before break) and what is left alone; it never decides what is wanted.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::{Desired, Fit, Key, Object, Owner, Picture, Plan, Step, Unit, UnitPlan};
use crate::types::DeviceName;

/// Whether a diff may delete what nobody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// Leave leftovers: the set of leases is not known to be whole yet.
    No,
    /// Delete what is ours and unwanted.
    Yes,
}

/// Everything that is to be done.
///
/// Costs time in proportion to wish and picture together.
pub fn diff(desired: &Desired, picture: &Picture, prune: Prune) -> Plan {
    let mut work = Work::new(desired, picture);
    for (unit, _) in desired.units() {
        work.make(unit);
    }
    if prune == Prune::Yes {
        let mut unwanted: Vec<(Key, Object)> = picture
            .objects()
            .filter(|(key, ..)| desired.owner(key).is_none())
            .map(|(key, object, _)| (key.clone(), object.clone()))
            .collect();
        unwanted.sort_by(|(a, _), (b, _)| b.rank().cmp(&a.rank()).then_with(|| a.cmp(b)));
        // A setting of the host is never unset: what it was before is not known after a restart.
        unwanted.retain(|(key, _)| !matches!(key, Key::Sysctl(_)));
        // What dies with its device needs no step of its own.
        let dying: HashSet<DeviceName> = unwanted
            .iter()
            .filter_map(|(_, object)| match object {
                Object::Link(link) => Some(link.name.clone()),
                _ => None,
            })
            .collect();
        for (key, object) in unwanted {
            let dies = !matches!(object, Object::Link(_))
                && object.device().is_some_and(|d| dying.contains(d) || work.remade.contains(d));
            if !dies {
                work.plan.units.push(UnitPlan { unit: Unit::Leftover(key), steps: vec![Step::Delete(object)] });
            }
        }
    }
    work.plan
}

/// What is to be done for some units alone: those that changed, each with what it wanted before.
///
/// Costs time in proportion to those units, however large the rest is.
pub fn diff_units(desired: &Desired, picture: &Picture, changed: &[(Unit, Vec<Object>)]) -> Plan {
    let mut work = Work::new(desired, picture);
    let mut done = BTreeSet::new();
    for (unit, _) in changed {
        if done.insert(unit) {
            work.make(unit);
        }
    }
    let mut deleted = HashSet::new();
    for (unit, before) in changed {
        let mut steps = Vec::new();
        for object in before.iter().rev() {
            let key = object.key();
            let unwanted = desired.owner(&key).is_none() && deleted.insert(key.clone());
            if let Some((there, _)) = picture.get(&key).filter(|_| unwanted) {
                let dies = !matches!(there, Object::Link(_)) && there.device().is_some_and(|d| work.remade.contains(d));
                if !dies {
                    steps.push(Step::Delete(there.clone()));
                }
            }
        }
        work.append(unit, steps);
    }
    work.plan
}

struct Work<'a> {
    desired: &'a Desired,
    picture: &'a Picture,
    /// Devices that this plan makes anew: nothing on them outlives it.
    remade: HashSet<DeviceName>,
    plan: Plan,
    /// Where in the plan a unit's steps are.
    places: HashMap<Unit, usize>,
}

impl<'a> Work<'a> {
    fn new(desired: &'a Desired, picture: &'a Picture) -> Self {
        Work { desired, picture, remade: HashSet::new(), plan: Plan::default(), places: HashMap::new() }
    }

    /// The steps that bring about what a unit wants, up to the first conflict.
    fn make(&mut self, unit: &Unit) {
        let mut steps = Vec::new();
        for object in self.desired.unit(unit) {
            let key = object.key();
            if self.desired.owner(&key) != Some(unit) {
                continue;
            }
            // What is on a device that is not ours is not ours to touch either.
            let device = object.device().map(|d| Key::Link(d.clone()));
            let conflict = self.picture.conflict(&key).or_else(|| self.picture.conflict(device.as_ref()?));
            if let Some(conflict) = conflict {
                if !self.plan.conflicts.contains(conflict) {
                    self.plan.conflicts.push(conflict.clone());
                }
                break;
            }
            steps.extend(self.step(object, &key));
        }
        self.append(unit, steps);
    }

    fn step(&mut self, wanted: &Object, key: &Key) -> Option<Step> {
        let doomed = !matches!(wanted, Object::Link(_)) && wanted.device().is_some_and(|d| self.remade.contains(d));
        let Some((there, owner)) = self.picture.get(key).filter(|_| !doomed) else {
            if let Object::Link(link) = wanted {
                // Whatever the picture says of a device that is not there is out of date.
                self.remade.insert(link.name.clone());
            }
            return Some(Step::Create(wanted.clone()));
        };
        let replace = || Step::Replace { from: there.clone(), to: wanted.clone() };
        match (there, wanted) {
            (Object::Link(is), Object::Link(want)) => match is.fit(want) {
                Fit::Same => (owner == Owner::Adoptable).then(replace),
                Fit::Alter => Some(replace()),
                Fit::Remake(why) => {
                    self.remade.insert(want.name.clone());
                    Some(Step::Remake { from: there.clone(), to: wanted.clone(), why })
                }
            },
            _ => (there != wanted || owner == Owner::Adoptable).then(replace),
        }
    }

    fn append(&mut self, unit: &Unit, steps: Vec<Step>) {
        if steps.is_empty() {
            return;
        }
        match self.places.get(unit).and_then(|place| self.plan.units.get_mut(*place)) {
            Some(plan) => plan.steps.extend(steps),
            None => {
                self.places.insert(unit.clone(), self.plan.units.len());
                self.plan.units.push(UnitPlan { unit: unit.clone(), steps });
            }
        }
    }
}
