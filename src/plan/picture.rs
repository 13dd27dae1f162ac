//! The picture: what of ours is in the kernel, as far as the kernel itself has told.
//!
//! It moves only on a whole observation or on the kernel's acknowledgement of a step; never because a
//! step was sent.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

use super::{Conflict, Domain, Key, Object, Step};
use crate::types::DeviceName;

/// Whose an observed object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Owner {
    /// It bears our mark.
    Ours,
    /// It bears none, but the written rule of adoption says that it is flannel's legacy: it is marked when wanted,
    /// deleted when not.
    Adoptable,
}

/// What of ours is there.
#[derive(Debug, Clone, Default)]
pub struct Picture {
    objects: HashMap<Key, (Object, Owner)>,
    conflicts: BTreeMap<Key, Conflict>,
}

impl Picture {
    /// Knows of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces all that is known of a domain by a new whole observation.
    pub fn observe(&mut self, domain: &Domain, objects: Vec<(Object, Owner)>, conflicts: Vec<Conflict>) {
        self.objects.retain(|key, _| key.domain() != *domain);
        self.conflicts.retain(|key, _| key.domain() != *domain);
        self.objects.extend(objects.into_iter().map(|(o, owner)| (o.key(), (o, owner))));
        self.conflicts.extend(conflicts.into_iter().map(|c| (c.object.clone(), c)));
    }

    /// Takes over what the kernel acknowledged.
    pub fn acknowledge(&mut self, step: &Step) {
        match step {
            Step::Replace { to, .. } => {
                self.objects.insert(to.key(), (to.clone(), Owner::Ours));
            }
            Step::Create(to) | Step::Remake { to, .. } => {
                // Nothing is on a device that is new.
                if let Some(device) = to.makes() {
                    self.forget_dependents(device);
                }
                self.objects.insert(to.key(), (to.clone(), Owner::Ours));
            }
            Step::Delete(object) => {
                if let Some(device) = object.makes() {
                    self.forget_dependents(device);
                }
                self.objects.remove(&object.key());
            }
        }
    }

    /// What the kernel drops with a device.
    fn forget_dependents(&mut self, device: &DeviceName) {
        self.objects.retain(|_, (object, _)| object.device() != Some(device));
    }

    /// The value of a key and whose it is.
    pub fn get(&self, key: &Key) -> Option<(&Object, Owner)> {
        self.objects.get(key).map(|(o, owner)| (o, *owner))
    }

    /// What of others stands in the way of a key.
    pub fn conflict(&self, key: &Key) -> Option<&Conflict> {
        self.conflicts.get(key)
    }

    /// All that stands in the way, ordered by what it keeps out.
    pub fn conflicts(&self) -> impl Iterator<Item = &Conflict> {
        self.conflicts.values()
    }

    /// All objects, in no order.
    pub fn objects(&self) -> impl Iterator<Item = (&Key, &Object, Owner)> {
        self.objects.iter().map(|(k, (o, owner))| (k, o, *owner))
    }

    /// How many objects are known.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }
}
