//! One look at everything: dumps first, then a pure sorting of what they hold into ours, in the way, and the host's.
//!
//! A dump of several parts that is cut through by a change bears the kernel's flag and is repeated; dumps of neighbours and forwarding entries
//! bear none. The kernel goes on in them by counting, so that an entry that goes away between two parts can hide another one; neighbours are
//! counted through one table of the whole machine, so that it may be in another namespace. What is hidden so is written once more, with the value
//! that it has; asking twice each time, to save that, would cost more.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::address::{self, RawAddress};
use super::link::{self, RawLink};
use super::names::Names;
use super::neighbour::{self, RawNeighbour};
use super::nexthop::{self, RawNexthop};
use super::requester::{Requester, Trouble};
use super::route::{self, Hop, RawRoute};
use super::wire::{Message, Messages, number};
use super::{ALIAS, Core, PROTOCOL, UNFINISHED};
use crate::driver::{
    DriverError, Errno, HostAddress, HostLink, HostRoute, HostView, Observed, OnLink, Scope, SeenRoute,
};
use crate::plan::{Address, Conflict, Fdb, Key, Neighbour, NextHop, Object, Owner, Route};
use crate::types::{DeviceName, Family};

/// All that the kernel told.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) names: Names,
    pub(super) addresses: Vec<RawAddress>,
    /// Of our devices alone.
    pub(super) neighbours: Vec<RawNeighbour>,
    pub(super) routes: Vec<RawRoute>,
    /// Whether the kernel has nexthop objects at all.
    pub(super) has_nexthops: bool,
    /// Of our devices, whether transmit checksums are offloaded.
    pub(super) offload: HashMap<u32, bool>,
}

/// How often everything is looked at again because a device came up between the dumps.
const LOOKS: usize = 2;

impl Found {
    /// Whether the devices of our routes and nexthop objects are all among the links, which were listed first.
    fn coherent(&self) -> bool {
        let routes = self.routes.iter().filter(|route| route.protocol == PROTOCOL);
        let hops = routes.flat_map(|route| &route.hops).filter_map(|hop| hop.index);
        let objects = self.names.nexthops.values().filter(|object| object.protocol == PROTOCOL);
        hops.chain(objects.filter_map(|object| object.index)).all(|index| self.names.links.contains_key(&index))
    }
}

/// Observes.
pub(super) async fn observe(core: &mut Core, scope: &Scope) -> Result<Observed, DriverError> {
    let mut found = look(core, scope).await?;
    for _ in 0..LOOKS {
        if found.coherent() {
            break;
        }
        found = look(core, scope).await?;
    }
    let observed = sort(&found, scope);
    let ours = |route: &&RawRoute| route.protocol == PROTOCOL;
    let gateways = found.routes.iter().filter(ours).filter_map(|route| {
        let IpNetwork::V4(destination) = route.destination else { return None };
        let gateway = route.nexthop.is_some() || route.hops.iter().any(|hop| hop.gateway.is_some());
        gateway.then_some(((destination, route.metric), route.nexthop))
    });
    let held = found.routes.iter().filter(|route| !ours(route)).filter_map(|route| route.nexthop);
    core.nexthops.observe(found.has_nexthops.then_some(found.names.nexthops.values()), gateways, held);
    core.legacy = observed
        .objects
        .iter()
        .filter(|(object, owner)| *owner == Owner::Adoptable && matches!(object, Object::Route(_)))
        .map(|(object, _)| object.key())
        .collect();
    Ok(observed)
}

async fn look(core: &mut Core, scope: &Scope) -> Result<Found, DriverError> {
    let requester = &mut core.requester;
    let links = dump(requester, "links", link::dump(), link::decode).await?;
    let mut found = Found { names: Names::new(links, []), ..Found::default() };
    found.addresses = dump(requester, "addresses", address::dump(), address::decode).await?;
    for link in found.names.links.values().filter(|link| carries_ours(link, scope)) {
        let (name, index) = (link.name.as_ref().map_or("", DeviceName::as_str), link.index);
        // A kernel that does not filter sends those of all devices.
        let mine = |n: &RawNeighbour| n.index == index && n.permanent;
        let (what, request) = (format!("neighbours of {name}"), neighbour::dump_neighbours(index));
        let here = |m: &Message<'_>| neighbour::decode(m).filter(|n| mine(n) && !n.fdb);
        found.neighbours.extend(dump(requester, &what, request, here).await?);
        let (what, request) = (format!("forwarding entries of {name}"), neighbour::dump_fdb(index));
        let here = |m: &Message<'_>| neighbour::decode(m).filter(|n| mine(n) && n.fdb);
        found.neighbours.extend(dump(requester, &what, request, here).await?);
        if let Some(ethtool) = &mut core.ethtool
            && let Ok(on) = ethtool.tx_checksum(index)
        {
            found.offload.insert(index, on);
        }
    }
    found.routes = routes(requester, Family::V4).await?;
    found.routes.extend(routes(requester, Family::V6).await?);
    if let Some(objects) = nexthops(requester).await? {
        found.has_nexthops = true;
        found.names.nexthops = objects.into_iter().map(|object| (object.id, object)).collect();
    }
    Ok(found)
}

/// The main table of a family.
pub(super) async fn routes(requester: &mut Requester, family: Family) -> Result<Vec<RawRoute>, DriverError> {
    let number = match family {
        Family::V4 => number::AF_INET,
        Family::V6 => number::AF_INET6,
    };
    // A kernel without IPv6 answers with the routes of every family.
    let decode =
        |message: &Message<'_>| route::decode(message).filter(|route| Family::of(route.destination.ip()) == family);
    match requester.dump(&mut route::dump(number), decode).await {
        // There is no main table before the first route or address.
        Err(Trouble::Refused(Errno::NOENT, _)) => Ok(Vec::new()),
        outcome => outcome.map_err(|trouble| trouble.error(format!("list {family} routes"))),
    }
}

/// All nexthop objects; `None` on a kernel that has none.
pub(super) async fn nexthops(requester: &mut Requester) -> Result<Option<Vec<RawNexthop>>, DriverError> {
    match requester.dump(&mut nexthop::dump(), nexthop::decode).await {
        Ok(objects) => Ok(Some(objects)),
        Err(Trouble::Refused(Errno::OPNOTSUPP | Errno::INVAL, _)) => Ok(None),
        Err(trouble) => Err(trouble.error("list nexthop objects")),
    }
}

/// Dumps a table, or says which could not be.
pub(super) async fn dump<T>(
    requester: &mut Requester,
    what: &str,
    mut request: Messages,
    decode: impl FnMut(&Message<'_>) -> Option<T>,
) -> Result<Vec<T>, DriverError> {
    requester.dump(&mut request, decode).await.map_err(|trouble| trouble.error(format!("list {what}")))
}

/// Whose a device is; `None` for one that is somebody else's. Our mark tells under any name: the device may have been
/// renamed, or left by another configuration. What bears no mark can be ours by its name alone.
pub(super) fn ours(link: &RawLink, scope: &Scope) -> Option<Owner> {
    let name = link.name.as_ref()?;
    let legacy = || link.vxlan.is_some_and(|vxlan| scope.adopts_device(name, vxlan.vni));
    link.owner(scope.adopt).filter(|owner| *owner == Owner::Ours || scope.devices.contains(name) || legacy())
}

/// Whether a device is made by a backend's own driver, and marked by it; or about to be: it is flannel's, or its maker was killed
/// before it had marked it.
fn served(link: &RawLink, scope: &Scope) -> bool {
    let Some(name) = &link.name else { return false };
    let to_be = || link.group == UNFINISHED || scope.adopts_served(name, &link.kind);
    scope.served.contains(name) && (link.alias == ALIAS || (link.alias.is_empty() && to_be()))
}

/// Whether what is on a device is ours.
pub(super) fn carries_ours(link: &RawLink, scope: &Scope) -> bool {
    ours(link, scope).is_some() || served(link, scope)
}

/// Where a route leads, as far as one [`NextHop`] can say it. A route of ours to which somebody gave several ways reads as one
/// to the unspecified address, and one over a device that is gone as a blackhole: neither is wanted, so it is put right.
pub(super) fn next_hop(route: &RawRoute, names: &Names) -> NextHop {
    if route.kind != number::RTN_UNICAST {
        return NextHop::Blackhole;
    }
    let object = route.nexthop.and_then(|id| names.nexthops.get(&id));
    let (index, gateway, onlink) = match (object, route.hops.as_slice()) {
        (Some(object), _) => (object.index, object.gateway, object.onlink),
        (None, [hop]) => (hop.index, hop.gateway, hop.onlink),
        (None, []) => (None, None, false),
        (None, [hop, ..]) => {
            let nowhere = if route.destination.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
            (hop.index, Some(nowhere), false)
        }
    };
    match (index.and_then(|index| names.device(index)), gateway) {
        (Some(device), Some(address)) => NextHop::Gateway { device, address, onlink },
        (Some(device), None) => NextHop::Device(device),
        (None, _) => NextHop::Blackhole,
    }
}

/// A route as an object.
pub(super) fn route_object(route: &RawRoute, names: &Names) -> Route {
    Route { destination: route.destination, metric: route.metric, next: next_hop(route, names) }
}

/// What a route of somebody else's is, in the words of `ip route`.
pub(super) fn describe(route: &RawRoute, names: &Names) -> String {
    let ways = route.hops.len();
    let mut text = match route.kind {
        number::RTN_UNICAST if ways > 1 => format!("route {} with {ways} ways", route.destination),
        number::RTN_UNREACHABLE => format!("route unreachable {}", route.destination),
        number::RTN_PROHIBIT => format!("route prohibit {}", route.destination),
        number::RTN_THROW => format!("route throw {}", route.destination),
        _ => route_object(route, names).to_string(),
    };
    let protocol = match route.protocol {
        number::RTPROT_KERNEL => "kernel".to_owned(),
        number::RTPROT_BOOT => "boot".to_owned(),
        4 => "static".to_owned(),
        other => other.to_string(),
    };
    text.push_str(&format!(" proto {protocol}"));
    text
}

/// What to do about a route in the way.
pub(super) fn advice(route: &RawRoute) -> String {
    match route.protocol {
        number::RTPROT_KERNEL => {
            "it belongs to an address of that device: give the device or the pod network another range".to_owned()
        }
        _ => format!("delete it (ip route del {}) if nothing needs it", route.destination),
    }
}

/// As an observed object, if a neighbour or forwarding entry of a device.
pub(super) fn neighbour_object(raw: &RawNeighbour, device: &DeviceName) -> Option<Object> {
    let (device, mac) = (device.clone(), raw.mac?);
    Some(if raw.fdb {
        Object::Fdb(Fdb { device, mac, remote: raw.address })
    } else {
        Object::Neighbour(Neighbour { device, address: raw.address, mac })
    })
}

/// A route as the rules of the scope ask about it.
pub(super) fn seen<'a>(route: &RawRoute, names: &'a Names) -> SeenRoute<'a> {
    let hop = match route.hops.as_slice() {
        [hop] if route.kind == number::RTN_UNICAST => *hop,
        _ => Hop::default(),
    };
    let name = |index: u32| names.links.get(&index).and_then(|link| link.name.as_ref());
    SeenRoute {
        destination: route.destination,
        metric: route.metric,
        protocol: route.protocol,
        device: hop.index.and_then(name),
        gateway: hop.gateway,
    }
}

/// Whether a route is of a kind that the host's view knows.
pub(super) fn plain(route: &RawRoute) -> bool {
    matches!(route.kind, number::RTN_UNICAST | number::RTN_BLACKHOLE..=number::RTN_THROW)
}

/// Sorts what was found.
pub(super) fn sort(found: &Found, scope: &Scope) -> Observed {
    let names = &found.names;
    let mut observed = Observed::default();
    let mut host = HostView::default();
    let mut mine: HashSet<u32> = HashSet::new();
    for link in names.links.values() {
        let Some(name) = &link.name else { continue };
        host.links.push(HostLink {
            index: link.index,
            name: name.clone(),
            kind: link.kind.clone(),
            mtu: link.mtu,
            mac: link.mac,
            up: link.up(),
            carrier: link.carrier(),
            loopback: link.flags & number::IFF_LOOPBACK != 0,
            vxlan: link.vxlan.map(|vxlan| (vxlan.vni, vxlan.port)),
        });
        if scope.served.contains(name) {
            if served(link, scope) {
                mine.insert(link.index);
            } else {
                observed.conflicts.push(Conflict {
                    object: Key::Link(name.clone()),
                    with: link.describe(),
                    advice: format!(
                        "it has not the alias {ALIAS} that the backend's driver gives: delete or rename it if that driver did not make it"
                    ),
                });
            }
            continue;
        }
        if link.alias == ALIAS && link.kind != "vxlan" && !scope.devices.contains(name) {
            observed.warnings.push(Conflict {
                object: Key::Link(name.clone()),
                with: link.describe(),
                advice: format!(
                    "another backend of podnet's made it, and none here has it: ip link del {name}, if it is not used"
                ),
            });
        }
        if !scope.devices.contains(name) && ours(link, scope).is_none() {
            continue;
        }
        let object = link.object(|number| names.device(number), found.offload.get(&link.index).copied());
        match (ours(link, scope), object) {
            (Some(owner), Some(object)) => {
                mine.insert(link.index);
                observed.objects.push((Object::Link(object), owner));
            }
            _ => observed.conflicts.push(Conflict {
                object: Key::Link(name.clone()),
                with: link.describe(),
                advice: format!(
                    "it is not a VXLAN device with the alias {ALIAS}: delete or rename it, or allow what flannel left to \
                     be taken over if it is that"
                ),
            }),
        }
    }
    for address in &found.addresses {
        let Some(device) = names.device(address.index) else { continue };
        if !mine.contains(&address.index) {
            host.addresses.push(HostAddress {
                device,
                address: address.address,
                global: address.scope == number::RT_SCOPE_UNIVERSE,
                permanent: address.permanent(),
                temporary: address.temporary(),
                deprecated: address.deprecated(),
            });
        } else if scope.holds(address.address) && !link_local(address.address.ip()) {
            observed.objects.push((Object::Address(Address { device, address: address.address }), Owner::Ours));
        }
    }
    observed.objects.reserve(found.neighbours.len() + found.routes.len());
    for neighbour in &found.neighbours {
        let device = names.links.get(&neighbour.index).and_then(|link| link.name.as_ref());
        let object = device.and_then(|device| neighbour_object(neighbour, device));
        observed.objects.extend(object.map(|object| (object, Owner::Ours)));
    }
    // Of several routes of one destination and metric the kernel uses the first.
    let mut keys: HashSet<(IpNetwork, u32)> = HashSet::with_capacity(found.routes.len());
    let of_others = found.routes.iter().filter(|route| route.protocol != PROTOCOL && !over(route, &mine));
    let on_link = OnLink::of(of_others.map(|route| seen(route, names)));
    for route in &found.routes {
        let first = keys.insert((route.destination, route.metric));
        if route.protocol == PROTOCOL {
            if first {
                observed.objects.push((Object::Route(route_object(route, names)), Owner::Ours));
            }
            continue;
        }
        // What the kernel adds for an address of ours (IPv6: also for a /128) goes with the address.
        if route.protocol == number::RTPROT_KERNEL && over(route, &mine) {
            continue;
        }
        let plainly = seen(route, names);
        if first && route.kind == number::RTN_UNICAST && scope.adopts(&plainly, over(route, &mine)) {
            observed.objects.push((Object::Route(route_object(route, names)), Owner::Adoptable));
            continue;
        }
        if first && scope.holds(route.destination) {
            observed.conflicts.push(Conflict {
                object: Key::Route(route.destination, route.metric),
                with: describe(route, names),
                advice: advice(route),
            });
        }
        if plain(route) && (scope.shows(&plainly) || on_link.holds(route.destination)) {
            let several = route.hops.len() > 1;
            let next = next_hop(route, names);
            host.routes.push(HostRoute {
                destination: route.destination,
                device: next.device().filter(|_| !several).cloned(),
                gateway: match next {
                    NextHop::Gateway { address, .. } if !several => Some(address),
                    _ => None,
                },
                source: route.source,
                metric: route.metric,
                protocol: route.protocol,
            });
        }
    }
    observed.host = Some(host);
    observed
}

/// Whether a route's one way is over a device of ours.
fn over(route: &RawRoute, mine: &HashSet<u32>) -> bool {
    matches!(route.hops.as_slice(), [hop] if hop.index.is_some_and(|index| mine.contains(&index)))
}

fn link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}
