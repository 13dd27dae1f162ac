//! Which device and address carry the overlay, and what of the host collides with the cluster network: pure functions
//! over a [`HostView`]. Nothing here asks the kernel.

use std::net::IpAddr;

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};

use crate::admission::{Reserved, overlap};
use crate::backend::Underlay;
use crate::driver::{HostAddress, HostLink, HostRoute, HostView};
use crate::plan::{Conflict, Key, Route};
use crate::types::{DeviceName, Family, Mtu, Stack};

/// How the underlay is found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum UnderlayChoice {
    /// The device of the default route: IPv4's if the overlay has IPv4, else IPv6's; of several the one with the least metric.
    #[default]
    Automatic,
    /// A device, with its best address.
    Device(DeviceName),
    /// The device that bears this address, with this address in its family.
    Address(IpAddr),
}

/// Why there is no underlay now. All of these can change by themselves: the engine looks again when the host changes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnderlayError {
    /// No default route.
    #[error("no {family} default route to find the underlay by; give a device or an address (there are: {exist})")]
    NoDefaultRoute {
        /// The family that was looked at.
        family: Family,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The device is not there.
    #[error("there is no device {device} (there are: {exist})")]
    NoSuchDevice {
        /// The device that was asked for.
        device: DeviceName,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// No device has the address.
    #[error("no device has the address {address} (there are: {exist})")]
    NoSuchAddress {
        /// The address that was asked for.
        address: IpAddr,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The device has no address that fits.
    #[error("device {device} has no usable address of {families} (there are: {exist})")]
    NoAddress {
        /// The device.
        device: DeviceName,
        /// The families of the overlay.
        families: String,
        /// The devices and addresses that exist.
        exist: String,
    },
    /// The device's MTU makes no sense.
    #[error("device {device} has an MTU of {mtu} bytes")]
    Mtu {
        /// The device.
        device: DeviceName,
        /// Its MTU.
        mtu: u32,
    },
}

/// Finds the underlay, and says why it is this one.
///
/// Of a device's addresses: neither deprecated nor link-local (flannel takes one of those as its last resort); then, as
/// flannel chooses, global before narrower scopes, permanent before dynamic,
/// not temporary before temporary, and else the first in the kernel's order.
pub fn choose(
    host: &HostView,
    choice: &UnderlayChoice,
    families: &[Family],
) -> Result<(Underlay, String), UnderlayError> {
    let (link, asked, why) = match choice {
        UnderlayChoice::Device(device) => {
            let link = host
                .link(device)
                .ok_or_else(|| UnderlayError::NoSuchDevice { device: device.clone(), exist: inventory(host) })?;
            (link, None, "chosen by name".to_owned())
        }
        UnderlayChoice::Address(address) => {
            let link = host.addresses.iter().find(|a| a.address.ip() == *address).and_then(|a| host.link(&a.device));
            let link =
                link.ok_or_else(|| UnderlayError::NoSuchAddress { address: *address, exist: inventory(host) })?;
            (link, Some(*address), format!("it has the address {address}"))
        }
        UnderlayChoice::Automatic => {
            let family = families.iter().copied().min().unwrap_or(Family::V4);
            let (route, link) = default_route(host, family)
                .ok_or_else(|| UnderlayError::NoDefaultRoute { family, exist: inventory(host) })?;
            (link, None, format!("it has the {family} default route (metric {})", route.metric))
        }
    };
    let address = |family: Family| {
        let wanted = families.contains(&family);
        let given = asked.filter(|a| Family::of(*a) == family);
        given.or_else(|| best_address(host, &link.name, family)).filter(|_| wanted)
    };
    let v4 = address(Family::V4).and_then(|a| if let IpAddr::V4(a) = a { Some(a) } else { None });
    let v6 = address(Family::V6).and_then(|a| if let IpAddr::V6(a) = a { Some(a) } else { None });
    let addresses = Stack::from_halves(v4, v6).ok_or_else(|| UnderlayError::NoAddress {
        device: link.name.clone(),
        families: families.iter().map(Family::to_string).collect::<Vec<_>>().join(" or "),
        exist: inventory(host),
    })?;
    let mtu =
        Mtu::new(link.mtu.min(65_535)).map_err(|_| UnderlayError::Mtu { device: link.name.clone(), mtu: link.mtu })?;
    let on_link = host
        .routes
        .iter()
        .filter(|r| r.device.as_ref() == Some(&link.name) && r.gateway.is_none())
        .map(|r| r.destination)
        .collect();
    Ok((Underlay { device: link.name.clone(), mtu, addresses, on_link }, why))
}

fn default_route(host: &HostView, family: Family) -> Option<(&HostRoute, &HostLink)> {
    host.routes
        .iter()
        .filter(|r| r.destination.prefix() == 0 && Family::of(r.destination.ip()) == family)
        .filter_map(|r| Some((r, host.link(r.device.as_ref()?)?)))
        .min_by_key(|(r, _)| r.metric)
}

fn best_address(host: &HostView, device: &DeviceName, family: Family) -> Option<IpAddr> {
    let usable = |a: &&HostAddress| {
        let ip = a.address.ip();
        a.device == *device
            && Family::of(ip) == family
            && !a.deprecated
            && !ip.is_loopback()
            && !ip.is_multicast()
            && !link_local(ip)
    };
    // min_by_key keeps the first of equals: the kernel's order.
    host.addresses.iter().filter(usable).min_by_key(|a| (!a.global, !a.permanent, a.temporary)).map(|a| a.address.ip())
}

/// No peer may have such an address (admission), so that none can be published.
fn link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(a) => a.is_link_local(),
        IpAddr::V6(a) => a.is_unicast_link_local(),
    }
}

/// What exists, for an error that names it: at most 16 devices with their addresses.
fn inventory(host: &HostView) -> String {
    let devices: Vec<String> = host
        .links
        .iter()
        .filter(|l| !l.loopback)
        .take(16)
        .map(|l| {
            let addresses: Vec<String> =
                host.addresses.iter().filter(|a| a.device == l.name).map(|a| a.address.ip().to_string()).collect();
            if addresses.is_empty() { l.name.to_string() } else { format!("{} {}", l.name, addresses.join(" ")) }
        })
        .collect();
    if devices.is_empty() { "none".to_owned() } else { devices.join(", ") }
}

/// What of the host stands against the overlay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collisions {
    /// A family in which nothing can be done without harm: its network, or this node's subnet, is in use by the host.
    pub blocking: Vec<(Family, Conflict)>,
    /// Connected networks of the host inside the cluster network: peers whose subnets meet them are kept out.
    pub reserved: Vec<Reserved>,
    /// Connected networks smaller than a node's subnet: they take some addresses out of a peer's, which is said and
    /// no reason to cut the peer off.
    pub shadowing: Vec<Conflict>,
}

/// Finds what of the host collides with the overlay. `ours` are the overlay's devices; a connected route inside `subnets`
/// is the pods' own bridge.
pub fn collisions(
    host: &HostView,
    networks: &Stack<Ipv4Network, Ipv6Network>,
    subnets: &Stack<Ipv4Network, Ipv6Network>,
    underlay: &Underlay,
) -> Collisions {
    let mut found = Collisions::default();
    for family in networks.families() {
        let network = match family {
            Family::V4 => networks.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => networks.v6().map(|n| IpNetwork::V6(*n)),
        };
        let own = match family {
            Family::V4 => subnets.v4().map(|n| IpNetwork::V4(*n)),
            Family::V6 => subnets.v6().map(|n| IpNetwork::V6(*n)),
        };
        let Some(network) = network else { continue };
        let blocking = |with: String, advice: &str| {
            let object = Key::Route(network, Route::default_metric(family));
            (family, Conflict { object, with, advice: advice.to_owned() })
        };
        // Addresses first: a /32 underlay has no connected route.
        for address in host.addresses.iter().filter(|a| a.device == underlay.device) {
            if network.contains(address.address.ip()) {
                found.blocking.push(blocking(
                    format!("the underlay's address {} on {}", address.address, address.device),
                    "the cluster network must not contain addresses of the underlay: choose another cluster network",
                ));
            }
        }
        for route in host.routes.iter().filter(|r| r.gateway.is_none() && r.destination.prefix() > 0) {
            let Some(device) = route.device.as_ref().filter(|_| overlap(route.destination, network)) else { continue };
            let within = |outer: IpNetwork, inner: IpNetwork| outer.prefix() <= inner.prefix() && overlap(outer, inner);
            if own.is_some_and(|own| within(own, route.destination)) {
                continue;
            }
            let what = format!("the route {} of {device}", route.destination);
            if *device == underlay.device
                || within(route.destination, network)
                || own.is_some_and(|own| overlap(own, route.destination))
            {
                found.blocking.push(blocking(
                    what,
                    "the cluster network overlaps a network that this host is connected to: choose another cluster network, or remove that one",
                ));
            } else if own.is_some_and(|own| route.destination.prefix() > own.prefix()) {
                found.shadowing.push(Conflict {
                    object: Key::Route(route.destination, route.metric),
                    with: what,
                    advice: "pods of other nodes with addresses in it cannot be reached from here: remove it if it is not meant"
                        .to_owned(),
                });
            } else {
                found.reserved.push(Reserved {
                    network: route.destination,
                    what: format!("a network that this host is connected to by {device}"),
                });
            }
        }
    }
    found
}
