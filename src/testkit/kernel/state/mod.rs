//! The state of the fake kernel and the rules by which it moves: what one netlink request does, what it drags along,
//! what it answers and what the kernel tells about it.
//!
//! Plain and synchronous: it knows nothing of drivers, ownership or faults. Each rule was seen on kernel 6.18; the
//! model test compares them with the kernel that runs it.

mod addresses;
mod links;
mod neighbours;
mod routes;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::driver::Errno;
use crate::driver::netlink::ALIAS as ALIAS_OURS;
use crate::masquerade::Ruleset;
use crate::plan::{Conflict, NextHop, Route, SysctlName, Vxlan};
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
