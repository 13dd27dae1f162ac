//! [`Scope`]: what belongs to this overlay, and the written rules by which a driver tells ours, what is to be taken over, and
//! what of the host matters. Plain predicates: the real driver and the fake one ask the same.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::plan::{Route, SysctlName};
use crate::types::{DeviceName, Family, Stack};

/// `RTPROT_KERNEL` and `RTPROT_BOOT`.
const KERNEL: u8 = 2;
const BOOT: u8 = 3;

/// What belongs to this overlay, so that a driver can tell ours from others' with no memory of an earlier run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Scope {
    /// The cluster networks.
    pub networks: Stack<Ipv4Network, Ipv6Network>,
    /// The devices that the netlink driver is to make. A device of such a name that is not ours by kind and alias is a
    /// conflict; one that is ours by kind and alias under any other name is a leftover.
    pub devices: BTreeSet<DeviceName>,
    /// Devices that a backend's own driver makes. The netlink driver neither makes nor deletes them; where they bear our alias,
    /// what is on them is ours.
    pub served: BTreeSet<DeviceName>,
    /// The underlay's device, once it is known: flannel's host-gw and direct routes lead over it.
    pub underlay: Option<DeviceName>,
    /// Addresses that the underlay is to be found by: the routes that lead to them are part of the host's view.
    pub reached: BTreeSet<IpAddr>,
    /// Whether what flannel left is taken over: see [`Scope::adopts`] and [`Scope::adopts_device`].
    pub adopt: bool,
    /// The sysctls whose values are wanted.
    pub sysctls: BTreeSet<SysctlName>,
}

/// A route of the main table, as far as the rules of a [`Scope`] ask.
#[derive(Debug, Clone, Copy)]
pub struct SeenRoute<'a> {
    /// Where to.
    pub destination: IpNetwork,
    /// Its metric.
    pub metric: u32,
    /// Who made it (`RTPROT_*`).
    pub protocol: u8,
    /// The device of its one way; `None` of a blackhole and of several ways.
    pub device: Option<&'a DeviceName>,
    /// The gateway of its one way.
    pub gateway: Option<IpAddr>,
}

impl Scope {
    /// A scope of these networks with nothing in it, that takes over nothing.
    pub fn new(networks: Stack<Ipv4Network, Ipv6Network>) -> Self {
        Scope {
            networks,
            devices: BTreeSet::new(),
            served: BTreeSet::new(),
            underlay: None,
            reached: BTreeSet::new(),
            adopt: false,
            sysctls: BTreeSet::new(),
        }
    }

    /// Whether the cluster networks hold all of this network.
    pub fn holds(&self, network: IpNetwork) -> bool {
        match network {
            IpNetwork::V4(n) => self.networks.v4().is_some_and(|c| n.prefix() >= c.prefix() && c.contains(n.ip())),
            IpNetwork::V6(n) => self.networks.v6().is_some_and(|c| n.prefix() >= c.prefix() && c.contains(n.ip())),
        }
    }

    /// Whether a cluster network and this network have an address in common.
    pub fn meets(&self, network: IpNetwork) -> bool {
        self.holds(network)
            || match network {
                IpNetwork::V4(n) => self.networks.v4().is_some_and(|c| n.contains(c.network())),
                IpNetwork::V6(n) => self.networks.v6().is_some_and(|c| n.contains(c.network())),
            }
    }

    /// The written rule of adoption for routes (invariant 3): inside a cluster network, in the main table, of the default metric
    /// and protocol boot; over a device of ours (`over_ours`), or over the underlay to a gateway that is no pod's.
    pub fn adopts(&self, route: &SeenRoute<'_>, over_ours: bool) -> bool {
        let host_gw = || {
            route.device.is_some()
                && route.device == self.underlay.as_ref()
                && route.gateway.is_some_and(|gateway| !self.holds(gateway.into()))
        };
        self.adopt
            && route.protocol == BOOT
            && route.metric == Route::default_metric(Family::of(route.destination.ip()))
            && self.holds(route.destination)
            && (over_ours || host_gw())
    }

    /// The written rule of adoption for devices without a mark: a VXLAN device that a backend wants, or that bears the name
    /// flannel gives to a device of its VNI. Its routes would win over those of a backend that has no such device.
    pub fn adopts_device(&self, name: &DeviceName, vni: u32) -> bool {
        let flannels = || [format!("flannel.{vni}"), format!("flannel-v6.{vni}")].iter().any(|n| n == name.as_str());
        self.adopt && (self.devices.contains(name) || flannels())
    }

    /// The same for a device that a backend's own driver makes. flannel has one such kind, the kernel's WireGuard.
    pub fn adopts_served(&self, name: &DeviceName, kind: &str) -> bool {
        self.adopt && kind == "wireguard" && self.served.contains(name)
    }

    /// Whether a route of others is part of the host's view by itself: default routes, connected networks and all others
    /// without a gateway, what meets a cluster network, and ways to the addresses that are asked for.
    ///
    /// Beside these, the view holds the routes with a gateway that are more special than a connected network: see
    /// [`HostView::routes`](super::HostView::routes).
    pub fn shows(&self, route: &SeenRoute<'_>) -> bool {
        route.destination.prefix() == 0
            || route.protocol == KERNEL
            || (route.device.is_some() && route.gateway.is_none())
            || self.meets(route.destination)
            || self.reached.iter().any(|address| route.destination.contains(*address))
    }
}

/// The networks on a link, to find the routes that are more special than one of them.
#[derive(Debug, Default)]
pub(crate) struct OnLink(Vec<IpNetwork>);

impl OnLink {
    /// Those of these routes.
    pub(crate) fn of<'a>(routes: impl IntoIterator<Item = SeenRoute<'a>>) -> Self {
        OnLink(routes.into_iter().filter_map(|route| network_on_link(&route)).collect())
    }

    /// A route came or went.
    pub(crate) fn follow(&mut self, route: &SeenRoute<'_>, gone: bool) {
        if let Some(network) = network_on_link(route) {
            self.0.retain(|n| *n != network);
            self.0.extend((!gone).then_some(network));
        }
    }

    /// Whether one of them holds this network.
    pub(crate) fn holds(&self, network: IpNetwork) -> bool {
        self.0.iter().any(|n| n.prefix() <= network.prefix() && n.contains(network.ip()))
    }
}

/// The network that a route makes reachable without a gateway. Nothing is more special than one address: of a pod's, say.
fn network_on_link(route: &SeenRoute<'_>) -> Option<IpNetwork> {
    let to = route.destination;
    let whole = to.prefix() == if to.is_ipv4() { 32 } else { 128 };
    (route.device.is_some() && route.gateway.is_none() && to.prefix() > 0 && !whole).then_some(to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> DeviceName {
        name.parse().unwrap()
    }

    fn route<'a>(destination: &str, device: &'a DeviceName, gateway: Option<&str>) -> SeenRoute<'a> {
        SeenRoute {
            destination: destination.parse().unwrap(),
            metric: 0,
            protocol: BOOT,
            device: Some(device),
            gateway: gateway.map(|g| g.parse().unwrap()),
        }
    }

    #[test]
    fn flannels_routes_are_adopted_over_our_devices_and_over_the_underlay_and_nobody_elses() {
        let (eth0, docker0) = (device("eth0"), device("docker0"));
        let scope = Scope {
            underlay: Some(eth0.clone()),
            adopt: true,
            ..Scope::new(Stack::V4("10.42.0.0/16".parse().unwrap()))
        };
        let host_gw = route("10.42.1.0/24", &eth0, Some("10.240.0.102"));
        assert!(scope.adopts(&host_gw, false));
        assert!(scope.adopts(&route("10.42.1.0/24", &docker0, Some("10.42.1.0")), true), "over a device of ours");
        for other in [
            route("10.43.1.0/24", &eth0, Some("10.240.0.102")),
            route("10.0.0.0/8", &eth0, Some("10.240.0.102")),
            route("10.42.1.0/24", &eth0, None),
            route("10.42.1.0/24", &eth0, Some("10.42.7.1")),
            route("10.42.1.0/24", &docker0, Some("172.17.0.9")),
            SeenRoute { metric: 100, ..host_gw },
            SeenRoute { protocol: 4, ..host_gw },
        ] {
            assert!(!scope.adopts(&other, false), "{other:?}");
        }
        assert!(!Scope { adopt: false, ..scope.clone() }.adopts(&host_gw, true));
        assert!(!Scope { underlay: None, ..scope }.adopts(&host_gw, false));
    }
}
