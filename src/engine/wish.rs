//! From what is known of this node to what is wanted of its kernel: the node's own units, and what a peer needs.
//! Pure; the engine calls it when an input changed.

use std::collections::BTreeSet;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use super::Settings;
use crate::admission::{Policy, Refusal, Reserved, judge_own};
use crate::backend::{Backend, BackendError, NodeView, OfferContext, Underlay};
use crate::driver::{HostView, Scope};
use crate::lease::{Lease, Offer};
use crate::masquerade::MasqueradePolicy;
use crate::node::HostSetting;
use crate::plan::{Conflict, Link, Object, Sysctl, SysctlName, Unit};
use crate::types::{Family, Mtu, Stack};
use crate::underlay::{self, Collisions, UnderlayError};

/// This node as every pure part sees it.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// The families in which the overlay works here.
    pub(super) families: Vec<Family>,
    pub(super) underlay: Underlay,
    /// One for each backend, in the same order.
    pub(super) nodes: Vec<NodeView>,
    pub(super) pod_mtu: Mtu,
    pub(super) blocking: Vec<(Family, Conflict)>,
    pub(super) shadowing: Vec<Conflict>,
    pub(super) policy: Policy,
    networks: Stack<Ipv4Network, Ipv6Network>,
    subnets: Stack<Ipv4Network, Ipv6Network>,
}

impl View {
    pub(super) fn offers(&self) -> Vec<Offer> {
        self.nodes.iter().map(|view| view.offer.clone()).collect()
    }

    pub(super) fn is_blocked(&self, family: Family) -> bool {
        self.blocking.iter().any(|(blocked, _)| *blocked == family)
    }
}

/// Why there is no view of this node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoView {
    #[error(transparent)]
    Underlay(#[from] UnderlayError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("no peer can accept this node's own lease: {0}; it is for the store of leases to change it")]
    OwnSubnet(Refusal),
    #[error("the lease {subnets}, the cluster network and the underlay {device} have no family in common")]
    NoFamily { subnets: String, device: String },
}

/// Which devices, networks and settings are ours to look at.
pub(super) fn scope(settings: &Settings, networks: Stack<Ipv4Network, Ipv6Network>) -> Scope {
    let families: Vec<Family> = networks.families().collect();
    let devices = settings.backends.iter().flat_map(|b| b.devices(&families)).collect();
    let mut sysctls = BTreeSet::new();
    for family in &families {
        sysctls.insert(SysctlName::forwarding(*family));
        if settings.bridge_netfilter != HostSetting::Ignore {
            sysctls.insert(SysctlName::bridge_netfilter(*family));
        }
    }
    Scope { devices, networks, adopt: settings.adopt, sysctls }
}

/// Puts this node together.
pub(super) fn view(
    settings: &Settings,
    networks: Stack<Ipv4Network, Ipv6Network>,
    lease: &Lease,
    host: &HostView,
    devices: &[Link],
) -> Result<View, NoView> {
    let wanted: Vec<Family> = networks.families().filter(|f| lease.subnets.has(*f)).collect();
    let (underlay, _) = underlay::choose(host, &settings.underlay, &wanted)?;
    let families: Vec<Family> = wanted.into_iter().filter(|f| underlay.addresses.has(*f)).collect();
    let subnets = families.iter().fold((None, None), |(v4, v6), family| match family {
        Family::V4 => (lease.subnets.v4().copied(), v6),
        Family::V6 => (v4, lease.subnets.v6().copied()),
    });
    let no_family =
        || NoView::NoFamily { subnets: format!("{:?}", lease.subnets), device: underlay.device.to_string() };
    let subnets = Stack::from_halves(subnets.0, subnets.1).ok_or_else(no_family)?;
    let networks = families.iter().fold((None, None), |(v4, v6), family| match family {
        Family::V4 => (networks.v4().copied(), v6),
        Family::V6 => (v4, networks.v6().copied()),
    });
    // Peers are looked at in the families that work here, and in no other.
    let networks = Stack::from_halves(networks.0, networks.1).ok_or_else(no_family)?;
    for family in &families {
        if let (Some(subnet), Some(network)) = (of(&subnets, *family), of(&networks, *family)) {
            judge_own(subnet, network, &settings.reserved).map_err(NoView::OwnSubnet)?;
        }
    }
    let mut nodes = Vec::new();
    let mut own_claims = BTreeSet::new();
    let mut pod_mtu: Option<Mtu> = None;
    for backend in &settings.backends {
        let offer = backend.offer(&OfferContext {
            node: &settings.node,
            families: &families,
            earlier: lease.offer(&backend.kind()),
            underlay: &underlay,
            devices,
        })?;
        for family in &families {
            let claims = offer.endpoint(*family).map(|e| backend.claims(&e)).transpose();
            let claims = claims.map_err(|reason| BackendError { backend: backend.kind(), reason })?;
            own_claims.extend(claims.into_iter().flatten().map(|claim| (backend.kind(), *family, claim)));
        }
        let mtu = backend.pod_mtu(&underlay, &families)?;
        pod_mtu = Some(pod_mtu.map_or(mtu, |least| least.min(mtu)));
        nodes.push(NodeView { node: settings.node.clone(), networks, subnets, underlay: underlay.clone(), offer });
    }
    let Collisions { blocking, reserved, shadowing } = underlay::collisions(host, &networks, &subnets, &underlay);
    let policy = Policy {
        node: settings.node.clone(),
        networks,
        own_subnets: subnets,
        own_addresses: host.addresses.iter().map(|a| a.address.ip()).filter(|ip| !ip.is_loopback()).collect(),
        own_claims,
        reserved: settings.reserved.iter().cloned().chain(reserved).chain(standing(host, &underlay)).collect(),
    };
    let pod_mtu = pod_mtu.unwrap_or(underlay.mtu);
    Ok(View { families, underlay, nodes, pod_mtu, blocking, shadowing, policy, networks, subnets })
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
    let links = underlay
        .on_link
        .iter()
        .filter(|n| n.prefix() > 0)
        .map(|network| Reserved { network: *network, what: format!("the underlay on {}", underlay.device) });
    gateways.chain(links).collect()
}

/// What this node itself needs, unit by unit.
pub(super) fn node_units(
    settings: &Settings,
    masquerade: &MasqueradePolicy,
    view: &View,
) -> Result<Vec<(Unit, Vec<Object>)>, BackendError> {
    let mut units = Vec::new();
    for family in Family::BOTH {
        if !view.families.contains(&family) {
            units.extend([Unit::Host(family), Unit::Node(family), Unit::Firewall(family)].map(|u| (u, Vec::new())));
            continue;
        }
        let mut host = Vec::new();
        let mut want = |setting: HostSetting, name: SysctlName| {
            if setting == HostSetting::Set {
                host.push(Object::Sysctl(Sysctl { name, value: "1".to_owned() }));
            }
        };
        want(settings.forwarding, SysctlName::forwarding(family));
        want(settings.bridge_netfilter, SysctlName::bridge_netfilter(family));
        units.push((Unit::Host(family), host));
        let mut objects = Vec::new();
        for (backend, node) in settings.backends.iter().zip(&view.nodes) {
            objects.extend(backend.node(node, family)?);
        }
        units.push((Unit::Node(family), objects));
        let rules = match family {
            Family::V4 => view.networks.v4().zip(view.subnets.v4()).and_then(|(n, s)| masquerade.ruleset_v4(*n, *s)),
            Family::V6 => view.networks.v6().zip(view.subnets.v6()).and_then(|(n, s)| masquerade.ruleset_v6(*n, *s)),
        };
        units.push((Unit::Firewall(family), rules.map(Object::Ruleset).into_iter().collect()));
    }
    Ok(units)
}

/// Settings of the host that are only watched, and are not as pods need them.
pub(super) fn missing_settings(settings: &Settings, view: &View, observed: &[Sysctl]) -> Vec<Conflict> {
    let mut missing = Vec::new();
    for family in &view.families {
        let wanted = [
            (settings.forwarding, SysctlName::forwarding(*family), "pods cannot reach anything beyond their node"),
            (
                settings.bridge_netfilter,
                SysctlName::bridge_netfilter(*family),
                "service addresses do not work between pods of one node (load br_netfilter)",
            ),
        ];
        for (setting, name, effect) in wanted {
            let is = observed.iter().find(|s| s.name == name).map(|s| s.value.as_str());
            if setting == HostSetting::Report && is != Some("1") {
                missing.push(Conflict {
                    object: crate::plan::Key::Sysctl(name.clone()),
                    with: format!("{name} = {}", is.unwrap_or("(absent)")),
                    advice: format!("{effect}: set it to 1, or let podnet set it"),
                });
            }
        }
    }
    missing
}
