//! Judges the objects that a backend wants, of its node and of peers, one by one and against each other. It asks nothing.

use std::collections::BTreeMap;

use ipnetwork::IpNetwork;

use super::probe::Probe;
use super::{APART, DRIVER, KINDS, MACS, METRIC, ON_LINK, ORDER, OWN_OBJECTS, Own, PEER_ROUTE, ensure};
use crate::admission::overlap;
use crate::backend::{AdmittedPeer, Maker, NodeView, Reach};
use crate::plan::{Domain, Key, NextHop, Object, Route};
use crate::types::{DeviceName, Family, MacAddr};

/// A peer, what it claims and what it needs.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) peer: AdmittedPeer,
    pub(super) claims: Vec<String>,
    pub(super) objects: Vec<Object>,
}

/// What the objects of one family are measured by.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    own: &'a Own,
    view: &'a NodeView,
    family: Family,
    at: &'a str,
}

impl<'a> Judge<'a> {
    pub(super) fn new(own: &'a Own, view: &'a NodeView, family: Family, at: &'a str) -> Self {
        Judge { own, view, family, at }
    }

    pub(super) fn node(&self, probe: &mut Probe<'_>, objects: &[Object]) {
        self.any(probe, objects);
        probe.check(OWN_OBJECTS, self.at, self.own_objects(objects));
    }

    fn own_objects(&self, objects: &[Object]) -> Result<(), String> {
        let made = |name: &DeviceName| objects.iter().any(|o| matches!(o, Object::Link(link) if link.name == *name));
        let devices = self.own.devices(self.family);
        if let Some(missing) = devices.iter().find(|d| d.maker == Maker::Netlink && !made(&d.name)) {
            return Err(format!("the device {} is declared and not wanted", missing.name));
        }
        let own = self.view.subnet(self.family);
        let within = |network: IpNetwork| own.is_some_and(|own| inside(network, own));
        // A device whose driver knows the peers is given the whole network; the node's own subnet wins by its length.
        let whole = match self.family {
            Family::V4 => self.view.networks.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => self.view.networks.v6().map(|n| IpNetwork::V6(*n)),
        };
        let handed_over = |route: &Route| {
            let served = |name: &DeviceName| devices.iter().any(|d| d.maker == Maker::OwnDriver && d.name == *name);
            Some(route.destination) == whole && matches!(&route.next, NextHop::Device(device) if served(device))
        };
        for object in objects {
            let outside = match object {
                Object::Address(o) => !within(o.address),
                Object::Route(o) => !within(o.destination) && !handed_over(o),
                _ => false,
            };
            ensure(!outside, || format!("{object} is outside the node's own subnet {own:?}"))?;
        }
        Ok(())
    }

    pub(super) fn peer(&self, probe: &mut Probe<'_>, peer: &AdmittedPeer, objects: &[Object]) {
        self.any(probe, objects);
        probe.check(PEER_ROUTE, self.at, peer_route(peer, objects));
    }

    /// What holds of all objects.
    fn any(&self, probe: &mut Probe<'_>, objects: &[Object]) {
        probe.check(KINDS, self.at, objects.iter().try_for_each(|object| self.is_found_again(object)));
        probe.check(DRIVER, self.at, objects.iter().try_for_each(|object| self.is_served(object)));
        probe.check(ORDER, self.at, order(objects));
        probe.check(MACS, self.at, objects.iter().try_for_each(one_host));
        for object in objects {
            let Object::Route(route) = object else { continue };
            let default = Route::default_metric(Family::of(route.destination.ip()));
            let wrong = || format!("{object} has the metric {}, the default is {default}", route.metric);
            probe.check(METRIC, self.at, ensure(route.metric == default, wrong));
            probe.check(ON_LINK, self.at, self.is_on_link(route));
        }
    }

    fn is_found_again(&self, object: &Object) -> Result<(), String> {
        let device = |name: &DeviceName| self.own.devices(self.family).iter().find(|d| d.name == *name);
        match object {
            Object::Link(link) => match device(&link.name).map(|d| d.maker) {
                Some(Maker::Netlink) => Ok(()),
                Some(Maker::OwnDriver) => Err(format!("{object}: that device is declared as the own driver's")),
                None => Err(format!("{object}: that device is not declared in {}", self.family)),
            },
            Object::Address(_) | Object::Neighbour(_) | Object::Fdb(_) => {
                let declared = object.device().is_some_and(|name| device(name).is_some());
                ensure(declared, || format!("{object}: that device is not declared in {}", self.family))
            }
            Object::Route(route) => {
                let known = |name: &DeviceName| *name == self.view.underlay.device || device(name).is_some();
                let wrong = || format!("{object}: that device is neither declared nor the underlay's");
                ensure(route.next.device().is_none_or(known), wrong)
            }
            Object::Custom(_) => Ok(()),
            Object::Sysctl(_) | Object::Ruleset(_) => Err(format!("{object} is the engine's own to want")),
        }
    }

    fn is_served(&self, object: &Object) -> Result<(), String> {
        let Object::Custom(custom) = object else { return Ok(()) };
        let domain = Domain::Custom(custom.domain.clone());
        let wrong = || format!("{object}: the own driver serves {:?}", self.own.domain);
        ensure(self.own.domain.as_ref() == Some(&domain), wrong)
    }

    fn is_on_link(&self, route: &Route) -> Result<(), String> {
        let underlay = &self.view.underlay;
        match &route.next {
            NextHop::Gateway { device, address, onlink } if *device == underlay.device => {
                ensure(!onlink, || format!("{route} is forced"))?;
                let reach = underlay.reach(*address);
                ensure(reach == Reach::OnLink, || format!("{route}: of the gateway the host says: {reach}"))
            }
            NextHop::Device(device) if *device == underlay.device => {
                Err(format!("{route} says that the peer's pods are themselves on the link"))
            }
            _ => Ok(()),
        }
    }
}

fn inside(network: IpNetwork, of: IpNetwork) -> bool {
    overlap(network, of) && network.prefix() >= of.prefix()
}

fn peer_route(peer: &AdmittedPeer, objects: &[Object]) -> Result<(), String> {
    match objects.last() {
        Some(Object::Route(route)) if route.destination == peer.subnet => {}
        // Its driver knows by the subnet whose it is; that each has its own is asked where peers are compared.
        Some(Object::Custom(_)) => {}
        Some(other) => return Err(format!("the last object is {other}, the subnet {}", peer.subnet)),
        None => return Err("it is reached, and there is no object".to_owned()),
    }
    objects.iter().try_for_each(|object| match object {
        Object::Route(route) => {
            ensure(inside(route.destination, peer.subnet), || format!("{object} is outside {}", peer.subnet))
        }
        _ => Ok(()),
    })
}

fn order(objects: &[Object]) -> Result<(), String> {
    let mut highest: Option<&Object> = None;
    for (place, object) in objects.iter().enumerate() {
        let rank = |object: &Object| object.key().rank();
        // An object of an own driver may be a device, or something on one: only routes must come after it.
        if matches!(object, Object::Custom(_)) {
            let route = highest.filter(|before| matches!(before, Object::Route(_)));
            ensure(route.is_none(), || format!("{object} comes after a route"))?;
            continue;
        }
        if let Some(before) = highest.filter(|before| rank(before) > rank(object)) {
            return Err(format!("{object} comes after {before}"));
        }
        highest = Some(object);
        let late = objects.iter().skip(place + 1).find(|later| match (later, object.device()) {
            (Object::Link(link), Some(device)) => link.name == *device,
            _ => false,
        });
        if let Some(late) = late {
            return Err(format!("{object} comes before its device, {late}"));
        }
    }
    Ok(())
}

fn one_host(object: &Object) -> Result<(), String> {
    let mac = match object {
        Object::Link(o) => o.mac,
        Object::Neighbour(o) => o.mac,
        Object::Fdb(o) => o.mac,
        _ => return Ok(()),
    };
    ensure(mac.is_usable(), || format!("{object}: no host can have the Ethernet address {mac}"))
}

/// What must be one peer's alone: keys, and the MAC of a forwarding entry, for which the kernel would hold several remotes.
fn possessions(objects: &[Object]) -> Vec<(Possession, String)> {
    let mut all = Vec::new();
    for object in objects {
        all.push((Possession::Key(object.key()), object.to_string()));
        match object {
            Object::Fdb(o) => all.push((Possession::Mac(o.device.clone(), o.mac), object.to_string())),
            // Frames to the node's own MAC are its own.
            Object::Link(o) => all.push((Possession::Mac(o.name.clone(), o.mac), object.to_string())),
            _ => {}
        }
    }
    all
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Possession {
    Key(Key),
    Mac(DeviceName, MacAddr),
}

/// Honest peers, and this node, against each other.
pub(super) fn apart(probe: &mut Probe<'_>, at: &str, grounds: &[Object], peers: &[Peer]) {
    let mut owners: BTreeMap<Possession, (String, &str)> = BTreeMap::new();
    for (possession, text) in possessions(grounds) {
        owners.insert(possession, (text, "this node"));
    }
    let mut outcome = Ok(());
    for peer in peers {
        let name = peer.peer.name.as_str();
        for (possession, text) in possessions(&peer.objects) {
            match owners.get(&possession) {
                Some((other, owner)) if *owner != name => {
                    outcome = outcome.and_then(|()| Err(format!("{text} of {name} meets {other} of {owner}")));
                }
                _ => {
                    owners.insert(possession, (text, name));
                }
            }
        }
    }
    probe.check(APART, at, outcome);
}

/// One peer against others whose claims it does not share.
pub(super) fn apart_from(probe: &mut Probe<'_>, at: &str, grounds: &[Object], others: &[&Peer], one: &Peer) {
    let mine = possessions(&one.objects);
    let theirs = others.iter().flat_map(|other| possessions(&other.objects)).chain(possessions(grounds));
    let meets = |(possession, text): (Possession, String)| {
        let (_, own) = mine.iter().find(|(mine, _)| *mine == possession)?;
        Some(format!("{own} meets {text}, and the claims are {:?}", one.claims))
    };
    let found = theirs.into_iter().find_map(meets);
    probe.check(APART, at, found.map_or(Ok(()), Err));
}
