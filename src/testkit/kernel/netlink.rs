//! The fake netlink driver: steps become the requests that the real driver sends, one write each, so that a test can
//! kill the process between any two of them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use async_trait::async_trait;
use ipnetwork::IpNetwork;

use super::driver::{Failure, Port, absent_is_fine, failure, in_the_way, refused};
use super::dump::{link_line, route_line};
use super::ownership::{has_legacy_marks, is_adoptable, is_served, link_owner, over_our_device, seen};
use super::state::{KernelRoute, LinkState, PROTOCOL_KERNEL, RouteMode, State};
use super::{ALIAS_OURS, PROTOCOL_OURS};
use super::{Inner, Stop};
use crate::driver::{
    ChangeStream, Driver, DriverError, Errno, HostAddress, HostLink, HostRoute, HostView, Observed, OnLink, Scope,
    UnitResult,
};
use crate::plan::{
    Address, Conflict, Domain, Fdb, Fit, Key, Link, LinkKind, Neighbour, NextHop, Object, Owner, Route, Step, UnitPlan,
};
use crate::types::{DeviceName, Family, MacAddr, Mtu};

#[derive(Debug)]
pub(super) struct FakeNetlink {
    pub(super) port: Port,
}

#[async_trait]
impl Driver for FakeNetlink {
    fn domain(&self) -> Domain {
        Domain::Netlink
    }

    async fn observe(&self, scope: &Scope) -> Result<Observed, DriverError> {
        self.port.observe(&Domain::Netlink, |inner| observe(&inner.state, scope)).await
    }

    async fn apply(&self, units: &[UnitPlan]) -> Vec<UnitResult> {
        self.port.apply(units, &Domain::Netlink, step).await
    }

    async fn changes(&self, scope: &Scope) -> Result<ChangeStream, DriverError> {
        self.port.listen(Domain::Netlink, scope).await
    }
}

// ---- observing ----

fn observe(state: &State, scope: &Scope) -> Observed {
    let mut found = Observed::default();
    // A mark of ours tells under any name: renamed, or left by another configuration.
    let legacy =
        state.links.iter().filter(|(name, link)| link_owner(scope, name, link).is_some()).map(|(name, _)| name);
    let names: BTreeSet<&DeviceName> = scope.devices.iter().chain(&scope.served).chain(legacy).collect();
    for name in names {
        let Some(link) = state.links.get(name) else { continue };
        if is_served(scope, name, link) {
            observe_device(state, scope, name, &mut found);
            continue;
        }
        match (link_owner(scope, name, link), plain_link(name, link)) {
            (Some(owner), Some(plain)) => {
                found.objects.push((Object::Link(plain), owner));
                observe_device(state, scope, name, &mut found);
            }
            _ => found.conflicts.push(Conflict {
                object: Key::Link(name.clone()),
                with: link_line(name, link),
                advice: "delete or rename that device, or give the overlay another name".to_owned(),
            }),
        }
    }
    // Of several routes of one destination and metric the kernel uses the first.
    for route in state.routes.values().filter_map(|list| list.first()) {
        if route.protocol == PROTOCOL_KERNEL && over_our_device(state, scope, route) {
            // It goes with an address of ours.
            continue;
        }
        if route.protocol == PROTOCOL_OURS {
            found.objects.push((Object::Route(route.plain()), Owner::Ours));
        } else if is_adoptable(state, scope, route) {
            found.objects.push((Object::Route(route.plain()), Owner::Adoptable));
        } else if scope.holds(route.destination) {
            found.conflicts.push(Conflict {
                object: Key::Route(route.destination, route.metric),
                with: route_line(route),
                advice: "delete that route if it is not needed".to_owned(),
            });
        }
    }
    found.host = Some(host_view(state, scope));
    found
}

fn observe_device(state: &State, scope: &Scope, name: &DeviceName, found: &mut Observed) {
    let mut ours = |object| found.objects.push((object, Owner::Ours));
    for address in state.addresses.get(name).into_iter().flatten().filter(|a| scope.holds(**a)) {
        ours(Object::Address(Address { device: name.clone(), address: *address }));
    }
    for ((_, address), mac) in state.neighbours.iter().filter(|((device, _), _)| device == name) {
        ours(Object::Neighbour(Neighbour { device: name.clone(), address: *address, mac: *mac }));
    }
    for ((_, mac), remotes) in state.fdb.iter().filter(|((device, _), _)| device == name) {
        for remote in remotes {
            ours(Object::Fdb(Fdb { device: name.clone(), mac: *mac, remote: *remote }));
        }
    }
}

/// A link as a plan's object, if it is of a kind that plans know.
fn plain_link(name: &DeviceName, link: &LinkState) -> Option<Link> {
    Some(Link {
        name: name.clone(),
        kind: LinkKind::Vxlan(link.vxlan.clone()?),
        mtu: Mtu::new(link.mtu).ok()?,
        mac: link.mac,
        up: link.up,
        tx_checksum_offload: Some(link.tx_checksum_offload),
    })
}

fn host_view(state: &State, scope: &Scope) -> HostView {
    let mut links: Vec<HostLink> = state
        .links
        .iter()
        .map(|(name, link)| HostLink {
            index: link.index,
            name: name.clone(),
            kind: if link.loopback { String::new() } else { link.kind.clone() },
            mtu: link.mtu,
            mac: (!link.loopback).then_some(link.mac),
            up: link.up,
            carrier: link.up && link.carrier,
            loopback: link.loopback,
            vxlan: link.vxlan.as_ref().map(|v| (v.vni.get(), v.port)),
        })
        .collect();
    links.sort_by_key(|l| l.index);
    let addresses =
        links.iter().filter(|l| !scope.devices.contains(&l.name) && !scope.served.contains(&l.name)).flat_map(|link| {
            state.addresses.get(&link.name).into_iter().flatten().map(|address| HostAddress {
                device: link.name.clone(),
                address: *address,
                global: !link.loopback,
                permanent: true,
                temporary: false,
                deprecated: false,
            })
        });
    let of_others = state
        .routes
        .values()
        .flatten()
        .filter(|route| route.protocol != PROTOCOL_OURS && !over_our_device(state, scope, route));
    let on_link = OnLink::of(of_others.map(seen));
    let routes = state.routes.values().flatten().filter(|route| {
        let connected = route.protocol == PROTOCOL_KERNEL && over_our_device(state, scope, route);
        let shown = scope.shows(&seen(route)) || on_link.holds(route.destination);
        shown && route.protocol != PROTOCOL_OURS && !connected && !is_adoptable(state, scope, route)
    });
    let routes = routes.map(|route| HostRoute {
        destination: route.destination,
        device: route.next.device().cloned(),
        gateway: match &route.next {
            NextHop::Gateway { address, .. } => Some(*address),
            NextHop::Device(_) | NextHop::Blackhole => None,
        },
        source: route.source,
        metric: route.metric,
        protocol: route.protocol,
    });
    let (addresses, routes) = (addresses.collect(), routes.collect());
    HostView { links, addresses, routes }
}

// ---- applying ----

fn step(inner: &mut Inner, step: &Step) -> Result<(), Failure> {
    match step {
        Step::Create(Object::Link(to)) => link_create(inner, step, to),
        Step::Replace { to: Object::Link(to), .. } => link_alter(inner, step, to),
        Step::Remake { from, to, .. } => {
            delete(inner, step, from)?;
            match to {
                Object::Link(to) => link_create(inner, step, to),
                to => put(inner, step, None, to),
            }
        }
        Step::Create(to) => put(inner, step, None, to),
        Step::Replace { from, to } => put(inner, step, Some(from), to),
        Step::Delete(object) => delete(inner, step, object),
    }
}

/// One request, and what it means when it fails.
fn request(
    inner: &mut Inner,
    step: &Step,
    what: String,
    act: impl FnOnce(&mut State) -> Result<(), Errno>,
) -> Result<(), Failure> {
    inner.write(&step.key(), what, act).map_err(|stop| failure(step, stop))
}

fn link_create(inner: &mut Inner, step: &Step, to: &Link) -> Result<(), Failure> {
    let name = &to.name;
    let added = inner.write(&step.key(), format!("ip link add {to}"), |s| {
        s.vxlan_add(to)?;
        s.link_set_unfinished(name)
    });
    match added {
        Ok(()) => {}
        Err(Stop::Refused(Errno::EXIST)) => return link_exists(&inner.state, step, to),
        Err(stop) => return Err(failure(step, stop)),
    }
    // The kernel ignores an alias in the creating message.
    mark_link(inner, step, name)?;
    if to.tx_checksum_offload == Some(false) {
        request(inner, step, format!("ethtool -K {name} tx off"), |s| s.link_set_offload(name, false))?;
    }
    if to.up {
        request(inner, step, format!("ip link set {name} up"), |s| s.link_up(name))?;
    }
    Ok(())
}

fn mark_link(inner: &mut Inner, step: &Step, name: &DeviceName) -> Result<(), Failure> {
    request(inner, step, format!("ip link set {name} alias {ALIAS_OURS}"), |s| s.link_set_alias(name, Some(ALIAS_OURS)))
}

/// After `EEXIST`: what is there decides.
fn link_exists(state: &State, step: &Step, to: &Link) -> Result<(), Failure> {
    let LinkKind::Vxlan(wanted) = &to.kind;
    if let Some(there) = state.links.get(&to.name) {
        if !there.is_ours() {
            return Err(in_the_way(step, link_line(&to.name, there), "delete or rename that device"));
        }
        return match plain_link(&to.name, there).map(|plain| plain.fit(to)) {
            Some(Fit::Same) => Ok(()),
            _ => Err(exists(step)),
        };
    }
    let twin = state
        .links
        .iter()
        .find(|(_, l)| l.vxlan.as_ref().is_some_and(|v| (v.vni, v.port) == (wanted.vni, wanted.port)));
    match twin {
        Some((name, link)) => {
            Err(in_the_way(step, link_line(name, link), "delete that device, or give the overlay another VNI or port"))
        }
        None => Err(exists(step)),
    }
}

fn exists(step: &Step) -> Failure {
    Failure::Error(refused(step.to_string(), Errno::EXIST, "it is there with another value: observe again"))
}

fn link_alter(inner: &mut Inner, step: &Step, to: &Link) -> Result<(), Failure> {
    let name = &to.name;
    let LinkKind::Vxlan(wanted) = &to.kind;
    let Some(is) = inner.state.links.get(name).cloned() else {
        return Err(Failure::Error(refused(step.to_string(), Errno::NODEV, "it is gone: observe again")));
    };
    if is.vxlan.is_none() || !(is.is_ours() || is.alias.is_none()) {
        return Err(in_the_way(step, link_line(name, &is), "delete or rename that device"));
    }
    // A request names it by its number, which is looked up before anything is done.
    if wanted.underlay.as_ref().is_some_and(|lower| !inner.state.links.contains_key(lower)) {
        return Err(Failure::Error(refused(step.to_string(), Errno::NODEV, "its lower device is gone")));
    }
    if let Some(on) = to.tx_checksum_offload.filter(|on| *on != is.tx_checksum_offload) {
        let word = if on { "on" } else { "off" };
        request(inner, step, format!("ethtool -K {name} tx {word}"), |s| s.link_set_offload(name, on))?;
    }
    if !is.is_ours() {
        mark_link(inner, step, name)?;
    }
    // One attribute a request, so that a refusal names it; the lower device first, since it sets what MTU is possible.
    let mut now = is.vxlan.clone().unwrap_or_else(|| wanted.clone());
    if wanted.underlay.is_some() && now.underlay != wanted.underlay {
        now.underlay.clone_from(&wanted.underlay);
        request(inner, step, format!("ip link set {name} type vxlan dev {:?}", now.underlay), |s| {
            s.vxlan_alter(name, &now)
        })?;
    }
    if now.local != wanted.local {
        now.local = wanted.local;
        request(inner, step, format!("ip link set {name} type vxlan local {}", now.local), |s| {
            s.vxlan_alter(name, &now)
        })?;
    }
    if now.learning != wanted.learning {
        now.learning = wanted.learning;
        request(inner, step, format!("ip link set {name} type vxlan learning {}", now.learning), |s| {
            s.vxlan_alter(name, &now)
        })?;
    }
    // A new lower device may have cut it.
    let mtu = inner.state.links.get(name).map(|l| l.mtu);
    if mtu != Some(to.mtu.bytes()) {
        request(inner, step, format!("ip link set {name} mtu {}", to.mtu), |s| s.link_set_mtu(name, to.mtu.bytes()))?;
    }
    if is.mac != to.mac {
        // The kernel drops the neighbours then, permanent ones too.
        let there = inner.state.neighbours.iter().filter(|((device, _), _)| device == name);
        let there: Vec<(IpAddr, MacAddr)> = there.map(|((_, address), mac)| (*address, *mac)).collect();
        request(inner, step, format!("ip link set {name} address {}", to.mac), |s| s.link_set_mac(name, to.mac))?;
        for (address, mac) in there {
            let what = format!("ip neigh replace {address} lladdr {mac} dev {name}");
            request(inner, step, what, |s| s.neigh_replace(name, address, mac))?;
        }
    }
    match (is.up, to.up) {
        (false, true) => request(inner, step, format!("ip link set {name} up"), |s| s.link_up(name)),
        (true, false) => request(inner, step, format!("ip link set {name} down"), |s| s.link_down(name)),
        _ => Ok(()),
    }
}

/// Creates or replaces what is not a link.
fn put(inner: &mut Inner, step: &Step, from: Option<&Object>, to: &Object) -> Result<(), Failure> {
    match to {
        Object::Address(o) => {
            own_device(&inner.state, step, &o.device)?;
            let what = format!("ip addr add {} dev {}", o.address, o.device);
            match inner.write(&step.key(), what, |s| s.addr_add(&o.device, o.address)) {
                Ok(()) => Ok(()),
                // All that is on a device of ours is ours.
                Err(Stop::Refused(Errno::EXIST)) if has_address(&inner.state, o) => Ok(()),
                Err(stop) => Err(failure(step, stop)),
            }
        }
        Object::Neighbour(o) => {
            own_device(&inner.state, step, &o.device)?;
            let what = format!("ip neigh replace {} lladdr {} dev {}", o.address, o.mac, o.device);
            request(inner, step, what, |s| s.neigh_replace(&o.device, o.address, o.mac))
        }
        Object::Fdb(o) => {
            own_device(&inner.state, step, &o.device)?;
            let what = format!("bridge fdb replace {} dst {} dev {}", o.mac, o.remote, o.device);
            request(inner, step, what, |s| s.fdb_replace(&o.device, o.mac, o.remote))
        }
        Object::Route(to) => {
            let from = match from {
                Some(Object::Route(from)) => Some(from),
                _ => None,
            };
            put_route(inner, step, from, to)
        }
        _ => Err(Failure::Error(refused(step.to_string(), Errno::OPNOTSUPP, "not an object of this driver"))),
    }
}

fn has_address(state: &State, wanted: &Address) -> bool {
    state.addresses.get(&wanted.device).is_some_and(|list| list.contains(&wanted.address))
}

fn own_device(state: &State, step: &Step, name: &DeviceName) -> Result<(), Failure> {
    match state.links.get(name) {
        Some(link) if !link.is_ours() => Err(in_the_way(step, link_line(name, link), "delete or rename that device")),
        // The kernel says what it thinks of a missing one.
        _ => Ok(()),
    }
}

fn our_route(route: &Route) -> KernelRoute {
    KernelRoute {
        destination: route.destination,
        metric: route.metric,
        next: route.next.clone(),
        protocol: PROTOCOL_OURS,
        source: None,
    }
}

fn put_route(inner: &mut Inner, step: &Step, from: Option<&Route>, to: &Route) -> Result<(), Failure> {
    let wanted = our_route(to);
    let advice = "delete that route if it is not needed";
    let first = |state: &State| state.routes.get(&(to.destination, to.metric)).and_then(|l| l.first()).cloned();
    if let Some(from) = from {
        // Replacing takes whatever is first: it must be what was observed.
        let there = first(&inner.state);
        let ours = |r: &KernelRoute| r.protocol == PROTOCOL_OURS || (has_legacy_marks(r) && r.plain() == *from);
        if let Some(foreign) = there.filter(|r| !ours(r)) {
            return Err(in_the_way(step, route_line(&foreign), advice));
        }
        let what = format!("ip route replace {to}");
        return request(inner, step, what, |s| lead(s, &wanted, RouteMode::Replace));
    }
    let result = inner.write(&step.key(), format!("ip route add {to}"), |s| s.route_put(&wanted, RouteMode::Exclusive));
    let refused = match result {
        Ok(()) => return Ok(()),
        // IPv6 says so where the route that is there covers the gateway.
        Err(Stop::Refused(errno)) if errno == Errno::EXIST || errno == Errno::INVAL && !to.destination.is_ipv4() => {
            errno
        }
        Err(stop) => return Err(failure(step, stop)),
    };
    match first(&inner.state) {
        Some(there) if there.protocol != PROTOCOL_OURS => Err(in_the_way(step, route_line(&there), advice)),
        Some(there) if there == wanted => Ok(()),
        None if refused != Errno::EXIST => {
            request(inner, step, format!("ip route add {to}"), |s| lead(s, &wanted, RouteMode::Exclusive))
        }
        // Ours and different, or gone meanwhile: a replacement makes it so.
        _ => request(inner, step, format!("ip route replace {to}"), |s| lead(s, &wanted, RouteMode::Replace)),
    }
}

/// Sets a route. Where it is refused because others lead to its gateway over another device, a route of its own says for that moment
/// where the gateway is: the three are one message, so that nobody dies between them.
fn lead(state: &mut State, wanted: &KernelRoute, mode: RouteMode) -> Result<(), Errno> {
    let answer = state.route_put(wanted, mode);
    let NextHop::Gateway { device, address: address @ IpAddr::V6(_), onlink: true } = &wanted.next else {
        return answer;
    };
    if answer != Err(Errno::INVAL) {
        return answer;
    }
    let (destination, metric) = (IpNetwork::from(*address), Route::default_metric(Family::V6));
    let way = our_route(&Route { destination, metric, next: NextHop::Device(device.clone()) });
    // Where it cannot be set, the other is refused as before.
    let _ = state.route_put(&way, RouteMode::Exclusive);
    let answer = state.route_put(wanted, mode);
    let gone = state.route_del(destination, |r| r.metric == metric && r.protocol == PROTOCOL_OURS);
    answer.and(match gone {
        Err(Errno::SRCH) => Ok(()),
        other => other,
    })
}

fn delete(inner: &mut Inner, step: &Step, object: &Object) -> Result<(), Failure> {
    let foreign = |name: &DeviceName| inner.state.links.get(name).is_some_and(|l| !l.is_ours());
    let key = step.key();
    let result = match object {
        Object::Link(o) => {
            // An unmarked one is flannel's if it is a VXLAN device; anything else is somebody's.
            let there = inner.state.links.get(&o.name);
            if let Some(foreign) = there.filter(|l| !l.is_ours() && (l.vxlan.is_none() || l.alias.is_some())) {
                return Err(in_the_way(step, link_line(&o.name, foreign), "delete or rename that device"));
            }
            inner.write(&key, format!("ip link del {}", o.name), |s| s.link_del(&o.name))
        }
        Object::Address(o) if !foreign(&o.device) => {
            let what = format!("ip addr del {} dev {}", o.address, o.device);
            inner.write(&key, what, |s| s.addr_del(&o.device, o.address))
        }
        Object::Neighbour(o) if !foreign(&o.device) => {
            let what = format!("ip neigh del {} dev {}", o.address, o.device);
            inner.write(&key, what, |s| s.neigh_del(&o.device, o.address))
        }
        Object::Fdb(o) if !foreign(&o.device) => {
            let what = format!("bridge fdb del {} dst {} dev {}", o.mac, o.remote, o.device);
            inner.write(&key, what, |s| s.fdb_del(&o.device, o.mac, Some(o.remote)))
        }
        Object::Route(o) => {
            let what = format!("ip route del {o}");
            let fits = |r: &KernelRoute| {
                r.metric == o.metric && (r.protocol == PROTOCOL_OURS || (has_legacy_marks(r) && r.plain() == *o))
            };
            inner.write(&key, what, |s| s.route_del(o.destination, fits))
        }
        _ => Ok(()),
    };
    absent_is_fine(result).map_err(|stop| failure(step, stop))
}
