//! A plan: the ordered steps that a diff found necessary, grouped by the unit that fails together.

use std::fmt;

use serde::Serialize;

use super::{Key, Object, Unit};

/// One change of one kernel object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Step {
    /// It is not there.
    Create(Object),
    /// It is there, ours, and has another value: change it in place, without a moment in which it is absent.
    Replace {
        /// As it is.
        from: Object,
        /// As it shall be.
        to: Object,
    },
    /// It is there and ours, but the kernel cannot change it in place: delete it, then create it.
    Remake {
        /// As it is.
        from: Object,
        /// As it shall be.
        to: Object,
        /// Which attribute forces it.
        why: String,
    },
    /// It is ours and no longer wanted.
    Delete(Object),
}

impl Step {
    /// Which object the step changes.
    pub fn key(&self) -> Key {
        match self {
            Step::Create(o) | Step::Delete(o) => o.key(),
            Step::Replace { to, .. } | Step::Remake { to, .. } => to.key(),
        }
    }

    /// What the object is after the step.
    pub fn outcome(&self) -> Option<&Object> {
        match self {
            Step::Create(to) | Step::Replace { to, .. } | Step::Remake { to, .. } => Some(to),
            Step::Delete(_) => None,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Create(o) => write!(f, "create {o}"),
            Step::Replace { from, to } => write!(f, "replace {from} by {to}"),
            Step::Remake { from, to, why } => write!(f, "remake {from} as {to} ({why})"),
            Step::Delete(o) => write!(f, "delete {o}"),
        }
    }
}

/// The steps of one unit, in order. The first that fails ends them; other units go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct UnitPlan {
    /// The unit.
    pub unit: Unit,
    /// Its steps: what it needs in the order of dependency, then what it no longer needs in the reverse.
    pub steps: Vec<Step>,
}

/// Something of others that stands where something of ours should. Nothing of it is touched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Conflict {
    /// What of ours is kept out, or does not work.
    pub object: Key,
    /// What stands in the way, in words an operator can search for.
    pub with: String,
    /// What can be done about it.
    pub advice: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} is in the way: {}", self.object, self.with, self.advice)
    }
}

/// What would be done to the kernel, in order, and what cannot be done because something of others is in the way.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Plan {
    /// Units in the order in which they are applied.
    pub units: Vec<UnitPlan>,
    /// What is in the way.
    pub conflicts: Vec<Conflict>,
}

impl Plan {
    /// Whether nothing is to be done. Conflicts do not count: nothing can be done about them here.
    pub fn is_empty(&self) -> bool {
        self.units.is_empty()
    }

    /// All steps in order.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.units.iter().flat_map(|u| u.steps.iter())
    }
}

impl fmt::Display for Plan {
    /// One step a line, then one conflict a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for unit in &self.units {
            for step in &unit.steps {
                writeln!(f, "{step}  # {}", unit.unit)?;
            }
        }
        for conflict in &self.conflicts {
            writeln!(f, "conflict: {conflict}")?;
        }
        Ok(())
    }
}
