//! The wish: units of objects. An object that several units want is made by one of them and lives as long as any wants it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use serde::Serialize;

use super::{Key, Object};
use crate::types::{Family, NodeName};

/// What is created, fails and is retried together.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Unit {
    /// What keeps pod packets of a family from leaving in plain text, applied before all else.
    Guard(Family),
    /// This node's settings of the host, applied before its devices.
    Host(Family),
    /// This node's own devices and addresses in a family.
    Node(Family),
    /// Settings of this node's own devices in a family, applied once they are there; nothing rests on them.
    Devices(Family),
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
            Unit::Guard(family) => write!(f, "guard against plain text, {family}"),
            Unit::Host(family) => write!(f, "host settings, {family}"),
            Unit::Node(family) => write!(f, "this node, {family}"),
            Unit::Devices(family) => write!(f, "settings of this node's devices, {family}"),
            Unit::Firewall(family) => write!(f, "firewall, {family}"),
            Unit::Peer(name, family) => write!(f, "peer {name}, {family}"),
            Unit::Leftover(key) => write!(f, "leftover {key}"),
        }
    }
}

/// All that is wanted of the kernel.
///
/// A key belongs to the first of the units that want it, in the order of units: a device that both families share is made with
/// IPv4, and passes to IPv6 when IPv4 goes. Admission has seen to it that no two peers want one.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    units: BTreeMap<Unit, Vec<Object>>,
    owners: HashMap<Key, Unit>,
    /// Who else wants what has an owner. Few keys are shared, so that they are kept apart from the many.
    shared: HashMap<Key, BTreeSet<Unit>>,
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
            self.disown(&unit, &object.key());
        }
        if !objects.is_empty() {
            for object in &objects {
                self.own(&unit, object.key());
            }
            self.units.insert(unit, objects);
        }
        before
    }

    fn own(&mut self, unit: &Unit, key: Key) {
        match self.owners.get_mut(&key) {
            None => {
                self.owners.insert(key, unit.clone());
            }
            Some(owner) if owner == unit => {}
            Some(owner) => {
                let other = if *unit < *owner { std::mem::replace(owner, unit.clone()) } else { unit.clone() };
                self.shared.entry(key).or_default().insert(other);
            }
        }
    }

    fn disown(&mut self, unit: &Unit, key: &Key) {
        let others = self.shared.get_mut(key);
        if self.owners.get(key) != Some(unit) {
            if let Some(others) = others {
                others.remove(unit);
            }
        } else if let Some(heir) = others.and_then(BTreeSet::pop_first) {
            self.owners.insert(key.clone(), heir);
        } else {
            self.owners.remove(key);
        }
        if self.shared.get(key).is_some_and(BTreeSet::is_empty) {
            self.shared.remove(key);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Address;

    fn address(address: &str) -> Object {
        Object::Address(Address { device: "wg0".parse().unwrap(), address: address.parse().unwrap() })
    }

    #[test]
    fn what_two_units_want_is_the_first_ones_and_outlives_either() {
        let (shared, v4, v6) = (address("10.42.0.0/32"), Unit::Node(Family::V4), Unit::Node(Family::V6));
        let mut desired = Desired::new();
        desired.set(v6.clone(), vec![shared.clone()]);
        desired.set(v4.clone(), vec![shared.clone(), address("10.42.1.0/32")]);
        assert_eq!((desired.owner(&shared.key()), desired.len()), (Some(&v4), 2));
        desired.set(v4.clone(), Vec::new());
        assert_eq!((desired.owner(&shared.key()), desired.get(&shared.key())), (Some(&v6), Some(&shared)));
        desired.set(v4.clone(), vec![shared.clone()]);
        desired.set(v6.clone(), Vec::new());
        assert_eq!(desired.owner(&shared.key()), Some(&v4));
        desired.set(v4, Vec::new());
        assert!(desired.is_empty() && desired.shared.is_empty());
    }
}
