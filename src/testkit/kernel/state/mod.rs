//! The state of the fake kernel and the rules by which it moves: what one netlink request does, what it drags along,
//! what it answers and what the kernel tells about it.
//!
//! Plain and synchronous: it knows nothing of drivers, ownership or faults. Each rule was seen on kernel 6.18; the
//! model test compares them with the kernel that runs it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::driver::Errno;
use crate::driver::netlink::ALIAS as ALIAS_OURS;
use crate::masquerade::Ruleset;
use crate::plan::{Conflict, Link, LinkKind, NextHop, Route, SysctlName, Vxlan};
use crate::types::{DeviceName, Family, MacAddr};

/// `RTPROT_KERNEL`.
pub const PROTOCOL_KERNEL: u8 = 2;
/// `RTPROT_BOOT`: what `ip route add` and flannel write.
pub const PROTOCOL_BOOT: u8 = 3;
/// `RTPROT_STATIC`: an operator's.
pub const PROTOCOL_STATIC: u8 = 4;
/// `RTPROT_DHCP`.
pub const PROTOCOL_DHCP: u8 = 16;

/// The least MTU with which a device speaks IPv6 (RFC 8200, section 5).
const IPV6_MIN_MTU: u32 = 1280;

pub(super) const ENXIO: Errno = Errno(6);
pub(super) const EAFNOSUPPORT: Errno = Errno(97);
pub(super) const EADDRINUSE: Errno = Errno(98);
pub(super) const ENETUNREACH: Errno = Errno(101);
pub(super) const EHOSTUNREACH: Errno = Errno(113);

/// A route of the main table as the kernel holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelRoute {
    /// Where to; canonical (no host bits).
    pub destination: IpNetwork,
    /// Lower wins. For IPv6, 0 becomes 1024.
    pub metric: u32,
    /// By which way.
    pub next: NextHop,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// The preferred source address.
    pub source: Option<IpAddr>,
}

impl KernelRoute {
    /// A route as `ip route add` makes it: protocol boot, the family's default metric.
    pub fn boot(destination: IpNetwork, next: NextHop) -> Self {
        let metric = Route::default_metric(Family::of(destination.ip()));
        KernelRoute { destination, metric, next, protocol: PROTOCOL_BOOT, source: None }
    }

    /// The same with another metric.
    pub fn metric(self, metric: u32) -> Self {
        KernelRoute { metric, ..self }
    }

    /// The same of another protocol.
    pub fn protocol(self, protocol: u8) -> Self {
        KernelRoute { protocol, ..self }
    }

    /// The same with a preferred source address.
    pub fn source(self, source: IpAddr) -> Self {
        KernelRoute { source: Some(source), ..self }
    }

    pub(super) fn plain(&self) -> Route {
        Route { destination: self.destination, metric: self.metric, next: self.next.clone() }
    }

    fn family(&self) -> Family {
        Family::of(self.destination.ip())
    }
}

/// What a route request does where its destination and metric are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteMode {
    /// `NLM_F_CREATE | NLM_F_EXCL`, as `ip route add`.
    Exclusive,
    /// `NLM_F_CREATE | NLM_F_REPLACE`, as `ip route replace`.
    Replace,
    /// `NLM_F_CREATE | NLM_F_APPEND`, as `ip route append`.
    Append,
}

/// A device.
#[derive(Debug, Clone)]
pub(super) struct LinkState {
    pub(super) index: u32,
    /// As `ip -d link` prints it; empty for a physical device.
    pub(super) kind: String,
    pub(super) vxlan: Option<Vxlan>,
    pub(super) mtu: u32,
    /// Whether it has an IPv6 side. The kernel looks at the MTU when it is made, set, and when the device goes up.
    pub(super) speaks_ipv6: bool,
    pub(super) mac: MacAddr,
    pub(super) up: bool,
    pub(super) carrier: bool,
    pub(super) alias: Option<String>,
    /// Made by us and not marked yet: the real driver says so by the device group.
    pub(super) unfinished: bool,
    pub(super) loopback: bool,
    pub(super) tx_checksum_offload: bool,
}

impl LinkState {
    pub(super) fn is_ours(&self) -> bool {
        self.vxlan.is_some() && self.alias.as_deref() == Some(ALIAS_OURS)
    }
}

/// The firewall table of a family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) rules: Ruleset,
    /// Bears our mark: else it is somebody else's of the same name.
    pub(super) marked: bool,
}

/// What the kernel tells its listeners.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    Link(DeviceName),
    Address(DeviceName, IpNetwork, bool),
    Neighbour(DeviceName, IpAddr, MacAddr, bool),
    Fdb(DeviceName, MacAddr, IpAddr, Told),
    Route(KernelRoute, Told),
    /// The table of a family, and whether it was deleted; or something that firewall drivers watch beside it.
    Table(Family, bool),
    /// Forwarding of a family was switched.
    Forwarding,
}

/// What a message says of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    New,
    /// New, in the place of another value (`NLM_F_REPLACE`); the other one is not mentioned.
    Replaced,
    Gone,
}

/// Whether an event is the request's own echo: the real driver filters those by its port id. What a request drags along
/// comes from the kernel itself (port id 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Echo {
    Yes,
    No,
}

pub(super) type Answer = Result<(), Errno>;

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) links: BTreeMap<DeviceName, LinkState>,
    last_index: u32,
    /// In the kernel's order: of one IPv4 subnet the first is the primary.
    pub(super) addresses: BTreeMap<DeviceName, Vec<IpNetwork>>,
    pub(super) neighbours: BTreeMap<(DeviceName, IpAddr), MacAddr>,
    pub(super) fdb: BTreeMap<(DeviceName, MacAddr), Vec<IpAddr>>,
    /// Several of one destination and metric can stand behind each other; the first is used.
    pub(super) routes: BTreeMap<(IpNetwork, u32), Vec<KernelRoute>>,
    pub(super) tables: BTreeMap<Family, Table>,
    pub(super) flannel_tables: BTreeSet<Family>,
    pub(super) warnings: BTreeMap<Family, Vec<Conflict>>,
    pub(super) sysctls: BTreeMap<SysctlName, String>,
    events: Vec<(Event, Echo)>,
}

impl State {
    pub(super) fn take_events(&mut self) -> Vec<(Event, Echo)> {
        std::mem::take(&mut self.events)
    }

    fn echo(&mut self, event: Event) {
        self.events.push((event, Echo::Yes));
    }

    fn tell(&mut self, event: Event) {
        self.events.push((event, Echo::No));
    }

    fn link(&self, name: &DeviceName) -> Result<&LinkState, Errno> {
        self.links.get(name).ok_or(Errno::NODEV)
    }

    fn link_mut(&mut self, name: &DeviceName) -> Result<&mut LinkState, Errno> {
        self.links.get_mut(name).ok_or(Errno::NODEV)
    }

    // ---- links ----

    pub(super) fn link_add(&mut self, name: &DeviceName, kind: &str, mtu: u32) -> Answer {
        self.insert_link(name, |index| LinkState {
            index,
            kind: kind.to_owned(),
            vxlan: None,
            mtu,
            speaks_ipv6: mtu >= IPV6_MIN_MTU,
            mac: MacAddr::derived(format!("{name}/{index}").as_bytes()),
            up: false,
            carrier: true,
            alias: None,
            unfinished: false,
            loopback: kind == "loopback",
            tx_checksum_offload: true,
        })
    }

    fn insert_link(&mut self, name: &DeviceName, make: impl FnOnce(u32) -> LinkState) -> Answer {
        if self.links.contains_key(name) {
            return Err(Errno::EXIST);
        }
        self.last_index += 1;
        let link = make(self.last_index);
        self.links.insert(name.clone(), link);
        self.sysctls.insert(SysctlName::accept_ra(name), "1".to_owned());
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Makes a VXLAN device. It has no alias (the kernel ignores one in the creating message) and is down, whatever
    /// `link` says. An MTU above what the lower device leaves is silently cut.
    pub(super) fn vxlan_add(&mut self, link: &Link) -> Answer {
        let LinkKind::Vxlan(vxlan) = &link.kind;
        if self.links.contains_key(&link.name) {
            return Err(Errno::EXIST);
        }
        if !link.mac.is_usable() {
            return Err(Errno::ADDRNOTAVAIL);
        }
        let most = self.vxlan_most(vxlan)?;
        let taken = self.links.values().filter_map(|l| l.vxlan.as_ref()).any(|other| {
            (other.vni, other.port, other.gbp, other.local.is_ipv4())
                == (vxlan.vni, vxlan.port, vxlan.gbp, vxlan.local.is_ipv4())
        });
        if taken {
            return Err(Errno::EXIST);
        }
        let mtu = link.mtu.bytes().min(most);
        self.insert_link(&link.name, |index| LinkState {
            index,
            kind: "vxlan".to_owned(),
            vxlan: Some(vxlan.clone()),
            mtu,
            speaks_ipv6: mtu >= IPV6_MIN_MTU,
            mac: link.mac,
            up: false,
            carrier: true,
            alias: None,
            unfinished: false,
            loopback: false,
            tx_checksum_offload: link.tx_checksum_offload.unwrap_or(true),
        })
    }

    /// The largest MTU that a VXLAN device may have: the lower device's less outer IP, UDP, VXLAN and inner Ethernet.
    fn vxlan_most(&self, vxlan: &Vxlan) -> Result<u32, Errno> {
        let overhead = if vxlan.local.is_ipv4() { 50 } else { 70 };
        match &vxlan.underlay {
            Some(lower) => Ok(self.link(lower)?.mtu.saturating_sub(overhead)),
            None => Ok(65_535),
        }
    }

    /// Changes a VXLAN device in place. The MTU is cut when the lower device becomes another, and then only; nobody in the
    /// kernel is told, so that IPv6 goes on below 1280 bytes.
    pub(super) fn vxlan_alter(&mut self, name: &DeviceName, to: &Vxlan) -> Answer {
        let link = self.link(name)?;
        let Some(is) = &link.vxlan else { return Err(Errno::OPNOTSUPP) };
        // GBP is a flag that a request can only set.
        if (is.vni, is.port) != (to.vni, to.port) || (to.gbp && !is.gbp) {
            return Err(Errno::OPNOTSUPP);
        }
        if is.local.is_ipv4() != to.local.is_ipv4() {
            return Err(Errno::OPNOTSUPP);
        }
        // A lower device can be exchanged, not taken away.
        let underlay = to.underlay.clone().or_else(|| is.underlay.clone());
        let to = Vxlan { underlay, gbp: is.gbp, ..to.clone() };
        let other_lower = is.underlay != to.underlay;
        let most = self.vxlan_most(&to)?;
        let link = self.link_mut(name)?;
        if other_lower {
            link.mtu = link.mtu.min(most);
        }
        link.vxlan = Some(to);
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Deletes a device, what is on it, and the VXLAN devices above it.
    pub(super) fn link_del(&mut self, name: &DeviceName) -> Answer {
        if self.link(name)?.loopback {
            return Err(Errno::OPNOTSUPP);
        }
        let above: Vec<DeviceName> = self
            .links
            .iter()
            .filter(|(_, l)| l.vxlan.as_ref().is_some_and(|v| v.underlay.as_ref() == Some(name)))
            .map(|(n, _)| n.clone())
            .collect();
        for upper in above {
            self.link_del(&upper)?;
        }
        if self.link(name)?.up {
            self.link_down(name)?;
        }
        self.flush_neighbours(name, None);
        let addresses = self.addresses.remove(name).unwrap_or_default();
        for (place, address) in addresses.iter().enumerate() {
            self.tell(Event::Address(name.clone(), *address, false));
            // The primary goes first, and for a secondary without one `fib_del_ifaddr` does nothing.
            if !is_secondary(*address, &addresses[..place]) {
                self.source_gone(address.ip());
            }
        }
        let entries: Vec<_> = self.fdb.keys().filter(|(device, _)| device == name).cloned().collect();
        for key in entries {
            for remote in self.fdb.remove(&key).unwrap_or_default() {
                self.tell(Event::Fdb(name.clone(), key.1, remote, Told::Gone));
            }
        }
        self.links.remove(name);
        self.sysctls.remove(&SysctlName::accept_ra(name));
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    /// Takes a device down: its routes go (of IPv4 ones nothing is told), its permanent neighbours, its IPv6
    /// addresses. FDB entries and IPv4 addresses stay.
    pub(super) fn link_down(&mut self, name: &DeviceName) -> Answer {
        let link = self.link_mut(name)?;
        if !link.up {
            return Ok(());
        }
        link.up = false;
        self.echo(Event::Link(name.clone()));
        self.flush_routes_of(name, Family::V4);
        self.flush_neighbours(name, Some(Family::V4));
        self.disable_ipv6(name);
        Ok(())
    }

    /// Brings a device up: the connected routes of its addresses come, nothing else comes back.
    pub(super) fn link_up(&mut self, name: &DeviceName) -> Answer {
        let link = self.link(name)?;
        if link.up {
            return Ok(());
        }
        if let Some(vxlan) = &link.vxlan {
            // One socket serves a port and family; it either speaks GBP or not.
            let clash = self.links.values().filter(|l| l.up).filter_map(|l| l.vxlan.as_ref()).any(|other| {
                (other.port, other.local.is_ipv4()) == (vxlan.port, vxlan.local.is_ipv4()) && other.gbp != vxlan.gbp
            });
            if clash {
                return Err(EADDRINUSE);
            }
        }
        self.link_mut(name)?.up = true;
        self.echo(Event::Link(name.clone()));
        for address in self.addresses.get(name).cloned().unwrap_or_default() {
            self.add_connected(name, address);
        }
        self.look_at_mtu(name);
        Ok(())
    }

    pub(super) fn link_set_carrier(&mut self, name: &DeviceName, carrier: bool) -> Answer {
        self.link_mut(name)?.carrier = carrier;
        self.tell(Event::Link(name.clone()));
        Ok(())
    }

    /// Sets an MTU. What a VXLAN device's lower device does not leave is refused; a VXLAN device above does not follow.
    pub(super) fn link_set_mtu(&mut self, name: &DeviceName, mtu: u32) -> Answer {
        let link = self.link(name)?;
        let most = match &link.vxlan {
            Some(vxlan) => self.vxlan_most(vxlan)?,
            None => 65_535,
        };
        if link.mtu == mtu {
            return Ok(());
        }
        if !(68..=most).contains(&mtu) {
            return Err(Errno::INVAL);
        }
        self.link_mut(name)?.mtu = mtu;
        self.echo(Event::Link(name.clone()));
        self.look_at_mtu(name);
        Ok(())
    }

    /// Below 1280 bytes a device does not speak IPv6.
    fn look_at_mtu(&mut self, name: &DeviceName) {
        let Some(link) = self.links.get_mut(name) else { return };
        link.speaks_ipv6 = link.mtu >= IPV6_MIN_MTU;
        if !link.speaks_ipv6 {
            self.disable_ipv6(name);
        }
    }

    /// Sets the Ethernet address: all neighbours of the device go, permanent ones too.
    pub(super) fn link_set_mac(&mut self, name: &DeviceName, mac: MacAddr) -> Answer {
        let link = self.link_mut(name)?;
        if !mac.is_usable() {
            return Err(Errno::ADDRNOTAVAIL);
        }
        link.mac = mac;
        self.echo(Event::Link(name.clone()));
        self.flush_neighbours(name, None);
        Ok(())
    }

    /// Says with the creating message that the device is ours although its alias, which needs another, is not there yet.
    pub(super) fn link_set_unfinished(&mut self, name: &DeviceName) -> Answer {
        self.link_mut(name)?.unfinished = true;
        Ok(())
    }

    /// The alias; the device group is the default one then.
    pub(super) fn link_set_alias(&mut self, name: &DeviceName, alias: Option<&str>) -> Answer {
        let link = self.link_mut(name)?;
        link.alias = alias.map(str::to_owned);
        link.unfinished = false;
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    pub(super) fn link_set_offload(&mut self, name: &DeviceName, on: bool) -> Answer {
        self.link_mut(name)?.tx_checksum_offload = on;
        self.echo(Event::Link(name.clone()));
        Ok(())
    }

    fn disable_ipv6(&mut self, name: &DeviceName) {
        self.flush_routes_of(name, Family::V6);
        self.flush_neighbours(name, Some(Family::V6));
        if self.links.get(name).is_some_and(|l| l.loopback) {
            return;
        }
        let Some(list) = self.addresses.get_mut(name) else { return };
        let (gone, stay) = list.iter().partition(|a| a.is_ipv6());
        *list = stay;
        let gone: Vec<IpNetwork> = gone;
        for address in gone {
            self.tell(Event::Address(name.clone(), address, false));
            self.source_gone(address.ip());
        }
    }

    fn flush_routes_of(&mut self, name: &DeviceName, family: Family) {
        // The kernel is silent about IPv4 routes that it drops by itself (`fib_table_flush`).
        self.drop_routes(family == Family::V6, |r| r.family() == family && r.next.device() == Some(name));
    }

    fn drop_routes(&mut self, told: bool, dropped: impl Fn(&KernelRoute) -> bool) -> usize {
        let mut gone = Vec::new();
        self.routes.retain(|_, list| {
            list.retain(|route| {
                let drop = dropped(route);
                if drop {
                    gone.push(route.clone());
                }
                !drop
            });
            !list.is_empty()
        });
        let count = gone.len();
        if told {
            for route in gone {
                self.tell(Event::Route(route, Told::Gone));
            }
        }
        count
    }

    fn flush_neighbours(&mut self, name: &DeviceName, family: Option<Family>) {
        let gone: Vec<_> = self
            .neighbours
            .keys()
            .filter(|(device, address)| device == name && family.is_none_or(|f| f == Family::of(*address)))
            .cloned()
            .collect();
        for key in gone {
            if let Some(mac) = self.neighbours.remove(&key) {
                self.tell(Event::Neighbour(key.0, key.1, mac, false));
            }
        }
    }

    // ---- addresses ----

    pub(super) fn addr_add(&mut self, name: &DeviceName, address: IpNetwork) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(Errno::INVAL);
        }
        let up = link.up;
        let list = self.addresses.entry(name.clone()).or_default();
        if list.iter().any(|a| a.ip() == address.ip() && (a.is_ipv6() || a.prefix() == address.prefix())) {
            return Err(Errno::EXIST);
        }
        let is_secondary = |list: &[IpNetwork], of: IpNetwork| list.iter().any(|a| canonical(*a) == canonical(of));
        let place = match address {
            // The newest first.
            IpNetwork::V6(_) => list.iter().position(|a| a.is_ipv6()).unwrap_or(list.len()),
            // Primaries, then secondaries.
            IpNetwork::V4(_) => {
                let v4: Vec<IpNetwork> = list.iter().copied().filter(|a| a.is_ipv4()).collect();
                let primary = |(i, a): (usize, &IpNetwork)| !is_secondary(v4.get(..i).unwrap_or_default(), *a);
                if is_secondary(&v4, address) {
                    v4.len()
                } else {
                    v4.iter().enumerate().filter(|p| primary(*p)).count()
                }
            }
        };
        list.insert(place, address);
        self.echo(Event::Address(name.clone(), address, true));
        if up {
            self.add_connected(name, address);
        }
        Ok(())
    }

    /// Removes an address. With the primary of an IPv4 subnet its secondaries go; with the last IPv4 address of a
    /// device its IPv4 routes (silently) and its permanent IPv4 neighbours go. IPv6 does neither.
    pub(super) fn addr_del(&mut self, name: &DeviceName, address: IpNetwork) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(ENXIO);
        }
        let list = self.addresses.entry(name.clone()).or_default();
        let Some(place) = list.iter().position(|a| *a == address) else {
            return Err(Errno::ADDRNOTAVAIL);
        };
        let primary = address.is_ipv4() && !is_secondary(address, &list[..place]);
        let gone: Vec<IpNetwork> =
            list.iter().filter(|a| **a == address || (primary && same_subnet(address, **a))).copied().collect();
        list.retain(|a| !gone.contains(a));
        let no_v4 = address.is_ipv4() && !list.iter().any(|a| a.is_ipv4());
        for address in gone {
            self.echo(Event::Address(name.clone(), address, false));
            self.remove_connected(name, address);
            self.source_gone(address.ip());
        }
        if no_v4 {
            self.flush_routes_of(name, Family::V4);
            self.flush_neighbours(name, Some(Family::V4));
        }
        Ok(())
    }

    fn connected(name: &DeviceName, address: IpNetwork) -> Option<KernelRoute> {
        let destination = canonical(address);
        let (metric, source) = match address {
            IpNetwork::V4(a) if a.prefix() == 32 => return None,
            IpNetwork::V4(_) => (0, Some(address.ip())),
            IpNetwork::V6(_) => (256, None),
        };
        let next = NextHop::Device(name.clone());
        Some(KernelRoute { destination, metric, next, protocol: PROTOCOL_KERNEL, source })
    }

    fn add_connected(&mut self, name: &DeviceName, address: IpNetwork) {
        if self.links.get(name).is_none_or(|l| l.loopback) {
            return;
        }
        let secondary = self.addresses.get(name).is_some_and(|list| {
            let earlier = list.iter().position(|a| *a == address).unwrap_or(list.len());
            is_secondary(address, &list[..earlier])
        });
        if let Some(route) = Self::connected(name, address).filter(|_| !secondary) {
            let list = self.routes.entry((route.destination, route.metric)).or_default();
            if !list.contains(&route) {
                list.push(route.clone());
                self.tell(Event::Route(route, Told::New));
            }
        }
    }

    fn remove_connected(&mut self, name: &DeviceName, address: IpNetwork) {
        let Some(route) = Self::connected(name, address) else { return };
        let still = address.is_ipv6()
            && self.addresses.get(name).is_some_and(|l| l.iter().any(|a| canonical(*a) == canonical(address)));
        if !still {
            self.drop_routes(true, |r| *r == route);
        }
    }

    /// IPv4 routes that prefer a source which is gone go too, silently; IPv6 ones only forget it.
    fn source_gone(&mut self, source: IpAddr) {
        if self.is_local(source) {
            return;
        }
        match Family::of(source) {
            Family::V4 => {
                self.drop_routes(false, |r| r.source == Some(source));
            }
            Family::V6 => {
                for route in self.routes.values_mut().flatten().filter(|r| r.source == Some(source)) {
                    route.source = None;
                }
            }
        }
    }

    fn is_local(&self, address: IpAddr) -> bool {
        self.addresses.values().flatten().any(|a| a.ip() == address)
    }

    // ---- neighbours and FDB ----

    /// `NLM_F_CREATE | NLM_F_REPLACE`, `NUD_PERMANENT`. The device need not be up.
    pub(super) fn neigh_replace(&mut self, name: &DeviceName, address: IpAddr, mac: MacAddr) -> Answer {
        let link = self.link(name)?;
        if address.is_ipv6() && !link.speaks_ipv6 {
            return Err(Errno::INVAL);
        }
        let before = self.neighbours.insert((name.clone(), address), mac);
        if before != Some(mac) {
            self.echo(Event::Neighbour(name.clone(), address, mac, true));
        }
        Ok(())
    }

    pub(super) fn neigh_del(&mut self, name: &DeviceName, address: IpAddr) -> Answer {
        self.link(name)?;
        let mac = self.neighbours.remove(&(name.clone(), address)).ok_or(Errno::NOENT)?;
        self.echo(Event::Neighbour(name.clone(), address, mac, false));
        Ok(())
    }

    fn fdb_device(&self, name: &DeviceName, remote: Option<IpAddr>) -> Answer {
        let vxlan = self.link(name)?.vxlan.as_ref().ok_or(Errno::OPNOTSUPP)?;
        match remote {
            Some(remote) if remote.is_ipv4() != vxlan.local.is_ipv4() => Err(EAFNOSUPPORT),
            _ => Ok(()),
        }
    }

    /// `NLM_F_CREATE | NLM_F_REPLACE`: of a unicast MAC the one remote is changed in place; zero and multicast MACs refuse
    /// it.
    pub(super) fn fdb_replace(&mut self, name: &DeviceName, mac: MacAddr, remote: IpAddr) -> Answer {
        self.fdb_device(name, Some(remote))?;
        if !mac.is_usable() {
            return Err(Errno::OPNOTSUPP);
        }
        let list = self.fdb.entry((name.clone(), mac)).or_default();
        let told = match list.first() {
            Some(before) if *before == remote => return Ok(()),
            Some(_) => Told::Replaced,
            None => Told::New,
        };
        *list = vec![remote];
        self.echo(Event::Fdb(name.clone(), mac, remote, told));
        Ok(())
    }

    /// `NLM_F_CREATE | NLM_F_APPEND`: zero and multicast MACs get one more remote; a unicast MAC that is there keeps
    /// its own, and the kernel says that all is well.
    pub(super) fn fdb_append(&mut self, name: &DeviceName, mac: MacAddr, remote: IpAddr) -> Answer {
        self.fdb_device(name, Some(remote))?;
        let list = self.fdb.entry((name.clone(), mac)).or_default();
        if list.contains(&remote) || (!list.is_empty() && mac.is_usable()) {
            return Ok(());
        }
        list.push(remote);
        self.echo(Event::Fdb(name.clone(), mac, remote, Told::New));
        Ok(())
    }

    /// Deletes one remote of a MAC, or all. A remote that a known MAC does not have is deleted with success.
    pub(super) fn fdb_del(&mut self, name: &DeviceName, mac: MacAddr, remote: Option<IpAddr>) -> Answer {
        self.fdb_device(name, None)?;
        let key = (name.clone(), mac);
        let list = self.fdb.get_mut(&key).ok_or(Errno::NOENT)?;
        let gone: Vec<IpAddr> = list.iter().filter(|r| remote.is_none_or(|only| only == **r)).copied().collect();
        list.retain(|r| !gone.contains(r));
        if list.is_empty() {
            self.fdb.remove(&key);
        }
        for remote in gone {
            self.echo(Event::Fdb(name.clone(), mac, remote, Told::Gone));
        }
        Ok(())
    }

    // ---- routes ----

    pub(super) fn route_put(&mut self, route: &KernelRoute, mode: RouteMode) -> Answer {
        let mut route = route.clone();
        let family = route.family();
        if family == Family::V6 && route.metric == 0 {
            route.metric = Route::default_metric(family);
        }
        if canonical(route.destination) != route.destination {
            return Err(Errno::INVAL);
        }
        match family {
            Family::V4 => self.check_next_v4(&route)?,
            Family::V6 => self.check_next_v6(&route)?,
        }
        let list = self.routes.entry((route.destination, route.metric)).or_default();
        let mut told = Told::New;
        match mode {
            RouteMode::Exclusive if !list.is_empty() => return Err(Errno::EXIST),
            RouteMode::Replace if !list.is_empty() => {
                // IPv4 notices that nothing would change; IPv6 changes it all the same.
                match (family, list.iter().position(|r| *r == route)) {
                    (Family::V4, Some(0)) => return Ok(()),
                    (Family::V4, Some(_)) => return Err(Errno::EXIST),
                    _ => {}
                }
                let gateway = |r: &KernelRoute| matches!(r.next, NextHop::Gateway { .. });
                let place = match family {
                    Family::V4 => 0,
                    Family::V6 => list.iter().position(|r| gateway(r) == gateway(&route)).unwrap_or(0),
                };
                if let Some(slot) = list.get_mut(place) {
                    *slot = route.clone();
                }
                told = Told::Replaced;
            }
            RouteMode::Append if list.contains(&route) => return Err(Errno::EXIST),
            _ => list.push(route.clone()),
        }
        self.echo(Event::Route(route, told));
        Ok(())
    }

    fn check_next_v4(&self, route: &KernelRoute) -> Answer {
        match &route.next {
            NextHop::Gateway { device, address, onlink } => {
                if *onlink {
                    if !self.link(device)?.up {
                        return Err(Errno::NETDOWN);
                    }
                    if !is_unicast(*address) || self.is_local(*address) {
                        return Err(Errno::INVAL);
                    }
                } else if self.addresses.get(device).is_some_and(|l| l.iter().any(|a| a.ip() == *address)) {
                    // Our own address there will do, but it is found on a device that is down too.
                    if !self.link(device)?.up {
                        return Err(Errno::NETDOWN);
                    }
                } else if !self.is_on_link_v4(device, *address) {
                    return Err(ENETUNREACH);
                }
            }
            NextHop::Device(device) => {
                if !self.link(device)?.up {
                    return Err(Errno::NETDOWN);
                }
            }
            // Its source is not looked at.
            NextHop::Blackhole => return Ok(()),
        }
        match route.source {
            Some(source) if !self.is_local(source) => Err(Errno::INVAL),
            _ => Ok(()),
        }
    }

    fn check_next_v6(&self, route: &KernelRoute) -> Answer {
        let Some(device) = route.next.device() else { return Ok(()) };
        let link = self.link(device)?;
        if !link.speaks_ipv6 {
            return Err(Errno::NODEV);
        }
        if let NextHop::Gateway { address, onlink, .. } = &route.next {
            if *onlink && !link.up {
                return Err(Errno::NETDOWN);
            }
            if !is_unicast(*address) || self.is_local(*address) {
                return Err(Errno::INVAL);
            }
            if *onlink {
                // The gateway must not be known to be elsewhere; a default route does not say so.
                let found = self.lookup_v6(device, *address);
                let elsewhere =
                    found.is_some_and(|r| r.destination.prefix() > 0 && r.next.device().is_some_and(|d| d != device));
                if elsewhere {
                    return Err(Errno::INVAL);
                }
            } else {
                let found = self.covering(*address).find(|r| r.next.device() == Some(device));
                if !found.is_some_and(|r| matches!(r.next, NextHop::Device(_))) {
                    return Err(EHOSTUNREACH);
                }
            }
        }
        if !link.up {
            return Err(Errno::NETDOWN);
        }
        Ok(())
    }

    /// Whether a route of link scope on the device covers the address: routes by a gateway do not count.
    fn is_on_link_v4(&self, device: &DeviceName, address: IpAddr) -> bool {
        self.covering(address).any(|r| r.next == NextHop::Device(device.clone()))
    }

    /// The longest match of the lowest metric; of equals the one on the device.
    fn lookup_v6(&self, device: &DeviceName, address: IpAddr) -> Option<&KernelRoute> {
        let mut covering = self.covering(address);
        let best = covering.next()?;
        let mut equals = covering.take_while(|r| (r.destination, r.metric) == (best.destination, best.metric));
        if best.next.device() == Some(device) {
            return Some(best);
        }
        equals.find(|r| r.next.device() == Some(device)).or(Some(best))
    }

    /// Routes whose destination covers an address, longest prefix first, then lowest metric.
    fn covering(&self, address: IpAddr) -> impl Iterator<Item = &KernelRoute> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (0..=bits).rev().filter_map(move |prefix| IpNetwork::new(address, prefix).ok().map(canonical)).flat_map(
            move |destination| self.routes.range((destination, 0)..=(destination, u32::MAX)).flat_map(|(_, l)| l),
        )
    }

    /// Deletes the first route of a destination that fits, lowest metric first.
    pub(super) fn route_del(&mut self, destination: IpNetwork, fits: impl Fn(&KernelRoute) -> bool) -> Answer {
        let mut found = None;
        for (key, list) in self.routes.range_mut((destination, 0)..=(destination, u32::MAX)) {
            if let Some(place) = list.iter().position(&fits) {
                found = Some((list.remove(place), list.is_empty().then_some(*key)));
                break;
            }
        }
        let (route, empty) = found.ok_or(Errno::SRCH)?;
        if let Some(key) = empty {
            self.routes.remove(&key);
        }
        self.echo(Event::Route(route, Told::Gone));
        Ok(())
    }

    /// What `ip route flush` does: one deletion a route, each told.
    pub(super) fn route_flush(&mut self, flushed: impl Fn(&KernelRoute) -> bool) -> usize {
        self.drop_routes(true, flushed)
    }

    // ---- firewall and sysctl ----

    pub(super) fn table_put(&mut self, rules: Ruleset, marked: bool) -> Answer {
        let family = rules.family;
        self.tables.insert(family, Table { rules, marked });
        self.echo(Event::Table(family, false));
        Ok(())
    }

    pub(super) fn table_del(&mut self, family: Family) -> Answer {
        self.tables.remove(&family).ok_or(Errno::NOENT)?;
        self.echo(Event::Table(family, true));
        Ok(())
    }

    pub(super) fn table_alter(&mut self, family: Family, alter: impl FnOnce(&mut Ruleset)) -> Answer {
        alter(&mut self.tables.get_mut(&family).ok_or(Errno::NOENT)?.rules);
        self.echo(Event::Table(family, false));
        Ok(())
    }

    pub(super) fn warn(&mut self, family: Family, warnings: Vec<Conflict>) {
        self.warnings.insert(family, warnings);
        self.echo(Event::Table(family, false));
    }

    /// Flannel's own table, beside which ours is put.
    pub(super) fn flannel_table(&mut self, family: Family, there: bool) {
        if there {
            self.flannel_tables.insert(family);
        } else {
            self.flannel_tables.remove(&family);
        }
        self.echo(Event::Table(family, false));
    }

    pub(super) fn sysctl_set(&mut self, name: &SysctlName, value: &str) -> Answer {
        *self.sysctls.get_mut(name).ok_or(Errno::NOENT)? = value.to_owned();
        // RTM_NEWNETCONF tells of forwarding, and of nothing else that podnet looks at.
        if Family::BOTH.iter().any(|family| *name == SysctlName::forwarding(*family)) {
            self.echo(Event::Forwarding);
        }
        Ok(())
    }

    // ---- views ----

    pub(super) fn our_devices(&self) -> BTreeSet<&DeviceName> {
        self.links.iter().filter(|(_, l)| l.is_ours()).map(|(n, _)| n).collect()
    }
}

/// The network of an address, without host bits.
pub(super) fn canonical(address: IpNetwork) -> IpNetwork {
    IpNetwork::new(address.network(), address.prefix()).unwrap_or(address)
}

fn same_subnet(one: IpNetwork, other: IpNetwork) -> bool {
    canonical(one) == canonical(other)
}

/// Whether an IPv4 address comes after another of its subnet on the device (`IFA_F_SECONDARY`). IPv6 knows no such thing.
fn is_secondary(address: IpNetwork, earlier: &[IpNetwork]) -> bool {
    address.is_ipv4() && earlier.iter().any(|a| same_subnet(*a, address))
}

fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !a.is_multicast() && a != Ipv4Addr::UNSPECIFIED && a != Ipv4Addr::BROADCAST && !a.is_loopback()
        }
        IpAddr::V6(a) => !a.is_multicast() && a != Ipv6Addr::UNSPECIFIED,
    }
}
