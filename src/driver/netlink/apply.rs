//! Steps of many units at once: the first step of all units, then the second of those that still live, and so on, so that what
//! is many goes in batches although each unit is in order.
//!
//! Units that make something come before units that only delete: a change that reaches from one unit into another (a
//! forwarding entry's new remote, and the old one as a leftover) has no gap.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::link::{self, RawLink};
use super::names::Names;
use super::neighbour;
use super::nexthop::{self, Via};
use super::nexthops::RouteKey;
use super::observe;
use super::requester::Trouble;
use super::route::{self, Mode, Way};
use super::wire::{Messages, number};
use super::{ALIAS, Core, PROTOCOL, address};
use crate::driver::{DriverError, Errno, UnitResult};
use crate::plan::{Address, Fit, Key, Link, LinkKind, NextHop, Object, Route, Step, UnitPlan};
use crate::types::{DeviceName, Family};

/// So many routes are asked for one by one before one list of all is cheaper.
const ASKED_ONE_BY_ONE: usize = 32;
/// How often new nexthop ids are tried while others take them.
const ID_TRIES: usize = 4;

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

/// A message of a batch: whose, and what it does.
struct Sent<'a> {
    unit: usize,
    step: &'a Step,
    /// The nexthop object that a route names.
    id: Option<u32>,
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

    async fn create_link(&mut self, step: &Step, to: &Link) -> Result<(), DriverError> {
        let LinkKind::Vxlan(vxlan) = &to.kind;
        let attempted = || step.to_string();
        let Some(underlay) = &vxlan.underlay else {
            return Err(DriverError::Unsupported {
                attempted: attempted(),
                detail: "a VXLAN device of podnet needs a lower device".to_owned(),
            });
        };
        let underlay = self.index(underlay).map_err(|trouble| trouble.error(attempted()))?;
        self.devices.remove(&to.name);
        match self.core.rtnl.create_link(link::create(to, underlay)).await {
            Ok(()) => {}
            Err(Trouble::Refused(Errno::EXIST, words)) => return self.occupied(step, to, words).await,
            Err(trouble) => return Err(trouble.error(attempted())),
        }
        let index = self.index(&to.name).map_err(|trouble| trouble.error(attempted()))?;
        // The mark last: a device without it is one that was not finished.
        let quiet = link::without_ipv6(self.core.rtnl.change_link(link::no_link_local(index)).await);
        quiet.map_err(|trouble| trouble.error(format!("{} ({})", attempted(), link::NO_LINK_LOCAL)))?;
        let marked = self.core.rtnl.change_link(link::mark(index)).await;
        marked.map_err(|trouble| trouble.error(format!("{} (alias)", attempted())))?;
        self.offload(step, to, index)?;
        if to.up {
            let up = self.core.rtnl.change_link(link::switch(index, true)).await;
            up.map_err(|trouble| trouble.error(format!("{} (up)", attempted())))?;
        }
        self.devices.remove(&to.name);
        Ok(())
    }

    fn offload(&mut self, step: &Step, to: &Link, index: u32) -> Result<(), DriverError> {
        let Some(on) = to.tx_checksum_offload else { return Ok(()) };
        let attempted = format!("{step} (tx-checksum-ip-generic)");
        let Some(ethtool) = &mut self.core.ethtool else {
            return Err(DriverError::Unsupported { attempted, detail: "there is no generic netlink".to_owned() });
        };
        match ethtool.set_tx_checksum(index, on) {
            Ok(()) => Ok(()),
            Err(Trouble::Refused(Errno::OPNOTSUPP, detail)) => Err(DriverError::Unsupported { attempted, detail }),
            Err(trouble) => Err(trouble.error(attempted)),
        }
    }

    /// The kernel says that the device, or another one of its VNI and port, is there.
    async fn occupied(&mut self, step: &Step, to: &Link, words: String) -> Result<(), DriverError> {
        let attempted = step.to_string();
        let links = observe::dump(&mut self.core.requester, "links", link::dump(), link::decode).await?;
        let names = Names::new(links, []);
        if let Some(there) = names.links.values().find(|there| there.name.as_ref() == Some(&to.name)) {
            let object = there.object(|number| names.device(number), None);
            return match (there.alias == ALIAS, object.map(|object| object.fit(&untold(to)))) {
                (true, Some(Fit::Same)) => self.offload(step, to, there.index),
                (true, _) => Err(DriverError::Refused {
                    attempted,
                    errno: Errno::EXIST,
                    detail: "it is there with another value: look again".to_owned(),
                }),
                (false, _) => Err(DriverError::InTheWay {
                    attempted,
                    with: there.describe(),
                    advice: "delete or rename it".to_owned(),
                }),
            };
        }
        Err(match names.links.values().find(|there| link::occupies(there, to)) {
            Some(there) if there.alias == ALIAS => DriverError::Refused {
                attempted,
                errno: Errno::EXIST,
                detail: format!("{} is podnet's too and has the same VNI and port", there.describe()),
            },
            Some(there) => DriverError::InTheWay {
                attempted,
                with: there.describe(),
                advice:
                    "the kernel allows one VXLAN device for each VNI and port: delete it, or choose another VNI or port"
                        .to_owned(),
            },
            None => DriverError::Refused { attempted, errno: Errno::EXIST, detail: words },
        })
    }

    /// The device of this name, if it is ours or what the plan took for flannel's: nothing else is touched.
    fn own_link(&mut self, step: &Step, from: &Link) -> Result<Option<RawLink>, DriverError> {
        self.devices.remove(&from.name);
        let Some(there) = self.device(&from.name).map_err(|trouble| trouble.error(step.to_string()))? else {
            return Ok(None);
        };
        let LinkKind::Vxlan(vxlan) = &from.kind;
        let unmarked = there.alias.is_empty() && there.vxlan.is_some_and(|has| has.vni == vxlan.vni.get());
        if there.kind == "vxlan" && (there.alias == ALIAS || unmarked) {
            return Ok(Some(there));
        }
        Err(DriverError::InTheWay {
            attempted: step.to_string(),
            with: there.describe(),
            advice: "delete or rename it".to_owned(),
        })
    }

    async fn alter_link(&mut self, step: &Step, from: &Link, to: &Link) -> Result<(), DriverError> {
        let attempted = || step.to_string();
        let Some(there) = self.own_link(step, from)? else {
            return Err(Trouble::Refused(Errno::NODEV, "it is gone".to_owned()).error(attempted()));
        };
        let LinkKind::Vxlan(vxlan) = &to.kind;
        let underlay = match &vxlan.underlay {
            Some(name) => Some(self.index(name).map_err(|trouble| trouble.error(attempted()))?),
            None => None,
        };
        self.offload(step, to, there.index)?;
        self.devices.remove(&to.name);
        for alteration in link::alterations(&there, to, underlay) {
            let named = |trouble: Trouble| trouble.error(format!("{} ({})", attempted(), alteration.attribute));
            if alteration.flushes_neighbours {
                let mut neighbours = self.permanent_neighbours(&there, &to.name).await.map_err(named)?;
                self.core.rtnl.change_link(alteration.message).await.map_err(named)?;
                for answer in self.core.requester.transact(&mut neighbours).await {
                    answer.map_err(|trouble| trouble.error(format!("{} (restore its neighbours)", attempted())))?;
                }
            } else {
                let answer = self.core.rtnl.change_link(alteration.message).await;
                let quiet = alteration.attribute == link::NO_LINK_LOCAL;
                if quiet { link::without_ipv6(answer) } else { answer }.map_err(named)?;
            }
        }
        Ok(())
    }

    /// The messages that put back the permanent neighbours of a device.
    async fn permanent_neighbours(&mut self, link: &RawLink, name: &DeviceName) -> Result<Messages, Trouble> {
        let mut messages = Messages::new();
        let there = self.core.requester.dump(&mut neighbour::dump_neighbours(link.index), neighbour::decode).await?;
        for neighbour in there.iter().filter(|n| n.index == link.index && n.permanent) {
            if let Some(Object::Neighbour(neighbour)) = observe::neighbour_object(neighbour, name) {
                neighbour::set_neighbour(&mut messages, link.index, &neighbour);
            }
        }
        Ok(messages)
    }

    async fn delete_link(&mut self, step: &Step, link: &Link) -> Result<(), DriverError> {
        let Some(there) = self.own_link(step, link)? else { return Ok(()) };
        self.unload(there.index).await;
        let deleted = absent_is_done(self.core.rtnl.delete_link(there.index).await);
        deleted.map_err(|trouble| trouble.error(step.to_string()))?;
        self.devices.remove(&link.name);
        self.core.nexthops.device_gone(there.index);
        Ok(())
    }

    /// Takes routes and nexthop objects off a device that is about to go. Left to the kernel, they go too, but it then walks the
    /// whole routing table once for each object (`nexthop_flush_dev`), all of it under the RTNL lock: 0.7 s for 10 000, and
    /// growing with their square. What is refused here goes with the device.
    async fn unload(&mut self, index: u32) {
        let (routes, objects) = self.core.nexthops.on_device(index);
        let mut messages = Messages::new();
        for (destination, metric) in &routes {
            let destination = IpNetwork::V4(*destination);
            route::delete(&mut messages, &Route { destination, metric: *metric, next: NextHop::Blackhole });
        }
        let answers = self.core.requester.transact(&mut messages).await;
        for (route, answer) in routes.iter().zip(answers) {
            if absent_is_done(answer).is_ok() {
                self.core.nexthops.route_gone(route);
            }
        }
        self.drop_objects(objects).await;
    }

    async fn create_address(&mut self, step: &Step, to: &Address) -> Result<(), DriverError> {
        let index = self.own_index(step, &to.device)?;
        match self.core.rtnl.create_address(address::message(index, to.address)).await {
            Ok(()) => Ok(()),
            Err(Trouble::Refused(Errno::EXIST, words)) => {
                let there =
                    observe::dump(&mut self.core.requester, "addresses", address::dump(), address::decode).await?;
                if there.iter().any(|there| there.index == index && there.address == to.address) {
                    Ok(())
                } else {
                    Err(Trouble::Refused(Errno::EXIST, words).error(step.to_string()))
                }
            }
            Err(trouble) => Err(trouble.error(step.to_string())),
        }
    }

    /// Steps on neighbours, forwarding entries and routes, of a unit at most one.
    async fn batch(&mut self, steps: Vec<(usize, &'a Step)>) {
        let steps = self.leave_taken(steps).await;
        let objects = self.objects(&steps).await;
        let mut messages = Messages::new();
        let mut sent = Vec::with_capacity(steps.len());
        for (unit, step) in steps {
            match self.encode(step, &objects, Mode::Create, &mut messages) {
                Ok(Encoded::Written(id)) => sent.push(Sent { unit, step, id }),
                Ok(Encoded::Nothing) => self.settle(unit, Ok(())),
                Err(error) => self.settle(unit, Err(error)),
            }
        }
        let answers = self.core.requester.transact(&mut messages).await;
        let (mut contested, mut misled) = (Vec::new(), Vec::new());
        for (sent, answer) in sent.into_iter().zip(answers) {
            match answer {
                Err(trouble) if may_exist(sent.step, &trouble) => contested.push((sent, trouble)),
                Err(trouble) if is_misled(sent.step, &trouble) => misled.push((sent, Mode::Replace)),
                answer => self.heard(&sent, answer),
            }
        }
        if !contested.is_empty() {
            self.contest(contested, &objects, &mut misled).await;
        }
        if !misled.is_empty() {
            self.lead(misled).await;
        }
    }

    /// Sets IPv6 routes whose gateway, by the routes that are there, is on another device: the kernel refuses those even where they
    /// are to take the place of the route that says so (`ip6_route_check_nh_onlink`). For the moment of the change, a route of its
    /// own says where each gateway is; so there is no moment without a route. One that was left is found as any other of ours.
    async fn lead(&mut self, misled: Vec<(Sent<'a>, Mode)>) {
        let mut messages = Messages::new();
        let mut led = Vec::with_capacity(misled.len());
        for (sent, mode) in misled {
            let Some((route, device, address)) = onlink_route_v6(sent.step) else { continue };
            let index = match self.index(device) {
                Ok(index) => index,
                Err(trouble) => {
                    self.heard(&sent, Err(trouble));
                    continue;
                }
            };
            let way = Route {
                destination: IpNetwork::from(address),
                metric: Route::default_metric(Family::V6),
                next: NextHop::Device(device.clone()),
            };
            route::set(&mut messages, Mode::Create, &way, Way::Device(index));
            route::set(&mut messages, mode, route, Way::Gateway { index, address, onlink: true });
            route::delete(&mut messages, &way);
            led.push(sent);
        }
        let mut answers = self.core.requester.transact(&mut messages).await.into_iter();
        for sent in led {
            // Where the first could not be set, the second is refused as before.
            if let (Some(_), Some(set), Some(deleted)) = (answers.next(), answers.next(), answers.next()) {
                self.heard(&sent, set.and(absent_is_done(deleted)));
            }
        }
    }

    /// Leaves out the replacements of routes whose place somebody else has taken since the last look: the kernel would replace his,
    /// whatever its protocol. A few are asked for one by one, many by a list of all.
    async fn leave_taken(&mut self, steps: Vec<(usize, &'a Step)>) -> Vec<(usize, &'a Step)> {
        let place = |step: &Step| match step {
            Step::Replace { to: Object::Route(to), .. } | Step::Remake { to: Object::Route(to), .. } => {
                Some((to.destination, to.metric))
            }
            _ => None,
        };
        let asked: Vec<(IpNetwork, u32)> = steps.iter().filter_map(|(_, step)| place(step)).collect();
        if asked.is_empty() {
            return steps;
        }
        let mut there: HashMap<(IpNetwork, u32), route::RawRoute> = HashMap::new();
        let mut keep = |found: route::RawRoute| {
            there.entry((found.destination, found.metric)).or_insert(found);
        };
        if asked.len() <= ASKED_ONE_BY_ONE {
            for (destination, _) in &asked {
                // No answer is no reason to hold back: the write will have its own.
                let found = self.core.requester.ask(&mut route::get(*destination), route::decode);
                found.into_iter().flatten().for_each(&mut keep);
            }
        } else {
            let families: BTreeSet<Family> =
                asked.iter().map(|(destination, _)| Family::of(destination.ip())).collect();
            for family in families {
                let all = observe::routes(&mut self.core.requester, family).await;
                all.into_iter().flatten().for_each(&mut keep);
            }
        }
        let legacy = &self.core.legacy;
        let flannels =
            |raw: &route::RawRoute, step: &Step| raw.protocol == number::RTPROT_BOOT && legacy.contains(&step.key());
        let (taken, left): (Vec<_>, Vec<_>) = steps.into_iter().partition(|(_, step)| {
            let raw = place(step).and_then(|key| there.get(&key));
            // One to which others added ways (IPv6) bears any of their protocols, and is put right.
            raw.is_some_and(|raw| raw.protocol != PROTOCOL && raw.hops.len() < 2 && !flannels(raw, step))
        });
        if taken.is_empty() {
            return left;
        }
        let links = observe::dump(&mut self.core.requester, "links", link::dump(), link::decode).await;
        let names = Names::new(links.unwrap_or_default(), []);
        for (unit, step) in taken {
            if let Some(raw) = place(step).and_then(|key| there.get(&key)) {
                let error = DriverError::InTheWay {
                    attempted: step.to_string(),
                    with: observe::describe(raw, &names),
                    advice: observe::advice(raw),
                };
                self.settle(unit, Err(error));
            }
        }
        left
    }

    /// Takes the kernel's answer for what it is.
    fn heard(&mut self, sent: &Sent<'_>, answer: Result<(), Trouble>) {
        let answer = if matches!(sent.step, Step::Delete(_)) { absent_is_done(answer) } else { answer };
        if let Object::Route(route) = subject(sent.step) {
            self.heard_of_route(sent, route, &answer);
        }
        let outcome = answer.map_err(|trouble| trouble.error(sent.step.to_string()));
        self.settle(sent.unit, outcome);
    }

    fn heard_of_route(&mut self, sent: &Sent<'_>, route: &Route, answer: &Result<(), Trouble>) {
        let key = sent.step.key();
        if answer.is_ok() {
            self.core.legacy.remove(&key);
        }
        let IpNetwork::V4(destination) = route.destination else { return };
        let place = (destination, route.metric);
        match answer {
            Ok(()) => match sent.step.outcome().and_then(gateway_route) {
                Some(_) => self.core.nexthops.route_is(place, sent.id),
                None => self.core.nexthops.route_gone(&place),
            },
            Err(trouble) => {
                if let Some(id) = sent.id {
                    // It may have come to be, or the object may not be there any more.
                    self.core.nexthops.distrust();
                    if matches!(trouble, Trouble::Lost(_)) {
                        self.core.nexthops.doubt(id);
                    }
                }
            }
        }
    }

    /// Routes that were to be new and are there: fine if they are ours, replaced if ours and different, left alone if
    /// somebody else's. Those that are refused for their gateway are added to `misled`.
    async fn contest(
        &mut self,
        contested: Vec<(Sent<'a>, Trouble)>,
        objects: &Objects,
        misled: &mut Vec<(Sent<'a>, Mode)>,
    ) {
        let families: BTreeSet<Family> = contested
            .iter()
            .filter_map(|(sent, _)| match subject(sent.step) {
                Object::Route(route) => Some(Family::of(route.destination.ip())),
                _ => None,
            })
            .collect();
        let mut there = Vec::new();
        let mut links = Vec::new();
        let mut failed = None;
        let requester = &mut self.core.requester;
        match observe::dump(requester, "links", link::dump(), link::decode).await {
            Ok(found) => links = found,
            Err(error) => failed = Some(error),
        }
        for family in families {
            match observe::routes(requester, family).await {
                Ok(routes) => there.extend(routes),
                Err(error) => failed = Some(error),
            }
        }
        let known = match observe::nexthops(requester).await {
            Ok(objects) => objects,
            Err(error) => {
                failed = Some(error);
                None
            }
        };
        if let Some(error) = failed {
            for (sent, _) in contested {
                self.settle(sent.unit, Err(error.clone()));
            }
            return;
        }
        let names = Names::new(links, known.into_iter().flatten());
        let mut first: HashMap<(IpNetwork, u32), &route::RawRoute> = HashMap::new();
        for route in &there {
            first.entry((route.destination, route.metric)).or_insert(route);
        }
        let mut messages = Messages::new();
        let mut again = Vec::new();
        for (sent, trouble) in contested {
            let Object::Route(route) = subject(sent.step) else { continue };
            match first.get(&(route.destination, route.metric)) {
                Some(raw) if raw.protocol != PROTOCOL => {
                    let error = DriverError::InTheWay {
                        attempted: sent.step.to_string(),
                        with: observe::describe(raw, &names),
                        advice: observe::advice(raw),
                    };
                    self.settle(sent.unit, Err(error));
                }
                Some(raw) if observe::route_object(raw, &names) == *route => {
                    self.heard(&Sent { id: raw.nexthop, ..sent }, Ok(()));
                }
                None if is_misled(sent.step, &trouble) => misled.push((sent, Mode::Create)),
                // It was not that which kept it out.
                None if trouble.errno() != Some(Errno::EXIST) => self.heard(&sent, Err(trouble)),
                // Ours and different; or gone meanwhile, and then a replacement creates it.
                _ => match self.encode(sent.step, objects, Mode::Replace, &mut messages) {
                    Ok(_) => again.push(sent),
                    Err(error) => self.settle(sent.unit, Err(error)),
                },
            }
        }
        let answers = self.core.requester.transact(&mut messages).await;
        for (sent, answer) in again.into_iter().zip(answers) {
            match answer {
                Err(trouble) if is_misled(sent.step, &trouble) => misled.push((sent, Mode::Replace)),
                answer => self.heard(&sent, answer),
            }
        }
    }

    /// Writes the message of a step.
    fn encode(
        &mut self,
        step: &Step,
        objects: &Objects,
        create: Mode,
        out: &mut Messages,
    ) -> Result<Encoded, DriverError> {
        let refused = |trouble: Trouble| trouble.error(step.to_string());
        if let Step::Delete(object) = step {
            let link = match object.device() {
                Some(name) => self.device(name).map_err(refused)?,
                None => None,
            };
            let own = link.as_ref().filter(|link| link.alias == ALIAS).map(|link| link.index);
            let index = link.map(|link| link.index);
            match (object, own) {
                (Object::Neighbour(o), Some(index)) => neighbour::delete_neighbour(out, index, o),
                (Object::Fdb(o), Some(index)) => neighbour::delete_fdb(out, index, o),
                // It went with the device, or with our mark on it.
                (Object::Neighbour(_) | Object::Fdb(_), None) => return Ok(Encoded::Nothing),
                (Object::Route(o), _) => match index.filter(|_| self.core.legacy.contains(&object.key())) {
                    Some(index) => route::delete_legacy(out, o, index),
                    None => route::delete(out, o),
                },
                _ => return Err(not_served(step)),
            }
            return Ok(Encoded::Written(None));
        }
        let mode = if matches!(step, Step::Create(_)) { create } else { Mode::Replace };
        match step.outcome() {
            Some(Object::Neighbour(o)) => {
                let index = self.own_index(step, &o.device)?;
                neighbour::set_neighbour(out, index, o);
                Ok(Encoded::Written(None))
            }
            Some(Object::Fdb(o)) => {
                let index = self.own_index(step, &o.device)?;
                neighbour::set_fdb(out, index, o);
                Ok(Encoded::Written(None))
            }
            Some(Object::Route(o)) => {
                let way = self.way(o, objects).map_err(refused)?;
                route::set(out, mode, o, way);
                Ok(Encoded::Written(match way {
                    Way::Object(id) => Some(id),
                    _ => None,
                }))
            }
            _ => Err(not_served(step)),
        }
    }

    fn way(&mut self, route: &Route, objects: &Objects) -> Result<Way, Trouble> {
        Ok(match &route.next {
            NextHop::Blackhole => Way::Blackhole,
            NextHop::Device(device) => Way::Device(self.index(device)?),
            NextHop::Gateway { device, address, onlink } => {
                let index = self.index(device)?;
                match (address, route.destination) {
                    (IpAddr::V4(gateway), IpNetwork::V4(_)) if objects.used => {
                        let via = Via { index, gateway: *gateway, onlink: *onlink };
                        match (self.core.nexthops.find(via), objects.failed.get(&via)) {
                            (Some(id), _) => Way::Object(id),
                            (None, Some(trouble)) => return Err(trouble.clone()),
                            (None, None) => Way::Gateway { index, address: *address, onlink: *onlink },
                        }
                    }
                    _ => Way::Gateway { index, address: *address, onlink: *onlink },
                }
            }
        })
    }

    /// Makes the nexthop objects that the routes among these steps need.
    async fn objects(&mut self, steps: &[(usize, &'a Step)]) -> Objects {
        let mut objects = Objects { used: false, failed: HashMap::new() };
        if !self.core.nexthops.on() || !steps.iter().any(|(_, s)| s.outcome().and_then(gateway_route).is_some()) {
            return objects;
        }
        if self.core.nexthops.must_list() && !self.list().await {
            return objects;
        }
        objects.used = self.core.nexthops.on();
        if !objects.used {
            return objects;
        }
        let mut wanted: Vec<Via> = Vec::new();
        let mut seen = HashSet::new();
        for (_, step) in steps {
            let Some(Object::Route(route)) = step.outcome() else { continue };
            let (IpNetwork::V4(_), NextHop::Gateway { device, address: IpAddr::V4(gateway), onlink }) =
                (route.destination, &route.next)
            else {
                continue;
            };
            let Ok(index) = self.index(device) else { continue };
            let via = Via { index, gateway: *gateway, onlink: *onlink };
            if self.core.nexthops.find(via).is_none() && seen.insert(via) {
                wanted.push(via);
            }
        }
        for _ in 0..ID_TRIES {
            if wanted.is_empty() {
                return objects;
            }
            let mut messages = Messages::new();
            let mut sent = Vec::with_capacity(wanted.len());
            for via in wanted.drain(..) {
                let id = self.core.nexthops.reserve();
                nexthop::create(&mut messages, id, via);
                sent.push((id, via));
            }
            let answers = self.core.requester.transact(&mut messages).await;
            for ((id, via), answer) in sent.into_iter().zip(answers) {
                match answer {
                    Ok(()) => self.core.nexthops.created(id, via),
                    Err(Trouble::Refused(Errno::EXIST, _)) => {
                        self.core.nexthops.refused(id);
                        wanted.push(via);
                    }
                    Err(Trouble::Refused(Errno::OPNOTSUPP, _)) => self.core.nexthops.unsupported(),
                    Err(trouble) => {
                        self.core.nexthops.distrust();
                        objects.failed.insert(via, trouble);
                    }
                }
            }
            // Where ids are taken, learn which.
            if !wanted.is_empty() && !self.list().await {
                break;
            }
            wanted.retain(|via| self.core.nexthops.find(*via).is_none());
        }
        for via in wanted {
            let text = format!("no free id for a nexthop object from {:#x} on", super::NEXTHOP_BASE);
            objects.failed.insert(via, Trouble::Refused(Errno::EXIST, text));
        }
        objects
    }

    /// Learns which nexthop objects there are; `false` when the kernel did not tell.
    async fn list(&mut self) -> bool {
        match observe::nexthops(&mut self.core.requester).await {
            Ok(Some(objects)) => self.core.nexthops.list(&objects),
            Ok(None) => self.core.nexthops.unsupported(),
            Err(error) => {
                tracing::debug!(%error, "nexthop objects could not be listed: plain routes");
                return false;
            }
        }
        true
    }

    /// Deletes the nexthop objects that no route names any more.
    async fn sweep(&mut self) {
        let unused = self.core.nexthops.unused();
        if !unused.is_empty() {
            self.drop_objects(unused).await;
        }
    }

    async fn drop_objects(&mut self, ids: Vec<u32>) {
        let mut messages = Messages::new();
        for id in &ids {
            nexthop::delete(&mut messages, *id);
        }
        let answers = self.core.requester.transact(&mut messages).await;
        for (id, answer) in ids.into_iter().zip(answers) {
            match absent_is_done(answer) {
                Ok(()) => self.core.nexthops.deleted(id),
                // The next observation finds it again.
                Err(trouble) => tracing::debug!(id, ?trouble, "a nexthop object without routes stays"),
            }
        }
    }
}

/// What became of the nexthop objects that a batch of routes needs.
struct Objects {
    used: bool,
    failed: HashMap<Via, Trouble>,
}

enum Encoded {
    /// One message; of a route, the nexthop object that it names.
    Written(Option<u32>),
    /// None: it is done already.
    Nothing,
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

/// Whether a route that was to be new was refused because it is there. IPv6 says `EINVAL` instead of `EEXIST` where the route
/// that is there covers the gateway and leads to another device.
fn may_exist(step: &Step, trouble: &Trouble) -> bool {
    let Step::Create(Object::Route(route)) = step else { return false };
    match trouble.errno() {
        Some(Errno::EXIST) => true,
        Some(Errno::INVAL) => route.destination.is_ipv6(),
        _ => false,
    }
}

/// Whether an IPv6 route was refused because others lead to its gateway over another device.
fn is_misled(step: &Step, trouble: &Trouble) -> bool {
    trouble.errno() == Some(Errno::INVAL) && onlink_route_v6(step).is_some()
}

/// The route that a step makes, its device and its gateway, if it is IPv6 and takes the gateway as directly reachable.
fn onlink_route_v6(step: &Step) -> Option<(&Route, &DeviceName, IpAddr)> {
    match step.outcome()? {
        Object::Route(route) => match &route.next {
            NextHop::Gateway { device, address, onlink: true } if address.is_ipv6() => Some((route, device, *address)),
            _ => None,
        },
        _ => None,
    }
}

/// The object that a step is about.
fn subject(step: &Step) -> &Object {
    match step {
        Step::Create(object) | Step::Delete(object) => object,
        Step::Replace { to, .. } | Step::Remake { to, .. } => to,
    }
}

/// A wish without what an observation may not tell.
fn untold(link: &Link) -> Link {
    Link { tx_checksum_offload: None, ..link.clone() }
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
