//! Neighbours, forwarding entries and routes: what is many, in batches; and what the kernel's answers mean.
//!
//! A route that somebody else has put in its place meanwhile is never replaced.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::objects::Objects;
use super::{Run, absent_is_done, gateway_route, not_served};
use crate::driver::netlink::names::Names;
use crate::driver::netlink::nexthop::Via;
use crate::driver::netlink::requester::Trouble;
use crate::driver::netlink::route::{self, Mode, Way};
use crate::driver::netlink::wire::{Messages, number};
use crate::driver::netlink::{ALIAS, PROTOCOL, link, neighbour, observe};
use crate::driver::{DriverError, Errno};
use crate::plan::{NextHop, Object, Route, Step};
use crate::types::{DeviceName, Family};

/// So many routes are asked for one by one before one list of all is cheaper.
const ASKED_ONE_BY_ONE: usize = 32;

/// A message of a batch: whose, and what it does.
struct Sent<'a> {
    unit: usize,
    step: &'a Step,
    /// The nexthop object that a route names.
    id: Option<u32>,
}

enum Encoded {
    /// One message; of a route, the nexthop object that it names.
    Written(Option<u32>),
    /// None: it is done already.
    Nothing,
}

impl<'a> Run<'a> {
    /// Steps on neighbours, forwarding entries and routes, of a unit at most one.
    pub(super) async fn batch(&mut self, steps: Vec<(usize, &'a Step)>) {
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
