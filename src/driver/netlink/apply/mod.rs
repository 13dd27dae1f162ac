//! Steps of many units at once: the first step of all units, then the second of those that still live, and so on, so that what
//! is many goes in batches although each unit is in order.
//!
//! Units that make something come before units that only delete: a change that reaches from one unit into another (a
//! forwarding entry's new remote, and the old one as a leftover) has no gap.
//!
//! This file is the order; [`devices`] goes one by one, [`batches`] with [`objects`] many at once.

mod batches;
mod devices;
mod objects;

use std::collections::HashMap;

use ipnetwork::IpNetwork;

use super::link::{self, RawLink};
use super::nexthops::RouteKey;
use super::requester::Trouble;
use super::{ALIAS, Core, address};
use crate::driver::{DriverError, Errno, UnitResult};
use crate::plan::{Key, NextHop, Object, Route, Step, UnitPlan};
use crate::types::DeviceName;

/// Does the steps.
pub(super) async fn apply(core: &mut Core, units: &[UnitPlan]) -> Vec<UnitResult> {
    let coming: Vec<RouteKey> =
        units.iter().flat_map(|unit| &unit.steps).filter_map(|step| gateway_route(step.outcome()?)).collect();
    core.nexthops.begin();
    core.nexthops.decide(coming.iter());
    let mut run = Run { core, units, results: vec![UnitResult::default(); units.len()], devices: HashMap::new() };
    let deletes = |unit: &UnitPlan| unit.steps.iter().all(|step| matches!(step, Step::Delete(_)));
    let (last, first): (Vec<usize>, Vec<usize>) = (0..units.len()).partition(|i| units.get(*i).is_some_and(deletes));
    for mut alive in [first, last] {
        let mut column = 0;
        loop {
            alive.retain(|i| run.step(*i, column).is_some() && run.results.get(*i).is_some_and(|r| r.failed.is_none()));
            if alive.is_empty() {
                break;
            }
            run.column(&alive, column).await;
            column += 1;
        }
    }
    // Of what routes have lost here, and of what a killed run made and no route ever named.
    run.sweep().await;
    run.core.nexthops.end();
    run.results
}

/// The key of a route that can name a nexthop object.
fn gateway_route(object: &Object) -> Option<RouteKey> {
    match object {
        Object::Route(Route { destination: IpNetwork::V4(destination), metric, next: NextHop::Gateway { .. } }) => {
            Some((*destination, *metric))
        }
        _ => None,
    }
}

struct Run<'a> {
    core: &'a mut Core,
    units: &'a [UnitPlan],
    results: Vec<UnitResult>,
    /// Devices by name as they are now; asked for once, and again after each change. `None`: there is none.
    devices: HashMap<DeviceName, Option<RawLink>>,
}

impl<'a> Run<'a> {
    fn step(&self, unit: usize, column: usize) -> Option<&'a Step> {
        self.units.get(unit).and_then(|unit| unit.steps.get(column))
    }

    fn settle(&mut self, unit: usize, outcome: Result<(), DriverError>) {
        if let Some(result) = self.results.get_mut(unit) {
            let _ = result.note(outcome);
        }
    }

    /// One step of each of these units: devices, their addresses, then all else in batches; deletions the other way round.
    async fn column(&mut self, units: &[usize], column: usize) {
        let mut order: Vec<(u8, usize, &'a Step)> =
            units.iter().filter_map(|unit| self.step(*unit, column).map(|step| (place(step), *unit, step))).collect();
        order.sort_by_key(|(place, ..)| *place);
        let mut batch = Vec::new();
        for (place, unit, step) in order {
            if place == BATCH {
                batch.push((unit, step));
                continue;
            }
            if place > BATCH && !batch.is_empty() {
                self.batch(std::mem::take(&mut batch)).await;
            }
            let outcome = self.single(step).await;
            self.settle(unit, outcome);
        }
        if !batch.is_empty() {
            self.batch(batch).await;
        }
    }

    /// A device as it is now.
    fn device(&mut self, name: &DeviceName) -> Result<Option<RawLink>, Trouble> {
        if let Some(known) = self.devices.get(name) {
            return Ok(known.clone());
        }
        let found = match self.core.requester.ask(&mut link::get(name), link::decode) {
            Ok(mut links) => links.pop(),
            Err(Trouble::Refused(Errno::NODEV, _)) => None,
            Err(trouble) => return Err(trouble),
        };
        self.devices.insert(name.clone(), found.clone());
        Ok(found)
    }

    /// The index of a device that must be there.
    fn index(&mut self, name: &DeviceName) -> Result<u32, Trouble> {
        match self.device(name)? {
            Some(link) => Ok(link.index),
            None => Err(Trouble::Refused(Errno::NODEV, format!("there is no device {name}"))),
        }
    }

    /// The index of a device of ours, for what is to be on it. Somebody may have put another one in its place since the last look, or it
    /// could not be marked a moment ago.
    fn own_index(&mut self, step: &Step, name: &DeviceName) -> Result<u32, DriverError> {
        match self.device(name).map_err(|trouble| trouble.error(step.to_string()))? {
            Some(link) if link.alias == ALIAS => Ok(link.index),
            Some(foreign) => Err(DriverError::InTheWay {
                attempted: step.to_string(),
                with: foreign.describe(),
                advice: "delete or rename it".to_owned(),
            }),
            None => Err(Trouble::Refused(Errno::NODEV, format!("there is no device {name}")).error(step.to_string())),
        }
    }

    /// A step on a device or an address.
    async fn single(&mut self, step: &Step) -> Result<(), DriverError> {
        match step {
            Step::Create(Object::Link(to)) => self.create_link(step, to).await,
            Step::Replace { from: Object::Link(from), to: Object::Link(to) } => self.alter_link(step, from, to).await,
            Step::Remake { from: Object::Link(from), to: Object::Link(to), .. } => {
                self.delete_link(step, from).await?;
                self.create_link(step, to).await
            }
            Step::Delete(Object::Link(link)) => self.delete_link(step, link).await,
            Step::Create(Object::Address(to)) | Step::Replace { to: Object::Address(to), .. } => {
                self.create_address(step, to).await
            }
            Step::Delete(Object::Address(address)) => {
                let index = match self.device(&address.device) {
                    Ok(Some(link)) if link.alias == ALIAS => link.index,
                    Ok(_) => return Ok(()),
                    Err(trouble) => return Err(trouble.error(step.to_string())),
                };
                let done = self.core.rtnl.delete_address(address::message(index, address.address)).await;
                absent_is_done(done).map_err(|trouble| trouble.error(step.to_string()))
            }
            other => Err(not_served(other)),
        }
    }
}

/// What goes in batches has this place in a column.
const BATCH: u8 = 2;

/// The place of a step in its column: before the batches what they need, after them what is needed by what they delete.
fn place(step: &Step) -> u8 {
    match (step, step.key()) {
        (Step::Delete(_), Key::Address(..)) => 3,
        (Step::Delete(_), Key::Link(_)) => 4,
        (_, Key::Link(_)) => 0,
        (_, Key::Address(..)) => 1,
        _ => BATCH,
    }
}

/// Deleting what is absent is success.
fn absent_is_done(answer: Result<(), Trouble>) -> Result<(), Trouble> {
    match answer {
        // ENXIO: an IPv6 address of a device that has no IPv6.
        Err(Trouble::Refused(Errno::NOENT | Errno::SRCH | Errno::NXIO | Errno::NODEV | Errno::ADDRNOTAVAIL, _)) => {
            Ok(())
        }
        other => other,
    }
}

fn not_served(step: &Step) -> DriverError {
    DriverError::Unsupported {
        attempted: step.to_string(),
        detail: "the netlink driver serves links, addresses, neighbours, forwarding entries and routes".to_owned(),
    }
}
