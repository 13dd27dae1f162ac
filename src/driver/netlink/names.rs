//! Names for the numbers by which the kernel's messages point at devices and nexthop objects.

use std::collections::{BTreeMap, HashMap};

use super::link::RawLink;
use super::nexthop::RawNexthop;
use crate::types::DeviceName;

/// Devices and nexthop objects by number.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) links: BTreeMap<u32, RawLink>,
    pub(super) nexthops: HashMap<u32, RawNexthop>,
}

impl Names {
    pub(super) fn new(
        links: impl IntoIterator<Item = RawLink>,
        nexthops: impl IntoIterator<Item = RawNexthop>,
    ) -> Self {
        Names {
            links: links.into_iter().map(|link| (link.index, link)).collect(),
            nexthops: nexthops.into_iter().map(|object| (object.id, object)).collect(),
        }
    }

    /// The name of a device.
    pub(super) fn device(&self, index: u32) -> Option<DeviceName> {
        self.links.get(&index).and_then(|link| link.name.clone())
    }
}
