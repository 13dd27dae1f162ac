//! The wish: units of objects, each object wanted by one unit.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::Serialize;

use super::{Key, Object};
use crate::types::{Family, NodeName};

/// What is created, fails and is retried together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Unit {
    /// This node's settings of the host, applied before all else.
    Host(Family),
    /// This node's own devices and addresses in a family.
    Node(Family),
    /// The firewall rules of a family.
    Firewall(Family),
    /// What one peer needs in one family.
    Peer(NodeName, Family),
    /// One object of ours that no unit wants: left by an earlier run or put there by somebody else.
    Leftover(Key),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Host(family) => write!(f, "host settings, {family}"),
            Unit::Node(family) => write!(f, "this node, {family}"),
            Unit::Firewall(family) => write!(f, "firewall, {family}"),
            Unit::Peer(name, family) => write!(f, "peer {name}, {family}"),
            Unit::Leftover(key) => write!(f, "leftover {key}"),
        }
    }
}

/// All that is wanted of the kernel.
///
/// A key belongs to the unit that asked for it last; admission has seen to it that no two peers want one.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    units: BTreeMap<Unit, Vec<Object>>,
    owners: HashMap<Key, Unit>,
}

impl Desired {
    /// Wants nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what a unit wants, replacing what it wanted before; nothing removes the unit. Returns what it wanted before.
    pub fn set(&mut self, unit: Unit, objects: Vec<Object>) -> Vec<Object> {
        let before = self.units.remove(&unit).unwrap_or_default();
        for object in &before {
            let key = object.key();
            if self.owners.get(&key) == Some(&unit) {
                self.owners.remove(&key);
            }
        }
        if !objects.is_empty() {
            for object in &objects {
                self.owners.insert(object.key(), unit.clone());
            }
            self.units.insert(unit, objects);
        }
        before
    }

    /// What a unit wants, in order.
    pub fn unit(&self, unit: &Unit) -> &[Object] {
        self.units.get(unit).map(Vec::as_slice).unwrap_or_default()
    }

    /// All units in the order in which they are applied.
    pub fn units(&self) -> impl Iterator<Item = (&Unit, &[Object])> {
        self.units.iter().map(|(u, o)| (u, o.as_slice()))
    }

    /// The unit that wants the object of this key.
    pub fn owner(&self, key: &Key) -> Option<&Unit> {
        self.owners.get(key)
    }

    /// The wanted value of a key.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.owners.get(key).and_then(|unit| self.unit(unit).iter().find(|o| o.key() == *key))
    }

    /// How many objects are wanted.
    pub fn len(&self) -> usize {
        self.owners.len()
    }

    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }
}
