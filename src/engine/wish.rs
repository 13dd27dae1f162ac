//! From what is known of this node to what is wanted of its kernel: the node's own units, and what a peer needs.
//! Pure; the engine calls it when an input changed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use super::Settings;
use crate::admission::{Policy, Refusal, Reserved, judge_own};
use crate::backend::{Backend, BackendError, Device, Maker, NodeView, OfferContext, Underlay};
use crate::driver::{HostRoute, HostView, Scope};
use crate::lease::{BackendData, Endpoint, Lease, Offer};
use crate::masquerade::{MasqueradePolicy, Seal};
use crate::node::HostSetting;
use crate::plan::{Conflict, Key, Link, NextHop, Object, Picture, Route, Step, Sysctl, SysctlName, Unit, UnitPlan};
use crate::types::{DeviceName, Family, Mtu, Stack};
use crate::underlay::{self, Collisions, UnderlayError};

/// This node as every pure part sees it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct View {
    /// The families in which the overlay works here, or is kept as it was.
    pub(super) families: Vec<Family>,
    /// What keeps a family of the lease from working, or what is wrong with it.
    pub(super) troubles: Vec<(Family, Trouble)>,
    pub(super) underlay: Underlay,
    /// Why the underlay is this one.
    pub(super) why: String,
    /// One for each backend, in the same order; `None` for one that serves no family here.
    pub(super) nodes: Vec<Option<NodeView>>,
    pub(super) pod_mtu: Mtu,
    pub(super) blocking: Vec<(Family, Conflict)>,
    pub(super) shadowing: Vec<Conflict>,
    pub(super) policy: Policy,
    /// This node's own devices and addresses.
    grounds: Vec<(Family, Vec<Object>)>,
    /// Forwarding is about to be switched on, which would end the underlay's listening to router advertisements.
    keep_listening: bool,
    networks: Stack<Ipv4Network, Ipv6Network>,
    subnets: Stack<Ipv4Network, Ipv6Network>,
}

impl View {
    /// What is to be published: the families that stand as they are now, others as peers know them.
    pub(super) fn offers(&self, lease: &Lease, stands: impl Fn(Family) -> bool) -> Vec<Offer> {
        let offers = self.nodes.iter().flatten().filter_map(|view| {
            let known = lease.offer(&view.offer.backend).map(|offer| &offer.endpoints);
            let v4 = match stands(Family::V4) {
                true => view.offer.endpoints.v4(),
                false => known.and_then(Stack::v4),
            };
            let v6 = match stands(Family::V6) {
                true => view.offer.endpoints.v6(),
                false => known.and_then(Stack::v6),
            };
            let endpoints = Stack::from_halves(v4.cloned(), v6.cloned())?;
            Some(Offer { backend: view.offer.backend.clone(), endpoints })
        });
        offers.collect()
    }

    pub(super) fn is_blocked(&self, family: Family) -> bool {
        self.blocking.iter().any(|(blocked, _)| *blocked == family)
    }

    /// What is wrong with a family.
    pub(super) fn trouble(&self, family: Family) -> Option<&Trouble> {
        self.troubles.iter().find(|(of, _)| *of == family).map(|(_, trouble)| trouble)
    }
}

/// What keeps this node out of its network in one family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Trouble {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("no peer can accept this node's own lease: {0}; it is for the store of leases to change it")]
    OwnSubnet(Refusal),
    #[error("the underlay {device} has no {family} address")]
    NoAddress { device: DeviceName, family: Family },
    #[error("the underlay {device} has no {family} address now; the network is kept as it was with {address}")]
    Away { device: DeviceName, family: Family, address: IpAddr },
}

/// Why there is no view of this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoView {
    #[error(transparent)]
    Underlay(#[from] UnderlayError),
    #[error("{}", .0.iter().map(|(_, trouble)| trouble.to_string()).collect::<Vec<_>>().join("; "))]
    Troubles(Vec<(Family, Trouble)>),
    #[error("the lease {subnets}, the cluster network and the underlay {device} have no family in common")]
    NoFamily { subnets: String, device: String },
}

/// Which devices, networks and settings are ours to look at.
pub(super) fn scope(
    settings: &Settings,
    networks: Stack<Ipv4Network, Ipv6Network>,
    underlay: Option<&DeviceName>,
) -> Scope {
    let mut scope = Scope::new(networks);
    scope.adopt = settings.adopt;
    scope.underlay = underlay.cloned();
    scope.reached = settings.underlay.reached().into_iter().collect();
    for family in networks.families() {
        scope.sysctls.insert(SysctlName::forwarding(family));
        if settings.bridge_netfilter != HostSetting::Ignore {
            scope.sysctls.insert(SysctlName::bridge_netfilter(family));
        }
        for device in settings.backends.iter().flat_map(|b| b.devices(family)) {
            if settings.router_advertisements != HostSetting::Ignore {
                scope.sysctls.insert(SysctlName::accept_ra(&device.name));
            }
            match device.maker {
                Maker::Netlink => scope.devices.insert(device.name),
                Maker::OwnDriver => scope.served.insert(device.name),
            };
        }
    }
    if let Some(device) = underlay.filter(|_| networks.v6().is_some()) {
        scope.sysctls.insert(SysctlName::accept_ra(device));
    }
    scope
}

/// The underlay as it is chosen now; `current` is the one before.
pub(super) fn choose(
    settings: &Settings,
    host: &HostView,
    families: &[Family],
    current: Option<&Underlay>,
) -> Result<(Underlay, String), UnderlayError> {
    underlay::choose(host, &settings.underlay, families, current)
}

/// The addresses at which peers reach this node: those that were given, else the underlay's.
pub(super) fn public(settings: &Settings, underlay: &Underlay) -> Stack<Ipv4Addr, Ipv6Addr> {
    let given = settings.public.as_ref();
    let v4 = underlay.addresses.v4().map(|own| given.and_then(Stack::v4).unwrap_or(own));
    let v6 = underlay.addresses.v6().map(|own| given.and_then(Stack::v6).unwrap_or(own));
    Stack::from_halves(v4.copied(), v6.copied()).unwrap_or(underlay.addresses)
}

/// What the kernel and the store say of this node.
pub(super) struct Seen<'a> {
    pub(super) networks: Stack<Ipv4Network, Ipv6Network>,
    pub(super) lease: &'a Lease,
    pub(super) host: &'a HostView,
    pub(super) devices: &'a [Link],
    pub(super) sysctls: &'a [Sysctl],
}

/// Puts this node together. `before` is the view that held until now.
pub(super) fn view(settings: &Settings, seen: &Seen<'_>, before: Option<&View>) -> Result<View, NoView> {
    let wanted: Vec<Family> = seen.networks.families().filter(|f| seen.lease.subnets.has(*f)).collect();
    let (mut underlay, why) = choose(settings, seen.host, &wanted, before.map(|v| &v.underlay))?;
    let mut troubles: Vec<(Family, Trouble)> = Vec::new();
    let mut families = Vec::new();
    for family in wanted {
        let device = underlay.device.clone();
        let before = before.filter(|v| v.families.contains(&family));
        match (underlay.addresses.has(family), before.and_then(|v| v.underlay.address(family))) {
            (true, _) => {}
            (false, None) => {
                troubles.push((family, Trouble::NoAddress { device, family }));
                continue;
            }
            // An address that is away for a moment comes back to a network that stands.
            (false, Some(address)) => {
                underlay.addresses = with(underlay.addresses, address);
                // The connected network went with the address. With a link that is down, so did everything.
                if let Some(before) = before.filter(|_| underlay.up) {
                    let of_family = |r: &&HostRoute| Family::of(r.destination.ip()) == family;
                    underlay.routes.retain(|r| !of_family(&r));
                    underlay.routes.extend(before.underlay.routes.iter().filter(of_family).cloned());
                }
                troubles.push((family, Trouble::Away { device, family, address }));
            }
        }
        let own = seen.lease.subnet(family).zip(of(&seen.networks, family));
        match own.map(|(subnet, network)| judge_own(subnet, network, &settings.reserved)) {
            Some(Err(refusal)) => troubles.push((family, Trouble::OwnSubnet(refusal))),
            _ => families.push(family),
        }
    }
    // A backend that cannot serve a family is left out there, and the rest is put together anew: offers, claims and devices of
    // a node belong together.
    let mut failed: BTreeSet<(usize, Family)> = BTreeSet::new();
    loop {
        match assemble(settings, seen, (&underlay, &why), &families, &failed) {
            Ok(Some(view)) => return Ok(View { troubles, ..view }),
            Ok(None) if troubles.is_empty() => {
                let subnets = format!("{:?}", seen.lease.subnets);
                return Err(NoView::NoFamily { subnets, device: underlay.device.to_string() });
            }
            Ok(None) => return Err(NoView::Troubles(troubles)),
            Err((backend, family, error)) => {
                failed.insert((backend, family));
                if (0..settings.backends.len()).all(|backend| failed.contains(&(backend, family))) {
                    families.retain(|f| *f != family);
                }
                troubles.push((family, error.into()));
            }
        }
    }
}

/// A stack with an address in its family.
fn with(stack: Stack<Ipv4Addr, Ipv6Addr>, address: IpAddr) -> Stack<Ipv4Addr, Ipv6Addr> {
    let (v4, v6) = (stack.v4().copied(), stack.v6().copied());
    match address {
        IpAddr::V4(a) => v6.map_or(Stack::V4(a), |b| Stack::Dual(a, b)),
        IpAddr::V6(b) => v4.map_or(Stack::V6(b), |a| Stack::Dual(a, b)),
    }
}

/// The halves of these families.
fn only<A: Copy, B: Copy>(stack: &Stack<A, B>, families: &[Family]) -> Option<Stack<A, B>> {
    let has = |family| families.contains(&family);
    Stack::from_halves(stack.v4().filter(|_| has(Family::V4)).copied(), stack.v6().filter(|_| has(Family::V6)).copied())
}

type Failed = (usize, Family, BackendError);

/// The view in these families, without the backends that failed; `None` if there are no families.
fn assemble(
    settings: &Settings,
    seen: &Seen<'_>,
    (underlay, why): (&Underlay, &str),
    families: &[Family],
    failed: &BTreeSet<(usize, Family)>,
) -> Result<Option<View>, Failed> {
    // Peers are looked at in the families that work here, and in no other.
    let (Some(networks), Some(subnets)) = (only(&seen.networks, families), only(&seen.lease.subnets, families)) else {
        return Ok(None);
    };
    let public = public(settings, underlay);
    let mut own_claims = BTreeSet::new();
    let mut pod_mtu: Option<Mtu> = None;
    let mut nodes = Vec::new();
    for (place, backend) in settings.backends.iter().enumerate() {
        let kind = backend.kind();
        let mut served = Vec::new();
        let (mut v4, mut v6) = (None, None);
        for family in families.iter().copied().filter(|family| !failed.contains(&(place, *family))) {
            let fail = |error| (place, family, error);
            let (data, mtu) = serve(settings, seen, underlay, &**backend, family).map_err(fail)?;
            pod_mtu = Some(pod_mtu.map_or(mtu, |least| least.min(mtu)));
            served.push(family);
            match family {
                Family::V4 => v4 = public.v4().map(|address| Endpoint { public_ip: *address, data }),
                Family::V6 => v6 = public.v6().map(|address| Endpoint { public_ip: *address, data }),
            }
        }
        let Some(endpoints) = Stack::from_halves(v4, v6) else {
            nodes.push(None);
            continue;
        };
        let offer = Offer { backend: kind.clone(), endpoints };
        for family in served {
            let claims = offer.endpoint(family).map(|e| backend.claims(&e)).transpose();
            let claims = claims.map_err(|reason| (place, family, BackendError { backend: kind.clone(), reason }))?;
            own_claims.extend(claims.into_iter().flatten().map(|claim| (kind.clone(), family, claim)));
        }
        let (node, underlay) = (settings.node.clone(), underlay.clone());
        nodes.push(Some(NodeView { node, networks, subnets, underlay, offer }));
    }
    let mut grounds = Vec::new();
    for family in families {
        let mut objects = Vec::new();
        for (place, (backend, view)) in settings.backends.iter().zip(&nodes).enumerate() {
            let Some(view) = view.as_ref().filter(|view| view.offer.endpoint(*family).is_some()) else { continue };
            objects.extend(backend.node(view, *family).map_err(|error| (place, *family, error))?);
        }
        grounds.push((*family, objects));
    }
    let Collisions { blocking, reserved, shadowing } = underlay::collisions(seen.host, &networks, &subnets, underlay);
    let policy = Policy {
        node: settings.node.clone(),
        networks,
        own_subnets: subnets,
        own_addresses: seen.host.addresses.iter().map(|a| a.address.ip()).filter(|ip| !ip.is_loopback()).collect(),
        own_claims,
        reserved: settings.reserved.iter().cloned().chain(reserved).chain(standing(seen.host, underlay)).collect(),
    };
    Ok(Some(View {
        families: families.to_vec(),
        troubles: Vec::new(),
        underlay: underlay.clone(),
        why: why.to_owned(),
        nodes,
        pod_mtu: pod_mtu.unwrap_or(underlay.mtu),
        blocking,
        shadowing,
        policy,
        grounds,
        keep_listening: keep_listening(settings, seen, underlay, families),
        networks,
        subnets,
    }))
}

/// What a backend publishes in a family, and the MTU that it leaves.
fn serve(
    settings: &Settings,
    seen: &Seen<'_>,
    underlay: &Underlay,
    backend: &dyn Backend,
    family: Family,
) -> Result<(BackendData, Mtu), BackendError> {
    let kind = backend.kind();
    let public = public(settings, underlay);
    let same = match family {
        Family::V4 => public.v4() == underlay.addresses.v4(),
        Family::V6 => public.v6() == underlay.addresses.v6(),
    };
    if backend.capabilities().needs_layer2 && !same {
        let reason = format!(
            "it reaches peers on their layer 2, and the public {family} address is not this node's own on {}",
            underlay.device
        );
        return Err(BackendError { backend: kind, reason });
    }
    let earlier = seen.lease.offer(&kind).and_then(|offer| offer.endpoint(family));
    let data = backend.offer(&OfferContext {
        node: &settings.node,
        family,
        earlier: earlier.as_ref().map(|endpoint| &endpoint.data),
        underlay,
        devices: seen.devices,
    })?;
    Ok((data, backend.mtu(underlay, family)?))
}

/// Whether the underlay's `accept_ra` must become 2 before IPv6 forwarding is switched on: the kernel then drops the routes that
/// routers announced, the default route among them, unless it is 2.
fn keep_listening(settings: &Settings, seen: &Seen<'_>, underlay: &Underlay, families: &[Family]) -> bool {
    let is = |name: SysctlName, value: &str| seen.sysctls.iter().any(|s| s.name == name && s.value == value);
    settings.forwarding == HostSetting::Set
        && settings.router_advertisements == HostSetting::Set
        && families.contains(&Family::V6)
        && is(SysctlName::forwarding(Family::V6), "0")
        && is(SysctlName::accept_ra(&underlay.device), "1")
}

fn of(stack: &Stack<Ipv4Network, Ipv6Network>, family: Family) -> Option<IpNetwork> {
    match family {
        Family::V4 => stack.v4().map(|n| IpNetwork::V4(*n)),
        Family::V6 => stack.v6().map(|n| IpNetwork::V6(*n)),
    }
}

/// What a pod's subnet must never cover: the gateways through which this node reaches the rest of the world, and what is
/// on the underlay's link.
fn standing(host: &HostView, underlay: &Underlay) -> Vec<Reserved> {
    let gateways = host.routes.iter().filter(|r| r.destination.prefix() == 0).filter_map(|r| {
        Some(Reserved { network: IpNetwork::from(r.gateway?), what: "the default gateway".to_owned() })
    });
    let on_link = |r: &&HostRoute| r.gateway.is_none() && r.device.as_ref() == Some(&underlay.device);
    let links = underlay
        .routes
        .iter()
        .filter(on_link)
        .map(|r| r.destination)
        .filter(|n| n.prefix() > 0)
        .map(|network| Reserved { network, what: format!("the underlay on {}", underlay.device) });
    gateways.chain(links).collect()
}

/// The metric of the guard's blackholes: behind every other route, and told from others' by it ("pd" in its upper half).
const GUARD_METRIC: u32 = 0x7064_0000;

/// What keeps pod packets from following the default route, for each cluster network that the host does not use itself.
pub(super) fn guards(scope: &Scope, host: &HostView) -> Vec<(Unit, Vec<Object>)> {
    let networks = scope.networks.families().filter_map(|family| Some((family, of(&scope.networks, family)?)));
    networks
        .map(|(family, network)| {
            let guard = Route { destination: network, metric: GUARD_METRIC, next: NextHop::Blackhole };
            let wanted = (!is_used(host, network)).then_some(Object::Route(guard));
            (Unit::Guard(family), wanted.into_iter().collect())
        })
        .collect()
}

/// Whether the host uses a cluster network itself: that family is left alone.
fn is_used(host: &HostView, network: IpNetwork) -> bool {
    let holds = |r: &HostRoute| r.destination.prefix() <= network.prefix() && r.destination.contains(network.ip());
    // By a device, as `underlay::collisions` has it: a route of several ways, or a blackhole, is no network of the host's.
    let connected = |r: &HostRoute| r.device.is_some() && r.gateway.is_none() && r.destination.prefix() > 0;
    host.routes.iter().any(|r| connected(r) && holds(r))
}

/// What of an earlier configuration, or of flannel's, would carry pod packets in plain text: VXLAN devices that no backend here
/// has, and routes to pods over anything but a device that a backend's own driver makes.
pub(super) fn stale(scope: &Scope, host: &HostView, picture: &Picture) -> Vec<UnitPlan> {
    let alone = |network: IpNetwork| of(&scope.networks, Family::of(network.ip())).is_some_and(|n| is_used(host, n));
    let plain = |object: &Object| match object {
        Object::Link(link) => !scope.devices.contains(&link.name),
        Object::Route(Route { destination, next, .. }) => {
            let device = next.device();
            scope.holds(*destination)
                && !alone(*destination)
                && device.is_some_and(|device| !scope.served.contains(device) && !scope.devices.contains(device))
        }
        _ => false,
    };
    let mut found: Vec<(Key, Object)> =
        picture.objects().filter(|(_, object, _)| plain(object)).map(|(k, o, _)| (k.clone(), o.clone())).collect();
    found.sort_by(|(a, _), (b, _)| b.rank().cmp(&a.rank()).then_with(|| a.cmp(b)));
    let delete = |(key, object)| UnitPlan { unit: Unit::Leftover(key), steps: vec![Step::Delete(object)] };
    found.into_iter().map(delete).collect()
}

/// The devices by which pod packets may leave. None where a backend encrypts without a device of its own: what it sends cannot be
/// told by that.
fn encrypting(settings: &Settings, family: Family) -> Vec<DeviceName> {
    let each: Vec<Vec<Device>> = settings.backends.iter().map(|backend| backend.devices(family)).collect();
    if each.iter().any(Vec::is_empty) {
        return Vec::new();
    }
    each.into_iter().flatten().map(|device| device.name).collect()
}

/// What this node itself needs, unit by unit.
pub(super) fn node_units(settings: &Settings, masquerade: &MasqueradePolicy, view: &View) -> Vec<(Unit, Vec<Object>)> {
    let mut units = Vec::new();
    for family in Family::BOTH {
        let ground = view.grounds.iter().find(|(of, _)| *of == family).map(|(_, objects)| objects.clone());
        let Some(ground) = ground else {
            let none = [Unit::Host(family), Unit::Node(family), Unit::Devices(family), Unit::Firewall(family)];
            units.extend(none.map(|unit| (unit, Vec::new())));
            continue;
        };
        let sysctl = |name: SysctlName, value: &str| Object::Sysctl(Sysctl { name, value: value.to_owned() });
        let mut host = Vec::new();
        if view.keep_listening && family == Family::V6 {
            host.push(sysctl(SysctlName::accept_ra(&view.underlay.device), "2"));
        }
        if settings.forwarding == HostSetting::Set {
            host.push(sysctl(SysctlName::forwarding(family), "1"));
        }
        if settings.bridge_netfilter == HostSetting::Set {
            host.push(sysctl(SysctlName::bridge_netfilter(family), "1"));
        }
        units.push((Unit::Host(family), host));
        units.push((Unit::Node(family), ground));
        let devices = settings.backends.iter().flat_map(|backend| backend.devices(family));
        let deaf = devices.filter(|_| settings.router_advertisements == HostSetting::Set);
        units.push((
            Unit::Devices(family),
            deaf.map(|device| sysctl(SysctlName::accept_ra(&device.name), "0")).collect(),
        ));
        let devices = if settings.require_encryption { encrypting(settings, family) } else { Vec::new() };
        let sealed = Seal { devices, others: view.policy.reserved.iter().map(|r| r.network).collect() };
        let own = of(&view.networks, family).zip(of(&view.subnets, family));
        let rules = own.and_then(|(network, subnet)| masquerade.ruleset(network, subnet, &sealed));
        units.push((Unit::Firewall(family), rules.map(Object::Ruleset).into_iter().collect()));
    }
    units
}

/// Settings of the host that are only watched, and are not as pods need them.
pub(super) fn missing_settings(settings: &Settings, view: &View, observed: &[Sysctl]) -> Vec<Conflict> {
    let mut missing = Vec::new();
    let value = |name: &SysctlName| observed.iter().find(|s| s.name == *name).map(|s| s.value.as_str());
    let mut miss = |name: SysctlName, advice: String| {
        let with = format!("{name} = {}", value(&name).unwrap_or("(absent)"));
        missing.push(Conflict { object: Key::Sysctl(name), with, advice });
    };
    for family in &view.families {
        let forwarding = SysctlName::forwarding(*family);
        if settings.forwarding == HostSetting::Report && value(&forwarding) != Some("1") {
            miss(
                forwarding,
                "pods cannot reach anything beyond their node: set it to 1, or let podnet set it".to_owned(),
            );
        }
        let netfilter = SysctlName::bridge_netfilter(*family);
        if settings.bridge_netfilter == HostSetting::Report && value(&netfilter) != Some("1") {
            let advice = "service addresses do not work between pods of one node (load br_netfilter): set it to 1, or \
                          let podnet set it";
            miss(netfilter, advice.to_owned());
        }
        for device in settings.backends.iter().flat_map(|backend| backend.devices(*family)) {
            let listens = SysctlName::accept_ra(&device.name);
            if settings.router_advertisements == HostSetting::Report && value(&listens) != Some("0") {
                miss(listens, "a member of the overlay could give this host a default route: set it to 0".to_owned());
            }
        }
    }
    missing
}
